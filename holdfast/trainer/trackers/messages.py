"""What trackers are told of steps and events: JSON objects, made without looking at a clock."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict

from holdfast.events import (
    CheckpointWritten,
    EpochStarted,
    Evaluated,
    Event,
    FaultDetected,
    PreemptionNoticed,
    RecoveryDone,
    RunEnded,
    RunStarted,
    StageRebuilt,
    StopRequested,
    WorldChanged,
)
from holdfast.trainer.goodput import GoodputMeter
from holdfast.types import StepReport

__all__ = ["Message", "Narrator", "no_step"]

Message = dict[str, object]
"""``do`` says what: log (``step``, ``values``), alert (``title``, ``text``, ``level``, perhaps ``wait_s``), rollback
(``step``: what comes next follows it), checkpoint (``step``, ``name``: its directory), summary (``values``), line
(``level``, ``text``), preempting, or finish (``exit_code``). All but the last also say ``time`` and ``attempt``."""


class Narrator:
    """Turns what happens in a run into messages, in the order in which it happened."""

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self._goodput: GoodputMeter | None = None

    def tell(self, time_s: float, item: StepReport | Event | Message) -> Iterator[Message]:
        """Nothing for events that no tracker shows. ``time_s``: seconds since the Unix epoch."""
        if isinstance(item, RunStarted):
            self.attempt, self._goodput = item.attempt, GoodputMeter(time_s)
        if isinstance(item, StepReport) and self._goodput is not None:
            self._goodput.note(item)
        for message in [item] if isinstance(item, dict) else _messages(item):
            yield {**message, "time": time_s, "attempt": self.attempt}
        if isinstance(item, RunEnded) and self._goodput is not None:
            goodput = _summary(goodput=self._goodput.ratio(time_s))
            yield {**goodput, "time": time_s, "attempt": self.attempt}


def _messages(item: StepReport | Event) -> Iterator[Message]:
    if isinstance(item, StepReport):
        values = asdict(item)
        step = values.pop("step")
        yield _log(step, {f"train/{name}": value for name, value in values.items()})
    elif isinstance(item, Evaluated):
        yield _log(item.step, {"eval/bits_per_byte": item.bits_per_byte})
        yield _summary(bits_per_byte=item.bits_per_byte)
    elif isinstance(item, RecoveryDone):
        yield from _of_recovery(item)
    elif isinstance(item, StageRebuilt):
        yield from _of_rebuilt(item)
    elif isinstance(item, EpochStarted):
        yield {"do": "rollback", "step": max(item.version, 0)}
    elif isinstance(item, CheckpointWritten):
        yield {"do": "checkpoint", "step": item.step, "name": item.path}
    elif isinstance(item, PreemptionNoticed) or (isinstance(item, StopRequested) and item.is_notice):
        yield {"do": "preempting"}
    else:
        yield from _of_trouble(item)


def _of_recovery(done: RecoveryDone) -> Iterator[Message]:
    names = ("repaired_in_s", "steps_lost", "failures", "preemptions")
    yield _log(done.step, {f"recovery/{name}": getattr(done, name) for name in names})
    text = f"resumed at step {done.step:,}, {done.repaired_in_s:.1f} s, {done.steps_lost} step(s) lost"
    yield _alert(f"recovered from fault {done.number}", text, "INFO")


def _of_rebuilt(rebuilt: StageRebuilt) -> Iterator[Message]:
    yield _log(rebuilt.version, {"recovery/approximate": 1})
    how = f"by {rebuilt.repair} of stages {rebuilt.sources} at step {rebuilt.version:,}"
    yield _alert(f"stage {rebuilt.stage} was rebuilt", f"{how}; the run is approximate from here on", "WARN")


def _of_trouble(event: Event) -> Iterator[Message]:
    if isinstance(event, FaultDetected):
        text = f"{event.cause}\n\nin {event.phase}, last step {event.last_step:,}"
        yield _alert(f"{'preemption' if event.is_preemption else 'fault'} {event.number}", text, "WARN")
    elif isinstance(event, WorldChanged):
        yield _alert(f"{event.world} ranks instead of {event.world_before}", event.reason, "WARN")
    elif isinstance(event, RunEnded):
        names = ("outcome", "reason", "faults", "preemptions", "steps_lost", "exit_code")
        yield _summary(**{name: getattr(event, name) for name in names})
        if event.outcome == "failed":
            yield _alert("the run has failed", event.reason, "ERROR")


def no_step(silent_s: float) -> Message:
    """An alert that steps have ceased; not repeated sooner than it took to notice."""
    title, text = "no progress", f"no step was finished for {silent_s:.0f} s"
    return {**_alert(title, text, "WARN"), "wait_s": silent_s}


def _log(step: int, values: Mapping[str, object]) -> Message:
    return {"do": "log", "step": step, "values": dict(values)}


def _summary(**values: object) -> Message:
    return {"do": "summary", "values": values}


def _alert(title: str, text: str, level: str) -> Message:
    return {"do": "alert", "title": title, "text": text, "level": level}
