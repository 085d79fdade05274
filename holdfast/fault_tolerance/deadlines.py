"""Time passes: whatever has lasted too long is ended, so that nothing is ever waited for in vain."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.events import Waiting
from holdfast.fault_tolerance import elastic, preemption, stopping
from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance.faults import discard, fault, gather, lose_keeper, loss_of, mourn, vacate
from holdfast.fault_tolerance.incidents import Loss
from holdfast.fault_tolerance.membership import Worker, WorkerState
from holdfast.fault_tolerance.policy import name_ranks
from holdfast.fault_tolerance.protection import missing_pieces
from holdfast.fault_tolerance.regroup import refuse_checkpoint
from holdfast.fault_tolerance.situation import Situation, Stage

__all__ = ["grow", "tick"]

_WAITING_S = 10.0
"""Seconds between words about what a start or a recovery waits for."""


def tick(run: Situation, message: m.Tick, now: float) -> None:
    _forgive_own_sleep(run, now)
    losses = _late_workers(run, now) + _late_keepers(run, now)
    if losses:
        fault(run, losses, now)
    elif now >= run.deadline_s:
        _late_answer(run, now)
    elif run.stage in (Stage.RUN, Stage.GROW, Stage.MOVE, Stage.STOP):
        _look_for_suspects(run, now)
    for look in (stopping.look, preemption.look, elastic.look):
        if run.stage is not Stage.OVER:
            look(run, now)
    _say_what_is_missing(run, now)


def grow(run: Situation, now: float) -> None:
    """The ranks have left together, or were asked to for long enough: go on in the larger world."""
    gather(run, now, is_planned=True)
    elastic.grow(run)


def _forgive_own_sleep(run: Situation, now: float) -> None:
    """An observer that was busy elsewhere has old news, which looks like silence of every rank. Only what goes
    beyond a quarter of the limit is forgiven, so that a frozen rank is found however slow the observer is."""
    overslept_s = now - run.looked_s - run.recovery.suspect_after_s / 4
    run.looked_s = now
    if overslept_s > 0 and run.watch is not None:
        run.watch.overslept(overslept_s)


def _late_workers(run: Situation, now: float) -> list[Loss]:
    """Kill those that take too long to start or to leave. A late spare is replaced without further ado."""
    losses = []
    for worker in run.crew.overdue(now):
        cause = _lateness(worker, now)
        discard(run, worker, cause)
        run.spares_lost += worker.seat is None
        if worker.rank is not None:
            losses.append(loss_of(run, worker, cause, worker.since_s))
    return losses


def _lateness(worker: Worker, now: float) -> str:
    what = "was not ready" if worker.state is WorkerState.STARTING else f"had not left epoch {worker.epoch}"
    return f"worker {worker.worker} {what} after {now - worker.since_s:.1f} s"


def _late_keepers(run: Situation, now: float) -> list[Loss]:
    after_s = run.recovery.start_timeout_s
    return [
        loss
        for node in run.keepers.overdue(now)
        for loss in lose_keeper(run, node, f"the keeper of node {node} was not ready after {after_s:.1f} s", now)
    ]


def _late_answer(run: Situation, now: float) -> None:
    """The executor owes an answer to the stage's one question."""
    if run.stage is Stage.INVENTORY:
        _late_inventory(run, now)
    elif run.stage is Stage.LOAD:
        refuse_checkpoint(run, f"not loaded within {run.recovery.step_timeout_s:.1f} s", now)
    elif run.stage is Stage.GROW:
        grow(run, now)
    elif run.stage is Stage.MOVE:
        vacate(run, now)
    elif run.stage is Stage.STOP:
        late = _names(run.crew.in_state(WorkerState.TRAINING))
        left_s = run.stop_by_s - now
        run.stopped(f"{run.stop_reason}; {late} had not left the step with {left_s:.1f} s to go", now)


def _late_inventory(run: Situation, now: float) -> None:
    """Replace the members that have fallen silent meanwhile; if it was none of them, just ask again."""
    after_s = run.recovery.start_timeout_s
    cause = f"the inventory for epoch {run.epoch} was not answered within {after_s:.1f} s"
    silent = [w for w in run.crew.seated if w.worker in run.beats and _is_silent(run, run.beats[w.worker], now)]
    for worker in silent:
        discard(run, worker, f"no heartbeat while {cause}")
    losses = [loss_of(run, w, f"no heartbeat while {cause}", run.beats[w.worker].beat_s) for w in silent]
    fault(run, losses or [Loss(cause, now - after_s, joined=run.ledger.incidents)], now)


def _is_silent(run: Situation, beat: m.BeatSeen, now: float) -> bool:
    return now - beat.beat_s > run.limits.suspect_after_s


def _names(workers: Sequence[Worker]) -> str:
    return name_ranks([worker.rank for worker in workers if worker.rank is not None])


def _look_for_suspects(run: Situation, now: float) -> None:
    assert run.watch is not None, "an epoch that runs has a watch"
    training = {w.rank: w for w in run.crew.in_state(WorkerState.TRAINING) if w.rank is not None}
    lost = []
    for suspect in run.watch.suspects(training, now, run.limits):
        worker = training[suspect.rank]
        discard(run, worker, suspect.cause)
        lost.append((worker, suspect.cause, now - suspect.detected_after_s))
    mourn(run, lost, now)


def _say_what_is_missing(run: Situation, now: float) -> None:
    if run.stage not in (Stage.GATHER, Stage.INVENTORY, Stage.LOAD):
        return
    if now - max(run.waiting_since_s, run.said_s) >= _WAITING_S:
        run.said_s = now
        what = missing_pieces(run.crew, run.keepers, loading=run.loading if run.stage is Stage.LOAD else None)
        run.announce(Waiting(f"{what}, {now - run.waiting_since_s:.0f} s"))
