"""The parity that a keeper holds for its protection groups, and how it is computed from what peers hold.

Every rank's snapshot, data and manifest as they lie in its buffer, is one member of its lane's stripes.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import xxhash

from holdfast import failpoints
from holdfast.errors import ShardCorrupt, SnapshotError, SnapshotMemory
from holdfast.fault_tolerance import erasure
from holdfast.fault_tolerance.buffer import Bytes
from holdfast.fault_tolerance.commit import CommitRecord, Key, ParityBlock, Parts
from holdfast.fault_tolerance.lanes import PARITY_SLOTS, Lane
from holdfast.fault_tolerance.stripes import StripeLayout

__all__ = ["ParityStore", "Reader", "encode", "real_memory", "rebuild"]

_CHUNK_BYTES = erasure.CHUNK_BYTES
_PATIENCE_S = 120.0


class Reader(Protocol):
    """Brings bytes of one version from wherever they are. Called in several threads. Raises: SnapshotError."""

    def data(self, rank: int, place: range, into: Bytes) -> None:
        """Of a rank's snapshot."""
        ...

    def parity(self, rank: int, place: range, into: Bytes) -> None:
        """Of the parity that this rank's node holds for the rank's lane."""
        ...


@dataclass(slots=True)
class _Slot:
    """Memory for the parity of one version."""

    memory: Bytes = field(default_factory=lambda: np.empty(0, dtype=np.uint8))
    key: Key | None = None
    """None while it holds nothing that counts."""
    blocks: tuple[ParityBlock, ...] = ()

    def grow(self, size: int) -> None:
        """Real memory, so that nothing can be lacking in the middle of a version."""
        if size > self.memory.size:
            self.memory = real_memory(size, "holdfast-parity")


def real_memory(size: int, name: str) -> Bytes:
    """That is there, and not only promised, uint8 [size]. Raises: OSError."""
    if not size:
        return np.empty(0, dtype=np.uint8)
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, size)
        return np.frombuffer(mmap.mmap(fd, size), dtype=np.uint8)
    finally:
        os.close(fd)  # the mapping keeps the memory


class ParityStore:
    """Parity of one lane in this node's memory. Methods may be called from any thread, those that write from one."""

    def __init__(self, lane: Lane, member: int, *, limit_bytes: int) -> None:
        self.lane, self.member = lane, member
        self._limit_bytes = limit_bytes
        self._slots = tuple(_Slot() for _ in range(PARITY_SLOTS))

    def size_for(self, parts: Parts) -> int:
        """Bytes that the parity of a version takes here."""
        return _layout(self.lane, parts).parity_bytes

    def reserve(self, capacity_bytes: int) -> None:
        """Memory for the parity of versions of so many bytes per rank, before there is one. Raises: SnapshotMemory."""
        size = StripeLayout([capacity_bytes] * len(self.lane.ranks), self.lane.parity).parity_bytes
        size = min(size, self._limit_bytes // len(self._slots))  # a capacity has some slack, which the limit knows not
        for slot in self._slots:
            if slot.key is None:
                self._grow(slot, size)

    @property
    def keys(self) -> list[Key]:
        """Versions whose parity is complete here."""
        return [slot.key for slot in self._slots if slot.key is not None]

    def make_room(self, parts: Parts, keep: Key | None) -> _Slot:
        """A slot for another version: any but that of ``keep``. Raises: SnapshotMemory."""
        need = self.size_for(parts)
        slot = next(slot for slot in self._slots if slot.key is None or slot.key != keep)
        slot.key = None
        self._grow(slot, need)
        return slot

    def _grow(self, slot: _Slot, size: int) -> None:
        others = sum(other.memory.size for other in self._slots if other is not slot)
        rank = self.lane.ranks[self.member]
        if size + others > self._limit_bytes:
            raise SnapshotMemory(need_bytes=size + others, have_bytes=self._limit_bytes, rank=rank)
        try:
            slot.grow(size)
        except OSError as error:
            raise SnapshotMemory(need_bytes=size, have_bytes=slot.memory.size, rank=rank) from error

    def drop(self, key: Key) -> None:
        for slot in self._slots:
            if slot.key == key:
                slot.key = None

    def read(self, key: Key, place: range) -> Bytes:
        """Raises: SnapshotError when the version is not here."""
        return self._slot(key).memory[place.start : place.stop]

    def damage(self, record: CommitRecord) -> list[ShardCorrupt]:
        """Blocks of the recorded version that are not what they were when they were made."""
        slot, layout = self._slot(record.key), _layout(self.lane, record.parts)
        return [damage for block in slot.blocks if (damage := self._verify(slot, layout, block, record)) is not None]

    def _verify(
        self, slot: _Slot, layout: StripeLayout, block: ParityBlock, record: CommitRecord
    ) -> ShardCorrupt | None:
        place = layout.byte_range(block.stripe, layout.data + block.index)
        have = xxhash.xxh3_128_hexdigest(slot.memory[place.start : place.stop].data)
        want = next((b.digest for b in record.parity if _name(b) == _name(block)), block.digest)
        if have == want:
            return None
        name = f"parity {block.index} of stripe {block.stripe}, group {block.group}"
        return ShardCorrupt(name, rank=self.lane.ranks[self.member], version=record.version, want=want, have=have)

    def _slot(self, key: Key) -> _Slot:
        found = next((slot for slot in self._slots if slot.key == key), None)
        if found is None:
            raise SnapshotError(
                f"no parity of version {key[0]}, epoch {key[1]}, is here; there is {self.keys or 'none'}"
            )
        return found


def _layout(lane: Lane, parts: Parts) -> StripeLayout:
    return StripeLayout([parts[rank].length for rank in lane.ranks], lane.parity)


def _name(block: ParityBlock) -> tuple[int, int, int]:
    return block.group, block.stripe, block.index


def encode(
    store: ParityStore, key: Key, parts: Parts, reader: Reader, pool: Executor, *, keep: Key | None
) -> tuple[ParityBlock, ...]:
    """Compute this member's parity blocks of a version; the version before, ``keep``, stays. Raises: SnapshotError."""
    layout, slot = _layout(store.lane, parts), store.make_room(parts, keep)
    blocks = []
    for block in layout.parity_blocks(store.member):
        failpoints.hit("keeper.mid_encode", key[0])
        place = layout.byte_range(block.stripe, layout.data + block.index)
        target, staged = slot.memory[place.start : place.stop], xxhash.xxh3_128()
        for chunk, shares in _fetch(store.lane, layout, block.stripe, range(layout.data), reader, pool):
            made = target[chunk.start : chunk.stop]
            erasure.parity([shares[number] for number in range(layout.data)], block.index, layout.parity, out=made)
            staged.update(made.data)
        blocks.append(ParityBlock(store.lane.number, block.stripe, block.index, staged.hexdigest()))
    slot.blocks, slot.key = tuple(blocks), key
    return tuple(blocks)


def rebuild(
    lane: Lane, parts: Parts, lost: Collection[int], member: int, out: Bytes, reader: Reader, pool: Executor
) -> None:
    """Decode a lost member's snapshot into ``out``, uint8 [its length]; ``lost`` are all members to do without.

    What comes out is as good as what went in: verify the decoded snapshot by its own manifest.
    Raises: InsufficientShards when more are lost than the parity restores; SnapshotError.
    """
    layout = _layout(lane, parts)
    for repair in layout.repair(lost).stripes:
        share = layout.share_of(repair.stripe, member)
        if share in repair.missing:
            for chunk, shares in _fetch(lane, layout, repair.stripe, repair.sources, reader, pool):
                place = layout.byte_range(repair.stripe, share, chunk)
                (block,) = erasure.decode(shares, [share], layout.data, layout.parity)
                out[place.start : place.stop] = block[: len(place)]


_Shares = Mapping[int, Bytes]
"""Chunks of one stripe by share number, padded with zeros to one length."""


def _fetch(
    lane: Lane, layout: StripeLayout, stripe: int, wanted: Sequence[int], reader: Reader, pool: Executor
) -> Iterator[tuple[range, _Shares]]:
    """These shares of a stripe, chunk by chunk, read side by side; the next chunk while one is worked on.

    The arrays are used again two chunks later.
    """
    size = min(_CHUNK_BYTES, layout.block_bytes)
    scratch = [np.empty((len(wanted), size), dtype=np.uint8) for _ in range(2)]

    def begin(number: int, chunk: range) -> list[Future[None]]:
        rows = scratch[number % 2][:, : len(chunk)]
        return [
            pool.submit(_fill, rows[row], lane, layout, stripe, share, chunk, reader)
            for row, share in enumerate(wanted)
        ]

    chunks = list(layout.chunks(_CHUNK_BYTES))
    under_way = begin(0, chunks[0]) if chunks else []
    for number, chunk in enumerate(chunks):
        _finish(under_way)
        if number + 1 < len(chunks):
            under_way = begin(number + 1, chunks[number + 1])
        yield chunk, {share: scratch[number % 2][row, : len(chunk)] for row, share in enumerate(wanted)}


def _finish(reads: Sequence[Future[None]]) -> None:
    """All of them, also when one fails: nothing may write into the arrays when an error leaves here."""
    if wait(reads, timeout=_PATIENCE_S).not_done:  # each has a deadline of its own, well below this one
        raise SnapshotError(f"a chunk was not read within {_PATIENCE_S:.0f} s")
    for read in reads:
        read.result()


def _fill(row: Bytes, lane: Lane, layout: StripeLayout, stripe: int, share: int, chunk: range, reader: Reader) -> None:
    place = layout.byte_range(stripe, share, chunk)
    if place:
        read = reader.data if share < layout.data else reader.parity
        read(lane.ranks[layout.member_of(stripe, share)], place, row[: len(place)])
    row[len(place) :] = 0
