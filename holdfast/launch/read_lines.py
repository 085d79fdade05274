"""Reading JSON lines that somebody else may be writing: whole lines only, and none twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["NewLines", "records"]

Line = Mapping[str, Any]
"""One JSON object: JSON values, so opaque to the type checker."""


def records(path: Path) -> Iterator[Line]:
    """All JSON objects of a file, without lines that a kill has torn; nothing without a file."""
    lines = NewLines(path)
    yield from lines.read()
    yield from _parsed(lines.unfinished)


class NewLines:
    """What a growing file of JSON lines has got since it was read last. A line counts once its end is written."""

    def __init__(self, path: Path, *, newest_bytes: int | None = None) -> None:
        """``newest_bytes``: begin so far before the end, at the next whole line; at the beginning if None."""
        self._path, self._offset = path, 0
        self.unfinished = b""
        """Of the last line, which has no end yet."""
        if newest_bytes is not None:
            self._skip_to(newest_bytes)

    def _skip_to(self, newest_bytes: int) -> None:
        with suppress(OSError), self._path.open("rb") as file:
            start = file.seek(0, os.SEEK_END) - newest_bytes
            if start > 0:
                file.seek(start)
                file.readline()
                self._offset = file.tell()

    def read(self) -> Iterator[Line]:
        """JSON objects in the order of the file; what is damaged, and what is no object, is passed over."""
        for line in self._whole_lines():
            yield from _parsed(line)

    def _whole_lines(self) -> list[bytes]:
        try:
            with self._path.open("rb") as file:
                if file.seek(0, os.SEEK_END) < self._offset:  # another file has taken its place
                    self._offset = 0
                file.seek(self._offset)
                content = file.read()
        except OSError:  # not there yet, or not any more
            return []
        whole, end, self.unfinished = content.rpartition(b"\n")
        self._offset += len(whole) + len(end)
        return whole.split(b"\n") if end else []


def _parsed(line: bytes) -> Iterator[Line]:
    with suppress(ValueError, RecursionError):
        found = json.loads(line)
        if isinstance(found, dict):
            yield found
