"""What snapshots have cost a run so far, from its step reports."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

from holdfast.events import SnapshotCost
from holdfast.types import StepReport

__all__ = ["CostMeter"]

_WINDOW = 1000
"""Newest steps of each kind that count."""
_ENOUGH = 5
"""Steps of each kind before anything is said about slowdown."""


class CostMeter:
    """Fed with every finished step. The first steps of an epoch, which warm everything up, do not count."""

    def __init__(self) -> None:
        self._beside, self._without = deque[StepReport](maxlen=_WINDOW), deque[float](maxlen=_WINDOW)
        self._epoch, self._skip = -1, 0

    def note(self, report: StepReport) -> None:
        if report.epoch != self._epoch:
            self._epoch, self._skip = report.epoch, 2
        if self._skip:
            self._skip -= 1
        elif report.copy_s > 0:
            self._beside.append(report)
        else:
            self._without.append(report.step_s)

    def cost(self) -> SnapshotCost | None:
        """None before a step has run beside a copy."""
        if not self._beside:
            return None
        return SnapshotCost(
            steps=len(self._beside),
            stall_s=_median(report.stall_s for report in self._beside),
            stall_share=_median(report.stall_s / report.step_s for report in self._beside),
            copy_s=_median(report.copy_s for report in self._beside),
            slowdown=self._slowdown(),
        )

    def _slowdown(self) -> float | None:
        """Steps with a copy beside them against steps without; a run that takes a version every step has none."""
        if len(self._without) < _ENOUGH or len(self._beside) < _ENOUGH:
            return None
        return _median(report.step_s for report in self._beside) / median(self._without) - 1


def _median(values: Iterable[float]) -> float:
    return median(list(values))
