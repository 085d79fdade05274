"""What a run says about the cost of its snapshots."""

from __future__ import annotations

import pytest

from holdfast.trainer.snapshot_cost import CostMeter
from holdfast.types import StepReport


def _report(step: int, *, step_s: float, copy_s: float = 0.0, stall_s: float = 0.0, epoch: int = 1) -> StepReport:
    return StepReport(step, epoch, 1.5, 2.5, 1e-3, 0.7, 64 * step, step_s, stall_s, 9000, step - 1, copy_s)


def _fed(*reports: StepReport) -> CostMeter:
    meter = CostMeter()
    for report in reports:
        meter.note(report)
    return meter


def test_without_a_copy_there_is_nothing_to_say() -> None:
    assert _fed(*[_report(step, step_s=1.0) for step in range(9)]).cost() is None


def test_medians_are_over_steps_beside_a_copy_and_slowdown_compares_both_kinds() -> None:
    warm_up = [_report(step, step_s=50.0, copy_s=9.0) for step in (1, 2)]
    beside = [_report(3 + i, step_s=1.02, copy_s=0.1 + i / 100, stall_s=0.0102) for i in range(5)]
    without = [_report(20 + i, step_s=1.0) for i in range(5)]
    cost = _fed(*warm_up, *beside, *without).cost()
    assert cost is not None
    assert (cost.steps, cost.copy_s) == (5, pytest.approx(0.12))
    assert cost.stall_share == pytest.approx(0.01)
    assert cost.slowdown == pytest.approx(0.02)


def test_a_run_that_takes_a_version_every_step_cannot_know_its_slowdown() -> None:
    cost = _fed(*[_report(step, step_s=1.0, copy_s=0.1) for step in range(9)]).cost()
    assert cost is not None
    assert cost.slowdown is None


def test_each_epoch_warms_up_anew() -> None:
    steps = [_report(step, step_s=1.0, copy_s=0.1) for step in (1, 2, 3)]
    again = [_report(step, step_s=90.0, copy_s=0.1, epoch=2) for step in (3, 4)]
    cost = _fed(*steps, *again).cost()
    assert cost is not None
    assert cost.steps == 1
