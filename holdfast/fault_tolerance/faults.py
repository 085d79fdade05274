"""Bad news and its consequences: whatever was going on ends, and the run gathers what is left."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import replace

from holdfast.fault_tolerance import elastic, homes, preemption
from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance.incidents import Loss
from holdfast.fault_tolerance.membership import Worker, WorkerState
from holdfast.fault_tolerance.situation import Situation, Stage

__all__ = [
    "discard",
    "fault",
    "gather",
    "keeper_lost",
    "lose_keeper",
    "loss_of",
    "mourn",
    "reunite",
    "vacate",
    "worker_lost",
    "worker_parked",
]


def worker_lost(run: Situation, message: m.WorkerLost, now: float) -> None:
    worker = run.crew.get(message.worker)
    if worker is not None:
        # Lost may mean out of reach. Killing what is dead already does no harm, a survivor on the loose might.
        discard(run, worker, f"lost: {message.cause}")
        mourn(run, [(worker, message.cause, message.last_seen_s)], now)


def keeper_lost(run: Situation, message: m.KeeperLost, now: float) -> None:
    (run.silent_nodes.add if message.is_silent else run.silent_nodes.discard)(message.node)
    was_asked = run.stage is Stage.INVENTORY and run.keepers.has(message.node) and run.keepers.is_ready(message.node)
    losses = lose_keeper(run, message.node, message.cause, now)
    if losses:
        fault(run, losses, now)
    elif was_asked:  # although the run goes on without its node; the others are asked again, and have no longer for it
        run.act(m.TakeInventory(run.epoch, run.crew.members(), run.roster))


def worker_parked(run: Situation, message: m.WorkerParked, now: float) -> None:
    """A worker has left its epoch: because it was done, because it was asked to, or because something broke."""
    worker, outcome = run.crew.get(message.worker), message.outcome
    if worker is None or worker.rank is None or worker.epoch != message.epoch or not worker.is_in_epoch:
        return
    was_asked = worker.state is WorkerState.LEAVING
    worker.rest(outcome, now)
    run.sources.left(worker.rank, message.live, message.epoch)
    if outcome is m.Outcome.FINISHED or (
        outcome is m.Outcome.STOPPED and run.stage in (Stage.STOP, Stage.GROW, Stage.MOVE)
    ):
        _conclude(run, worker)
        if run.move is not None:
            run.move.boundary = max(run.move.boundary, message.version)
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


def _conclude(run: Situation, worker: Worker) -> None:
    if run.watch is not None:
        run.watch.conclude(worker.worker)


def discard(run: Situation, worker: Worker, reason: str) -> None:
    """End a process that cannot be trusted."""
    run.crew.lose(worker.worker)
    run.act(m.KillWorker(worker.worker, reason))


def lose_keeper(run: Situation, node: int, cause: str, now: float) -> list[Loss]:
    """Forget a keeper; no loss if there was none, or if the run goes on without its node."""
    was_ready = run.keepers.has(node) and run.keepers.is_ready(node)
    incident = run.keepers.lose(node)
    if incident is None or node not in run.roster.nodes:
        return []
    run.is_memory_whole = False
    return [Loss(cause, now, node=node, joined=incident, had_started=was_ready)]


def mourn(run: Situation, lost: Sequence[tuple[Worker, str, float]], now: float) -> None:
    """Workers that exist no more, each with its cause and last sign of life. One without a rank interrupts nothing."""
    run.spares_lost += sum(worker.seat is None for worker, _, _ in lost)
    losses = [loss_of(run, worker, cause, seen_s) for worker, cause, seen_s in lost if worker.rank is not None]
    if losses:
        fault(run, losses, now)


def loss_of(run: Situation, worker: Worker, cause: str, last_seen_s: float, *, is_victim: bool = False) -> Loss:
    """Bad news about a worker that has, or had, a rank."""
    assert worker.rank is not None, "a spare's loss is nobody's fault"
    return Loss(
        cause,
        last_seen_s,
        ranks=(worker.rank,),
        node=run.roster.node_of(worker.rank),
        pid=worker.pid,
        phase=_phase(run, worker),
        joined=worker.incident,
        is_victim=is_victim,
        had_started=worker.state is not WorkerState.STARTING,
    )


def _phase(run: Situation, worker: Worker) -> str:
    beat = None if run.watch is None else run.watch.last(worker.worker)
    return worker.state.value if beat is None else beat.phase.name.lower()


def fault(run: Situation, losses: Sequence[Loss], now: float) -> None:
    """Gather again, unless the run stops anyway or has had enough."""
    top_step = run.watch.top_step if run.watch is not None else 0
    losses = preemption.foresee(run, losses)
    losses += _left_behind(run, {loss.node for loss in losses if not loss.is_victim}, now)
    preemption.conclude(run, losses)
    for loss in losses:
        if not loss.had_started and elastic.is_excused(run, loss, now):
            loss = replace(loss, joined=-1)
        run.ledger.record(loss, last_step=top_step, now=now)
        if run.ledger.is_used_up:  # the rest is of no consequence, and must not count beyond the budget
            break
    if run.stage is Stage.STOP:
        run.stopped(f"{run.stop_reason}; a fault while stopping was not repaired", now)
    elif run.ledger.is_used_up and run.stop_reason:
        run.stopped(f"{run.stop_reason}; {run.ledger.used_up()}", now)
    elif run.ledger.is_used_up:
        run.announce_first(run.ledger.news(now, at_once=True))
        run.failed(1, run.ledger.used_up(), now)
    else:
        gather(run, now)


def vacate(run: Situation, now: float) -> None:
    """End what the nodes that move have left on their old hosts; the rest is a recovery."""
    assert run.move is not None, "somebody wants to move"
    fault(run, _left_behind(run, set(run.move.nodes), now), now)


def _left_behind(run: Situation, nodes: Collection[int | None], now: float) -> list[Loss]:
    """Of the nodes that have another host by now, what is not there: keeper and workers share memory."""
    losses: list[Loss] = []
    for node, notice in run.notices.items() if run.stage is not Stage.STOP else ():
        if node not in nodes:
            continue
        why = f"node {node} is to be taken away ({notice.reason}) and moves to another host"
        losses += _clear(run, node, notice.host, why, now)
    return [replace(loss, is_preemption=True) for loss in losses]


def _clear(run: Situation, node: int, host: str, why: str, now: float) -> list[Loss]:
    """End the node's processes that are not where it is now, and the spares on the host that it leaves, if any."""
    losses: list[Loss] = []
    for worker in run.crew.left_behind(node, host):
        losses += [] if worker.rank is None else [loss_of(run, worker, why, now)]
        discard(run, worker, why)
    if run.keepers.host_of(node) not in (None, run.crew.host_of(node)):
        losses += lose_keeper(run, node, why, now)
        run.act(m.KillKeeper(node, why))
    return losses


def reunite(run: Situation, now: float) -> None:
    """Everybody is ready. Where keeper and workers of a node are on different hosts, only those may stay that are
    where it is now: a survivor from before the node has moved, or what got to its old host meanwhile."""
    losses: list[Loss] = []
    for node in homes.separated(run):
        why = f"node {node} has moved to {run.crew.host_of(node)}, and this process is elsewhere"
        losses += _clear(run, node, "", why, now)
    if losses:
        fault(run, losses, now)


def gather(run: Situation, now: float, *, is_planned: bool = False) -> None:
    """Survivors leave what they are in, replacements start. A loss while gathering only adds to the list."""
    if run.stage is not Stage.GATHER:
        run.stage, run.deadline_s, run.waiting_since_s = Stage.GATHER, math.inf, now
        run.leave_epoch(now)
        if not is_planned:
            run.announce(*run.protection.degraded())
    elastic.start_missing(run, now)
