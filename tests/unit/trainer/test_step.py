"""One step: in which order it asks whom, what the ranks agree on, and what a refused step leaves alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack

import pytest
import torch

from holdfast import failpoints
from holdfast.errors import Abort, NonFiniteStep
from holdfast.parallel.microbatches import Microbatch
from holdfast.trainer.state import StateView, TrainState
from holdfast.trainer.step import Pending, StepParts, offer, train_step, vote
from holdfast.types import StepReport
from tests.support.tiny_training import (
    Journal,
    NotingEngine,
    NotingSnapshots,
    NotingWatcher,
    Scripted,
    Threads,
    TinyEngine,
    microbatches,
)

_NAMED = [name for name in failpoints.NAMES if name.startswith("step.") or name.endswith("_commit")]


def _batch(sequences: int = 1, byte_targets: int = 4) -> Microbatch:
    """Five targets per sequence."""
    return torch.zeros(sequences, 5, dtype=torch.int64), torch.zeros(sequences, 5, dtype=torch.int64), byte_targets


class _Rank:
    """One rank with stand-ins for everything around its steps."""

    def __init__(
        self,
        *,
        world: int = 1,
        others: Sequence[Sequence[float]] = ((0.0, 0.0, 0.0, 0.0, 0.0),),
        losses: Sequence[float] = (2.0,),
        skips: Sequence[int] = (),
        snapshot_every: int = 1,
        fence_s: float = 0.0,
        step: int = 0,
    ) -> None:
        self.journal: Journal = []
        self.engine = NotingEngine(self.journal, losses)
        self.snapshots = NotingSnapshots(self.journal, skips=skips, fence_s=fence_s)
        self.watcher = NotingWatcher(self.journal)
        self.view = StateView(TrainState(step=step), self.engine, rank=0)
        self.pending = Pending()
        self.parts = StepParts(
            engine=self.engine,
            comm=Scripted(world, others, self.journal),
            snapshots=self.snapshots,
            watcher=self.watcher,
            learning_rate=lambda step: 0.1 * (step + 1),
            snapshot_every=snapshot_every,
            epoch=6,
        )

    def step(self, batch: Sequence[Microbatch] = (_batch(),)) -> StepReport:
        return train_step(self.view, batch, self.parts, self.pending)[0]

    def stops(self) -> bool:
        return train_step(self.view, [_batch()], self.parts, self.pending)[1]


# -- order ------------------------------------------------------------------------------------------------------------


def test_the_step_waits_at_the_fence_then_votes_then_commits_then_updates_then_offers() -> None:
    rank = _Rank(step=4)
    rank.step()
    rank.journal.clear()
    rank.step([_batch(), _batch()])
    assert rank.journal == [
        *("FORWARD_BACKWARD 5", "loss", "backward", "loss", "backward"),
        *("FENCE 5", "fence"),
        *("VOTE 5", "check", "sum", "commit 5"),
        *("UPDATE 5", "update"),
        *("CAPTURE 6", "offer 6"),
    ]


def test_failpoints_are_where_their_names_say() -> None:
    rank = _Rank()
    rank.step()
    rank.journal.clear()
    with ExitStack() as armed:
        for name in _NAMED:
            armed.enter_context(failpoints.armed(name, lambda name, step: rank.journal.append(f"{name} {step}")))
        rank.step()
    kept = (*_NAMED, "backward", "sum", "update")
    assert [entry for entry in rank.journal if entry.split()[0] in kept] == [
        *("step.begin 1", "backward", "step.after_backward 1", "sum"),
        *("snapshot.before_commit 1", "snapshot.after_commit 1"),
        *("step.before_update 1", "update", "step.after_update 1"),
    ]


def test_the_offered_state_is_the_one_after_the_update() -> None:
    rank = _Rank()
    seen: list[tuple[object, float]] = []
    take = rank.snapshots.offer

    def offered(state, version):  # type: ignore[no-untyped-def]  # the signature of offer
        seen.append((state.scalars["step"], state.slices[0].tensor[0].item()))
        return take(state, version)

    rank.snapshots.offer = offered  # type: ignore[method-assign]
    rank.step()
    rank.step()
    assert seen == [(1, 1.0), (2, 2.0)]


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_all_targets_of_all_microbatches_and_ranks() -> None:
    # Here 5 targets at 2 nats and 15 at 4, elsewhere 40 targets with 60 nats, 30 of them bytes.
    rank = _Rank(world=2, others=[(60.0, 40.0, 30.0, 0.0, 0.0)], losses=(2.0, 4.0))
    report = rank.step([_batch(1, byte_targets=4), _batch(3, byte_targets=12)])
    assert report.loss == pytest.approx((10 + 60 + 60) / 60)
    assert report.bits_per_byte == pytest.approx(130 / math.log(2) / 46)
    assert report.tokens == 60
    assert rank.step([_batch(2)]).tokens == 60 + 50


def test_targets_without_a_single_byte_have_no_bits_per_byte() -> None:
    assert _Rank().step([_batch(byte_targets=0)]).bits_per_byte == 0.0


@pytest.mark.parametrize("count", [2, 4])
def test_microbatches_of_equal_size_add_up_to_the_gradient_of_the_whole_batch(count: int) -> None:
    batch = microbatches(0, count=4, size=2)
    tokens, targets = (torch.cat([part[i] for part in batch]) for i in (0, 1))  # type: ignore[misc]  # tensors both
    whole, split = TinyEngine(3, accumulation=1), TinyEngine(3, accumulation=count)
    whole.backward(whole.loss(tokens, targets))
    for some_tokens, some_targets in zip(tokens.chunk(count), targets.chunk(count), strict=True):
        split.backward(split.loss(some_tokens, some_targets))
    for (name, a), (_, b) in zip(whole.model.named_parameters(), split.model.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_every_rank_sees_the_same_loss() -> None:
    ranks = Threads(3)

    def body(number: int) -> float:
        view = StateView(TrainState(), engine := NotingEngine([], [1.5 * number]), rank=number)
        parts = StepParts(engine, ranks, NotingSnapshots([]), NotingWatcher([]), lambda _: 0.1, 1, 0)
        return train_step(view, [_batch(number + 1)], parts, Pending())[0].loss

    assert ranks.run(body) == [pytest.approx((5 * 0 + 10 * 1.5 + 15 * 3.0) / 30)] * 3


# -- refused steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["here", "elsewhere"])
def test_a_loss_that_is_not_finite_changes_nothing_on_any_rank(loss: float, place: str) -> None:
    rank = _Rank(
        world=2,
        others=[(10.0, 5.0, 4.0, 0.0, 0.0), (10.0 if place == "here" else loss, 5.0, 4.0, 1.0, 0.0)],
        losses=(2.0, loss if place == "here" else 2.0),
    )
    rank.step()
    with pytest.raises(NonFiniteStep) as found:
        rank.step()
    assert found.value.step == 1
    assert not math.isfinite(found.value.value)
    assert rank.engine.weight.tolist() == [1.0] * 3
    assert rank.view.train == TrainState(step=1, tokens=10)
    assert rank.snapshots.offered == [1]
    assert rank.snapshots.committed == [1]  # the version before is sound, and every rank holds it


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_state_that_a_gradient_without_end_has_spoiled_is_offered_to_nobody(
    norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipped by an infinite norm, every gradient is zero or NaN, while the loss may stay finite for ever."""
    rank = _Rank()
    rank.step()
    monkeypatch.setattr(rank.engine, "update", lambda rate: norm)
    with pytest.raises(NonFiniteStep, match=f"gradient norm={norm} at step 1 is not finite"):
        rank.step()
    assert rank.view.train == TrainState(step=1, tokens=5)
    assert rank.snapshots.offered == [1]


def test_a_rank_that_has_to_leave_enters_no_collective() -> None:
    rank = _Rank()
    rank.watcher.interruption = Abort("the epoch is over")
    with pytest.raises(Abort):
        rank.step()
    assert rank.journal[-2:] == ["VOTE 0", "check"]
    assert rank.view.train.step == 0


@pytest.mark.parametrize("name", ["step.begin", "step.after_backward", "snapshot.before_commit", "step.before_update"])
def test_a_fault_before_the_update_leaves_the_state_alone(name: str) -> None:
    def fault(*_: object) -> None:
        raise ConnectionError(name)

    rank = _Rank()
    rank.step()
    with failpoints.armed(name, fault), pytest.raises(ConnectionError):
        rank.step()
    assert rank.engine.weight.tolist() == [1.0] * 3
    assert rank.view.train.step == 1


# -- the vote on versions ---------------------------------------------------------------------------------------------


def test_a_version_is_committed_by_the_vote_of_the_next_step() -> None:
    rank = _Rank()
    assert [rank.step().committed for _ in range(3)] == [-1, 1, 2]
    assert rank.snapshots.committed == [1, 2]


@pytest.mark.parametrize(("others_hold", "is_committed"), [(2.0, True), (1.0, False), (0.0, False)])
def test_a_version_is_committed_only_if_every_rank_holds_it(others_hold: float, is_committed: bool) -> None:
    rank = _Rank(world=3, others=[(0.0, 0.0, 0.0, others_hold, 0.0)])
    rank.pending = Pending(version=4, is_held=True, restored=3)
    rank.snapshots.held = [3, 4]
    verdict = vote([1.0, 1.0, 1.0], rank.parts, rank.pending, 4)
    assert verdict.is_held_by_all is is_committed
    assert rank.snapshots.committed == ([4] if is_committed else [])
    assert (rank.pending.is_held, rank.pending.held_by_all) == ((False, 4) if is_committed else (True, -1))


def test_a_rank_that_lacks_the_version_keeps_all_others_from_committing_it() -> None:
    rank = _Rank(world=3, others=[(0.0, 0.0, 0.0, 2.0, 0.0)])
    rank.pending = Pending(version=4, is_held=False, restored=3)
    assert not vote([1.0, 1.0, 1.0], rank.parts, rank.pending, 4).is_held_by_all
    assert rank.snapshots.committed == []
    assert rank.snapshots.newest_committed == -1


def test_a_skipped_version_is_never_committed_and_the_next_one_is() -> None:
    rank = _Rank(skips=[2])
    reports = [rank.step() for _ in range(4)]
    assert [report.committed for report in reports] == [-1, 1, 1, 3]
    assert [report.copy_bytes > 0 for report in reports] == [True, False, True, True]
    assert rank.snapshots.committed == [1, 3]


def test_ranks_in_threads_commit_the_same_versions_when_one_of_them_skips_some() -> None:
    ranks = Threads(2)

    def body(number: int) -> list[int]:
        snapshots = NotingSnapshots([], skips=[2, 3] if number else [5])
        view = StateView(TrainState(), engine := NotingEngine([]), rank=number)
        parts = StepParts(engine, ranks, snapshots, NotingWatcher([]), lambda _: 0.1, 1, 0)
        pending = Pending()
        for _ in range(7):
            train_step(view, [_batch()], parts, pending)
        return snapshots.committed

    assert ranks.run(body) == [[1, 4, 6], [1, 4, 6]]


def test_between_wanted_versions_nothing_is_offered_and_nothing_committed_twice() -> None:
    rank = _Rank(snapshot_every=3)
    reports = [rank.step() for _ in range(7)]
    assert rank.snapshots.offered == [3, 6]
    assert rank.snapshots.committed == [3, 6]
    assert [report.committed for report in reports] == [-1, -1, -1, 3, 3, 3, 6]
    assert [report.copy_bytes > 0 for report in reports] == [False, False, True, False, False, True, False]
    assert rank.journal.count("fence") == 7


def test_a_version_that_a_rank_lacks_is_not_committed_later_under_another_number() -> None:
    lacks, holds = (10.0, 5.0, 4.0, 0.0, 0.0), (10.0, 5.0, 4.0, 1.0, 0.0)
    rank = _Rank(world=2, others=[lacks, lacks, lacks, lacks, holds, lacks], snapshot_every=2)
    reports = [rank.step() for _ in range(6)]
    assert rank.snapshots.offered == [2, 4, 6]
    assert rank.snapshots.committed == [4]
    assert [report.committed for report in reports] == [-1, -1, -1, -1, 4, 4]


def test_an_offer_that_is_not_due_asks_nobody() -> None:
    rank = _Rank(step=5, snapshot_every=4)
    assert offer(rank.view, rank.parts, rank.pending, has_room=True) == 0.0
    assert rank.journal == []


# -- stopping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("here", "elsewhere"), [(True, 0.0), (False, 1.0), (True, 2.0)])
def test_one_rank_that_was_asked_to_stop_stops_all_after_the_step(here: bool, elsewhere: float) -> None:
    rank = _Rank(world=3, others=[(0.0, 0.0, 0.0, 0.0, elsewhere)])
    rank.watcher.stop = here
    assert rank.stops()
    assert rank.view.train.step == 1
    assert rank.snapshots.offered == [1]


def test_nobody_stops_unasked() -> None:
    assert not _Rank().stops()


# -- the report -------------------------------------------------------------------------------------------------------


def test_the_report_says_what_the_step_did() -> None:
    rank = _Rank(step=8, fence_s=0.25)
    report = rank.step()
    assert (report.step, report.epoch, report.loss, report.tokens, report.grad_norm) == (9, 6, 2.0, 5, 0.5)
    assert report.learning_rate == pytest.approx(0.9)
    assert rank.engine.rates == [report.learning_rate]
    assert report.stall_s >= 0.25
    assert 0 < report.step_s < 60
    assert report.copy_bytes == 3 * 4 + torch.get_rng_state().numel()


def test_the_seconds_that_taking_the_state_costs_count_as_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(float(n) ** 2 for n in range(1, 100))
    monkeypatch.setattr("holdfast.trainer.step.time.perf_counter", lambda: next(now))
    rank = _Rank(fence_s=100.0)
    report = rank.step()
    # The step looks at the clock when it starts (1), around the offer (4 and 9) and when it ends (16).
    assert (report.stall_s, report.step_s) == (105.0, 15.0)
