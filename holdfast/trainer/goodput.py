"""How much of a run's time made steps that count."""

from __future__ import annotations

from holdfast.types import StepReport

__all__ = ["GoodputMeter"]


class GoodputMeter:
    """Of one attempt. A step that is done again counts once; waiting for the snapshotter, starts, repairs, evaluations
    and checkpoints do not count. Seconds are of one clock, the caller's."""

    def __init__(self, began_s: float) -> None:
        self._began_s = began_s
        self._productive_s = 0.0
        self._step = -1

    def note(self, report: StepReport) -> None:
        if report.step > self._step:
            self._step = report.step
            self._productive_s += max(report.step_s - report.stall_s, 0.0)

    def ratio(self, now_s: float) -> float:
        """Between 0 and 1."""
        elapsed_s = now_s - self._began_s
        return min(self._productive_s / elapsed_s, 1.0) if elapsed_s > 0 else 0.0
