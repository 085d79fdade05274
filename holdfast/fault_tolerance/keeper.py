"""The keeper of one node: owns the memory of its ranks, outlives their workers, and tells the driver what it sees.

Runs in a process of its own that never imports torch. Arguments and results are JSON values; integer keys
of mappings may arrive as strings. Every method may be called from any thread, and repeated when an answer was lost.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Protocol, cast

import numpy as np

from holdfast.clock import Clock
from holdfast.errors import InvariantViolation, ManifestMismatch, SnapshotError
from holdfast.fault_tolerance import chaos, strikes
from holdfast.fault_tolerance.arena import Arena
from holdfast.fault_tolerance.brick_store import BrickStore
from holdfast.fault_tolerance.bricks import Brick
from holdfast.fault_tolerance.buffer import BufferState
from holdfast.fault_tolerance.checkpoint import read_rank, write_rank
from holdfast.fault_tolerance.commit import CommitRecord
from holdfast.fault_tolerance.commit_json import from_json, to_json
from holdfast.fault_tolerance.commit_outcome import Outcome
from holdfast.fault_tolerance.damage import flip_bit
from holdfast.fault_tolerance.holdings import Holdings
from holdfast.fault_tolerance.impairment import STORAGE
from holdfast.fault_tolerance.lanes import ProtectionPlan
from holdfast.fault_tolerance.ledger import Ledger
from holdfast.fault_tolerance.links import PeerLinks
from holdfast.fault_tolerance.manifest import Manifest, damaged_slices, digest
from holdfast.fault_tolerance.protector import Protector
from holdfast.fault_tolerance.rotation import choose_target
from holdfast.fault_tolerance.storage import open_storage
from holdfast.fault_tolerance.throttle import Throttle
from holdfast.fault_tolerance.versions import Held, find_version, held_versions

__all__ = ["Keeper", "KeeperApi"]

logger = logging.getLogger(__name__)

Json = dict[str, object]


class KeeperApi(Protocol):
    """What the driver asks a keeper for. Calls may block as long as the storage does, ``pulse`` never."""

    def admit(self, rank: int, roster: int = 0) -> Json:
        """The rank's memory as the fields of an ``ArenaRef``, made when it is asked for first. With the first rank of
        a newer roster those before become former ones, whose memory stays until the new ones have as much."""
        ...

    def pulse(self, since: Mapping[int, int]) -> Json:
        """Renew the lease. Signs of life, versions and, from number ``since[rank]`` on, step reports of every rank."""
        ...

    def inventory(self, epoch: int = 0) -> Json:
        """What is here, after a fence to ``epoch``.

        ``held``: complete versions with an intact manifest by rank of ``roster``, newest first. ``former``: those of
        other rosters. ``parity``: versions and epochs whose parity is here. ``report``: what this keeper knows of
        outcomes, see ``commit.derive_outcome``.
        """
        ...

    def begin(self, plan: Json, outcome: Json) -> None:
        """An epoch starts: commit and protect its versions together with the other keepers, see ``ProtectionPlan``."""
        ...

    def hold_bricks(self, bricks: Sequence[Json], addresses: Mapping[str, str], is_new: bool) -> None:
        """An epoch has started: take in this node's pieces of frozen files, each a ``Brick``, in the background;
        ``addresses`` are the keepers' by node, and ``is_new`` says that none has been asked before."""
        ...

    def rebuild(self, rank: int, record: Json, plan: Json, lost: Sequence[int]) -> int:
        """Between epochs: decode a rank's snapshot from what its lane holds, every digest verified; its version. One of
        another roster becomes a guest."""
        ...

    def verify(self, rank: int, version: int) -> list[str]:
        """Names of the slices whose bytes do not match their digests."""
        ...

    def fence(self, epoch: int) -> None:
        """No worker of an earlier epoch may publish or commit from now on."""
        ...

    def forget_above(self, version: int) -> None:
        """Between epochs: drop later versions and whatever is half written."""
        ...

    def quarantine(self, rank: int, version: int) -> None:
        """Between epochs: the copy is damaged and must not be offered again."""
        ...

    def persist(self, rank: int, version: int, uri: str, directory: str) -> Json:
        """Write a version to storage, every digest verified; the receipt for ``checkpoint.commit``."""
        ...

    def load(self, rank: int, uri: str, directory: str) -> int:
        """Between epochs: bring a rank's part of a checkpoint into its memory, every digest verified; its version."""
        ...

    def kill(self, pid: int) -> None:
        """SIGKILL for a process of this node; nothing happens if there is none."""
        ...

    def arm(self, folder: str, entries: Sequence[tuple[str, str]]) -> None:
        """Faults on purpose, each with its source, for this keeper's failpoints; ``folder`` is the run's ledger."""
        ...

    def strike(self, entry: str, pids: Sequence[int] = ()) -> None:
        """A fault on purpose, now; ``pids`` are the node's workers, for those that strike the whole node."""
        ...


class Keeper:
    """See :class:`KeeperApi`. ``limit_bytes`` is shared equally by the ranks that are admitted before they reserve; of
    each share ``parity_ratio`` parts in ``buffers + parity_ratio`` are for parity. ``token`` is what the keepers of a
    run know each other by; without one this keeper is alone. ``persist_mb_per_s`` bounds what all its ranks write to
    storage together, 10^6 bytes per second; 0 is no bound.

    Raises: InsufficientShards for a version that is not held, ShardCorrupt for damaged bytes, SnapshotMemory when
    the limit is too small, SnapshotError when the storage fails.
    """

    def __init__(
        self,
        node: int,
        run_tag: str,
        *,
        limit_bytes: int,
        buffers: int,
        lease_s: float,
        clock: Clock,
        token: str = "",
        parity_ratio: float = 0.0,
        persist_mb_per_s: float = 0.0,
    ) -> None:
        self._node = node
        self._lease_s, self._clock, self._heard_s = lease_s, clock, clock.now()
        self._holdings = Holdings(run_tag, limit_bytes=limit_bytes, buffers=buffers, parity_ratio=parity_ratio)
        self._fence_epoch = 0
        self._plans = 0  # fences and starts of epochs so far: what was begun before the last one is not wanted any more
        self._lock = threading.RLock()
        self._throttle = Throttle(persist_mb_per_s * 1e6, clock)
        self._links = PeerLinks(node, token)
        self._protector = Protector(
            node,
            lambda: self._arenas,
            self._links,
            parity_ratio=parity_ratio,
            find=self._holdings.of,
            let_go=self._holdings.drop_former,
        )
        self._bricks = BrickStore(node, self._links)
        self._links.serve(self._protector, self._bricks)

    # -- the node -------------------------------------------------------------------------------------------------

    @property
    def _arenas(self) -> Mapping[int, Arena]:
        """Of the present ranks."""
        return self._holdings.present

    def admit(self, rank: int, roster: int = 0) -> Json:
        with self._lock:
            return asdict(self._holdings.admit(rank, roster, fence=self._fence_epoch).ref)

    @property
    def address(self) -> str:
        """Where other keepers reach this one; empty without a token."""
        return self._links.address

    def pulse(self, since: Mapping[int, int]) -> Json:
        self._heard_s = self._clock.now()
        wanted = {int(rank): number for rank, number in since.items()}
        ranks = {rank: _seen(arena, wanted.get(rank, 0)) for rank, arena in self._arenas.items()}
        return {
            "node": self._node,
            "pid": os.getpid(),
            "now": self._heard_s,
            "roster": self._holdings.roster,
            "ranks": ranks,
            "protection": asdict(self._protector.status),
            "bricks": self._bricks.status,
        }

    def fence(self, epoch: int) -> None:
        with self._lock:
            self._plans += 1
            self._fence_epoch = max(self._fence_epoch, epoch)
            for arena in self._holdings.arenas:
                arena.board.fence(epoch)
        self._protector.fence(epoch)

    def begin(self, plan: Json, outcome: Json) -> None:
        found = ProtectionPlan.from_json(plan)
        self._links.connect(found.addresses)
        self._protector.begin(found, cast(Outcome, from_json(outcome)))

    def hold_bricks(self, bricks: Sequence[Json], addresses: Mapping[str, str], is_new: bool) -> None:
        self._links.connect({int(node): address for node, address in addresses.items()})
        self._bricks.hold([Brick.from_json(brick) for brick in bricks], is_new=is_new)

    def rebuild(self, rank: int, record: Json, plan: Json, lost: Sequence[int]) -> int:
        number, found = self._plans, cast(CommitRecord, from_json(record))
        how = ProtectionPlan.from_json(plan)
        self._links.connect(how.addresses)
        is_guest = how.roster != self._holdings.roster
        size_bytes = found.parts[rank].length
        arena = self._holdings.guest(rank, how.roster, size_bytes) if is_guest else self._arena(rank)
        self._protector.rebuild(rank, found, how, lost, arena)
        if number != self._plans:
            _release(arena, found.version)
            raise SnapshotError(f"version {found.version} of rank {rank} is rebuilt too late: another epoch has begun")
        return found.version

    def kill(self, pid: int) -> None:
        if pid <= 1 or pid == os.getpid():  # 0 and negative numbers mean whole groups of processes
            raise InvariantViolation(f"keeper of node {self._node} is asked to kill pid {pid}")
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            logger.info("pid %d was gone already", pid)

    def arm(self, folder: str, entries: Sequence[tuple[str, str]]) -> None:
        faults = [chaos.parse(entry, source=source, any_step=True) for entry, source in entries]
        strikes.arm(faults, chaos.Target.KEEPER, self._node, Ledger(Path(folder)))

    def strike(self, entry: str, pids: Sequence[int] = ()) -> None:
        own = {
            chaos.Action.NODE_SIGKILL: lambda _: _signal_all(pids, signal.SIGKILL),
            chaos.Action.NODE_SIGSTOP: lambda _: _signal_all(pids, signal.SIGSTOP),
            chaos.Action.FLIP: self._flip_parity,
            chaos.Action.SLOW_LINK: lambda fault: self._links.slow_down(fault.mb_per_s * 1e6, fault.for_s),
            **dict.fromkeys((chaos.Action.DISK_FULL, chaos.Action.SLOW_DISK), STORAGE.suffer),
        }
        strikes.strike(chaos.parse(entry, any_step=True), own)

    def _flip_parity(self, fault: chaos.ChaosFault) -> None:
        """Of the newest version whose parity is here."""
        version, epoch = max(self._protector.parity_keys(), default=(-1, -1))
        size = self._protector.status.parity_bytes // max(len(self._arenas), 1)
        place = {"rank": fault.number, "version": version, "epoch": epoch, "start": 0, "stop": size}
        flip_bit(self._protector.serve({"what": "parity", **place}), fault)

    def expired(self, now: float) -> bool:
        """No driver has asked for anything for longer than the lease."""
        return now - self._heard_s > self._lease_s

    def close(self) -> None:
        """Free all memory that no worker has mapped."""
        self._bricks.close()
        self._protector.close()
        self._links.close()
        self._holdings.close()

    # -- versions -------------------------------------------------------------------------------------------------

    def inventory(self, epoch: int = 0) -> Json:
        if epoch > self._fence_epoch:
            self.fence(epoch)
        held = {rank: [_offered(held) for held in held_versions(arena)] for rank, arena in self._arenas.items()}
        former = [
            {"roster": roster, "rank": rank, **_offered(held)}
            for (roster, rank), arena in self._holdings.former.items()
            for held in held_versions(arena)
        ]
        return {
            "roster": self._holdings.roster,
            "held": held,
            "former": former,
            "parity": self._protector.parity_keys(),
            "report": to_json(self._protector.report()),
        }

    def verify(self, rank: int, version: int) -> list[str]:
        with self._reading(rank, version) as held:
            return [damage.name for damage in held.damage()]

    def forget_above(self, version: int) -> None:
        with self._lock:
            self._plans += 1
            for arena in self._holdings.arenas:
                for buffer in arena.buffers:
                    slot = buffer.describe()
                    if slot.version > version or slot.state is BufferState.FILLING:
                        buffer.release()
        self._protector.forget_above(version)

    def quarantine(self, rank: int, version: int) -> None:
        _release(self._arena(rank), version)

    # -- durable checkpoints --------------------------------------------------------------------------------------

    def persist(self, rank: int, version: int, uri: str, directory: str) -> Json:
        with self._reading(rank, version) as held:
            for damage in held.damage():
                raise damage
            manifest = held.buffer.manifest(held.slot)
            receipt = write_rank(
                open_storage(uri, self._throttle), directory, rank, data=[held.data.data], manifest=manifest
            )
            if not held.is_unchanged():
                raise SnapshotError(
                    f"version {version} of rank {rank} was replaced while it was written to {directory}"
                )
            return receipt

    def load(self, rank: int, uri: str, directory: str) -> int:
        plan = self._plans
        stored, data = read_rank(open_storage(uri), directory, rank)
        manifest = Manifest.from_bytes(stored)
        if manifest.rank != rank:
            raise ManifestMismatch(f"{directory} holds the state of rank {manifest.rank} under the name of rank {rank}")
        for damage in damaged_slices(data, manifest):
            raise damage
        with self._lock:
            if plan != self._plans:  # nobody waits for it any more, and a worker may be filling buffers
                raise SnapshotError(f"{directory} of rank {rank} comes too late: another epoch has begun since")
            self._adopt(self._arena(rank), manifest, stored, data)
        return manifest.version

    def _adopt(self, arena: Arena, manifest: Manifest, stored: bytes, data: bytes) -> None:
        """Everything is verified: only now other copies of the version may go."""
        self.quarantine(manifest.rank, manifest.version)
        arena.reserve(len(data) + len(stored))
        slots = arena.slots()
        index = choose_target(slots)
        if index is None:  # what is loaded will be the truth, so even the newest version in memory is history
            unpinned = [i for i, slot in enumerate(slots) if not slot.is_pinned]
            index = min(unpinned, key=lambda i: slots[i].version, default=None)
        if index is None or not arena.buffer(index).claim(manifest.version, manifest.epoch):
            raise SnapshotError(
                f"version {manifest.version} of rank {manifest.rank}: every buffer is being read; again"
            )
        buffer = arena.buffer(index)
        buffer.data[: len(data)] = np.frombuffer(data, dtype=np.uint8)
        buffer.publish(stored, digest(stored), data_bytes=len(data), state=BufferState.COMMITTED)

    # -- inside ---------------------------------------------------------------------------------------------------

    def _arena(self, rank: int) -> Arena:
        if rank not in self._arenas:
            raise InvariantViolation(
                f"rank {rank} is not admitted on node {self._node}, which has {list(self._arenas)}"
            )
        return self._arenas[rank]

    @contextmanager
    def _reading(self, rank: int, version: int) -> Iterator[Held]:
        """The version, pinned: its worker fills another buffer meanwhile."""
        held = find_version(self._arena(rank), version)
        self._pin(held, +1)
        try:
            if not held.is_unchanged():  # the worker took the buffer between the two lines above
                raise SnapshotError(f"version {version} of rank {rank} was replaced before it could be read")
            yield held
        finally:
            self._pin(held, -1)

    def _pin(self, held: Held, change: int) -> None:
        with self._lock:
            held.buffer.pin(change)


def _release(arena: Arena, version: int) -> None:
    for buffer in arena.buffers:
        if buffer.describe().version == version:
            buffer.release()


def _signal_all(pids: Sequence[int], number: signal.Signals) -> None:
    """This process comes last."""
    for pid in (*pids, os.getpid()):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _seen(arena: Arena, since: int) -> Json:
    reports, next_seq = arena.board.reports(since)
    slots = [slot for slot in arena.slots() if slot.is_complete]
    return {
        "beat": {**asdict(beat := arena.board.read()), "phase": int(beat.phase)},
        "reports": [asdict(report) for report in reports],
        "next_seq": next_seq,
        "versions": [
            {
                "version": slot.version,
                "epoch": slot.epoch,
                "state": slot.state.name,
                "kept": slot.is_kept,
                "bytes": slot.data_bytes + slot.manifest_bytes,
            }
            for slot in slots
        ],
    }


def _offered(held: Held) -> Json:
    return {
        "version": held.slot.version,
        "epoch": held.slot.epoch,
        "state": held.slot.state.name,
        "digest": held.slot.manifest_digest,
        "world": held.manifest.world,
        "bytes": held.slot.data_bytes + held.slot.manifest_bytes,
        "manifest_bytes": held.slot.manifest_bytes,
    }
