"""What ranks of another membership have left in the keepers' memory, readable by whoever has to continue from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from holdfast.errors import ManifestMismatch, ShardCorrupt
from holdfast.fault_tolerance.manifest import Manifest, digest
from holdfast.fault_tolerance.peers import PeerClient

__all__ = ["HeldPart", "HeldShards"]

_PIECE_BYTES, _PIECE_S = 64 << 20, 30.0
"""What is asked for at once, and how long it may take."""


@dataclass(frozen=True, slots=True)
class HeldPart:
    """One rank's snapshot, and whom to ask for it; JSON-able."""

    address: str
    """Of the keeper, see ``Keeper.address``."""
    digest: str
    """Of the manifest, which names the snapshot among all others."""
    data_bytes: int
    manifest_bytes: int

    @classmethod
    def from_json(cls, parts: Mapping[str, Mapping[str, Any]]) -> dict[int, HeldPart]:
        """Parts by rank, from a mapping whose integer keys may have become strings."""
        return {int(rank): cls(**part) for rank, part in parts.items()}


class HeldShards:
    """See :class:`holdfast.fault_tolerance.shards.Shards`: over the channel between keepers, from the memory of each
    that holds a part. To be closed.

    Raises: PeerError when a keeper does not answer or has lost the snapshot; ShardCorrupt for a damaged manifest;
    ManifestMismatch for one of another rank or version.
    """

    def __init__(self, parts: Mapping[int, HeldPart], version: int, token: str) -> None:
        self._parts = parts
        self._clients = {address: PeerClient(address, token) for address in {part.address for part in parts.values()}}
        try:
            self.manifests = {rank: self._manifest(rank, version) for rank in sorted(parts)}
        except BaseException:
            self.close()
            raise

    def read(self, rank: int, start: int, stop: int) -> bytearray:
        part, out = self._parts[rank], bytearray(stop - start)
        for at in range(0, len(out), _PIECE_BYTES):
            piece = memoryview(out)[at : at + _PIECE_BYTES]
            place = {"start": start + at, "stop": start + at + len(piece)}
            request = {"what": "data", "rank": rank, "digest": part.digest, **place}
            self._clients[part.address].request("fetch", request, into=piece, deadline_s=_PIECE_S)
        return out

    def close(self) -> None:
        """Nothing is read any more."""
        for client in self._clients.values():
            client.close()

    def _manifest(self, rank: int, version: int) -> Manifest:
        part = self._parts[rank]
        stored = bytes(self.read(rank, part.data_bytes, part.data_bytes + part.manifest_bytes))
        have = digest(stored)
        if have != part.digest:
            raise ShardCorrupt("manifest", rank=rank, version=version, want=part.digest, have=have)
        manifest = Manifest.from_bytes(stored)
        if (manifest.version, manifest.rank) != (version, rank):
            raise ManifestMismatch(
                f"version {manifest.version} of rank {manifest.rank} is offered as version {version} of rank {rank}"
            )
        return manifest
