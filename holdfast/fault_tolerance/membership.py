"""Who exists: workers in their seats, spares in reserve, keepers on their nodes. Bookkeeping for the recovery machine.

A *seat* is a rank with the node it belongs to; the worker in it may change. Worker ids are never reused, so a
message from a worker that is not listed here any more is stale by definition.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from enum import Enum

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.lanes import Lane
from holdfast.fault_tolerance.messages import Member, Outcome, StartKeeper, StartWorker

__all__ = ["Crew", "Keepers", "Layout", "Worker", "WorkerState"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which processes the run is made of. Raises: ConfigurationError if the numbers do not fit together."""

    nodes: int
    workers_per_node: int
    spares: int
    hosts: tuple[str, ...]
    """Host of each node. A worker can take any seat on its host, because keepers share memory with it."""
    lanes: tuple[Lane, ...] = ()
    """Which ranks protect each other; none where nothing but each node's own memory is kept."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}={value} must be at least {least}"
            for name, value, least in (
                ("nodes", self.nodes, 1),
                ("workers_per_node", self.workers_per_node, 1),
                ("spares", self.spares, 0),
            )
            if value < least
        ]
        if len(self.hosts) != self.nodes:
            problems.append(f"hosts={list(self.hosts)} must name one host for each of nodes={self.nodes}")
        if problems:
            raise ConfigurationError(problems)

    @property
    def world(self) -> int:
        return self.nodes * self.workers_per_node

    def node_of(self, rank: int) -> int:
        return rank // self.workers_per_node


class WorkerState(Enum):
    """Where a living worker is in its life; a dead one is not listed."""

    STARTING = "starting"
    IDLE = "idle"
    TRAINING = "training"
    LEAVING = "leaving"


@dataclass(slots=True)
class Worker:
    """One living worker process."""

    worker: int
    node: int
    since_s: float
    """When its state began."""
    deadline_s: float
    """When its state will have lasted too long."""
    incident: int
    """Number of incidents when it was started or took its seat."""
    rank: int | None = None
    """None while it is a spare."""
    state: WorkerState = WorkerState.STARTING
    pid: int | None = None
    epoch: int = -1
    """Membership epoch it is in, or was in last."""
    outcome: Outcome | None = None
    """How it left that epoch."""

    @property
    def is_in_epoch(self) -> bool:
        return self.state in (WorkerState.TRAINING, WorkerState.LEAVING)

    def rest(self, outcome: Outcome | None, now: float) -> None:
        """It waits for work: just started, or parked with ``outcome``."""
        self.state, self.outcome, self.since_s, self.deadline_s = WorkerState.IDLE, outcome, now, math.inf

    def train(self, epoch: int, now: float) -> None:
        """It is sent into an epoch."""
        self.state, self.outcome, self.epoch, self.since_s = WorkerState.TRAINING, None, epoch, now

    def leave(self, deadline_s: float, now: float) -> None:
        """It is asked to leave its epoch."""
        self.state, self.since_s, self.deadline_s = WorkerState.LEAVING, now, deadline_s


class Crew:
    """All living workers and the seat each one has."""

    def __init__(self, layout: Layout, start_timeout_s: float) -> None:
        self._layout, self._start_timeout_s = layout, start_timeout_s
        self._workers: dict[int, Worker] = {}
        self._seats: list[Worker | None] = [None] * layout.world
        self._next = 0

    def get(self, worker: int) -> Worker | None:
        """None for one that is dead, was killed or never existed."""
        return self._workers.get(worker)

    @property
    def seated(self) -> list[Worker]:
        return [worker for worker in self._seats if worker is not None]

    @property
    def spares(self) -> list[Worker]:
        return [worker for worker in self._workers.values() if worker.rank is None]

    @property
    def is_ready(self) -> bool:
        """Every seat has a worker that waits for an epoch."""
        return all(worker is not None and worker.state is WorkerState.IDLE for worker in self._seats)

    def members(self) -> tuple[Member, ...]:
        """Everybody who has a seat, by rank."""
        node_of = self._layout.node_of
        return tuple(Member(r, node_of(r), w.worker) for r, w in enumerate(self._seats) if w is not None)

    def in_state(self, *states: WorkerState) -> list[Worker]:
        """Seated workers in one of these states, by rank."""
        return [worker for worker in self.seated if worker.state in states]

    def overdue(self, now: float) -> list[Worker]:
        """Workers, spares included, that have been starting or leaving for too long."""
        return [worker for worker in self._workers.values() if worker.deadline_s <= now]

    def lose(self, worker: int) -> Worker | None:
        """Forget a worker and vacate its seat; None if it was forgotten before."""
        lost = self._workers.pop(worker, None)
        if lost is not None and lost.rank is not None:
            self._seats[lost.rank] = None
        return lost

    def fill_seats(self, *, incident: int, now: float) -> list[StartWorker]:
        """Give each vacant seat a spare of its host, the warmest first, or else a new worker."""
        actions = []
        for rank, worker in enumerate(self._seats):
            if worker is None:
                node = self._layout.node_of(rank)
                spare = self._spare_for(node)
                if spare is None:
                    actions.append(self._start(node, incident, now))
                    spare = self._workers[actions[-1].worker]
                spare.rank, spare.incident = rank, incident
                self._seats[rank] = spare
        return actions

    def fill_spares(self, *, incident: int, now: float) -> list[StartWorker]:
        """Start the spares that are missing, spread over the nodes as at the beginning."""
        wanted = Counter(spare % self._layout.nodes for spare in range(self._layout.spares))
        missing = wanted - Counter(spare.node for spare in self.spares)
        return [self._start(node, incident, now) for node in sorted(missing.elements())]

    def _spare_for(self, node: int) -> Worker | None:
        host = self._layout.hosts[node]
        usable = [spare for spare in self.spares if self._layout.hosts[spare.node] == host]
        # A spare on the seat's own node leaves the others to theirs; the oldest one has imported the most.
        return min(usable, key=lambda s: (s.state is not WorkerState.IDLE, s.node != node, s.worker), default=None)

    def _start(self, node: int, incident: int, now: float) -> StartWorker:
        worker = Worker(self._next, node, now, now + self._start_timeout_s, incident)
        self._next += 1
        self._workers[worker.worker] = worker
        return StartWorker(worker.worker, node)


@dataclass(slots=True)
class _Keeper:
    is_ready: bool
    deadline_s: float
    incident: int


class Keepers:
    """Whether each node's keeper answers. Keepers have no ids: the one of a node is the one started last."""

    def __init__(self, nodes: int, start_timeout_s: float) -> None:
        self._start_timeout_s = start_timeout_s
        self._by_node: list[_Keeper | None] = [None] * nodes

    @property
    def waiting(self) -> list[int]:
        """Nodes whose keeper does not answer yet."""
        return [node for node, keeper in enumerate(self._by_node) if keeper is None or not keeper.is_ready]

    def ready(self, node: int) -> None:
        keeper = self._by_node[node] if 0 <= node < len(self._by_node) else None
        if keeper is not None:
            keeper.is_ready, keeper.deadline_s = True, math.inf

    def lose(self, node: int) -> int | None:
        """Forget the keeper of ``node``: the number of incidents when it was started, None if there was none."""
        keeper = self._by_node[node] if 0 <= node < len(self._by_node) else None
        if keeper is None:
            return None
        self._by_node[node] = None
        return keeper.incident

    def fill(self, *, incident: int, now: float) -> list[StartKeeper]:
        """Start a keeper wherever there is none."""
        missing = [node for node, keeper in enumerate(self._by_node) if keeper is None]
        for node in missing:
            self._by_node[node] = _Keeper(False, now + self._start_timeout_s, incident)
        return [StartKeeper(node) for node in missing]

    def overdue(self, now: float) -> list[int]:
        """Nodes whose keeper has been starting for too long."""
        return [n for n, keeper in enumerate(self._by_node) if keeper is not None and keeper.deadline_s <= now]
