"""The graceful stop: how long each part of it may take, and what has to be done first. Pure."""

from __future__ import annotations

import math

from holdfast.events import StopRequested
from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance.situation import Situation, Stage

__all__ = ["ask", "follow_up", "instead_of_training", "look"]


def ask(run: Situation, reason: str, now: float, *, within_s: float = math.inf) -> None:
    """Somebody wants the run to end, in ``recovery.stop_grace_s`` or sooner. Half of the time is for the ranks."""
    if run.stage is Stage.STOP or run.stop_reason:
        return
    run.announce(StopRequested(reason))
    run.stop_reason, run.stop_by_s = reason, now + max(min(run.recovery.stop_grace_s, within_s), 0.0)
    if run.stage in (Stage.RUN, Stage.GROW, Stage.MOVE):
        _leave(run, now)
    elif run.watch is None or run.is_memory_whole:
        run.stopped(reason, now)
    else:
        run.whole_by_s = _half_time(run, now)


def _half_time(run: Situation, now: float) -> float:
    return now + (run.stop_by_s - now) / 2


def _leave(run: Situation, now: float) -> None:
    run.stage, run.deadline_s = Stage.STOP, _half_time(run, now)
    run.act(m.StopEpoch(run.epoch))


def look(run: Situation, now: float) -> None:
    """Time has passed: a recovery that should have made memory whole before the stop has had long enough."""
    if run.stage is not Stage.STOP and now >= run.whole_by_s:
        run.stopped(f"{run.stop_reason}; what was lost was not rebuilt in time", now)


def instead_of_training(run: Situation, now: float) -> bool:
    """An epoch could start. Whether the run stops instead: what memory holds can be saved as it is, or is saved."""
    if run.stop_reason and run.former is None and run.rebuild is None:
        run.stopped(run.stop_reason, now)
    return run.stage is Stage.OVER


def follow_up(run: Situation, now: float) -> None:
    """An epoch has started, although the run is to stop: only to read what nobody could save before."""
    if run.stop_reason:
        _leave(run, now)
