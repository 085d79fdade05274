"""Parity over the nodes of a lane: whoever is lost, as many as the lane tolerates, comes back to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.errors import InsufficientShards, SnapshotError, SnapshotMemory
from holdfast.fault_tolerance import parity
from holdfast.fault_tolerance.buffer import Bytes
from holdfast.fault_tolerance.commit import CommitRecord, RankVote
from holdfast.fault_tolerance.lanes import Lane
from holdfast.fault_tolerance.parity import ParityStore, encode, rebuild

_KEY = (7, 2)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as found:
        yield found


@dataclass
class _Nodes:
    """Every member's snapshot and parity, in this process."""

    lane: Lane
    held: dict[int, Bytes]
    stores: dict[int, ParityStore]

    @classmethod
    def make(cls, sizes: list[int], m: int, seed: int, limit_bytes: int = 1 << 30) -> _Nodes:
        rng = np.random.default_rng(seed)
        ranks = tuple(range(len(sizes)))
        lane = Lane(5, ranks, m)
        held = {rank: rng.integers(0, 256, size, dtype=np.uint8) for rank, size in zip(ranks, sizes, strict=True)}
        stores = {rank: ParityStore(lane, i, limit_bytes=limit_bytes) for i, rank in enumerate(ranks)}
        return cls(lane, held, stores)

    @property
    def parts(self) -> dict[int, RankVote]:
        return {rank: RankVote(held.size, f"{rank}") for rank, held in self.held.items()}

    def data(self, rank: int, place: range, into: Bytes) -> None:
        if rank not in self.held:
            raise SnapshotError(f"rank {rank} is lost")
        assert 0 <= place.start < place.stop <= self.held[rank].size
        into[:] = self.held[rank][place.start : place.stop]

    def parity(self, rank: int, place: range, into: Bytes) -> None:
        if rank not in self.stores:
            raise SnapshotError(f"rank {rank} is lost")
        into[:] = self.stores[rank].read(_KEY, place)

    def encode(self, pool: ThreadPoolExecutor) -> CommitRecord:
        blocks = [
            block for store in self.stores.values() for block in encode(store, _KEY, self.parts, self, pool, keep=None)
        ]
        return CommitRecord(*_KEY, len(self.held), self.parts, tuple(sorted(blocks)))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_tolerated_loss_comes_back_to_the_bit(pool: ThreadPoolExecutor, data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 6))
    m = data.draw(st.integers(1, n - 1))
    sizes = data.draw(st.lists(st.sampled_from([0, 1, 63, 64, 65, 1000, 4097]), min_size=n, max_size=n))
    chunk = data.draw(st.sampled_from([64, 100, 1 << 20]))
    nodes = _Nodes.make(sizes, m, seed=data.draw(st.integers(0, 99)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "_CHUNK_BYTES", chunk)
        nodes.encode(pool)
        lost = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=m, unique=True))
        parts, whole = nodes.parts, dict(nodes.held)
        for member in lost:
            del nodes.held[nodes.lane.ranks[member]], nodes.stores[nodes.lane.ranks[member]]
        for member in lost:
            rank = nodes.lane.ranks[member]
            out = np.full(parts[rank].length, 0xEE, dtype=np.uint8)
            rebuild(nodes.lane, parts, lost, member, out, nodes, pool)
            assert out.tobytes() == whole[rank].tobytes()


def test_one_loss_too_many_is_refused(pool: ThreadPoolExecutor) -> None:
    nodes = _Nodes.make([100, 200, 300], 1, seed=1)
    nodes.encode(pool)
    with pytest.raises(InsufficientShards):
        rebuild(nodes.lane, nodes.parts, [0, 1], 0, np.empty(100, dtype=np.uint8), nodes, pool)


def test_every_flipped_bit_of_parity_is_found(pool: ThreadPoolExecutor) -> None:
    nodes = _Nodes.make([1000, 2000, 1500], 1, seed=2)
    record = nodes.encode(pool)
    rng = np.random.default_rng(3)
    for store in nodes.stores.values():
        assert store.damage(record) == []
        for _ in range(200):
            memory = store.read(_KEY, range(store.size_for(nodes.parts)))
            place, bit = rng.integers(memory.size), np.uint8(1 << rng.integers(8))
            memory[place] ^= bit
            assert len(store.damage(record)) == 1
            memory[place] ^= bit
        assert store.damage(record) == []


def test_the_version_that_must_be_kept_is_not_overwritten(pool: ThreadPoolExecutor) -> None:
    nodes = _Nodes.make([100, 100], 1, seed=4)
    store = nodes.stores[0]
    for version in range(1, 6):
        keep = (version - 1, 2) if version > 1 else None
        encode(store, (version, 2), nodes.parts, nodes, pool, keep=keep)
        assert (version, 2) in store.keys
        assert keep is None or keep in store.keys


def test_a_source_that_fails_leaves_no_version(pool: ThreadPoolExecutor) -> None:
    nodes = _Nodes.make([100, 100, 100], 1, seed=5)
    parts = nodes.parts
    del nodes.held[1]
    with pytest.raises(SnapshotError, match="rank 1 is lost"):
        encode(nodes.stores[0], _KEY, parts, nodes, pool, keep=None)
    assert nodes.stores[0].keys == []


def test_memory_that_is_not_granted_is_refused_with_the_bytes_it_would_take(pool: ThreadPoolExecutor) -> None:
    nodes = _Nodes.make([1000, 1000], 1, seed=6, limit_bytes=1023)
    with pytest.raises(SnapshotMemory, match="1,024"):
        nodes.encode(pool)


@pytest.mark.parametrize("limit_bytes", [4096, 1 << 30], ids=["just enough", "plenty"])
def test_memory_reserved_before_the_first_version_is_what_it_is_encoded_into(
    limit_bytes: int, pool: ThreadPoolExecutor
) -> None:
    nodes = _Nodes.make([2000, 1999, 0], 1, seed=7, limit_bytes=limit_bytes)
    store = nodes.stores[0]
    store.reserve(4000)
    reserved = [slot.memory for slot in store._slots]
    assert [memory.size for memory in reserved] == [2048] * 2
    nodes.encode(pool)
    store.reserve(8000 if limit_bytes > 4096 else 4000)
    assert any(np.shares_memory(store.read(_KEY, range(1)), memory) for memory in reserved)


def test_more_memory_than_is_granted_is_not_reserved() -> None:
    store = _Nodes.make([1000, 1000], 1, seed=6, limit_bytes=1000).stores[0]
    store.reserve(1000)
    assert sum(slot.memory.size for slot in store._slots) == 1000
