"""From a complete membership to a running epoch: inventory, decision, durable checkpoint, start."""

from __future__ import annotations

import math
from dataclasses import replace

from holdfast.events import EpochStarted, RecoveryPlanned
from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance import preemption, stopping
from holdfast.fault_tolerance.policy import DISK, DO_NOT_RESTART, FRESH, Decision
from holdfast.fault_tolerance.progress import EpochWatch
from holdfast.fault_tolerance.situation import Situation, Stage

__all__ = ["checkpoint_loaded", "checkpoint_refused", "inventory_taken", "refuse_checkpoint", "take_inventory"]


def take_inventory(run: Situation, now: float) -> None:
    """Every seat has an idle worker and every keeper answers."""
    run.stage, run.deadline_s = Stage.INVENTORY, now + run.recovery.start_timeout_s
    run.absences.since_s.clear()
    run.absences.refused = ""
    # Who did not leave in time is being killed, and could still write; the keepers know of no fence yet.
    run.act(m.Fence(run.epoch), m.TakeInventory(run.epoch, run.crew.members(), run.roster))


def inventory_taken(run: Situation, message: m.InventoryTaken, now: float) -> None:
    if run.stage is not Stage.INVENTORY or message.epoch != run.epoch:
        return
    run.sources.take(message)
    run.announce(*run.ledger.news(now, at_once=True))
    if run.watch is not None:
        # Judged only now, because memory may hold steps that no heartbeat has told of.
        run.ledger.judge(run.watch, run.sources.newest_written_in(run.watch.epoch))
    if run.ledger.is_fruitless:
        run.failed(DO_NOT_RESTART, run.ledger.fruitless(), now)
    else:
        _decide(run, now)


def checkpoint_loaded(run: Situation, message: m.CheckpointLoaded, now: float) -> None:
    if _is_awaited(run, message.epoch, message.step):
        _start_epoch(run, message.step, now)


def checkpoint_refused(run: Situation, message: m.CheckpointRefused, now: float) -> None:
    if _is_awaited(run, message.epoch, message.step):
        refuse_checkpoint(run, message.reason, now)


def refuse_checkpoint(run: Situation, reason: str, now: float) -> None:
    """What is being loaded or rebuilt cannot be used; take the next best source."""
    run.sources.refuse(run.loading, reason)
    _decide(run, now)


def _is_awaited(run: Situation, epoch: int, step: int) -> bool:
    return run.stage is Stage.LOAD and (epoch, step) == (run.epoch, run.loading)


def _decide(run: Situation, now: float) -> None:
    decision = run.sources.decide()
    if decision.exit_code is not None:
        run.failed(decision.exit_code, decision.reason, now)
        return
    is_direct = run.sources.is_direct(decision)
    if is_direct:
        decision = replace(decision, reason=f"{decision.reason}; another layout wrote it, each rank reads its part")
    if run.ledger.outage is not None or decision.source != FRESH:
        run.announce(_plan(run, decision))
    run.former, run.rebuild = decision.former, decision.rebuild
    found = decision.incomplete
    if found is not None:
        _load(run, m.Rebuild(run.epoch, found.version, found.epoch, found.absent), found.version, now)
    elif decision.source == DISK and not is_direct:
        _load(run, m.LoadCheckpoint(run.epoch, decision.version), decision.version, now)
    else:
        _start_epoch(run, decision.version, now, from_storage=is_direct)


def _load(run: Situation, action: m.Action, version: int, now: float) -> None:
    """Memory has to be made whole before anybody can start from it."""
    run.stage, run.loading = Stage.LOAD, version
    run.deadline_s = now + run.recovery.step_timeout_s
    run.act(action)


def _plan(run: Situation, decision: Decision) -> RecoveryPlanned:
    planned = 0 if run.watch is None else -1  # a resume, or a change of nodes: no fault
    number = run.ledger.incidents if run.ledger.outage is not None else planned
    is_approximate = decision.rebuild is not None and decision.rebuild.is_approximate
    return RecoveryPlanned(
        number, decision.source, decision.version, decision.reason, decision.rejected, is_approximate
    )


def _start_epoch(run: Situation, version: int, now: float, *, from_storage: bool = False) -> None:
    if stopping.instead_of_training(run, now):
        return
    members = run.crew.members()
    preemption.forget(run)
    run.is_memory_whole = run.former is None and run.rebuild is None
    run.ledger.epoch_starts(version, is_restart=run.watch is not None, now=now)
    run.watch = EpochWatch(run.epoch, version, members, now)
    for worker in run.crew.seated:
        worker.train(run.epoch, now)
    run.stage, run.deadline_s = Stage.RUN, math.inf
    run.act(m.StartEpoch(run.epoch, members, version, from_storage, run.former, run.rebuild))
    run.announce(EpochStarted(run.epoch, len(members), version))
    stopping.follow_up(run, now)
