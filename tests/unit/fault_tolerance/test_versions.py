"""What an arena holds: found while its writer works, believed only after a check, carried to another arena."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from holdfast.errors import InsufficientShards, SnapshotMemory
from holdfast.fault_tolerance.arena import Arena
from holdfast.fault_tolerance.buffer import Buffer, BufferState, Slot
from holdfast.fault_tolerance.manifest import Entry, Manifest, digest
from holdfast.fault_tolerance.versions import Held, copy_versions, find_version, held_versions
from holdfast.types import SliceSpec

_LENGTH = 300


def _content(version: int, epoch: int) -> bytes:
    return bytes((i * 7 + version * 31 + epoch * 101) % 256 for i in range(_LENGTH))


def _manifest(version: int, epoch: int, data: bytes) -> Manifest:
    halves = ((0, 128), (128, _LENGTH))
    entries = [
        Entry(SliceSpec(f"half{i}", (_LENGTH,), a, b, "uint8"), a, b - a, digest(data[a:b]))
        for i, (a, b) in enumerate(halves)
    ]
    return Manifest(version, epoch, 0, 1, {"step": version}, tuple(entries))


def _publish(buffer: Buffer, version: int, epoch: int = 1, state: BufferState = BufferState.FILLED) -> None:
    data = _content(version, epoch)
    stored = _manifest(version, epoch, data).to_bytes()
    assert buffer.claim(version, epoch)
    buffer.data[:_LENGTH] = np.frombuffer(data, dtype=np.uint8)
    buffer.publish(stored, digest(stored), data_bytes=_LENGTH, state=state)


def _arena(*, limit: int = 1 << 24, buffers: int = 3, capacity: int = 4000) -> Arena:
    arena = Arena.create(0, "run", limit, buffers)
    if capacity:
        arena.reserve(capacity)
    return arena


def _names(found: list[Held]) -> list[tuple[int, int]]:
    return [(held.slot.version, held.slot.epoch) for held in found]


# -- finding ----------------------------------------------------------------------------------------------------------


def test_complete_versions_are_found_newest_first_wherever_they_lie() -> None:
    arena = _arena(buffers=5)
    for index, (version, epoch) in {0: (4, 1), 1: (9, 1), 3: (4, 2), 4: (7, 2)}.items():
        _publish(arena.buffer(index), version, epoch)
    assert _names(held_versions(arena)) == [(9, 1), (7, 2), (4, 2), (4, 1)]


def test_an_arena_without_memory_or_without_versions_holds_nothing() -> None:
    assert held_versions(_arena(capacity=0)) == []
    assert held_versions(_arena()) == []


@pytest.mark.parametrize("state", [BufferState.FREE, BufferState.FILLING])
def test_what_is_not_complete_is_not_held(state: BufferState) -> None:
    arena = _arena()
    _publish(arena.buffer(0), 4, state=state)
    assert held_versions(arena) == []


def test_of_two_copies_of_a_version_the_one_of_the_later_epoch_is_found() -> None:
    arena = _arena()
    for index, epoch in enumerate((2, 5, 3)):
        _publish(arena.buffer(index), 4, epoch)
    held = find_version(arena, 4)
    assert held.slot.epoch == 5
    assert held.data.tobytes() == _content(4, 5)
    assert held.manifest.scalars == {"step": 4}


def test_a_version_that_is_not_there_is_refused_with_what_is_there() -> None:
    arena = _arena()
    with pytest.raises(InsufficientShards, match="version 4 is wanted, its keeper holds none"):
        find_version(arena, 4)
    _publish(arena.buffer(1), 3)
    _publish(arena.buffer(2), 5)
    with pytest.raises(InsufficientShards, match=r"version 4 is wanted, its keeper holds \[5, 3\]") as refused:
        find_version(arena, 4)
    assert refused.value.missing == (0,)


# -- believing --------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_the_data_is_blamed_on_its_slice() -> None:
    arena = _arena()
    _publish(arena.buffer(0), 4)
    held = find_version(arena, 4)
    assert list(held.damage()) == []
    for at in range(_LENGTH):
        held.data[at] ^= 1
        assert [damage.name for damage in held.damage()] == ["half0" if at < 128 else "half1"]
        held.data[at] ^= 1


def test_every_flipped_bit_of_the_manifest_hides_the_version_and_no_other() -> None:
    arena = _arena()
    _publish(arena.buffer(0), 4)
    _publish(arena.buffer(1), 5)
    slot = arena.slots()[0]
    for at in range(slot.manifest_at, slot.manifest_at + slot.manifest_bytes):
        arena.buffer(0).data[at] ^= 128
        assert _names(held_versions(arena)) == [(5, 1)]
        arena.buffer(0).data[at] ^= 128
    assert _names(held_versions(arena)) == [(5, 1), (4, 1)]


def test_a_manifest_that_is_not_the_one_the_descriptor_means_is_not_believed() -> None:
    arena = _arena()
    for index, (version, epoch) in enumerate(((4, 1), (5, 1), (6, 1))):
        _publish(arena.buffer(index), version, epoch)
    for index, word in ((0, 3), (1, 4)):  # version and epoch
        arena.board.descriptor(index).cast("q")[word] += 1
    arena.board.descriptor(2)[64] ^= 1  # the manifest's digest
    assert held_versions(arena) == []


def test_a_buffer_that_is_taken_while_its_manifest_is_read_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = _arena()
    _publish(arena.buffer(0), 4)
    real = Buffer.manifest

    def disturbed(buffer: Buffer, slot: Slot) -> bytes:
        stored = real(buffer, slot)
        arena.buffer(0).claim(7, 1)
        return stored

    monkeypatch.setattr(Buffer, "manifest", disturbed)
    assert held_versions(arena) == []


def test_an_intact_manifest_of_another_format_is_not_offered_and_the_log_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    arena = _arena()
    buffer = arena.buffer(0)
    stored = replace(_manifest(4, 1, _content(4, 1)), format_version=99).to_bytes()
    buffer.claim(4, 1)
    buffer.publish(stored, digest(stored), data_bytes=_LENGTH, state=BufferState.FILLED)
    with caplog.at_level(logging.WARNING):
        assert held_versions(arena) == []
    assert "version 4 is not offered: manifest has format_version=99" in caplog.text


def test_a_version_is_unchanged_until_its_buffer_is_filled_again() -> None:
    arena = _arena()
    _publish(arena.buffer(0), 4)
    held = find_version(arena, 4)
    arena.buffer(0).commit()
    assert held.is_unchanged()
    arena.buffer(0).release()  # not offered any more, but the bytes are still there
    assert held.is_unchanged()
    arena.buffer(0).claim(4, 1)  # even for the same version again
    assert not held.is_unchanged()


@pytest.mark.parametrize(("version", "epoch"), [(5, 1), (4, 2)])
def test_a_buffer_that_was_filled_again_meanwhile_is_another_version(version: int, epoch: int) -> None:
    arena = _arena()
    _publish(arena.buffer(0), 4, 1)
    held = find_version(arena, 4)
    _publish(arena.buffer(0), version, epoch)
    assert not held.is_unchanged()


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual_s)


@pytest.mark.usefixtures("hasty_threads")
def test_a_reader_beside_a_writer_never_takes_one_version_for_another() -> None:
    arena, over = _arena(), threading.Event()

    def write() -> None:
        version = 0
        while not over.is_set():
            version += 1
            _publish(arena.buffer(version % 3), version)

    writing = threading.Thread(target=write)
    writing.start()
    try:
        believed = 0
        while believed < 150:
            for held in held_versions(arena):
                assert held.manifest.version == held.slot.version
                content = held.data.tobytes()
                if held.is_unchanged():
                    assert content == _content(held.slot.version, 1)
                    believed += 1
    finally:
        over.set()
        writing.join(10)


# -- carrying ---------------------------------------------------------------------------------------------------------


def test_state_mark_and_bytes_are_carried_into_memory_that_is_reserved_for_them() -> None:
    old, new = _arena(), _arena(capacity=0)
    _publish(old.buffer(0), 4, state=BufferState.COMMITTED)
    _publish(old.buffer(1), 5, state=BufferState.COMMITTED)
    _publish(old.buffer(2), 6)
    old.buffer(0).keep()
    assert copy_versions(old, new) == [6, 5, 4]
    assert [(h.slot.version, h.slot.state, h.slot.is_kept) for h in held_versions(new)] == [
        (6, BufferState.FILLED, False),
        (5, BufferState.COMMITTED, False),
        (4, BufferState.COMMITTED, True),
    ]
    for held in held_versions(new):
        assert held.data.tobytes() == _content(held.slot.version, 1)
        assert list(held.damage()) == []


def test_carrying_again_carries_only_what_is_missing() -> None:
    old, new = _arena(), _arena()
    for index, version in enumerate((4, 5)):
        _publish(old.buffer(index), version)
    assert copy_versions(old, new) == [5, 4]
    next(h.buffer for h in held_versions(new) if h.slot.version == 4).release()
    assert copy_versions(old, new) == [4]
    assert copy_versions(old, new) == []


def test_nothing_newer_than_what_is_carried_makes_way_for_it() -> None:
    old, new = _arena(), _arena()
    _publish(old.buffer(0), 4, state=BufferState.COMMITTED)
    for index, version in enumerate((7, 8, 9)):
        _publish(new.buffer(index), version, state=BufferState.COMMITTED)
    copy_versions(old, new)
    assert {version for version, _ in _names(held_versions(new))} >= {8, 9}


def test_damaged_versions_stay_behind_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    old, new = _arena(), _arena()
    for index, version in enumerate((4, 5)):
        _publish(old.buffer(index), version)
    find_version(old, 5).data[200] ^= 4
    with caplog.at_level(logging.WARNING):
        assert copy_versions(old, new) == [4]
    assert "version 5 is not carried over: slice 'half1' of rank 0, version 5" in caplog.text


def test_a_new_keeper_with_less_memory_is_refused_with_both_numbers() -> None:
    old = _arena(capacity=1 << 20)
    data_bytes = 1 << 20
    old.buffer(0).claim(4, 1)
    stored = replace(_manifest(4, 1, bytes(_LENGTH)), entries=()).to_bytes()
    old.buffer(0).publish(stored, digest(stored), data_bytes=data_bytes, state=BufferState.FILLED)
    new = _arena(limit=1 << 21, capacity=0)
    with pytest.raises(SnapshotMemory, match="rank 0 need") as refused:
        copy_versions(old, new)
    assert refused.value.need_bytes >= 3 * data_bytes
    assert refused.value.have_bytes == 1 << 21
    assert held_versions(new) == []
    assert _names(held_versions(old)) == [(4, 1)]


def test_the_status_page_is_carried_even_where_there_is_no_version() -> None:
    old, new = _arena(capacity=0), _arena(capacity=0)
    old.board.take_over(pid=77, epoch=3)
    assert copy_versions(old, new) == []
    assert (new.board.read().pid, new.board.read().epoch) == (77, 3)
    assert new.board.capacity == 0
