"""Puts a lost pipeline stage together from what the keepers hold of the others, and tells all ranks that it is new.

Only master weights are read, and moments where these are averaged too. What is not in blocks, the embedding and the
head, is copied from the stage that holds it as well, with its moments: to the bit what was lost.

Source: CheckFree and CheckFree+, arXiv 2506.15461, sections 4.2 and 4.3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError, Fault, ManifestMismatch, SnapshotError
from holdfast.fault_tolerance.capture import byte_view
from holdfast.fault_tolerance.coverage import Source
from holdfast.fault_tolerance.held_shards import HeldPart, HeldShards
from holdfast.fault_tolerance.manifest import Entry
from holdfast.fault_tolerance.resharding import common_scalars, refuse_foreign
from holdfast.fault_tolerance.shards import Shards, read_slice
from holdfast.fault_tolerance.stage_policy import MomentRepair, Repair, StageRepair
from holdfast.fault_tolerance.stage_repair import Weighting, average, previous_share, rebuild
from holdfast.types import RankState, StateSlice

__all__ = ["REBUILT", "Remade", "StageSnapshot", "rebuild_stage"]

REBUILT = "rebuilt"
"""Key of an owner's scalars: by stage, as 2/4 for the third of four, ``times`` it was rebuilt, the step it was rebuilt
``at`` last, and ``steps``, how many of the optimizer's its moments do not know of."""

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_RANDOM, _MASTER = "rng/", "master"


class Restorer(Protocol):
    def restore_into(self, state: RankState, version: int) -> Mapping[str, object]: ...


@dataclass(frozen=True, slots=True)
class Remade:
    """A restorer's state, and in its scalars, the same on every rank, which stages are not what they were."""

    source: Restorer
    repairs: Sequence[StageRepair]
    stages: int
    moments: MomentRepair

    def restore_into(self, state: RankState, version: int) -> Mapping[str, object]:
        scalars = self.source.restore_into(state, version)
        owner = dict(cast(Mapping[str, object], scalars["owner"]))
        known = dict(cast(Mapping[str, Mapping[str, int]], owner.get(REBUILT, {})))
        step = cast(int, scalars["step"])
        for repair in self.repairs:
            name = f"{repair.stage}/{self.stages}"
            before = known.get(name, {"times": 0, "steps": 0})
            steps = before["steps"] if _keeps_moments(repair, self.moments) else step
            known[name] = {"times": before["times"] + 1, "at": step, "steps": steps}
        return {**scalars, "owner": {**owner, REBUILT: known}}


@dataclass(frozen=True, slots=True)
class StageSnapshot:
    """Reads other stages from the keepers' memory and writes the lost one into the live state of this rank."""

    parts: Mapping[int, HeldPart]
    token: str
    config_digest: str
    repair: StageRepair
    weighting: Weighting
    moments: MomentRepair
    outputs: Sequence[str]
    """Ends of the names of matrices that write to the residual stream: IDENTITY zeroes them."""
    note: Callable[[dict[str, object]], None]

    def restore_into(self, state: RankState, version: int) -> Mapping[str, object]:
        """See :func:`rebuild_stage`. Raises: SnapshotError when a source is damaged, gone or not finite."""
        with closing(HeldShards(self.parts, version, self.token)) as shards:
            refuse_foreign(shards, self.config_digest)
            try:
                scalars, share, size = rebuild_stage(
                    shards, state, self.repair, self.weighting, self.moments, self.outputs
                )
            except Fault as error:
                if isinstance(error, SnapshotError):
                    raise
                raise SnapshotError(str(error)) from error
        about = {"stage": self.repair.stage, "version": version, "repair": self.repair.repair.value}
        self.note(
            {"event": "stage_rebuilt", **about, "sources": list(self.repair.sources), "share": share, "bytes": size}
        )
        return scalars


def rebuild_stage(
    shards: Shards,
    state: RankState,
    repair: StageRepair,
    weighting: Weighting,
    moments: MomentRepair,
    outputs: Sequence[str] = (),
) -> tuple[Mapping[str, object], float, int]:
    """Write the lost stage into ``state``, which is that of a fresh engine; nothing of it is written before all that is
    needed has been read and verified. The scalars, which every rank has stored alike, the first source's share in the
    average, and the bytes that were read.

    Raises: ManifestMismatch when a part has another shape, or nobody holds it; ShardCorrupt for damaged bytes; Fault
    when the result is not finite.
    """
    scalars = common_scalars(shards.manifests)
    reader = _Reader(shards)
    owner = cast(Mapping[str, Any], scalars["owner"])
    share = _share(repair, owner.get("stage_norms", ()), weighting)
    made = {**_weights(reader, state, repair, share, outputs), **_moments(reader, state, repair, share, moments)}
    made.update(_copies(reader, state, repair))
    for piece in state.slices:
        if piece.spec.name in made:
            byte_view(piece.tensor).copy_(byte_view(made[piece.spec.name].contiguous().view(-1)))
    return scalars, share, reader.bytes_read


class _Reader:
    """Stored slices of other stages, verified, by name; and how many bytes that took."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self.bytes_read = 0
        self._entries = {rank: {e.spec.name: e for e in m.entries} for rank, m in shards.manifests.items()}

    def names(self, rank: int) -> Sequence[str]:
        return list(self._entries[rank])

    def holder(self, name: str) -> int | None:
        """A rank that has a slice of this name."""
        return next((rank for rank, entries in self._entries.items() if name in entries), None)

    def read(self, rank: int, name: str) -> Tensor:
        """The stored elements, in the dtype they were stored in, flat."""
        entry: Entry = self._entries[rank][name]
        self.bytes_read += entry.length
        data = bytearray(memoryview(read_slice(self._shards, Source(rank, entry))))
        return torch.frombuffer(data, dtype=getattr(torch, entry.spec.dtype))


def _share(repair: StageRepair, norms: Sequence[float], weighting: Weighting) -> float:
    """Plain averages before the first step, which has measured nothing yet."""
    if repair.repair is not Repair.CHECKFREE or len(norms) <= max(repair.sources):
        return 0.5
    before, behind = repair.sources
    return previous_share(norms[before], norms[behind], weighting)


def _weights(
    reader: _Reader, state: RankState, repair: StageRepair, share: float, outputs: Sequence[str]
) -> dict[str, Tensor]:
    """Master weights of the blocks, by slice."""
    own = _relative(name for piece in state.slices if _key(name := piece.spec.name) == _MASTER)
    fresh = {piece.spec.name: piece for piece in state.slices}
    like = {name: _shaped(fresh[slice_name]) for name, slice_name in own.items()}
    sources = [_blocks_of(reader, rank, _MASTER, own, like) for rank in repair.sources]
    try:
        made = rebuild(
            repair.repair,
            like,
            sources,
            share=share,
            initial=lambda name, _: like[name].clone(),
            output_suffixes=[f"{suffix}/{_MASTER}" for suffix in outputs],
        )
    except ConfigurationError as error:
        raise ManifestMismatch(f"stage {repair.stage} cannot be made of {list(repair.sources)}: {error}") from error
    return {own[name]: tensor for name, tensor in made.items()}


def _moments(
    reader: _Reader, state: RankState, repair: StageRepair, share: float, moments: MomentRepair
) -> dict[str, Tensor]:
    """Averaged like the weights; nothing where they stay those of a fresh optimizer."""
    if not _keeps_moments(repair, moments):
        return {}
    own = _relative(name for piece in state.slices if _key(name := piece.spec.name) != _MASTER)
    fresh = {piece.spec.name: piece for piece in state.slices}
    like = {name: _shaped(fresh[slice_name]) for name, slice_name in own.items()}
    keys = sorted({_key(name) for name in own})
    before, behind = (
        {name: tensor for key in keys for name, tensor in _blocks_of(reader, rank, key, own, like).items()}
        for rank in repair.sources
    )
    return {own[name]: tensor for name, tensor in average(before, behind, share).items()}


def _keeps_moments(repair: StageRepair, moments: MomentRepair) -> bool:
    return moments is MomentRepair.AVERAGED and len(repair.sources) == 2


def _copies(reader: _Reader, state: RankState, repair: StageRepair) -> Iterator[tuple[str, Tensor]]:
    """What is in no block, from whoever holds it too. RANDOM has it fresh where nobody does."""
    for piece in state.slices:
        name = piece.spec.name
        if name.startswith(_RANDOM) or _BLOCK.match(name):
            continue
        rank = reader.holder(name)
        if rank is not None:
            yield name, reader.read(rank, name)
        elif repair.repair is not Repair.RANDOM:
            raise ManifestMismatch(f"{name} of stage {repair.stage} is in no other memory")


def _blocks_of(
    reader: _Reader, rank: int, key: str, own: Mapping[str, str], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors of another stage's blocks under their relative names, in the shapes of the lost one's."""
    theirs = _relative(name for name in reader.names(rank) if _key(name) == key)
    found = {}
    for name in (name for name in own if _key(name) == key and name in theirs):
        tensor, shape = reader.read(rank, theirs[name]), like[name].shape
        if tensor.numel() != shape.numel():
            raise ManifestMismatch(
                f"{theirs[name]} has {tensor.numel():,} elements, {own[name]} has {shape.numel():,}: stages that are "
                "made of each other are alike"
            )
        found[name] = tensor.view(shape)
    return found


def _relative(names: Iterator[str] | Sequence[str]) -> dict[str, str]:
    """Names of what is in blocks, with the block counted from the stage's first; and the name that each has."""
    found = {name: match for name in names if (match := _BLOCK.match(name))}
    numbers = sorted({int(match[1]) for match in found.values()})
    return {f"{numbers.index(int(match[1]))}.{match[2]}": name for name, match in found.items()}


def _key(name: str) -> str:
    return name.rpartition("/")[2]


def _shaped(piece: StateSlice) -> Tensor:
    return piece.tensor.view(piece.spec.shape)
