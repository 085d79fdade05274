"""What the files of a run tell, as typed values: the one reader behind ``status``, ``events``, ``report``, ``watch``.

Reads only, may be used while the run goes on, and takes a damaged file for as much as it still tells.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from holdfast.events import Event, FaultDetected, RunEnded, RunStarted
from holdfast.launch.read_back import event_of, report_of, time_of
from holdfast.launch.read_lines import NewLines
from holdfast.launch.records import read_yaml
from holdfast.launch.run_dir import RunDir
from holdfast.types import StepReport

__all__ = ["Attempt", "RunReader", "RunView", "StepLine", "Timed"]

_STEP_BYTES = 1024
"""At most, of a line in ``metrics.jsonl``."""

_Kind = TypeVar("_Kind", bound=Event)


@dataclass(frozen=True, slots=True)
class Timed:
    """An event and when it happened, in seconds since 1970."""

    time_s: float
    event: Event


@dataclass(frozen=True, slots=True)
class StepLine:
    """A finished step, when the driver heard of it, and in which attempt."""

    time_s: float
    attempt: int
    report: StepReport


@dataclass(frozen=True, slots=True)
class Attempt:
    """The time during which one driver worked on the run."""

    number: int
    began_s: float
    ended_s: float
    """Of one that has not said that it ended: now if its driver lives, else its last line."""
    has_ended: bool
    saved: int | None = None
    """Steps that are left after a stop, -1 for none: memory went with the driver. None if it did not end in a stop."""


@dataclass(frozen=True, slots=True)
class RunView:
    """A run at one moment."""

    path: Path
    record: Mapping[str, Any]
    """``run.json``: JSON values, so opaque to the type checker."""
    config: Mapping[str, object]
    """Of the newest attempt, by dotted key."""
    events: Sequence[Timed]
    steps: Sequence[StepLine]
    """In the order of the file; a step that was repeated has several."""
    driver: str | None
    """Who drives the run, in words."""
    now_s: float

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def ended(self) -> Mapping[str, Any] | None:
        """How the run has ended, as ``run.json`` has it; None while nobody has said so."""
        found: Mapping[str, Any] | None = self.record.get("ended")
        return found

    @property
    def goal(self) -> int:
        """Steps to make; 0 if the configuration cannot be read."""
        found = self.config.get("trainer.max_steps")
        return found if isinstance(found, int) else 0

    def of(self, kind: type[_Kind]) -> Iterator[tuple[float, _Kind]]:
        """Events of one kind, each with its time."""
        return ((one.time_s, one.event) for one in self.events if isinstance(one.event, kind))

    @property
    def attempts(self) -> list[Attempt]:
        """Oldest first. An attempt whose record says nothing of its beginning is left out."""
        told = [one for one in enumerate(self.record["attempts"], start=1) if _began_s(one[1]) is not None]
        starts = [float(one["started"]) for _, one in told]
        limits = [*starts[1:], math.inf][: len(starts)]
        return [self._attempt(*one, limit_s) for one, limit_s in zip(told, limits, strict=True)]

    def _attempt(self, number: int, told: Mapping[str, Any], limit_s: float) -> Attempt:
        began_s = float(told["started"])
        end_s = time_of(told.get("ended") or {})
        if end_s is not None:
            return Attempt(number, began_s, max(end_s, began_s), has_ended=True, saved=_saved(told["ended"]))
        if limit_s == math.inf and self.driver is not None:
            return Attempt(number, began_s, max(self.now_s, began_s), has_ended=False)
        lines = (one.time_s for lines in (self.events, self.steps) for one in lines)
        return Attempt(number, began_s, max([began_s, *(s for s in lines if s < limit_s)]), has_ended=False)

    @property
    def newest_attempt(self) -> Sequence[Timed]:
        """Events since the newest attempt has told that it starts; none if it has not yet."""
        starts = [i for i, one in enumerate(self.events) if isinstance(one.event, RunStarted)]
        if not starts or not _is_of(self.events[starts[-1]].event, len(self.record["attempts"])):
            return ()
        return self.events[starts[-1] :]

    @property
    def faults_of_attempt(self) -> tuple[int, int]:
        """Failures and preemptions of the newest attempt."""
        faults = [one.event for one in self.newest_attempt if isinstance(one.event, FaultDetected)]
        preempted = sum(fault.is_preemption for fault in faults)
        return len(faults) - preempted, preempted

    @property
    def is_over(self) -> bool:
        """Nothing more will come from this attempt: the record and the events have its end."""
        last = next((one.event for one in reversed(self.events) if isinstance(one.event, RunStarted | RunEnded)), None)
        return self.ended is not None and (isinstance(last, RunEnded) or self.driver is None)


def _began_s(attempt: object) -> float | None:
    return time_of({"time": attempt.get("started")}) if isinstance(attempt, dict) else None


def _saved(ended: Mapping[str, Any]) -> int | None:
    step = ended.get("step")
    return step if ended.get("outcome") == "stopped" and isinstance(step, int) else None


def _is_of(event: Event, attempt: int) -> bool:
    return isinstance(event, RunStarted) and event.attempt >= attempt


class RunReader:
    """Reads a run again and again, each time only what is new in its files."""

    def __init__(self, run: RunDir, *, newest_steps: int | None = None, clock: Callable[[], float] = time.time) -> None:
        """``newest_steps``: of which step lines are kept; all of them if None. Events are always kept all."""
        self._run, self._clock = run, clock
        newest_bytes = None if newest_steps is None else newest_steps * _STEP_BYTES
        self._event_lines = NewLines(run.events_file)
        self._step_lines = NewLines(run.metrics_file, newest_bytes=newest_bytes)
        self._events: list[Timed] = []
        self._steps: deque[StepLine] = deque(maxlen=newest_steps)

    def view(self) -> RunView:
        """The run now. Raises: ConfigurationError if ``run.json`` cannot be read."""
        # In this order, so that what has told its end has told everything before it.
        driver, record = self._run.driver(), self._run.record()
        self._events += list(self.new_events())
        self._steps.extend(_steps(self._step_lines))
        return RunView(
            path=self._run.path,
            record=record,
            config=read_yaml(self._run.config_file),
            events=tuple(self._events),
            steps=tuple(self._steps),
            driver=driver,
            now_s=self._clock(),
        )

    def new_events(self) -> Iterator[Timed]:
        """Those that neither this nor :meth:`view` has seen before."""
        for record in self._event_lines.read():
            when, event = time_of(record), event_of(record)
            if when is not None and event is not None:
                yield Timed(when, event)


def _steps(lines: NewLines) -> Iterator[StepLine]:
    for record in lines.read():
        when, report, attempt = time_of(record), report_of(record), record.get("attempt", 1)
        if when is not None and report is not None and isinstance(attempt, int):
            yield StepLine(when, attempt, report)
