"""Where durable checkpoints live: files that are there as a whole or not at all.

:class:`DirectoryStorage` uses plain ``os`` calls. ``pyarrow.fs.LocalFileSystem`` was tried and does not promise
enough: under strace, writing and moving a file with pyarrow 26 makes one ``rename`` and no ``fsync`` at all, so a
power loss may leave a complete name in front of missing bytes.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from holdfast.errors import ConfigurationError, InvariantViolation, SnapshotError
from holdfast.fault_tolerance.impairment import Impaired
from holdfast.fault_tolerance.storage_uri import parse_uri
from holdfast.fault_tolerance.throttle import Throttle

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["MARK", "SEAL", "DirectoryStorage", "MemoryStorage", "Storage", "checked", "flat", "open_storage", "whole"]

logger = logging.getLogger(__name__)

MARK = ".tmp-"
"""In the name of everything that is not finished: files being written, directories being deleted."""
SEAL = "commit.json"
"""The file of a directory that says that all others are there."""
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Storage(Protocol):
    """Files by relative path, with ``/`` between names. Called from any thread or process; calls may block for long.

    Whatever a method cannot do raises :class:`SnapshotError`, with the path and the way out.
    """

    def write(self, path: str, buffers: Iterable[Buffer]) -> int:
        """Put the buffers one after the other into a file, replacing it; returns its bytes. Directories are made.

        A reader sees the old file or the new one, never a part. When it returns the file outlives a power loss;
        when it raises, nothing of the new file is left.
        """
        ...

    def read(self, path: str) -> bytes: ...

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        """Bytes ``start`` up to, not including, ``stop`` of a file; it is an error if the file ends before ``stop``."""
        ...

    def size(self, path: str) -> int:
        """Bytes of a file."""
        ...

    def exists(self, path: str) -> bool:
        """Whether there is a file or directory of this name."""
        ...

    def list(self, directory: str) -> Sequence[str]:
        """Sorted names of what is finished in ``directory`` ("" is the root); nothing if there is no such directory."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Give a file or directory a new name; ``new`` must not exist. In one step, except for directories in object
        stores: there ``SEAL`` arrives last under the new name and goes first from the old one."""
        ...

    def delete(self, path: str) -> None:
        """Remove a file or directory and all in it, for good. It is gone from ``list`` before its first file is; in
        object stores its ``SEAL`` is the first file that goes."""
        ...

    def sweep(self) -> Sequence[str]:
        """Remove what killed writers and deleters left behind; returns the paths.

        For whoever owns the storage, before anybody writes: a write in progress would be swept and fail.
        """
        ...


def open_storage(uri: str, throttle: Throttle | None = None) -> Storage:
    """The storage named by an absolute path or a URI, see :mod:`~holdfast.fault_tolerance.storage_uri`; ``throttle``
    bounds what is written.

    Raises: ConfigurationError for a relative path, another scheme or unknown options, SnapshotError for a file system
    that cannot be reached.
    """
    parsed = parse_uri(uri)
    paced = Impaired(throttle or Throttle())
    if not parsed.scheme:
        return DirectoryStorage(parsed.path, paced)
    from holdfast.fault_tolerance.object_storage import open_remote  # pyarrow.fs, for those who need it

    return open_remote(uri, paced)


class DirectoryStorage:
    """A directory of a local or network file system whose rename is atomic."""

    def __init__(self, root: str | os.PathLike[str], throttle: Throttle | None = None) -> None:
        self._root, self._throttle = Path(root), throttle or Throttle()
        if not self._root.is_absolute():
            raise ConfigurationError(f"storage root {str(root)!r} must be absolute, e.g. {self._root.absolute()}")

    def write(self, path: str, buffers: Iterable[Buffer]) -> int:
        target, views = self._at(path), flat(buffers)
        temporary, total = _unfinished(target), sum(view.nbytes for view in views)
        try:
            _make_directories(target.parent)
            _write_durably(temporary, self._throttle.paced(views))
            os.replace(temporary, target)
            _sync(target.parent)
        except BaseException as error:
            _remove(temporary)
            if isinstance(error, OSError):
                raise _cannot_write(target, total, error) from error
            raise
        return total

    def read(self, path: str) -> bytes:
        with _naming("read", self._at(path)) as target:
            return target.read_bytes()

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with _naming("read", self._at(path)) as target, target.open("rb", buffering=0) as file:
            os.lseek(file.fileno(), start, os.SEEK_SET)
            return whole(path, start, stop, _read_up_to(file.fileno(), stop - start))

    def size(self, path: str) -> int:
        with _naming("read", self._at(path)) as target:
            status = target.stat()
            if not stat.S_ISREG(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, "it is no file")
            return status.st_size

    def exists(self, path: str) -> bool:
        with _naming("look for", self._at(path)) as target:
            return target.exists()

    def list(self, directory: str) -> Sequence[str]:
        with _naming("list", self._at(directory) if directory else self._root) as target:
            try:
                names = os.listdir(target)
            except FileNotFoundError:  # any other trouble must not look like an empty directory
                return []
            return sorted(name for name in names if MARK not in name)

    def rename(self, old: str, new: str) -> None:
        with _naming("rename", self._at(old)) as source:
            target = self._at(new)
            if target.exists():
                raise SnapshotError(f"{source} cannot be renamed: {target} exists already")
            _make_directories(target.parent)
            os.rename(source, target)
            _sync(target.parent)
            _sync(source.parent)

    def delete(self, path: str) -> None:
        with _naming("delete", self._at(path)) as target:
            away = _unfinished(target)
            try:
                os.rename(target, away)
            except FileNotFoundError:
                return
            _sync(target.parent)
            _remove(away)

    def sweep(self) -> Sequence[str]:
        found = list(_leftovers(self._root))
        for path in found:
            _remove(path)
        return [str(path.relative_to(self._root)) for path in found]

    def _at(self, path: str) -> Path:
        return self._root / checked(path)


class MemoryStorage:
    """The same promises in a dictionary, for tests and notebooks. Bytes are copied in and out."""

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def write(self, path: str, buffers: Iterable[Buffer]) -> int:
        name, content = checked(path), b"".join(flat(buffers))
        with self._lock:
            self._files[name] = content
        return len(content)

    def read(self, path: str) -> bytes:
        with self._lock:
            try:
                return self._files[checked(path)]
            except KeyError as missing:
                raise SnapshotError(f"cannot read {path!r}: no such file in memory") from missing

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        return whole(path, start, stop, self.read(path)[start:stop])

    def size(self, path: str) -> int:
        return len(self.read(path))

    def exists(self, path: str) -> bool:
        with self._lock:
            return bool(self._below(checked(path)))

    def list(self, directory: str) -> Sequence[str]:
        name = checked(directory) if directory else ""
        with self._lock:
            if name in self._files:
                raise SnapshotError(f"cannot list {directory!r}: it is a file")
            return sorted({rest.split("/")[0] for rest in self._below(name).values()})

    def rename(self, old: str, new: str) -> None:
        source, target = checked(old), checked(new)
        with self._lock:
            if self._below(target):
                raise SnapshotError(f"{old!r} cannot be renamed: {new!r} exists already")
            moved = self._below(source)
            if not moved:
                raise SnapshotError(f"cannot rename {old!r}: no such file in memory")
            for name, rest in moved.items():
                self._files[f"{target}/{rest}" if rest else target] = self._files.pop(name)

    def delete(self, path: str) -> None:
        with self._lock:
            for name in self._below(checked(path)):
                del self._files[name]

    def sweep(self) -> Sequence[str]:
        return []

    def _below(self, path: str) -> dict[str, str]:
        """Files at or below ``path``, each with the rest of its name."""
        prefix = f"{path}/" if path else ""
        below = {name: name[len(prefix) :] for name in self._files if name.startswith(prefix)}
        return {path: "", **below} if path in self._files else below


def checked(path: str) -> str:
    """``path`` if it stays below the root and cannot be mistaken for something unfinished."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or MARK in path:
        raise InvariantViolation(f"storage path {path!r} must be a relative name without '..' and {MARK!r}")
    return "/".join(parts)


def flat(buffers: Iterable[Buffer]) -> Sequence[memoryview]:
    """Bytes views without a copy; empty buffers are left out, because an empty array cannot be cast."""
    views = [memoryview(buffer) for buffer in buffers]
    return [view.cast("B") for view in views if view.nbytes]


def _unfinished(target: Path) -> Path:
    """A name beside ``target`` (a rename must not cross file systems) that nobody else uses."""
    return target.with_name(f"{target.name}{MARK}{uuid.uuid4().hex[:12]}")


def _write_durably(path: Path, views: Iterable[memoryview]) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        for view in views:
            while view:  # Linux writes at most 2 GiB at once, and less when the disk is nearly full
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)  # network file systems report a full disk only here
    finally:
        os.close(descriptor)


def _read_up_to(descriptor: int, count: int) -> bytes:
    parts = list[bytes]()
    while count and (part := os.read(descriptor, count)):  # Linux reads at most 2 GiB at once
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def whole(path: str, start: int, stop: int, found: bytes) -> bytes:
    """``found`` if it has all bytes from ``start`` to ``stop``. Raises: SnapshotError."""
    if len(found) != stop - start:
        raise SnapshotError(
            f"cannot read bytes {start:,} to {stop:,} of {path}: it ends {stop - start - len(found):,} earlier"
        )
    return found


def _make_directories(directory: Path) -> None:
    """Like ``mkdir -p``, and the new names outlive a power loss."""
    missing = [d for d in (directory, *directory.parents) if not d.exists()]
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync(new.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """What has an unfinished name is invisible to readers: failing to remove it costs space, not safety."""
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s could not be removed and is left for the next sweep: %s", path, error)


def _leftovers(root: Path) -> Iterator[Path]:
    for folder, directories, files in os.walk(root):
        yield from (Path(folder, name) for name in [*directories, *files] if MARK in name)
        directories[:] = [name for name in directories if MARK not in name]


@contextmanager
def _naming(verb: str, target: Path) -> Iterator[Path]:
    """Turn the operating system's error into one that says what was tried."""
    try:
        yield target
    except OSError as error:
        raise SnapshotError(f"cannot {verb} {target}: {error.strerror or error}") from error


def _cannot_write(target: Path, total: int, error: OSError) -> SnapshotError:
    if error.errno in _FULL:
        return SnapshotError(
            f"no space left for {total:,} bytes of {target}; free space there, lower snapshot.keep_last, "
            "or set root to a larger file system"
        )
    return SnapshotError(f"cannot write {total:,} bytes to {target}: {error.strerror or error}")
