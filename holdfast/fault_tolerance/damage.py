"""Bits that flip and files that end too early: damage to stored state on purpose, as disks and memory do it."""

from __future__ import annotations

import logging

import numpy as np

from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.arena import Arena
from holdfast.fault_tolerance.buffer import Bytes
from holdfast.fault_tolerance.chaos import Action, ChaosFault, draw
from holdfast.fault_tolerance.storage import Storage

__all__ = ["damage_checkpoint", "flip_bit", "flip_snapshot"]

logger = logging.getLogger(__name__)


def flip_bit(data: Bytes, fault: ChaosFault) -> None:
    """Turn one bit of ``data``, uint8, in place: the one that the entry names, else one that its seed chooses."""
    bits = data.size * 8
    if not bits:
        logger.warning("chaos: %s finds nothing to flip", fault)
        return
    bit = (draw(fault.seed, fault.number, fault.step) if fault.bit is None else fault.bit) % bits
    data[bit // 8] ^= np.uint8(1 << bit % 8)
    logger.warning("chaos: bit %d of %d has flipped", bit, bits)


def flip_snapshot(arena: Arena, fault: ChaosFault) -> None:
    """In the newest complete version of a rank's memory: a bit of its data or of its manifest."""
    slots = [(slot.version, slot.epoch, index) for index, slot in enumerate(arena.slots()) if slot.is_complete]
    if not slots:
        logger.warning("chaos: %s finds no complete version", fault)
        return
    buffer = arena.buffer(max(slots)[2])
    slot = buffer.describe()
    start, length = (slot.manifest_at, slot.manifest_bytes) if fault.what == "manifest" else (0, slot.data_bytes)
    logger.warning("chaos: version %d of rank %d is damaged", slot.version, arena.board.rank)
    flip_bit(buffer.data[start : start + length], fault)


def damage_checkpoint(storage: Storage, fault: ChaosFault) -> str | None:
    """Flip a bit of a file of the newest good checkpoint, or cut the file in half; its path, or None while there is no
    checkpoint. Raises: SnapshotError."""
    good, _ = checkpoint.list_checkpoints(storage)
    if not good:
        return None
    names = {"record": checkpoint.COMMIT_FILE, "manifest": checkpoint.manifest_file(fault.number)}
    path = f"{checkpoint.directory(good[0].step)}/{names.get(fault.what, checkpoint.data_file(fault.number))}"
    content = np.frombuffer(storage.read(path), dtype=np.uint8).copy()
    if fault.action is Action.TRUNCATE_FILE:
        content = content[: content.size // 2]
    else:
        flip_bit(content, fault)
    storage.write(path, [content])
    return path
