"""What Prometheus learns of a run: the names, and the numbers behind them. No thread, no clock, no ray.

Ray exports them as ``ray_`` + name on the port of the driver's node. Seconds are gauges: Ray's histograms sum the
middles of their buckets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from holdfast.events import Event, FaultDetected, PreemptionNoticed, Protection, RecoveryDone, RunStarted, StopRequested
from holdfast.fault_tolerance.protection import DEGRADED, FULL, REDUCED
from holdfast.trainer.goodput import GoodputMeter
from holdfast.types import StepReport

__all__ = ["METRICS", "Meter", "Metric", "RunMetrics", "Sample"]

_LEVELS = {DEGRADED: 0.0, REDUCED: 1.0, FULL: 2.0}


@dataclass(frozen=True, slots=True)
class Metric:
    """One name. ``is_counter``: it only grows, and a meter is told by how much."""

    name: str
    description: str
    is_counter: bool = False
    tags: tuple[str, ...] = ("run_id", "attempt")


_KIND = ("run_id", "attempt", "kind")
METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("holdfast_step", "Optimizer steps finished"),
        Metric("holdfast_loss", "Mean negative log-likelihood of the newest step, nats per token"),
        Metric("holdfast_tokens_per_s", "Tokens of the newest step by its seconds"),
        Metric("holdfast_last_step_timestamp_seconds", "When the newest step was finished, Unix time"),
        Metric("holdfast_snapshot_age_seconds", "Age of the newest state that every rank holds in memory"),
        Metric("holdfast_snapshot_seconds", "Copying the newest version took, beside a step"),
        Metric("holdfast_parity_seconds", "Computing the newest parity took, in the slowest keeper"),
        Metric("holdfast_recovery_seconds", "From the newest fault's detection to the first new step"),
        Metric("holdfast_protection_level", "2 everything in place, 1 a spare or parity is missing, 0 recovering"),
        Metric("holdfast_failure_budget_left", "Failures that recovery.max_failures still allows"),
        Metric("holdfast_goodput_ratio", "Share of the attempt's time that made steps that count"),
        Metric("holdfast_failures_total", "Faults by what was lost: worker or keeper", is_counter=True, tags=_KIND),
        Metric("holdfast_preemptions_total", "Notices that the driver or a node will be taken away", is_counter=True),
        Metric("holdfast_lost_steps_total", "Steps that had to be done again", is_counter=True),
    )
}


@dataclass(frozen=True, slots=True)
class Sample:
    """The value of a metric now; of a counter, since the attempt began."""

    metric: Metric
    tags: Mapping[str, str]
    value: float


class Meter(Protocol):
    """Takes numbers to where Prometheus finds them. One thread calls it; it may raise anything."""

    def set(self, metric: Metric, tags: Mapping[str, str], value: float) -> None: ...

    def add(self, metric: Metric, tags: Mapping[str, str], amount: float) -> None: ...


class RunMetrics:
    """The numbers of one attempt. Times are Unix seconds and come from the caller."""

    def __init__(self, *, run_id: str, attempt: int, max_failures: int) -> None:
        self._tags = {"run_id": run_id, "attempt": str(attempt)}
        self._max_failures = max_failures
        self._values: dict[str, float] = {
            "holdfast_protection_level": _LEVELS[FULL],
            "holdfast_failure_budget_left": float(max_failures),
            "holdfast_preemptions_total": 0.0,
            "holdfast_lost_steps_total": 0.0,
        }
        self._failures = {"worker": 0, "keeper": 0}
        self._goodput: GoodputMeter | None = None
        self._open: deque[tuple[int, float]] = deque()
        """Steps that no committed version covers yet, each with when it was finished."""
        self._held_s: float | None = None

    def step(self, report: StepReport, now_s: float) -> None:
        values = {
            "step": float(report.step),
            "loss": report.loss,
            "last_step_timestamp_seconds": now_s,
            # The batch is the same in every step.
            "tokens_per_s": report.tokens / max(report.step, 1) / report.step_s if report.step_s > 0 else 0.0,
        }
        if report.copy_s > 0:
            values["snapshot_seconds"] = report.copy_s
        self._values |= {f"holdfast_{name}": value for name, value in values.items()}
        self._follow_versions(report, now_s)
        if self._goodput is not None:
            self._goodput.note(report)

    def _follow_versions(self, report: StepReport, now_s: float) -> None:
        while self._open and self._open[-1][0] >= report.step:  # rolled back
            self._open.pop()
        self._open.append((report.step, now_s))
        while self._open and self._open[0][0] <= report.committed:
            self._held_s = self._open.popleft()[1]

    def event(self, event: Event, now_s: float) -> None:
        if isinstance(event, RunStarted):
            self._goodput = GoodputMeter(now_s)
        elif isinstance(event, FaultDetected) and not event.is_preemption:
            self._failures["worker" if event.ranks else "keeper"] += 1
            left = self._max_failures - sum(self._failures.values())
            self._values["holdfast_failure_budget_left"] = float(max(left, 0))
        elif isinstance(event, RecoveryDone):
            self._values["holdfast_recovery_seconds"] = event.repaired_in_s
            self._values["holdfast_lost_steps_total"] += event.steps_lost
        elif isinstance(event, Protection):
            self._values["holdfast_protection_level"] = _LEVELS.get(event.level, 0.0)
        elif isinstance(event, PreemptionNoticed) or (isinstance(event, StopRequested) and event.is_notice):
            self._values["holdfast_preemptions_total"] += 1

    def samples(self, now_s: float, *, parity_s: float) -> Iterator[Sample]:
        """What is known now. ``parity_s``: how long the keepers took for the newest parity, 0 without any."""
        values = dict(self._values)
        if parity_s > 0:
            values["holdfast_parity_seconds"] = parity_s
        if self._held_s is not None:
            values["holdfast_snapshot_age_seconds"] = max(now_s - self._held_s, 0.0)
        if self._goodput is not None:
            values["holdfast_goodput_ratio"] = self._goodput.ratio(now_s)
        for name, value in values.items():
            yield Sample(METRICS[name], self._tags, value)
        for kind, count in self._failures.items():
            yield Sample(METRICS["holdfast_failures_total"], {**self._tags, "kind": kind}, float(count))
