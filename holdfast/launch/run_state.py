"""In which state a run is, in the words of Ray Train's controller. Pure.

Source: ``RunStatus`` of Ray Train v2, whose words are INITIALIZING, SCHEDULING, RUNNING, RESTARTING, RESIZING, and
FINISHED, ERRORED, ABORTED at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast import events as e
from holdfast.launch.run_view import RunView, Timed

__all__ = ["DRIVER_GONE", "GOES_ON", "RunState", "exit_code_of", "state_of"]

GOES_ON, DRIVER_GONE = 3, 4
"""Exit codes of a look at a run that has not ended, with a driver and without."""

_ENDED = {"finished": "FINISHED", "stopped": "ABORTED", "failed": "ERRORED"}


@dataclass(frozen=True, slots=True)
class RunState:
    """A word, what it means here, and since when."""

    word: str
    why: str
    since_s: float


def exit_code_of(view: RunView) -> int:
    """Of the run, if it has ended; else whether it goes on."""
    if view.ended is not None:
        code = view.ended.get("exit_code")
        return code if isinstance(code, int) else 1
    return GOES_ON if view.driver is not None else DRIVER_GONE


def state_of(view: RunView) -> RunState:
    """What the run is doing, or how it has ended."""
    if view.ended is not None:
        return _ending(view)
    if view.driver is None and view.record["attempts"]:
        last_s = view.attempts[-1].ended_s if view.attempts else view.now_s
        return RunState("ABORTED", "the driver is gone without a word; the same command continues the run", last_s)
    return _living(view)


def _ending(view: RunView) -> RunState:
    ended = view.ended or {}
    when, reason = ended.get("time"), ended.get("reason")
    since_s = float(when) if isinstance(when, (int, float)) else view.now_s
    return RunState(_ENDED.get(str(ended.get("outcome")), "ERRORED"), str(reason or ended.get("outcome")), since_s)


def _living(view: RunView) -> RunState:
    attempts = view.attempts
    state = RunState(
        "INITIALIZING", "the driver prepares data and places", attempts[-1].began_s if attempts else view.now_s
    )
    for one in view.newest_attempt:
        state = _after(state, one)
    if state.word == "RESIZING" and view.steps and view.steps[-1].time_s > state.since_s:
        return RunState("RUNNING", "the ranks of the new world train", view.steps[-1].time_s)
    return state


def _after(state: RunState, one: Timed) -> RunState:
    """The state after this event."""
    event, word = one.event, state.word
    if isinstance(event, e.RunStarted):
        return RunState("SCHEDULING", "processes start", one.time_s)
    if isinstance(event, e.FaultDetected):
        return RunState("RESTARTING", f"recovers from fault {event.number}", one.time_s)
    if isinstance(event, e.WorldChanged):
        return RunState("RESIZING", f"from {event.world_before} ranks to {event.world}", one.time_s)
    if isinstance(event, e.RecoveryDone):
        return RunState("RUNNING", f"resumed at step {event.step:,} after fault {event.number}", one.time_s)
    if isinstance(event, e.EpochStarted) and word == "SCHEDULING":
        return RunState("RUNNING", "all ranks train", one.time_s)
    if isinstance(event, e.Waiting) and word != "RUNNING":
        return RunState(word, event.what, state.since_s)
    if isinstance(event, e.StopRequested):
        return RunState(word, f"is being stopped: {event.reason}", state.since_s)
    return state
