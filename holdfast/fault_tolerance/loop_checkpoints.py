"""The durable checkpoints of somebody else's loop: the files of :mod:`~holdfast.fault_tolerance.checkpoint`, one rank.

Without torch, because the keeper writes them.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

from holdfast.errors import ManifestMismatch, ShardCorrupt, SnapshotError
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.buffer import Bytes
from holdfast.fault_tolerance.keeper import Keeper
from holdfast.fault_tolerance.manifest import Manifest, damaged_slices
from holdfast.fault_tolerance.storage import Storage

__all__ = ["LAYOUT", "RANK", "identify", "read", "save", "stored_steps"]

logger = logging.getLogger(__name__)

RANK = 0
LAYOUT = "a loop of one process"
_IDENTITY = "keeper.id"


def identify(storage: Storage, *, make: bool = True) -> str:
    """What tells this place from one that had the same name and was deleted; empty if it has nothing of the kind.

    Raises: SnapshotError when it cannot be read, or written where ``make`` says so.
    """
    if storage.exists(_IDENTITY):
        return storage.read(_IDENTITY).decode(errors="replace").strip()
    if not make:
        return ""
    storage.write(_IDENTITY, [f"{uuid.uuid4().hex}\n".encode()])
    return storage.read(_IDENTITY).decode(errors="replace").strip()


def save(keeper: Keeper, storage: Storage, uri: str, version: int, keep_last: int) -> None:
    """Keeper. Make a version durable, its record last, and let old checkpoints go. Raises: SnapshotError."""
    folder = checkpoint.directory(version)
    if not storage.exists(f"{folder}/{checkpoint.COMMIT_FILE}"):
        receipt = keeper.persist(RANK, version, uri, folder)
        checkpoint.commit(storage, version, receipts={RANK: receipt}, config_digest="", layout=LAYOUT)
    checkpoint.retain(storage, keep_last)


def stored_steps(storage: Storage) -> Iterator[int]:
    """Steps of complete checkpoints, newest first. Those that lack a file are passed over with a warning."""
    good, rejected = checkpoint.list_checkpoints(storage)
    for found in rejected:
        logger.warning("%s is not used: %s", found.name, found.reason)
    yield from (found.step for found in good)


def read(storage: Storage, step: int) -> tuple[Manifest, Bytes]:
    """A checkpoint with every digest verified. One that is damaged is renamed, so that it never is looked at again.

    Raises: SnapshotError.
    """
    try:
        return _verified(storage, step)
    except ShardCorrupt as error:
        with suppress(SnapshotError):  # it is passed over, whatever its name
            checkpoint.quarantine(storage, step, str(error))
        raise


def _verified(storage: Storage, step: int) -> tuple[Manifest, Bytes]:
    stored, content = checkpoint.read_rank(storage, checkpoint.directory(step), RANK)
    manifest, data = Manifest.from_bytes(stored), np.frombuffer(content, dtype=np.uint8)
    if checkpoint.read_commit(storage, step).layout != LAYOUT:
        raise ManifestMismatch(
            f"{checkpoint.directory(step)} belongs to a run of holdfast train, not to a Snapshotter; use another place"
        )
    for damage in damaged_slices(data, manifest):
        raise damage
    return manifest, data
