"""Which stored slices make up a slice that is wanted: from any layout to any other. Pure index arithmetic.

Elements are counted in the row-major flat index of the whole tensor, so a slice means the same whoever held it. Cuts
of quantised tensors lie on block boundaries in every layout, and codes and absmax are slices of their own: nothing is
decoded on the way, so a move is exact to the bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from holdfast.errors import ManifestMismatch, ShardCorrupt
from holdfast.fault_tolerance.manifest import Entry, Manifest
from holdfast.types import SliceSpec

__all__ = ["Move", "Source", "cover"]


@dataclass(frozen=True, slots=True)
class Source:
    """A stored slice, and who wrote it."""

    rank: int
    entry: Entry


@dataclass(frozen=True, slots=True)
class Move:
    """Elements ``start .. stop`` of a tensor, from a stored slice into a wanted one."""

    number: int
    """Which of the wanted slices."""
    source: Source
    start: int
    stop: int

    @property
    def stored(self) -> tuple[int, int]:
        """Their bytes within the stored slice."""
        spec, size = self.source.entry.spec, self.item_bytes
        return (self.start - spec.start) * size, (self.stop - spec.start) * size

    def wanted(self, spec: SliceSpec) -> tuple[int, int]:
        """Their bytes within the wanted slice, which is ``spec``."""
        return (self.start - spec.start) * self.item_bytes, (self.stop - spec.start) * self.item_bytes

    @property
    def item_bytes(self) -> int:
        entry = self.source.entry
        return entry.length // (entry.spec.stop - entry.spec.start)


def cover(manifests: Mapping[int, Manifest], wanted: Sequence[SliceSpec]) -> tuple[Move, ...]:
    """For every element of the wanted slices the one stored slice it comes from, in as few moves as there can be.

    ``manifests`` are those of one checkpoint, by rank of the writer. Where ranks hold the same slice, the one with the
    least bytes to read so far is taken. Raises: ManifestMismatch for a slice that is stored as something else, or not
    completely; ShardCorrupt when replicas of a slice have different digests.
    """
    stored = _by_name(manifests, {spec.name for spec in wanted})
    load, moves = Counter[int](), list[Move]()
    for number, spec in enumerate(wanted):
        at, extents = spec.start, _overlapping(stored.get(spec.name, ()), spec)
        while at < spec.stop:
            replicas = _farthest(extents, at)
            if not replicas:
                raise ManifestMismatch(_hole(extents, spec, at))
            _refuse_unlike(replicas, spec, manifests)
            source = min(replicas, key=lambda one: (load[one.rank], one.rank))
            load[source.rank] += source.entry.length
            stop = min(source.entry.spec.stop, spec.stop)
            moves.append(Move(number, source, at, stop))
            at = stop
    return tuple(moves)


_Extents = Mapping[tuple[int, int], Sequence[Source]]
"""Stored slices of one tensor by their elements; more than one is a replica."""


def _by_name(manifests: Mapping[int, Manifest], names: set[str]) -> dict[str, list[Source]]:
    found: dict[str, list[Source]] = {}
    for rank, manifest in sorted(manifests.items()):
        for entry in manifest.entries:
            if entry.spec.name in names:
                found.setdefault(entry.spec.name, []).append(Source(rank, entry))
    return found


def _overlapping(sources: Iterable[Source], spec: SliceSpec) -> _Extents:
    extents: dict[tuple[int, int], list[Source]] = {}
    for source in sources:
        start, stop = source.entry.spec.start, source.entry.spec.stop
        if max(start, spec.start) < min(stop, spec.stop):
            extents.setdefault((start, stop), []).append(source)
    return extents


def _farthest(extents: _Extents, at: int) -> Sequence[Source]:
    """Of those that hold element ``at``, the one that goes on longest."""
    holding = [extent for extent in extents if extent[0] <= at < extent[1]]
    return extents[max(holding, key=lambda extent: extent[1])] if holding else ()


def _hole(extents: _Extents, spec: SliceSpec, at: int) -> str:
    end = min((start for start, _ in extents if start > at), default=spec.stop)
    return (
        f"elements {at:,} to {end:,} of slice {spec.name!r} are stored by no rank; "
        f"elements {spec.start:,} to {spec.stop:,} are needed"
    )


def _refuse_unlike(replicas: Sequence[Source], spec: SliceSpec, manifests: Mapping[int, Manifest]) -> None:
    """They must be slices of the tensor that is wanted, and of one another's bytes."""
    first = replicas[0]
    for source in replicas:
        have, elements = source.entry.spec, source.entry.spec.stop - source.entry.spec.start
        if (have.shape, have.dtype, have.quantization) != (spec.shape, spec.dtype, spec.quantization):
            raise ManifestMismatch(f"slice {spec.name!r} is {have} at rank {source.rank} and {spec} here")
        if source.entry.length % elements:
            raise ManifestMismatch(
                f"slice {spec.name!r} of rank {source.rank} has {source.entry.length:,} bytes for {elements:,} elements"
            )
        if source.entry.digest != first.entry.digest:
            raise ShardCorrupt(
                spec.name,
                rank=source.rank,
                version=manifests[source.rank].version,
                want=f"{first.entry.digest}, that of its replica at rank {first.rank},",
                have=source.entry.digest,
            )
