"""The ranks' parts of one checkpoint, readable byte range by byte range, whoever wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from holdfast.errors import ManifestMismatch, ShardCorrupt
from holdfast.fault_tolerance.checkpoint import Checkpoint, data_file, directory, read_commit, read_manifest, step_of
from holdfast.fault_tolerance.coverage import Source
from holdfast.fault_tolerance.manifest import Manifest, digest
from holdfast.fault_tolerance.storage import Storage

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Shards", "StorageShards", "manifest_of", "read_slice"]


class Shards(Protocol):
    """What every rank of one version has written, by rank of the writer."""

    @property
    def manifests(self) -> Mapping[int, Manifest]: ...

    def read(self, rank: int, start: int, stop: int) -> Buffer:
        """Bytes ``start`` up to, not including, ``stop`` of a rank's data; nothing has been verified."""
        ...


class StorageShards:
    """Those of a committed checkpoint.

    Raises: SnapshotError when a file is missing, ManifestMismatch for a record or a manifest that cannot be used,
    ShardCorrupt for a damaged manifest.
    """

    def __init__(self, storage: Storage, folder: str) -> None:
        self._storage, self._folder = storage, folder
        step = step_of(folder)
        if step is None:
            raise ManifestMismatch(f"{folder!r} is no directory of a checkpoint")
        found = read_commit(storage, step)
        self.manifests = {rank: manifest_of(storage, found, rank) for rank in found.ranks}

    def read(self, rank: int, start: int, stop: int) -> bytes:
        return self._storage.read_range(f"{self._folder}/{data_file(rank)}", start, stop)


def manifest_of(storage: Storage, found: Checkpoint, rank: int) -> Manifest:
    """What a rank of a committed checkpoint has stored. Raises: as :class:`StorageShards`."""
    manifest = Manifest.from_bytes(read_manifest(storage, found, rank))
    if (manifest.version, manifest.rank) != (found.step, rank):
        raise ManifestMismatch(
            f"{directory(found.step)} holds version {manifest.version} of rank {manifest.rank} "
            f"under the name of version {found.step} of rank {rank}"
        )
    return manifest


def read_slice(shards: Shards, source: Source) -> Buffer:
    """All bytes of a stored slice. Raises: ShardCorrupt when they do not match their digest."""
    entry = source.entry
    data = shards.read(source.rank, entry.offset, entry.offset + entry.length)
    have = digest(data)
    if have != entry.digest:
        version = shards.manifests[source.rank].version
        raise ShardCorrupt(entry.spec.name, rank=source.rank, version=version, want=entry.digest, have=have)
    return data
