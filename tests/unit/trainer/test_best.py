"""The best state that evaluations have seen: which it is, that no fault changes it, and when it ends the training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import pytest
import torch

from holdfast import failpoints
from holdfast.errors import Abort
from holdfast.fault_tolerance.snapshot import MemorySnapshotter
from holdfast.trainer.best import BestState, EndRules
from holdfast.trainer.loop import Ending, Goal, Trainer
from holdfast.trainer.observers import MemoryWatcher
from holdfast.trainer.state import StateView, TrainState
from holdfast.trainer.step import StepParts
from tests.support.tiny_training import Alone, LateSnapshots, TinyEngine, microbatches

BITS = {3: 2.0, 6: 1.0, 9: 1.5, 12: 1.0}
"""What evaluations tell. The one of step 12 is no better than that of step 6."""


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.disarm()


class _Rank:
    """A real engine, and evaluations that tell what they are told to."""

    def __init__(self, snapshots: MemorySnapshotter, rules: EndRules | None = None, steps: int = 12) -> None:
        torch.manual_seed(5)
        self.engine = TinyEngine(noise=0.1)
        self.best = BestState(self.engine, rules or EndRules())
        self.view = StateView(TrainState(), self.engine, rank=0, best=self.best)
        self.bits: Mapping[int, float] = BITS
        parts = StepParts(self.engine, Alone(), snapshots, MemoryWatcher(), lambda _: 1e-2, 1, 0, judge=self._judge)
        self.trainer = Trainer(self.view, parts, microbatches, Goal(steps, 0, lambda _: None))

    def _judge(self, step: int) -> None:
        if step in self.bits:
            self.best.judge(step, self.bits[step])

    def run(self, snapshots: MemorySnapshotter, version: int = -1) -> Ending:
        self.trainer.restore(snapshots, version)
        return self.trainer.fit()

    def state(self) -> tuple[dict[str, bytes], dict[str, object]]:
        state = self.view.capture()
        return {s.spec.name: s.tensor.view(torch.uint8).numpy().tobytes() for s in state.slices}, dict(state.scalars)


def _run(rules: EndRules | None = None, steps: int = 12, bits: Mapping[int, float] = BITS) -> _Rank:
    snapshots = LateSnapshots()
    rank = _Rank(snapshots, rules, steps)
    rank.bits = bits
    assert rank.run(snapshots) is Ending.FINISHED
    return rank


def test_what_is_put_back_is_the_state_that_an_undisturbed_run_had_at_that_step() -> None:
    until_six, whole = _run(steps=6, bits={}).engine.bits(), _run()
    assert (whole.best.step, whole.best.bits) == (6, 1.0)
    masters = [name for name in until_six if name.endswith("/master")]
    assert any(whole.engine.bits()[name] != until_six[name] for name in masters)
    whole.best.put_back()
    assert all(whole.engine.bits()[name] == until_six[name] for name in masters)


@pytest.mark.parametrize(
    ("point", "step"),
    [
        ("step.after_update", 5),  # the evaluation that was best is made, and no version holds it yet
        ("step.before_update", 6),
        ("step.after_update", 8),
        ("step.before_update", 10),
    ],
)
def test_a_rank_that_dies_and_is_restored_keeps_the_same_best_state(point: str, step: int) -> None:
    expected = _run().state()
    snapshots = LateSnapshots()
    dead = _Rank(snapshots)

    def die(_: str, at: int) -> None:
        if at == step:
            raise Abort

    failpoints.arm(point, die)
    with pytest.raises(Abort):
        dead.run(snapshots)
    failpoints.disarm()
    again = _Rank(snapshots)
    assert again.run(snapshots, snapshots.newest_committed) is Ending.FINISHED
    assert again.state() == expected


def test_nobody_goes_on_with_a_state_that_was_being_judged() -> None:
    snapshots = LateSnapshots()
    rank = _Rank(snapshots)
    real = rank.best.judge

    def torn(step: int, bits: float) -> None:
        real(step, bits)
        raise Abort

    rank.best.judge = torn  # type: ignore[method-assign]
    with pytest.raises(Abort):
        rank.run(snapshots)
    assert rank.trainer.keep_live() == -1
    whole = _run()
    assert whole.trainer.keep_live() == 12
    whole.trainer.give_up_live()
    assert whole.trainer.keep_live() == -1


@pytest.mark.parametrize(
    ("rules", "bits", "end", "best", "word"),
    [
        (EndRules(spike=0.4), BITS, 9, 6, "step 9 with 1.500 bits per byte was more than 0.4 above the best, 1.000"),
        (EndRules(spike=0.6), BITS, 12, 6, ""),
        (EndRules(), {3: 2.0, 6: math.nan}, 6, 3, "step 6 with nan"),
        (EndRules(), {3: math.nan}, 3, -1, "step 3 with nan"),
        (EndRules(patience=2), {2: 1.0, 4: 1.0, 6: 0.9, 8: 1.0, 10: 0.9}, 10, 6, "2 evaluations until step 10"),
    ],
)
def test_training_ends_at_a_spike_or_without_improvement(
    rules: EndRules, bits: Mapping[int, float], end: int, best: int, word: str
) -> None:
    rank = _run(rules, bits=bits)
    assert (rank.view.train.step, rank.best.step) == (end, best)
    assert word in rank.best.ended and bool(word) == rank.view.is_over


def test_a_run_that_evaluations_have_ended_stays_ended_when_it_is_restored() -> None:
    snapshots = LateSnapshots()
    rules = EndRules(spike=0.4)
    assert _Rank(snapshots, rules).run(snapshots) is Ending.FINISHED
    again = _Rank(snapshots, rules)
    again.run(snapshots, snapshots.newest_committed)
    assert (again.view.train.step, again.best.step) == (9, 6)
