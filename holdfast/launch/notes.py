"""What workers tell besides steps: evaluations, snapshots that failed, steps that were left out. They become events."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from holdfast.events import (
    BricksRestored,
    Evaluated,
    Event,
    EventSink,
    SnapshotFailed,
    StageHealed,
    StageRebuilt,
    StagesMeasured,
    StepLeftOut,
)
from holdfast.launch.calls import Calls
from holdfast.launch.crew import worker_address
from holdfast.launch.fleet import Completion

__all__ = ["Notes"]

_DRAIN_S = 1.0
"""Between two times that they are fetched."""

_KINDS: Mapping[str, Callable[..., Event]] = {
    "bricks_restored": BricksRestored,
    "evaluated": Evaluated,
    "snapshot_failed": SnapshotFailed,
    "stage_healed": StageHealed,
    "stage_rebuilt": StageRebuilt,
    "stages_measured": StagesMeasured,
    "step_left_out": StepLeftOut,
}


class Notes:
    """Used from the conductor's thread."""

    def __init__(self, calls: Calls, events: EventSink, measured: Callable[[StagesMeasured], None]) -> None:
        self._calls, self._events, self._measured = calls, events, measured
        self._due_s = 0.0

    def fetch_if_due(self, worker: int | None, now: float) -> None:
        """From the worker of rank 0, if there is one."""
        if worker is not None and now >= self._due_s:
            self._due_s = now + _DRAIN_S
            self.fetch(worker)

    def fetch(self, worker: int) -> None:
        self._calls.ask(worker_address(worker), "drain", then=self._drained)

    def take(self, notes: Sequence[Mapping[str, Any]]) -> None:
        """One event for each."""
        for note in notes:
            fields = dict(note)
            event = _KINDS[fields.pop("event")](**fields)
            self._events.emit(event)
            if isinstance(event, StagesMeasured):
                self._measured(event)

    def _drained(self, answer: Completion) -> None:
        self.take(cast(Sequence[Mapping[str, Any]], answer.result or ()))
