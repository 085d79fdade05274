"""Checkpoints in S3, Google Cloud Storage and HDFS. The only door to ``pyarrow.fs``.

An object appears as a whole when its upload is completed, so :class:`ObjectStorage` writes under the final name.
Three things pyarrow 26 does shape it, each tried against a server:

- A stream cannot be aborted: closing one publishes what was sent, even inside an exception. Only an upload that failed
  in the background stays failed; without ``background_writes`` even one that lacks a part is completed.
- ``background_writes`` queues without bound, so it is flushed after every few parts.
- A bucket that does not exist lists as empty unless ``allow_not_found`` is off.

What a killed writer has sent of a file stays in the bucket, invisible, until a lifecycle rule of the bucket
(``AbortIncompleteMultipartUpload``) removes it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from pyarrow import ArrowException, fs

from holdfast.errors import SnapshotError
from holdfast.fault_tolerance.storage import MARK, SEAL, Storage, checked, flat, whole
from holdfast.fault_tolerance.storage_uri import parse_uri
from holdfast.fault_tolerance.throttle import PART_BYTES, Throttle

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ObjectStorage", "RenamingStorage", "open_remote"]

logger = logging.getLogger(__name__)

_CONNECT_S, _ANSWER_S, _ATTEMPTS = 5.0, 10.0, 2
"""A request fails after 2 x (5 + 10) seconds at most: the driver, which waits for a few in a row when storage goes
away, must be heard by the keepers before their lease ends."""
_PARTS_IN_FLIGHT = 4
_LARGEST_COPY = 5 << 30
"""Bytes of an object that S3 copies by itself."""


def open_remote(uri: str, throttle: Throttle) -> Storage:
    """The storage that an s3://, gs:// or hdfs:// URI names; nothing is looked for in it yet.

    Raises: ConfigurationError for a URI that cannot be meant, SnapshotError when the file system cannot be reached.
    """
    parsed = parse_uri(uri)
    with _naming("open", uri):
        files = _connected(parsed.scheme, parsed.host, tuple(sorted(parsed.options.items())))
    if parsed.scheme == "hdfs":
        return RenamingStorage(files, parsed.path, throttle)
    return ObjectStorage(files, f"{parsed.host}/{parsed.path}".rstrip("/"), throttle)


@functools.lru_cache(maxsize=8)  # connections are worth keeping: a keeper opens its storage for every checkpoint
def _connected(scheme: str, host: str, options: tuple[tuple[str, str], ...]) -> Any:  # pyarrow has no types
    given = dict(options)
    if scheme == "s3":
        if not {"region", "endpoint_override"} & given.keys():
            given["region"] = fs.resolve_s3_region(host)
        return fs.S3FileSystem(
            **given,
            connect_timeout=_CONNECT_S,
            request_timeout=_ANSWER_S,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS),
            background_writes=True,
        )
    if scheme == "gs":
        return fs.GcsFileSystem(**given, retry_time_limit=timedelta(seconds=_ATTEMPTS * (_CONNECT_S + _ANSWER_S)))
    name_node, _, port = host.partition(":")
    replication = int(given.get("replication", "3"))
    return fs.HadoopFileSystem(name_node, int(port or 0), user=given.get("user"), replication=replication)


class _RemoteStorage(ABC):
    """What both kinds have in common. Names inside are those of pyarrow: root and path."""

    def __init__(self, files: Any, root: str, throttle: Throttle | None = None) -> None:
        self._files, self._root, self._throttle = files, root, throttle or Throttle()

    @abstractmethod
    def _put(self, name: str, views: Sequence[memoryview]) -> None: ...

    @abstractmethod
    def _move(self, source: str, target: str) -> None: ...

    @abstractmethod
    def _remove(self, name: str) -> None: ...

    def write(self, path: str, buffers: Iterable[Buffer]) -> int:
        views = flat(buffers)
        total = sum(view.nbytes for view in views)
        with _naming(f"write {total:,} bytes to", self._at(path)) as name:
            self._put(name, views)
        return total

    def read(self, path: str) -> bytes:
        with _naming("read", self._at(path)) as name, self._files.open_input_file(name) as file:
            content: bytes = file.readall()
            return content

    def read_range(self, path: str, start: int, stop: int) -> bytes:
        with _naming("read", self._at(path)) as name, self._files.open_input_file(name) as file:
            return whole(path, start, stop, file.read_at(stop - start, start))

    def size(self, path: str) -> int:
        with _naming("read", self._at(path)) as name:
            found = self._files.get_file_info(name)
            if found.type != fs.FileType.File:
                raise FileNotFoundError("no such file")
            return int(found.size)

    def exists(self, path: str) -> bool:
        with _naming("look for", self._at(path)) as name:
            return self._is_there(name)

    def list(self, directory: str) -> Sequence[str]:
        with _naming("list", self._at(directory) if directory else self._root) as name:
            try:
                found = self._files.get_file_info(fs.FileSelector(name))
            except (FileNotFoundError, NotADirectoryError):  # any other trouble must not look like an empty directory
                if self._files.get_file_info(name).type == fs.FileType.File:
                    raise NotADirectoryError("it is a file") from None
                return []
            return sorted(one.base_name for one in found if MARK not in one.base_name)

    def rename(self, old: str, new: str) -> None:
        with _naming("rename", self._at(old)) as source:
            target = self._at(new)
            if self._is_there(target):
                raise SnapshotError(f"{source} cannot be renamed: {target} exists already")
            if not self._is_there(source):
                raise FileNotFoundError("no such file")
            self._move(source, target)

    def delete(self, path: str) -> None:
        with _naming("delete", self._at(path)) as name:
            if self._is_there(name):
                self._remove(name)

    def _is_there(self, name: str) -> bool:
        return bool(self._files.get_file_info(name).type != fs.FileType.NotFound)

    def _all_below(self, name: str) -> Sequence[Any]:
        found: Sequence[Any] = self._files.get_file_info(fs.FileSelector(name, recursive=True, allow_not_found=True))
        return found

    def _erase(self, name: str) -> None:
        """Remove a file or a directory; one that has gone meanwhile is no trouble."""
        with contextlib.suppress(FileNotFoundError):
            if self._files.get_file_info(name).type == fs.FileType.Directory:
                self._files.delete_dir(name)
            else:
                self._files.delete_file(name)

    def _at(self, path: str) -> str:
        return f"{self._root}/{checked(path)}"


class ObjectStorage(_RemoteStorage):
    """Objects, which appear as a whole and have no directories. Renaming and deleting a directory takes many requests:
    its ``commit.json`` arrives last under the new name and goes first from the old one, so what is left half-way by a
    death is either whole or no checkpoint. A write that something other than the storage interrupts, such as a signal,
    can show for a moment a part of the file under its name."""

    def sweep(self) -> Sequence[str]:
        return []  # an upload that was not completed cannot be seen

    def _put(self, name: str, views: Sequence[memoryview]) -> None:
        _upload(self._files, name, self._throttle.paced(views))

    def _move(self, source: str, target: str) -> None:
        below = [one for one in self._all_below(source) if one.type == fs.FileType.File]
        for one in sorted(below, key=lambda one: one.base_name == SEAL):
            self._copy(one, target + one.path[len(source) :])
        if not below:
            self._copy(self._files.get_file_info(source), target)
        self._remove(source)

    def _copy(self, found: Any, target: str) -> None:
        if found.size <= _LARGEST_COPY:
            self._files.copy_file(found.path, target)
            return
        with self._files.open_input_stream(found.path, compression=None) as source:
            _upload(self._files, target, map(memoryview, iter(lambda: source.read(PART_BYTES), b"")))

    def _remove(self, name: str) -> None:
        self._erase(f"{name}/{SEAL}")
        self._erase(name)


class RenamingStorage(_RemoteStorage):
    """A file system whose rename is atomic, HDFS. It does not replace: an old file is gone for a moment before the new
    one has its name, which happens to nothing but the hint ``LATEST``. What is closed is in the memory of the data
    nodes that replicate it, and survives the loss of one, not of the power of all."""

    def sweep(self) -> Sequence[str]:
        with _naming("sweep", self._root):
            found = sorted(one.path for one in self._all_below(self._root) if MARK in one.base_name)
            tops = [path for path in found if not any(path.startswith(f"{other}/") for other in found)]
            for path in tops:
                self._erase(path)
            return [path[len(self._root) :].lstrip("/") for path in tops]

    def _put(self, name: str, views: Sequence[memoryview]) -> None:
        temporary = _unfinished(name)
        self._files.create_dir(name.rpartition("/")[0], recursive=True)
        try:
            _upload(self._files, temporary, self._throttle.paced(views))
            self._erase(name)
            self._files.move(temporary, name)
        except BaseException:
            self._clear(temporary)
            raise

    def _move(self, source: str, target: str) -> None:
        self._files.create_dir(target.rpartition("/")[0], recursive=True)
        self._files.move(source, target)

    def _remove(self, name: str) -> None:
        away = _unfinished(name)
        self._files.move(name, away)
        self._clear(away)

    def _clear(self, name: str) -> None:
        """What has an unfinished name is invisible to readers: failing to remove it costs space, not safety."""
        try:
            self._erase(name)
        except OSError as error:
            logger.warning("%s could not be removed and is left for the next sweep: %s", name, error)


def _unfinished(name: str) -> str:
    return f"{name}{MARK}{uuid.uuid4().hex[:12]}"


def _upload(files: Any, name: str, pieces: Iterable[memoryview]) -> None:
    """Send the pieces with at most a few of them in memory; an error leaves nothing under the name."""
    stream = files.open_output_stream(name, compression=None)
    try:
        for number, piece in enumerate(pieces, start=1):
            stream.write(piece)
            if number % _PARTS_IN_FLIGHT == 0:
                stream.flush()
    except BaseException:
        _discard(files, stream, name)
        raise
    stream.close()  # which publishes all or nothing


def _discard(files: Any, stream: Any, name: str) -> None:
    """A failed upload cannot be completed by closing it; one that something else interrupted is, and taken back."""
    try:
        stream.close()
    except OSError:
        return
    try:
        files.delete_file(name)
    except OSError as error:
        logger.warning("%s was interrupted, could not be removed and is not whole: %s", name, error)


# -- errors -----------------------------------------------------------------------------------------------------------

_EXPLAINED = (
    (("NO_SUCH_BUCKET",), "there is no such bucket", "create it, or correct snapshot.storage"),
    (
        ("INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_CLIENT_TOKEN_ID", "InvalidToken", "EXPIRED"),
        "the credentials are wrong or have expired",
        "renew those of this environment, in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or ~/.aws/credentials",
    ),
    (
        (
            "redentials were not found",
            "No credentials",
            "Could not create credentials",
            "GOOGLE_APPLICATION_CREDENTIALS",
        ),
        "there are no credentials",
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or GOOGLE_APPLICATION_CREDENTIALS, where the run is started",
    ),
    (
        ("ACCESS_DENIED", "Permission denied", "PERMISSION_DENIED", "HTTP status 403"),
        "access is denied",
        "set credentials if there are none, and let them list, read, write and delete there",
    ),
    (
        ("curlCode: 6,",),
        "the host of the endpoint is not known",
        "correct endpoint_override or region in snapshot.storage",
    ),
    (
        ("curlCode: 7,", "curlCode: 28,", "Connection refused", "timed out"),
        "the endpoint does not answer",
        "see whether it runs and can be reached from this machine",
    ),
    (("NETWORK_CONNECTION",), "the connection broke", "see whether the endpoint runs and can be reached"),
    (
        ("HTTP status 301", "PERMANENT_REDIRECT"),
        "the bucket is in another region",
        "set region=... in snapshot.storage",
    ),
    (("libhdfs", "libjvm"), "HDFS needs Java and Hadoop's native library", "set JAVA_HOME, HADOOP_HOME and CLASSPATH"),
)
"""Words of an error of pyarrow's, what they mean, and what to do."""


@contextmanager
def _naming(verb: str, target: str) -> Iterator[str]:
    """Turn pyarrow's error into one that says what was tried, why it failed and what to do."""
    try:
        yield target
    except (OSError, ArrowException) as error:
        text = str(error)
        for words, meaning, way_out in _EXPLAINED:
            if any(word in text for word in words):
                raise SnapshotError(f"cannot {verb} {target}: {meaning}; {way_out} ({text})") from error
        raise SnapshotError(f"cannot {verb} {target}: {text}") from error
