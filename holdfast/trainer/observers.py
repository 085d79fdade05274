"""What may watch a training loop."""

from __future__ import annotations

from typing import Protocol

from holdfast.types import Phase, StepReport

__all__ = ["MemoryWatcher", "Watcher"]


class Watcher(Protocol):
    """Called in the training thread; must return within microseconds.

    ``check`` raises :class:`holdfast.errors.Abort` when this rank has to leave its epoch.
    ``should_stop`` is this rank's wish; the ranks agree on it before anybody acts.
    """

    def enter(self, phase: Phase, step: int) -> None: ...

    def finished(self, report: StepReport) -> None: ...

    def check(self) -> None: ...

    def should_stop(self) -> bool: ...


class MemoryWatcher:
    """Keeps the reports, for tests and notebooks."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []
        self.phases: list[tuple[Phase, int]] = []
        self.stop = False

    def enter(self, phase: Phase, step: int) -> None:
        self.phases.append((phase, step))

    def finished(self, report: StepReport) -> None:
        self.reports.append(report)

    def check(self) -> None:
        return

    def should_stop(self) -> bool:
        return self.stop
