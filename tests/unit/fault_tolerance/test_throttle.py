"""A bound on bytes per second: its arithmetic on a clock that only moves when somebody waits."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem

from holdfast.clock import FakeClock
from holdfast.fault_tolerance.keeper import Keeper
from holdfast.fault_tolerance.object_storage import RenamingStorage
from holdfast.fault_tolerance.storage import DirectoryStorage, Storage
from holdfast.fault_tolerance.throttle import PART_BYTES, Throttle, parts
from tests.support.keepers import offer, writer
from tests.support.snapshots import RUN_TAG


def _views(*sizes: int) -> list[memoryview]:
    return [memoryview(bytes(size)) for size in sizes]


def test_each_part_waits_for_those_before_it() -> None:
    clock = FakeClock(50.0)
    throttle = Throttle(100.0, clock)
    begun = [(clock.now() - 50.0, part.nbytes) for part in throttle.paced(_views(200, 50, 1))]
    assert begun == [(0.0, 200), (2.0, 50), (2.5, 1)]


def test_time_in_which_nobody_writes_is_not_saved_up() -> None:
    clock = FakeClock()
    throttle = Throttle(100.0, clock)
    list(throttle.paced(_views(100)))
    clock.advance(1000.0)
    list(throttle.paced(_views(100, 100, 100)))
    assert clock.now() == 1002.0


def test_without_a_bound_nobody_waits() -> None:
    clock = FakeClock()
    assert len(list(Throttle(0.0, clock).paced(_views(*[10**6] * 50)))) == 50
    assert clock.now() == 0.0


@given(st.lists(st.tuples(st.integers(1, 1000), st.floats(0.0, 20.0)), min_size=1, max_size=30))
def test_no_interval_sees_more_than_its_share_and_one_part(writes: list[tuple[int, float]]) -> None:
    """Whatever pauses come between; and nobody waits longer than the bound asks for."""
    clock, begun = FakeClock(), list[tuple[float, int]]()
    throttle = Throttle(100.0, clock)
    for size, pause in writes:
        clock.advance(pause)
        for part in throttle.paced(_views(size)):
            begun.append((clock.now(), part.nbytes))
    for i, (first, _) in enumerate(begun):
        for j in range(i, len(begun)):
            last, size = begun[j]
            assert sum(size for _, size in begun[i:j]) <= 100.0 * (last - first) + 1e-6
    assert clock.now() <= sum(size for size, _ in writes[:-1]) / 100.0 + sum(pause for _, pause in writes) + 1e-6


@given(st.lists(st.integers(0, 3 * PART_BYTES), max_size=3))
def test_parts_are_the_views_in_order_cut_small(sizes: list[int]) -> None:
    content = memoryview(bytes(3 * PART_BYTES))
    found = [part.nbytes for part in parts([content[:size] for size in sizes])]
    assert sum(found) == sum(sizes)
    assert all(0 < size <= PART_BYTES for size in found)
    assert len(found) == sum(-(-size // PART_BYTES) for size in sizes)


@pytest.mark.parametrize("kind", ["directory", "renaming"])
def test_a_storage_keeps_to_the_bound(tmp_path: Path, kind: str) -> None:
    clock = FakeClock()
    throttle = Throttle(1e6, clock)
    storage: Storage = DirectoryStorage(tmp_path, throttle)
    if kind == "renaming":
        storage = RenamingStorage(LocalFileSystem(), str(tmp_path), throttle)
    storage.write("a", [bytes(2 * PART_BYTES)])
    storage.write("b", [b"x"])
    assert clock.now() == pytest.approx(2 * PART_BYTES / 1e6)


def test_a_keeper_keeps_to_the_bound_of_its_node(tmp_path: Path) -> None:
    """Two ranks together; nothing else moves the clock."""
    clock = FakeClock(1000.0)
    keeper = Keeper(0, RUN_TAG, limit_bytes=1 << 26, buffers=3, lease_s=60.0, clock=clock, persist_mb_per_s=0.001)
    for rank in range(2):
        offer(writer(keeper, rank, world=2), 1)
    receipts = [keeper.persist(rank, 1, str(tmp_path), "step-00000001") for rank in range(2)]
    keeper.close()
    written = sum(int(str(receipt["bytes"])) for receipt in receipts)
    last = (tmp_path / "step-00000001" / "rank00001.manifest.arrow").stat().st_size
    assert clock.now() == pytest.approx(1000.0 + (written - last) / 1000.0)


def test_threads_share_the_bound() -> None:
    """The clock stands still, so that each waits from the same moment on."""

    class Still(FakeClock):
        def __init__(self) -> None:
            super().__init__()
            self.waits: list[float] = []

        def sleep(self, seconds: float) -> None:
            self.waits.append(seconds)

    clock = Still()
    throttle = Throttle(10.0, clock)
    threads = [threading.Thread(target=lambda: list(throttle.paced(_views(10)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert sorted(clock.waits) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
