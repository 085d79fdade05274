"""What keepers do together: agree on versions, compute parity over nodes, bring a lost rank's snapshot back.

Each keeper runs one :class:`Protector`. It watches the boards of its own ranks, carries out what the commit protocol
(:mod:`holdfast.fault_tolerance.commit`) says, and serves bytes to its peers. Trainers neither wait for it nor have to
be alive. It never raises into training: a version that cannot be encoded is aborted, and the one before stays.

Source: REFT, arXiv 2310.12670 (snapshot management processes, parity over nodes).
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from holdfast import failpoints
from holdfast.errors import InsufficientShards, ManifestMismatch, ShardCorrupt, SnapshotError, SnapshotMemory
from holdfast.fault_tolerance import commit as c
from holdfast.fault_tolerance.arena import Arena
from holdfast.fault_tolerance.buffer import Buffer, BufferState, Bytes, Slot
from holdfast.fault_tolerance.commit_coordinator import Coordinator
from holdfast.fault_tolerance.commit_json import from_json, to_json
from holdfast.fault_tolerance.commit_outcome import Outcome, Report
from holdfast.fault_tolerance.commit_participant import Participant
from holdfast.fault_tolerance.lanes import ProtectionPlan
from holdfast.fault_tolerance.manifest import Manifest, clear_gaps, damaged_slices, digest
from holdfast.fault_tolerance.parity import ParityStore, encode, rebuild
from holdfast.fault_tolerance.rotation import choose_target

__all__ = ["Links", "ProtectionPlan", "Protector", "Status", "go_last"]

logger = logging.getLogger(__name__)

_POLL_S, _SLOWEST_POLL_S, _IDLE_S = 0.005, 0.05, 0.1
"""Between two looks at the boards while an epoch runs, at least and at most; and between epochs."""
_LOOKS_PER_VERSION = 20
"""Where versions come slowly, looking often would only cost the trainers processor time."""
_READERS = 8
_NICE = 10


@dataclass(frozen=True, slots=True)
class Status:
    """What the driver is told with every pulse."""

    committed: int = -1
    """Newest version that this keeper knows to be complete everywhere, data and parity."""
    epoch: int = -1
    """In which it was committed."""
    encode_s: float = 0.0
    """Seconds that the last encoding took here."""
    parity_bytes: int = 0
    """What it wrote."""
    aborted: int = 0
    """Attempts that came to nothing, since the keeper was started."""
    reason: str = ""
    """Of the last one."""


class Links(Protocol):
    """The way to other keepers."""

    def say(self, node: int, message: Mapping[str, object]) -> None:
        """Returns at once; the message may be lost."""
        ...

    def fetch(self, node: int, request: Mapping[str, object], into: Bytes) -> None:
        """Bulk bytes; ``request`` as :meth:`Protector.serve` understands it. Raises: SnapshotError."""
        ...

    def ask(self, node: int, request: Mapping[str, object]) -> Sequence[str]:
        """Raises: SnapshotError."""
        ...


class Protector:
    """One keeper's part. Every method may be called from any thread.

    ``arenas`` gives the memory of this node's ranks; parity may take ``parity_ratio`` times as much as one of a rank's
    buffers at its limit. ``find`` gives all memory of ranks of a number, those of other rosters included; that is let
    go when the second version of a roster is committed, because by then every keeper knows of the first.
    """

    def __init__(
        self,
        node: int,
        arenas: Callable[[], Mapping[int, Arena]],
        links: Links,
        *,
        parity_ratio: float,
        find: Callable[[int], Sequence[Arena]],
        let_go: Callable[[], None],
        timing: c.Timing | None = None,
    ) -> None:
        self._node, self._arenas, self._links, self._parity_ratio = node, arenas, links, parity_ratio
        self._find_memory, self._let_go = find, let_go
        self._timing = timing or c.Timing()
        self._participant = Participant(node, timing=self._timing)
        self._coordinator: Coordinator | None = None
        self._plan: ProtectionPlan | None = None
        self._fence_epoch = 0
        self._stores: dict[int, ParityStore] = {}
        self._reserved: dict[int, int] = {}
        """Bytes of a rank's buffers for which its store has got memory."""
        self._former: tuple[Mapping[int, ParityStore], ...] = ()
        """Of other rosters."""
        self._roster, self._first_epoch, self._commits = 0, 0, 0
        """Number of the present roster, its first epoch, and how many of its versions have been committed."""
        self._pins: dict[c.Key, list[Buffer]] = {}
        self._status = Status()
        self._filled_last, self._filled_s, self._pause_s = -1, time.monotonic(), _POLL_S
        self._lock = threading.RLock()
        self._is_closed = threading.Event()
        self._encoder = ThreadPoolExecutor(1, "encode", initializer=go_last)
        self._readers = ThreadPoolExecutor(_READERS, "read", initializer=go_last)
        threading.Thread(target=self._watch, name="protector", daemon=True).start()

    # -- from the driver, between epochs --------------------------------------------------------------------------

    def fence(self, epoch: int) -> None:
        """No vote of an earlier epoch from now on; what is promised stays until :meth:`begin` knows the outcome."""
        with self._lock:
            self._fence_epoch = max(self._fence_epoch, epoch)
            self._coordinator = None
            self._do(self._participant.fence(epoch))
            if self._plan is not None and self._plan.epoch < epoch:
                self._plan = None

    def report(self) -> Report:
        """What this keeper knows of outcomes. After :meth:`fence`."""
        with self._lock:
            return self._participant.report(self._complete_keys())

    def parity_keys(self) -> list[c.Key]:
        """Versions and epochs whose parity is here, of every lane of this node."""
        with self._lock:
            rosters = [stores for stores in (self._stores, *self._former) if stores]
            return sorted({key for stores in rosters for key in set.intersection(*map(_keys_of, stores.values()))})

    def forget_above(self, version: int) -> None:
        with self._lock:
            self._commits = 0  # perhaps not any more
            self._do(self._participant.forget_above(version))

    def begin(self, plan: ProtectionPlan, outcome: Outcome) -> None:
        """The epoch of ``plan`` starts; ``outcome`` is what became of everything before."""
        with self._lock:
            if plan.epoch < self._fence_epoch:
                return  # a late call
            self._do(self._participant.settle(outcome))
            members = sorted(plan.ranks)
            self._participant.begin(plan.epoch, members[0])
            self._plan = plan
            self._make_stores(plan)
            if members[0] == self._node:
                base = max(plan.version - 1, -1)
                self._coordinator = Coordinator(plan.epoch, members, plan.world, base=base, timing=self._timing)
            for arena in self._arenas().values():
                arena.board.is_protected = True

    def rebuild(
        self, rank: int, record: c.CommitRecord, plan: ProtectionPlan, lost: Collection[int], arena: Arena
    ) -> None:
        """Bring the snapshot of ``rank`` back into ``arena``, COMMITTED, from what the other ranks of its lane hold.

        ``lost``: ranks whose snapshots are not there; those of the lane whose copies turn out damaged are added.
        Raises: InsufficientShards, ShardCorrupt, SnapshotError.
        """
        lane, reader = plan.lane_of(rank), _Reader(self, plan, record.key, record.parts)
        gone = {*lost, rank} & set(lane.ranks)
        gone |= {other for other in lane.ranks if other not in gone and self._is_damaged(other, record, plan)}
        part = record.parts[rank]
        members = [lane.ranks.index(other) for other in sorted(gone)]
        if len(members) > lane.parity:
            raise InsufficientShards(
                sorted(gone), f"ranks {sorted(gone)} of lane {lane.ranks} are lost, and parity restores {lane.parity}"
            )
        arena.reserve(part.length)
        buffer = _claim_any(arena, record.version)
        try:
            out = buffer.data[: part.length]
            rebuild(lane, record.parts, members, lane.ranks.index(rank), out, reader, self._readers)
            _publish(buffer, part, rank)
        except BaseException:
            buffer.release()
            raise

    def _is_damaged(self, rank: int, record: c.CommitRecord, plan: ProtectionPlan) -> bool:
        request = {"what": "damage", "rank": rank, "record": to_json(record)}
        node = plan.node_of(rank)
        damage = self.examine(request) if node == self._node else self._links.ask(node, request)
        for line in damage:
            logger.warning("a copy is not used: %s", line)
        return bool(damage)

    def close(self) -> None:
        self._is_closed.set()
        self._encoder.shutdown(wait=False, cancel_futures=True)
        self._readers.shutdown(wait=False)  # whoever waits for a read that is cancelled is never woken

    # -- from peers -----------------------------------------------------------------------------------------------

    def hear(self, message: Mapping[str, object]) -> None:
        """A message of the commit protocol. Raises: ManifestMismatch for anything else."""
        spoken = from_json(message)
        with self._lock:
            self._deliver(spoken)

    def serve(self, request: Mapping[str, Any]) -> Bytes:
        """Bytes of a snapshot or of parity. Raises: SnapshotError when they are not here."""
        place = range(request["start"], request["stop"])
        if request["what"] == "parity":
            key = (request["version"], request["epoch"])
            return self._store_of(request["rank"], key).read(key, place)
        for buffer in (buffer for arena in self._find_memory(request["rank"]) for buffer in arena.buffers):
            slot = buffer.describe()
            if slot.is_complete and slot.manifest_digest == request["digest"]:
                return buffer.data[place.start : place.stop]
        raise SnapshotError(f"the snapshot {request['digest']} of rank {request['rank']} is not on node {self._node}")

    def examine(self, request: Mapping[str, Any]) -> list[str]:
        """What is wrong with this node's copy and parity of a recorded version, in words."""
        record = cast(c.CommitRecord, from_json(request["record"]))
        rank = request["rank"]
        try:
            parity = self._store_of(rank, record.key).damage(record)
            part = record.parts[rank]
            data = self.serve({"what": "data", "rank": rank, "digest": part.digest, "start": 0, "stop": part.length})
            manifest = _manifest_of(data, part, rank)
            clear_gaps(data[: part.length - part.manifest_bytes], manifest)
        except SnapshotError as error:
            return [str(error)]
        return [str(damage) for damage in (*parity, *damaged_slices(data, manifest))]

    @property
    def status(self) -> Status:
        return self._status

    # -- while an epoch runs --------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._is_closed.wait(_IDLE_S if self._plan is None else self._pause_s):
            try:
                with self._lock:
                    self._look()
            except Exception:  # the boundary of a thread that must go on: what failed is tried again
                logger.exception("keeper of node %d", self._node)

    def _look(self) -> None:
        plan = self._plan
        if plan is None:
            return
        self._reserve()
        now, versions = time.monotonic(), self._filled(plan)
        self._pace(max(versions, default=-1), now)
        self._do(self._participant.filled(plan.epoch, versions, now))
        self._do(self._participant.tick(now))
        if self._coordinator is not None:
            self._do(self._coordinator.tick(now))

    def _pace(self, newest: int, now: float) -> None:
        """Look a few times for each version that comes."""
        if newest != self._filled_last:
            between_s = max((now - self._filled_s) / _LOOKS_PER_VERSION, _POLL_S)
            self._pause_s = min(between_s, 2 * self._pause_s, _SLOWEST_POLL_S)  # one long wait means little
            self._filled_last, self._filled_s = newest, now

    def _filled(self, plan: ProtectionPlan) -> dict[int, dict[int, c.RankVote]]:
        """Versions that every rank of this node has complete."""
        arenas = self._arenas()
        mine = [rank for rank in plan.ranks.get(self._node, ()) if rank in arenas]
        by_rank = {rank: _complete(arenas[rank]) for rank in mine}
        common = set.intersection(*(set(found) for found in by_rank.values())) if by_rank else set[int]()
        return {version: {rank: _vote_of(by_rank[rank][version]) for rank in mine} for version in sorted(common)}

    def _complete_keys(self) -> list[c.Key]:
        """For reports: versions with data that is here. Their epoch is that of whoever could have promised them."""
        promise = self._participant.promise
        if promise is None:
            return []
        prepare = promise.prepare
        held = self._pins.get(prepare.key, [])
        intact = bool(held) and all(buffer.describe().version == prepare.version for buffer in held)
        return [prepare.key] if intact else []

    def _do(self, actions: Sequence[c.Action]) -> None:
        for action in actions:
            if isinstance(action, c.Send):
                self._send(action)
            elif isinstance(action, c.StartEncoding):
                self._start_encoding(action.prepare)
            elif isinstance(action, c.Flip):
                self._flip(action.record)
            else:
                self._drop((action.version, action.epoch))

    def _send(self, send: c.Send) -> None:
        if send.node == self._node:
            self._deliver(send.message)
            return
        if isinstance(send.message, c.Commit):
            failpoints.hit("keeper.after_record", send.message.record.version)
        self._links.say(send.node, to_json(send.message))

    def _deliver(self, message: object) -> None:
        now = time.monotonic()
        if isinstance(message, (c.Filled, c.Vote)):
            if self._coordinator is not None:
                self._do(self._coordinator.handle(message, now))
        elif isinstance(message, (c.Seen, c.Prepare, c.Commit, c.Abort)):
            if isinstance(message, c.Abort):
                self._note(aborted=self._status.aborted + 1, reason=message.reason)
            self._do(self._participant.handle(message, now))
        else:
            raise ManifestMismatch(f"{type(message).__name__} is not said between keepers")

    # -- encoding -------------------------------------------------------------------------------------------------

    def _start_encoding(self, prepare: c.Prepare) -> None:
        plan = self._plan
        assert plan is not None, "an epoch runs"
        failpoints.hit("keeper.before_encode", prepare.version)
        missing = self._pin(prepare, plan)
        if missing:
            self._do(self._participant.encode_failed(prepare, missing, time.monotonic()))
        else:
            self._encoder.submit(self._encode, prepare, plan)

    def _encode(self, prepare: c.Prepare, plan: ProtectionPlan) -> None:
        """In the encoder's thread. The lock is held only before and after."""
        started_s = time.monotonic()
        with self._lock:
            record = self._participant.record
            keep = None if record is None else record.key
            lanes = [(plan.lane_of(rank), self._stores[rank]) for rank in plan.ranks[self._node]]
        reader = _Reader(self, plan, prepare.key, prepare.parts)
        try:
            blocks = [
                block
                for _, store in lanes
                for block in encode(store, prepare.key, prepare.parts, reader, self._readers, keep=keep)
            ]
            failpoints.hit("keeper.before_vote", prepare.version)
        except Exception as error:  # the boundary of a thread: to the protocol it is a no
            logger.warning("version %d is not encoded: %s", prepare.version, error)
            with self._lock:
                self._do(self._participant.encode_failed(prepare, str(error), time.monotonic()))
            return
        with self._lock:
            for buffer in self._pins.get(prepare.key, []):
                buffer.encode()
            size = sum(store.size_for(prepare.parts) for _, store in lanes)
            self._note(encode_s=time.monotonic() - started_s, parity_bytes=size)
            self._do(self._participant.encoded(prepare, blocks, time.monotonic()))

    def _pin(self, prepare: c.Prepare, plan: ProtectionPlan) -> str:
        """Hold this node's copies of the version; what is missing, in words."""
        self._unpin(prepare.key)
        held = self._pins.setdefault(prepare.key, [])
        for rank in plan.ranks[self._node]:
            buffer = _find(self._arenas()[rank], prepare.parts[rank].digest)
            if buffer is None:
                self._unpin(prepare.key)
                return f"version {prepare.version} of rank {rank} went away before it was encoded"
            buffer.pin(+1)
            held.append(buffer)
            if buffer.describe().manifest_digest != prepare.parts[rank].digest or not buffer.describe().is_complete:
                self._unpin(prepare.key)
                return f"version {prepare.version} of rank {rank} was replaced before it was encoded"
        return ""

    def _unpin(self, key: c.Key) -> None:
        for buffer in self._pins.pop(key, []):
            buffer.pin(-1)

    def _flip(self, record: c.CommitRecord) -> None:
        failpoints.hit("keeper.before_flip", record.version)
        for buffer in self._pins.get(record.key, []):
            buffer.commit()
        self._unpin(record.key)
        if self._plan is not None and _is_due(record.version, self._plan.persist_every):
            self._keep(record)
        self._note(committed=record.version, epoch=record.epoch)
        if record.epoch >= self._first_epoch:
            self._commits += 1
            if self._commits == 2:
                self._former = ()
                self._let_go()

    def _keep(self, record: c.CommitRecord) -> None:
        """Mark the version for a durable checkpoint instead of the last one. While that is still being read, wait for
        the next turn: keepers that are slow and keepers that are fast agree again then."""
        for rank, arena in self._arenas().items():
            if rank in record.parts and not any(slot.is_pinned for slot in arena.slots()):
                for buffer in arena.buffers:
                    buffer.keep(False)
                chosen = _find(arena, record.parts[rank].digest)
                if chosen is not None:
                    chosen.keep()

    def _drop(self, key: c.Key) -> None:
        for buffer in self._pins.get(key, []):
            buffer.encode(False)
        self._unpin(key)
        for stores in (self._stores, *self._former):
            for store in stores.values():
                store.drop(key)

    def _note(self, **changes: object) -> None:
        self._status = replace(self._status, **changes)  # type: ignore[arg-type]  # names of its fields

    # -- memory ---------------------------------------------------------------------------------------------------

    def _make_stores(self, plan: ProtectionPlan) -> None:
        """One per rank of this node; those that fit stay, with what they hold."""
        if plan.roster != self._roster:
            self._former = (*self._former, self._stores) if self._stores else self._former
            self._roster, self._first_epoch, self._commits, self._stores = plan.roster, plan.epoch, 0, {}
        self._reserved.clear()
        known, self._stores = self._stores, {}
        for rank in plan.ranks[self._node]:
            lane, board = plan.lane_of(rank), self._arenas()[rank].board
            limit_bytes = int(board.limit_bytes * self._parity_ratio / board.buffers)
            fresh = ParityStore(lane, lane.ranks.index(rank), limit_bytes=limit_bytes)
            store = known.get(rank, fresh)
            self._stores[rank] = store if store.lane == lane else fresh

    def _reserve(self) -> None:
        """Parity gets its memory as soon as a rank has reserved its own, not with the first version."""
        for rank, store in self._stores.items():
            capacity = self._arenas()[rank].board.capacity if rank in self._arenas() else 0
            if capacity > self._reserved.get(rank, 0):
                self._reserved[rank] = capacity
                self._encoder.submit(_reserve, store, capacity)

    def _store_of(self, rank: int, key: c.Key) -> ParityStore:
        """That of the roster which the version belongs to; of the present one if nobody has it."""
        stores = [stores[rank] for stores in (self._stores, *self._former) if rank in stores]
        store = next((store for store in stores if key in store.keys), next(iter(stores), None))
        if store is None:
            raise SnapshotError(f"node {self._node} holds no parity for the lane of rank {rank}")
        return store


class _Reader:
    """See :class:`holdfast.fault_tolerance.parity.Reader`: from this node's memory, or from a peer's."""

    def __init__(self, protector: Protector, plan: ProtectionPlan, key: c.Key, parts: c.Parts) -> None:
        self._protector, self._plan, self._key, self._parts = protector, plan, key, parts

    def data(self, rank: int, place: range, into: Bytes) -> None:
        self._read({"what": "data", "rank": rank, "digest": self._parts[rank].digest}, place, into)

    def parity(self, rank: int, place: range, into: Bytes) -> None:
        version, epoch = self._key
        self._read({"what": "parity", "rank": rank, "version": version, "epoch": epoch}, place, into)

    def _read(self, request: Mapping[str, object], place: range, into: Bytes) -> None:
        full = {**request, "start": place.start, "stop": place.stop}
        node = self._plan.node_of(cast(int, request["rank"]))
        if node == self._protector._node:
            into[:] = self._protector.serve(full)
        else:
            self._protector._links.fetch(node, full, into)


def go_last() -> None:
    """For threads: encoding must not take the processor from anybody. On Linux a thread has a niceness of its own."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def _reserve(store: ParityStore, capacity_bytes: int) -> None:
    try:
        store.reserve(capacity_bytes)
    except SnapshotMemory as error:  # the first version will fail with the same words, and the run hears them then
        logger.warning("parity of rank %d: %s", store.lane.ranks[store.member], error)


def _keys_of(store: ParityStore) -> set[c.Key]:
    return set(store.keys)


def _complete(arena: Arena) -> dict[int, Slot]:
    """The copy of each version that the latest epoch wrote."""
    found: dict[int, Slot] = {}
    for slot in arena.slots():
        if slot.is_complete and (slot.version not in found or found[slot.version].epoch < slot.epoch):
            found[slot.version] = slot
    return found


def _vote_of(slot: Slot) -> c.RankVote:
    return c.RankVote(slot.manifest_at + slot.manifest_bytes, slot.manifest_digest, slot.manifest_bytes)


def _find(arena: Arena, manifest_digest: str) -> Buffer | None:
    buffers: Iterator[Buffer] = iter(arena.buffers)
    return next((b for b in buffers if (s := b.describe()).is_complete and s.manifest_digest == manifest_digest), None)


def _is_due(version: int, every: int) -> bool:
    return every > 0 and version > 0 and version % every == 0


def _claim_any(arena: Arena, version: int) -> Buffer:
    """Between epochs: a buffer for what is rebuilt. Copies of the version that are there are not good enough."""
    for buffer in arena.buffers:
        if buffer.describe().version == version:
            buffer.release()
    index = choose_target(arena.slots())
    if index is None or not arena.buffer(index).claim(version, 0):
        raise SnapshotError(f"there is no buffer for version {version} of rank {arena.board.rank}: all are being read")
    return arena.buffer(index)


def _manifest_of(data: Bytes, part: c.RankVote, rank: int) -> Manifest:
    """Raises: ShardCorrupt."""
    stored = data[part.length - part.manifest_bytes : part.length].tobytes()
    have = digest(stored)
    if have != part.digest:
        raise ShardCorrupt("manifest", rank=rank, version=-1, want=part.digest, have=have)
    return Manifest.from_bytes(stored)


def _publish(buffer: Buffer, part: c.RankVote, rank: int) -> None:
    """Believe what was decoded only after every digest. Raises: ShardCorrupt."""
    manifest = _manifest_of(buffer.data, part, rank)
    data_bytes = part.length - part.manifest_bytes
    for damage in damaged_slices(buffer.data[:data_bytes], manifest):
        raise damage
    stored = buffer.data[data_bytes : part.length].tobytes()
    buffer.stamp(manifest.epoch)
    buffer.publish(stored, part.digest, data_bytes=data_bytes, state=BufferState.COMMITTED)
