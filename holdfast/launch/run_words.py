"""What ``status`` and ``watch`` say of a run at one moment, as facts in the order they are shown. Pure."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from holdfast import events as e
from holdfast.launch.pace import Pace
from holdfast.launch.run_state import RunState, state_of
from holdfast.launch.run_view import RunView, Timed
from holdfast.launch.wording import TAG_COLUMNS, aligned, describe, duration, ending, step_line

__all__ = ["clock", "event_lines", "facts", "one_line", "pace_of"]

_PACE_STEPS = 20


def pace_of(view: RunView) -> Pace:
    """Of the newest steps."""
    pace = Pace(window=_PACE_STEPS)
    for line in view.steps[-_PACE_STEPS:]:
        pace.note(line.report)
    return pace


def one_line(view: RunView) -> str:
    """The state and the step line."""
    line = f"{state_of(view).word:<12} "
    if not view.steps:
        return line + "no step yet"
    failures = len(list(view.of(e.FaultDetected)))
    return line + step_line(view.steps[-1].report, tokens_per_s=pace_of(view).tokens_per_s, failures=failures)


def facts(view: RunView) -> dict[str, str]:
    """What is known; what is not is left out."""
    found = {
        "run": f"{view.run_id}  attempt {len(view.record['attempts'])}",
        "state": _state(view, state_of(view)),
        "driver": view.driver or ("" if view.ended else "gone"),
        "step": _step(view),
        "memory": _memory(view),
        "guard": _guard(view),
        "disk": _disk(view),
        "world": _world(view),
        "budget": _budget(view),
        "fault": _fault(view),
        "look": str(view.path),
    }
    return {name: value for name, value in found.items() if value}


def _ago(view: RunView, time_s: float) -> str:
    return f"{duration(max(view.now_s - time_s, 0.0))} ago"


def _state(view: RunView, state: RunState) -> str:
    code = (view.ended or {}).get("exit_code")
    return f"{state.word}, {_ago(view, state.since_s)}: {state.why}{'' if code is None else f' (exit code {code})'}"


def _step(view: RunView) -> str:
    if not view.steps:
        return f"0 of {view.goal:,}" if view.goal else ""
    newest, pace = view.steps[-1], pace_of(view)
    rate = f", {pace.tokens_per_s:,.0f} tok/s" if pace.tokens_per_s else ""
    of = f" of {view.goal:,}" if view.goal else ""
    quality = f"loss {newest.report.loss:.4f}, {newest.report.bits_per_byte:.3f} bits/byte"
    return f"{newest.report.step:,}{of}, {_ago(view, newest.time_s)}: {quality}{rate}"


def _memory(view: RunView) -> str:
    """The newest version that every rank holds in its keeper; the keepers go with the driver."""
    if not view.steps or view.driver is None:
        return ""
    report = view.steps[-1].report
    if report.committed < 0:
        return "no version is held by every rank yet"
    parity, group = view.config.get("snapshot.parity"), view.config.get("snapshot.group_size")
    size = f"groups of {group}" if group else "groups of all nodes, at most 8"
    coded = f"; parity {parity} in {size}" if isinstance(parity, int) else ""
    return f"version {report.committed:,} in the keepers, {report.step - report.committed} step(s) old{coded}"


def _guard(view: RunView) -> str:
    last = next((one for one in reversed(view.newest_attempt) if isinstance(one.event, e.Protection)), None)
    if view.driver is None or not view.steps:
        return ""
    if last is None or not isinstance(last.event, e.Protection):
        return "protection is full: nothing was lost in this attempt"
    return f"protection is {last.event.level}, since {_ago(view, last.time_s)}: {last.event.reason}"


def _disk(view: RunView) -> str:
    """Checkpoints by what was told of them; ``holdfast checkpoint verify`` looks at the files."""
    written = list(view.of(e.CheckpointWritten))
    if not written:
        return "no checkpoint was written"
    when, newest = max(written, key=lambda one: (one[1].step, one[0]))
    behind = max((view.steps[-1].report.step if view.steps else 0) - newest.step, 0)
    return f"checkpoint of step {newest.step:,}, {behind} step(s) and {_ago(view, when)}, {newest.path}"


def _world(view: RunView) -> str:
    worlds = [one.world for _, one in view.of(e.EpochStarted)]
    if not worlds:
        return ""
    nodes, per_node = view.config.get("launch.nodes"), view.config.get("launch.workers_per_node")
    if isinstance(nodes, int) and isinstance(per_node, int) and nodes * per_node != worlds[-1]:
        return f"{worlds[-1]} of {nodes * per_node} ranks"
    return f"{worlds[-1]} ranks"


def _budget(view: RunView) -> str:
    used, preempted = view.faults_of_attempt
    allowed, limit = (view.config.get(f"recovery.max_{what}") for what in ("failures", "preemptions"))
    injected = len(list(view.of(e.FaultInjected)))
    on_purpose = f"; {injected} injected on purpose in all attempts" if injected else ""
    taken = f", preemptions {preempted}{f' of {limit}' if limit else ', no limit'}," if preempted else ""
    return f"failures {used} of {allowed}{taken} in this attempt{on_purpose}" if isinstance(allowed, int) else ""


def _fault(view: RunView) -> str:
    last = next((one for one in reversed(view.events) if isinstance(one.event, e.FaultDetected)), None)
    if last is None:
        return ""
    return describe(last.event, clock(last.time_s))[0][TAG_COLUMNS:]


# -- events -----------------------------------------------------------------------------------------------------------


def event_lines(one: Timed, goal: int, told: Sequence[Timed]) -> list[str]:
    """An event as the console tells it. ``told``: those before it, for what the end says; ``goal``: steps to make."""
    event = one.event
    if isinstance(event, e.RunStarted):
        return aligned({"run": f"{event.run_id}  attempt {event.attempt}, {_date(one.time_s)}", "resume": event.resume})
    if isinstance(event, e.RunEnded):
        return list(_end(event, goal, told))
    return describe(event, clock(one.time_s))


def _end(event: e.RunEnded, goal: int, told: Sequence[Timed]) -> Iterator[str]:
    quality = [one.event.bits_per_byte for one in told if isinstance(one.event, e.Evaluated)]
    yield from ending(
        event,
        total_steps=goal,
        bits_per_byte=quality[-1] if quality else None,
        facts={},
        next_command="",
        injected=sum(isinstance(one.event, e.FaultInjected) for one in told),
        rebuilt=sum(isinstance(one.event, e.StageRebuilt) for one in told),
    )


def clock(time_s: float) -> str:
    """As the console has it."""
    return time.strftime("%H:%M:%S", time.localtime(time_s))


def _date(time_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time_s))
