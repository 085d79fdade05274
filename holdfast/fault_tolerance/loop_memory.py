"""A loop's memory in its keeper: the connection, the room in it, and what becomes durable from there."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress

from holdfast.errors import ConfigurationError, SnapshotError, SnapshotMemory
from holdfast.fault_tolerance.arena import Arena
from holdfast.fault_tolerance.keeper_line import KeeperLine
from holdfast.fault_tolerance.loop_checkpoints import RANK
from holdfast.fault_tolerance.loop_keeper import Spec
from holdfast.fault_tolerance.snapshot import ArenaSnapshotter, required_bytes
from holdfast.fault_tolerance.versions import Held, copy_versions, find_version, held_versions
from holdfast.types import CopyReport, RankState, StateSlice

__all__ = ["LoopMemory"]

logger = logging.getLogger(__name__)

_SAVE_S = 3600.0
"""Patience with a storage that is asked to take a checkpoint."""
_ROOM = 1.25
"""Of what a state needs is reserved when it needs more than before."""
_GROWTH_BYTES = 1 << 14
"""By which what is no tensor may grow before its room is looked after."""


class LoopMemory:
    """Versions of one loop. A keeper that is killed is replaced, with what it held. Used by one thread.

    Raises: ConfigurationError when another process uses the keeper, or the state needs more memory than allowed.
    """

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._connect()
        self._slices: Sequence[StateSlice] | None = None
        self._scalars_bytes = 0
        self._saving = self.saved = -1
        """Versions: on its way to storage, and the newest that is durable."""
        self.held = -1
        """The newest version that is complete here."""

    def _connect(self) -> None:
        self._line = KeeperLine(self._spec)
        self._arena = Arena.attach(self._line.arena)
        self._snapshots = ArenaSnapshotter(self._arena, rank=RANK, world=1, epoch=self._line.epoch)

    @property
    def keeper_pid(self) -> int:
        return self._line.pid

    def versions(self) -> list[Held]:
        """What is complete, newest first; digests of data are not checked yet."""
        return held_versions(self._arena)

    def begin_at(self, step: int) -> None:
        """The loop goes on from this version, which is either here or in storage."""
        is_here = any(held.slot.version == step for held in self.versions())
        self.held, self.saved = (step, self.saved) if is_here else (-1, step)

    # -- a step ---------------------------------------------------------------------------------------------------

    def offer(self, state: RankState, step: int) -> None:
        """After :meth:`fence`: begin to copy. A step for which no buffer can be spared is passed over."""
        self._look_after_keeper()
        self._make_room(state)
        self._snapshots.offer(state, step)

    def fence(self) -> CopyReport:
        """Wait for the copy. A complete one counts."""
        report = self._snapshots.fence()
        if report.is_complete:
            self._snapshots.commit(report.version)
            self.held = report.version
        elif report.version >= 0:
            logger.warning("step %d is not in the keeper's memory: %s", report.version, report.why_not)
        return report

    def _look_after_keeper(self) -> None:
        if self._line.has_answer():
            self._settle()
        if self._line.is_alive:
            return
        logger.warning("the keeper, process %d, is gone; another one takes over what it held", self._line.pid)
        old, snapshots = self._arena, self._snapshots
        self._line.leave()
        self._connect()
        snapshots.close()
        with suppress(SnapshotMemory):  # less is free than there was; the next offer says it if it is too little
            copy_versions(old, self._arena)
        old.close()
        self._slices = None

    def _make_room(self, state: RankState) -> None:
        scalars_bytes = len(json.dumps(state.scalars))
        if state.slices is self._slices and scalars_bytes <= self._scalars_bytes + _GROWTH_BYTES:
            return
        need = required_bytes(state)
        if need + _GROWTH_BYTES > self._arena.board.capacity:
            self._grow(need)
        self._slices, self._scalars_bytes = state.slices, scalars_bytes

    def _grow(self, need_bytes: int) -> None:
        """The state is larger than before. What is held goes when it is durable, or the storage takes nothing."""
        if self.held >= 0:
            self.save_now(self.held)
        for buffer in self._arena.buffers:
            buffer.release()
        self.held = -1
        try:
            self._arena.reserve(int(need_bytes * _ROOM) if self._slices else need_bytes)
        except SnapshotMemory as error:
            raise ConfigurationError(
                f"snapshots of this loop need {error.need_bytes:,} bytes of host memory, {error.have_bytes:,} are "
                "allowed or there; raise memory_limit_gb, or use a larger host"
            ) from error

    # -- storage --------------------------------------------------------------------------------------------------

    def save(self, version: int) -> bool:
        """Let the keeper make a version durable, beside everything else. False if it is still busy with another one."""
        if self._line.has_answer():
            self._settle()
        if self._line.is_busy:
            return False
        with suppress(SnapshotError):  # it was replaced meanwhile: the keeper says so
            find_version(self._arena, version).buffer.keep()
        self._saving = version
        try:
            self._line.send("save", version)
        except SnapshotError as error:
            self._complain(error)
        return True

    def save_now(self, version: int) -> bool:
        """The same, waited for; whether it is durable."""
        if self._line.is_busy:
            self._settle()
        if self.saved < version and self.save(version) and self._line.is_busy:
            self._settle()
        return self.saved >= version

    def _settle(self) -> None:
        """Hear what became of the version that was to be saved. Raises nothing: it is no failure of the loop."""
        try:
            self._line.answer(_SAVE_S)
            self.saved = self._saving
        except SnapshotError as error:
            self._complain(error)
        for held in held_versions(self._arena):
            held.buffer.keep(False)
            if held.slot.version < self.held:
                held.buffer.release()

    def _complain(self, error: SnapshotError) -> None:
        logger.warning("step %d is not durable, the loop goes on: %s", self._saving, error)

    # -- the end --------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Make the newest version durable and free the memory. A keeper that alone has it stays for its lease."""
        self._look_after_keeper()
        is_safe = self.held < 0 or self.save_now(self.held)
        self._snapshots.close()
        if is_safe:
            self._line.end()
        else:
            logger.warning("the keeper, process %d, stays for %g s", self._line.pid, self._spec.lease_s)
            self._line.leave()
        self._arena.close()

    def leave(self) -> None:
        """Let go, and leave everything to whoever starts the loop again."""
        self._snapshots.close()
        self._line.leave()
        self._arena.close()
