"""The complete versions in an arena: found, believed only after a check, carried to another arena."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from holdfast.errors import InsufficientShards, ManifestMismatch, ShardCorrupt
from holdfast.fault_tolerance.arena import Arena
from holdfast.fault_tolerance.buffer import Buffer, BufferState, Bytes, Slot
from holdfast.fault_tolerance.manifest import Manifest, damaged_slices, digest
from holdfast.fault_tolerance.rotation import choose_target

__all__ = ["Held", "copy_versions", "find_version", "held_versions"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Held:
    """A complete version whose manifest is intact. Its data may still be damaged: see :meth:`damage`."""

    buffer: Buffer
    slot: Slot
    manifest: Manifest

    @property
    def data(self) -> Bytes:
        return self.buffer.data[: self.slot.data_bytes]

    def damage(self) -> Iterator[ShardCorrupt]:
        """Every slice whose bytes do not match their digest."""
        return damaged_slices(self.data, self.manifest)

    def is_unchanged(self) -> bool:
        """The buffer still has the bytes it had when it was found, whether or not they are still offered."""
        now = self.buffer.describe()
        return now.state is not BufferState.FILLING and now.identity == self.slot.identity


def held_versions(arena: Arena) -> list[Held]:
    """All complete versions with an intact manifest, newest first. Its writer may be at work meanwhile."""
    found = [held for buffer in arena.buffers if (held := _read(buffer)) is not None]
    return sorted(found, key=lambda held: (held.slot.version, held.slot.epoch), reverse=True)


def find_version(arena: Arena, version: int) -> Held:
    """The copy of ``version`` that the latest epoch wrote. Raises: InsufficientShards."""
    versions = held_versions(arena)
    found = next((held for held in versions if held.slot.version == version), None)
    if found is None:
        rank, have = arena.board.rank, [held.slot.version for held in versions]
        raise InsufficientShards([rank], f"version {version} is wanted, its keeper holds {have or 'none'}")
    return found


def copy_versions(old: Arena, new: Arena) -> list[int]:
    """Worker. Carry everything worth keeping from an arena whose keeper has died into its successor's; the versions
    carried. May be repeated. Damaged versions stay behind.

    Raises: SnapshotMemory when the new keeper may use less memory than the old one.
    """
    new.board.carry_over(old.board)
    carried = [held for held in held_versions(old) if _is_worth_carrying(held, held_versions(new))]
    if carried:
        new.reserve(max(held.slot.data_bytes + held.slot.manifest_bytes for held in carried))
    return [held.slot.version for held in carried if _carry(held, new)]


def _read(buffer: Buffer) -> Held | None:
    slot = buffer.describe()
    if not slot.is_complete:
        return None
    stored = buffer.manifest(slot)
    if digest(stored) != slot.manifest_digest:
        return None
    try:
        manifest = Manifest.from_bytes(stored)
    except ManifestMismatch as error:
        logger.warning("version %d is not offered: %s", slot.version, error)
        return None
    held = Held(buffer, slot, manifest)
    is_described = (manifest.version, manifest.epoch) == (slot.version, slot.epoch)
    return held if is_described and held.is_unchanged() else None


def _is_worth_carrying(held: Held, present: Sequence[Held]) -> bool:
    if any(other.slot.identity == held.slot.identity for other in present):
        return False
    damage = next(held.damage(), None)
    if damage is not None:
        logger.warning("version %d is not carried over: %s", held.slot.version, damage)
    return damage is None


def _carry(held: Held, new: Arena) -> bool:
    index, slot = choose_target(new.slots()), held.slot
    if index is None or not new.buffer(index).claim(slot.version, slot.epoch):
        return False
    target = new.buffer(index)
    target.data[: slot.data_bytes] = held.data
    target.publish(held.buffer.manifest(slot), slot.manifest_digest, data_bytes=slot.data_bytes, state=slot.state)
    target.keep(slot.is_kept)
    return True
