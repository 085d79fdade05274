"""The pictures of a report, from what the files of a run tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from holdfast import events as e
from holdfast.fault_tolerance.protection import FULL
from holdfast.launch.fault_stories import FaultStory, fault_stories
from holdfast.launch.goodput import Driven, Goodput, Part, counts, driven, goodput
from holdfast.launch.report_parts import Figure
from holdfast.launch.report_svg import Axis, Band, Chart, Line, Mark, Point, Row, draw, stacked_bar, timeline
from holdfast.launch.run_view import Attempt, RunView, StepLine
from holdfast.launch.wording import duration, percent

__all__ = ["PARTS", "Charts"]

PARTS: Mapping[Part, str] = {
    Part.USEFUL: "useful steps",
    Part.STALL: "stall: steps waited for the snapshotter",
    Part.LOST: "lost: steps that were repeated or cut off",
    Part.DETECT: "detect: until a fault was noticed",
    Part.RESTORE: "restore: regroup, restore, get the first step going",
    Part.STARTUP: "startup: processes, data, waiting for machines",
    Part.BETWEEN: "between steps: evaluation and everything else",
    Part.CLOSING: "closing: last checkpoint, evaluation, export",
}
"""What each part of the wall time is called."""

_THROUGHPUT_POINTS = 150
_LEGEND = {
    "fault": "fault",
    "injected": "broken on purpose",
    "recovered": "recovered",
    "attempt": "an attempt begins",
}


@dataclass(frozen=True)
class Charts:
    """Of one run. Times are those that drivers have worked on it: hours between attempts are no part of any axis."""

    view: RunView

    @cached_property
    def attempts(self) -> Sequence[Attempt]:
        return self.view.attempts

    @cached_property
    def stories(self) -> Sequence[FaultStory]:
        return fault_stories(self.view)

    @cached_property
    def _driven(self) -> Sequence[Driven]:
        return driven(self.view)

    @cached_property
    def goodput(self) -> Goodput:
        return goodput(self._driven)

    def clock(self, time_s: float) -> float:
        """Seconds driven until then."""
        return math.fsum(max(min(time_s, one.ended_s) - one.began_s, 0.0) for one in self.attempts)

    @property
    def _time_axis(self) -> Axis:
        return Axis("time driven", include=[0.0, self.clock(math.inf)], is_duration=True)

    @cached_property
    def _lines(self) -> list[tuple[StepLine, bool]]:
        """Step lines, each with whether the run still has what it has done."""
        found: list[tuple[StepLine, bool]] = []
        for attempt, kept in zip(self.attempts, counts(self._driven), strict=True):
            mine = (line for line in self.view.steps if line.attempt == attempt.number)
            found += zip(mine, kept, strict=True)
        return found

    @cached_property
    def kept(self) -> list[StepLine]:
        """The steps that count, each once."""
        return [line for line, is_kept in self._lines if is_kept]

    # -- loss and speed -------------------------------------------------------------------------------------------

    def loss_by_step(self) -> Figure:
        return self._loss("step", Axis("steps"), lambda line: float(line.report.step), self._marks_by_step())

    def loss_by_time(self) -> Figure:
        axis = self._time_axis
        return self._loss(
            "wall time", axis, lambda line: self.clock(line.time_s), self._marks_by_time(), self._outages()
        )

    def _loss(
        self,
        over: str,
        x: Axis,
        place: Callable[[StepLine], float],
        marks: Sequence[Mark],
        outages: Sequence[Band] = (),
    ) -> Figure:
        lines = [Line("loss", [(place(line), line.report.loss) for line in self.kept])]
        repeated, evaluated = self._repeated(place), self._evaluations(place)
        lines += [Line("repeated", repeated)] if repeated else []
        lines += [Line("evaluation", evaluated, is_dots=True)] if evaluated else []
        legend = {"loss": "loss of the global batch"}
        legend |= {"repeated": "steps that were done again"} if repeated else {}
        legend |= {"evaluation": "evaluation, held-out text"} if evaluated else {}
        legend |= {"outage": "no step was made"} if outages else {}
        chart = Chart(f"Loss over {over}", x, Axis("loss, nats per token"), lines, marks, outages)
        return Figure(draw(chart), legend | _legend_of(marks))

    def _repeated(self, place: Callable[[StepLine], float]) -> list[Point]:
        """Runs of lines that do not count, with a gap between one and the next."""
        points: list[Point] = []
        before = True
        for line, is_kept in self._lines:
            if not is_kept:
                points += [(math.nan, math.nan)] if before and points else []
                points.append((place(line), line.report.loss))
            before = is_kept
        return points

    def _evaluations(self, place: Callable[[StepLine], float]) -> list[Point]:
        """Bits per byte as nats per token, by the ratio that the step itself had."""
        by_step = {line.report.step: line for line in self.kept}
        found = []
        for _, event in self.view.of(e.Evaluated):
            line = by_step.get(event.step)
            if line is not None and line.report.bits_per_byte > 0:
                found.append((place(line), event.bits_per_byte * line.report.loss / line.report.bits_per_byte))
        return found

    def sample(self, count: int = 9) -> list[StepLine]:
        """A few steps, evenly spread, the first and the last among them; none of none."""
        last = len(self.kept) - 1
        return [self.kept[i] for i in sorted({round(last * n / (count - 1)) for n in range(count)}) if last >= 0]

    def throughput(self) -> Figure:
        points = list(_throughput(self.kept))
        marks = self._marks_by_step()
        axis = Axis("tokens per second", include=[0.0])
        chart = Chart("Throughput over steps", Axis("steps"), axis, [Line("loss", points)], marks, height=220)
        return Figure(draw(chart), {"loss": "tokens per second while steps are made"} | _legend_of(marks))

    # -- what happened --------------------------------------------------------------------------------------------

    def _marks_by_step(self) -> list[Mark]:
        first = {line.attempt: line.report.step for line in reversed(self.view.steps)}
        found = [Mark(step, "attempt", f"attempt {n} begins", f"attempt {n}") for n, step in first.items() if n > 1]
        return found + self._marks(lambda time_s, step: float(step))

    def _marks_by_time(self) -> list[Mark]:
        found = [
            Mark(self.clock(one.began_s), "attempt", f"attempt {one.number} begins", f"attempt {one.number}")
            for one in self.attempts[1:]
        ]
        return found + self._marks(lambda time_s, step: self.clock(time_s))

    def _marks(self, place: Callable[[float, int], float]) -> list[Mark]:
        found = [
            Mark(place(when, done.step), "recovered", f"resumed at step {done.step:,}, {done.steps_lost} steps lost")
            for when, done in self.view.of(e.RecoveryDone)
        ]
        found += [
            Mark(place(when, one.step), "injected", f"on purpose: {one.source}")
            for when, one in self.view.of(e.FaultInjected)
        ]
        return found + [_fault_mark(place(one.time_s, one.fault.last_step), one) for one in self.stories]

    def _outages(self) -> list[Band]:
        found = []
        for story in self.stories:
            ends = [one.ended_s for one in self.attempts if one.number == story.attempt]
            stop_s = story.done_s or max(ends, default=story.time_s)
            start_s = story.time_s - max(story.fault.detected_after_s, 0.0)
            found.append(Band(self.clock(start_s), self.clock(stop_s), "outage", f"fault {story.ordinal}"))
        return found

    # -- time and tiers -------------------------------------------------------------------------------------------

    def split(self) -> Figure:
        parts = [(part.value, self.goodput.share(part), _part_title(part, self.goodput)) for part in PARTS]
        shown = {part.value: name for part, name in PARTS.items() if self.goodput.seconds[part] > 0}
        return Figure(stacked_bar("Where the wall time went", parts), shown)

    def tiers(self) -> Figure:
        """Protection, checkpoints, faults and the size of the world, over time."""
        written = list(self.view.of(e.CheckpointWritten))
        rows = [
            Row("ranks", list(self._worlds())),
            Row("protection", list(self._protection())),
            Row("checkpoints", marks=[Mark(self.clock(s), "evaluation", f"step {c.step:,}") for s, c in written]),
            Row("faults", self._outages(), [_fault_mark(self.clock(one.time_s), one, "") for one in self.stories]),
        ]
        legend = {"full": "full", "reduced": "reduced", "degraded": "degraded: recovering", "evaluation": "checkpoint"}
        return Figure(timeline("Protection over time", self._time_axis, rows), legend | {"fault": "fault"})

    def _worlds(self) -> Iterator[Band]:
        for attempt in self.attempts:
            told = [(s, one.world) for s, one in self.view.of(e.EpochStarted) if attempt.began_s <= s < attempt.ended_s]
            changes = [one for n, one in enumerate(told) if n == 0 or one[1] != told[n - 1][1]]
            for (start_s, world), (stop_s, _) in pairwise([*changes, (attempt.ended_s, 0)]):
                yield Band(self.clock(start_s), self.clock(stop_s), "world", f"{world} ranks", f"{world}")

    def _protection(self) -> Iterator[Band]:
        """Whole from the first step of an attempt on, until something else is said."""
        for attempt in self.attempts:
            steps = [line.time_s for line in self.view.steps if line.attempt == attempt.number]
            said = [
                (s, p.level, p.reason) for s, p in self.view.of(e.Protection) if attempt.began_s <= s < attempt.ended_s
            ]
            if steps and not any(when <= steps[0] for when, *_ in said):
                said.insert(0, (steps[0], FULL, "nothing was lost yet"))
            for (start_s, level, reason), (stop_s, *_) in pairwise([*said, (attempt.ended_s, "", "")]):
                yield Band(self.clock(start_s), self.clock(stop_s), level, f"{level}: {reason}")

    def snapshot_age(self) -> Figure:
        """Steps that a loss of everything but the keepers' memory would have cost."""
        aged = [line for line in self.view.steps if line.report.committed >= 0]
        points = [(self.clock(line.time_s), float(line.report.step - line.report.committed)) for line in aged]
        line = Line("loss", points, is_steps=True)
        age = Axis("age of the newest version in memory, steps", include=[0.0])
        return Figure(draw(Chart("Age of the newest version", self._time_axis, age, [line], height=170)))


def _fault_mark(at: float, story: FaultStory, label: str | None = None) -> Mark:
    cause = (story.fault.cause.splitlines() or [""])[0]
    return Mark(at, "fault", f"fault {story.ordinal}: {cause}", f"F{story.ordinal}" if label is None else label)


def _legend_of(marks: Sequence[Mark]) -> dict[str, str]:
    there = {mark.kind for mark in marks}
    return {kind: name for kind, name in _LEGEND.items() if kind in there}


def _part_title(part: Part, split: Goodput) -> str:
    return f"{PARTS[part]}: {duration(split.seconds[part])}, {percent(split.share(part))}"


def _throughput(lines: Sequence[StepLine]) -> Iterator[Point]:
    """Tokens over seconds of a few steps at a time."""
    size = max(1, len(lines) // _THROUGHPUT_POINTS)
    for i in range(size, len(lines), size):
        few = lines[i - size : i + 1]
        seconds = math.fsum(line.report.step_s for line in few[1:])
        tokens = few[-1].report.tokens - few[0].report.tokens
        if seconds > 0 and tokens > 0:
            yield float(few[-1].report.step), tokens / seconds
