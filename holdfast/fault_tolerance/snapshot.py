"""Snapshots of one rank's training state: into a keeper's arena, or into this process for tests and single use."""

from __future__ import annotations

import json
import logging
import mmap
import time
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from holdfast import failpoints
from holdfast.errors import Abort, InsufficientShards, InvariantViolation, ManifestMismatch
from holdfast.fault_tolerance.arena import Arena
from holdfast.fault_tolerance.buffer import Buffer, Bytes
from holdfast.fault_tolerance.capture import Pace, Plan, byte_view
from holdfast.fault_tolerance.copier import Copier, VersionCopy
from holdfast.fault_tolerance.manifest import Manifest, damaged_slices
from holdfast.fault_tolerance.rotation import choose_target, newest_committed, superseded
from holdfast.fault_tolerance.staging import Control, Fence
from holdfast.fault_tolerance.versions import copy_versions, find_version
from holdfast.types import CopyReport, RankState

__all__ = ["ArenaSnapshotter", "MemorySnapshotter", "RankSnapshotter", "copy_versions", "required_bytes"]

logger = logging.getLogger(__name__)


class RankSnapshotter(Protocol):
    """Called in the training thread of one rank. Versions grow.

    ``has_room`` says whether a version could be taken, and keeps the room for the next offer; ranks that skip versions
    should skip the same ones. ``offer`` begins to capture the state and returns at once; False means that no buffer
    could be spared and the version was skipped, which is no error. The live tensors may change only after ``fence``,
    which waits for the copy and reports what became of the version. ``commit`` is called when all ranks hold the
    version; older ones may go then. ``restore_into`` verifies every digest before it writes the first byte of live
    state, and returns the scalars; later versions are gone then. ``close`` ends what runs; afterwards the live tensors
    may go.

    Raises: Abort once the rank's epoch is over; InsufficientShards, ShardCorrupt and ManifestMismatch from
    ``restore_into``.
    """

    def has_room(self, version: int) -> bool: ...

    def offer(self, state: RankState, version: int) -> bool: ...

    def fence(self) -> CopyReport: ...

    def commit(self, version: int) -> None: ...

    @property
    def newest_committed(self) -> int: ...

    def restore_into(self, state: RankState, version: int) -> Mapping[str, object]: ...

    def close(self) -> None: ...


def required_bytes(state: RankState) -> int:
    """Bytes that one buffer needs for snapshots of this state, manifest included, in whole pages."""
    plan, about = Plan(state.slices), Manifest(0, 0, 0, 0, state.scalars, ())
    manifest = plan.manifests.to_bytes(about, ["0" * 32] * len(state.slices))
    return -(-(plan.data_bytes + len(manifest)) // mmap.PAGESIZE) * mmap.PAGESIZE


_LOOK_S = 0.05
"""Between two looks at the epoch while a copy is waited for."""
_LAST_COPY_S = 5.0
"""Patience with a copy that runs while its rank leaves the epoch."""


class ArenaSnapshotter:
    """See :class:`RankSnapshotter`. Copies into memory that outlives this process; one object per membership epoch.

    A thread of its own copies while the next step is computed, at low priority and at most ``max_bytes_per_s`` (0: as
    fast as it goes); once the training thread waits at the fence, only speed counts. A version becomes FILLED when
    its data and its manifest are in place and only while the epoch lasts. A copy that is not over ``fence_timeout_s``
    after the fence began is given up. With ``persist_every`` every such version, once committed, keeps its buffer
    until it is a durable checkpoint, a later one is due, or the buffer is needed.

    Source: DataStates-LLM, arXiv 2406.10707, section 4.
    """

    def __init__(
        self,
        arena: Arena,
        *,
        rank: int,
        world: int,
        epoch: int,
        config_digest: str = "",
        persist_every: int = 0,
        max_bytes_per_s: float = 0.0,
        fence_timeout_s: float = 60.0,
    ) -> None:
        self._arena, self._rank, self._world, self._epoch = arena, rank, world, epoch
        self._config_digest, self._persist_every = config_digest, persist_every
        self._max_bytes_per_s, self._fence_timeout_s = max_bytes_per_s, fence_timeout_s
        self._fence = Fence(arena.board.fence_word, epoch)
        self._plan = Plan(())
        self._copier = Copier(f"snapshot-rank{rank}")
        self._copy: VersionCopy | None = None
        """The one that was begun last, until it is over and somebody has waited for it."""
        self._room: Buffer | None = None
        """Claimed for the next offer."""
        self._no_room_for = -1
        self._is_open = False
        """A version was offered, and nobody has waited at the fence since."""
        self.skipped = 0
        """Versions for which no buffer could be spared when this was asked first."""
        self.failed = 0
        """Versions that were begun and did not become complete."""

    def has_room(self, version: int) -> bool:
        self._check_fence()
        is_stuck = self._copy is not None and not self._copy.is_over  # given up at the fence, and still not gone
        if self._room is not None and not self._room.claim(version, self._epoch):
            self._room = None  # the keeper reads it, which is garbage: see to another one
        if self._room is None and not is_stuck:
            self._room = self._claim(version)
        if self._room is not None and not is_stuck:
            return True
        if version != self._no_room_for:
            self._no_room_for = version
            self.skipped += 1
            why = "the last copy is stuck" if is_stuck else "every buffer is still needed"
            logger.warning("no room for version %d: %s", version, why)
        return False

    def offer(self, state: RankState, version: int) -> bool:
        failpoints.hit("snapshot.before_capture", version)
        self._check_fence()
        self._make_plan(state)
        scalars = json.loads(json.dumps(dict(state.scalars)))  # by value
        if not self.has_room(version) or self._room is None:
            return False
        buffer, self._room = self._room, None
        manifest = Manifest(version, self._epoch, self._rank, self._world, scalars, (), self._config_digest)
        pace = Pace(Control(), self._fence, self._max_bytes_per_s, low_priority=True)
        self._copy, self._is_open = VersionCopy(self._plan, buffer, manifest, pace), True
        self._copier.submit(self._copy.run)
        return True

    def fence(self) -> CopyReport:
        self._check_fence()
        copy, is_open, self._is_open = self._copy, self._is_open, False
        if copy is None or not is_open:
            return CopyReport()
        waited_s = self._wait_for(copy)
        self._check_fence()
        if not copy.is_complete:
            self.failed += 1
        if copy.is_over:
            self._copy = None
        return CopyReport(copy.version, copy.is_complete, waited_s, copy.copy_s, copy.why_not)

    def _wait_for(self, copy: VersionCopy) -> float:
        started_s = time.perf_counter()
        while not copy.wait(_LOOK_S):
            self._check_fence()
            if time.perf_counter() - started_s > self._fence_timeout_s:
                copy.give_up(f"not copied within {self._fence_timeout_s:g} s")
                logger.warning("version %d is given up: %s", copy.version, copy.why_not)
                break
        return time.perf_counter() - started_s

    def close(self) -> None:
        """A copy that runs may end first: what survivors of a fault still hold live may be the newest state."""
        copy = self._copy
        if copy is not None and not copy.wait(_LAST_COPY_S):
            copy.give_up("its rank has left the epoch")
            copy.wait(_LAST_COPY_S)
        self._copier.close()
        self._copy = None

    def commit(self, version: int) -> None:
        self._check_fence()
        buffer = self._find(version)
        if self._arena.board.is_protected:
            return  # the keepers see it themselves, and flip it when there is parity too
        buffer.commit()
        if self._persist_every and version and version % self._persist_every == 0:
            self._keep(version)
        for index in superseded(self._arena.slots(), version):
            self._arena.buffer(index).release()
        self._arena.board.note_committed(version)

    @property
    def newest_committed(self) -> int:
        """The newest version that counts as complete everywhere, data and parity; -1 if there is none."""
        return newest_committed(self._arena.slots())

    def restore_into(self, state: RankState, version: int) -> Mapping[str, object]:
        self._check_fence()
        held = find_version(self._arena, version)
        self._refuse_foreign(held.manifest)
        _restore(held.data, held.manifest, state)
        for index, slot in enumerate(self._arena.slots()):
            if slot.is_complete and slot.version > version:  # a future that never comes
                self._arena.buffer(index).release()
        # Everybody starts from here. The version before stays, as another rank may find its copy damaged; where keepers
        # protect versions, until they have encoded this one.
        if not self._arena.board.is_protected:
            held.buffer.commit()
        self._arena.board.note_committed(version)
        return held.manifest.scalars

    # -- offer ----------------------------------------------------------------------------------------------------

    def _make_plan(self, state: RankState) -> None:
        if not self._plan.fits(state):
            self._plan = Plan(state.slices)
        if self._plan.data_bytes > self._arena.board.capacity:
            raise InvariantViolation(
                f"the state of rank {self._rank} has {self._plan.data_bytes:,} bytes, its buffers have "
                f"{self._arena.board.capacity:,}; reserve(required_bytes(state)) comes before the first offer"
            )

    def _claim(self, version: int) -> Buffer | None:
        """A buffer that is FILLING from now on; None if every one is needed."""
        self._drop_stale(version)
        for _ in self._arena.buffers:
            index = choose_target(self._arena.slots())
            if index is None:
                return None
            buffer = self._arena.buffer(index)
            if buffer.claim(version, self._epoch):  # otherwise the keeper was faster; it is pinned now
                return buffer
        return None

    def _drop_stale(self, version: int) -> None:
        """A writer that did not know yet that its epoch was over may have published a future that never came."""
        for index, slot in enumerate(self._arena.slots()):
            if slot.is_complete and slot.version >= version:
                if slot.epoch == self._epoch:
                    raise InvariantViolation(f"version {version} is offered after {slot.version}; versions grow")
                self._arena.buffer(index).release()

    # -- commit and restore ---------------------------------------------------------------------------------------

    def _find(self, version: int) -> Buffer:
        slots = list(enumerate(self._arena.slots()))
        copies = [(slot.epoch, index) for index, slot in slots if slot.is_complete and slot.version == version]
        if not copies:
            have = sorted(slot.version for _, slot in slots if slot.is_complete)
            raise InvariantViolation(f"rank {self._rank} is to commit version {version} but holds {have}")
        return self._arena.buffer(max(copies)[1])

    def _keep(self, version: int) -> None:
        """Mark ``version`` for a durable checkpoint instead of the last one. While the keeper still reads, wait for
        the next turn: ranks with a slow keeper and ranks with a fast one agree again then."""
        if not any(slot.is_pinned for slot in self._arena.slots()):
            for buffer in self._arena.buffers:
                buffer.keep(False)
            self._find(version).keep()

    def _refuse_foreign(self, manifest: Manifest) -> None:
        mine = {"rank": self._rank, "world": self._world, "config_digest": self._config_digest}
        stored = {"rank": manifest.rank, "world": manifest.world, "config_digest": manifest.config_digest}
        if mine != stored:
            raise ManifestMismatch(f"version {manifest.version} was taken of {stored}, this is {mine}")

    def _check_fence(self) -> None:
        if self._fence.is_closed:
            raise Abort(
                f"epoch {self._epoch} of rank {self._rank} is over, epoch {self._arena.board.fence_epoch} began"
            )


class MemorySnapshotter:
    """See :class:`RankSnapshotter`. Keeps versions in this process, which therefore must live; never skips one."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[Bytes, bytes]] = {}
        self._offered = -1
        self.newest_committed = -1

    def has_room(self, version: int) -> bool:
        """As long as there is memory."""
        return True

    @property
    def versions(self) -> list[int]:
        """What could be restored, oldest first."""
        return sorted(self._held)

    def offer(self, state: RankState, version: int) -> bool:
        if version in self._held or version < max(self._held, default=-1):
            raise InvariantViolation(f"version {version} is offered after {max(self._held)}; versions grow")
        plan = Plan(state.slices)
        data = np.zeros(plan.data_bytes, dtype=np.uint8)
        manifest = Manifest(version, 0, 0, 1, json.loads(json.dumps(dict(state.scalars))), ())
        digests = plan.capture(data, Pace(), version=version)
        self._held[version] = data, plan.manifests.to_bytes(manifest, digests or ())
        self._offered = version
        return True

    def fence(self) -> CopyReport:
        version, self._offered = self._offered, -1
        return CopyReport(version, version >= 0)

    def commit(self, version: int) -> None:
        if version not in self._held:
            raise InvariantViolation(f"version {version} is to be committed but only {self.versions} are held")
        self._held = {held: copy for held, copy in self._held.items() if held >= version}
        self.newest_committed = version

    def restore_into(self, state: RankState, version: int) -> Mapping[str, object]:
        if version not in self._held:
            raise InsufficientShards([0], f"version {version} is wanted, {self.versions or 'none'} held")
        data, stored = self._held[version]
        manifest = Manifest.from_bytes(stored)
        _restore(data, manifest, state)
        self.newest_committed = version
        return manifest.scalars

    def close(self) -> None:
        """Nothing runs."""


def _restore(data: Bytes, manifest: Manifest, state: RankState) -> None:
    """Write every slice back, or raise before the first byte of ``state`` has changed."""
    live, stored = {s.spec.name: s for s in state.slices}, {e.spec.name: e for e in manifest.entries}
    difference = _first_difference({n: s.spec for n, s in live.items()}, {n: e.spec for n, e in stored.items()})
    if difference:
        raise ManifestMismatch(f"version {manifest.version} of rank {manifest.rank} does not fit: {difference}")
    for damage in damaged_slices(data, manifest):
        raise damage
    for name, entry in stored.items():
        target = byte_view(live[name].tensor)
        target.copy_(torch.from_numpy(data[entry.offset : entry.offset + entry.length]))


def _first_difference(live: Mapping[str, object], stored: Mapping[str, object]) -> str:
    for name in [*stored, *(n for n in live if n not in stored)]:
        if name not in live:
            return f"it holds slice {name!r}, which the running model does not have"
        if name not in stored:
            return f"the running model has slice {name!r}, which it does not hold"
        if live[name] != stored[name]:
            return f"slice {name!r} is {stored[name]} there and {live[name]} here"
    return ""
