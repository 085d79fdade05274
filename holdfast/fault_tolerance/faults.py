"""Bad news and its consequences: whatever was going on ends, and the run gathers what is left."""

from __future__ import annotations

import math
from collections.abc import Sequence

from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance.incidents import Loss
from holdfast.fault_tolerance.membership import Worker, WorkerState
from holdfast.fault_tolerance.situation import Situation, Stage

__all__ = ["discard", "fault", "keeper_lost", "lose_keeper", "loss_of", "mourn", "worker_lost", "worker_parked"]


def worker_lost(run: Situation, message: m.WorkerLost, now: float) -> None:
    worker = run.crew.get(message.worker)
    if worker is not None:
        # Lost may mean out of reach. Killing what is dead already does no harm, a survivor on the loose might.
        discard(run, worker, f"lost: {message.cause}")
        mourn(run, [(worker, message.cause, message.last_seen_s)], now)


def keeper_lost(run: Situation, message: m.KeeperLost, now: float) -> None:
    losses = lose_keeper(run, message.node, message.cause, now)
    if losses:
        fault(run, losses, now)


def worker_parked(run: Situation, message: m.WorkerParked, now: float) -> None:
    """A worker has left its epoch: because it was done, because it was asked to, or because something broke."""
    worker, outcome = run.crew.get(message.worker), message.outcome
    if worker is None or worker.rank is None or worker.epoch != message.epoch or not worker.is_in_epoch:
        return
    was_asked = worker.state is WorkerState.LEAVING
    worker.rest(outcome, now)
    if outcome is m.Outcome.FINISHED or (outcome is m.Outcome.STOPPED and run.stage is Stage.STOP):
        _conclude(run, worker.rank)
    elif outcome is m.Outcome.ERROR:
        # An exception in somebody's code may leave anything behind: threads, half-written state, device memory.
        discard(run, worker, "it raised an exception; a fresh process takes its place")
        mourn(run, [(worker, message.detail, now)], now)
    elif outcome is m.Outcome.CORRUPT:
        run.sources.damaged(worker.rank, message.version, message.detail)
        run.act(m.Quarantine(worker.rank, message.version))
        fault(run, [loss_of(run, worker, f"version {message.version} is damaged: {message.detail}", now)], now)
    elif not was_asked:
        detail = message.detail or f"left epoch {message.epoch} ({outcome.value}) without being asked"
        fault(run, [loss_of(run, worker, detail, now, is_victim=True)], now)


def _conclude(run: Situation, rank: int) -> None:
    if run.watch is not None:
        run.watch.conclude(rank)


def discard(run: Situation, worker: Worker, reason: str) -> None:
    """End a process that cannot be trusted."""
    run.crew.lose(worker.worker)
    run.act(m.KillWorker(worker.worker, reason))


def lose_keeper(run: Situation, node: int, cause: str, now: float) -> list[Loss]:
    """Forget a keeper; nothing if there was none."""
    incident = run.keepers.lose(node)
    return [] if incident is None else [Loss(cause, now, node=node, joined=incident)]


def mourn(run: Situation, lost: Sequence[tuple[Worker, str, float]], now: float) -> None:
    """Workers that exist no more, each with its cause and last sign of life. A lost spare interrupts nothing."""
    run.spares_lost += sum(worker.rank is None for worker, _, _ in lost)
    losses = [loss_of(run, worker, cause, seen_s) for worker, cause, seen_s in lost if worker.rank is not None]
    if losses:
        fault(run, losses, now)


def loss_of(run: Situation, worker: Worker, cause: str, last_seen_s: float, *, is_victim: bool = False) -> Loss:
    """Bad news about a worker that has, or had, a seat."""
    assert worker.rank is not None, "a spare's loss is nobody's fault"
    return Loss(
        cause,
        last_seen_s,
        ranks=(worker.rank,),
        node=run.layout.node_of(worker.rank),
        pid=worker.pid,
        phase=_phase(run, worker, worker.rank),
        joined=worker.incident,
        is_victim=is_victim,
    )


def _phase(run: Situation, worker: Worker, rank: int) -> str:
    if run.watch is not None and worker.epoch == run.watch.epoch:
        return run.watch.last(rank).phase.name.lower()
    return worker.state.value


def fault(run: Situation, losses: Sequence[Loss], now: float) -> None:
    """Gather again, unless the run stops anyway or has had enough."""
    top_step = run.watch.top_step if run.watch is not None else 0
    for loss in losses:
        run.ledger.record(loss, last_step=top_step, now=now)
    if run.stage is Stage.STOP:
        run.stopped(f"{run.stop_reason}; a fault while stopping was not repaired", now)
    elif run.ledger.is_used_up:
        run.announce_first(run.ledger.news(now, at_once=True))
        run.failed(1, run.ledger.used_up(), now)
    else:
        _gather(run, now)


def _gather(run: Situation, now: float) -> None:
    """Survivors leave what they are in, replacements start. A loss while gathering only adds to the list."""
    if run.stage is not Stage.GATHER:
        run.stage, run.deadline_s, run.waiting_since_s = Stage.GATHER, math.inf, now
        run.leave_epoch(now)
        run.announce(*run.protection.degraded())
    run.act(*run.keepers.fill(incident=run.ledger.failures, now=now))
    run.act(*run.crew.fill_seats(incident=run.ledger.failures, now=now))
