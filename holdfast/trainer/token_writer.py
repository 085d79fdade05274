"""Writes a token store, whole or not at all. Several drivers may build the same one at a time: the first wins."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from holdfast import __version__
from holdfast.errors import ConfigurationError, DataError
from holdfast.trainer.split import Split
from holdfast.trainer.token_store import (
    COLUMNS,
    DTYPE,
    FORMAT_VERSION,
    LENGTHS_DTYPE,
    MANIFEST,
    METADATA_KEY,
    WIDE_DTYPE,
    TokenStore,
    lengths_file,
    split_file,
)
from holdfast.trainer.vocabulary import Bytes, Encoded, Vocabulary

__all__ = ["StoreWriter", "remove_abandoned", "write_store"]

logger = logging.getLogger(__name__)

_MARK = ".tmp-"
"""In the name of every directory that is not finished, or no longer wanted."""
_STAGED_TOKENS = 1 << 20
_ABANDONED_S = 24 * 3600.0
"""A build that has written nothing for so long will not go on."""


def write_store(
    path: Path, title: str, fill: Callable[[StoreWriter], None], vocabulary: Vocabulary | None = None
) -> TokenStore:
    """Build a store beside ``path`` with ``fill`` and give it the name; an intact store that is there by then wins.

    Without a ``vocabulary`` tokens are bytes.

    Whatever ``fill`` raises leaves nothing behind. Raises: ConfigurationError when the disk does not take it.
    """
    unfinished = _unfinished(path)
    try:
        unfinished.mkdir(parents=True)
        with StoreWriter(unfinished, vocabulary or Bytes()) as writer:
            fill(writer)
            writer.finish(title)
        _publish(unfinished, path)
    except OSError as error:
        raise ConfigurationError(
            f"cannot write the token store {path}: {error.strerror or error}; "
            "free space there, or set data.cache to another directory"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return TokenStore.open(path)


def remove_abandoned(cache: Path, now_s: float) -> None:
    """Delete what killed builders left in ``cache``; those that may still be at work are spared."""
    for directory in cache.glob(f"*{_MARK}*"):
        try:
            newest_s = max(p.stat().st_mtime for p in (directory, *directory.iterdir()))
        except OSError:  # its builder has just finished or cleaned up
            continue
        if now_s - newest_s > _ABANDONED_S:
            logger.info("removing %s: nothing was written to it for a day", directory)
            shutil.rmtree(directory, ignore_errors=True)


class StoreWriter:
    """Takes text in order and turns it into tokens; memory is bounded whatever comes."""

    def __init__(self, directory: Path, vocabulary: Vocabulary) -> None:
        self._directory, self._vocabulary = directory, vocabulary
        self._stack = ExitStack()
        self._dtype = DTYPE if vocabulary.size <= 1 << 16 else WIDE_DTYPE
        self._streams = {split: self._stream(split) for split in Split}
        self._cut = b""
        """The beginning of a character whose end has not come yet."""
        self._rows: list[_Row] = []
        self._current: dict[Split, _Row] = {}
        self._open: Split | None = None
        """Where the last document began and has not ended."""

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def n_tokens(self) -> dict[Split, int]:
        """Tokens so far."""
        return {split: stream.n_tokens for split, stream in self._streams.items()}

    def _stream(self, split: Split) -> _Stream:
        tokens = self._stack.enter_context((self._directory / split_file(split)).open("xb"))
        if not self._vocabulary.needs_characters:
            return _Stream(_Column(tokens, self._dtype))
        lengths = self._stack.enter_context((self._directory / lengths_file(split)).open("xb"))
        return _Stream(_Column(tokens, self._dtype), _Column(lengths, LENGTHS_DTYPE))

    def begin_file(self, name: str, licence: str) -> None:
        """What follows comes from this file."""
        self._current = {split: _Row(name, split, licence) for split in Split}

    def append(self, split: Split, text: bytes, *, begins_document: bool) -> None:
        """More text. A document also ends where the split changes.

        Raises: UnicodeDecodeError for text that is not UTF-8, where the vocabulary needs it to be.
        """
        row, stream = self._current[split], self._streams[split]
        if begins_document or split is not self._open:
            self._end_document(is_whole=begins_document)
            row.tokens += stream.add_special(self._vocabulary.begin)
            self._open = split
            row.documents += 1
        row.tokens += self._add(stream, self._whole(text))
        row.bytes += len(text)
        row.digest.update(text)

    def end_file(self) -> int:
        """The file's bytes of text."""
        self._end_document()
        rows = [row for row in self._current.values() if row.documents]
        self._rows += rows
        return sum(row.bytes for row in rows)

    def finish(self, title: str) -> None:
        """Everything is on disk when it returns: tokens, then the manifest."""
        for stream in self._streams.values():
            stream.flush()
        with (self._directory / MANIFEST).open("xb") as file:
            _write_manifest(file, self._rows, self._head(title))
            _sync_file(file)
        _sync_directory(self._directory)

    def _end_document(self, *, is_whole: bool = True) -> None:
        """Where only the split changes, a character that is cut goes on in the other."""
        if self._open is None:
            return
        if self._cut and is_whole:
            self._cut.decode()  # raises
        row, stream = self._current[self._open], self._streams[self._open]
        row.tokens += stream.add_special(self._vocabulary.end)
        self._open = None

    def _add(self, stream: _Stream, text: bytes) -> int:
        return stream.add(self._vocabulary.encode(text), len(text))

    def _whole(self, text: bytes) -> bytes:
        """What has come so far and ends with a whole character, where the vocabulary needs that."""
        if not self._vocabulary.needs_characters:
            return text
        text = self._cut + text
        end = _end_of_characters(text)
        self._cut = text[end:]
        return text[:end]

    def _head(self, title: str) -> dict[str, object]:
        digests = "".join(self._streams[split].digest.hexdigest() for split in Split)
        return {
            "format_version": FORMAT_VERSION,
            "writer": f"holdfast {__version__}",
            "title": title,
            "digest": xxhash.xxh3_128_hexdigest(digests.encode()),
            "tokens": {split.value: self._streams[split].n_tokens for split in Split},
            "bytes": {split.value: sum(row.bytes for row in self._rows if row.split is split) for split in Split},
            "documents": sum(row.documents for row in self._rows),
            "licences": sorted({row.licence for row in self._rows}),
            **({"token_bytes": self._dtype.itemsize, "has_lengths": True} if self._vocabulary.needs_characters else {}),
        }


def _end_of_characters(text: bytes) -> int:
    """Where the last whole character of UTF-8 ends; the whole text if its end is no beginning of a character."""
    for back in range(1, min(3, len(text)) + 1):
        byte = text[-back]
        if byte & 0xC0 != 0x80:  # not inside a character
            size = 1 if byte < 0xC0 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(text) - back if size > back else len(text)
    return len(text)


@dataclass(slots=True)
class _Row:
    """What one file adds to one split."""

    name: str
    split: Split
    licence: str
    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    digest: Any = field(default_factory=xxhash.xxh3_128)  # Any: xxhash is not checked

    @property
    def cells(self) -> tuple[object, ...]:
        shown = os.fsencode(self.name).decode(errors="replace")  # a file's name need not be UTF-8, Arrow's strings are
        digest = self.digest.hexdigest()
        return shown, self.split.value, self.documents, self.bytes, self.tokens, self.licence, digest


class _Stream:
    """The tokens of one split and, unless these are bytes, how many bytes of text each of them takes."""

    def __init__(self, tokens: _Column, lengths: _Column | None = None) -> None:
        self._tokens, self._lengths = tokens, lengths
        self._unseen = 0
        """Bytes of text that no token stands for; the next token takes them."""

    @property
    def n_tokens(self) -> int:
        return self._tokens.count

    @property
    def digest(self) -> Any:  # Any: xxhash is not checked
        return self._tokens.digest

    def add_special(self, ids: Sequence[int]) -> int:
        """Returns how many there are now more, as :meth:`add` does."""
        return self.add((np.asarray(ids, np.uint32), np.zeros(len(ids), np.uint32)))

    def add(self, encoded: Encoded, text_bytes: int = 0) -> int:
        ids, lengths = encoded
        self._tokens.add(ids)
        if self._lengths is not None and lengths is not None:
            self._unseen += text_bytes - int(lengths.sum())
            if len(lengths):
                lengths[0] += self._unseen
                self._unseen = 0
            self._lengths.add(lengths)
        return len(ids)

    def flush(self) -> None:
        for column in (self._tokens, self._lengths):
            if column is not None:
                column.flush()


class _Column:
    """Numbers of one file, written in large blocks."""

    def __init__(self, file: BinaryIO, dtype: np.dtype[Any]) -> None:
        self._file = file
        self._staged = np.empty(_STAGED_TOKENS, dtype)
        self._used = 0
        self.count = 0
        self.digest: Any = xxhash.xxh3_128()  # Any: xxhash is not checked

    def add(self, numbers: npt.NDArray[Any]) -> None:
        self.count += len(numbers)
        while len(numbers):
            if self._used == len(self._staged):
                self._write()
            room = self._staged[self._used :][: len(numbers)]
            room[:] = numbers[: len(room)]
            self._used += len(room)
            numbers = numbers[len(room) :]

    def flush(self) -> None:
        self._write()
        _sync_file(self._file)

    def _write(self) -> None:
        block = self._staged[: self._used].data
        self.digest.update(block)
        self._file.write(block)
        self._used = 0


def _write_manifest(file: BinaryIO, rows: list[_Row], head: dict[str, object]) -> None:
    schema = COLUMNS.with_metadata({METADATA_KEY: json.dumps(head)})
    cells = [row.cells for row in rows]
    columns = [pa.array([row[i] for row in cells], type=column.type) for i, column in enumerate(COLUMNS)]
    with pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))


def _publish(unfinished: Path, path: Path) -> None:
    while True:
        try:
            unfinished.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            _sync_directory(path.parent)
            return
        try:
            TokenStore.open(path)
        except DataError:
            _retire(path)
        else:
            logger.info("%s was built by another process meanwhile; it is used", path)
            return


def _retire(path: Path) -> None:
    """Take the name from a broken store. Whoever has mapped it keeps what is mapped."""
    away = _unfinished(path)
    try:
        path.rename(away)
    except FileNotFoundError:  # another process was faster
        return
    shutil.rmtree(away, ignore_errors=True)


def _unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}{_MARK}{uuid.uuid4().hex}")


def _sync_file(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
