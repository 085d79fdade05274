"""The shared memory itself: who sees what, what is reserved, what is refused, what is left behind."""

from __future__ import annotations

import gc
import json
import os
import resource
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from holdfast.errors import ConfigurationError, InvariantViolation, SnapshotError, SnapshotMemory
from holdfast.fault_tolerance.arena import Arena, ArenaRef
from holdfast.fault_tolerance.board import HEADER_BYTES
from holdfast.fault_tolerance.buffer import Buffer, BufferState
from holdfast.fault_tolerance.manifest import digest
from holdfast.types import Phase

_MIB = 1 << 20


def _arena(*, rank: int = 0, limit: int = 64 * _MIB, buffers: int = 3) -> Arena:
    return Arena.create(rank, "run", limit, buffers)


def _publish(buffer: Buffer, version: int, data: bytes = b"data") -> None:
    assert buffer.claim(version, 1)
    buffer.data[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    buffer.publish(b"manifest", digest(b"manifest"), data_bytes=len(data), state=BufferState.FILLED)


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


# -- two views of one memory ------------------------------------------------------------------------------------------


def test_what_one_side_writes_the_other_reads() -> None:
    owner = _arena()
    worker = Arena.attach(ArenaRef(**json.loads(json.dumps(asdict(owner.ref)))))
    worker.board.enter(Phase.BUILD, 3, 1.0)
    worker.reserve(5000)
    _publish(worker.buffer(2), 9)
    slot = owner.slots()[2]
    assert owner.board.read().phase is Phase.BUILD
    assert (slot.state, slot.version, slot.epoch) == (BufferState.FILLED, 9, 1)
    assert owner.buffer(2).data[:4].tobytes() == b"data"
    assert owner.buffer(2).manifest(slot) == b"manifest"


def test_the_worker_sees_what_the_keeper_reserved_after_it_had_attached() -> None:
    owner = _arena()
    worker = Arena.attach(owner.ref)
    assert worker.buffer(0).data.size == 0
    owner.reserve(5000)
    _publish(owner.buffer(0), 1)
    assert worker.buffer(0).data[:4].tobytes() == b"data"


def test_buffers_do_not_overlap_each_other_or_the_board() -> None:
    arena = _arena()
    arena.reserve(5000)
    for number, buffer in enumerate(arena.buffers):
        buffer.data[:] = number + 1
    assert [set(buffer.data.tolist()) for buffer in arena.buffers] == [{1}, {2}, {3}]
    assert arena.board.read().phase is Phase.IDLE


def test_a_buffer_keeps_its_bytes_when_its_owner_lets_go_while_the_worker_has_it_mapped() -> None:
    owner = _arena()
    worker = Arena.attach(owner.ref)
    worker.reserve(5000)
    _publish(worker.buffer(0), 4)
    owner.close()
    assert worker.slots()[0].version == 4
    assert worker.buffer(0).data[:4].tobytes() == b"data"


# -- nothing is left behind -------------------------------------------------------------------------------------------


def _names() -> set[str]:
    """In /dev/shm, which other programs use too."""
    return {name for name in os.listdir("/dev/shm") if "holdfast" in name or "4242" in name}


def test_there_is_no_name_and_no_memory_after_both_sides_have_let_go() -> None:
    gc.collect()  # what other tests have left
    names, files = _names(), _open_files()
    owner = _arena(rank=4242)
    worker = Arena.attach(owner.ref)
    worker.reserve(_MIB)
    assert "holdfast-rank4242" in Path("/proc/self/maps").read_text()
    assert _names() == names
    for arena in (owner, worker, owner):
        arena.close()
    del owner, worker, arena
    gc.collect()
    assert "holdfast-rank4242" not in Path("/proc/self/maps").read_text()
    assert (_names(), _open_files()) == (names, files)


def test_a_closed_arena_is_not_used_by_mistake() -> None:
    arena = _arena()
    arena.close()
    with pytest.raises(InvariantViolation, match="after it was closed"):
        arena.slots()


def test_nobody_can_pull_the_memory_from_under_a_mapping() -> None:
    arena = _arena()
    with pytest.raises(PermissionError):
        os.ftruncate(arena.ref.fd, 0)


# -- attaching to the wrong thing -------------------------------------------------------------------------------------


def test_a_reference_to_a_dead_keeper_is_refused_with_a_reason() -> None:
    gone = replace(_arena().ref, pid=2**22 + 1)
    files = _open_files()
    with pytest.raises(SnapshotError, match=r"rank 0 at /proc/4194305/fd/\d+ cannot be opened .* keeper has died"):
        Arena.attach(gone)
    assert _open_files() == files


def test_a_descriptor_that_meanwhile_means_another_file_is_refused(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x")
    large.write_bytes(bytes(2 * HEADER_BYTES))
    files = _open_files()
    for path, complaint in ((small, "too small for a board"), (large, "no board of layout")):
        with path.open("r+b") as other, pytest.raises(SnapshotError, match=complaint):
            Arena.attach(ArenaRef(os.getpid(), other.fileno(), 0, "run"))
    assert _open_files() == files


def test_a_reference_of_another_run_is_refused() -> None:
    arena = _arena()
    with pytest.raises(SnapshotError, match="of run 'run', not to rank 0 of 'other'"):
        Arena.attach(replace(arena.ref, run_tag="other"))


# -- reserving --------------------------------------------------------------------------------------------------------


def test_reserved_memory_really_exists() -> None:
    arena = _arena()
    arena.reserve(3 * _MIB)
    status = os.fstat(arena.ref.fd)
    assert arena.board.capacity >= 3 * _MIB
    assert status.st_blocks * 512 >= 9 * _MIB


def test_more_than_allowed_is_refused_with_both_numbers_before_anything_is_taken() -> None:
    arena = _arena(limit=10 * _MIB)
    with pytest.raises(SnapshotMemory, match=r"rank 0 need [\d,]+ bytes of host memory, 10,485,760 are") as refused:
        arena.reserve(4 * _MIB)
    assert (refused.value.have_bytes, refused.value.rank) == (10 * _MIB, 0)
    assert refused.value.need_bytes >= 12 * _MIB
    assert isinstance(refused.value, ConfigurationError)
    assert (arena.board.capacity, os.fstat(arena.ref.fd).st_size) == (0, HEADER_BYTES)


def test_memory_that_the_system_does_not_give_is_refused_and_the_arena_stays_usable() -> None:
    arena = _arena()
    arena.reserve(_MIB)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * _MIB, usual[1]))
    try:
        with pytest.raises(SnapshotMemory, match="rank 0 need"):
            arena.reserve(4 * _MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    _publish(arena.buffer(2), 1)
    assert arena.slots()[2].is_complete


def test_the_same_or_a_smaller_size_leaves_versions_alone() -> None:
    arena = _arena()
    arena.reserve(_MIB)
    _publish(arena.buffer(1), 7)
    arena.reserve(_MIB)
    arena.reserve(100)
    arena.reserve(_MIB + 4096)  # a manifest of a few digits more
    assert [slot.version for slot in arena.slots() if slot.is_complete] == [7]
    assert arena.buffer(1).data[:4].tobytes() == b"data"


def test_a_larger_size_is_refused_while_it_would_destroy_versions() -> None:
    arena = _arena()
    arena.reserve(_MIB)
    _publish(arena.buffer(1), 7)
    with pytest.raises(SnapshotError, match=rf"needs buffers of 2,097,152 bytes.*{arena.board.capacity:,}.*\[7\]"):
        arena.reserve(2 * _MIB)
    assert arena.slots()[1].is_complete


def test_an_arena_without_complete_versions_grows_for_everybody() -> None:
    owner = _arena()
    worker = Arena.attach(owner.ref)
    worker.reserve(_MIB)
    worker.buffer(0).claim(1, 1)  # left FILLING by a worker that died
    worker.reserve(2 * _MIB)
    assert [len(buffer.data) >= 2 * _MIB for buffer in owner.buffers] == [True] * 3
    assert [slot.state for slot in owner.slots()] == [BufferState.FREE] * 3


# -- one buffer -------------------------------------------------------------------------------------------------------


def test_a_buffer_is_filling_before_its_first_byte_changes_and_complete_after_its_last() -> None:
    arena = _arena()
    arena.reserve(_MIB)
    buffer = arena.buffer(0)
    assert not buffer.describe().is_complete
    buffer.claim(3, 1)
    assert buffer.describe().state is BufferState.FILLING
    _publish(buffer, 3)
    assert buffer.describe().is_complete


def test_a_pinned_buffer_cannot_be_claimed_and_stays_what_it_was() -> None:
    arena = _arena()
    arena.reserve(_MIB)
    buffer = arena.buffer(0)
    _publish(buffer, 3)
    before = buffer.describe()
    buffer.pin(+1)
    assert not buffer.claim(4, 1)
    assert buffer.describe() == replace(before, is_pinned=True)
    buffer.pin(-1)
    assert buffer.claim(4, 1)


def test_what_does_not_fit_a_buffer_is_refused_with_the_numbers() -> None:
    arena = _arena()
    arena.reserve(5000)
    capacity = arena.board.capacity
    arena.buffer(0).claim(1, 1)
    with pytest.raises(SnapshotError, match=rf"4,000 bytes of data.*do not fit a buffer of {capacity:,}"):
        arena.buffer(0).publish(bytes(capacity), "00" * 16, data_bytes=4000, state=BufferState.FILLED)
    assert not arena.slots()[0].is_complete


@pytest.mark.parametrize("word", [5, 99, -1])
def test_a_damaged_state_word_offers_nothing(word: int) -> None:
    arena = _arena()
    arena.reserve(5000)
    _publish(arena.buffer(0), 1)
    arena.board.descriptor(0).cast("q")[0] = word
    assert not arena.slots()[0].is_complete
