"""The recovery machine, one story at a time: what happened, and what it ordered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import pytest

from holdfast.errors import ConfigurationError, InvariantViolation
from holdfast.events import (
    EpochStarted,
    Event,
    FaultDetected,
    Protection,
    RecoveryDone,
    RecoveryPlanned,
    StopRequested,
    Waiting,
)
from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance.config import RecoveryConfig
from holdfast.fault_tolerance.lanes import Recorded, make_lanes
from holdfast.fault_tolerance.machine import Layout, State, Supervisor
from holdfast.fault_tolerance.policy import PARITY
from holdfast.fault_tolerance.protection import FULL, REDUCED
from holdfast.types import Phase

_A = TypeVar("_A", bound=m.Action)
_E = TypeVar("_E", bound=Event)


class Story:
    """Three ranks, one per node, worker i in seat i; worker 3 is the spare. Time moves only by ``after``."""

    def __init__(
        self, *, spares: int = 1, hosts: Sequence[str] = ("a", "a", "a"), has_parity: bool = False, **recovery: float
    ) -> None:
        self.now = 50.0
        config = RecoveryConfig(**recovery)  # type: ignore[arg-type]  # each test names the few it changes
        lanes = make_lanes([range(len(hosts))], 1, 1) if has_parity else ()
        self.machine = Supervisor(Layout(len(hosts), 1, spares, tuple(hosts), lanes), config, now=self.now)
        self.actions: list[m.Action] = []
        self.last: list[m.Action] = self.machine.start(self.now)
        self.actions += self.last
        self.held: dict[int, tuple[m.HeldVersion, ...]] = {}

    # -- telling --------------------------------------------------------------------------------------------------

    def tell(self, *messages: m.Message) -> Story:
        self.last = [action for message in messages for action in self.machine.handle(message, self.now)]
        self.actions += self.last
        return self

    def after(self, seconds: float, *messages: m.Message) -> Story:
        self.now += seconds
        return self.tell(*messages)

    def wait(self, seconds: float, *, beats: Mapping[int, tuple[Phase, int]] | None = None) -> Story:
        """Let time pass in small ticks; the ranks in ``beats`` go on beating in their phase and step."""
        end_s, moved_s, seen = self.now + seconds, self.now, []
        while self.now < end_s and not self.of(m.Finish):
            self.now += 0.25
            if beats is not None:
                self.tell(self.beats(beats, moved_s=moved_s))
                seen += self.last
            self.tell(m.Tick())
            seen += self.last
        self.last = seen
        return self

    def beats(self, places: Mapping[int, tuple[Phase, int]], *, moved_s: float | None = None) -> m.Beats:
        """Fresh signs of life by rank."""
        moved_s = self.now if moved_s is None else moved_s
        workers = {member.rank: member.worker for member in self.machine.members}
        return m.Beats(
            {
                workers[rank]: m.BeatSeen(rank, self.machine.epoch, phase, step, self.now, moved_s)
                for rank, (phase, step) in places.items()
            }
        )

    def processes_start(self) -> Story:
        nodes = [a.node for a in self.of(m.StartKeeper)]
        workers = [(a.worker, a.node) for a in self.of(m.StartWorker)]
        return self.tell(
            *[m.KeeperReady(node) for node in nodes], *[m.WorkerReady(w, node, 900 + w) for w, node in workers]
        )

    def inventory(self, *versions: int, writer: int = 1, durable: Sequence[int] = (), rejected: str = "") -> Story:
        """Every rank holds these versions."""
        ranks = range(len(self.machine.members))
        held = {r: tuple(m.HeldVersion(v, writer, len(ranks)) for v in versions) for r in ranks}
        reasons = (rejected,) if rejected else ()
        return self.tell(m.InventoryTaken(self.machine.epoch, held, tuple(durable), reasons))

    def all_at(self, step: int, phase: Phase = Phase.FORWARD_BACKWARD) -> Story:
        return self.tell(self.beats(dict.fromkeys(range(len(self.machine.members)), (phase, step))))

    def running(self, step: int = 7) -> Story:
        """Started fresh and trained until ``step``."""
        self.processes_start().inventory()
        return self.after(1.0).all_at(step)

    def parked(self, worker: int, outcome: m.Outcome, detail: str = "", *, version: int = -1) -> m.WorkerParked:
        return m.WorkerParked(worker, self.of(m.StartEpoch)[-1].epoch, outcome, detail, version)

    def survivors_leave(self, *workers: int) -> Story:
        return self.tell(*[self.parked(worker, m.Outcome.ABORTED) for worker in workers])

    def killed(self, worker: int, *, seen_ago_s: float = 0.02) -> m.WorkerLost:
        return m.WorkerLost(worker, f"killed by SIGKILL (pid {900 + worker})", self.now - seen_ago_s)

    # -- reading --------------------------------------------------------------------------------------------------

    def of(self, kind: type[_A]) -> list[_A]:
        return [action for action in self.actions if isinstance(action, kind)]

    def ordered(self, kind: type[_A]) -> list[_A]:
        """By the last words told."""
        return [action for action in self.last if isinstance(action, kind)]

    def events(self, kind: type[_E]) -> list[_E]:
        return [action.event for action in self.of(m.Announce) if isinstance(action.event, kind)]

    @property
    def finish(self) -> m.Finish:
        (finish,) = self.of(m.Finish)
        return finish


# -- start --------------------------------------------------------------------------------------------------------


def test_a_start_brings_up_keepers_workers_and_spares() -> None:
    story = Story(spares=2)
    assert [a.node for a in story.of(m.StartKeeper)] == [0, 1, 2]
    assert [(a.worker, a.node) for a in story.of(m.StartWorker)] == [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1)]
    assert story.machine.state is State.INITIALIZING


def test_nothing_is_taken_stock_of_before_every_seat_and_keeper_is_ready() -> None:
    story = Story()
    story.tell(*[m.WorkerReady(w, w, 900) for w in range(3)], m.KeeperReady(0), m.KeeperReady(1))
    assert not story.of(m.TakeInventory)
    story.tell(m.KeeperReady(2))  # the spare is not waited for
    assert [type(a) for a in story.last] == [m.Fence, m.TakeInventory]
    assert story.of(m.TakeInventory)[0].members == tuple(m.Member(r, r, r) for r in range(3))
    assert story.machine.state is State.SCHEDULING


def test_a_run_without_state_starts_fresh_and_announces_no_recovery() -> None:
    story = Story().processes_start().inventory()
    (start,) = story.of(m.StartEpoch)
    assert (start.epoch, start.version, len(start.members)) == (1, -1, 3)
    assert story.events(EpochStarted) == [EpochStarted(1, 3, -1)]
    assert not story.events(RecoveryPlanned)
    assert story.machine.state is State.RUNNING


def test_a_resume_takes_the_same_way_through_a_checkpoint() -> None:
    story = Story().processes_start().inventory(durable=(200, 100))
    assert story.ordered(m.LoadCheckpoint) == [m.LoadCheckpoint(1, 200)]
    assert not story.of(m.StartEpoch)
    story.tell(m.CheckpointLoaded(1, 200))
    assert story.of(m.StartEpoch)[0].version == 200
    (plan,) = story.events(RecoveryPlanned)
    assert (plan.number, plan.source, plan.version) == (0, "disk", 200)
    story.all_at(201)
    assert not story.events(RecoveryDone)
    assert story.machine.faults == 0


def test_a_refused_checkpoint_is_followed_by_the_next_older_one() -> None:
    story = Story().processes_start().inventory(durable=(200, 100))
    story.tell(m.CheckpointRefused(1, 200, "rank 1: digest"))
    assert story.ordered(m.LoadCheckpoint) == [m.LoadCheckpoint(1, 100)]
    assert "rank 1: digest" in story.events(RecoveryPlanned)[-1].rejected[0]


def test_a_checkpoint_of_another_layout_is_read_by_the_ranks_themselves() -> None:
    story = Story().processes_start()
    story.tell(m.InventoryTaken(1, {}, durable=(200, 100), foreign=(200,)))
    assert not story.of(m.LoadCheckpoint)
    (start,) = story.of(m.StartEpoch)
    assert (start.version, start.from_storage) == (200, True)
    (plan,) = story.events(RecoveryPlanned)
    assert plan.reason.endswith("; another layout wrote it, each rank reads its part")


def test_a_checkpoint_that_a_rank_could_not_use_is_followed_by_the_next_older_one() -> None:
    story = Story().processes_start()
    there = m.InventoryTaken(1, {}, durable=(200, 100), foreign=(200,))
    story.tell(there).tell(story.parked(1, m.Outcome.CORRUPT, "a digest differs", version=200))
    story.survivors_leave(0, 2).tell(replace(there, epoch=2))
    assert story.ordered(m.LoadCheckpoint) == [m.LoadCheckpoint(2, 100)]
    assert story.events(RecoveryPlanned)[-1].rejected == ("checkpoint of step 200: a digest differs",)
    story.tell(m.CheckpointLoaded(2, 100))
    assert [(start.version, start.from_storage) for start in story.of(m.StartEpoch)] == [(200, True), (100, False)]


def test_memory_that_reaches_as_far_as_a_checkpoint_of_another_layout_is_better() -> None:
    story = Story().processes_start()
    held = {rank: (m.HeldVersion(200, 1, 3),) for rank in range(3)}
    story.tell(m.InventoryTaken(1, held, durable=(200,), foreign=(200,)))
    (start,) = story.of(m.StartEpoch)
    assert (start.version, start.from_storage) == (200, False)


def test_a_checkpoint_that_is_never_loaded_counts_as_refused() -> None:
    story = Story(step_timeout_s=30).processes_start().inventory(durable=(200,))
    story.wait(31)
    assert story.finish.exit_code == 93
    assert "not loaded within 30.0 s" in story.finish.reason


def test_unreadable_checkpoints_end_the_run_instead_of_a_fresh_start() -> None:
    story = Story().processes_start().inventory(rejected="step-00000100: no commit record")
    assert (story.finish.outcome, story.finish.exit_code) == ("failed", 93)
    assert "step-00000100" in story.finish.reason
    assert not story.of(m.StartEpoch)
    assert story.machine.state is State.FAILED


def test_a_worker_that_does_not_come_up_is_killed_and_replaced_by_the_spare() -> None:
    story = Story(start_timeout_s=30)
    story.tell(*[m.KeeperReady(n) for n in range(3)], *[m.WorkerReady(w, w % 3, 900) for w in (0, 2, 3)])
    story.wait(30)
    assert [a.worker for a in story.of(m.KillWorker)] == [1]
    assert [mb.worker for mb in story.of(m.TakeInventory)[0].members] == [0, 3, 2]
    assert "not ready after 30.0 s" in story.events(FaultDetected)[0].cause


def test_a_keeper_that_does_not_come_up_is_started_again_until_the_budget_is_used_up() -> None:
    story = Story(start_timeout_s=30, max_failures=2)
    story.tell(*[m.KeeperReady(n) for n in (0, 2)], *[m.WorkerReady(w, w % 3, 900) for w in range(4)])
    story.wait(100)
    assert [a.node for a in story.of(m.StartKeeper)] == [0, 1, 2, 1, 1]
    assert (story.finish.outcome, story.finish.exit_code) == ("failed", 1)


def test_what_is_waited_for_is_said_every_ten_seconds() -> None:
    story = Story()
    story.tell(m.KeeperReady(0), m.WorkerReady(0, 0, 900), m.WorkerReady(2, 2, 902)).wait(21)
    words = [event.what for event in story.events(Waiting)]
    assert len(words) == 2
    assert "rank 1" in words[0]
    assert "1, 2" in words[0]
    assert words[0].endswith("10 s")


def test_an_inventory_without_an_answer_is_taken_again_in_a_new_epoch() -> None:
    story = Story(start_timeout_s=30).processes_start()
    story.wait(31)
    assert [a.epoch for a in story.of(m.TakeInventory)] == [1, 2]
    assert "inventory" in story.events(FaultDetected)[0].cause


# -- a worker dies ------------------------------------------------------------------------------------------------


def test_a_lost_worker_is_told_at_once_and_replaced_by_the_spare() -> None:
    story = Story().running(step=7)
    story.tell(story.killed(1, seen_ago_s=0.5))
    kinds = [type(a) for a in story.last]
    assert isinstance(story.last[0], m.Announce)
    assert isinstance(story.last[0].event, FaultDetected)
    assert m.Fence not in kinds  # the survivors may bring their live state into memory first
    assert story.ordered(m.AbortWorker) == [m.AbortWorker(0, 1), m.AbortWorker(2, 1)]
    assert m.StartWorker not in kinds  # the spare is warm, and a new one would take its processor time
    assert [mb.worker for mb in story.machine.members] == [0, 3, 2]
    assert story.machine.state is State.RESTARTING
    (fault,) = story.events(FaultDetected)
    assert (fault.number, fault.ranks, fault.node, fault.pid, fault.last_step) == (1, (1,), 1, 901, 7)
    assert fault.phase == "forward_backward"
    assert fault.detected_after_s == pytest.approx(0.5)


def test_survivors_are_never_restarted_and_everybody_resumes_from_the_newest_common_version() -> None:
    story = Story().running(step=7)
    story.tell(story.killed(1)).survivors_leave(0, 2)
    assert [type(a) for a in story.last] == [m.Fence, m.TakeInventory]
    assert story.ordered(m.TakeInventory)[0].epoch == 2
    story.inventory(5, 6)
    (_, second) = story.of(m.StartEpoch)
    assert (second.epoch, second.version) == (2, 6)
    assert [mb.worker for mb in second.members] == [0, 3, 2]
    assert {a.worker for a in story.of(m.KillWorker)} == {1}
    (plan,) = story.events(RecoveryPlanned)
    assert (plan.number, plan.source, plan.version) == (1, "keeper memory", 6)


def test_no_inventory_is_taken_before_every_survivor_has_left() -> None:
    story = Story().running()
    story.tell(story.killed(1)).survivors_leave(0)
    assert len(story.of(m.TakeInventory)) == 1
    story.survivors_leave(2)
    assert len(story.of(m.TakeInventory)) == 2


def test_a_recovery_is_done_when_every_rank_has_finished_a_step_and_says_where_the_time_went() -> None:
    story = Story().running(step=7)
    story.tell(story.killed(1, seen_ago_s=0.1))
    story.after(0.5).survivors_leave(0, 2).inventory(5, 6)
    story.after(2.0).all_at(6, Phase.RESTORE)
    story.after(1.0).all_at(6)
    story.after(0.25, story.beats({0: (Phase.UPDATE, 7), 1: (Phase.UPDATE, 7), 2: (Phase.UPDATE, 6)}))
    assert not story.events(RecoveryDone)
    story.after(0.25).all_at(7, Phase.CAPTURE)
    (done,) = story.events(RecoveryDone)
    assert (done.number, done.epoch, done.step, done.steps_lost) == (1, 2, 7, 1)
    assert (done.failures, done.failures_allowed) == (1, 10)
    assert done.repaired_in_s == pytest.approx(4.0)
    assert done.split_s == pytest.approx({"detect": 0.1, "regroup": 0.5, "restore": 3.0, "first_step": 0.5})
    assert story.machine.steps_lost == 1


def test_a_new_spare_is_started_only_after_the_recovery() -> None:
    story = Story().running(step=7)
    story.tell(story.killed(1)).survivors_leave(0, 2).inventory(7)
    assert max(a.worker for a in story.of(m.StartWorker)) == 3
    story.after(1.0).all_at(8)
    assert story.ordered(m.StartWorker) == [m.StartWorker(4, 0)]
    assert [p.level for p in story.events(Protection)] == ["degraded", "reduced"]
    story.tell(m.WorkerReady(4, 0, 904))
    assert [p.level for p in story.events(Protection)] == ["degraded", "reduced", "full"]


def test_without_a_spare_a_new_worker_is_started_at_once() -> None:
    story = Story(spares=0).running()
    story.tell(story.killed(1))
    assert story.ordered(m.StartWorker) == [m.StartWorker(3, 1)]
    story.survivors_leave(0, 2)
    assert len(story.of(m.TakeInventory)) == 1
    story.tell(m.WorkerReady(3, 1, 903))
    assert len(story.of(m.TakeInventory)) == 2


def test_a_spare_of_another_host_is_of_no_use() -> None:
    story = Story(hosts=("a", "b", "c")).running()
    story.tell(story.killed(1))
    assert story.ordered(m.StartWorker) == [m.StartWorker(4, 1)]
    assert [mb.worker for mb in story.machine.members] == [0, 4, 2]


def test_a_node_that_has_moved_takes_the_spare_of_its_new_host_and_leaves_those_of_the_old_one() -> None:
    story = Story(spares=2, hosts=("a", "b", "c")).running()
    story.tell(m.NodeMoved(1, "a"), story.killed(1))
    assert [mb.worker for mb in story.machine.members] == [0, 3, 2], "spare 4 was started for node 1, on host b"
    assert story.ordered(m.StartWorker) == []
    story.survivors_leave(0, 2).inventory(7).after(1.0).all_at(8)
    story.tell(m.NodeMoved(2, "b"), story.killed(2))
    assert [mb.worker for mb in story.machine.members] == [0, 3, 4]


def test_a_keeper_that_got_to_another_host_than_its_worker_draws_the_worker_after_it() -> None:
    """The node moves between the order to start the keeper and the news of that."""
    story = Story(spares=0, hosts=("a", "b", "c")).running()
    story.tell(m.KeeperLost(1, "killed by SIGKILL")).survivors_leave(0, 1, 2)
    story.tell(m.KeeperReady(1, "d"))
    assert [(a.worker, a.reason) for a in story.ordered(m.KillWorker)] == [
        (1, "node 1 has moved to d, and this process is elsewhere")
    ]
    assert story.ordered(m.StartWorker) == [m.StartWorker(3, 1)]
    assert not story.ordered(m.TakeInventory)
    story.tell(m.WorkerReady(3, 1, 903, "d"))
    assert [mb.worker for mb in story.of(m.TakeInventory)[-1].members] == [0, 3, 2]
    assert story.machine.faults == 1, "who has to follow is no fault of its own"


def test_news_of_a_move_is_newer_than_what_was_started_before_it() -> None:
    story = Story(spares=0, hosts=("a", "b", "c")).running()
    story.tell(m.KeeperLost(1, "killed by SIGKILL")).survivors_leave(0, 1, 2)
    story.after(1.0, m.NodeMoved(1, "e")).tell(m.KeeperReady(1, "d"))
    assert story.ordered(m.StartKeeper) == [m.StartKeeper(1)], "neither d nor b is where the node is now"
    assert story.ordered(m.StartWorker) == [m.StartWorker(3, 1)]
    story.tell(m.KeeperReady(1, "e"), m.WorkerReady(3, 1, 903, "e"))
    assert [mb.worker for mb in story.of(m.TakeInventory)[-1].members] == [0, 3, 2]


def test_protection_stays_reduced_while_a_node_shares_the_host_it_has_moved_to() -> None:
    story = Story(spares=0, hosts=("a", "b", "c"), has_parity=True).running()
    for host in ("a", "d"):
        story.tell(m.NodeMoved(1, host), story.killed(story.machine.members[1].worker)).survivors_leave(0, 2)
        new = story.of(m.StartWorker)[-1]
        story.tell(m.WorkerReady(new.worker, 1, 900 + new.worker), m.KeeperReady(1)).inventory(7)
        story.tell(m.Protected(story.machine.epoch, 8)).after(1.0).all_at(8)
    reduced, full = [p for p in story.events(Protection) if p.level != "degraded"]
    assert (reduced.level, full.level) == ("reduced", "full")
    assert "node(s) 1 moved to the host of another node" in reduced.reason


def test_a_lost_spare_interrupts_nothing_and_is_replaced() -> None:
    story = Story().running()
    story.tell(story.killed(3))
    assert story.ordered(m.StartWorker) == [m.StartWorker(4, 0)]
    assert not story.ordered(m.AbortWorker)
    assert story.machine.faults == 0
    assert story.machine.state is State.RUNNING


def test_spares_that_keep_dying_are_given_up() -> None:
    story = Story(max_failures=2).running()
    for worker in range(3, 10):
        story.tell(story.killed(worker))
    assert max(a.worker for a in story.of(m.StartWorker)) == 5
    assert story.machine.state is State.RUNNING


def test_two_workers_lost_at_once_are_one_failure() -> None:
    story = Story(spares=2).running()
    story.tell(story.killed(1)).after(0.01, story.killed(2)).survivors_leave(0).inventory(6)
    assert story.machine.faults == 1
    assert [mb.worker for mb in story.of(m.StartEpoch)[1].members] == [0, 4, 3]  # spare 4 lives on node 1
    assert any("rank 2 lost as well" in event.what for event in story.events(Waiting))


def test_steps_that_no_heartbeat_told_of_are_found_in_memory() -> None:
    story = Story().running(step=7)
    story.tell(story.killed(1)).survivors_leave(0, 2)
    held = {rank: (m.HeldVersion(8, 1, 3),) for rank in range(3)}
    held[0] += (m.HeldVersion(9, 1, 3),)
    story.tell(m.InventoryTaken(2, held)).after(1.0).all_at(9)
    (done,) = story.events(RecoveryDone)
    assert done.steps_lost == 1
    assert story.events(RecoveryPlanned)[0].rejected == ("version 9 in memory: not complete at ranks 1-2",)


# -- the first cause ----------------------------------------------------------------------------------------------


def test_a_victim_that_reports_first_does_not_hide_the_cause() -> None:
    story = Story().running()
    story.tell(story.parked(0, m.Outcome.BROKEN, "connection reset"))
    assert [a.worker for a in story.ordered(m.AbortWorker)] == [1, 2]
    assert not story.events(FaultDetected)
    story.after(0.03, story.killed(1))
    (fault,) = story.events(FaultDetected)
    assert fault.ranks == (1,)
    assert "SIGKILL" in fault.cause


def test_an_exception_that_follows_a_victim_is_the_cause() -> None:
    story = Story().running()
    story.tell(story.parked(0, m.Outcome.BROKEN), story.parked(2, m.Outcome.ERROR, "ValueError: x\nTraceback"))
    (fault,) = story.events(FaultDetected)
    assert fault.ranks == (2,)
    assert fault.cause.startswith("ValueError")


def test_a_broken_collective_without_a_cause_is_told_after_the_grace() -> None:
    story = Story().running()
    story.tell(story.parked(0, m.Outcome.BROKEN, "connection reset"))
    story.wait(2.75)
    assert not story.events(FaultDetected)
    story.wait(0.5)
    (fault,) = story.events(FaultDetected)
    assert fault.ranks == ()
    assert "rank 0" in fault.cause
    assert "connection reset" in fault.cause


def test_a_recovery_that_is_faster_than_the_grace_is_announced_behind_its_fault() -> None:
    story = Story().running()
    story.tell(story.parked(0, m.Outcome.BROKEN, "reset"))
    story.survivors_leave(1, 2).inventory(6)
    kinds = [type(a.event) for a in story.of(m.Announce)]
    assert kinds.index(FaultDetected) < kinds.index(RecoveryPlanned)
    assert [mb.worker for mb in story.of(m.StartEpoch)[1].members] == [0, 1, 2]


def test_an_exception_in_a_worker_costs_its_process_and_nobody_elses() -> None:
    story = Story().running()
    story.tell(story.parked(1, m.Outcome.ERROR, "ValueError: x"))
    assert [a.worker for a in story.ordered(m.KillWorker)] == [1]
    assert [mb.worker for mb in story.machine.members] == [0, 3, 2]


# -- frozen, stuck and late ---------------------------------------------------------------------------------------


def test_a_frozen_rank_is_killed_and_named_within_fifteen_seconds() -> None:
    story = Story().running(step=4)
    began_s = story.now
    story.wait(12, beats={0: (Phase.VOTE, 4), 2: (Phase.VOTE, 4)})
    (fault,) = story.events(FaultDetected)
    assert fault.ranks == (1,)
    assert "no heartbeat" in fault.cause
    assert 10 <= fault.detected_after_s < 15
    assert [a.worker for a in story.of(m.KillWorker)] == [1]
    assert story.now - began_s < 15


def test_a_rank_that_beats_without_progress_is_replaced() -> None:
    story = Story(step_timeout_s=60).running(step=4)
    story.wait(61, beats={0: (Phase.VOTE, 4), 1: (Phase.FORWARD_BACKWARD, 4), 2: (Phase.VOTE, 4)})
    (fault,) = story.events(FaultDetected)
    assert fault.ranks == (1,)
    assert "no progress" in fault.cause


def test_a_member_that_never_shows_up_in_its_epoch_is_found_by_its_silence() -> None:
    story = Story().processes_start().inventory()
    story.wait(11, beats={0: (Phase.JOIN, 0), 2: (Phase.JOIN, 0)})
    assert story.events(FaultDetected)[0].ranks == (1,)


def test_heartbeats_of_an_older_epoch_count_as_life_but_not_as_progress() -> None:
    story = Story().running(step=7)
    story.tell(story.killed(1)).survivors_leave(0, 2).inventory(7)
    old = {w: m.BeatSeen(r, 1, Phase.VOTE, 7, story.now + 9, 0.0) for r, w in ((0, 0), (1, 3), (2, 2))}
    story.after(9.0, m.Beats(old), m.Tick())
    story.after(9.0, m.Tick())
    assert story.machine.faults == 1
    assert not story.events(RecoveryDone)


def test_a_driver_that_slept_does_not_take_everybody_for_frozen() -> None:
    story = Story().running()
    story.wait(2, beats=dict.fromkeys(range(3), (Phase.VOTE, 7)))
    story.after(12, m.Tick())  # for example a slow write; the beats it knows are as old as that
    assert story.machine.faults == 0
    story.wait(2, beats=dict.fromkeys(range(3), (Phase.VOTE, 7)))
    assert story.machine.faults == 0


def test_a_driver_that_always_sleeps_finds_a_frozen_rank_nevertheless() -> None:
    story = Story().running()
    for _ in range(10):
        story.after(20, m.Tick())
    assert story.machine.faults > 0


def test_a_survivor_that_does_not_leave_is_killed_and_replaced_at_no_further_charge() -> None:
    story = Story().running()
    story.tell(story.killed(1)).survivors_leave(0)
    story.wait(15.25)
    assert [a.worker for a in story.of(m.KillWorker)] == [1, 2]
    assert story.machine.faults == 1
    assert [mb.worker for mb in story.machine.members] == [0, 3, 4]


# -- faults during recovery ---------------------------------------------------------------------------------------


def test_a_replacement_lost_before_the_epoch_starts_is_replaced_and_charged() -> None:
    story = Story().running()
    story.tell(story.killed(1)).survivors_leave(0, 2)
    assert story.of(m.TakeInventory)[-1].epoch == 2
    story.tell(story.killed(3))
    assert story.machine.faults == 2
    assert story.ordered(m.StartWorker) == [m.StartWorker(4, 1)]
    story.tell(m.InventoryTaken(2, {}))  # too late
    assert len(story.of(m.StartEpoch)) == 1
    story.tell(m.WorkerReady(4, 1, 904))
    assert story.of(m.Fence)[-1] == m.Fence(3)
    story.inventory(6)
    assert story.of(m.StartEpoch)[-1].epoch == 3


def test_a_survivor_lost_while_a_checkpoint_is_loaded_restarts_the_recovery() -> None:
    story = Story().running()
    story.tell(story.killed(1)).survivors_leave(0, 2).inventory(durable=(5,))
    assert story.ordered(m.LoadCheckpoint) == [m.LoadCheckpoint(2, 5)]
    story.tell(story.killed(0), m.CheckpointLoaded(2, 5))
    assert len(story.of(m.StartEpoch)) == 1
    story.tell(m.WorkerReady(4, 0, 904)).inventory(durable=(5,)).tell(m.CheckpointLoaded(3, 5))
    assert [(s.epoch, s.version) for s in story.of(m.StartEpoch)] == [(1, -1), (3, 5)]
    assert story.machine.faults == 1


def test_an_outage_of_two_faults_is_measured_from_the_first_and_counts_all_its_steps() -> None:
    story = Story().running(step=9)
    began_s = story.now
    story.tell(story.killed(1)).survivors_leave(0, 2).inventory(7)
    story.after(3.0, story.killed(2)).survivors_leave(0, 3).tell(m.WorkerReady(4, 2, 904)).inventory(7)
    story.after(2.0).all_at(8)
    (done,) = story.events(RecoveryDone)
    assert (done.number, done.steps_lost) == (2, 2)
    assert done.repaired_in_s == pytest.approx(story.now - began_s)


def test_a_lost_keeper_ends_the_epoch_but_keeps_its_workers() -> None:
    story = Story().running()
    story.tell(m.KeeperLost(1, "keeper of node 1: killed by SIGKILL"))
    assert story.ordered(m.StartKeeper) == [m.StartKeeper(1)]
    assert story.ordered(m.AbortWorker) == [m.AbortWorker(worker, 1, may_update=True) for worker in (0, 1, 2)]
    story.survivors_leave(0, 1, 2)
    assert len(story.of(m.TakeInventory)) == 1
    story.tell(m.KeeperReady(1))
    assert [type(a) for a in story.last] == [m.Fence, m.TakeInventory]  # the new keeper knows of no fence yet
    story.inventory(7)
    assert [mb.worker for mb in story.of(m.StartEpoch)[-1].members] == [0, 1, 2]
    (fault,) = story.events(FaultDetected)
    assert (fault.ranks, fault.node) == ((), 1)


def test_a_keeper_lost_while_its_successor_starts_is_charged_again() -> None:
    story = Story().running()
    story.tell(m.KeeperLost(1, "dead"), m.KeeperLost(2, "dead too"), m.KeeperLost(1, "dead again"))
    assert story.machine.faults == 2
    assert [a.node for a in story.of(m.StartKeeper)][3:] == [1, 2, 1]


def test_a_damaged_version_is_quarantined_and_the_next_older_one_is_used() -> None:
    story = Story().running(step=7)
    story.tell(story.killed(1)).survivors_leave(0, 2).inventory(6, 7)
    story.tell(story.parked(2, m.Outcome.CORRUPT, "digest of blocks.0", version=7))
    assert story.ordered(m.Quarantine) == [m.Quarantine(2, 7)]
    assert not story.ordered(m.KillWorker)
    story.survivors_leave(0, 3).inventory(6, 7)  # the keeper has not heard of the quarantine yet
    assert story.of(m.StartEpoch)[-1].version == 6
    assert [mb.worker for mb in story.of(m.StartEpoch)[-1].members] == [0, 3, 2]


# -- stale messages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stale",
    [
        m.WorkerReady(1, 1, 901),
        m.WorkerLost(1, "again", 0.0),
        m.WorkerLost(77, "never existed", 0.0),
        m.WorkerParked(1, 1, m.Outcome.ERROR, "from the grave"),
        m.WorkerParked(0, 1, m.Outcome.BROKEN, "parked twice"),
        m.WorkerParked(0, 0, m.Outcome.ERROR, "older epoch"),
        m.WorkerParked(3, 1, m.Outcome.ERROR, "was not in that epoch"),
        m.InventoryTaken(1, {}),
        m.CheckpointLoaded(2, 5),
        m.CheckpointRefused(1, 5, "late"),
        m.KeeperReady(1),
        m.KeeperReady(99),
        m.KeeperLost(99, "no such node"),
    ],
)
def test_stale_messages_change_nothing(stale: m.Message) -> None:
    story = Story().running()
    story.tell(story.killed(1)).survivors_leave(0, 2).inventory(6)
    story.tell(stale)
    assert story.last == []
    assert story.machine.state is State.RUNNING
    assert story.machine.faults == 1


def test_what_is_no_message_is_our_own_mistake() -> None:
    with pytest.raises(InvariantViolation, match="Message"):
        Story().tell(m.Message())
    with pytest.raises(InvariantViolation, match="once"):
        Story().machine.start(0.0)


# -- budgets ------------------------------------------------------------------------------------------------------


def _fault_and_recover(story: Story, *, version: int, reached: int) -> None:
    """Rank 1 dies; everybody resumes from ``version`` and trains until ``reached``."""
    victim = story.machine.members[1].worker
    story.tell(story.killed(victim))
    for member in story.machine.members:
        if member.rank != 1:
            story.tell(story.parked(member.worker, m.Outcome.ABORTED))
    new = story.machine.members[1].worker
    story.tell(m.WorkerReady(new, 1, 900 + new))
    if story.of(m.Finish):
        return
    story.inventory(version).after(1.0)
    if not story.of(m.Finish):
        story.all_at(reached)


def test_the_fault_after_the_last_allowed_one_ends_the_run_with_its_history() -> None:
    story = Story(spares=0, max_failures=2).running(step=1)
    for step in (2, 3, 4):
        _fault_and_recover(story, version=step - 1, reached=step)
    assert (story.finish.outcome, story.finish.exit_code) == ("failed", 1)
    assert story.finish.reason.count("SIGKILL") == 3
    assert story.machine.faults == 3
    assert [e.number for e in story.events(FaultDetected)] == [1, 2, 3]
    assert {a.worker for a in story.ordered(m.AbortWorker)} <= {0, 2}
    assert story.of(m.AbortWorker)[-1].worker == 2  # nobody trains on behind the end


def test_restarts_without_a_new_step_end_the_run_as_not_worth_restarting() -> None:
    story = Story(spares=0, max_no_progress=3).running(step=5)
    for _ in range(5):
        _fault_and_recover(story, version=4, reached=5)
    assert len(story.of(m.StartEpoch)) == 4
    assert (story.finish.outcome, story.finish.exit_code) == ("failed", 93)
    assert "3 restarts in a row" in story.finish.reason


def test_a_new_step_clears_the_count_of_restarts_without_progress() -> None:
    story = Story(spares=0, max_no_progress=2, max_failures=20).running(step=5)
    for i in range(8):
        _fault_and_recover(story, version=5 + i // 2, reached=5 + (i + 1) // 2)
    assert not story.of(m.Finish)


def test_a_worker_that_never_starts_uses_up_the_budget() -> None:
    story = Story(spares=0, max_failures=2)
    for worker in (0, 3, 4):
        story.tell(m.WorkerLost(worker, "ImportError: torch", story.now))
    assert (story.finish.outcome, story.finish.exit_code) == ("failed", 1)
    assert "ImportError" in story.finish.reason


def test_all_workers_that_fail_to_start_alike_are_one_failure() -> None:
    story = Story(spares=0)
    story.tell(*[m.WorkerLost(w, "ImportError: torch", story.now) for w in range(3)])
    assert story.machine.faults == 1


# -- the end ------------------------------------------------------------------------------------------------------


def test_the_run_is_finished_when_every_rank_is() -> None:
    story = Story().running()
    story.tell(*[story.parked(w, m.Outcome.FINISHED) for w in (0, 1)])
    assert not story.of(m.Finish)
    story.tell(story.parked(2, m.Outcome.FINISHED))
    assert story.finish == m.Finish("finished", 0, "the goal is reached")
    assert story.machine.state is State.FINISHED
    assert story.tell(story.killed(1), m.Tick()).last == []


def test_a_rank_lost_after_others_have_finished_brings_them_back() -> None:
    story = Story().running(step=8)
    story.tell(story.parked(0, m.Outcome.FINISHED), story.parked(2, m.Outcome.FINISHED), story.killed(1))
    assert not story.ordered(m.AbortWorker)
    assert len(story.of(m.TakeInventory)) == 2
    story.inventory(8).after(0.5)
    story.tell(*[story.parked(w, m.Outcome.FINISHED) for w in (0, 3, 2)])
    assert story.finish.outcome == "finished"
    (done,) = story.events(RecoveryDone)
    assert (done.step, done.steps_lost) == (8, 0)


def test_a_stop_lets_the_ranks_leave_together() -> None:
    story = Story().running()
    story.tell(m.StopAsked("SIGTERM"), m.StopAsked("SIGTERM again"))
    assert story.of(m.StopEpoch) == [m.StopEpoch(1)]
    assert story.events(StopRequested) == [StopRequested("SIGTERM")]
    assert story.machine.state is State.STOPPING
    story.tell(*[story.parked(w, m.Outcome.STOPPED) for w in range(3)])
    assert story.finish == m.Finish("stopped", 75, "SIGTERM")


def test_a_stop_that_meets_the_goal_is_a_finish() -> None:
    story = Story().running().tell(m.StopAsked("SIGTERM"))
    story.tell(*[story.parked(w, m.Outcome.FINISHED) for w in range(3)])
    assert story.finish.outcome == "finished"


def test_a_stop_that_takes_too_long_is_cut_short() -> None:
    story = Story(stop_grace_s=20).running().tell(m.StopAsked("SIGTERM"))
    story.wait(21, beats=dict.fromkeys(range(3), (Phase.FORWARD_BACKWARD, 7)))
    assert (story.finish.outcome, story.finish.exit_code) == ("stopped", 75)
    assert "ranks 0-2" in story.finish.reason
    assert len(story.of(m.AbortWorker)) == 3


@pytest.mark.parametrize("lost", ["worker", "keeper"])
def test_a_fault_while_stopping_is_not_repaired(lost: str) -> None:
    story = Story().running().tell(m.StopAsked("SIGTERM"))
    story.tell(story.killed(1) if lost == "worker" else m.KeeperLost(1, "dead"))
    assert (story.finish.outcome, story.finish.exit_code) == ("stopped", 75)
    assert "fault while stopping" in story.finish.reason
    assert story.events(FaultDetected)
    assert len(story.of(m.StartKeeper)) == 3


def test_a_stop_before_anything_was_trained_ends_at_once_with_nothing_saved() -> None:
    story = Story().tell(m.StopAsked("SIGTERM"))
    assert (story.finish.outcome, story.finish.exit_code) == ("stopped", 143)


def test_a_stop_during_a_recovery_ends_at_once_with_what_memory_holds() -> None:
    story = Story().running(step=7)
    story.tell(story.killed(1), m.StopAsked("SIGTERM"))
    assert (story.finish.outcome, story.finish.exit_code) == ("stopped", 75)


# -- layout -------------------------------------------------------------------------------------------------------


def test_a_layout_that_does_not_fit_together_names_every_mistake() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Layout(0, 0, -1, ("a",))
    assert len(caught.value.problems) == 4


def test_ranks_of_one_node_stay_together() -> None:
    story = Story()
    machine = Supervisor(Layout(2, 3, 0, ("a", "b")), RecoveryConfig(), now=0.0)
    machine.start(0.0)
    assert [member.node for member in machine.members] == [0, 0, 0, 1, 1, 1]
    assert [member.rank for member in story.machine.members] == [0, 1, 2]


# -- a whole node -----------------------------------------------------------------------------------------------------


def _without_node_1(story: Story, *, absent: Sequence[int] = (1,)) -> Story:
    """Node 1 is gone with its keeper and its worker; replacements are ready; version 7 was committed."""
    story.after(0.1, m.KeeperLost(1, "its host is gone"), m.WorkerLost(1, "its host is gone", story.now))
    story.tell(*[story.parked(worker, m.Outcome.ABORTED) for worker in (0, 2)])
    story.processes_start()
    held = {r: tuple(m.HeldVersion(v, 1, 3) for v in (7, 8)) for r in range(3) if r not in absent}
    recorded = (Recorded(7, 1, absent=tuple(absent), bare=tuple(absent)),)
    return story.tell(m.InventoryTaken(story.machine.epoch, held, (2,), (), recorded))


def test_what_a_lost_node_held_is_rebuilt_from_parity_before_anybody_starts() -> None:
    story = _without_node_1(Story(has_parity=True).running(8))
    epoch = story.machine.epoch
    assert story.of(m.Rebuild) == [m.Rebuild(epoch, 7, 1, (1,))]
    assert story.events(RecoveryPlanned)[-1].source == PARITY
    assert len(story.of(m.StartEpoch)) == 1, "nobody starts before the memory is whole"
    story.after(0.5, m.CheckpointLoaded(epoch, 7))
    assert story.of(m.StartEpoch)[-1].version == 7
    assert story.of(m.LoadCheckpoint) == []


def test_a_rebuild_that_fails_takes_the_next_best_source() -> None:
    story = _without_node_1(Story(has_parity=True).running(8))
    story.tell(m.CheckpointRefused(story.machine.epoch, 7, "rank 1 was not rebuilt: ShardCorrupt"))
    assert story.of(m.LoadCheckpoint)[-1].step == 2
    assert any("rank 1 was not rebuilt" in reason for reason in story.events(RecoveryPlanned)[-1].rejected)


def test_a_rebuild_that_does_not_end_is_given_up() -> None:
    story = _without_node_1(Story(has_parity=True, step_timeout_s=30.0).running(8))
    story.wait(31.0)
    assert story.of(m.LoadCheckpoint)[-1].step == 2


def test_two_lost_nodes_with_one_parity_go_back_to_the_checkpoint() -> None:
    story = _without_node_1(Story(has_parity=True).running(8), absent=(1, 2))
    assert story.of(m.Rebuild) == []
    assert story.of(m.LoadCheckpoint)[-1].step == 2


def test_until_parity_is_whole_again_the_run_says_that_it_is_not() -> None:
    story = _without_node_1(Story(has_parity=True, spares=0).running(8))
    epoch = story.machine.epoch
    story.after(0.5, m.CheckpointLoaded(epoch, 7)).after(0.5).all_at(9)
    assert [(p.level, "parity" in p.reason) for p in story.events(Protection)][-1] == (REDUCED, True)
    story.tell(m.Protected(epoch - 1, 8)).all_at(9)
    assert story.events(Protection)[-1].level == REDUCED
    story.tell(m.Protected(epoch, 7)).all_at(10)
    assert story.events(Protection)[-1].level == FULL


# -- the live state of who is left --------------------------------------------------------------------------------


def test_what_every_rank_still_had_when_it_left_is_where_it_goes_on() -> None:
    story = Story().running(step=7)
    story.tell(m.KeeperLost(1, "keeper of node 1: killed by SIGKILL"))
    story.tell(*[m.WorkerParked(w, 1, m.Outcome.ABORTED, live=7) for w in (0, 1, 2)], m.KeeperReady(1)).inventory(6, 7)
    (plan,) = story.events(RecoveryPlanned)
    assert (plan.source, plan.version, plan.rejected) == ("live state", 7, ())


def test_live_state_that_some_have_not_is_refused_with_their_names() -> None:
    story = Story().running(step=7)
    story.tell(story.killed(1))
    story.tell(*[m.WorkerParked(w, 1, m.Outcome.ABORTED, live=7) for w in (0, 2)]).inventory(6, 7)
    (plan,) = story.events(RecoveryPlanned)
    assert (plan.source, plan.version) == ("keeper memory", 7)
    assert plan.rejected == ("live state: rank 1 did not bring out version 7",)


def test_live_state_of_an_earlier_epoch_is_not_mistaken_for_that_of_the_last() -> None:
    story = Story().running(step=7)
    story.tell(m.KeeperLost(1, "killed by SIGKILL"))
    story.tell(*[m.WorkerParked(w, 1, m.Outcome.ABORTED, live=7) for w in (0, 1, 2)], m.KeeperReady(1)).inventory(7)
    story.tell(m.KeeperLost(0, "killed by SIGKILL"))
    story.tell(*[m.WorkerParked(w, 2, m.Outcome.ABORTED) for w in (0, 1, 2)], m.KeeperReady(0)).inventory(7)
    assert [plan.source for plan in story.events(RecoveryPlanned)] == ["live state", "keeper memory"]


def test_whoever_is_on_a_node_that_does_not_answer_is_not_waited_for_like_the_others() -> None:
    story = Story().running(step=7)
    story.tell(m.KeeperLost(1, "no answer before the deadline", is_silent=True)).survivors_leave(0, 2)
    story.wait(2)
    assert [a.worker for a in story.of(m.KillWorker)] == [1]
