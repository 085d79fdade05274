"""Text out of files, a bounded amount at a time: a file may be larger than memory.

Readers yield pieces. A piece is a run of bytes, and whether a document begins with it. Rows are counted from one.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.parquet as pq

from holdfast.errors import DataError

__all__ = ["CODECS", "Piece", "read_jsonl", "read_parquet", "read_text", "unreadable"]

Piece = tuple[bytes, bool]
"""Text, and whether a document begins with it."""

CODECS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
"""Compression by the last suffix of the file's name."""

_CHUNK_BYTES = 4096
_MAX_LINE_BYTES = 1 << 16
"""A chunk of text without a line break is cut this far behind ``_CHUNK_BYTES``."""
_MAX_ROW_BYTES = 1 << 28
_BUFFER_BYTES = 1 << 16
_BATCH_ROWS = 256
_BOM = b"\xef\xbb\xbf"


def read_text(path: Path) -> Iterator[Piece]:
    """One document, cut behind the first line break after every 4 KiB. The bytes are taken as they are."""
    with _reading(path) as file:
        is_first = True
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk + file.readline(_MAX_LINE_BYTES), is_first
            is_first = False


def read_jsonl(path: Path, field: str) -> Iterator[Piece]:
    """One document per line: string ``field`` of the JSON object in it. Blank lines and empty strings are passed over.

    Raises: DataError with the line for anything else.
    """
    with _reading(path) as file:
        row = 0
        while line := _next_line(path, file, row + 1):
            row += 1
            if line.strip() and (text := _field_of(path, row, line, field)):
                yield text, True


def read_parquet(path: Path, field: str) -> Iterator[Piece]:
    """One document per row: string column ``field``. Empty strings are passed over.

    Raises: DataError with the row for a null and for bytes that are not UTF-8, without for a file that does not fit.
    """
    row = 0
    try:
        # Unlike the defaults these two read a column page by page, not the whole row group at once (400 MB of text
        # in one row group: 19 MB instead of 418 MB, pyarrow 26).
        with path.open("rb") as file, pq.ParquetFile(file, pre_buffer=False, buffer_size=_BUFFER_BYTES) as table:
            _check_column(path, table.schema_arrow, field)
            for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=[field], use_threads=False):
                for text in _strings(path, batch.column(0), row):
                    row += 1
                    if text:
                        yield text, True
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error, row=row + 1 if row else None) from error


def unreadable(path: Path, error: Exception, *, row: int | None = None) -> DataError:
    """What the operating system or a decoder said about a file."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return DataError(str(path), f"cannot be read: {reason.rstrip('.')}; repair or remove the file", row=row)


@contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed; whatever goes wrong in between is a DataError."""
    try:
        with path.open("rb") as file, _decompressed(file, path.suffix.lower()) as stream:
            yield stream
    except (OSError, pa.ArrowException) as error:
        raise unreadable(path, error) from error


def _decompressed(file: io.BufferedReader, suffix: str) -> io.BufferedReader:
    if suffix not in CODECS:
        return file
    # Any: pyarrow is untyped. Its stream is a raw one as far as io is concerned.
    stream: Any = pa.input_stream(file, compression=CODECS[suffix])
    return io.BufferedReader(stream, _BUFFER_BYTES)


def _next_line(path: Path, file: BinaryIO, row: int) -> bytes:
    try:
        line = file.readline(_MAX_ROW_BYTES)
    except OSError as error:
        raise unreadable(path, error, row=row) from error
    if len(line) == _MAX_ROW_BYTES:  # or one array in one line fills the memory before anybody says why
        raise DataError(
            str(path), f"is longer than {_MAX_ROW_BYTES >> 20} MiB; write one JSON object per line", row=row
        )
    return line.removeprefix(_BOM) if row == 1 else line


def _field_of(path: Path, row: int, line: bytes, field: str) -> bytes:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(str(path), f"is not UTF-8 at byte {error.start}; convert the file", row=row) from error
    except (ValueError, RecursionError) as error:
        raise DataError(str(path), f"is not JSON: {error}; write one JSON object per line", row=row) from error
    if not isinstance(value, dict):
        raise DataError(str(path), f"holds {_kind(value)}, not an object; write one JSON object per line", row=row)
    return _text_of(path, row, value, field)


def _text_of(path: Path, row: int, value: dict[str, object], field: str) -> bytes:
    if field not in value:
        raise DataError(str(path), f"has no field {field!r}; {_instead(list(value))}", row=row)
    text = value[field]
    if not isinstance(text, str):
        raise DataError(str(path), f"field {field!r} holds {_kind(text)}, not a string; {_REMEDY}", row=row)
    try:
        return text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, written as an escape
        reason = f"field {field!r} holds {text[error.start]!r}, half a character; {_REMEDY}"
        raise DataError(str(path), reason, row=row) from error


_REMEDY = "correct or remove the row, or set data.field"
_KINDS = {"NoneType": "null", "list": "a list", "dict": "an object", "bool": "a boolean", "str": "a string"}


def _kind(value: object) -> str:
    return _KINDS.get(type(value).__name__, "a number")


def _instead(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:10]) + (", ..." if len(names) > 10 else "")
    return f"set data.field to one of {shown}" if names else "use another file"


def _check_column(path: Path, schema: Any, field: str) -> None:  # Any: pyarrow is untyped
    if field not in schema.names:
        raise DataError(str(path), f"has no column {field!r}; {_instead(schema.names)}")
    found = schema.field(field).type
    held = found.value_type if pa.types.is_dictionary(found) else found
    if not (pa.types.is_string(held) or pa.types.is_large_string(held) or pa.types.is_string_view(held)):
        strings = [column.name for column in schema if column.type in (pa.string(), pa.large_string())]
        raise DataError(str(path), f"column {field!r} holds {found}, not strings; {_instead(strings)}")


def _strings(path: Path, column: Any, rows_before: int) -> list[bytes]:  # Any: pyarrow is untyped
    """The bytes of a string column, which are then known to be UTF-8."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    values = cast("list[bytes | None]", column.cast(pa.large_binary()).to_pylist())
    for row, text in enumerate(values, rows_before + 1):
        if text is None:
            raise DataError(str(path), f"is null; {_REMEDY}", row=row)
        try:
            text.decode()
        except UnicodeDecodeError as error:
            raise DataError(str(path), f"is not UTF-8 at byte {error.start}; {_REMEDY}", row=row) from error
    return cast("list[bytes]", values)
