"""The frozen files of an adapter run, wherever they are: where the run found them, else in the keepers' memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from holdfast.errors import ConfigurationError, SnapshotError
from holdfast.fault_tolerance.bricks import BrickFile
from holdfast.trainer.config import AdapterConfig

__all__ = ["Frozen", "file_digest"]

_CHUNK_BYTES = 1 << 20


def _not_in_memory(file: BrickFile, _: BinaryIO) -> None:
    raise SnapshotError("no keeper was asked to hold it (adapter.in_memory)")


@dataclass(frozen=True, slots=True)
class Frozen:
    """Files that a run reads and never writes, and the way to those that have gone."""

    files: Sequence[BrickFile] = ()
    fetch: Callable[[BrickFile, BinaryIO], None] = _not_in_memory
    """Writes a whole file, verified, from memory. Raises: SnapshotError; OSError of the file that is written."""
    restored: Callable[[Sequence[BrickFile], str], None] = lambda files, why: None
    """Told which files had to be fetched, and why the first of them."""

    def warm_up(self) -> None:
        """Read and digest every file now, so that a recovery need not. What is wrong is found again when it matters."""
        for file in self.files:
            _what_is_wrong(file)

    @contextmanager
    def at_hand(self, config: AdapterConfig) -> Iterator[AdapterConfig]:
        """``config`` with paths whose files are what the run began with. What had to be fetched is in a temporary
        directory until the end of the block: nothing is written over what the user has.

        Raises: ConfigurationError for a file that is neither in its place nor in memory.
        """
        wrong = {file.path: why for file in self.files if (why := _what_is_wrong(file))}
        if not wrong:
            yield config
            return
        with TemporaryDirectory(prefix="holdfast-frozen-") as folder:
            parents = sorted({Path(path).parent for path in wrong})
            moved = {parent: Path(folder, str(number)) for number, parent in enumerate(parents)}
            for file in self.files:
                self._place(file, moved.get(Path(file.path).parent), wrong.get(file.path, ""))
            self.restored([file for file in self.files if file.path in wrong], next(iter(wrong.values())))
            yield replace(
                config,
                base=_beside(moved, config.base),
                tasks=[str(moved.get(Path(task), task)) for task in config.tasks],
                directions=_beside(moved, config.directions) if config.directions else "",
            )

    def _place(self, file: BrickFile, folder: Path | None, why: str) -> None:
        """Into a directory that takes the place of its own, if there is one."""
        if folder is None:
            return
        folder.mkdir(exist_ok=True)
        place = folder / Path(file.path).name
        if not why:
            place.symlink_to(file.path)
            return
        try:
            with place.open("wb") as out:
                self.fetch(file, out)
        except (SnapshotError, OSError) as error:
            raise ConfigurationError(
                f"{file.name}={file.path!r} is not the file that the run began with ({file.size:,} bytes, sha256 "
                f"{file.digest}): {why}. From the keepers' memory it cannot be had either: {error}. Put that file "
                "back, and the same command goes on from the newest checkpoint"
            ) from error


def _beside(moved: Mapping[Path, Path], path: str) -> str:
    """Where a file is, when the directories that hold it may have a stand-in."""
    parent = Path(path).parent
    return str(moved.get(parent, parent) / Path(path).name)


def file_digest(path: Path) -> str:
    """sha256, computed once per process unless size or time of the file change: it may have gigabytes, and a recovery
    should not wait for them again. Raises: OSError."""
    about = path.stat()
    return _content_digest(path, about.st_size, about.st_mtime_ns)


def _what_is_wrong(file: BrickFile) -> str:
    try:
        have = file_digest(Path(file.path))
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    return "" if have == file.digest else f"the file there has sha256 {have}"


@cache
def _content_digest(path: Path, size: int, changed_ns: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
