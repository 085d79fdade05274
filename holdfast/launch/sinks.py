"""Whom the driver tells what happens: files, tracker, metrics, console, and its own log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from holdfast.events import Evaluated, Event, EventSink, FaultDetected
from holdfast.launch.console import Console
from holdfast.launch.metrics_export import MetricsExport
from holdfast.launch.records import JsonlEvents
from holdfast.launch.run_dir import RunDir
from holdfast.trainer.metrics import MetricsFile
from holdfast.trainer.snapshot_cost import CostMeter
from holdfast.trainer.trackers import Tracker
from holdfast.types import StepReport

__all__ = ["Sinks", "driver_log"]


class Sinks(EventSink):
    """Whoever wants to know what happens: the files first, because they are the truth."""

    def __init__(
        self, run_dir: RunDir, attempt: int, console: Console, tracker: Tracker, export: MetricsExport
    ) -> None:
        self._run_dir, self._attempt, self._console, self._tracker = run_dir, attempt, console, tracker
        self._events = JsonlEvents(run_dir.events_file)
        self._metrics = MetricsFile(run_dir.metrics_file, attempt=attempt)
        self._cost, self.export = CostMeter(), export

    def conclude(self) -> None:
        """What snapshots have cost, once nothing more will come."""
        cost = self._cost.cost()
        if cost is not None:
            self.emit(cost)

    def emit(self, event: Event) -> None:
        self._events.emit(event)
        if isinstance(event, Evaluated):
            self._metrics.note({"step": event.step, "validation_bits_per_byte": event.bits_per_byte})
        if isinstance(event, FaultDetected):
            self._keep_evidence(event)
        self._tracker.emit(event)
        self.export.emit(event)
        self._console.emit(event)

    def step(self, report: StepReport) -> None:
        self._cost.note(report)
        self._metrics.write(report)
        self._tracker.log_step(report)
        self.export.step(report)
        self._console.step(report)

    def _keep_evidence(self, fault: FaultDetected) -> None:
        logs = [self._run_dir.rank_log(rank, self._attempt) for rank in fault.ranks]
        self._run_dir.record_failure(fault.number, asdict(fault), [*logs, self._run_dir.driver_log(self._attempt)])


@contextmanager
def driver_log(path: Path) -> Iterator[None]:
    """Send the log of this package, and of nothing else, to the attempt's file."""
    package, handler = logging.getLogger("holdfast"), _LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = package.level, package.propagate
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    package.propagate = False
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.level, package.propagate = before
        with contextlib.suppress(OSError):  # what the disk has no room for is lost; the run's end is not
            handler.close()


class _LogFile(logging.FileHandler):
    """Leaves out what cannot be written. Its troubles belong neither on the console nor to the run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  # logging's name
        """Called where ``emit`` has failed."""
