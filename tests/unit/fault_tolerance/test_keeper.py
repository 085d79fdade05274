"""The owner of a node's memory: what it hands out, tells, protects, writes to disk and brings back."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.clock import FakeClock
from holdfast.errors import (
    Abort,
    InsufficientShards,
    InvariantViolation,
    ManifestMismatch,
    ShardCorrupt,
    SnapshotError,
    SnapshotMemory,
)
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance import keeper as keeper_module
from holdfast.fault_tolerance.arena import Arena
from holdfast.fault_tolerance.buffer import BufferState
from holdfast.fault_tolerance.keeper import Keeper
from holdfast.fault_tolerance.manifest import Manifest
from holdfast.fault_tolerance.storage import DirectoryStorage
from holdfast.fault_tolerance.versions import find_version, held_versions
from holdfast.types import Phase, StepReport
from tests.support.keepers import attach, make_keeper, offer, writer
from tests.support.snapshots import bytes_of, expected_bytes, filled_state

_MIB = 1 << 20
_FOLDER = checkpoint.directory(4)


def _versions(keeper: Keeper, rank: int = 0) -> list[int]:
    return [held["version"] for held in _json(keeper.inventory())["held"][str(rank)]]


def _json(value: object) -> Any:
    """What arrives at the driver."""
    return json.loads(json.dumps(value))


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# -- memory -----------------------------------------------------------------------------------------------------------


def test_a_rank_that_is_admitted_again_gets_the_same_memory() -> None:
    keeper = make_keeper()
    attach(keeper).board.enter(Phase.UPDATE, 5, 1.0)
    assert keeper.admit(0) == keeper.admit(0)
    assert attach(keeper).board.read().step == 5


def test_ranks_have_memory_of_their_own() -> None:
    keeper = make_keeper()
    first, second = attach(keeper, 0), attach(keeper, 7)
    first.board.enter(Phase.UPDATE, 5, 1.0)
    assert (second.board.rank, second.board.read().step) == (7, 0)


def test_the_limit_is_shared_equally_by_ranks_that_are_admitted_before_they_reserve() -> None:
    keeper = make_keeper(limit_bytes=30 * _MIB)
    ranks = [attach(keeper, rank) for rank in range(3)]
    assert [arena.board.limit_bytes for arena in ranks] == [10 * _MIB] * 3
    for arena in ranks:
        arena.reserve(3 * _MIB)
    assert sum(os.fstat(arena.ref.fd).st_size for arena in ranks) < 30 * _MIB + 3 * _MIB


def test_a_rank_that_comes_later_gets_what_is_left() -> None:
    keeper = make_keeper(limit_bytes=30 * _MIB)
    first = attach(keeper, 0)
    first.reserve(6 * _MIB)
    taken = 3 * first.board.capacity
    second = attach(keeper, 1)
    assert second.board.limit_bytes == 30 * _MIB - taken
    with pytest.raises(SnapshotMemory, match="snapshots of rank 1 need"):
        second.reserve(6 * _MIB)
    assert attach(keeper, 2).board.limit_bytes == (30 * _MIB - taken) // 2


def test_what_is_reserved_beyond_a_smaller_limit_leaves_nothing_rather_than_less() -> None:
    keeper = make_keeper(limit_bytes=3 * _MIB)
    attach(keeper, 0).board.capacity = 2 * _MIB  # three buffers of it: more than the limit
    assert attach(keeper, 1).board.limit_bytes == 0


def test_closing_frees_all_memory_and_every_descriptor() -> None:
    gc.collect()  # what other tests have left
    before = _open_files()
    keeper = make_keeper()
    for rank in range(3):
        keeper.admit(rank)
    assert _open_files() >= before + 3
    keeper.close()
    keeper.close()
    assert _open_files() == before


@pytest.mark.parametrize(
    "call",
    [
        lambda k: k.verify(3, 1),
        lambda k: k.quarantine(3, 1),
        lambda k: k.persist(3, 1, "/nowhere", "step-00000001"),
    ],
)
def test_a_rank_of_another_node_is_an_error_that_names_both(call: Any) -> None:
    keeper = make_keeper(node=2)
    keeper.admit(5)
    with pytest.raises(InvariantViolation, match=r"rank 3 is not admitted on node 2, which has \[5\]"):
        call(keeper)


# -- the lease --------------------------------------------------------------------------------------------------------


def test_the_lease_ends_when_the_driver_has_been_silent_for_longer_than_it_lasts() -> None:
    clock = FakeClock(500.0)
    keeper = make_keeper(clock=clock)
    clock.advance(60.0)
    assert not keeper.expired(clock.now())
    clock.advance(0.1)
    assert keeper.expired(clock.now())


def test_only_a_pulse_renews_the_lease() -> None:
    clock = FakeClock(500.0)
    keeper = make_keeper(clock=clock)
    clock.advance(59.0)
    keeper.pulse({})
    clock.advance(59.0)
    keeper.admit(0)
    keeper.inventory()
    keeper.fence(1)
    assert not keeper.expired(clock.now())
    clock.advance(2.0)
    assert keeper.expired(clock.now())


# -- pulse ------------------------------------------------------------------------------------------------------------


def _report(step: int, epoch: int = 1) -> StepReport:
    return StepReport(step, epoch, 1.5, 2.5, 1e-3, 0.7, 64 * step, 0.25, 0.0, 9000, step - 1)


def test_a_pulse_tells_who_is_alive_where_and_since_when() -> None:
    clock = FakeClock(500.0)
    keeper = make_keeper(node=4, clock=clock)
    board = attach(keeper, 2).board
    board.take_over(pid=77, epoch=3)
    board.enter(Phase.VOTE, 9, 480.0)
    board.beat(499.0)
    clock.advance(1.5)
    pulse = _json(keeper.pulse({}))
    assert (pulse["node"], pulse["pid"], pulse["now"]) == (4, os.getpid(), 501.5)
    assert pulse["ranks"]["2"]["beat"] == {
        "rank": 2,
        "pid": 77,
        "epoch": 3,
        "phase": int(Phase.VOTE),
        "step": 9,
        "beat_s": 499.0,
        "progress_s": 480.0,
        "committed": -1,
    }


def test_reports_come_from_the_number_that_is_asked_for_whatever_its_key_became_on_the_way() -> None:
    keeper = make_keeper()
    boards = {rank: attach(keeper, rank).board for rank in (0, 1)}
    for step in (1, 2, 3):
        for board in boards.values():
            board.append(_report(step))
    first = keeper.pulse({})["ranks"]
    assert [r["step"] for r in first[0]["reports"]] == [1, 2, 3]
    assert StepReport(**first[0]["reports"][1]) == _report(2)
    boards[0].append(_report(4))
    then = keeper.pulse(_json({rank: seen["next_seq"] for rank, seen in first.items()}))["ranks"]
    assert [[r["step"] for r in then[rank]["reports"]] for rank in (0, 1)] == [[4], []]


def test_a_pulse_lists_complete_versions_and_which_of_them_wait_for_a_checkpoint() -> None:
    keeper = make_keeper()
    snapshots = writer(keeper, epoch=2, persist_every=4)
    offer(snapshots, 4, 5)
    offer(snapshots, 6, commit=False)
    versions = {v["version"]: v for v in _json(keeper.pulse({}))["ranks"]["0"]["versions"]}
    assert {
        number: {key: v[key] for key in ("version", "epoch", "state", "kept")} for number, v in versions.items()
    } == {
        4: {"version": 4, "epoch": 2, "state": "COMMITTED", "kept": True},
        5: {"version": 5, "epoch": 2, "state": "COMMITTED", "kept": False},
        6: {"version": 6, "epoch": 2, "state": "FILLED", "kept": False},
    }


def test_a_version_that_the_keeper_only_reads_does_not_wait_for_a_checkpoint() -> None:
    keeper = make_keeper()
    offer(writer(keeper), 4)
    find_version(keeper._arenas[0], 4).buffer.pin(+1)
    assert [v["kept"] for v in keeper.pulse({})["ranks"][0]["versions"]] == [False]


# -- inventory --------------------------------------------------------------------------------------------------------


def test_the_inventory_has_what_could_be_restored_newest_first() -> None:
    keeper = make_keeper()
    offer(writer(keeper, rank=0, world=2, epoch=3), 4, 5)
    offer(writer(keeper, rank=1, world=2, epoch=3), 4)
    attach(keeper, 2)
    held = _json(keeper.inventory())["held"]
    assert {
        rank: [(v["version"], v["epoch"], v["state"], v["world"]) for v in found] for rank, found in held.items()
    } == {
        "0": [(5, 3, "COMMITTED", 2)],
        "1": [(4, 3, "COMMITTED", 2)],
        "2": [],
    }
    stored = sum(len(piece) for piece in expected_bytes(5).values())
    assert held["0"][0]["bytes"] > stored


def test_a_version_that_is_half_written_or_has_a_damaged_manifest_is_not_offered() -> None:
    keeper = make_keeper()
    offer(writer(keeper), 4)
    offer(writer(keeper, epoch=2), 5, commit=False)
    arena = keeper._arenas[0]
    next(b for b in arena.buffers if b.describe().state is BufferState.FREE).claim(6, 2)
    assert _versions(keeper) == [5, 4]
    held = find_version(arena, 5)
    held.buffer.data[held.slot.manifest_at + 9] ^= 1
    assert _versions(keeper) == [4]


def test_verify_names_the_damaged_slices() -> None:
    keeper = make_keeper()
    offer(writer(keeper), 4)
    assert keeper.verify(0, 4) == []
    held = find_version(keeper._arenas[0], 4)
    entries = {entry.spec.name: entry for entry in held.manifest.entries}
    for name in ("counter", "embed.weight/exp_avg_codes"):
        held.data[entries[name].offset] ^= 1
    assert keeper.verify(0, 4) == ["embed.weight/exp_avg_codes", "counter"]
    assert not any(slot.is_pinned for slot in keeper._arenas[0].slots())
    with pytest.raises(InsufficientShards, match=r"version 5 is wanted, its keeper holds \[4\]"):
        keeper.verify(0, 5)


# -- between epochs ---------------------------------------------------------------------------------------------------


def test_after_a_fence_nobody_of_an_earlier_epoch_publishes_or_commits() -> None:
    keeper = make_keeper()
    old = writer(keeper, epoch=1)
    offer(old, 4)
    keeper.fence(2)
    for call in (lambda: old.offer(filled_state(5), 5), lambda: old.commit(4)):
        with pytest.raises(Abort, match="epoch 1 of rank 0 is over"):
            call()
    assert _versions(keeper) == [4]
    offer(writer(keeper, epoch=2), 5)


def test_a_fence_never_moves_back_and_holds_for_ranks_admitted_later() -> None:
    keeper = make_keeper()
    early = attach(keeper, 0)
    keeper.fence(3)
    keeper.fence(2)
    assert [early.board.fence_epoch, attach(keeper, 1).board.fence_epoch] == [3, 3]


def test_forgetting_drops_later_versions_and_what_is_half_written_at_every_rank() -> None:
    keeper = make_keeper(buffers=4)
    for rank in (0, 1):
        offer(writer(keeper, rank, world=2), 4, 5, 6, commit=False)
        next(b for b in keeper._arenas[rank].buffers if b.describe().state is BufferState.FREE).claim(3, 1)
    keeper.forget_above(5)
    keeper.forget_above(5)
    for rank in (0, 1):
        assert _versions(keeper, rank) == [5, 4]
        assert sum(slot.state is BufferState.FREE for slot in keeper._arenas[rank].slots()) == 2


def test_a_fresh_model_leaves_nothing_in_memory() -> None:
    keeper = make_keeper()
    offer(writer(keeper), 0, 4, commit=False)
    keeper.forget_above(-1)
    assert _versions(keeper) == []


def test_a_quarantined_copy_is_not_offered_again_and_nothing_else_is_touched() -> None:
    keeper = make_keeper()
    for rank in (0, 1):
        offer(writer(keeper, rank, world=2), 4, 5, commit=False)
    keeper.quarantine(0, 5)
    keeper.quarantine(0, 5)
    keeper.quarantine(0, 99)
    assert (_versions(keeper, 0), _versions(keeper, 1)) == ([4], [5, 4])


# -- killing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pid", [0, 1, -1, -77, pytest.param(os.getpid(), id="its own")])
def test_a_keeper_never_kills_itself_or_a_whole_group(pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a signal was sent"))
    with pytest.raises(InvariantViolation, match=f"asked to kill pid {pid}"):
        make_keeper().kill(pid)


def test_a_process_gets_sigkill_and_one_that_is_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = list[tuple[int, int]]()
    monkeypatch.setattr(os, "kill", lambda *call: sent.append(call))
    make_keeper().kill(4711)
    assert sent == [(4711, signal.SIGKILL)]
    monkeypatch.undo()
    make_keeper().kill(2**22 + 1)  # beyond the largest pid there can be


# -- to disk ----------------------------------------------------------------------------------------------------------


def _stored(root: Path, rank: int = 0) -> dict[str, bytes]:
    """What a checkpoint's files hold, cut up by their manifest, without a keeper."""
    manifest = Manifest.from_bytes((root / _FOLDER / checkpoint.manifest_file(rank)).read_bytes())
    data = (root / _FOLDER / checkpoint.data_file(rank)).read_bytes()
    return {e.spec.name: data[e.offset : e.offset + e.length] for e in manifest.entries}


def _commit(root: Path, *receipts: object) -> None:
    made = {rank: _json(receipt) for rank, receipt in enumerate(receipts)}
    checkpoint.commit(DirectoryStorage(root), 4, receipts=made, config_digest="cfg")


def test_a_persisted_version_has_the_bytes_of_the_state_and_a_receipt_that_can_be_committed(tmp_path: Path) -> None:
    keeper = make_keeper()
    for rank in (0, 1):
        offer(writer(keeper, rank, world=2, epoch=3), 4)
    _commit(tmp_path, *(keeper.persist(rank, 4, str(tmp_path), _FOLDER) for rank in (0, 1)))
    for rank in (0, 1):
        assert _stored(tmp_path, rank) == expected_bytes(4)
    good, rejected = checkpoint.list_checkpoints(DirectoryStorage(tmp_path))
    assert ([found.step for found in good], rejected) == ([4], ())


def test_persisting_again_because_the_answer_was_lost_changes_nothing(tmp_path: Path) -> None:
    keeper = make_keeper()
    offer(writer(keeper), 4)
    receipts = [keeper.persist(0, 4, tmp_path.as_uri(), _FOLDER) for _ in range(2)]
    assert receipts[0] == receipts[1]
    assert _stored(tmp_path) == expected_bytes(4)


def test_a_damaged_version_is_not_written(tmp_path: Path) -> None:
    keeper = make_keeper()
    offer(writer(keeper), 4)
    find_version(keeper._arenas[0], 4).data[3000] ^= 1
    with pytest.raises(ShardCorrupt, match="rank 0, version 4"):
        keeper.persist(0, 4, str(tmp_path), _FOLDER)
    assert list(tmp_path.iterdir()) == []
    assert not any(slot.is_pinned for slot in keeper._arenas[0].slots())


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def write(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", write)
        yield


def test_a_full_disk_is_an_error_that_says_so_and_the_version_stays_in_memory(tmp_path: Path, full_disk: None) -> None:
    keeper = make_keeper()
    offer(writer(keeper), 4)
    with pytest.raises(SnapshotError, match=r"no space left for [\d,]+ bytes of .*rank00000.bin"):
        keeper.persist(0, 4, str(tmp_path), _FOLDER)
    assert not any(slot.is_pinned for slot in keeper._arenas[0].slots())
    assert keeper.verify(0, 4) == []
    assert [name for _, _, names in os.walk(tmp_path) for name in names] == []


def test_the_worker_goes_on_while_a_version_is_written_and_the_bytes_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = make_keeper()
    snapshots = writer(keeper, persist_every=4)
    offer(snapshots, 4)
    writing, go_on, real = threading.Event(), threading.Event(), checkpoint.write_rank

    def slow(*args: Any, **kwargs: Any) -> Any:
        writing.set()
        assert go_on.wait(20)
        return real(*args, **kwargs)

    monkeypatch.setattr(keeper_module, "write_rank", slow)
    receipts = list[object]()
    thread = threading.Thread(target=lambda: receipts.append(keeper.persist(0, 4, str(tmp_path), _FOLDER)))
    thread.start()
    assert writing.wait(20)
    offer(snapshots, *range(5, 12))  # nothing is skipped
    go_on.set()
    thread.join(20)
    assert len(receipts) == 1
    assert _stored(tmp_path) == expected_bytes(4)
    assert not any(slot.is_pinned for slot in keeper._arenas[0].slots())


def _take_away(arena: Arena, version: int) -> None:
    """A worker that did not see the pin in time."""
    buffer = find_version(arena, version).buffer
    pins = int(buffer.describe().is_pinned)
    buffer.pin(-pins)
    assert buffer.claim(version + 2, 1)
    buffer.pin(+pins)


def test_a_version_that_is_replaced_while_it_is_written_gets_no_receipt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, real = make_keeper(), checkpoint.write_rank
    offer(writer(keeper), 4)

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        receipt = real(*args, **kwargs)
        _take_away(keeper._arenas[0], 4)
        return receipt

    monkeypatch.setattr(keeper_module, "write_rank", disturbed)
    with pytest.raises(SnapshotError, match="version 4 of rank 0 was replaced while it was written"):
        keeper.persist(0, 4, str(tmp_path), _FOLDER)
    assert not any(slot.is_pinned for slot in keeper._arenas[0].slots())


def test_a_version_that_is_replaced_between_finding_and_pinning_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = make_keeper()
    offer(writer(keeper), 4)

    def found(arena: Arena, version: int) -> Any:
        held = find_version(arena, version)
        _take_away(arena, version)
        return held

    monkeypatch.setattr(keeper_module, "find_version", found)
    with pytest.raises(SnapshotError, match="version 4 of rank 0 was replaced before it could be read"):
        keeper.persist(0, 4, str(tmp_path), _FOLDER)
    assert list(tmp_path.iterdir()) == []
    assert not any(slot.is_pinned for slot in keeper._arenas[0].slots())


# -- and back ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of step 4 by two ranks."""
    keeper = make_keeper()
    for rank in (0, 1):
        offer(writer(keeper, rank, world=2, epoch=3), 4)
    _commit(tmp_path, *(keeper.persist(rank, 4, str(tmp_path), _FOLDER) for rank in (0, 1)))
    keeper.close()
    return tmp_path


def test_a_loaded_checkpoint_is_restored_like_any_other_version(saved: Path) -> None:
    keeper = make_keeper()
    keeper.admit(1)
    assert keeper.load(1, str(saved), _FOLDER) == 4
    assert [v["state"] for v in _json(keeper.inventory())["held"]["1"]] == ["COMMITTED"]
    live = filled_state(0)
    writer(keeper, 1, world=2, epoch=9).restore_into(live, 4)
    assert bytes_of(live) == expected_bytes(4)


def test_loading_again_because_the_answer_was_lost_leaves_one_copy(saved: Path) -> None:
    keeper = make_keeper()
    keeper.admit(0)
    assert [keeper.load(0, str(saved), _FOLDER) for _ in range(3)] == [4, 4, 4]
    assert _versions(keeper) == [4]


def test_what_is_loaded_replaces_the_copy_in_memory_and_leaves_other_versions(saved: Path) -> None:
    keeper = make_keeper()
    offer(writer(keeper, world=2, epoch=3), 3, 4, commit=False)
    find_version(keeper._arenas[0], 4).data[7] ^= 1
    keeper.load(0, str(saved), _FOLDER)
    assert _versions(keeper) == [4, 3]
    assert keeper.verify(0, 4) == []


def test_even_the_newest_committed_version_makes_way_for_what_will_be_the_truth(saved: Path) -> None:
    keeper = make_keeper()
    snapshots = writer(keeper, world=2, epoch=5)
    offer(snapshots, 7, 8, commit=False)
    find_version(keeper._arenas[0], 7).buffer.pin(+1)
    snapshots.commit(8)
    offer(snapshots, 9, commit=False)
    keeper.load(0, str(saved), _FOLDER)
    assert _versions(keeper) == [9, 7, 4]


def test_with_every_buffer_being_read_nothing_is_loaded_and_nothing_is_lost(saved: Path) -> None:
    keeper = make_keeper()
    offer(writer(keeper, world=2, epoch=5), 7, 8, 9, commit=False)
    for held in held_versions(keeper._arenas[0]):
        held.buffer.pin(+1)
    with pytest.raises(SnapshotError, match="version 4 of rank 0: every buffer is being read"):
        keeper.load(0, str(saved), _FOLDER)
    assert _versions(keeper) == [9, 8, 7]


def test_a_version_that_is_being_read_is_not_overwritten_by_a_checkpoint(saved: Path) -> None:
    keeper = make_keeper()
    offer(writer(keeper, world=2, epoch=5), 7, 8, 9, commit=False)
    reading = find_version(keeper._arenas[0], 7)
    reading.buffer.pin(+1)
    keeper.load(0, str(saved), _FOLDER)
    assert reading.is_unchanged()
    assert 7 in _versions(keeper)


@pytest.mark.parametrize(
    "news", [lambda k: k.fence(4), lambda k: k.forget_above(9)], ids=["fence", "start of an epoch"]
)
def test_a_checkpoint_that_comes_after_its_time_is_not_brought_into_memory(
    saved: Path, news: Callable[[Keeper], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper, real = make_keeper(), checkpoint.read_rank
    snapshots = writer(keeper, world=2, epoch=5)
    offer(snapshots, 7, 8)

    def slow(*args: Any) -> Any:
        found = real(*args)
        news(keeper)  # meanwhile another source was chosen, and a worker fills a buffer
        assert next(b for b in keeper._arenas[0].buffers if not b.describe().is_complete).claim(9, 5)
        return found

    monkeypatch.setattr(keeper_module, "read_rank", slow)
    with pytest.raises(SnapshotError, match="step-00000004 of rank 0 comes too late: another epoch has begun"):
        keeper.load(0, str(saved), _FOLDER)
    assert _versions(keeper) == [8]
    assert [slot.version for slot in keeper._arenas[0].slots() if slot.state is BufferState.FILLING] == [9]


@pytest.mark.parametrize("name", [checkpoint.data_file(0), checkpoint.manifest_file(0)])
def test_a_damaged_file_is_refused_and_the_copy_in_memory_stays(saved: Path, name: str) -> None:
    path = saved / _FOLDER / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    keeper = make_keeper()
    offer(writer(keeper, world=2, epoch=3), 4)
    with pytest.raises(ShardCorrupt, match="rank 0, version 4"):
        keeper.load(0, str(saved), _FOLDER)
    assert keeper.verify(0, 4) == []


def test_the_state_of_another_rank_under_this_ranks_name_is_refused(tmp_path: Path) -> None:
    keeper = make_keeper()
    offer(writer(keeper, rank=1), 4)
    manifest = find_version(keeper._arenas[1], 4)
    receipt = checkpoint.write_rank(
        DirectoryStorage(tmp_path),
        _FOLDER,
        0,
        data=[manifest.data.data],
        manifest=manifest.buffer.manifest(manifest.slot),
    )
    _commit(tmp_path, receipt)
    keeper.admit(0)
    with pytest.raises(ManifestMismatch, match=f"{_FOLDER} holds the state of rank 1 under the name of rank 0"):
        keeper.load(0, str(tmp_path), _FOLDER)
    assert _versions(keeper, 0) == []


def test_a_checkpoint_that_is_not_there_or_not_committed_is_refused(saved: Path) -> None:
    keeper = make_keeper()
    keeper.admit(0)
    with pytest.raises(SnapshotError, match="step-00000099"):
        keeper.load(0, str(saved), checkpoint.directory(99))
    (saved / _FOLDER / checkpoint.COMMIT_FILE).unlink()
    with pytest.raises(SnapshotError, match=r"commit\.json"):
        keeper.load(0, str(saved), _FOLDER)


def test_a_checkpoint_larger_than_the_memory_allowed_is_refused_with_both_numbers(saved: Path) -> None:
    keeper = make_keeper(limit_bytes=20_000)
    keeper.admit(0)
    with pytest.raises(SnapshotMemory, match="rank 0 need") as refused:
        keeper.load(0, str(saved), _FOLDER)
    assert refused.value.have_bytes == 20_000
