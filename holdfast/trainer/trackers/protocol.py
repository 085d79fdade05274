"""What a tracker is to the driver, and those that need no process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from holdfast.events import Event
from holdfast.types import StepReport

__all__ = ["MemoryTracker", "NullTracker", "SeveralTrackers", "Tracker"]


class Tracker(Protocol):
    """Follows a run from the driver's thread; an event sink. Only ``finish`` may block, and not for long."""

    def start(self, endpoints: Mapping[str, str]) -> None:
        """Once the processes of the run are up. ``endpoints``: URLs where nodes export metrics, by the node's name."""
        ...

    def log_step(self, report: StepReport) -> None: ...

    def emit(self, event: Event) -> None: ...

    def finish(self) -> None:
        """Bring what was logged home, as far as the configured seconds allow. May be called again."""
        ...


class NullTracker:
    """Follows nothing."""

    def start(self, endpoints: Mapping[str, str]) -> None:
        return

    def log_step(self, report: StepReport) -> None:
        return

    def emit(self, event: Event) -> None:
        return

    def finish(self) -> None:
        return


class MemoryTracker:
    """Keeps everything, for tests and notebooks."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.events: list[Event] = []
        self.is_started = self.is_finished = False

    def start(self, endpoints: Mapping[str, str]) -> None:
        self.is_started = True

    def log_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def finish(self) -> None:
        self.is_finished = True


class SeveralTrackers:
    """Tells each of them the same; the end of a run may wait for one after the other."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def start(self, endpoints: Mapping[str, str]) -> None:
        for tracker in self._trackers:
            tracker.start(endpoints)

    def log_step(self, report: StepReport) -> None:
        for tracker in self._trackers:
            tracker.log_step(report)

    def emit(self, event: Event) -> None:
        for tracker in self._trackers:
            tracker.emit(event)

    def finish(self) -> None:
        for tracker in self._trackers:
            tracker.finish()
