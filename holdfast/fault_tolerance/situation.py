"""Everything the recovery machine knows, and the few moves that every part of it makes: announce, leave, end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from holdfast.events import Event
from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance.config import RecoveryConfig
from holdfast.fault_tolerance.detector import Limits
from holdfast.fault_tolerance.incidents import Ledger, Loss
from holdfast.fault_tolerance.lanes import Recorded
from holdfast.fault_tolerance.membership import Crew, Keepers, Layout, Worker, WorkerState
from holdfast.fault_tolerance.progress import EpochWatch
from holdfast.fault_tolerance.protection import ProtectionGauge
from holdfast.fault_tolerance.sources import Sources
from holdfast.fault_tolerance.stage_policy import StageRebuild

__all__ = ["INTERRUPTED", "NOTHING_SAVED", "Absences", "Move", "Notice", "Situation", "Stage"]

INTERRUPTED, NOTHING_SAVED = 75, 143
"""Exit codes of a stop: with finished steps to resume from, and without."""


_SILENT_S = 1.0


class Stage(Enum):
    """Where the machine is; see :mod:`holdfast.fault_tolerance.machine`."""

    NEW = 0
    GATHER = 1
    INVENTORY = 2
    LOAD = 3
    RUN = 4
    GROW = 5
    MOVE = 6
    STOP = 7
    OVER = 8


@dataclass(slots=True)
class Absences:
    """Nodes that are waited for or done without, see :mod:`holdfast.fault_tolerance.elastic`."""

    since_s: dict[int, float] = field(default_factory=dict)
    """Since when a node of the roster has not been ready."""
    retry_s: dict[int, float] = field(default_factory=dict)
    """When what is missing on a node may be started again; at once where there is no entry."""
    refused: str = ""
    """Why the run cannot go on without the nodes that it waits for."""


@dataclass(slots=True)
class Notice:
    """The host of a node will be taken away, see :mod:`holdfast.fault_tolerance.preemption`."""

    host: str
    deadline_s: float
    """Infinite if nobody has said."""
    reason: str
    has_home: bool = False
    """There is another host for the node, where its processes start from now on."""
    ready_by_s: float = math.inf
    """Until when the move waits for warm workers there; infinite before they were started."""
    is_over: bool = False
    """The node has been lost, or has moved."""


@dataclass(slots=True)
class Move:
    """Nodes that change their host, the ranks having left their epoch together."""

    nodes: tuple[int, ...]
    boundary: int = -1
    """The version that the ranks have left behind."""
    is_settled: bool = False
    """All have left."""


class Situation:
    """The machine's memory. Changed only by the modules of the machine, each within one call of ``handle``."""

    def __init__(self, layout: Layout, recovery: RecoveryConfig, now: float) -> None:
        self.layout, self.recovery = layout, recovery
        self.limits = Limits(recovery.suspect_after_s, recovery.step_timeout_s)
        self.roster = layout.roster(0, range(layout.nodes))
        self.absences = Absences()
        self.crew = Crew(layout, self.roster, recovery.start_timeout_s)
        self.keepers = Keepers(self.roster, recovery.start_timeout_s)
        self.ledger = Ledger(
            max_failures=recovery.max_failures,
            max_no_progress=recovery.max_no_progress,
            max_preemptions=recovery.max_preemptions,
        )
        self.sources = Sources(self.roster, layout.stages, layout.replicas_every)
        self.protection = ProtectionGauge(layout.spares, self.roster)
        self.encoded = (-1, -1)
        """The newest epoch in which the keepers have committed a version, data and parity, and that version."""
        self.persisted = -1
        """Step of the newest durable checkpoint that was written in this attempt."""
        self.notices: dict[int, Notice] = {}
        """By node."""
        self.move: Move | None = None
        self.is_memory_whole = True
        """Every rank's keeper still has what the rank has written."""
        self.stage = Stage.NEW
        self.deadline_s = math.inf
        """When the stage will have lasted too long."""
        self.epoch = 0
        self.watch: EpochWatch | None = None
        """Of the epoch that runs, or ran last."""
        self.beats: Mapping[int, m.BeatSeen] = {}
        """The last signs of life told, by worker."""
        self.loading = -1
        """Step of the checkpoint that is being loaded."""
        self.former: Recorded | None = None
        """What the ranks will read from the memory of another roster, if that is where the next epoch starts from."""
        self.rebuild: StageRebuild | None = None
        """Which stages will be made from others, likewise."""
        self.spares_lost = 0
        self.silent_nodes: set[int] = set()
        """Whose last keeper did not answer."""
        self.stop_reason = ""
        self.stop_by_s = math.inf
        """When the process has to be gone; infinite as long as nobody wants that."""
        self.whole_by_s = math.inf
        """Until when a recovery may go on although somebody wants the run to stop."""
        self.has_failed = False
        self.looked_s = self.waiting_since_s = self.said_s = now
        self._actions: list[m.Action] = []

    # -- actions --------------------------------------------------------------------------------------------------

    def act(self, *actions: m.Action) -> None:
        self._actions += actions

    def announce(self, *events: Event) -> None:
        self._actions += [m.Announce(event) for event in events]

    def announce_first(self, events: Iterable[Event]) -> None:
        """A fault is told before anything is done about it."""
        self._actions[:0] = [m.Announce(event) for event in events]

    def take_actions(self) -> list[m.Action]:
        actions, self._actions = self._actions, []
        return actions

    # -- moves ----------------------------------------------------------------------------------------------------

    def leave_epoch(self, now: float) -> None:
        """Who is in the old epoch must leave it, and may bring its live state into memory on the way. What memory
        holds is counted after the fence that comes before every inventory."""
        self.epoch += 1
        training = list(self.crew.in_state(WorkerState.TRAINING))
        for worker in training:
            worker.leave(now + self._patience_s(worker), now)
            self.act(m.AbortWorker(worker.worker, worker.epoch, may_update=len(training) == self.roster.world))

    def _patience_s(self, worker: Worker) -> float:
        """Who is on a node whose keeper does not answer is probably frozen with it, and will not hear of leaving."""
        is_silent = worker.node in self.silent_nodes
        return min(_SILENT_S, self.recovery.abort_after_s) if is_silent else self.recovery.abort_after_s

    def is_expected(self, loss: Loss) -> bool:
        """Its node was to be taken away. A victim may be one of such a node, whose end is not known yet; a process
        that never started is no part of what was announced."""
        if loss.is_victim:
            return any(node in self.notices for node in self.roster.nodes)
        notice = None if loss.node is None else self.notices.get(loss.node)
        if notice is None or not loss.had_started:
            return False
        return not notice.is_over or loss.joined < self.ledger.incidents  # otherwise it was there to replace what went

    def stopped(self, reason: str, now: float) -> None:
        """End as somebody asked. What memory holds is saved by the executor."""
        code = INTERRUPTED if self.ledger.best_step > 0 else NOTHING_SAVED
        self.end(m.Finish("stopped", code, reason), now)

    def failed(self, exit_code: int, reason: str, now: float) -> None:
        """Give up."""
        self.has_failed = True
        self.end(m.Finish("failed", exit_code, reason), now)

    def end(self, finish: m.Finish, now: float) -> None:
        """Whoever still trains must not write any more; then the executor has the last word."""
        self.announce_first(self.ledger.news(now, at_once=True))
        if self.crew.in_state(WorkerState.TRAINING):
            self.leave_epoch(now)
            self.act(m.Fence(self.epoch, is_last=True))
        self.act(finish)
        self.stage = Stage.OVER
