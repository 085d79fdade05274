"""Checkpoints between real keepers and a real directory: written, committed, abandoned, refused, brought back."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from holdfast.clock import FakeClock
from holdfast.errors import SnapshotError
from holdfast.events import CheckpointRejected, CheckpointWritten, MemoryEvents
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.config import SnapshotConfig
from holdfast.fault_tolerance.keeper import Keeper
from holdfast.fault_tolerance.snapshot import ArenaSnapshotter
from holdfast.fault_tolerance.storage import DirectoryStorage
from holdfast.fault_tolerance.versions import find_version
from holdfast.launch.calls import Calls
from holdfast.launch.durable import DurableTier
from holdfast.launch.fleet import Address, Completion, Role
from holdfast.launch.pulse import Pulse
from tests.support.keepers import LocalFleet, make_keeper, offer, writer
from tests.support.snapshots import bytes_of, expected_bytes, filled_state

_WORLD = 2
_NEVER = float("inf")


class _Run:
    """Two nodes of one rank each, and the part of a driver that checkpoints need."""

    def __init__(
        self,
        root: Path,
        *,
        keep_last: int = 2,
        epoch: int = 1,
        config_digest: str = "cfg",
        persist_every_s: float = 0.0,
        persist_every: int = 2,
    ) -> None:
        self.root, self.events, self.now, self.clock = root, MemoryEvents(), 100.0, FakeClock(100.0)
        self.keepers = [make_keeper(node) for node in range(_WORLD)]
        self.ranks = self.writers(epoch, persist_every)
        self.fleet = LocalFleet.of_keepers(*self.keepers)
        self.calls = Calls(self.fleet)
        self.pulse = Pulse(self.calls, interval_s=0.0, silence_s=1e9, on_step=lambda _: None)
        self.durable = DurableTier(
            str(root),
            SnapshotConfig(keep_last=keep_last, persist_every_s=persist_every_s),
            world=_WORLD,
            config_digest=config_digest,
            events=self.events,
            clock=self.clock,
        )
        self.loaded: list[str] = []

    def writers(self, epoch: int, persist_every: int = 2) -> list[ArenaSnapshotter]:
        return [
            writer(keeper, rank, world=_WORLD, epoch=epoch, persist_every=persist_every)
            for rank, keeper in enumerate(self.keepers)
        ]

    @staticmethod
    def keeper(rank: int) -> Address:
        return Address(Role.KEEPER, rank)

    def train(self, *versions: int) -> None:
        for version in versions:
            for rank in self.ranks:
                offer(rank, version)

    def turn(self) -> None:
        """One turn of a conductor."""
        self.now += 1.0
        self.hear()
        self.pulse.ask(range(_WORLD), self.now)
        self.hear()
        self.durable.persist_if_due(self.pulse.versions, self.calls, self.keeper, deadline_s=_NEVER)

    def hear(self) -> None:
        for report in self.fleet.poll(0.0):
            assert isinstance(report, Completion)
            self.calls.complete(report)

    def turns(self, count: int = 4) -> None:
        for _ in range(count):
            self.turn()

    def settle(self) -> None:
        self.durable.persist_newest(self.calls, range(_WORLD), self.keeper, deadline_s=_NEVER)
        for _ in range(4):
            self.hear()

    def load(self, step: int, deadline_s: float = float("inf")) -> None:
        self.durable.load(
            step,
            {rank: self.keeper(rank) for rank in range(_WORLD)},
            self.calls,
            loaded=lambda: self.loaded.append("loaded"),
            refused=lambda reason: self.loaded.append(f"refused: {reason}"),
            deadline_s=deadline_s,
        )

    def written(self) -> list[int]:
        return [event.step for event in self.events.events if isinstance(event, CheckpointWritten)]

    def rejected(self) -> list[tuple[str, str]]:
        return [(e.path, e.reason) for e in self.events.events if isinstance(e, CheckpointRejected)]

    def on_disk(self) -> list[int]:
        """Steps of the good checkpoints, as anybody would find them."""
        good, _ = checkpoint.list_checkpoints(DirectoryStorage(self.root))
        return sorted(found.step for found in good)


@pytest.fixture
def run(tmp_path: Path) -> _Run:
    return _Run(tmp_path / "checkpoints")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A disk that is full as long as the list has something in it."""
    real, full = os.write, list[str]()

    def write(descriptor: int, data: Any) -> int:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    yield full
    full.clear()


# -- writing ----------------------------------------------------------------------------------------------------------


def test_a_version_that_every_rank_keeps_becomes_a_checkpoint_and_an_event(run: _Run) -> None:
    run.train(1, 2, 3)
    run.turns()
    assert run.on_disk() == [2]
    (event,) = run.events.of(CheckpointWritten)
    assert isinstance(event, CheckpointWritten)
    assert (event.step, event.path) == (2, "step-00000002")
    files = [p for p in (run.root / "step-00000002").iterdir() if p.name != checkpoint.COMMIT_FILE]
    assert event.bytes == sum(p.stat().st_size for p in files)
    assert event.seconds >= 0.0
    assert (run.durable.newest_step, run.durable.is_idle, run.rejected()) == (2, True, [])
    assert checkpoint.read_commit(DirectoryStorage(run.root), 2).config_digest == "cfg"


def test_each_version_that_is_due_is_written_once(run: _Run) -> None:
    for version in range(1, 9):
        run.train(version)
        run.turns()
    assert run.written() == [2, 4, 6, 8]
    assert run.fleet.methods().count("persist") == 4 * _WORLD


def test_only_the_newest_checkpoints_stay(run: _Run) -> None:
    for version in range(1, 9):
        run.train(version)
        run.turns()
    assert run.on_disk() == [6, 8]


def test_a_version_that_one_rank_does_not_keep_is_not_written(run: _Run) -> None:
    run.train(1)
    for version in (2, 3):
        offer(run.ranks[0], version)
    run.turns()
    assert "persist" not in run.fleet.methods()


def test_a_version_that_is_only_being_read_is_not_written(run: _Run) -> None:
    run.train(3)
    for rank, keeper in enumerate(run.keepers):
        find_version(keeper._arenas[rank], 3).buffer.pin(+1)
    run.turns()
    assert "persist" not in run.fleet.methods()


def test_copies_that_different_epochs_wrote_are_not_mixed_into_one_checkpoint(run: _Run) -> None:
    run.train(1)
    offer(run.ranks[0], 2, 3)
    run.ranks[1] = run.writers(epoch=2)[1]
    offer(run.ranks[1], 2, 3)
    run.turns()
    assert "persist" not in run.fleet.methods()
    for keeper in run.keepers:
        keeper.forget_above(1)
    run.ranks = run.writers(epoch=3)
    run.train(2, 3)
    run.turns()
    assert run.on_disk() == [2]


def test_nothing_is_written_before_every_keeper_has_told_what_it_holds(run: _Run) -> None:
    run.train(1, 2, 3)
    del run.fleet.bodies[run.keeper(1)]
    run.turns()
    assert "persist" not in run.fleet.methods()


def test_one_checkpoint_is_written_at_a_time(run: _Run) -> None:
    run.train(1, 2, 3)
    run.fleet.held_back.add("persist")
    run.turns()
    assert not run.durable.is_idle
    run.train(4, 5)
    run.turns()
    assert run.fleet.methods().count("persist") == _WORLD
    run.fleet.held_back.clear()
    run.turns()
    assert (run.durable.newest_step, run.durable.is_idle) == (4, True)


def test_the_newest_common_version_is_written_at_the_end_although_nobody_keeps_it(run: _Run) -> None:
    run.train(1, 2, 3)
    offer(run.ranks[0], 4, commit=False)
    run.settle()
    assert (run.on_disk(), run.written(), run.durable.is_idle) == ([3], [3], True)


def test_at_the_end_nothing_is_written_twice(run: _Run) -> None:
    run.train(1, 2)
    run.settle()
    run.settle()
    assert (run.written(), run.rejected(), run.durable.is_idle) == ([2], [], True)
    assert run.fleet.methods().count("persist") == _WORLD


@pytest.mark.parametrize("versions", [(), (0,)])
def test_at_the_end_of_a_run_without_a_step_nothing_is_written(run: _Run, versions: Sequence[int]) -> None:
    run.train(*versions)
    run.settle()
    assert (run.written(), run.rejected(), run.durable.is_idle) == ([], [], True)


def test_at_the_end_without_keepers_there_is_nothing_to_wait_for(run: _Run) -> None:
    run.durable.persist_newest(run.calls, [], run.keeper, deadline_s=_NEVER)
    assert run.durable.is_idle


# -- by the clock -----------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(tmp_path: Path) -> _Run:
    """No steps ask for a checkpoint, only time: after 60 seconds."""
    return _Run(tmp_path, persist_every_s=60.0, persist_every=0)


def _ready(run: _Run, *versions: int) -> None:
    run.train(*versions)
    run.turns()


def test_when_the_time_has_come_the_newest_common_version_is_written(timed: _Run) -> None:
    _ready(timed, 1, 2, 3)
    timed.clock.advance(59.9)
    timed.turns()
    assert timed.written() == []
    offer(timed.ranks[0], 4, commit=False)
    timed.clock.advance(0.2)
    timed.turns()
    assert (timed.written(), timed.on_disk(), timed.rejected()) == ([3], [3], [])


def test_the_time_counts_from_the_last_checkpoint_whatever_asked_for_it(tmp_path: Path) -> None:
    run = _Run(tmp_path, persist_every_s=60.0, persist_every=2)
    run.clock.advance(50.0)
    _ready(run, 1, 2, 3)
    assert run.written() == [2]
    run.clock.advance(59.0)
    run.turns()
    assert run.written() == [2]
    run.clock.advance(2.0)
    run.turns()
    assert run.written() == [2, 3]


def test_without_a_new_step_nothing_is_written_again(timed: _Run) -> None:
    _ready(timed, 1, 2)
    for _ in range(5):
        timed.clock.advance(61.0)
        timed.turns()
    assert (timed.written(), timed.rejected()) == ([2], [])


def test_without_an_interval_time_asks_for_nothing(tmp_path: Path) -> None:
    run = _Run(tmp_path, persist_every=0)
    _ready(run, 1, 2, 3)
    run.clock.advance(1e9)
    run.turns()
    assert "persist" not in run.fleet.methods()


def test_a_version_that_was_replaced_meanwhile_is_an_event_and_the_next_try_comes_soon(timed: _Run) -> None:
    _ready(timed, 1, 2)
    timed.clock.advance(60.0)
    timed.fleet.held_back.add("persist")
    timed.turns()
    timed.train(3, 4, 5, 6)
    timed.fleet.held_back.clear()
    timed.turns(2)
    assert (timed.written(), len(timed.rejected()), timed.durable.is_idle) == ([], 1, True)
    timed.clock.advance(6.1)
    timed.turns()
    assert timed.written() == [6]


def test_what_a_fault_has_abandoned_is_due_at_once(timed: _Run) -> None:
    _ready(timed, 1, 2)
    timed.clock.advance(60.0)
    timed.fleet.held_back.add("persist")
    timed.turns()
    timed.durable.abandon()
    timed.fleet.held_back.clear()
    timed.turns()
    assert timed.written() == [2]


# -- what goes wrong is an event --------------------------------------------------------------------------------------


def test_a_full_disk_is_one_event_until_the_next_version_is_due(run: _Run, disk: list[str]) -> None:
    run.train(1, 2, 3)
    disk.append("full")
    run.turns(10)
    ((path, reason),) = run.rejected()
    assert path == "step-00000002"
    assert reason.startswith("SnapshotError: no space left for")
    assert (run.durable.is_idle, run.durable.newest_step, run.on_disk()) == (True, -1, [])
    disk.clear()
    run.train(4, 5)
    run.turns()
    assert (run.on_disk(), run.written()) == ([4], [4])


def test_a_checkpoint_that_failed_is_tried_again_at_the_end(run: _Run, disk: list[str]) -> None:
    run.train(1, 2)
    disk.append("full")
    run.turns()
    disk.clear()
    run.settle()
    assert (run.on_disk(), run.durable.newest_step) == ([2], 2)


def test_a_disk_that_is_full_only_for_the_commit_record_is_an_event(
    run: _Run, disk: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    run.train(1, 2, 3)
    run.fleet.held_back.add("persist")
    run.turns()
    run.fleet.held_back.clear()
    answers = run.fleet.poll(0.0)
    disk.append("full")
    with caplog.at_level(logging.WARNING):
        for answer in answers:
            assert isinstance(answer, Completion)
            run.calls.complete(answer)
    ((path, reason),) = run.rejected()
    assert (path, run.written(), run.durable.is_idle) == ("step-00000002", [], True)
    assert "no space left" in reason
    assert "checkpoint of step 2 was not written: no space left" in caplog.text


def test_a_checkpoint_is_written_although_old_ones_cannot_be_removed(
    run: _Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise SnapshotError("cannot delete step-00000001: Input/output error")

    monkeypatch.setattr(checkpoint, "retain", fails)
    run.train(1, 2, 3)
    with caplog.at_level(logging.WARNING):
        run.turns()
    assert (run.written(), run.rejected(), run.durable.newest_step) == ([2], [], 2)
    assert "Input/output error" in caplog.text
    assert run.fleet.methods().count("persist") == _WORLD


def test_damaged_bytes_are_an_event_and_nothing_is_committed(run: _Run) -> None:
    run.train(1, 2, 3)
    find_version(run.keepers[1]._arenas[1], 2).data[100] ^= 1
    run.turns()
    ((path, reason),) = run.rejected()
    assert (path, run.on_disk()) == ("step-00000002", [])
    assert reason.startswith("ShardCorrupt: slice 'embed.weight/master' of rank 1, version 2")
    assert "\n" not in reason


def test_a_keeper_that_is_lost_while_it_writes_is_an_event(run: _Run) -> None:
    run.train(1, 2, 3)
    run.fleet.held_back.add("persist")
    run.turns()
    run.calls.forget(run.keeper(1), "killed")
    assert run.rejected() == [("step-00000002", "process lost: killed")]
    run.fleet.held_back.clear()
    run.hear()
    assert (run.durable.is_idle, run.on_disk()) == (True, [])


@pytest.mark.parametrize("method", ["persist", "inventory"])
def test_storage_that_does_not_answer_is_not_waited_for(run: _Run, method: str) -> None:
    run.train(1, 2)
    run.fleet.held_back.add(method)
    run.durable.persist_newest(run.calls, range(_WORLD), run.keeper, deadline_s=10.0)
    run.hear()
    run.calls.expire(9.9)
    assert not run.durable.is_idle
    run.calls.expire(10.1)
    assert run.durable.is_idle
    ((_, reason),) = run.rejected()
    assert reason == "no answer before the deadline"


def test_what_is_given_up_is_an_event_and_is_not_committed_after_all(run: _Run) -> None:
    run.train(1, 2)
    run.fleet.held_back.add("persist")
    run.settle()
    run.durable.give_up("nobody waits any longer")
    run.durable.give_up("twice")
    run.fleet.held_back.clear()
    run.hear()
    assert run.rejected() == [("step-00000002", "nobody waits any longer")]
    assert run.on_disk() == []


def test_an_inventory_that_fails_at_the_end_is_an_event(run: _Run) -> None:
    run.train(1, 2)
    run.fleet.held_back.add("inventory")
    run.durable.persist_newest(run.calls, range(_WORLD), run.keeper, deadline_s=_NEVER)
    run.calls.forget(run.keeper(0), "killed")
    assert run.rejected() == [("newest", "process lost: killed")]
    assert run.durable.is_idle


# -- a fault abandons what is being written ---------------------------------------------------------------------------


def test_what_was_abandoned_is_not_committed_when_its_answers_come_after_all(run: _Run) -> None:
    run.train(1, 2, 3)
    run.fleet.held_back.add("persist")
    run.turns()
    run.durable.abandon()
    assert run.durable.is_idle
    run.fleet.held_back.clear()
    run.hear()
    assert (run.on_disk(), run.written(), run.rejected()) == ([], [], [])


def test_late_errors_of_what_was_abandoned_do_not_disturb_the_next_checkpoint(run: _Run, disk: list[str]) -> None:
    run.train(1, 2, 3)
    run.fleet.held_back.add("persist")
    run.turns()
    run.durable.abandon()
    late = list(run.fleet._open)
    run.durable.persist_if_due(run.pulse.versions, run.calls, run.keeper, deadline_s=_NEVER)
    for sent in late:
        run.calls.complete(Completion(sent.number, sent.target, error="SnapshotError: late"))
    assert not run.durable.is_idle
    run.fleet.held_back.clear()
    run.turns()
    assert (run.on_disk(), run.rejected()) == ([2], [])


def test_after_an_abandoned_write_the_version_is_written_if_it_is_still_kept(run: _Run) -> None:
    run.train(1, 2, 3)
    run.fleet.held_back.add("persist")
    run.turns()
    run.durable.abandon()
    run.fleet.held_back.clear()
    run.turns()
    assert (run.on_disk(), run.written()) == ([2], [2])


def test_after_a_fault_what_failed_before_it_is_tried_again(run: _Run) -> None:
    run.train(1, 2, 3)
    run.fleet.held_back.add("persist")
    run.turns()
    run.calls.forget(run.keeper(1), "killed")  # the keeper is lost, and its successor gets the versions from the worker
    run.durable.abandon()
    run.fleet.held_back.clear()
    run.turns()
    assert (run.on_disk(), run.written()) == ([2], [2])


def test_a_last_write_that_was_abandoned_before_it_began_does_not_begin(run: _Run) -> None:
    run.train(1, 3)
    run.fleet.held_back.add("inventory")
    run.durable.persist_newest(run.calls, range(_WORLD), run.keeper, deadline_s=_NEVER)
    run.durable.abandon()
    run.fleet.held_back.clear()
    run.hear()
    run.hear()
    assert (run.durable.is_idle, run.on_disk()) == (True, [])
    assert "persist" not in run.fleet.methods()


def test_a_late_failure_of_an_abandoned_inventory_does_not_end_the_next_write(run: _Run) -> None:
    run.train(1, 2, 3)
    run.fleet.held_back |= {"inventory", "persist"}
    run.durable.persist_newest(run.calls, range(_WORLD), run.keeper, deadline_s=_NEVER)
    run.durable.abandon()
    inventory = run.fleet.sent[0]
    run.turns()
    assert not run.durable.is_idle
    run.calls.complete(Completion(inventory.number, inventory.target, error="SnapshotError: late"))
    assert not run.durable.is_idle
    run.fleet.held_back.clear()
    run.turns()
    assert (run.on_disk(), run.rejected()) == ([2], [])


def test_what_a_killed_writer_left_behind_is_gone_after_the_next_checkpoint(run: _Run) -> None:
    checkpoint.write_rank(DirectoryStorage(run.root), "step-00000001", 0, data=[b"x"], manifest=b"m")
    run.train(1, 2, 3)
    run.turns()
    assert {p.name for p in run.root.iterdir()} == {"step-00000002", "LATEST"}


def test_what_an_interrupted_write_left_behind_does_not_take_the_room_of_the_next(run: _Run) -> None:
    run.train(1, 2)
    run.turn()
    run.durable.give_up("interrupted")
    run.hear()
    assert [path.name for path in run.root.iterdir()] == ["step-00000002"]
    run.fleet.held_back.add("persist")
    run.train(3, 4)
    run.settle()
    assert list(run.root.iterdir()) == []


def test_files_that_were_never_finished_are_gone_when_the_next_driver_begins(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.train(1, 2)
    run.settle()
    torn = tmp_path / "step-00000002" / "rank00000.bin.tmp-0123456789ab"
    torn.write_bytes(b"half")
    _Run(tmp_path)
    assert not torn.exists()
    assert run.on_disk() == [2]


# -- what is there ----------------------------------------------------------------------------------------------------


def _checkpoint(root: Path, step: int, *, world: int = _WORLD, config_digest: str = "cfg", layout: str = "") -> None:
    storage, folder = DirectoryStorage(root), checkpoint.directory(step)
    receipts: dict[int, Mapping[str, Any]] = {
        rank: checkpoint.write_rank(storage, folder, rank, data=[b"data"], manifest=b"manifest")
        for rank in range(world)
    }
    checkpoint.commit(storage, step, receipts=receipts, config_digest=config_digest, layout=layout)


def test_the_survey_of_an_empty_directory_finds_nothing(run: _Run) -> None:
    assert run.durable.survey() == ((), ())
    assert run.durable.newest_step == -1


def test_the_survey_lists_good_ones_newest_first_and_others_with_a_reason(run: _Run) -> None:
    for step in (5, 20, 10):
        _checkpoint(run.root, step)
    _checkpoint(run.root, 30, world=3)
    _checkpoint(run.root, 40, config_digest="other")
    _checkpoint(run.root, 50)
    (run.root / "step-00000050" / "rank00001.bin").write_bytes(b"d")
    _checkpoint(run.root, 60)
    checkpoint.quarantine(DirectoryStorage(run.root), 60, "a digest did not match")
    good, reasons = run.durable.survey()
    assert good == (30, 20, 10, 5)
    assert run.durable.foreign == (30,)
    assert run.durable.newest_step == 30
    assert dict(reason.split(": ", 1) for reason in reasons) == {
        "step-00000040": "written with another model, data, optimizer or precision",
        "step-00000050": "step-00000050/rank00001.bin has 1 bytes, 4 were written",
        "rejected-step-00000060": "a digest did not match",
    }
    assert run.rejected() == [(name, why) for name, _, why in (reason.partition(": ") for reason in reasons)]


def test_a_checkpoint_of_other_ranks_or_of_another_or_an_unknown_layout_is_foreign(run: _Run) -> None:
    mine = DurableTier(
        str(run.root), SnapshotConfig(), world=_WORLD, config_digest="cfg", events=run.events, layout="2 ranks, ZeRO"
    )
    layouts = {10: (2, "2 ranks, ZeRO"), 20: (3, "3 ranks, ZeRO"), 30: (2, "2 ranks, flat"), 40: (2, "")}
    for step, (world, layout) in layouts.items():
        _checkpoint(run.root, step, world=world, layout=layout)
    assert mine.survey() == ((40, 30, 20, 10), ())
    assert mine.foreign == (40, 30, 20)


def test_a_condemned_checkpoint_is_put_aside_when_nobody_can_be_reading_it_any_more(run: _Run) -> None:
    for step in (10, 20, 30):
        _checkpoint(run.root, step, world=3)
    run.durable.survey()
    run.durable.condemn(30, "ShardCorrupt: a digest differs")
    run.durable.condemn(20, "SnapshotError: cannot read")
    assert run.on_disk() == [10, 20, 30]
    good, refused = run.durable.survey()
    assert good == run.durable.foreign == (20, 10)  # what cannot be read today may be read tomorrow
    assert refused == ("rejected-step-00000030: ShardCorrupt: a digest differs",)
    assert run.on_disk() == [10, 20]
    assert ("step-00000020", "SnapshotError: cannot read") in run.rejected()


def test_a_reason_is_told_once(run: _Run) -> None:
    _checkpoint(run.root, 30, config_digest="another")
    run.durable.survey()
    _checkpoint(run.root, 40, config_digest="other")
    assert len(run.durable.survey()[1]) == 2
    assert [path for path, _ in run.rejected()] == ["step-00000030", "step-00000040"]


def test_a_directory_that_cannot_be_listed_is_a_reason_and_not_the_end(tmp_path: Path) -> None:
    run = _Run(tmp_path / "checkpoints")
    run.root.write_bytes(b"a file where the directory was")
    good, (reason,) = run.durable.survey()
    assert good == ()
    assert "cannot list" in reason
    assert len(run.rejected()) == 1


def test_after_a_survey_nothing_is_written_that_is_there_already(tmp_path: Path) -> None:
    first = _Run(tmp_path)
    first.train(1, 2)
    first.settle()
    second = _Run(tmp_path)
    second.durable.survey()
    second.train(1, 2, 3)
    second.turns()
    assert "persist" not in second.fleet.methods()
    second.train(4, 5)
    second.turns()
    assert second.on_disk() == [2, 4]


# -- bringing it back -------------------------------------------------------------------------------------------------


@pytest.fixture
def resumed(tmp_path: Path) -> _Run:
    """A new driver with new keepers over the checkpoint of step 2."""
    first = _Run(tmp_path)
    first.train(1, 2)
    first.settle()
    return _Run(tmp_path, epoch=7)


def _restored(run: _Run, rank: int) -> dict[str, bytes]:
    live = filled_state(0)
    run.ranks[rank].restore_into(live, 2)
    return bytes_of(live)


def test_a_checkpoint_comes_back_to_the_bit_at_every_rank(resumed: _Run) -> None:
    resumed.load(2)
    resumed.hear()
    assert resumed.loaded == ["loaded"]
    assert [_restored(resumed, rank) for rank in range(_WORLD)] == [expected_bytes(2)] * _WORLD


def test_it_is_loaded_only_when_every_rank_has_it(resumed: _Run) -> None:
    body = resumed.fleet.bodies.pop(resumed.keeper(1))
    resumed.load(2)
    resumed.hear()
    assert resumed.loaded == []
    resumed.fleet.bodies[resumed.keeper(1)] = body
    resumed.hear()
    assert resumed.loaded == ["loaded"]


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("rank", range(_WORLD))
def test_a_damaged_file_is_refused_once_whoever_finds_it(resumed: _Run, rank: int) -> None:
    _flip_a_byte(resumed.root / "step-00000002" / checkpoint.data_file(rank))
    resumed.load(2)
    resumed.hear()
    (said,) = resumed.loaded
    assert said.startswith("refused: ShardCorrupt: slice 'embed.weight/master' of rank")
    assert "\n" not in said
    ((path, reason),) = resumed.rejected()
    assert (path, f"refused: {reason}") == ("step-00000002", said)


def test_a_damaged_checkpoint_is_put_aside_and_one_of_the_same_step_can_be_written(resumed: _Run) -> None:
    resumed.durable.survey()
    _flip_a_byte(resumed.root / "step-00000002" / checkpoint.data_file(1))
    resumed.load(2)
    resumed.hear()
    assert resumed.durable.newest_step == -1
    resumed.train(1, 2)
    resumed.settle()
    assert resumed.written() == [2]
    assert resumed.on_disk() == [2]
    aside = resumed.root / "rejected-step-00000002"
    assert (aside / checkpoint.data_file(1)).exists()
    assert (aside / "reason.txt").read_text().startswith("ShardCorrupt: ")
    resumed.durable.survey()
    assert len(resumed.rejected()) == 1  # told before under its old name


def test_a_checkpoint_that_lacks_a_file_gives_way_to_a_new_one_of_the_same_step(resumed: _Run) -> None:
    (resumed.root / "step-00000002" / checkpoint.manifest_file(0)).unlink()
    good, rejected = resumed.durable.survey()
    assert (good, len(rejected)) == ((), 1)
    assert (resumed.root / "step-00000002").exists()  # it may come back, and it is not in the way yet
    resumed.train(1, 2)
    resumed.settle()
    assert resumed.written() == [2]
    assert (resumed.root / "rejected-step-00000002" / checkpoint.COMMIT_FILE).exists()


def test_a_checkpoint_that_cannot_be_read_now_is_refused_and_stays(
    resumed: _Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(self: DirectoryStorage, path: str) -> bytes:
        raise SnapshotError(f"cannot read {path}: Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(DirectoryStorage, "read", unreadable)
        resumed.load(2)
        resumed.hear()
    assert resumed.loaded[0].startswith("refused: SnapshotError: cannot read")
    assert resumed.durable.survey() == ((2,), ())


def test_a_keeper_that_does_not_answer_in_time_refuses_and_late_answers_change_nothing(resumed: _Run) -> None:
    resumed.fleet.held_back.add("load")
    resumed.load(2, deadline_s=10.0)
    resumed.calls.expire(10.1)
    resumed.fleet.held_back.clear()
    resumed.hear()
    assert resumed.loaded == ["refused: no answer before the deadline"]


def test_a_keeper_that_is_lost_is_no_reason_against_the_checkpoint(resumed: _Run) -> None:
    resumed.fleet.held_back.add("load")
    resumed.load(2)
    resumed.calls.forget(resumed.keeper(0), "killed")
    resumed.fleet.held_back.clear()
    resumed.hear()
    assert resumed.loaded == []
    assert resumed.rejected() == []
    assert resumed.durable.survey() == ((2,), ())


def test_a_keeper_without_memory_of_the_rank_refuses(resumed: _Run) -> None:
    resumed.fleet.bodies[resumed.keeper(0)] = Keeper(
        0, "r", limit_bytes=0, buffers=3, lease_s=1.0, clock=resumed.keepers[0]._clock
    )
    resumed.load(2)
    resumed.hear()
    (said,) = resumed.loaded
    assert said.startswith("refused: InvariantViolation: rank 0 is not admitted on node 0")
