"""Damage on purpose: exactly one bit, where it was wanted; full and slow disks for as long as was wanted."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from holdfast.clock import FakeClock
from holdfast.errors import SnapshotError
from holdfast.fault_tolerance import chaos, checkpoint, impairment
from holdfast.fault_tolerance.damage import damage_checkpoint, flip_bit
from holdfast.fault_tolerance.impairment import Impaired, Impairment
from holdfast.fault_tolerance.storage import DirectoryStorage, MemoryStorage, open_storage
from holdfast.fault_tolerance.throttle import Throttle


def _flipped(entry: str, size: int = 1000) -> list[int]:
    """Which bits of zeros are ones afterwards."""
    data = np.zeros(size, dtype=np.uint8)
    flip_bit(data, chaos.parse(entry))
    return [int(bit) for bit in np.flatnonzero(np.unpackbits(data, bitorder="little"))]


def test_the_bit_that_was_named_flips_and_no_other() -> None:
    assert _flipped("flip rank=0 step=1 bit=0") == [0]
    assert _flipped("flip rank=0 step=1 bit=7999") == [7999]
    assert _flipped("flip rank=0 step=1 bit=8001") == [1]


def test_a_seed_chooses_one_bit_and_the_same_one_again() -> None:
    bits = [
        _flipped(f"flip rank={rank} step={step} seed={seed}") for rank in (0, 1) for step in (1, 2) for seed in (0, 1)
    ]
    assert all(len(bit) == 1 for bit in bits)
    assert len({bit[0] for bit in bits}) > 4
    assert _flipped("flip rank=0 step=1 seed=5") == _flipped("flip rank=0 step=1 seed=5")


def test_nothing_can_flip_where_nothing_is() -> None:
    assert _flipped("flip rank=0 step=1", size=0) == []


def _saved(steps: tuple[int, ...]) -> MemoryStorage:
    storage = MemoryStorage()
    for step in steps:
        folder = checkpoint.directory(step)
        receipts = {r: checkpoint.write_rank(storage, folder, r, data=[bytes(100)], manifest=bytes(50)) for r in (0, 1)}
        checkpoint.commit(storage, step, receipts=receipts, config_digest="c")
    return storage


@pytest.mark.parametrize(
    ("entry", "path"),
    [
        ("flip_file step=9", "step-00000008/rank00000.bin"),
        ("flip_file rank=1 step=9 what=manifest", "step-00000008/rank00001.manifest.arrow"),
        ("flip_file step=9 what=record", "step-00000008/commit.json"),
        ("truncate_file rank=1 step=9", "step-00000008/rank00001.bin"),
    ],
)
def test_one_file_of_the_newest_checkpoint_is_damaged(entry: str, path: str) -> None:
    storage, intact = _saved((4, 8)), _saved((4, 8))
    assert damage_checkpoint(storage, chaos.parse(entry)) == path
    names = [f"{d}/{n}" for d in storage.list("") if d.startswith("step") for n in storage.list(d)]
    dated = checkpoint.COMMIT_FILE
    assert all(storage.read(name) == intact.read(name) for name in names if name != path and not name.endswith(dated))
    before, after = intact.read(path), storage.read(path)
    if entry.startswith("truncate"):
        assert after == before[: len(before) // 2]
    elif not path.endswith(dated):
        changed = np.unpackbits(np.frombuffer(before, np.uint8) ^ np.frombuffer(after, np.uint8))
        assert changed.sum() == 1


def test_there_may_be_no_checkpoint_to_damage() -> None:
    assert damage_checkpoint(MemoryStorage(), chaos.parse("flip_file step=1")) is None


# -- disks ------------------------------------------------------------------------------------------------------------


def test_a_disk_is_full_for_as_long_as_it_was_told(tmp_path: Path) -> None:
    clock, storage_of = FakeClock(50.0), lambda: DirectoryStorage(tmp_path, Impaired(Throttle(), disk))
    disk = Impairment(clock)
    disk.suffer(chaos.parse("disk_full step=1 for=2"))
    with pytest.raises(SnapshotError, match="no space left for 3 bytes"):
        storage_of().write("a", [b"abc"])
    assert list(tmp_path.iterdir()) == []
    clock.advance(2.0)
    assert storage_of().write("a", [b"abc"]) == 3


def test_a_slow_disk_takes_its_time_for_as_long_as_it_was_told() -> None:
    clock = FakeClock(50.0)
    disk = Impairment(clock)
    disk.suffer(chaos.parse("slow_disk step=1 mb_per_s=1 for=10"))
    pieces = [memoryview(bytes(1_000_000)) for _ in range(4)]
    for piece in pieces:
        assert b"".join(disk.passed(piece)) == piece
    assert clock.now() == pytest.approx(53.0)  # each begins when the one before has passed
    clock.advance(20.0)
    at = clock.now()
    assert [len(part) for piece in pieces for part in disk.passed(piece)] == [1_000_000] * 4
    assert clock.now() == at


def test_every_durable_storage_can_be_struck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(50.0)
    monkeypatch.setattr(impairment, "STORAGE", disk := Impairment(clock))
    monkeypatch.setattr(impairment.Impaired.__init__, "__defaults__", (disk,))
    storage = open_storage(str(tmp_path))
    disk.suffer(chaos.parse("disk_full step=1 for=2"))
    with pytest.raises(SnapshotError, match="no space left") as caught:
        storage.write("a", [b"abc"])
    assert isinstance(caught.value.__cause__, OSError) and caught.value.__cause__.errno == errno.ENOSPC


def test_a_disk_that_is_healed_takes_everything_at_once() -> None:
    disk = Impairment(FakeClock(50.0))
    disk.suffer(chaos.parse("disk_full step=1 for=600"))
    disk.heal()
    assert [bytes(part) for part in disk.passed(memoryview(b"abc"))] == [b"abc"]
