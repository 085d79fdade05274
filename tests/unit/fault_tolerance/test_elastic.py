"""Fewer nodes and more again, one story at a time: what happened, and what the recovery machine ordered."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from holdfast.events import FaultDetected, Protection, RecoveryDone, RecoveryPlanned, Waiting, WorldChanged
from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance.config import RecoveryConfig
from holdfast.fault_tolerance.lanes import Recorded, make_lanes
from holdfast.fault_tolerance.machine import Layout, State, Supervisor
from holdfast.fault_tolerance.protection import FULL, REDUCED
from holdfast.types import Phase
from tests.unit.fault_tolerance.test_machine import Story


class _Elastic(Story):
    """Three nodes of one rank; a node that is gone for ten seconds is done without, and tried again each minute."""

    def __init__(self, *, spares: int = 0, batch_parts: int = 0, **recovery: float) -> None:
        super().__init__(spares=spares)
        config = RecoveryConfig(**{"shrink_after_s": 10.0, **recovery})  # type: ignore[arg-type]  # as its fields
        layout = Layout(3, 1, spares, ("a", "a", "a"), make_lanes([range(3)], 1, 1), parity=1, batch_parts=batch_parts)
        self.machine = Supervisor(layout, config, now=self.now)
        self.last = self.machine.start(self.now)
        self.actions = list(self.last)
        self.running(step=7)

    def lose_node(self, node: int, *leaving: int) -> _Elastic:
        """Its keeper and its worker die; the others leave the epoch."""
        worker = next(mb.worker for mb in self.machine.members if mb.node == node)
        self.tell(m.KeeperLost(node, "its host is gone"), self.killed(worker))
        self.survivors_leave(*leaving)
        return self

    def start_fails(self, node: int) -> _Elastic:
        worker = self.of(m.StartWorker)[-1].worker
        self.tell(m.KeeperLost(node, "no such host"), m.WorkerLost(worker, "no such host", self.now))
        return self

    def node_starts(self, node: int) -> _Elastic:
        worker = [a.worker for a in self.of(m.StartWorker) if a.node == node][-1]
        self.tell(m.KeeperReady(node), m.WorkerReady(worker, node, 900 + worker))
        return self

    def shrunk(self) -> _Elastic:
        """Node 1 is gone for good; the other two train from version 7, and it is protected."""
        self.lose_node(1, 0, 2).wait(11)
        self.former(Recorded(7, 1, absent=(1,), bare=(1,)))
        self.tell(m.CheckpointLoaded(self.machine.epoch, 7))
        self.all_at(8).tell(m.Protected(self.machine.epoch, 8))
        return self

    def former(self, *found: Recorded, durable: Sequence[int] = ()) -> _Elastic:
        self.tell(m.InventoryTaken(self.machine.epoch, {}, tuple(durable), foreign=tuple(durable), former=found))
        return self

    def worlds(self) -> list[tuple[int, int]]:
        return [(event.world_before, event.world) for event in self.events(WorldChanged)]


def test_a_node_that_does_not_come_back_is_done_without() -> None:
    story = _Elastic().lose_node(1, 0, 2)
    story.wait(9.5)
    assert not story.events(WorldChanged)
    story.wait(1.0)
    assert story.events(WorldChanged) == [WorldChanged(2, 3, 2, "node(s) 1 are not ready after 10 s")]
    (_, again) = story.of(m.TakeInventory)
    assert again.members == (m.Member(0, 0, 0), m.Member(1, 2, 2))
    assert (again.roster.number, again.roster.nodes, again.roster.world) == (1, (0, 2), 2)
    assert [lane.ranks for lane in again.roster.lanes] == [(0, 1)]
    assert story.machine.nodes == (0, 2)


def test_the_state_comes_from_memory_after_parity_has_made_it_whole() -> None:
    story = _Elastic().lose_node(1, 0, 2)
    story.wait(11)
    left = Recorded(7, 1, absent=(1,), bare=(1,))
    story.former(left, durable=(5,))
    assert story.of(m.Rebuild) == [m.Rebuild(2, 7, 1, (1,))]
    story.tell(m.CheckpointLoaded(2, 7))
    (_, start) = story.of(m.StartEpoch)
    assert (start.version, start.former, start.from_storage, len(start.members)) == (7, left, False, 2)
    (plan,) = story.events(RecoveryPlanned)
    assert (plan.number, plan.source, plan.version) == (1, "parity", 7)
    story.after(1.0).all_at(8)
    (done,) = story.events(RecoveryDone)
    assert (done.steps_lost, done.failures) == (0, 1)


def test_what_memory_cannot_give_comes_from_the_checkpoint() -> None:
    story = _Elastic().lose_node(1, 0, 2)
    story.wait(11)
    story.former(Recorded(7, 1, absent=(0, 1), bare=(0, 1)), durable=(5,))
    (_, start) = story.of(m.StartEpoch)
    assert (start.version, start.former, start.from_storage) == (5, None, True)
    assert any("2 of ranks [0, 1, 2] are lost" in reason for reason in story.events(RecoveryPlanned)[0].rejected)


def test_what_a_rank_finds_damaged_is_not_offered_again() -> None:
    story = _Elastic().lose_node(1, 0, 2)
    story.wait(11)
    whole = Recorded(7, 1)
    story.former(whole, durable=(5,)).tell(story.parked(0, m.Outcome.CORRUPT, "a digest differs", version=7))
    story.survivors_leave(2)
    story.former(whole, durable=(5,))
    assert [start.version for start in story.of(m.StartEpoch)] == [-1, 7, 5]


def test_starts_that_fail_meanwhile_belong_to_the_loss_and_are_not_repeated_without_a_pause() -> None:
    story = _Elastic(max_failures=1).lose_node(1, 0, 2)
    started = []
    for _ in range(40):
        before = len(story.of(m.StartKeeper))
        story.wait(0.25)
        if len(story.of(m.StartKeeper)) > before or not started:
            started.append(story.now)
            story.start_fails(1)
    assert 3 <= len(started) <= 6
    assert story.machine.faults == 1
    story.wait(2)
    assert story.worlds() == [(3, 2)]


def test_ranks_that_could_not_share_the_batch_wait_and_say_why() -> None:
    story = _Elastic(batch_parts=3, min_nodes=2, max_failures=3).lose_node(1, 0, 2)
    story.wait(11)
    assert not story.events(WorldChanged)
    (refusal,) = [event.what for event in story.events(Waiting) if "cannot go on" in event.what]
    assert "node(s) 1 are not ready after 10 s, and the run cannot go on with the other 2" in refusal
    assert "recovery.min_nodes=2" in refusal and "3 micro-batches" in refusal
    for _ in range(8):  # each try is paid for from now on
        if not story.of(m.Finish):
            story.start_fails(1).wait(61)
    assert (story.finish.outcome, story.finish.exit_code) == ("failed", 1)


def test_as_many_nodes_go_on_as_can_share_the_batch() -> None:
    story = _Elastic(batch_parts=3).lose_node(1, 0, 2)
    story.wait(11)
    assert story.worlds() == [(3, 1)]
    assert story.machine.nodes == (0,)
    assert not story.of(m.KillWorker)[1:], "who is left over waits for a better time"


def test_without_the_option_a_node_is_waited_for() -> None:
    story = _Elastic(shrink_after_s=0.0).lose_node(1, 0, 2)
    story.wait(170)
    assert not story.events(WorldChanged)
    assert story.machine.nodes == (0, 1, 2)


def test_a_first_start_takes_as_long_as_it_takes_unless_it_fails() -> None:
    layout = Layout(2, 1, 0, ("a", "b"))
    machine = Supervisor(layout, RecoveryConfig(shrink_after_s=10.0), now=0.0)
    machine.start(0.0)
    machine.handle(m.KeeperReady(0), 1.0)
    machine.handle(m.WorkerReady(0, 0, 900), 1.0)
    for second in range(2, 60):
        machine.handle(m.Tick(), float(second))
    assert machine.nodes == (0, 1)
    machine.handle(m.KeeperLost(1, "no such host"), 60.0)
    for second in range(61, 75):
        machine.handle(m.Tick(), float(second))
    assert machine.nodes == (0,)


def test_a_node_that_is_back_is_taken_in_at_a_step_boundary() -> None:
    story = _Elastic().shrunk()
    story.wait(61, beats={0: (Phase.VOTE, 9), 1: (Phase.VOTE, 9)})
    epoch = story.machine.epoch
    story.node_starts(1)
    assert story.ordered(m.StopEpoch) == [m.StopEpoch(epoch)]
    assert not story.ordered(m.AbortWorker)
    assert story.machine.state is State.RESTARTING
    story.tell(*[m.WorkerParked(w, epoch, m.Outcome.STOPPED, version=9) for w in (0, 2)])
    assert story.worlds() == [(3, 2), (2, 3)]
    taken = story.of(m.TakeInventory)[-1]
    assert [(mb.rank, mb.node) for mb in taken.members] == [(0, 0), (1, 1), (2, 2)]
    assert taken.roster.number == 2
    story.former(Recorded(9, epoch, roster=1))
    start = story.of(m.StartEpoch)[-1]
    assert (start.version, start.former, len(start.members)) == (9, Recorded(9, epoch, roster=1), 3)
    assert story.events(RecoveryPlanned)[-1].number == -1
    assert story.machine.faults == 1
    story.all_at(10).tell(m.Protected(story.machine.epoch, 10)).all_at(11)
    assert [p.level for p in story.events(Protection)][-1] == FULL


def test_growth_waits_until_a_version_of_the_epoch_is_protected() -> None:
    story = _Elastic().lose_node(1, 0, 2)
    story.wait(11)
    story.former(Recorded(7, 1))
    story.node_starts(1).all_at(8)
    assert not story.of(m.StopEpoch)
    story.tell(m.Protected(story.machine.epoch, 8))
    assert len(story.of(m.StopEpoch)) == 1


def test_a_missing_node_is_tried_again_now_and_then_and_its_failures_cost_nothing() -> None:
    story = _Elastic(max_failures=1, retry_node_s=60.0).shrunk()
    before = len(story.of(m.StartKeeper))
    for _ in range(4):
        story.start_fails(1).wait(60, beats={0: (Phase.VOTE, 9), 1: (Phase.VOTE, 9)})
    assert 3 <= len(story.of(m.StartKeeper)) - before <= 4
    assert story.machine.faults == 1
    assert story.machine.state is State.RUNNING
    assert [p.level for p in story.events(Protection)][-1] == REDUCED
    assert "without node(s) 1" in story.events(Protection)[-1].reason


def test_a_loss_while_the_ranks_leave_for_growth_is_an_ordinary_fault() -> None:
    story = _Elastic().shrunk().node_starts(1)
    assert len(story.of(m.StopEpoch)) == 1
    story.tell(story.killed(2))
    assert story.machine.faults == 2
    assert story.worlds() == [(3, 2)]
    assert story.machine.nodes == (0, 2)
    assert len(story.events(FaultDetected)) == 2


def test_a_stop_while_the_ranks_leave_for_growth_is_a_stop() -> None:
    story = _Elastic().shrunk().node_starts(1)
    epoch = story.machine.epoch
    story.tell(m.StopAsked("SIGTERM"))
    story.tell(*[m.WorkerParked(w, epoch, m.Outcome.STOPPED, version=9) for w in (0, 2)])
    assert (story.finish.outcome, story.finish.reason) == ("stopped", "SIGTERM")


def test_ranks_that_reach_the_goal_instead_of_leaving_finish_the_run() -> None:
    story = _Elastic().shrunk().node_starts(1)
    epoch = story.machine.epoch
    story.tell(*[m.WorkerParked(w, epoch, m.Outcome.FINISHED, version=9) for w in (0, 2)])
    assert story.finish.outcome == "finished"


def test_ranks_that_do_not_leave_in_time_are_made_to() -> None:
    story = _Elastic(stop_grace_s=5.0).shrunk().node_starts(1)
    story.wait(6, beats={0: (Phase.VOTE, 9), 1: (Phase.VOTE, 9)})
    assert [a.worker for a in story.ordered(m.AbortWorker)] == [0, 2]
    assert story.worlds() == [(3, 2), (2, 3)]


def test_a_lost_keeper_that_was_asked_although_its_node_takes_no_part_is_not_waited_for() -> None:
    story = _Elastic().lose_node(1, 0, 2)
    story.wait(11)
    story.node_starts(1).tell(m.KeeperLost(1, "gone again"))
    assert [a.epoch for a in story.of(m.TakeInventory)] == [1, 2, 2]
    assert story.machine.faults == 1


@pytest.mark.parametrize("late", [False, True])
def test_a_node_that_comes_back_before_its_time_is_up_changes_nothing(late: bool) -> None:
    story = _Elastic().lose_node(1, 0, 2)
    story.wait(12 if late else 5)
    story.node_starts(1)
    assert story.worlds() == ([(3, 2)] if late else [])
