"""Takes a run's numbers to Prometheus in a thread of its own, which the run neither waits nor ends for."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from holdfast.events import Event
from holdfast.launch.run_metrics import Meter, RunMetrics, Sample
from holdfast.types import StepReport

__all__ = ["MetricsExport"]

logger = logging.getLogger(__name__)

_INTERVAL_S = 2.0
_FAREWELL_S = 2.0


class MetricsExport:
    """An event sink and step observer; without a meter it does nothing but listen."""

    def __init__(self, metrics: RunMetrics, clock: Callable[[], float] = time.time) -> None:
        self._metrics, self._clock = metrics, clock
        self._lock = threading.Lock()
        self._told: dict[tuple[str, str], float] = {}
        """Of counters, by name and kind."""
        self._has_failed = False

    def emit(self, event: Event) -> None:
        with self._lock:
            self._metrics.event(event, self._clock())

    def step(self, report: StepReport) -> None:
        with self._lock:
            self._metrics.step(report, self._clock())

    @contextmanager
    def to(self, meter: Meter | None, *, parity_s: Callable[[], float]) -> Iterator[None]:
        """Export inside a ``with`` block. ``parity_s``: see :meth:`RunMetrics.samples`."""
        if meter is None:
            yield
            return
        over = threading.Event()
        thread = threading.Thread(target=self._run, args=(meter, parity_s, over), name="holdfast-metrics", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(_FAREWELL_S)

    def _run(self, meter: Meter, parity_s: Callable[[], float], over: threading.Event) -> None:
        while not over.wait(_INTERVAL_S):
            self.export(meter, parity_s())
        self.export(meter, parity_s())

    def export(self, meter: Meter, parity_s: float) -> None:
        """Everything, once. What cannot be exported is logged the first time."""
        with self._lock:
            samples = list(self._metrics.samples(self._clock(), parity_s=parity_s))
        try:
            for sample in samples:
                self._tell(meter, sample)
        except Exception as error:  # a thread's boundary: the driver's log learns of it, the run goes on
            if not self._has_failed:
                logger.warning("metrics are not exported: %s: %s", type(error).__name__, error)
            self._has_failed = True

    def _tell(self, meter: Meter, sample: Sample) -> None:
        if not sample.metric.is_counter:
            meter.set(sample.metric, sample.tags, sample.value)
            return
        key = sample.metric.name, sample.tags.get("kind", "")
        grown = sample.value - self._told.get(key, 0.0)
        if grown > 0:  # Ray refuses anything else
            meter.add(sample.metric, sample.tags, grown)
            self._told[key] = sample.value
