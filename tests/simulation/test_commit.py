"""Thousands of seeded clusters of keepers on a hostile network: what is committed is complete, and stays restorable."""

from __future__ import annotations

import hashlib
import heapq
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pytest

from holdfast.errors import ConfigurationError, InvariantViolation, ManifestMismatch
from holdfast.fault_tolerance.commit import (
    Abort,
    Action,
    Commit,
    CommitRecord,
    Drop,
    Filled,
    Flip,
    Key,
    ParityBlock,
    Prepare,
    RankVote,
    Seen,
    Send,
    StartEncoding,
    Timing,
    Vote,
)
from holdfast.fault_tolerance.commit_coordinator import Coordinator
from holdfast.fault_tolerance.commit_json import Spoken, from_json, to_json
from holdfast.fault_tolerance.commit_outcome import Outcome, Promise, Report, derive_outcome
from holdfast.fault_tolerance.commit_participant import Participant

Message = Filled | Seen | Prepare | Vote | Commit | Abort

_TIMING = Timing(repeat_s=0.3, decide_s=3.0)
_BUFFERS = 3
_SEEDS_PER_TEST = 250


class Broken(AssertionError):
    """A promise of the protocol is broken. Not raised by anything but the model."""


def require(holds: bool, promise: str) -> None:
    if not holds:
        raise Broken(promise)


@dataclass(frozen=True)
class Rules:
    """The protocol, or a wrong version of it."""

    participant: Callable[..., Participant] = Participant
    coordinator: Callable[..., Coordinator] = Coordinator
    derive: Callable[[Sequence[Report]], Outcome] = derive_outcome


@dataclass(frozen=True)
class World:
    """How large and how hostile; all probabilities, and seconds."""

    nodes: int
    per_node: int
    tolerated: int
    loss: float = 0.0
    double: float = 0.0
    delay_s: float = 0.02
    skip: float = 0.0
    cannot_encode: float = 0.0
    crash_every_s: float = float("inf")
    fence_every_s: float = float("inf")
    ambush: float = 0.0
    """That a keeper crashes at the worst moment: when it has made a record and told only some, when it has just
    flipped, when the driver has just decided."""
    as_json: bool = False

    @classmethod
    def drawn(cls, chance: random.Random) -> World:
        nodes = chance.randint(1, 5)
        return cls(
            nodes=nodes,
            per_node=chance.randint(1, 2),
            tolerated=min(chance.randint(0, 2), nodes - 1),
            loss=chance.choice([0.0, 0.05, 0.3]),
            double=chance.choice([0.0, 0.1, 0.3]),
            delay_s=chance.choice([0.005, 0.05, 0.4]),
            skip=chance.choice([0.0, 0.1, 0.4]),
            cannot_encode=chance.choice([0.0, 0.05, 0.2]),
            crash_every_s=chance.choice([1.5, 4.0, 12.0]),
            fence_every_s=chance.choice([5.0, 20.0, float("inf")]),
            ambush=chance.choice([0.0, 0.1, 0.4]),
            as_json=chance.random() < 0.05,
        )


# -- one node -------------------------------------------------------------------------------------------------------


@dataclass
class Slot:
    part: RankVote
    is_committed: bool = False
    is_pinned: bool = False


@dataclass
class Node:
    """A keeper with the memory of its ranks. A crash takes all of it; what follows is another incarnation."""

    number: int
    incarnation: int
    participant: Participant
    slots: dict[int, dict[Key, Slot]]
    """By rank."""
    parity: dict[Key, tuple[ParityBlock, ...]] = field(default_factory=dict)
    coordinator: Coordinator | None = None
    encoding: Prepare | None = None
    fence: int = 0
    epoch: int | None = None
    """That its ranks train in."""
    steps: dict[int, int] = field(default_factory=dict)
    is_alive: bool = True

    def complete(self, key: Key) -> dict[int, RankVote] | None:
        """What all ranks of the node hold of the version."""
        if any(key not in slots for slots in self.slots.values()):
            return None
        return {rank: slots[key].part for rank, slots in self.slots.items()}

    def held_keys(self) -> list[Key]:
        return [key for key in next(iter(self.slots.values())) if self.complete(key) is not None]

    def each(self, key: Key) -> Iterable[Slot]:
        return (slots[key] for slots in self.slots.values() if key in slots)

    def room(self, rank: int, key: Key) -> bool:
        """A free buffer for the rank, made by the rules of ``rotation.choose_target``."""
        slots = self.slots[rank]
        if len(slots) < _BUFFERS:
            return True
        committed = max((k for k, slot in slots.items() if slot.is_committed), default=(-1, -1))
        newest = max(slots)
        for old in sorted(slots):
            is_replaced = old < committed or (not slots[old].is_committed and old < newest)
            if is_replaced and not slots[old].is_pinned:
                del slots[old]
                return True
        return False


def blocks_of(parts: Mapping[int, RankVote], members: Sequence[int], node: int, tolerated: int) -> list[ParityBlock]:
    """What ``node`` has to compute: a function of what every rank has written and of the place in the code."""
    bytes_ = json.dumps([[rank, part.length, part.digest] for rank, part in sorted(parts.items())])
    n = len(members)
    return [
        ParityBlock(0, stripe, index, hashlib.md5(f"{bytes_}/{stripe}/{index}".encode()).hexdigest())
        for stripe in range(n)
        for index in range(tolerated)
        if members[(stripe + index) % n] == node
    ]


@dataclass
class Made:
    """A record that somebody has made, and who was there when its version was prepared."""

    record: CommitRecord
    members: Mapping[int, int]
    """Incarnation by node."""
    knowers: set[tuple[int, int]] = field(default_factory=set)
    is_established: bool = False
    """One keeper more than the code tolerates has known it at one time."""


# -- the cluster ----------------------------------------------------------------------------------------------------


class Cluster:
    """Keepers, their ranks, the network between them, and a driver that repairs. Fake time, one seed."""

    def __init__(self, seed: int, rules: Rules = Rules(), world: World | None = None) -> None:
        self.chance = random.Random(seed)
        self.world = world or World.drawn(self.chance)
        self.rules = rules
        self.now, self.is_calm = 0.0, False
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._ticket = 0
        self.made: dict[Key, Made] = {}
        self._prepared: dict[tuple[int, int], Mapping[int, int]] = {}
        self._is_dirty = True
        self.epoch, self._attempts, self._generation = 0, 0, 0
        self.base = -1
        self.committed_in_calm = 0
        self.nodes = {number: self._spawn(number, 0) for number in range(self.world.nodes)}
        self.recover()
        for number in self.nodes:
            self.after(self.chance.random() * 0.1, lambda n=number: self._tick(n))
            for rank in self.nodes[number].slots:
                self.after(self.chance.random() * 0.3, lambda n=number, r=rank: self._step(n, r))
        self._plan(self.world.crash_every_s, self._crash_somebody)
        self._plan(self.world.fence_every_s, self.recover)

    # -- time -----------------------------------------------------------------------------------------------------

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        self._ticket += 1
        heapq.heappush(self._due, (self.now + seconds, self._ticket, what))

    def run(self, until_s: float) -> None:
        while self._due and self._due[0][0] <= until_s:
            self.now, _, what = heapq.heappop(self._due)
            what()
            if self._is_dirty:  # nothing else can have broken an invariant
                self._is_dirty = False
                self.check()
        self.now = until_s

    def _plan(self, every_s: float, what: Callable[[], None]) -> None:
        def happens() -> None:
            if not self.is_calm:
                what()
                self._plan(every_s, what)

        if every_s < float("inf"):
            self.after(self.chance.expovariate(1 / every_s), happens)

    # -- the keepers ----------------------------------------------------------------------------------------------

    def _spawn(self, number: int, incarnation: int) -> Node:
        participant = self.rules.participant(number, timing=_TIMING)
        first = number * self.world.per_node
        slots = {rank: dict[Key, Slot]() for rank in range(first, first + self.world.per_node)}
        return Node(number, incarnation, participant, slots)

    @property
    def living(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.is_alive]

    def _tick(self, number: int) -> None:
        node = self.nodes[number]
        if node.is_alive:
            self.carry_out(node, node.participant.tick(self.now))
            if node.coordinator is not None:
                self._send(node, node.coordinator.tick(self.now))
        self.after(0.1 + 0.1 * self.chance.random(), lambda: self._tick(number))

    def _step(self, number: int, rank: int) -> None:
        """A rank finishes a step, and snapshots it unless it skips this one."""
        node = self.nodes[number]
        if node.is_alive and node.epoch is not None and not self.is_calm:
            node.steps[rank] += 1
            if self.chance.random() >= self.world.skip:
                self.fill(node, rank, node.steps[rank])
        self.after(0.2 + 0.2 * self.chance.random(), lambda: self._step(number, rank))

    def fill(self, node: Node, rank: int, version: int) -> None:
        assert node.epoch is not None
        key = (version, node.epoch)
        if not node.room(rank, key):
            return
        self._is_dirty = True
        written = f"{rank}/{version}/{node.epoch}/{node.incarnation}/{self.chance.random()}"
        node.slots[rank][key] = Slot(RankVote(len(written), hashlib.md5(written.encode()).hexdigest()))
        offered = {k[0]: node.complete(k) or {} for k in node.held_keys() if k[1] == node.epoch}
        self.carry_out(node, node.participant.filled(node.epoch, offered, self.now))

    # -- carrying out what the protocol wants ---------------------------------------------------------------------

    def carry_out(self, node: Node, actions: Sequence[Action]) -> None:
        for action in actions if node.is_alive else ():
            self._is_dirty = True
            if isinstance(action, Send):
                self._send(node, [action])
            elif isinstance(action, StartEncoding):
                self._start_encoding(node, action.prepare)
            elif isinstance(action, Flip):
                self._flip(node, action.record)
            else:
                self._drop(node, (action.version, action.epoch))

    def _start_encoding(self, node: Node, prepare: Prepare) -> None:
        held = node.complete(prepare.key)
        can = held is not None and all(prepare.parts[rank] == part for rank, part in held.items())
        for slot in node.each(prepare.key) if can else ():
            slot.is_pinned = True
        node.encoding = prepare
        delay_s = self.chance.expovariate(5.0) if can else 0.0
        self.after(delay_s, lambda: self._end_encoding(node, prepare, can))

    def _end_encoding(self, node: Node, prepare: Prepare, can: bool) -> None:
        if not node.is_alive or node.encoding is not prepare:
            return
        if not can or (self.chance.random() < self.world.cannot_encode and not self.is_calm):
            self.carry_out(node, node.participant.encode_failed(prepare, "an injected fault", self.now))
            return
        blocks = blocks_of(prepare.parts, prepare.members, node.number, self.world.tolerated)
        node.parity[prepare.key] = tuple(blocks)
        self.carry_out(node, node.participant.encoded(prepare, blocks, self.now))

    def _flip(self, node: Node, record: CommitRecord) -> None:
        made = self.made.get(record.key)
        require(made is not None, f"node {node.number} flips {record.key} without a record")
        assert made is not None
        require(made.record.digest == record.digest, f"two records of {record.key}")
        require(self._holds(node, record), f"node {node.number} flips {record.key}, which is not complete there")
        for slot in node.each(record.key):
            slot.is_committed, slot.is_pinned = True, False
        for slots in node.slots.values():
            for key in [k for k in slots if k < record.key]:
                del slots[key]
        node.parity = {key: blocks for key, blocks in node.parity.items() if key >= record.key}
        self._learn(made, node)
        self._ambush(node)

    def _learn(self, made: Made, node: Node) -> None:
        made.knowers.add((node.number, node.incarnation))
        alive = sum((other.number, other.incarnation) in made.knowers for other in self.living)
        made.is_established = made.is_established or alive > self.world.tolerated

    def _drop(self, node: Node, key: Key) -> None:
        node.parity.pop(key, None)
        for slot in node.each(key):
            slot.is_pinned = False
        if node.encoding is not None and node.encoding.key == key:
            node.encoding = None

    # -- the network ----------------------------------------------------------------------------------------------

    def _send(self, source: Node, sends: Sequence[Action]) -> None:
        for send in sends:
            assert isinstance(send, Send)
            if isinstance(send.message, Prepare):
                self._note_prepared(send.message)
            if isinstance(send.message, Commit):
                self.note_made(send.message.record, self._prepared[send.message.epoch, send.message.attempt])
                self._ambush(source)
            if source.is_alive:
                self._transmit(send)

    def _transmit(self, send: Send) -> None:
        if not self.is_calm and self.chance.random() < self.world.loss:
            return
        copies = 1 if self.is_calm or self.chance.random() >= self.world.double else 2
        message = from_json(json.loads(json.dumps(to_json(send.message)))) if self.world.as_json else send.message
        for _ in range(copies):
            delay_s = 0.02 if self.is_calm else self.chance.expovariate(1 / self.world.delay_s)
            self.after(delay_s, lambda: self._arrive(send.node, message))

    def _arrive(self, number: int, message: object) -> None:
        node = self.nodes[number]
        if not node.is_alive:
            return
        if isinstance(message, (Filled, Vote)):
            if node.coordinator is not None:
                self._send(node, node.coordinator.handle(message, self.now))
        else:
            assert isinstance(message, (Seen, Prepare, Commit, Abort))
            self.carry_out(node, node.participant.handle(message, self.now))

    # -- crashes and the driver -----------------------------------------------------------------------------------

    def _crash_somebody(self) -> None:
        if self.living:
            self.crash(self.chance.choice(self.living))

    def _ambush(self, node: Node) -> None:
        if not self.is_calm and self.chance.random() < self.world.ambush:
            self.crash(node)

    def crash(self, node: Node) -> None:
        node.is_alive, self._is_dirty = False, True
        self.after(self.chance.expovariate(self.chance.choice([2.0, 20.0])), self.recover)

    def recover(self) -> None:
        """Fence everybody alive; the rest follows when all have reported. Another loss meanwhile begins anew."""
        self.epoch += 1
        self._generation += 1
        epoch, generation, reports = self.epoch, self._generation, dict[int, Report]()
        self._to_all(lambda node: self._fence(node, epoch, generation, reports))
        if not self.living:
            self._resume(epoch, generation)

    def _to_all(self, what: Callable[[Node], None]) -> None:
        for node in self.living:
            self.after(self.chance.expovariate(10.0), lambda n=node: what(n) if n.is_alive else None)

    def _fence(self, node: Node, epoch: int, generation: int, reports: dict[int, Report]) -> None:
        if epoch > node.fence:  # else it comes late
            node.fence, node.epoch, node.coordinator = epoch, None, None
        self.carry_out(node, node.participant.fence(epoch))
        reports[node.number] = node.participant.report(node.held_keys())
        if generation == self._generation and all(other.number in reports for other in self.living):
            self._decide(epoch, generation, [reports[other.number] for other in self.living])

    def _decide(self, epoch: int, generation: int, reports: Sequence[Report]) -> None:
        promises = {p.prepare.key: p.prepare for report in reports for p in report.promises}
        outcome = self.rules.derive([self._through_json(report) for report in reports])
        for record in outcome.committed:
            if record.key not in self.made:
                prepare = promises[record.key]
                self.note_made(record, self._prepared[prepare.epoch, prepare.attempt])
            require(self.made[record.key].record.digest == record.digest, f"two records of {record.key}")
        self._ambush(self.chance.choice(self.living))
        settled: set[int] = set()
        self._to_all(lambda node: self._settle(node, outcome, epoch, generation, settled))

    def _through_json(self, report: Report) -> Report:
        if not self.world.as_json:
            return report
        back = from_json(json.loads(json.dumps(to_json(report))))
        assert isinstance(back, Report) and back == report
        return back

    def _settle(self, node: Node, outcome: Outcome, epoch: int, generation: int, settled: set[int]) -> None:
        self.carry_out(node, node.participant.settle(outcome))  # even if it comes late: that must do no harm
        settled.add(node.number)
        if generation == self._generation and all(other.number in settled for other in self.living):
            self._resume(epoch, generation)

    def _resume(self, epoch: int, generation: int) -> None:
        """From the newest version that is committed and restorable, else from scratch."""
        self._is_dirty = True
        record = max(self.restorable(), key=lambda r: r.key, default=None)
        self.base = -1 if record is None else record.version
        for node in self.living:
            self.carry_out(node, node.participant.forget_above(self.base))
            for slots in node.slots.values():
                for key in [k for k in slots if k[0] > self.base]:
                    del slots[key]
        for node in [n for n in self.nodes.values() if not n.is_alive]:
            self.nodes[node.number] = fresh = self._spawn(node.number, node.incarnation + 1)
            fresh.fence = epoch
            fresh.participant.fence(epoch)
            if record is not None and self.chance.random() < 0.5:
                self._rebuild(fresh, record)
        self._to_all(lambda node: self._begin(node, epoch, generation))

    def _rebuild(self, node: Node, record: CommitRecord) -> None:
        """From the shares of the others."""
        for rank, slots in node.slots.items():
            slots[record.key] = Slot(record.parts[rank], is_committed=True)
        blocks = blocks_of(record.parts, tuple(self.nodes), node.number, self.world.tolerated)
        node.parity[record.key] = tuple(blocks)
        node.participant.adopt(record)
        self._learn(self.made[record.key], node)

    def _begin(self, node: Node, epoch: int, generation: int) -> None:
        if generation != self._generation:
            return
        node.participant.begin(epoch, min(self.nodes))
        node.epoch, node.steps = epoch, dict.fromkeys(node.slots, self.base)
        if node.number == min(self.nodes):
            world = self.world.nodes * self.world.per_node
            node.coordinator = self.rules.coordinator(epoch, list(self.nodes), world, base=self.base, timing=_TIMING)

    # -- what must hold -------------------------------------------------------------------------------------------

    def _note_prepared(self, prepare: Prepare) -> None:
        if (prepare.epoch, prepare.attempt) not in self._prepared:
            members = {n: self.nodes[n].incarnation for n in prepare.members}
            self._prepared[prepare.epoch, prepare.attempt] = members

    def note_made(self, record: CommitRecord, members: Mapping[int, int]) -> None:
        """It is complete at every member that has not died since it was prepared."""
        made = self.made.setdefault(record.key, Made(record, members))
        require(made.record.digest == record.digest, f"two records of {record.key}")
        if made.record is record:
            expected = [b for n in sorted(members) for b in blocks_of(record.parts, tuple(members), n, self._m)]
            require(sorted(expected) == list(record.parity), f"{record.key}: parity of other bytes")
            for node in self._still_there(members):
                if not made.knowers:
                    require(self._holds(node, record), f"{record.key} is committed, and node {node.number} lacks it")

    @property
    def _m(self) -> int:
        return self.world.tolerated

    def _still_there(self, members: Mapping[int, int]) -> list[Node]:
        return [self.nodes[n] for n, i in members.items() if self.nodes[n].is_alive and self.nodes[n].incarnation == i]

    def _holds(self, node: Node, record: CommitRecord) -> bool:
        """Data as the record says, and the parity blocks that belong to the node."""
        parts = node.complete(record.key)
        is_intact = parts is not None and all(record.parts[rank] == part for rank, part in parts.items())
        blocks = tuple(blocks_of(record.parts, tuple(self.nodes), node.number, self._m))
        return is_intact and node.parity.get(record.key) == blocks

    def restorable(self) -> list[CommitRecord]:
        """Any node but the tolerated ones may be missing: each holds one share of every stripe."""
        known = {n.participant.record.key: n.participant.record for n in self.living if n.participant.record}
        enough = len(self.nodes) - self._m
        return [r for r in known.values() if sum(self._holds(node, r) for node in self.living) >= enough]

    def check(self) -> None:
        for node in self.living:
            promise = node.participant.promise
            if promise is not None:
                parts = node.complete(promise.prepare.key)
                require(
                    parts is not None and node.parity.get(promise.prepare.key) == promise.vote.parity,
                    f"node {node.number} has promised {promise.prepare.key} and does not hold it",
                )
        tolerable = [
            key
            for key, made in self.made.items()
            if made.is_established and len(made.members) - len(self._still_there(made.members)) <= self._m
        ]
        if tolerable:
            best = max((record.key for record in self.restorable()), default=(-1, -1))
            require(best >= max(tolerable), f"{max(tolerable)} was committed, and nothing newer than {best} is left")

    def calm_down(self) -> None:
        """From now on nothing breaks: the next version that every rank fills is committed everywhere."""
        self.is_calm = True
        self.run(self.now + 12.0)
        version = 1 + max(step for node in self.nodes.values() for step in node.steps.values())
        for node in self.nodes.values():
            require(node.epoch == self.epoch, f"node {node.number} is not back")
            for rank in node.slots:
                self.fill(node, rank, version)
        self.run(self.now + 8.0)
        for node in self.nodes.values():
            record = node.participant.record
            require(record is not None and record.key == (version, self.epoch), f"{(version, self.epoch)} not at all")
            require(node.participant.promise is None, f"node {node.number} is still in doubt")


def storm(seed: int, rules: Rules = Rules()) -> Cluster:
    """One seeded run, and what it took."""
    cluster = Cluster(seed, rules)
    try:
        cluster.run(12.0)
        cluster.calm_down()
    except BaseException:
        print(f"seed {seed}: {cluster.world}")
        raise
    return cluster


@pytest.mark.parametrize("first", range(0, 8 * _SEEDS_PER_TEST, _SEEDS_PER_TEST))
def test_whatever_breaks_a_committed_version_is_complete_and_stays_restorable(first: int) -> None:
    made = sum(len(storm(seed).made) for seed in range(first, first + _SEEDS_PER_TEST))
    assert made > _SEEDS_PER_TEST, "the storms leave room for commits"


# -- the simulation can fail ----------------------------------------------------------------------------------------


class FlipsAlone(Participant):
    """Takes what is complete here for complete everywhere."""

    def encoded(self, prepare: Prepare, parity: Sequence[ParityBlock], now: float) -> list[Action]:
        actions = super().encoded(prepare, parity, now)
        record = CommitRecord(prepare.version, prepare.epoch, len(prepare.parts), prepare.parts, tuple(parity))
        return [*actions, Flip(record)]


class VotesTooEarly(Participant):
    """Says yes before its parity is there."""

    def handle(self, message: Seen | Prepare | Commit | Abort, now: float) -> list[Action]:
        actions = super().handle(message, now)
        started = [action.prepare for action in actions if isinstance(action, StartEncoding)]
        return actions + [vote for prepare in started for vote in self.encoded(prepare, (), now)]


class BreaksItsPromiseWhenFenced(Participant):
    """Does not wait for the outcome."""

    def fence(self, epoch: int) -> list[Action]:
        return super().fence(epoch) + (self._release() if self.promise is not None else [])


class BreaksItsPromiseForAnother(Participant):
    """Takes up a newer version while it is in doubt about an older one."""

    def handle(self, message: Seen | Prepare | Commit | Abort, now: float) -> list[Action]:
        is_newer = isinstance(message, Prepare) and message.epoch == self._epoch and message.attempt > self._attempt
        return (self._release() if is_newer else []) + super().handle(message, now)


class HearsOldEpochs(Participant):
    """Believes a coordinator that has been fenced off."""

    def handle(self, message: Seen | Prepare | Commit | Abort, now: float) -> list[Action]:
        return self._commit(message) if isinstance(message, Commit) else super().handle(message, now)


class FollowsOldOutcomes(Participant):
    """Settles by whatever arrives, however many fences ago it was derived."""

    def settle(self, outcome: Outcome) -> list[Action]:
        return super().settle(replace(outcome, fence=self._epoch))


class TakesAnyAbort(Participant):
    """Does not look which attempt has been aborted."""

    def _abort(self, abort: Abort) -> list[Action]:
        return super()._abort(abort) + self._release()


class MajorityCommits(Coordinator):
    """Does not wait for all votes."""

    def _voted(self, vote: Vote) -> list[Send]:
        sends, ballot = super()._voted(vote), self._ballot
        if ballot is not None and 2 * len(ballot.votes) > len(self._members):
            return sends + self._commit(ballot)
        return sends


class CountsAnyVote(Coordinator):
    """Does not look for which attempt it was given."""

    def _voted(self, vote: Vote) -> list[Send]:
        ballot = self._ballot
        return super()._voted(vote if ballot is None else replace(vote, attempt=ballot.prepare.attempt))


def _forgets_records(reports: Sequence[Report]) -> Outcome:
    """Trusts the votes of the living and not what a dead coordinator has told somebody."""
    return derive_outcome([replace(report, records=()) for report in reports])


def _asks_the_living_only(reports: Sequence[Report]) -> Outcome:
    """Commits what all who still live have promised."""
    living = tuple(report.node for report in reports)

    def shrunk(promise: Promise) -> Promise:
        return replace(promise, prepare=replace(promise.prepare, members=living))

    return derive_outcome([replace(r, promises=tuple(shrunk(p) for p in r.promises)) for r in reports])


_WRONG: Mapping[str, tuple[Rules, World | None]] = {
    "flips alone": (Rules(FlipsAlone), None),
    "votes too early": (Rules(VotesTooEarly), None),
    "breaks its promise when fenced": (Rules(BreaksItsPromiseWhenFenced), None),
    "breaks its promise for another": (Rules(BreaksItsPromiseForAnother), None),
    "hears old epochs": (
        Rules(HearsOldEpochs),  # takes a crash, a fence and a late message in one tenth of a second
        World(3, 1, 1, loss=0.3, delay_s=0.1, crash_every_s=30.0, fence_every_s=3.0, ambush=0.2),
    ),
    "takes any abort": (Rules(TakesAnyAbort), None),
    "a majority commits": (Rules(coordinator=MajorityCommits), None),
    "counts any vote": (Rules(coordinator=CountsAnyVote), None),
    "forgets records": (Rules(derive=_forgets_records), None),
    "asks the living only": (Rules(derive=_asks_the_living_only), None),
}


def _run_many(rules: Rules, world: World | None) -> None:
    for seed in range(1000):
        Cluster(seed, rules, world).run(12.0)


@pytest.mark.parametrize("wrong", _WRONG)
def test_a_wrong_protocol_is_found_out(wrong: str) -> None:
    rules, world = _WRONG[wrong]
    with pytest.raises(Broken):
        _run_many(rules, world)


# -- without faults -------------------------------------------------------------------------------------------------


class Rounds:
    """Keepers in lockstep: what is sent in one round arrives in the next, nothing is lost, nobody needs a clock."""

    def __init__(self, nodes: int, *, participant: Callable[..., Participant] = Participant) -> None:
        self.nodes = [participant(node, timing=_TIMING) for node in range(nodes)]
        self.coordinator = Coordinator(1, range(nodes), nodes, base=-1, timing=_TIMING)
        self.on_the_way: list[Send] = []
        self.flipped: dict[int, list[int]] = {node: [] for node in range(nodes)}
        self.held: dict[int, dict[int, Mapping[int, RankVote]]] = {node: {} for node in range(nodes)}
        self.cannot_encode: set[int] = set()
        for node in self.nodes:
            node.fence(1)
            node.begin(1, 0)

    def fill(self, node: int, version: int) -> None:
        self.held[node][version] = {node: RankVote(10 + node, f"{node}/{version}")}
        self.carry_out(node, self.nodes[node].filled(1, self.held[node], 0.0))

    def carry_out(self, node: int, actions: Sequence[Action]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.on_the_way.append(action)
            elif isinstance(action, StartEncoding):
                self.carry_out(node, self._encode(node, action.prepare))
            elif isinstance(action, Flip):
                self.flipped[node].append(action.record.version)

    def _encode(self, node: int, prepare: Prepare) -> Sequence[Action]:
        if prepare.version in self.cannot_encode:
            return self.nodes[node].encode_failed(prepare, "an injected fault", 0.0)
        return self.nodes[node].encoded(prepare, blocks_of(prepare.parts, prepare.members, node, 1), 0.0)

    def round(self) -> None:
        arriving, self.on_the_way = self.on_the_way, []
        for send in arriving:
            if isinstance(send.message, (Filled, Vote)):
                self.on_the_way += self.coordinator.handle(send.message, 0.0)
            else:
                self.carry_out(send.node, self.nodes[send.node].handle(send.message, 0.0))


@pytest.mark.parametrize("nodes", [1, 2, 3, 7])
@pytest.mark.parametrize("every", [1, 2, 3, 5])
def test_without_faults_the_newest_version_is_committed_within_two_exchanges(nodes: int, every: int) -> None:
    rounds = Rounds(nodes)
    for number in range(20):
        for node in range(nodes):
            if number % every == 0:
                rounds.fill(node, number // every)
        rounds.round()
    last = 19 // every
    for _ in range(7):  # what is being decided: Prepare, Vote, Commit; then the same for the last, and its Filled
        rounds.round()
    assert all(flipped[-1] == last for flipped in rounds.flipped.values())
    assert all(flipped == sorted(set(flipped)) for flipped in rounds.flipped.values())


def test_a_version_that_one_rank_skips_keeps_nobody_waiting() -> None:
    rounds = Rounds(3)
    for version in (4, 5, 6):
        for node in range(3):
            if (node, version) not in {(1, 6), (0, 4)}:
                rounds.fill(node, version)
    for _ in range(8):
        rounds.round()
    assert rounds.flipped == {0: [5], 1: [5], 2: [5]}


def test_a_version_that_cannot_be_encoded_gives_way_to_an_older_one() -> None:
    rounds = Rounds(2)
    rounds.cannot_encode.add(8)
    for node in range(2):
        rounds.held[node][7] = {node: RankVote(10 + node, f"{node}/7")}
        rounds.fill(node, 8)
    for _ in range(20):
        rounds.round()
    assert rounds.flipped == {0: [7], 1: [7]}
    assert not rounds.on_the_way, "and it is not tried for ever"


def test_an_older_offer_that_comes_late_changes_nothing() -> None:
    coordinator = Coordinator(1, [0], 1, base=-1, timing=_TIMING)
    new, old = {3: {0: RankVote(1, "c")}}, {9: {0: RankVote(1, "z")}}
    assert [type(send.message) for send in coordinator.handle(Filled(0, 1, 2, new), 0.0)] == [Seen, Prepare]
    coordinator.handle(Filled(0, 1, 1, old), 0.0)
    sends = coordinator.handle(Vote(0, 1, 3, 1, ok=True), 0.0)
    assert [type(send.message) for send in sends] == [Commit]


def test_an_attempt_that_takes_too_long_is_given_up() -> None:
    coordinator = Coordinator(1, [0, 1], 2, base=-1, timing=_TIMING)
    for node in (0, 1):
        coordinator.handle(Filled(node, 1, 1, {3: {node: RankVote(1, "c")}}), 0.0)
    coordinator.handle(Vote(0, 1, 3, 1, ok=True), 0.1)
    assert [(send.node, type(send.message)) for send in coordinator.tick(0.5)] == [(1, Prepare)]
    assert not coordinator.tick(0.6)
    messages = [send.message for send in coordinator.tick(3.0)]
    assert [type(message) for message in messages] == [Abort, Abort, Prepare, Prepare]
    assert isinstance(messages[0], Abort) and "node(s) [1]" in messages[0].reason


def _participant(versions: Mapping[int, Mapping[int, RankVote]]) -> Participant:
    """Node 1 of an epoch whose coordinator is node 0, with something to offer."""
    node = Participant(1, timing=_TIMING)
    node.fence(1)
    node.begin(1, 0)
    (send,) = node.filled(1, versions, 0.0)
    assert send == Send(0, Filled(1, 1, 1, versions))
    return node


_OFFER = {3: {1: RankVote(5, "b")}}


def test_an_offer_is_repeated_until_it_is_seen() -> None:
    node = _participant(_OFFER)
    assert not node.filled(1, dict(_OFFER), 0.1), "no news"
    assert not node.tick(0.2)
    assert node.tick(0.4) == [Send(0, Filled(1, 1, 1, _OFFER))]
    node.handle(Seen(1, 1), 0.5)
    assert not node.tick(9.0)
    node.filled(1, {}, 9.0)
    assert node.tick(9.5) == [Send(0, Filled(1, 1, 2, {}))]


def test_an_attempt_that_is_over_before_it_arrives_is_not_taken_up() -> None:
    node = _participant(_OFFER)
    prepare = Prepare(3, 1, 7, (0, 1), {0: RankVote(4, "a"), **_OFFER[3]})
    assert not node.handle(Abort(3, 1, 7, "no"), 0.1)
    assert not node.handle(prepare, 0.2)
    assert node.handle(replace(prepare, attempt=8), 0.3) == [StartEncoding(replace(prepare, attempt=8))]


def test_a_version_that_goes_away_while_it_is_encoded_gets_a_no() -> None:
    node = _participant(_OFFER)
    prepare = Prepare(3, 1, 7, (0, 1), {0: RankVote(4, "a"), **_OFFER[3]})
    assert node.handle(prepare, 0.1) == [StartEncoding(prepare)]
    node.filled(1, {}, 0.2)
    drop, send = node.encoded(prepare, (), 0.3)
    assert drop == Drop(3, 1) and isinstance(send, Send) and isinstance(send.message, Vote) and not send.message.ok
    assert not node.encoded(prepare, (), 0.4), "once is enough"
    assert not node.handle(Abort(3, 1, 7, "no"), 0.5), "nothing is left to drop"


# -- after a crash --------------------------------------------------------------------------------------------------


def _in_doubt(nodes: int, *, participant: Callable[..., Participant] = Participant) -> Rounds:
    """All have promised version 5, and their votes are on the way."""
    rounds = Rounds(nodes, participant=participant)
    for node in range(nodes):
        rounds.fill(node, 5)
    for _ in range(2):
        rounds.round()
    assert all(isinstance(send.message, Vote) for send in rounds.on_the_way)
    return rounds


def _outcome(nodes: Sequence[Participant], epoch: int) -> Outcome:
    for node in nodes:
        node.fence(epoch)
    return derive_outcome([node.report([(5, 1)]) for node in nodes])


def test_the_record_that_is_derived_is_the_one_the_coordinator_would_have_made() -> None:
    derived, decided = _in_doubt(3), _in_doubt(3)
    for _ in range(2):
        decided.round()
    (record,) = _outcome(derived.nodes, 2).committed
    assert [node.record for node in decided.nodes] == [record] * 3


def test_what_a_dead_member_may_have_refused_is_not_committed() -> None:
    outcome = _outcome(_in_doubt(3).nodes[:2], 2)
    assert not outcome.committed
    assert [(abort.version, abort.epoch) for abort in outcome.aborted] == [(5, 1)]
    assert "node(s) [2]" in outcome.aborted[0].reason


def test_what_a_member_has_lost_since_is_not_committed() -> None:
    nodes = _in_doubt(2).nodes
    for node in nodes:
        node.fence(2)
    outcome = derive_outcome([nodes[0].report([(5, 1)]), nodes[1].report([])])
    assert not outcome.committed and "node(s) [1] have lost it" in outcome.aborted[0].reason


def _late_outcome(participant: Callable[..., Participant]) -> Sequence[Action]:
    """All live and have promised, so the first recovery commits; before anybody hears that, one of them dies."""
    nodes = _in_doubt(3, participant=participant).nodes
    first = _outcome(nodes, 2)
    assert first.committed
    second = _outcome(nodes[:2], 3)
    assert not second.committed
    assert nodes[1].settle(second) == [Drop(5, 1)]
    return nodes[0].settle(first)


def test_an_outcome_derived_before_the_last_fence_changes_nothing() -> None:
    assert not _late_outcome(Participant)
    assert _late_outcome(FollowsOldOutcomes), "the test can fail"


def test_a_commit_that_arrives_after_the_fence_changes_nothing() -> None:
    rounds = _in_doubt(2)
    for node in rounds.nodes:
        node.fence(2)
    for _ in range(2):
        rounds.round()
    assert rounds.flipped == {0: [], 1: []} and rounds.nodes[0].promise is not None


def test_an_epoch_does_not_begin_with_an_old_promise_open() -> None:
    node = _in_doubt(1).nodes[0]
    node.fence(2)
    with pytest.raises(InvariantViolation, match="settle it first"):
        node.begin(2, 0)
    node.settle(derive_outcome([node.report([(5, 1)])]))
    node.begin(2, 0)
    node.begin(1, 0)  # comes late
    assert node.record is not None and node.record.key == (5, 1)


def test_what_is_newer_than_the_state_a_run_goes_back_to_is_forgotten() -> None:
    node = _in_doubt(1).nodes[0]
    assert not node.forget_above(5)
    node.fence(2)
    assert node.forget_above(4) == [Drop(5, 1)] and node.promise is None


def test_only_fenced_keepers_can_be_asked() -> None:
    nodes = _in_doubt(2).nodes
    with pytest.raises(InvariantViolation, match="still votes"):
        derive_outcome([node.report([(5, 1)]) for node in nodes])
    nodes[0].fence(2)
    with pytest.raises(InvariantViolation, match="different epochs"):
        derive_outcome([node.report([(5, 1)]) for node in nodes])
    assert derive_outcome([]) == Outcome(0, (), ())


def test_records_that_contradict_each_other_are_our_own_mistake() -> None:
    one, other = (CommitRecord(3, 1, 1, {0: RankVote(4, d)}, ()) for d in "ab")
    with pytest.raises(InvariantViolation, match="contradict"):
        derive_outcome([Report(node, 2, (record,), (), ()) for node, record in enumerate((one, other))])
    with pytest.raises(InvariantViolation, match="from two nodes"):
        replace(one, parity=(ParityBlock(0, 0, 0, "a"), ParityBlock(0, 0, 0, "b")))
    with pytest.raises(InvariantViolation, match="ranks 0-1"):
        replace(one, world=2)


# -- as JSON --------------------------------------------------------------------------------------------------------

_RECORD = CommitRecord(3, 1, 2, {0: RankVote(4, "a"), 1: RankVote(5, "b")}, (ParityBlock(0, 1, 0, "c"),))
_PREPARE = Prepare(3, 1, 7, (0, 1), _RECORD.parts)
_VOTE = Vote(1, 1, 3, 7, ok=True, parity=_RECORD.parity)


@pytest.mark.parametrize(
    "spoken",
    [
        Filled(1, 2, 3, {4: {1: RankVote(5, "a")}, 5: {1: RankVote(6, "b")}}),
        Seen(2, 3),
        _PREPARE,
        _VOTE,
        Commit(1, 7, _RECORD),
        Abort(3, 1, 7, "no"),
        _RECORD,
        Report(1, 2, (_RECORD,), (Promise(_PREPARE, _VOTE),), ((3, 1),)),
        Outcome(2, (_RECORD,), (Abort(4, 1, 8, "no"),)),
    ],
    ids=lambda spoken: type(spoken).__name__,
)
def test_everything_survives_the_way_through_json(spoken: Spoken) -> None:
    assert from_json(json.loads(json.dumps(to_json(spoken)))) == spoken


def test_a_damaged_record_is_refused() -> None:
    value = json.loads(json.dumps(to_json(Commit(1, 7, _RECORD))))
    value["record"]["parts"]["1"]["length"] = 6
    with pytest.raises(ManifestMismatch, match="is damaged"):
        from_json(value)


@pytest.mark.parametrize("value", [{}, {"kind": "Vote"}, {"kind": "Other"}, {"kind": "Commit", "record": 3}])
def test_what_is_no_message_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(ManifestMismatch, match="no message"):
        from_json(value)


def test_a_lost_message_is_repeated_before_the_attempt_is_given_up() -> None:
    with pytest.raises(ConfigurationError, match=r"repeat_s=5.*decide_s=2"):
        Timing(repeat_s=5.0, decide_s=2.0)
