"""What a snapshot holds: an Arrow table with one row per slice, everything else in its schema's metadata.

The bytes are an Arrow IPC stream (``pyarrow.ipc.open_stream`` reads it) followed by the 16-byte xxh3-128 digest of
the stream, so that a damaged manifest is recognised before anything in it is believed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from holdfast import __version__
from holdfast.errors import ManifestMismatch, ShardCorrupt
from holdfast.types import Quantization, SliceSpec

__all__ = [
    "FORMAT_VERSION",
    "Entry",
    "Manifest",
    "ManifestWriter",
    "clear_gaps",
    "damaged_slices",
    "digest",
    "gaps",
    "lay_out",
]

FORMAT_VERSION = 1
WRITER = f"holdfast {__version__}"

_ALIGNMENT = 64
_DIGEST_BYTES = 16
_COLUMNS = pa.schema(
    [
        ("name", pa.string()),
        ("shape", pa.list_(pa.int64())),
        ("start", pa.int64()),
        ("stop", pa.int64()),
        ("dtype", pa.string()),
        ("block_size", pa.int64()),
        ("codebook", pa.string()),
        ("absmax", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("digest", pa.string()),
    ]
)


def digest(data: Any) -> str:
    """xxh3-128 of anything with the buffer protocol, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data)


def lay_out(lengths: Sequence[int]) -> tuple[list[int], int]:
    """Where slices of these lengths go, each aligned to 64 bytes, and the bytes they take together."""
    offsets, end = [], 0
    for length in lengths:
        offsets.append(end)
        end += -(-length // _ALIGNMENT) * _ALIGNMENT
    return offsets, end


@dataclass(frozen=True, slots=True)
class Entry:
    """One slice in the data of a snapshot."""

    spec: SliceSpec
    offset: int
    length: int
    digest: str
    """xxh3-128 of the stored bytes, taken when they were written."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything needed to read, verify and place the data of one rank's snapshot."""

    version: int
    epoch: int
    """Membership epoch that wrote it."""
    rank: int
    world: int
    scalars: Mapping[str, object]
    """JSON values."""
    entries: tuple[Entry, ...]
    config_digest: str = ""
    """Identifies what the state belongs to: model, data, optimizer, layout."""
    format_version: int = FORMAT_VERSION
    writer: str = WRITER

    def to_bytes(self) -> bytes:
        """Arrow stream and digest."""
        specs = [entry.spec for entry in self.entries]
        places = [(entry.offset, entry.length) for entry in self.entries]
        return ManifestWriter(specs, places).to_bytes(self, [entry.digest for entry in self.entries])

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Raises: ManifestMismatch for anything but an intact manifest of a format this version reads."""
        stream, check = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
        if digest(stream) != check.hex():
            raise ManifestMismatch(f"manifest of {len(data):,} bytes does not match its own digest: it is damaged")
        try:
            table = pa.ipc.open_stream(stream).read_all()
            head = json.loads(table.schema.metadata[b"holdfast"])
            found = head["format_version"]
        except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
            raise ManifestMismatch(f"{len(data):,} bytes are not a manifest of Holdfast: {error}") from error
        if found != FORMAT_VERSION:
            raise ManifestMismatch(
                f"manifest has format_version={found}, this version of Holdfast reads {FORMAT_VERSION}; "
                f"it was written by {head.get('writer')}"
            )
        columns = [table.column(name).to_pylist() for name in _COLUMNS.names]
        return cls(entries=tuple(_entry(*row) for row in zip(*columns, strict=True)), **head)

    def head(self) -> dict[str, object]:
        """Everything but the entries, as JSON values."""
        return {
            "format_version": self.format_version,
            "writer": self.writer,
            "version": self.version,
            "epoch": self.epoch,
            "rank": self.rank,
            "world": self.world,
            "config_digest": self.config_digest,
            "scalars": self.scalars,
        }


class ManifestWriter:
    """Writes the manifests of many versions of one state, of which only scalars and digests differ."""

    def __init__(self, specs: Sequence[SliceSpec], places: Sequence[tuple[int, int]]) -> None:
        """``places``: offset and length of each slice."""
        rows = [_row(spec, *place) for spec, place in zip(specs, places, strict=True)]
        fixed = [field for field in _COLUMNS if field.name != "digest"]
        self._columns = [pa.array([row[i] for row in rows], type=field.type) for i, field in enumerate(fixed)]

    def to_bytes(self, about: Manifest, digests: Sequence[str]) -> bytes:
        """``about`` without regard to its entries, as Arrow stream and digest; one digest per slice."""
        schema = _COLUMNS.with_metadata({"holdfast": json.dumps(about.head())})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_batch(pa.record_batch([*self._columns, pa.array(digests, type=pa.string())], schema=schema))
        stream: bytes = sink.getvalue().to_pybytes()
        return stream + bytes.fromhex(digest(stream))


def gaps(places: Sequence[tuple[int, int]], end: int) -> npt.NDArray[np.int64]:
    """Bytes between slices, of which no digest tells. ``places``: offset and length of each slice, ascending."""
    starts = [0, *(offset + length for offset, length in places)]
    stops = [*(offset for offset, _ in places), end]
    ranges = [np.arange(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]
    return np.concatenate(ranges) if ranges else np.empty(0, dtype=np.int64)


def clear_gaps(data: npt.NDArray[np.uint8], manifest: Manifest) -> None:
    """Parity is computed over gaps too, which are zero when a version is written: make them so again."""
    data[gaps([(entry.offset, entry.length) for entry in manifest.entries], len(data))] = 0


def damaged_slices(data: Any, manifest: Manifest) -> Iterator[ShardCorrupt]:
    """Every slice of ``data`` (a one-dimensional byte buffer) whose bytes are not those that were written."""
    view = memoryview(data)
    for entry in manifest.entries:
        have = digest(view[entry.offset : entry.offset + entry.length])
        if have != entry.digest:
            yield ShardCorrupt(
                entry.spec.name, rank=manifest.rank, version=manifest.version, want=entry.digest, have=have
            )


def _row(spec: SliceSpec, offset: int, length: int) -> tuple[object, ...]:
    blocks = spec.quantization
    quantization = (None, None, None) if blocks is None else (blocks.block_size, blocks.codebook, blocks.absmax)
    return (spec.name, spec.shape, spec.start, spec.stop, spec.dtype, *quantization, offset, length)


def _entry(
    name: str,
    shape: list[int],
    start: int,
    stop: int,
    dtype: str,
    block_size: int | None,
    codebook: str,
    absmax: str,
    offset: int,
    length: int,
    stored_digest: str,
) -> Entry:
    quantization = None if block_size is None else Quantization(block_size, codebook, absmax)
    return Entry(SliceSpec(name, tuple(shape), start, stop, dtype, quantization), offset, length, stored_digest)
