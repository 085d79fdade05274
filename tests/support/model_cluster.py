"""A cluster in one data structure: it carries out the recovery machine's actions and checks that they make sense.

Workers train a toy whose state is a chain of digests, so that every step has one right state and any mixture of
versions shows; the state is the same whatever the number of ranks that it is divided among. Nothing here is random or
timed by itself: whoever drives the model decides which pending message arrives next, which worker moves, what breaks
and how late it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from holdfast.events import Event, FaultDetected, RecoveryDone
from holdfast.fault_tolerance import messages as m
from holdfast.fault_tolerance.config import RecoveryConfig
from holdfast.fault_tolerance.lanes import Recorded, Roster
from holdfast.fault_tolerance.machine import Layout, State, Supervisor
from holdfast.types import Phase

__all__ = ["Broken", "Copy", "ModelCluster", "Worker", "state_after"]

_BUFFERS = 3
_START = "initial state"


class Broken(AssertionError):
    """The machine ordered something that would have broken a promise."""


def require(holds: bool, promise: str) -> None:
    if not holds:
        raise Broken(promise)


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=12).hexdigest()


def _combine(values: list[str]) -> str:
    """Of parts of one state the same, however many there are."""
    return _digest("all ranks", sorted(set(values)))


def state_after(steps: int) -> str:
    """What all ranks together must hold after so many steps: the undisturbed run, computed without a machine."""
    value = _digest(_START)
    for _ in range(steps):
        value = _digest(_combine([value]))
    return _combine([value])


@dataclass(frozen=True)
class Copy:
    """One rank's part of one version."""

    epoch: int
    world: int
    rank: int
    value: str
    lineage: str
    """Which epoch computed which step before this one: parts of one version must agree on it."""
    is_good: bool = True


@dataclass
class Worker:
    """A worker process."""

    worker: int
    node: int
    host: str = ""
    is_alive: bool = True
    is_frozen: bool = False
    is_hung: bool = False
    """Beats, but does not move and cannot be asked to leave."""
    has_started: bool = False
    rank: int = -1
    roster: int = -1
    epoch: int | None = None
    step: int = 0
    value: str = ""
    lineage: str = ""
    is_captured: bool = False
    arena: dict[int, Copy] | None = None
    """What it has mapped; stays readable when the keeper is gone."""

    @property
    def can_move(self) -> bool:
        return self.is_alive and not self.is_frozen and not self.is_hung

    @property
    def trains(self) -> bool:
        return self.can_move and self.epoch is not None


@dataclass
class Keeper:
    """A keeper process with its memory, by roster and rank, and then by version."""

    node: int
    host: str = ""
    is_alive: bool = True
    has_started: bool = False
    is_known_dead: bool = False
    """The machine has been told."""
    fence: int = 0
    arenas: dict[tuple[int, int], dict[int, Copy]] = field(default_factory=dict)


class ModelCluster:
    """Performs actions at once; their answers, and the news of what breaks, wait in ``pending`` to be delivered."""

    def __init__(self, layout: Layout, recovery: RecoveryConfig, *, goal: int, now: float = 100.0) -> None:
        self.layout, self.recovery, self.goal, self.now = layout, recovery, goal, now
        self.roster = layout.roster(0, range(layout.nodes))
        self.rosters: dict[int, Roster] = {0: self.roster}
        self.gone: set[int] = set()
        """Nodes on which no process can live."""
        self.hosts = list(layout.hosts)
        """Where what is started for a node gets to."""
        self.doomed: dict[str, float] = {}
        """Hosts that will be taken away, and when."""
        self._commits: dict[int, int] = {}
        """Versions committed, by roster."""
        self.workers: dict[int, Worker] = {}
        self.keepers: dict[int, Keeper] = {}
        self.durable: dict[int, dict[int, Copy]] = {}
        self.unreadable: dict[int, str] = {}
        """Checkpoints that an inventory rejects, by step."""
        self.pending: list[m.Message] = []
        self.on_pending: Callable[[m.Message], None] = self.pending.append
        self.boards: dict[int, m.BeatSeen] = {}
        self.seating: dict[int, int] = {}
        """Rank to worker, as of the last inventory."""
        self.members: tuple[m.Member, ...] = ()
        self.votes: dict[tuple[int, int], tuple[str, bool]] = {}
        self.committed: dict[int, str] = {}
        self.stopping: set[int] = set()
        self.events: list[Event] = []
        self.actions: list[m.Action] = []
        self.finish: m.Finish | None = None
        self.started: list[m.StartEpoch] = []
        self.top_step_by_epoch: dict[int, int] = {}
        self._gone: set[int] = set()
        """Workers of whose death the machine has been told, or that it ordered."""
        self._offered: m.InventoryTaken | None = None
        self._loaded: m.CheckpointLoaded | None = None
        self._fenced = 0
        self._quarantined: dict[int, set[m.HeldVersion]] = {}
        self.supervisor = Supervisor(layout, recovery, now=now)
        self.perform(self.supervisor.start(now))

    # -- talking to the machine -----------------------------------------------------------------------------------

    def tell(self, message: m.Message) -> None:
        """Deliver a message and carry out the answer."""
        if isinstance(message, m.WorkerLost):
            self._gone.add(message.worker)
        elif isinstance(message, m.KeeperLost):
            self.keepers[message.node].is_known_dead = True
        elif isinstance(message, m.InventoryTaken) and message.epoch == self._fenced:  # otherwise it is old news
            self._offered = message
        elif isinstance(message, m.CheckpointLoaded) and message.epoch == self._fenced:
            self._loaded = message
        was_over = self.finish is not None
        actions = self.supervisor.handle(message, self.now)
        require(not (was_over and actions), f"nothing is ordered after the end, but {actions}")
        self.perform(actions)

    def tick(self, seconds: float) -> None:
        """Time passes, processes beat, the driver looks."""
        self.now += seconds
        for host in [host for host, end_s in self.doomed.items() if end_s <= self.now]:
            self.take_host_away(host)
        for worker in self.workers.values():
            if worker.is_alive and not worker.is_frozen:
                self._beat(worker)
        seen = {w: self.boards[r] for r, w in self.seating.items() if r in self.boards}
        self.tell(m.Beats(seen))
        self.tell(m.Tick())

    def perform(self, actions: list[m.Action]) -> None:
        for action in actions:
            require(self.finish is None, f"Finish is the last action, but {action} follows")
            self.actions.append(action)
            _PERFORM[type(action)](self, action)

    def _later(self, message: m.Message) -> None:
        self.on_pending(message)

    # -- the world moves ------------------------------------------------------------------------------------------

    def work(self, worker: Worker) -> bool:
        """Let one worker do one thing: vote and update, or capture its new state. False if it has to wait."""
        if not worker.trains:
            return False
        if not worker.is_captured:
            self._capture(worker)
            return True
        verdict = self._vote(worker)
        if verdict is None:
            return False
        together, stops = verdict
        if worker.step >= self.goal:
            self._park(worker, m.Outcome.FINISHED)
        elif stops:
            self._park(worker, m.Outcome.STOPPED, version=worker.step)
        else:
            assert worker.epoch is not None
            worker.step, worker.is_captured = worker.step + 1, False
            worker.value, worker.lineage = _digest(together), _digest(worker.lineage, worker.epoch)
            self.top_step_by_epoch[worker.epoch] = max(self.top_step_by_epoch[worker.epoch], worker.step)
            self._beat(worker, moved=True)
        return True

    def _capture(self, worker: Worker) -> None:
        assert worker.arena is not None and worker.epoch is not None
        if self._fence_seen_by(worker) > worker.epoch:
            return  # a fenced worker publishes nothing
        copy = Copy(worker.epoch, self.roster.world, worker.rank, worker.value, worker.lineage)
        worker.arena[worker.step] = copy
        for old in sorted(worker.arena)[:-_BUFFERS]:
            del worker.arena[old]
        worker.is_captured = True
        self._beat(worker, moved=True)

    def _fence_seen_by(self, worker: Worker) -> int:
        keeper = self.keepers[self.roster.node_of(worker.rank)]
        return keeper.fence if keeper.arenas.get((self.roster.number, worker.rank)) is worker.arena else -1

    def _vote(self, worker: Worker) -> tuple[str, bool] | None:
        """The collective at the end of a step: returns only when every member has entered it."""
        assert worker.epoch is not None
        key = (worker.epoch, worker.step)
        if key not in self.votes:
            present = [self.workers[member.worker] for member in self.members]
            if not all(w.trains and (w.epoch, w.step) == key and w.is_captured for w in present):
                return None
            together = _combine([w.value for w in present])
            known = self.committed.setdefault(worker.step, together)
            require(known == together, f"two committed states for step {worker.step}")
            self.votes[key] = (together, worker.epoch in self.stopping)
            self._protect(*key)
        return self.votes[key]

    def _protect(self, epoch: int, version: int) -> None:
        """The keepers commit; with the second version of a roster what others have left may go."""
        if self.recovery.shrink_after_s or self.doomed:
            self._later(m.Protected(epoch, version))
        number = self.roster.number
        self._commits[number] = self._commits.get(number, 0) + 1
        if self._commits[number] == 2:
            for keeper in (self.keepers[node] for node in self.roster.nodes):
                keeper.arenas = {key: arena for key, arena in keeper.arenas.items() if key[0] == number}

    def _park(self, worker: Worker, outcome: m.Outcome, detail: str = "", version: int = -1) -> None:
        assert worker.epoch is not None
        self._later(m.WorkerParked(worker.worker, worker.epoch, outcome, detail, version))
        worker.epoch = None
        self._beat(worker, moved=True)

    def _beat(self, worker: Worker, *, moved: bool = False) -> None:
        if worker.rank < 0 or self.seating.get(worker.rank) != worker.worker:
            return
        known = self.boards.get(worker.rank)
        if worker.epoch is not None:
            phase = Phase.VOTE if worker.is_captured else Phase.UPDATE
            phase = Phase.FORWARD_BACKWARD if worker.is_hung else phase
            moved_s = self.now if moved or known is None or known.epoch != worker.epoch else known.progress_s
            self.boards[worker.rank] = m.BeatSeen(worker.rank, worker.epoch, phase, worker.step, self.now, moved_s)
        elif known is not None:
            self.boards[worker.rank] = replace(known, beat_s=self.now)

    # -- things break ---------------------------------------------------------------------------------------------

    def kill(self, worker: Worker, cause: str = "killed by SIGKILL") -> None:
        worker.is_alive, worker.epoch = False, None
        self._later(m.WorkerLost(worker.worker, cause, self.now))

    def cut_off(self, worker: Worker) -> None:
        """Its driver cannot reach it any more, but it lives and trains on."""
        if worker.is_alive:
            self._later(m.WorkerLost(worker.worker, "no answer before the deadline", self.now))

    def report_broken(self, worker: Worker) -> None:
        """Its collective fails, because somebody left; only somebody who waits in one can notice."""
        if worker.trains and worker.is_captured and self._vote(worker) is None and self._somebody_left(worker):
            self._park(worker, m.Outcome.BROKEN, "connection closed by peer")

    def _somebody_left(self, worker: Worker) -> bool:
        return any(self.workers[member.worker].epoch != worker.epoch for member in self.members)

    def raise_error(self, worker: Worker) -> None:
        if worker.trains:
            self._park(worker, m.Outcome.ERROR, "ValueError: the user's own\nTraceback ...")

    def kill_keeper(self, node: int) -> None:
        keeper = self.keepers[node]
        if keeper.is_alive:
            keeper.is_alive = False
            self._later(m.KeeperLost(node, "killed by SIGKILL"))

    def take_away(self, node: int) -> None:
        """The node's power is gone, for as long as it takes."""
        self.gone.add(node)
        self.kill_keeper(node)
        for worker in [w for w in self.workers.values() if w.is_alive and w.node == node]:
            self.kill(worker, f"node {node} went away")

    def doom(self, node: int, within_s: float, new_host: str = "") -> None:
        """The host of a node will be taken away; there may be another one for all its nodes."""
        host = self.hosts[node]
        if host in self.doomed:
            return
        self.doomed[host] = self.now + within_s
        for tenant in [n for n in range(self.layout.nodes) if self.hosts[n] == host]:
            self._later(m.NodeDraining(tenant, host, within_s, "spot"))
            if new_host:
                self.hosts[tenant] = new_host
                self._later(m.NodeMoved(tenant, new_host))

    def take_host_away(self, host: str) -> None:
        """Its time has come. What would be started there later gets to a host that has just joined."""
        del self.doomed[host]
        for node in [n for n in range(self.layout.nodes) if self.hosts[n] == host]:
            self.hosts[node] = f"after {host}"
            self._later(m.NodeMoved(node, self.hosts[node]))
        for worker in [w for w in self.workers.values() if w.is_alive and w.host == host]:
            self.kill(worker, f"{host} went away")
        for keeper in [k for k in self.keepers.values() if k.is_alive and k.host == host]:
            self.kill_keeper(keeper.node)

    def damage(self, rank: int, version: int) -> None:
        """Flip a bit in one copy in memory."""
        arena = self._arena(rank)
        if version in arena:
            arena[version] = replace(arena[version], is_good=False)

    def persist(self) -> int | None:
        """Write the newest version that all ranks hold as a durable checkpoint."""
        arenas = [self._arena(rank) for rank in range(self.roster.world)]
        common = set.intersection(*[{(v, c.epoch) for v, c in arena.items() if c.is_good} for arena in arenas])
        if not common:
            return None
        step = max(common)[0]
        self.durable.setdefault(step, {rank: arena[step] for rank, arena in enumerate(arenas)})
        return step

    def _arena(self, rank: int) -> dict[int, Copy]:
        return self.keepers[self.roster.node_of(rank)].arenas.get((self.roster.number, rank), {})

    def _former(self, number: int) -> list[dict[int, Copy]]:
        """What the ranks of another roster hold, wherever it is."""
        living = [keeper for keeper in self.keepers.values() if keeper.is_alive]
        found: list[dict[int, Copy]] = []
        for rank in range(self.rosters[number].world):
            arenas = [keeper.arenas[number, rank] for keeper in living if (number, rank) in keeper.arenas]
            found.append(arenas[0] if arenas else {})
        return found

    # -- actions --------------------------------------------------------------------------------------------------

    def _start_worker(self, action: m.StartWorker) -> None:
        require(action.worker not in self.workers, f"worker id {action.worker} is used twice")
        self.workers[action.worker] = worker = Worker(action.worker, action.node, self.hosts[action.node])
        if action.node in self.gone:
            self.kill(worker, "there is no such node")
            return
        self._later(m.WorkerReady(action.worker, action.node, 1000 + action.worker, worker.host))

    def _start_keeper(self, action: m.StartKeeper) -> None:
        self._forget_keeper_news(action.node)
        self.keepers[action.node] = keeper = Keeper(action.node, self.hosts[action.node])
        for rank in [r for r in self.boards if r in self.roster.ranks_of(action.node)]:
            del self.boards[rank]
        if action.node in self.gone:
            self.kill_keeper(action.node)
            return
        self._later(m.KeeperReady(action.node, keeper.host))

    def _kill_keeper(self, action: m.KillKeeper) -> None:
        keeper = self.keepers[action.node]
        keeper.is_alive, keeper.is_known_dead = False, True
        self._forget_keeper_news(action.node)

    def _forget_keeper_news(self, node: int) -> None:
        """The executor tells nothing of a keeper that it has killed or replaced."""
        old = [n for n in self.pending if isinstance(n, m.KeeperReady | m.KeeperLost) and n.node == node]
        self.pending[:] = [news for news in self.pending if news not in old]

    def _persist(self, action: m.Persist) -> None:
        step = self.persist()
        if step is not None:
            self._later(m.Persisted(step))

    def _kill_worker(self, action: m.KillWorker) -> None:
        worker = self.workers[action.worker]
        worker.is_alive, worker.epoch = False, None
        self._gone.add(action.worker)

    def _fence(self, action: m.Fence) -> None:
        require(action.epoch >= self._fenced, f"fence {action.epoch} after fence {self._fenced}")
        self._fenced = action.epoch
        for keeper in self.keepers.values():
            keeper.fence = max(keeper.fence, action.epoch)

    def _abort_worker(self, action: m.AbortWorker) -> None:
        worker = self.workers[action.worker]
        if worker.trains and worker.epoch == action.epoch:
            self._park(worker, m.Outcome.ABORTED)

    def _check_members(self, members: tuple[m.Member, ...]) -> None:
        ranks = [member.rank for member in members]
        require(ranks == list(range(self.roster.world)), f"every rank has one member, but {ranks}")
        used = [member.worker for member in members]
        require(len(set(used)) == len(used), f"a worker plays one rank, but {used}")
        for member in members:
            host = self.workers[member.worker].host
            require(member.worker not in self._gone, f"a member is never a dead worker, but {member}")
            keeper = self.keepers[member.node]
            require(host == keeper.host, f"a worker shares memory with its keeper on {keeper.host}, but {member}")
            require(member.node == self.roster.node_of(member.rank), f"a rank stays on its node, but {member}")

    def _take_inventory(self, action: m.TakeInventory) -> None:
        require(action.epoch == self._fenced, f"inventory of epoch {action.epoch} behind fence {self._fenced}")
        self._take_over(action.roster)
        self._check_members(action.members)
        self._offered = self._loaded = None
        self.seating = {member.rank: member.worker for member in action.members}
        for member in action.members:
            self._attach(self.workers[member.worker], member.rank, self.keepers[member.node])
        for worker in self._seated():
            if worker.is_alive and not worker.can_move:
                self._later(m.WorkerLost(worker.worker, "no answer before the deadline", self.now))
        asked = [keeper for keeper in self.keepers.values() if not keeper.is_known_dead]
        if all(w.can_move for w in self._seated()) and all(k.is_alive for k in asked):
            self._later(self._inventory(action.epoch))

    def _inventory(self, epoch: int) -> m.InventoryTaken:
        good = self._good_checkpoints()
        foreign = tuple(step for step in good if len(self.durable[step]) != self.roster.world)
        formers = tuple(one for number in self.rosters for one in self._complete_in(number))
        return m.InventoryTaken(epoch, self._held(), good, self._bad_checkpoints(), (), foreign, formers)

    def _complete_in(self, number: int) -> list[Recorded]:
        if number == self.roster.number:
            return []
        common = set.intersection(*[{(v, c.epoch) for v, c in arena.items()} for arena in self._former(number)])
        return [Recorded(version, epoch, roster=number) for version, epoch in sorted(common, reverse=True)]

    def _take_over(self, roster: Roster) -> None:
        """Whatever roster is named from now on: its ranks are others, even if they are called alike."""
        if roster.number != self.roster.number:
            require(roster.number > self.roster.number, f"rosters grow in number, but {roster} follows {self.roster}")
            least = self.recovery.min_nodes
            require(len(roster.nodes) >= least, f"never fewer than {least} nodes, but {roster}")
            require(self.layout.can_train(len(roster.nodes)), f"the ranks can share the batch, but {roster}")
            self.boards.clear()
            self.seating.clear()
        self.roster = self.rosters[roster.number] = roster

    def _seated(self) -> list[Worker]:
        return [self.workers[worker] for worker in self.seating.values()]

    def _attach(self, worker: Worker, rank: int, keeper: Keeper) -> None:
        if not (worker.can_move and keeper.is_alive):
            return
        number = self.roster.number
        arena = keeper.arenas.setdefault((number, rank), {})
        if (worker.rank, worker.roster) == (rank, number) and worker.arena is not None and worker.arena is not arena:
            arena.update(worker.arena)  # it carries its versions into the arena of a new keeper
        worker.rank, worker.roster, worker.arena = rank, number, arena
        self._beat(worker)

    def _held(self) -> dict[int, tuple[m.HeldVersion, ...]]:
        return {
            rank: tuple(m.HeldVersion(v, c.epoch, c.world) for v, c in sorted(self._arena(rank).items()))
            for rank in range(self.roster.world)
        }

    def _good_checkpoints(self) -> tuple[int, ...]:
        return tuple(sorted(self.durable.keys() - self.unreadable.keys(), reverse=True))

    def _bad_checkpoints(self) -> tuple[str, ...]:
        return tuple(f"step-{step:08d}: {why}" for step, why in sorted(self.unreadable.items()))

    def _quarantine(self, action: m.Quarantine) -> None:
        self._arena(action.rank).pop(action.version, None)
        # Its keeper may have died meanwhile, and its worker carries the damaged copy into the next one's memory.
        offered = self._offered.held.get(action.rank, ()) if self._offered is not None else ()
        self._quarantined.setdefault(action.rank, set()).update(h for h in offered if h.version == action.version)

    def _load_checkpoint(self, action: m.LoadCheckpoint) -> None:
        stored = self.durable[action.step]
        require(len(stored) == self.roster.world, "keepers load what was written in their own layout")
        if not all(copy.is_good for copy in stored.values()):
            self._later(m.CheckpointRefused(action.epoch, action.step, "digest does not match"))
        elif all(self.keepers[node].is_alive for node in self.roster.nodes):
            for rank, copy in stored.items():
                self._arena(rank)[action.step] = copy
            self._later(m.CheckpointLoaded(action.epoch, action.step))

    def _start_epoch(self, action: m.StartEpoch) -> None:
        last = self.started[-1].epoch if self.started else 0
        require(action.epoch > last, f"epochs strictly increase, but {action.epoch} follows {last}")
        require(action.epoch == self._fenced, f"epoch {action.epoch} starts behind fence {self._fenced}")
        self._check_members(action.members)
        self._check_version(action)
        self.started.append(action)
        self.members = action.members
        self.top_step_by_epoch[action.epoch] = max(action.version, 0)
        for arena in [arena for keeper in self.keepers.values() for arena in keeper.arenas.values()]:
            for version in [v for v in arena if v > action.version]:
                del arena[version]
        lineages = {self._enter(self.workers[mb.worker], action) for mb in action.members} - {None}
        require(len(lineages) <= 1, f"ranks of epoch {action.epoch} start from states that do not belong together")

    def _check_version(self, action: m.StartEpoch) -> None:
        """What the machine was told is all it can be judged by."""
        offered, loaded = self._offered, self._loaded
        require(offered is not None and offered.epoch == action.epoch, "an epoch starts from its own inventory")
        assert offered is not None
        if action.version == -1:
            require(not offered.durable and not offered.rejected, "never from scratch beside checkpoints")
            return
        if loaded is not None and (loaded.epoch, loaded.step) == (action.epoch, action.version):
            return
        if action.former is not None:
            require(action.former in offered.former, f"{action.former} was offered")
            require(action.former.version == action.version, f"{action.former} is what the epoch starts from")
            return
        if action.from_storage:
            require(action.version in offered.foreign, f"checkpoint {action.version} was written in another layout")
            return
        parts = [set(offered.held.get(rank, ())) - self._quarantined.get(rank, set()) for rank in self.seating]
        common = {held.version for held in set.intersection(*parts)}
        require(action.version in common, f"version {action.version} was not held by every rank")
        require(action.version == max(common), f"version {action.version} is older than {max(common)}")

    def _enter(self, worker: Worker, action: m.StartEpoch) -> str | None:
        """Restore; the lineage it starts from, or None if it does not get that far."""
        if not worker.can_move:
            return None
        worker.epoch, worker.step = action.epoch, max(action.version, 0)
        if action.former is not None or action.from_storage:
            return self._read_part(worker, action)
        copy = self._arena(worker.rank).get(action.version)
        if action.version == -1:
            worker.value, worker.lineage, worker.is_captured = _digest(_START), _START, False
        elif copy is None:
            self._park(worker, m.Outcome.BROKEN, "the keeper went away")
            return None
        elif not copy.is_good:
            self._park(worker, m.Outcome.CORRUPT, "digest does not match", action.version)
            return None
        else:
            require((copy.rank, copy.world) == (worker.rank, self.roster.world), f"{copy} is no part of {worker}")
            worker.value, worker.lineage, worker.is_captured = copy.value, copy.lineage, True
        self._beat(worker, moved=True)
        return worker.lineage

    def _read_part(self, worker: Worker, action: m.StartEpoch) -> str | None:
        """From what ranks that were divided in another way have left; it becomes a version of this layout at once."""
        if action.former is not None:
            parts = [arena.get(action.version) for arena in self._former(action.former.roster)]
        else:
            parts = list(self.durable[action.version].values())
        copies = [copy for copy in parts if copy is not None]
        if len(copies) < len(parts):
            self._park(worker, m.Outcome.BROKEN, "a keeper went away")
            return None
        if not all(copy.is_good for copy in copies):
            self._park(worker, m.Outcome.CORRUPT, "digest does not match", action.version)
            return None
        require(
            len({copy.lineage for copy in copies}) == 1, f"parts of version {action.version} do not belong together"
        )
        worker.value, worker.lineage, worker.is_captured = copies[0].value, copies[0].lineage, False
        self._beat(worker, moved=True)
        return worker.lineage

    def _stop_epoch(self, action: m.StopEpoch) -> None:
        self.stopping.add(action.epoch)

    def _announce(self, action: m.Announce) -> None:
        event = action.event
        if isinstance(event, FaultDetected):
            numbers = [e.number for e in self.events if isinstance(e, FaultDetected)]
            require(event.number == len(numbers) + 1, f"fault {event.number} is announced after {numbers}")
        if isinstance(event, RecoveryDone):
            require(min(event.split_s.values()) >= 0, f"seconds are not negative, but {event.split_s}")
        self.events.append(event)

    def _finish(self, action: m.Finish) -> None:
        self.finish = action

    # -- what must hold at any moment -----------------------------------------------------------------------------

    def check(self) -> None:
        """The promises that are not about a single action."""
        preemptions = self.supervisor.preemptions
        self._check_budget("failures", self.supervisor.faults - preemptions, self.recovery.max_failures)
        if self.recovery.max_preemptions:
            self._check_budget("preemptions", preemptions, self.recovery.max_preemptions)
        over = self.supervisor.state in (State.FINISHED, State.FAILED)
        require(over == (self.finish is not None), f"state {self.supervisor.state} beside {self.finish}")
        for worker in self.workers.values():
            if worker.trains:
                require(worker.worker not in self._gone, f"worker {worker.worker} trains after its end")

    def _check_budget(self, what: str, count: int, allowed: int) -> None:
        require(count <= allowed or self.finish is not None, f"{count} {what}, {allowed} allowed, and it goes on")
        require(count <= allowed + 1, f"{count} {what} were counted, the budget is {allowed}")

    def check_final_state(self) -> None:
        """Every step that was committed is the one the undisturbed run computes."""
        for step, together in self.committed.items():
            require(together == state_after(step), f"step {step} differs from the undisturbed run")


_PERFORM: Mapping[type[m.Action], Callable[[ModelCluster, Any], None]] = {
    m.StartWorker: ModelCluster._start_worker,
    m.StartKeeper: ModelCluster._start_keeper,
    m.KillKeeper: ModelCluster._kill_keeper,
    m.KillWorker: ModelCluster._kill_worker,
    m.Persist: ModelCluster._persist,
    m.Fence: ModelCluster._fence,
    m.AbortWorker: ModelCluster._abort_worker,
    m.TakeInventory: ModelCluster._take_inventory,
    m.Quarantine: ModelCluster._quarantine,
    m.LoadCheckpoint: ModelCluster._load_checkpoint,
    m.StartEpoch: ModelCluster._start_epoch,
    m.StopEpoch: ModelCluster._stop_epoch,
    m.Announce: ModelCluster._announce,
    m.Finish: ModelCluster._finish,
}
