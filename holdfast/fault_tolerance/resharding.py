"""Restores a version at any number of ranks and any ZeRO stage, whatever those that wrote it were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor

from holdfast.errors import ManifestMismatch, ShardCorrupt
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.capture import byte_view
from holdfast.fault_tolerance.coverage import Move, Source, cover
from holdfast.fault_tolerance.held_shards import HeldPart, HeldShards
from holdfast.fault_tolerance.manifest import Manifest, digest
from holdfast.fault_tolerance.shards import Shards, StorageShards, read_slice
from holdfast.fault_tolerance.storage import Storage
from holdfast.types import RankState, StateSlice

__all__ = ["HeldSnapshot", "Shards", "StorageShards", "StoredCheckpoint", "restore_resharded"]

_RANDOM = "rng/"
"""Names of random states begin so; they belong to a rank, not to the model: ``rng/rank0/cpu``."""


class StoredCheckpoint:
    """Reads durable checkpoints of any layout straight into the live state of this rank."""

    def __init__(self, storage: Storage, *, config_digest: str) -> None:
        self._storage, self._config_digest = storage, config_digest

    def restore_into(self, state: RankState, version: int) -> Mapping[str, object]:
        """See :func:`restore_resharded`."""
        shards = StorageShards(self._storage, checkpoint.directory(version))
        refuse_foreign(shards, self._config_digest)
        return restore_resharded(shards, state)


class HeldSnapshot:
    """Reads what the ranks of another membership hold in the keepers' memory straight into the live state of this
    rank."""

    def __init__(self, parts: Mapping[int, HeldPart], token: str, *, config_digest: str) -> None:
        self._parts, self._token, self._config_digest = parts, token, config_digest

    def restore_into(self, state: RankState, version: int) -> Mapping[str, object]:
        """See :func:`restore_resharded`."""
        with closing(HeldShards(self._parts, version, self._token)) as shards:
            refuse_foreign(shards, self._config_digest)
            return restore_resharded(shards, state)


def refuse_foreign(shards: Shards, config_digest: str) -> None:
    for manifest in shards.manifests.values():
        if manifest.config_digest != config_digest:
            raise ManifestMismatch(
                f"version {manifest.version} of rank {manifest.rank} was taken of {manifest.config_digest}, "
                f"this is {config_digest}: another model, data or optimizer"
            )


def restore_resharded(shards: Shards, state: RankState) -> Mapping[str, object]:
    """Write the rank's part of the stored state into ``state``; the scalars, which every rank has stored alike.

    Two passes: every stored slice that is needed is verified before the first byte of live state changes, then each is
    read again, a move at a time, and must be what was verified. So at most one stored slice is in memory.

    A rank keeps the random state that a rank of its number has stored. One without gets a generator seeded with the
    digest of its name, the version and all random states that were stored: the same whenever it is asked for, and
    another for each rank and version. Those of ranks that are no more go unused.

    Raises: ManifestMismatch when parts are missing, stored as something else, or scalars differ between the ranks;
    ShardCorrupt for damaged bytes, and for replicas that are not equal; whatever ``shards`` raises.
    """
    scalars = common_scalars(shards.manifests)
    new, kept = _split(state.slices, {e.spec.name for m in shards.manifests.values() for e in m.entries})
    moves = cover(shards.manifests, [s.spec for s in kept])
    verified = _verify(shards, moves)
    drawn = [_new_random_state(s.spec.name, shards.manifests) for s in new]
    for move in moves:
        _carry_out(shards, move, verified[move], kept[move.number])
    for live, random in zip(new, drawn, strict=True):
        live.tensor.copy_(random)
    return scalars


def _split(slices: Sequence[StateSlice], known: set[str]) -> tuple[list[StateSlice], list[StateSlice]]:
    """Random states that nobody has stored, and the rest."""
    new = [s for s in slices if s.spec.name.startswith(_RANDOM) and s.spec.name not in known]
    names = {s.spec.name for s in new}
    return new, [s for s in slices if s.spec.name not in names]


def common_scalars(manifests: Mapping[int, Manifest]) -> Mapping[str, object]:
    if not manifests:
        raise ManifestMismatch("no rank has stored anything")
    first = manifests[min(manifests)]
    for manifest in manifests.values():
        if (manifest.version, manifest.scalars) != (first.version, first.scalars):
            raise ManifestMismatch(
                f"ranks {first.rank} and {manifest.rank} have stored different states: version {first.version} with "
                f"{dict(first.scalars)} and version {manifest.version} with {dict(manifest.scalars)}"
            )
    return first.scalars


def _verify(shards: Shards, moves: Sequence[Move]) -> dict[Move, str]:
    """Read every stored slice once; the digest of what each move takes from it."""
    of_source: dict[Source, list[Move]] = {}
    for move in moves:
        of_source.setdefault(move.source, []).append(move)
    found = {}
    for source, some in of_source.items():
        data = memoryview(read_slice(shards, source))
        found.update({move: digest(data[slice(*move.stored)]) for move in some})
    return found


def _carry_out(shards: Shards, move: Move, want: str, live: StateSlice) -> None:
    entry, (start, stop) = move.source.entry, move.stored
    data = shards.read(move.source.rank, entry.offset + start, entry.offset + stop)
    have = digest(data)
    if have != want:  # it was right a moment ago, so what fails is the reading
        version = shards.manifests[move.source.rank].version
        raise ShardCorrupt(entry.spec.name, rank=move.source.rank, version=version, want=want, have=have)
    low, high = move.wanted(live.spec)
    byte_view(live.tensor)[low:high].copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def _new_random_state(name: str, manifests: Mapping[int, Manifest]) -> Tensor:
    stored = [e for m in manifests.values() for e in m.entries if e.spec.name.startswith(_RANDOM)]
    known = sorted(f"{entry.spec.name} {entry.digest}" for entry in stored)
    version = manifests[min(manifests)].version
    seed = int(digest("\n".join([name, str(version), *known]).encode())[:15], 16)
    return torch.Generator(name.rpartition("/")[2]).manual_seed(seed).get_state()
