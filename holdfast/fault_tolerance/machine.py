"""The recovery machine: what has happened goes in, what to do comes out. No I/O, no clock, no threads, no chance.

::

    start ─▶ GATHER ─▶ INVENTORY ─▶ (LOAD ─▶) RUN ─▶ OVER
               ▲           any loss │        │ └─▶ STOP ─▶ OVER
               └───────────── GROW, MOVE ◀────┘

GATHER waits until every seat has an idle worker and every keeper answers. INVENTORY asks what could be restored
and from where, LOAD brings a durable checkpoint into memory, RUN trains. A loss in any of them begins a new epoch
and gathers again with what is left; so there is one way into an epoch, for the first start, for a resume
and for every recovery. A node that does not come back may be done without, and GROW lets the ranks leave together
when it has come back after all: see :mod:`holdfast.fault_tolerance.elastic`. MOVE does the same before a node is taken
away: see :mod:`holdfast.fault_tolerance.preemption`. Each wait has a deadline and each
deadline that passes is charged to a budget: whatever happens, a run either trains or ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

from holdfast.errors import InvariantViolation
from holdfast.fault_tolerance import deadlines, elastic, faults, homes, preemption, regroup, stopping
from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance.config import RecoveryConfig
from holdfast.fault_tolerance.membership import Layout
from holdfast.fault_tolerance.situation import Situation, Stage

__all__ = ["Layout", "State", "Supervisor"]


class State(Enum):
    """What the run is doing, in words for users."""

    INITIALIZING = "INITIALIZING"
    SCHEDULING = "SCHEDULING"
    RUNNING = "RUNNING"
    RESTARTING = "RESTARTING"
    STOPPING = "STOPPING"
    FINISHED = "FINISHED"
    FAILED = "FAILED"


class Supervisor:
    """Tell it everything through :meth:`handle`, from one thread, and carry out what it returns in that order.

    Messages may be late, doubled or about processes that are long dead; those change nothing.
    """

    def __init__(self, layout: Layout, recovery: RecoveryConfig, *, now: float) -> None:
        self._run = Situation(layout, recovery, now)

    @property
    def state(self) -> State:
        run = self._run
        if run.stage is Stage.OVER:
            return State.FAILED if run.has_failed else State.FINISHED
        if run.stage in _STATES:
            return _STATES[run.stage]
        if run.watch is not None:
            return State.RESTARTING
        return State.SCHEDULING if run.stage in (Stage.INVENTORY, Stage.LOAD) else State.INITIALIZING

    @property
    def members(self) -> tuple[m.Member, ...]:
        """Everybody who has a seat now, by rank."""
        return self._run.crew.members()

    @property
    def epoch(self) -> int:
        """The membership epoch that runs or is being gathered."""
        return self._run.epoch

    @property
    def nodes(self) -> tuple[int, ...]:
        """Those that take part."""
        return self._run.roster.nodes

    @property
    def faults(self) -> int:
        """Incidents so far, failures and preemptions."""
        return self._run.ledger.incidents

    @property
    def preemptions(self) -> int:
        """Incidents that were announced; those that were not are failures."""
        return self._run.ledger.preemptions

    @property
    def stop_by_s(self) -> float:
        """When whoever wants the run to stop will not wait any longer; infinite as long as nobody does."""
        return self._run.stop_by_s

    @property
    def steps_lost(self) -> int:
        """Finished steps that recoveries had to repeat."""
        return self._run.ledger.steps_lost

    @property
    def history(self) -> Sequence[str]:
        """One sentence per announced fault, oldest first."""
        return tuple(self._run.ledger.history)

    def start(self, now: float) -> list[m.Action]:
        """Begin the run. Called once."""
        run = self._run
        if run.stage is not Stage.NEW:
            raise InvariantViolation("a supervisor starts once; make a new one for another run")
        run.stage, run.epoch = Stage.GATHER, 1
        run.looked_s = run.waiting_since_s = run.said_s = now
        elastic.start_missing(run, now)
        run.act(*run.crew.fill_spares(incident=0, now=now))
        return run.take_actions()

    def handle(self, message: m.Message, now: float) -> list[m.Action]:
        """What to do now that this has happened. ``now`` never decreases."""
        run = self._run
        if run.stage in (Stage.NEW, Stage.OVER):
            return []
        handler = _HANDLERS.get(type(message))
        if handler is None:
            raise InvariantViolation(f"{type(message).__name__} is not a message of the recovery machine")
        handler(run, message, now)
        run.announce_first(run.ledger.news(now))
        _advance(run, now)
        return run.take_actions()


def _advance(run: Situation, now: float) -> None:
    """Whatever the message was, is the stage's condition met?"""
    if run.stage in (Stage.RUN, Stage.GROW, Stage.MOVE, Stage.STOP):
        _follow_progress(run, now)
        _go_on_if_all_have_left(run, now)
    if _is_complete(run):
        faults.reunite(run, now)
    if _is_complete(run):
        regroup.take_inventory(run, now)


def _is_complete(run: Situation) -> bool:
    return run.stage is Stage.GATHER and run.crew.is_ready and not run.keepers.waiting


def _follow_progress(run: Situation, now: float) -> None:
    assert run.watch is not None, "an epoch that runs has a watch"
    if run.watch.has_restored:
        run.ledger.restored(now)
    if run.watch.has_resumed:
        run.announce(*run.ledger.resumed(run.watch, now))
    if run.ledger.outage is None and run.stage is Stage.RUN:
        _keep_spares(run, now)
        preemption.begin_to_move(run, now)
    if run.ledger.outage is None and run.stage is Stage.RUN:
        elastic.begin_to_grow(run, now)


def _keep_spares(run: Situation, now: float) -> None:
    """Only once every rank trains: what a spare imports takes processor time that a recovery needs itself."""
    if run.spares_lost <= run.recovery.max_failures:
        run.act(*run.crew.fill_spares(incident=run.ledger.incidents, now=now))
    has_lost = run.ledger.incidents + run.spares_lost > 0
    is_encoded = run.encoded[0] == run.epoch
    run.announce(*run.protection.measure(run.crew.spares, run.crew.crowded, has_lost=has_lost, is_encoded=is_encoded))


def _go_on_if_all_have_left(run: Situation, now: float) -> None:
    if not run.crew.is_ready:
        return
    if all(worker.outcome is m.Outcome.FINISHED for worker in run.crew.seated):
        run.end(m.Finish("finished", 0, "the goal is reached"), now)
    elif run.stage is Stage.GROW:
        deadlines.grow(run, now)
    elif run.stage is Stage.MOVE:
        if run.move is not None and preemption.is_settled(run, run.move, now):
            faults.vacate(run, now)
    else:
        run.stopped(run.stop_reason, now)


def _beats(run: Situation, message: m.Beats, now: float) -> None:
    run.beats = message.beats
    if run.watch is not None:
        run.watch.note(message.beats)
        run.ledger.reached(run.watch.top_step)


def _protected(run: Situation, message: m.Protected, now: float) -> None:
    run.encoded = max(run.encoded, (message.epoch, message.version))
    run.is_memory_whole |= message.epoch == run.epoch


def _persisted(run: Situation, message: m.Persisted, now: float) -> None:
    run.persisted = max(run.persisted, message.step)


def _stop_asked(run: Situation, message: m.StopAsked, now: float) -> None:
    stopping.ask(run, message.reason, now)


def _redundancy_measured(run: Situation, message: m.RedundancyMeasured, now: float) -> None:
    run.sources.measured(message.step, message.angular_distance)


_STATES: Mapping[Stage, State] = {
    Stage.RUN: State.RUNNING,
    Stage.GROW: State.RESTARTING,
    Stage.MOVE: State.RESTARTING,
    Stage.STOP: State.STOPPING,
}

# Each handler takes its own kind of message, which a mapping cannot express: hence Any.
_HANDLERS: Mapping[type[m.Message], Callable[[Situation, Any, float], None]] = {
    m.WorkerReady: homes.worker_ready,
    m.WorkerLost: faults.worker_lost,
    m.WorkerParked: faults.worker_parked,
    m.KeeperReady: homes.keeper_ready,
    m.KeeperLost: faults.keeper_lost,
    m.NodeDraining: preemption.noticed,
    m.NodeMoved: homes.node_moved,
    m.InventoryTaken: regroup.inventory_taken,
    m.CheckpointLoaded: regroup.checkpoint_loaded,
    m.CheckpointRefused: regroup.checkpoint_refused,
    m.Protected: _protected,
    m.Persisted: _persisted,
    m.RedundancyMeasured: _redundancy_measured,
    m.Beats: _beats,
    m.Tick: deadlines.tick,
    m.StopAsked: _stop_asked,
}
