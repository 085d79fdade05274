"""What snapshots and checkpoints must obey; who protects whom is in :mod:`holdfast.configs.protection`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError, SnapshotError
from holdfast.fault_tolerance.storage import open_storage
from holdfast.fault_tolerance.storage_uri import below, parse_uri

__all__ = ["snapshot_problems", "unusable_storage"]


def snapshot_problems(config: RunConfig) -> Iterator[str]:
    every, persist = config.snapshot.every_steps, config.snapshot.persist_every_steps
    if every >= 1 and persist > 0 and persist % every:
        yield (
            f"snapshot.persist_every_steps={persist} must be a multiple of snapshot.every_steps={every}, because "
            f"checkpoints are written from snapshots; try snapshot.persist_every_steps={-(-persist // every) * every}"
        )

    if config.snapshot.storage:
        try:
            parse_uri(config.snapshot.storage)
        except ConfigurationError as error:
            yield from (f"snapshot.{problem}" for problem in error.problems)


def unusable_storage(config: RunConfig) -> list[str]:
    """Whether an object can be written there and taken away, tried only when nothing else is wrong."""
    if not config.snapshot.storage:
        return []
    test = f"holdfast-write-test-{uuid.uuid4().hex[:8]}"
    try:
        storage = open_storage(below(config.snapshot.storage, config.project))
        storage.write(test, [b"holdfast"])
        storage.delete(test)
    except SnapshotError as error:
        return [f"snapshot.storage={config.snapshot.storage!r} cannot be used: {error}"]
    return []
