"""Where the wall time of a run went: useful steps, and what was lost to what. Pure.

The time of each attempt is cut into pieces that follow each other, so the parts are never negative and sum to it::

    startup | steps | lost, detect, restore | steps | ... | closing
              steps: useful, stall, repeated later (lost), and what is between steps
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby, pairwise, zip_longest

from holdfast.events import EpochStarted, FaultDetected
from holdfast.launch.run_view import Attempt, RunView

__all__ = ["Driven", "Fault", "Goodput", "Part", "Start", "Step", "counts", "driven", "goodput"]


class Part(str, Enum):
    """What a second of wall time was spent on."""

    USEFUL = "useful"
    STALL = "stall"
    LOST = "lost"
    DETECT = "detect"
    RESTORE = "restore"
    STARTUP = "startup"
    BETWEEN = "between"
    CLOSING = "closing"


@dataclass(frozen=True, slots=True)
class Step:
    """A finished step, when it was heard of, in seconds since 1970."""

    time_s: float
    epoch: int
    step: int
    step_s: float
    stall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Fault:
    """When a fault was detected, and how long after the last sign of life."""

    time_s: float
    detect_s: float


@dataclass(frozen=True, slots=True)
class Start:
    """An epoch and the version that it starts from."""

    epoch: int
    version: int


@dataclass(frozen=True, slots=True)
class Driven:
    """One attempt: from ``began_s`` to ``ended_s``, and what happened meanwhile."""

    began_s: float
    ended_s: float
    steps: Sequence[Step] = ()
    faults: Sequence[Fault] = ()
    starts: Sequence[Start] = ()
    has_ended: bool = True


@dataclass(frozen=True, slots=True)
class Goodput:
    """Seconds by part; all parts are there."""

    seconds: Mapping[Part, float]
    idle_s: float
    """Between attempts, when nobody drove the run. In no part."""

    @property
    def wall_s(self) -> float:
        """While a driver worked on the run."""
        return math.fsum(self.seconds.values())

    def share(self, part: Part) -> float:
        """Of the wall time; 0 when there is none."""
        return self.seconds[part] / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def ratio(self) -> float:
        """The share of useful steps."""
        return self.share(Part.USEFUL)


def goodput(attempts: Sequence[Driven]) -> Goodput:
    """Split the wall time of all attempts, oldest first."""
    spent = _Spent()
    for attempt, kept in zip(attempts, counts(attempts), strict=True):
        _split(attempt, kept, spent)
    idle_s = math.fsum(max(after.began_s - before.ended_s, 0.0) for before, after in pairwise(attempts))
    return Goodput(spent.seconds, idle_s)


def counts(attempts: Sequence[Driven]) -> list[list[bool]]:
    """By attempt and step, in the order of :attr:`Driven.steps`, whether the run still has what the step has done.

    A later epoch that starts from an earlier version, or finishes the same step again, takes it back.
    """
    floor = math.inf
    kept: list[list[bool]] = []
    for attempt in reversed(attempts):
        found = [False] * len(attempt.steps)
        # Steps of an epoch come after its start, whenever they were heard of.
        moments = [(start.epoch, -1, start.version + 1) for start in attempt.starts]
        moments += [(one.epoch, index, one.step) for index, one in enumerate(attempt.steps)]
        for _, index, step in sorted(moments, reverse=True):
            if index >= 0:
                found[index] = step < floor
            floor = min(floor, step)
        kept.append(found)
    return kept[::-1]


@dataclass(slots=True)
class _Spent:
    seconds: dict[Part, float] = field(default_factory=lambda: dict.fromkeys(Part, 0.0))

    def add(self, part: Part, seconds: float) -> None:
        self.seconds[part] += max(seconds, 0.0)


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The time from the begin of its first step until its last one was heard of."""

    begin_s: float
    end_s: float
    steps: Sequence[tuple[Step, bool]]

    @property
    def steps_s(self) -> float:
        return math.fsum(_positive(one.step_s) for one, _ in self.steps)


def _split(attempt: Driven, kept: Sequence[bool], spent: _Spent) -> None:
    end_s = max(attempt.ended_s, attempt.began_s)
    epochs = list(_epochs(attempt, kept, end_s))
    if not epochs:
        spent.add(Part.STARTUP, end_s - attempt.began_s)
        return
    spent.add(Part.STARTUP, epochs[0].begin_s - attempt.began_s)
    after = Part.CLOSING if attempt.has_ended else Part.BETWEEN
    for epoch, then in zip_longest(epochs, epochs[1:]):
        next_s = end_s if then is None else then.begin_s
        fault = _first(attempt.faults, epoch.begin_s, next_s)
        if fault is None:  # without one it is the end, or the world was changed
            _training(epoch, epoch.end_s, spent)
            spent.add(after if then is None else Part.RESTORE, next_s - epoch.end_s)
        else:
            _training(epoch, trained_s := _silence(epoch, fault), spent)
            _interruption(fault, trained_s, next_s, spent)


def _epochs(attempt: Driven, kept: Sequence[bool], end_s: float) -> Iterator[_Epoch]:
    now_s = attempt.began_s
    in_order = sorted(zip(attempt.steps, kept, strict=True), key=lambda one: (one[0].epoch, one[0].time_s))
    for _, group in groupby(in_order, key=lambda one: one[0].epoch):
        steps = list(group)
        begin_s = min(max(steps[0][0].time_s - _positive(steps[0][0].step_s), now_s), end_s)
        now_s = min(max(steps[-1][0].time_s, begin_s), end_s)
        yield _Epoch(begin_s, now_s, steps)


def _silence(epoch: _Epoch, fault: Fault) -> float:
    """When training ended: the last steps may have been heard of after the last sign of life."""
    trained_s = max(fault.time_s - _positive(fault.detect_s), epoch.begin_s + epoch.steps_s)
    return min(trained_s, epoch.end_s)


def _interruption(fault: Fault, from_s: float, to_s: float, spent: _Spent) -> None:
    """Between the last step of an epoch and the first one of the next."""
    found_s = min(max(fault.time_s, from_s), to_s)
    detect_s = min(_positive(fault.detect_s), found_s - from_s)
    spent.add(Part.LOST, found_s - detect_s - from_s)  # the step that was under way
    spent.add(Part.DETECT, detect_s)
    spent.add(Part.RESTORE, to_s - found_s)


def _training(epoch: _Epoch, end_s: float, spent: _Spent) -> None:
    """Steps are heard of some moments late and several at once: what counts is how long they took, and that there was
    as much time."""
    seconds, total_s = end_s - epoch.begin_s, epoch.steps_s
    scale = min(1.0, seconds / total_s) if total_s > 0 else 0.0
    for one, is_kept in epoch.steps:
        stall_s = min(_positive(one.stall_s), _positive(one.step_s))
        spent.add(Part.STALL, stall_s * scale)
        spent.add(Part.USEFUL if is_kept else Part.LOST, (_positive(one.step_s) - stall_s) * scale)
    spent.add(Part.BETWEEN, seconds - total_s * scale)


def _first(faults: Sequence[Fault], after_s: float, before_s: float) -> Fault | None:
    return min((f for f in faults if after_s <= f.time_s <= before_s), key=lambda f: f.time_s, default=None)


def _positive(seconds: float) -> float:
    return seconds if 0 < seconds < math.inf else 0.0  # NaN is neither


# -- from the files ---------------------------------------------------------------------------------------------------


def driven(view: RunView) -> list[Driven]:
    """The attempts of a run. What a damaged record does not place in time is left out."""
    attempts = view.attempts
    limits = [*(one.began_s for one in attempts[1:]), math.inf][: len(attempts)]
    return [
        Driven(
            began_s=one.began_s,
            ended_s=one.ended_s,
            steps=list(_steps(view, one.number)),
            faults=[Fault(s, f.detected_after_s) for s, f in view.of(FaultDetected) if one.began_s <= s < limit_s],
            starts=[*_starts(view, one.began_s, limit_s), *_stop(one)],
            has_ended=one.has_ended,
        )
        for one, limit_s in zip(attempts, limits, strict=True)
    ]


def _starts(view: RunView, from_s: float, to_s: float) -> Iterator[Start]:
    return (Start(one.epoch, one.version) for when, one in view.of(EpochStarted) if from_s <= when < to_s)


def _stop(attempt: Attempt) -> Iterator[Start]:
    """As if another epoch had started from what is on disk: whatever comes next does."""
    if attempt.saved is not None:
        yield Start(sys.maxsize, attempt.saved)


def _steps(view: RunView, attempt: int) -> Iterator[Step]:
    for line in view.steps:
        if line.attempt == attempt:
            report = line.report
            yield Step(line.time_s, report.epoch, report.step, report.step_s, report.stall_s)
