"""The loop: how far it goes, what it settles before it ends, and that going back to a version changes no bit."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import pytest
import torch

from holdfast import failpoints
from holdfast.errors import Abort, InsufficientShards, InvariantViolation, NonFiniteStep, SnapshotError
from holdfast.fault_tolerance.messages import Outcome
from holdfast.fault_tolerance.snapshot import MemorySnapshotter
from holdfast.parallel.microbatches import Microbatch
from holdfast.trainer import step
from holdfast.trainer.evaluate import evaluate
from holdfast.trainer.loop import Ending, Goal, Trainer
from holdfast.trainer.observers import MemoryWatcher
from holdfast.trainer.state import StateView, TrainState
from holdfast.trainer.step import Communicator, StepParts
from holdfast.types import CopyReport, Phase, RankState, StepReport
from tests.support.tiny_training import (
    Alone,
    Journal,
    LateSnapshots,
    NotingEngine,
    NotingSnapshots,
    NotingWatcher,
    Scripted,
    Threads,
    TinyEngine,
    microbatches,
)


class _Stored:
    """A version that has to come from somewhere: the step is all there is."""

    def restore_into(self, state: RankState, version: int) -> Mapping[str, object]:
        return {"step": version, "tokens": 10 * version, "owner": {}}


class _Rank:
    """A loop around stand-ins."""

    def __init__(
        self,
        max_steps: int,
        *,
        snapshot_every: int = 1,
        evaluate_every: int = 0,
        skips: Sequence[int] = (),
        comm: Communicator | None = None,
    ) -> None:
        self.journal: Journal = []
        self.snapshots = NotingSnapshots(self.journal, skips=skips)
        self.watcher = NotingWatcher(self.journal)
        self.view = StateView(TrainState(), engine := NotingEngine(self.journal), rank=0)
        self.comm = comm or Scripted(1, [(0.0,) * 5], self.journal)
        parts = StepParts(engine, self.comm, self.snapshots, self.watcher, lambda _: 0.1, snapshot_every, 0)
        goal = Goal(max_steps, evaluate_every, lambda step: self.journal.append(f"evaluate {step}"))
        self.trainer = Trainer(self.view, parts, self._batch, goal)

    def _batch(self, step: int) -> list[Microbatch]:
        self.journal.append(f"batch {step}")
        return [(torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64), 4)]

    def noted(self, *words: str) -> Journal:
        return [entry for entry in self.journal if entry.split()[0] in words]

    def stop_in(self, step: int) -> None:
        """Ask for a stop while that step runs."""

        def asked(_: str, step_now: int) -> None:
            self.watcher.stop |= step_now == step

        failpoints.arm("step.begin", asked)


@pytest.fixture(autouse=True)
def _disarmed():  # type: ignore[no-untyped-def]  # a generator fixture
    yield
    failpoints.disarm()


# -- how far ----------------------------------------------------------------------------------------------------------


def test_every_step_up_to_the_goal_gets_its_own_batch_and_is_reported_once() -> None:
    rank = _Rank(4)
    assert rank.trainer.fit() is Ending.FINISHED
    assert rank.noted("batch") == ["batch 0", "batch 1", "batch 2", "batch 3"]
    assert [report.step for report in rank.watcher.reports] == [1, 2, 3, 4]
    assert rank.view.train.step == 4


def test_a_stop_ends_the_run_after_the_step_in_which_it_was_agreed() -> None:
    rank = _Rank(9, evaluate_every=3)
    rank.stop_in(2)
    assert rank.trainer.fit() is Ending.STOPPED
    assert rank.view.train.step == 3
    assert rank.noted("evaluate") == []  # whoever was asked to stop has no time for it


def test_all_ranks_stop_at_the_same_step_with_the_same_version() -> None:
    ranks = Threads(3)
    members = [_Rank(9, comm=ranks) for _ in range(3)]
    members[1].stop_in(4)  # seen by one rank only
    assert ranks.run(lambda number: members[number].trainer.fit()) == [Ending.STOPPED] * 3
    assert [member.view.train.step for member in members] == [5] * 3
    assert [member.snapshots.committed[-1] for member in members] == [5] * 3


def test_a_rank_that_has_to_leave_does_so_before_it_reads_another_batch() -> None:
    rank = _Rank(3)
    rank.watcher.interruption = Abort("the epoch is over")
    with pytest.raises(Abort):
        rank.trainer.fit()
    assert rank.journal == ["check"]


def test_endings_are_words_of_the_recovery_machine() -> None:
    assert [Outcome(ending.value) for ending in Ending] == [Outcome.FINISHED, Outcome.STOPPED]


# -- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_is_due_at_its_multiples_but_not_at_the_end_which_has_its_own() -> None:
    rank = _Rank(6, evaluate_every=2)
    rank.trainer.fit()
    assert rank.noted("evaluate", "EVALUATE") == ["EVALUATE 2", "evaluate 2", "EVALUATE 4", "evaluate 4"]
    assert rank.journal.index("evaluate 2") > rank.journal.index("offer 2")


def test_without_an_interval_nothing_is_evaluated_on_the_way() -> None:
    rank = _Rank(6)
    rank.trainer.fit()
    assert rank.noted("evaluate") == []


# -- settling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("snapshot_every", "offered", "committed"),
    [(1, [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]), (2, [2, 4, 5], [2, 4, 5]), (5, [5], [5]), (9, [5], [5])],
)
def test_the_last_state_is_committed_when_the_loop_returns(
    snapshot_every: int, offered: list[int], committed: list[int]
) -> None:
    rank = _Rank(5, snapshot_every=snapshot_every)
    assert rank.trainer.fit() is Ending.FINISHED
    assert rank.snapshots.offered == offered
    assert rank.snapshots.committed == committed


def test_a_stop_between_wanted_versions_saves_the_state_it_stopped_at() -> None:
    rank = _Rank(9, snapshot_every=4)
    rank.stop_in(5)
    assert rank.trainer.fit() is Ending.STOPPED
    assert rank.snapshots.offered == rank.snapshots.committed == [4, 6]


def test_the_last_version_is_copied_completely_before_the_vote_on_it() -> None:
    rank = _Rank(1)
    rank.trainer.fit()
    after = rank.journal[rank.journal.index("offer 1") + 1 :]
    assert after == ["FENCE 1", "fence", "VOTE 1", "check", "sum", "commit 1"]


def test_taking_the_last_version_is_shown_as_capturing() -> None:
    rank = _Rank(1, snapshot_every=2)
    rank.trainer.fit()
    assert rank.noted("CAPTURE", "offer", "commit") == ["CAPTURE 1", "offer 1", "commit 1"]


@pytest.mark.parametrize("snapshot_every", [1, 2])
def test_a_last_version_that_was_skipped_is_offered_again(
    snapshot_every: int, caplog: pytest.LogCaptureFixture
) -> None:
    rank = _Rank(4, snapshot_every=snapshot_every, skips=[4])
    assert rank.trainer.fit() is Ending.FINISHED
    assert rank.snapshots.offered.count(4) == 1
    assert rank.snapshots.committed[-1] == 4
    assert caplog.messages == []


def test_ranks_take_a_version_together_or_not_at_all() -> None:
    ranks = Threads(2)
    members = [_Rank(5, comm=ranks, skips=[2]), _Rank(5, comm=ranks, skips=[3, 5, 5, 5])]
    ranks.run(lambda number: members[number].trainer.fit())
    assert [member.snapshots.offered for member in members] == [[1, 4, 5]] * 2
    assert [member.snapshots.committed for member in members] == [[1, 4, 5]] * 2


def test_an_older_version_that_another_rank_lacks_does_not_stand_for_the_last_state() -> None:
    lacks, holds = (10.0, 5.0, 4.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0, 0.0)
    rank = _Rank(3, snapshot_every=2, comm=Scripted(2, [lacks, lacks, lacks, lacks, holds]))
    rank.trainer.fit()
    assert rank.snapshots.offered == [2, 3]
    assert rank.snapshots.committed == [3]


def test_a_version_that_becomes_a_checkpoint_is_waited_for() -> None:
    ranks = Threads(2)
    members = [_Rank(5, comm=ranks), _Rank(5, comm=ranks, skips=[2, 3, 4, 4, 4])]
    for member in members:
        member.trainer._parts = replace(member.trainer._parts, persist_every=2)
    ranks.run(lambda number: members[number].trainer.fit())
    assert [member.snapshots.offered for member in members] == [[1, 2, 4, 5]] * 2


def test_a_last_version_that_cannot_be_taken_is_told_and_the_one_before_stays(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "ROOM_S", 3 * step.LOOK_S)
    rank = _Rank(4, skips=[4] * 4)
    with caplog.at_level(logging.WARNING):
        assert rank.trainer.fit() is Ending.FINISHED
    assert rank.snapshots.committed == [1, 2, 3]
    assert caplog.messages == ["the last version, 4, was not taken: a rank had no room for it"]


def test_the_last_version_is_not_committed_when_another_rank_lacks_it(caplog: pytest.LogCaptureFixture) -> None:
    rank = _Rank(2, comm=Scripted(2, [(1.0, 1.0, 1.0, 1.0, 0.0)] * 2 + [(0.0, 0.0, 0.0, 0.0, 0.0)]))
    with caplog.at_level(logging.WARNING):
        rank.trainer.fit()
    assert rank.snapshots.committed == [1]
    assert "not complete on every rank" in caplog.text


# -- restoring --------------------------------------------------------------------------------------------------------


def test_a_fresh_state_is_version_zero_and_the_first_step_commits_it() -> None:
    rank = _Rank(2)
    rank.trainer.restore(_Stored(), -1)
    assert rank.snapshots.offered == [0]
    rank.trainer.fit()
    assert rank.snapshots.committed == [0, 1, 2]
    assert [report.committed for report in rank.watcher.reports] == [0, 1]


def test_a_restored_state_is_where_the_loop_goes_on() -> None:
    rank = _Rank(6)
    rank.trainer.restore(_Stored(), 4)
    assert rank.journal == ["RESTORE 4", "scalars {}", "refresh"]
    rank.trainer.fit()
    assert rank.noted("batch", "offer") == ["batch 4", "offer 5", "batch 5", "offer 6"]
    assert [(report.tokens, report.committed) for report in rank.watcher.reports] == [(45, 4), (50, 5)]


def test_a_state_that_is_taken_over_becomes_a_version_of_its_own_before_the_first_step() -> None:
    rank = _Rank(6, snapshot_every=4)
    rank.trainer.restore(_Stored(), 5, take_over=True)
    assert rank.snapshots.offered == [5], "whether or not its turn has come"
    rank.trainer.fit()
    assert rank.snapshots.committed[0] == 5


def test_a_finished_run_that_is_resumed_is_finished_at_once() -> None:
    rank = _Rank(4, evaluate_every=2)
    rank.trainer.restore(_Stored(), 4)
    rank.journal.clear()
    assert rank.trainer.fit() is Ending.FINISHED
    assert rank.noted("batch", "offer", "sum", "commit", "evaluate", "update") == []


def test_a_run_of_no_steps_still_leaves_its_initial_state() -> None:
    rank = _Rank(0)
    rank.trainer.restore(_Stored(), -1)
    assert rank.trainer.fit() is Ending.FINISHED
    assert rank.snapshots.offered == rank.snapshots.committed == [0]


def test_failpoints_surround_the_restore() -> None:
    rank = _Rank(4)
    for name in ("recovery.before_restore", "recovery.after_restore"):
        failpoints.arm(name, lambda name, version: rank.journal.append(f"{name} {version}"))
    rank.trainer.restore(_Stored(), 3)
    assert rank.noted("recovery.before_restore", "refresh", "recovery.after_restore") == [
        "recovery.before_restore 3",
        "refresh",
        "recovery.after_restore 3",
    ]


def test_a_version_that_is_not_there_is_no_state_to_start_from() -> None:
    rank = _Rank(4)
    with pytest.raises(InsufficientShards):
        rank.trainer.restore(MemorySnapshotter(), 3)
    assert rank.view.train == TrainState()


# -- real tensors -----------------------------------------------------------------------------------------------------

_STEPS = 7


class _Run:
    """A decoder with 8-bit AdamW whose loss depends on the random state, over snapshots that outlive it."""

    def __init__(
        self, snapshots: MemorySnapshotter, *, seed: int = 0, snapshot_every: int = 1, evaluate_every: int = 3
    ) -> None:
        torch.manual_seed(seed)
        self.engine = TinyEngine(seed, noise=0.1)
        self.snapshots, self.watcher = snapshots, MemoryWatcher()
        self.view = StateView(TrainState(), self.engine, rank=0)
        self.evaluations: dict[int, float] = {}
        parts = StepParts(
            engine=self.engine,
            comm=Alone(),
            snapshots=snapshots,
            watcher=self.watcher,
            learning_rate=lambda step: 1e-2 / (1 + step),
            snapshot_every=snapshot_every,
            epoch=0,
        )
        self.trainer = Trainer(self.view, parts, microbatches, Goal(_STEPS, evaluate_every, self._evaluate))

    def _evaluate(self, step: int) -> None:
        self.evaluations[step] = evaluate(self.engine, Alone(), microbatches(10**6), step)

    def history(self) -> list[tuple[int, str, str, int]]:
        """What may not differ by a bit."""
        return [(r.step, r.loss.hex(), r.grad_norm.hex(), r.tokens) for r in self.watcher.reports]


@pytest.fixture(scope="module")
def undisturbed() -> _Run:
    run = _Run(MemorySnapshotter())
    run.trainer.restore(run.snapshots, -1)
    assert run.trainer.fit() is Ending.FINISHED
    return run


def test_the_tiny_run_learns_and_its_state_is_worth_restoring(undisturbed: _Run) -> None:
    reports: list[StepReport] = undisturbed.watcher.reports
    assert reports[-1].loss < reports[0].loss - 0.05
    assert len({report.loss for report in reports}) == _STEPS
    codes = [bits for name, bits in undisturbed.engine.bits().items() if name.endswith("_codes")]
    assert codes
    assert all(len(set(some)) > 10 for some in codes)


def _fail_in(step: int) -> Callable[[str, int], None]:
    def fault(name: str, step_now: int) -> None:
        if step_now == step:
            raise ConnectionError(f"{name} {step}")

    return fault


@pytest.mark.parametrize("keeps_live", [False, True], ids=["", "live state kept"])
@pytest.mark.parametrize("make", [MemorySnapshotter, LateSnapshots])
@pytest.mark.parametrize("snapshot_every", [1, 3])
@pytest.mark.parametrize(
    ("place", "step"),
    [
        ("step.begin", 0),
        ("step.begin", 4),
        ("step.after_backward", 4),
        ("snapshot.before_commit", 3),
        ("snapshot.after_commit", 3),
        ("step.before_update", 4),
        ("step.after_update", 4),
        ("evaluate.begin", 6),
    ],
)
def test_a_run_that_goes_back_to_a_version_repeats_the_undisturbed_run_to_the_bit(
    undisturbed: _Run, make: type[MemorySnapshotter], snapshot_every: int, place: str, step: int, keeps_live: bool
) -> None:
    snapshots = make()
    first = _Run(snapshots, snapshot_every=snapshot_every)
    first.trainer.restore(snapshots, -1)
    with failpoints.armed(place, _fail_in(step)), pytest.raises(ConnectionError):
        first.trainer.fit()
    boundary = step + (place == "step.after_update")
    if keeps_live:
        assert first.trainer.keep_live() == boundary
    snapshots.fence()  # a version that was offered is complete, whoever died afterwards
    version = snapshots.versions[-1]
    assert version == boundary or not keeps_live
    second = _Run(snapshots, seed=99, snapshot_every=snapshot_every)  # fresh weights, moments and random numbers
    second.trainer.restore(snapshots, version)
    assert second.trainer.fit() is Ending.FINISHED
    assert step - snapshot_every < version <= step + 1
    assert first.history() == undisturbed.history()[: len(first.history())]
    assert second.history() == undisturbed.history()[version:]
    assert second.engine.bits() == undisturbed.engine.bits()
    assert torch.equal(second.view.capture().slices[-1].tensor, _last_random_state(undisturbed))
    # An evaluation that the fault itself interrupts is not made up for: the loop is beyond it.
    lost = {step} if place == "evaluate.begin" else set()
    assert first.evaluations | second.evaluations == {k: v for k, v in undisturbed.evaluations.items() if k not in lost}


def test_a_state_that_an_update_has_begun_to_change_is_not_kept() -> None:
    run = _Run(MemorySnapshotter(), snapshot_every=3)
    run.trainer.restore(run.snapshots, -1)

    def breaks(lr: float) -> float:
        raise ConnectionError(f"in the update at rate {lr}")

    run.engine.update = breaks  # type: ignore[method-assign]
    with pytest.raises(ConnectionError):
        run.trainer.fit()
    assert run.trainer.keep_live() == -1
    assert run.snapshots.versions == [0]


def _last_random_state(undisturbed: _Run) -> torch.Tensor:
    """The random state that the undisturbed run captured last; later captures would read the live one."""
    state = undisturbed.view.capture()
    undisturbed.snapshots.restore_into(state, _STEPS)
    return state.slices[-1].tensor


def test_a_resumed_finished_run_has_the_state_it_ended_with(undisturbed: _Run) -> None:
    again = _Run(undisturbed.snapshots, seed=5)
    again.trainer.restore(undisturbed.snapshots, _STEPS)
    assert again.trainer.fit() is Ending.FINISHED
    assert again.history() == []
    assert again.engine.bits() == undisturbed.engine.bits()
    assert undisturbed.snapshots.versions == [_STEPS]


def test_evaluating_on_the_way_changes_nothing(undisturbed: _Run) -> None:
    run = _Run(MemorySnapshotter(), evaluate_every=0)
    run.trainer.fit()
    assert run.evaluations == {}
    assert undisturbed.evaluations.keys() == {3, 6}
    assert run.history() == undisturbed.history()


def test_versions_never_go_back(undisturbed: _Run) -> None:
    """A trainer that goes back needs a new snapshotter or an empty one: this one refuses."""
    run = _Run(MemorySnapshotter())
    run.trainer.restore(run.snapshots, -1)
    with pytest.raises(InvariantViolation, match="version 0 is offered after 0"):
        run.trainer.restore(run.snapshots, -1)


def test_phases_of_a_run_follow_each_other(undisturbed: _Run) -> None:
    phases = [phase for phase, step in undisturbed.watcher.phases if step == 3]
    assert phases == [Phase.CAPTURE, Phase.EVALUATE, Phase.FORWARD_BACKWARD, Phase.FENCE, Phase.VOTE, Phase.UPDATE]


# -- steps that are not finite ----------------------------------------------------------------------------------------


class _Spoilt(TinyEngine):
    """NaN in one step's loss, or infinite gradients after a finite loss, as often as the step is tried."""

    quantity, step = "loss", 4

    def watch(self, view: StateView) -> None:
        self._view = view

    @property
    def _is_now(self) -> bool:
        return self._view.train.step == self.step

    def loss(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return super().loss(tokens, targets) * (math.nan if self._is_now and self.quantity == "loss" else 1.0)

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss * (math.inf if self._is_now and self.quantity == "gradient norm" else 1.0))


def _spoilt_run(quantity: str, snapshot_every: int, *, max_left_out: int = 1) -> tuple[_Run, list[dict[str, object]]]:
    run, notes = _Run(MemorySnapshotter(), snapshot_every=snapshot_every), list[dict[str, object]]()
    run.engine.__class__ = _Spoilt
    cast(_Spoilt, run.engine).watch(run.view)
    run.engine.quantity = quantity  # type: ignore[attr-defined]
    trainer = run.trainer
    trainer._parts = replace(trainer._parts, note=notes.append)
    trainer._goal = replace(trainer._goal, max_left_out=max_left_out)
    trainer.restore(run.snapshots, -1)
    return run, notes


@pytest.mark.parametrize("snapshot_every", [1, 3])
@pytest.mark.parametrize("quantity", ["loss", "gradient norm"])
def test_a_step_that_is_not_finite_is_left_out_and_leaves_no_trace(quantity: str, snapshot_every: int) -> None:
    wanted = _Run(MemorySnapshotter())
    wanted.view.train.left_out.add(4)
    wanted.trainer.restore(wanted.snapshots, -1)
    wanted.trainer.fit()
    run, notes = _spoilt_run(quantity, snapshot_every)
    assert run.trainer.fit() is Ending.FINISHED
    assert run.engine.bits() == wanted.engine.bits()
    assert sorted(set(run.history())) == sorted(wanted.history())
    version = 4 if snapshot_every == 1 else 3
    assert [(n["event"], n["step"], n["version"]) for n in notes] == [("step_left_out", 4, version)]
    assert quantity in str(notes[0]["reason"])


def test_what_was_left_out_stays_out_after_a_restart() -> None:
    run, _ = _spoilt_run("loss", 1)
    run.trainer.fit()
    again = _Run(run.snapshots)
    again.trainer.restore(run.snapshots, run.snapshots.versions[-1])
    assert again.view.train.left_out == {4}


@pytest.mark.parametrize("quantity", ["loss", "gradient norm"])
def test_without_leave_a_step_that_is_not_finite_is_a_fault(quantity: str) -> None:
    run, _ = _spoilt_run(quantity, 1, max_left_out=0)
    with pytest.raises(NonFiniteStep, match="step 4"):
        run.trainer.fit()


def test_snapshots_that_never_count_end_the_run_only_when_it_was_asked_for() -> None:
    class Never(MemorySnapshotter):
        def fence(self) -> CopyReport:
            return CopyReport(super().fence().version, False, why_not="the disk is on fire")

    notes: list[dict[str, object]] = []
    run = _Run(Never())
    run.trainer._parts = replace(run.trainer._parts, note=notes.append, rank=2)
    run.trainer.restore(run.snapshots, -1)
    run.trainer.fit()
    assert notes[0] == {"event": "snapshot_failed", "rank": 2, "version": 0, "reason": "the disk is on fire"}
    asked = _Run(Never())
    asked.trainer._parts = replace(asked.trainer._parts, max_age_steps=3)
    asked.trainer.restore(asked.snapshots, -1)
    with pytest.raises(SnapshotError, match=r"no version since -1 counts.*snapshot\.max_age_steps=3"):
        asked.trainer.fit()
    assert asked.view.train.step == 3
