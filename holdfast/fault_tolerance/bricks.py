"""Frozen files cut into pieces that nodes hold for each other: which piece is where, and how pieces become files again.

A *brick* is a file that a run reads and never writes, named after its sha256. It is cut into ``k`` data pieces of ``b``
bytes, ``b`` being its size over ``k``, rounded up, the last ones shorter; ``m`` parity pieces of ``b`` bytes are coded
over them, what a piece lacks counting as zeros. Each node of a protection group of ``n = k + m`` nodes holds one piece,
so all of them together hold ``size * (1 + m/k)`` bytes, and any ``k`` give the file. With m = 0 the pieces are the file
and nothing more: a lost node's piece comes from the file again. A single node holds the whole file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from holdfast.errors import SnapshotError
from holdfast.fault_tolerance import erasure
from holdfast.fault_tolerance.buffer import Bytes
from holdfast.fault_tolerance.lanes import Lane

__all__ = [
    "Brick",
    "BrickFile",
    "Read",
    "deal_bricks",
    "groups_of",
    "held_bytes",
    "join",
    "read_piece",
    "restore_piece",
]

_CHUNK_BYTES = 4 << 20
"""What is asked of a node at once, and of the file."""

Read = Callable[[int, range, Bytes], None]
"""Brings the bytes at these offsets of a piece from wherever it is. Raises: SnapshotError."""


@dataclass(frozen=True, slots=True)
class BrickFile:
    """A frozen file as a run found it when it began."""

    name: str
    """The option that names it."""
    path: str
    digest: str
    """sha256."""
    size: int
    """Bytes."""


@dataclass(frozen=True, slots=True)
class Brick:
    """A frozen file, and who holds which piece of it in memory."""

    file: BrickFile
    nodes: tuple[int, ...] = ()
    """Node of each piece, those of parity last; none when the file is in no memory."""
    parity: int = 0
    """Pieces that may be lost."""

    @property
    def data(self) -> int:
        """Data pieces."""
        return len(self.nodes) - self.parity

    @property
    def piece_bytes(self) -> int:
        """Of the longest piece, and of each of parity."""
        return -(-self.file.size // self.data)

    def place(self, piece: int) -> range:
        """Bytes of the file that a data piece is."""
        ends = (min(at * self.piece_bytes, self.file.size) for at in (piece, piece + 1))
        return range(*ends)

    def bytes_of(self, piece: int) -> int:
        return len(self.place(piece)) if piece < self.data else self.piece_bytes

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Brick:
        """Inverse of ``dataclasses.asdict``."""
        return cls(BrickFile(**value["file"]), tuple(value["nodes"]), value["parity"])


def groups_of(lanes: Sequence[Lane], workers_per_node: int) -> dict[tuple[int, ...], int]:
    """Nodes of each protection group when all nodes take part, and how many of them may be lost."""
    return {tuple(rank // workers_per_node for rank in lane.ranks): lane.parity for lane in lanes}


def deal_bricks(files: Sequence[BrickFile], groups: Mapping[tuple[int, ...], int]) -> list[Brick]:
    """Each file, once by its digest, to the group whose nodes hold least so far."""
    load, dealt = dict.fromkeys(groups, 0), dict[str, Brick]()
    for file in files:
        if file.digest not in dealt:
            nodes = min(groups, key=lambda group: load[group])
            dealt[file.digest] = brick = Brick(file, nodes, groups[nodes])
            load[nodes] += brick.piece_bytes
    return list(dealt.values())


def held_bytes(bricks: Sequence[Brick], node: int) -> int:
    """What a node holds of them."""
    return sum(brick.bytes_of(brick.nodes.index(node)) for brick in bricks if node in brick.nodes)


def read_piece(brick: Brick, piece: int, out: Bytes) -> None:
    """A data piece from the file, all of which is read once and verified. Shapes: ``out`` uint8 [bytes of the piece].

    The workers of every node read the whole file too, so its pages are read from the storage once.
    Raises: SnapshotError.
    """
    place, seen, at = brick.place(piece), hashlib.sha256(), 0
    try:
        with open(brick.file.path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                seen.update(chunk)
                first, last = max(place.start, at), min(place.stop, at + len(chunk))
                if first < last:
                    own = np.frombuffer(chunk, np.uint8)[first - at : last - at]
                    out[first - place.start : last - place.start] = own
                at += len(chunk)
    except OSError as error:
        raise SnapshotError(f"{brick.file.path} cannot be read: {error}") from error
    _require(brick, seen.hexdigest(), brick.file.path)


def restore_piece(brick: Brick, piece: int, sources: Collection[int], read: Read, out: Bytes) -> None:
    """Any piece from ``k`` others, which ``sources`` names. Shapes: ``out`` uint8 [bytes of the piece].

    What comes out is as good as what went in. Raises: SnapshotError, also when there are too few.
    """
    used = sorted(set(sources) - {piece})[: brick.data]
    if len(used) < brick.data:
        raise SnapshotError(f"{len(used)} other pieces of {brick.file.digest} are there, and {brick.data} are needed")
    rows = np.empty((brick.data, min(_CHUNK_BYTES, brick.piece_bytes)), np.uint8)
    for chunk in _chunks(brick.piece_bytes):
        shares = {source: row[: len(chunk)] for source, row in zip(used, rows, strict=True)}
        for source, row in shares.items():
            _fill(row, brick, source, chunk, read)
        part = out[chunk.start : chunk.stop]
        part[:] = _share(brick, piece, shares)[: part.size]


def join(brick: Brick, sources: Collection[int], read: Read, file: BinaryIO) -> None:
    """The whole file from the pieces that ``sources`` names, ``k`` of them at least.

    Raises: SnapshotError, also when what comes out has another sha256; OSError of ``file``.
    """
    seen = hashlib.sha256()
    for piece in range(brick.data):
        out = np.empty(brick.bytes_of(piece), np.uint8)
        if piece in sources:
            for chunk in _chunks(out.size):
                read(piece, chunk, out[chunk.start : chunk.stop])
        else:
            restore_piece(brick, piece, sources, read, out)
        seen.update(out.data)
        file.write(out.data)
    _require(brick, seen.hexdigest(), "what was joined")


def _chunks(size: int) -> Iterator[range]:
    return (range(start, min(start + _CHUNK_BYTES, size)) for start in range(0, size, _CHUNK_BYTES))


def _fill(row: Bytes, brick: Brick, source: int, chunk: range, read: Read) -> None:
    there = range(chunk.start, min(chunk.stop, brick.bytes_of(source)))
    if there:
        read(source, there, row[: len(there)])
    row[len(there) :] = 0


def _share(brick: Brick, piece: int, shares: Mapping[int, Bytes]) -> Bytes:
    k, m = brick.data, brick.parity
    missing = [share for share in range(k) if share not in shares]
    data = {**shares, **dict(zip(missing, erasure.decode(shares, missing, k, m), strict=True))}
    return data[piece] if piece < k else erasure.parity([data[share] for share in range(k)], piece - k, m)


def _require(brick: Brick, have: str, what: str) -> None:
    if have != brick.file.digest:
        raise SnapshotError(f"{what} has sha256 {have}, not {brick.file.digest}")
