"""Notices that a node will be taken away, and the stop within a grace: what the machine orders, and what it counts."""

from __future__ import annotations

import math

import pytest

from holdfast.events import FaultDetected, PreemptionNoticed, RecoveryDone, StopRequested
from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance.lanes import Recorded
from holdfast.fault_tolerance.machine import State
from holdfast.types import Phase
from tests.unit.fault_tolerance.test_machine import Story

_HOSTS = ("a", "b", "c")
_STEP = 7


def _story(*, has_parity: bool = True, **recovery: float) -> Story:
    return Story(spares=0, hosts=_HOSTS, has_parity=has_parity, **recovery).running(_STEP)


def _notice(node: int, within_s: float = 30.0, reason: str = "spot") -> m.NodeDraining:
    return m.NodeDraining(node, _HOSTS[node], within_s, reason)


def _moving(story: Story, *, within_s: float = 30.0) -> Story:
    """Node 1 has a notice and a new host, whose worker, number 3, has become warm."""
    story.tell(_notice(1, within_s), m.NodeMoved(1, "d"))
    return story.tell(m.WorkerReady(3, 1, 903)).all_at(_STEP)


def _all_leave(story: Story, version: int = _STEP + 1) -> Story:
    return story.tell(*[story.parked(w, m.Outcome.STOPPED, version=version) for w in range(3)])


def _recover(story: Story, version: int = _STEP + 1) -> Story:
    """From a version of which node 1 has lost its part."""
    story.processes_start()
    held = {rank: (m.HeldVersion(version, 1, 3),) for rank in (0, 2)}
    epoch, recorded = story.machine.epoch, (Recorded(version, 1, absent=(1,), bare=(1,)),)
    story.tell(m.InventoryTaken(epoch, held, (), (), recorded), m.CheckpointLoaded(epoch, version))
    return story.after(1.0).all_at(version + 1)


# -- notices ----------------------------------------------------------------------------------------------------------


def test_a_notice_is_told_once_and_what_is_finished_goes_to_disk() -> None:
    story = _story().tell(_notice(1), _notice(1))
    assert story.events(PreemptionNoticed) == [PreemptionNoticed(1, "b", 30.0, "spot")]
    assert story.of(m.Persist) == [m.Persist()]
    assert (story.machine.state, story.of(m.StopEpoch)) == (State.RUNNING, [])
    story.tell(_notice(2, math.inf))
    assert story.events(PreemptionNoticed)[-1].within_s is None


def test_the_ranks_leave_together_once_a_worker_is_warm_where_the_node_moves_to() -> None:
    story = _story().tell(_notice(1), m.NodeMoved(1, "d")).all_at(_STEP)
    assert [a.node for a in story.of(m.StartWorker)] == [0, 1, 2, 1], "beside the one that trains"
    assert not story.of(m.StopEpoch)
    story.tell(m.WorkerReady(3, 1, 903)).all_at(_STEP)
    assert story.of(m.StopEpoch) == [m.StopEpoch(1)]
    assert not story.of(m.KillWorker), "nobody goes before the step is finished"


def test_the_node_is_left_only_when_parity_holds_what_the_ranks_have_left() -> None:
    story = _all_leave(_moving(_story()))
    story.tell(m.Protected(1, _STEP))
    assert not story.of(m.KillKeeper), "that is the version before"
    story.tell(m.Protected(1, _STEP + 1))
    assert [a.node for a in story.of(m.KillKeeper)] == [1]
    assert [a.worker for a in story.of(m.KillWorker)] == [1]
    assert [a.node for a in story.ordered(m.StartKeeper)] == [1]
    assert [member.worker for member in story.machine.members] == [0, 3, 2], "the warm one has the rank"


def test_a_planned_move_is_one_preemption_no_failure_and_no_step() -> None:
    story = _recover(_all_leave(_moving(_story(max_failures=0))).tell(m.Protected(1, _STEP + 1)))
    (fault,) = story.events(FaultDetected)
    assert (fault.number, fault.ranks, fault.node, fault.is_preemption) == (1, (1,), 1, True)
    (done,) = story.events(RecoveryDone)
    assert (done.failures, done.preemptions, done.steps_lost) == (0, 1, 0)
    assert (story.machine.faults, story.machine.preemptions) == (1, 1)


def test_without_parity_the_node_is_left_only_when_its_part_is_on_disk() -> None:
    story = _all_leave(_moving(_story(has_parity=False)))
    assert len(story.of(m.Persist)) == 2, "at the notice, and for the last version"
    story.tell(m.Protected(1, _STEP + 1), m.Persisted(_STEP))
    assert not story.of(m.KillKeeper)
    story.tell(m.Persisted(_STEP + 1))
    assert [a.node for a in story.of(m.KillKeeper)] == [1]


def test_parity_that_does_not_come_is_not_waited_for_until_the_node_is_gone() -> None:
    story = _all_leave(_moving(_story())).wait(6)
    assert [a.node for a in story.of(m.KillKeeper)] == [1]


def test_a_worker_that_does_not_become_warm_is_not_waited_for_until_the_node_is_gone() -> None:
    story = _story(suspect_after_s=100.0).tell(_notice(1, 30.0), m.NodeMoved(1, "d"))
    story.wait(19, beats=dict.fromkeys(range(3), (Phase.UPDATE, _STEP)))
    assert not story.of(m.StopEpoch)
    story.wait(2, beats=dict.fromkeys(range(3), (Phase.UPDATE, _STEP)))
    assert story.of(m.StopEpoch) == [m.StopEpoch(1)]


def test_ranks_that_do_not_finish_their_step_in_time_lose_the_node_in_the_middle_of_it() -> None:
    story = _moving(_story(suspect_after_s=100.0))
    story.wait(31, beats=dict.fromkeys(range(3), (Phase.UPDATE, _STEP)))
    assert [a.node for a in story.of(m.KillKeeper)] == [1]
    assert story.events(FaultDetected)[0].is_preemption


def test_a_worker_lost_on_a_node_that_has_another_host_takes_its_keeper_along() -> None:
    """Where it starts again, the old keeper's memory is not."""
    story = _story().tell(_notice(1), m.NodeMoved(1, "d"))
    story.tell(story.killed(1))
    assert [a.node for a in story.of(m.KillKeeper)] == [1]
    assert [a.node for a in story.ordered(m.StartKeeper)] == [1]


# -- what counts ------------------------------------------------------------------------------------------------------


def test_the_end_of_a_node_without_another_host_is_a_preemption() -> None:
    story = _story(max_failures=0).tell(_notice(1))
    story.tell(story.killed(1), m.KeeperLost(1, "its host is gone"))
    assert not story.of(m.Finish)
    assert story.events(FaultDetected)[0].is_preemption
    story.survivors_leave(0, 2)
    _recover(story)
    assert (story.machine.faults, story.machine.preemptions) == (1, 1)


def test_a_preemption_wins_over_the_errors_of_those_beside_it_whoever_reports_first() -> None:
    first = _story(max_failures=1).tell(_notice(1))
    first.tell(first.parked(0, m.Outcome.ERROR, "ConnectionError: peer"), first.killed(1))
    assert (first.machine.faults, first.machine.preemptions) == (1, 1)
    later = _story(max_failures=0).tell(_notice(1))
    later.tell(later.killed(1), later.parked(0, m.Outcome.ERROR, "ConnectionError: peer"))
    assert (later.machine.faults, later.machine.preemptions) == (1, 1)
    victim = _story(max_failures=0).tell(_notice(1))
    victim.tell(victim.parked(0, m.Outcome.BROKEN, "connection closed"), victim.killed(1))
    assert (victim.machine.faults, victim.machine.preemptions) == (1, 1)


def test_what_nobody_has_announced_stays_a_failure_beside_a_notice() -> None:
    story = _story(max_failures=0).tell(_notice(1))
    story.tell(story.killed(2))
    assert (story.finish.exit_code, story.machine.preemptions) == (1, 0)
    other = _story(max_failures=0).tell(_notice(1))
    other.tell(other.parked(0, m.Outcome.BROKEN, "connection closed"), other.killed(2))
    assert (other.machine.faults, other.machine.preemptions) == (1, 0)


def test_who_replaces_a_preempted_rank_and_dies_is_a_failure() -> None:
    story = _all_leave(_moving(_story())).tell(m.Protected(1, _STEP + 1))
    story.tell(m.WorkerLost(3, "killed by SIGKILL", story.now))
    assert (story.machine.faults, story.machine.preemptions) == (2, 1)


def test_a_node_that_has_moved_is_an_ordinary_one_again() -> None:
    story = _recover(_all_leave(_moving(_story())).tell(m.Protected(1, _STEP + 1)))
    story.tell(m.WorkerLost(3, "killed by SIGKILL", story.now))
    assert (story.machine.faults, story.machine.preemptions) == (2, 1)


def test_the_preemption_after_the_last_allowed_one_ends_the_run() -> None:
    story = _recover(_all_leave(_moving(_story(max_preemptions=1))).tell(m.Protected(1, _STEP + 1)))
    story.tell(_notice(2)).tell(story.killed(2))
    assert (story.finish.outcome, story.finish.exit_code) == ("failed", 1)
    assert "recovery.max_preemptions=1 is used up: preemption 1 (rank 1)" in story.finish.reason


# -- the stop ---------------------------------------------------------------------------------------------------------


def test_a_run_all_of_whose_nodes_are_to_go_stops_while_it_can() -> None:
    story = _story(stop_grace_s=60.0).tell(_notice(0, 20.0), _notice(1), _notice(2), m.Tick())
    (asked,) = story.events(StopRequested)
    assert asked.reason == "every node will be taken away (spot), and there is no other host"
    assert story.of(m.StopEpoch) == [m.StopEpoch(1)]
    assert story.machine.stop_by_s == story.now + 20.0
    _all_leave(story)
    assert (story.finish.outcome, story.finish.exit_code) == ("stopped", 75)


def test_a_run_one_of_whose_nodes_can_move_goes_on() -> None:
    story = _story().tell(*map(_notice, range(3)), m.NodeMoved(1, "d"), m.Tick())
    assert not story.events(StopRequested)


@pytest.mark.parametrize(("is_rebuilt", "why"), [(True, "SIGTERM"), (False, "what was lost was not rebuilt in time")])
def test_a_stop_while_a_nodes_memory_is_missing_waits_until_parity_has_restored_it(is_rebuilt: bool, why: str) -> None:
    story = _story(stop_grace_s=20.0)
    story.tell(m.KeeperLost(1, "its host is gone"), story.killed(1), m.StopAsked("SIGTERM")).survivors_leave(0, 2)
    assert not story.of(m.Finish), "nothing could be saved now"
    story.processes_start()
    held, recorded = {r: (m.HeldVersion(7, 1, 3),) for r in (0, 2)}, (Recorded(7, 1, (1,), (1,)),)
    story.tell(m.InventoryTaken(2, held, (), (), recorded))
    story.after(1.0, m.CheckpointLoaded(2, 7)) if is_rebuilt else story.wait(11)
    assert (story.finish.outcome, story.finish.exit_code) == ("stopped", 75)
    assert why in story.finish.reason
    assert len(story.of(m.StartEpoch)) == 1, "nobody trains any more"
