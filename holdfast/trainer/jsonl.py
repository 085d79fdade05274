"""Appending JSON lines so that readers, a kill and a full disk meet whole lines only."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["JsonLines"]

logger = logging.getLogger(__name__)


class JsonLines:
    """A file of JSON objects, one a line, in the file when ``append`` returns.

    A full disk is logged once and never raised. Numbers that JSON does not have (NaN, infinities) become null.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_failing = False
        self._is_torn = _ends_inside_a_line(path)

    def append(self, record: Mapping[str, object]) -> None:
        line = _encode(record)
        try:
            self._write(line)
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                logger.warning("lines are missing from %s: %s", self._path, error)
            self._is_failing = True

    def _write(self, line: bytes) -> None:
        """One ``write`` per line, so that readers and a kill see whole lines. What a full disk has taken only a part of
        is taken back; what a kill has torn is closed before the next."""
        content = b"\n" + line if self._is_torn else line
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            written = os.write(descriptor, content)
            if written < len(content):
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
                raise OSError(f"only {written} of {len(content)} bytes were written")
        finally:
            os.close(descriptor)
        self._is_torn = False


def _encode(record: Mapping[str, object]) -> bytes:
    try:
        text = json.dumps(record, allow_nan=False)
    except ValueError:  # rare, so the usual record is not searched for such numbers
        text = json.dumps(_finite(record), allow_nan=False)
    return text.encode() + b"\n"


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(v) for v in value]
    return value


def _ends_inside_a_line(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:  # missing or empty
        return False
