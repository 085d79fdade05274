"""Who exists: workers in their seats, spares in reserve, keepers on their nodes. Bookkeeping for the recovery machine.

A *seat* is a place on a node; the worker in it may change. While the node takes part in the run, the seat has a rank.
Worker ids are never reused, so a message from a worker that is not listed here any more is stale by definition.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.lanes import Lane, Roster, make_lanes
from holdfast.fault_tolerance.messages import Member, Outcome, StartKeeper, StartWorker
from holdfast.fault_tolerance.placement import make_groups
from holdfast.fault_tolerance.stage_policy import StageFacts

__all__ = ["Crew", "Keepers", "Layout", "Worker", "WorkerState"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Which processes the run is made of. Raises: ConfigurationError if the numbers do not fit together."""

    nodes: int
    workers_per_node: int
    spares: int
    hosts: tuple[str, ...]
    """Host of each node at the start. A worker can take any seat on its host, because keepers share memory with it."""
    lanes: tuple[Lane, ...] = ()
    """Which ranks protect each other when all nodes take part; none where each node's own memory is all there is."""
    zones: tuple[str, ...] = ()
    """Failure domain of each node; empty where nobody knows."""
    group_size: int = 0
    parity: int = 0
    """See :func:`holdfast.fault_tolerance.placement.make_groups`: for the lanes of fewer nodes."""
    stages: StageFacts | None = None
    """The pipeline, if its lost stages may be rebuilt from others."""
    replicas_every: int = 0
    """Ranks that are so far apart hold the same state, random numbers aside; 0 if none do."""
    batch_parts: int = 0
    """Micro-batches in a global batch, of which every rank must get equally many; 0 suits any number of ranks."""

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
        """When all nodes take part."""
        return self.nodes * self.workers_per_node

    def roster(self, number: int, nodes: Sequence[int]) -> Roster:
        """A membership of these nodes."""
        return Roster(number, tuple(nodes), self.workers_per_node, self._lanes_of(nodes))

    def can_train(self, nodes: int) -> bool:
        """So many nodes can share the global batch."""
        return nodes > 0 and self.batch_parts % (nodes * self.workers_per_node) == 0

    def _lanes_of(self, nodes: Sequence[int]) -> tuple[Lane, ...]:
        if not self.lanes or len(nodes) == self.nodes:
            return self.lanes
        zones = [self.zones[node] if self.zones else "" for node in nodes]
        grouping = make_groups(zones, self.group_size, self.parity)
        return make_lanes(grouping.groups, self.workers_per_node, grouping.parity)


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
    host: str
    since_s: float
    """When its state began."""
    deadline_s: float
    """When its state will have lasted too long."""
    incident: int
    """Number of incidents when it was started or took its seat."""
    seat: int | None = None
    """None while it is a spare."""
    rank: int | None = None
    """None while it has no seat, or one on a node that the run goes on without."""
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
    """All living workers and the seat each one has. Those of nodes that do not take part wait for their turn."""

    def __init__(self, layout: Layout, roster: Roster, start_timeout_s: float) -> None:
        self._layout, self._roster, self._start_timeout_s = layout, roster, start_timeout_s
        self._workers: dict[int, Worker] = {}
        self._seats: list[Worker | None] = [None] * layout.world
        self._hosts = list(layout.hosts)
        self._known_s = [-math.inf] * layout.nodes
        """Since when what is started for a node has got to its host, as far as is known."""
        self._moved: set[int] = set()
        self._next = 0

    def move_to(self, roster: Roster) -> None:
        """Other nodes take part from now on: everybody keeps the seat, and ranks are counted anew."""
        self._roster = roster
        for worker in self._workers.values():
            worker.rank = None
        for rank, seated in enumerate(self._taking_part()):
            if seated is not None:
                seated.rank = rank

    def move(self, node: int, host: str, since_s: float) -> bool:
        """Who is started for ``node`` after ``since_s`` is on ``host``; who lives on the old one stays there. False
        for old news."""
        if not 0 <= node < len(self._hosts) or host == self._hosts[node] or since_s < self._known_s[node]:
            return False
        self._hosts[node], self._known_s[node] = host, since_s
        self._moved.add(node)
        return True

    @property
    def crowded(self) -> list[int]:
        """Nodes that have moved to the host of another one: both are lost with it."""
        hosts = {member.node: self._workers[member.worker].host for member in self.members()}
        return [node for node in sorted(self._moved & hosts.keys()) if [*hosts.values()].count(hosts[node]) > 1]

    def get(self, worker: int) -> Worker | None:
        """None for one that is dead, was killed or never existed."""
        return self._workers.get(worker)

    @property
    def seated(self) -> list[Worker]:
        """Everybody who has a rank, by rank."""
        return [worker for worker in self._taking_part() if worker is not None]

    @property
    def spares(self) -> list[Worker]:
        return [worker for worker in self._workers.values() if worker.seat is None]

    @property
    def is_ready(self) -> bool:
        """Every rank has a worker that waits for an epoch."""
        return all(_waits(worker) for worker in self._taking_part())

    def is_node_ready(self, node: int) -> bool:
        """Every seat of the node has a worker that waits for an epoch."""
        return all(_waits(self._seats[seat]) for seat in self._seats_of(node))

    def is_node_missing(self, node: int) -> bool:
        """Some seat of the node has no worker, or one that is still starting."""
        workers = [self._seats[seat] for seat in self._seats_of(node)]
        return any(worker is None or worker.state is WorkerState.STARTING for worker in workers)

    def members(self) -> tuple[Member, ...]:
        """Everybody who has a rank, by rank."""
        node_of = self._roster.node_of
        return tuple(Member(r, node_of(r), w.worker) for r, w in enumerate(self._taking_part()) if w is not None)

    def in_state(self, *states: WorkerState) -> list[Worker]:
        """Workers with a rank in one of these states, by rank."""
        return [worker for worker in self.seated if worker.state in states]

    def overdue(self, now: float) -> list[Worker]:
        """Workers, spares included, that have been starting or leaving for too long."""
        return [worker for worker in self._workers.values() if worker.deadline_s <= now]

    def lose(self, worker: int) -> Worker | None:
        """Forget a worker and vacate its seat; None if it was forgotten before."""
        lost = self._workers.pop(worker, None)
        if lost is not None and lost.seat is not None:
            self._seats[lost.seat] = None
        return lost

    def fill_seats(self, nodes: Iterable[int], *, incident: int, now: float) -> list[StartWorker]:
        """Give each vacant seat of these nodes a spare of its host, the warmest first, or else a new worker. A node
        that does not take part gets new ones only."""
        actions = []
        for node in nodes:
            for seat in self._seats_of(node):
                if self._seats[seat] is None:
                    worker = self._spare_for(node) if node in self._roster.nodes else None
                    if worker is None:
                        actions.append(self._start(node, incident, now))
                        worker = self._workers[actions[-1].worker]
                    worker.seat, worker.incident = seat, incident
                    self._seats[seat] = worker
        self.move_to(self._roster)
        return actions

    def fill_spares(self, *, incident: int, now: float) -> list[StartWorker]:
        """Start the spares that are missing, spread over the nodes that take part."""
        nodes = self._roster.nodes
        wanted = Counter(nodes[spare % len(nodes)] for spare in range(self._layout.spares))
        missing = wanted - Counter(spare.node for spare in self.spares)
        return [self._start(node, incident, now) for node in sorted(missing.elements())]

    def prepare(self, node: int, *, incident: int, now: float) -> list[StartWorker]:
        """Start a worker for each seat of a node on the host that it will move to; spares until they are needed."""
        return [self._start(node, incident, now) for _ in self._seats_of(node)]

    def has_relief(self, nodes: Iterable[int]) -> bool:
        """The hosts that these nodes have moved to have a warm spare for each of their seats."""
        wanted = Counter(self._hosts[node] for node in nodes for _ in self._seats_of(node))
        warm = Counter(spare.host for spare in self.spares if spare.state is WorkerState.IDLE)
        return wanted <= warm

    def host_of(self, node: int) -> str:
        """Where what is started for the node gets to."""
        return self._hosts[node]

    def of_node(self, node: int) -> list[Worker]:
        """Those that have one of its seats."""
        seated = [self._seats[seat] for seat in self._seats_of(node)]
        return [worker for worker in seated if worker is not None]

    def left_behind(self, node: int, host: str) -> list[Worker]:
        """Workers of a node that are not where it is now, and the spares on a host that it leaves."""
        elsewhere = [worker for worker in self.of_node(node) if worker.host != self._hosts[node]]
        return elsewhere + [spare for spare in self.spares if spare.host == host != self._hosts[node]]

    def _seats_of(self, node: int) -> range:
        per_node = self._layout.workers_per_node
        return range(node * per_node, (node + 1) * per_node)

    def _taking_part(self) -> list[Worker | None]:
        """What sits in the seats of the nodes that take part, by rank."""
        return [self._seats[seat] for node in self._roster.nodes for seat in self._seats_of(node)]

    def _spare_for(self, node: int) -> Worker | None:
        usable = [spare for spare in self.spares if spare.host == self._hosts[node]]
        # A spare on the seat's own node leaves the others to theirs; the oldest one has imported the most.
        return min(usable, key=lambda s: (s.state is not WorkerState.IDLE, s.node != node, s.worker), default=None)

    def _start(self, node: int, incident: int, now: float) -> StartWorker:
        worker = Worker(self._next, node, self._hosts[node], now, now + self._start_timeout_s, incident)
        self._next += 1
        self._workers[worker.worker] = worker
        return StartWorker(worker.worker, node)


def _waits(worker: Worker | None) -> bool:
    return worker is not None and worker.state is WorkerState.IDLE


@dataclass(slots=True)
class _Keeper:
    is_ready: bool
    since_s: float
    """When it was started."""
    deadline_s: float
    incident: int
    host: str


class Keepers:
    """Whether each node's keeper answers. Keepers have no ids: the one of a node is the one started last."""

    def __init__(self, roster: Roster, start_timeout_s: float) -> None:
        self._roster, self._start_timeout_s = roster, start_timeout_s
        self._by_node: list[_Keeper | None] = [None] * len(roster.nodes)

    def move_to(self, roster: Roster) -> None:
        """Other nodes take part from now on."""
        self._roster = roster

    @property
    def waiting(self) -> list[int]:
        """Nodes that take part and whose keeper does not answer yet."""
        return [node for node in self._roster.nodes if not self.is_ready(node)]

    def has(self, node: int) -> bool:
        """Whether the node has a keeper, or one that is starting."""
        return 0 <= node < len(self._by_node) and self._by_node[node] is not None

    def is_ready(self, node: int) -> bool:
        """Whether the keeper of this node answers."""
        keeper = self._by_node[node]
        return keeper is not None and keeper.is_ready

    def ready(self, node: int) -> float | None:
        """It answers: when it was started, None if there is no such keeper."""
        keeper = self._by_node[node] if 0 <= node < len(self._by_node) else None
        if keeper is None:
            return None
        keeper.is_ready, keeper.deadline_s = True, math.inf
        return keeper.since_s

    def found_on(self, node: int, host: str) -> None:
        """It is not where it was expected."""
        keeper = self._by_node[node]
        assert keeper is not None, "it has just answered"
        keeper.host = host

    def lose(self, node: int) -> int | None:
        """Forget the keeper of ``node``: the number of incidents when it was started, None if there was none."""
        keeper = self._by_node[node] if 0 <= node < len(self._by_node) else None
        if keeper is None:
            return None
        self._by_node[node] = None
        return keeper.incident

    def host_of(self, node: int) -> str | None:
        """Where the keeper of this node is; None without one."""
        keeper = self._by_node[node] if 0 <= node < len(self._by_node) else None
        return None if keeper is None else keeper.host

    def fill(
        self, nodes: Iterable[int], host_of: Callable[[int], str], *, incident: int, now: float
    ) -> list[StartKeeper]:
        """Start a keeper on each of these nodes that has none."""
        missing = [node for node in nodes if self._by_node[node] is None]
        for node in missing:
            self._by_node[node] = _Keeper(False, now, now + self._start_timeout_s, incident, host_of(node))
        return [StartKeeper(node) for node in missing]

    def overdue(self, now: float) -> list[int]:
        """Nodes whose keeper has been starting for too long."""
        return [n for n, keeper in enumerate(self._by_node) if keeper is not None and keeper.deadline_s <= now]
