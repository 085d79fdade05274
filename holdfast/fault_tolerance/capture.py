"""Copying live tensors into a buffer beside training: what goes where, and a digest of every slice as it was staged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter, is_

import torch
from torch import Tensor

from holdfast import failpoints
from holdfast.errors import InvariantViolation
from holdfast.fault_tolerance.buffer import Bytes
from holdfast.fault_tolerance.device_staging import DeviceRows, stage_device
from holdfast.fault_tolerance.manifest import ManifestWriter, gaps, lay_out
from holdfast.fault_tolerance.staging import Control, Fence, StagingTable, stage
from holdfast.types import RankState, StateSlice

__all__ = ["Pace", "Plan", "byte_view"]


def byte_view(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as uint8 [n_bytes] on the same device."""
    if not tensor.is_contiguous():
        raise InvariantViolation(f"a state slice must be contiguous; shape {list(tensor.shape)} is not")
    return tensor.detach().view(-1).view(torch.uint8)


@dataclass(frozen=True, slots=True)
class Pace:
    """How a capture treats the work beside it, and who may end it."""

    control: Control = field(default_factory=Control)
    fence: Fence | None = None
    """Closed when the epoch is over."""
    max_bytes_per_s: float = 0.0
    """0: as fast as it goes."""
    low_priority: bool = False
    """For a thread of its own: whatever else the machine has to do goes first."""


class Plan:
    """Where the slices of a state lie, and where they go. Made once: addresses and sizes do not change between steps.

    Whether that is still true is checked at every offer, because copying from a stale address would store garbage
    under a digest that fits.
    """

    def __init__(self, slices: Sequence[StateSlice]) -> None:
        self._slices, self._tensors = tuple(slices), [s.tensor for s in slices]
        self._places = _places(self._tensors)
        self._sources = [byte_view(tensor) for tensor in self._tensors]
        lengths = [source.numel() for source in self._sources]
        offsets, self.data_bytes = lay_out(lengths)
        names = [s.spec.name for s in slices]
        _refuse_duplicates(names)
        places = list(zip(offsets, lengths, strict=True))
        self.manifests = ManifestWriter([s.spec for s in slices], places)
        self._gaps = gaps(places, self.data_bytes)
        half = len(slices) // 2
        self._halves = [_Rows.of(range(half), self._sources, offsets)]
        self._halves.append(_Rows.of(range(half, len(slices)), self._sources, offsets))

    def fits(self, state: RankState) -> bool:
        """The state has the slices that this plan was made for, at the addresses it was made for."""
        is_same = len(state.slices) == len(self._slices) and all(map(is_, state.slices, self._slices))
        return is_same and _places(self._tensors) == self._places

    def marks(self) -> list[int]:
        """Numbers of which one grows whenever torch writes to a slice."""
        return list(map(_version, self._sources))

    def capture(self, data: Bytes, pace: Pace, *, version: int) -> list[str] | None:
        """Copy every slice to its place in ``data``; digests in the order of the slices, None when it was ended.

        Front edge: the update may have been launched on any stream of a device, so whatever has been launched there
        is waited for. Blocks this thread only, so it can be called beside the next step.
        """
        found: dict[int, bytes] = {}
        data[self._gaps] = 0
        for number, rows in enumerate(self._halves):
            if number:
                failpoints.hit("snapshot.mid_capture", version)
            staged = rows.stage(data, pace)
            if staged is None:
                return None
            found |= staged
        return [found[i].hex() for i in range(len(self._sources))]


@dataclass(frozen=True, slots=True)
class _Rows:
    """Slices by where they lie."""

    host: Sequence[int]
    table: StagingTable
    devices: Mapping[torch.device, DeviceRows]

    @classmethod
    def of(cls, numbers: Sequence[int], sources: Sequence[Tensor], offsets: Sequence[int]) -> _Rows:
        host = [i for i in numbers if not sources[i].is_cuda]
        table = StagingTable(
            [sources[i].data_ptr() for i in host], [offsets[i] for i in host], [sources[i].numel() for i in host]
        )
        rest = {sources[i].device: DeviceRows() for i in numbers if sources[i].is_cuda}
        for i in numbers:
            if sources[i].is_cuda:
                rest[sources[i].device].add(i, sources[i], offsets[i])
        return cls(host, table, rest)

    def stage(self, data: Bytes, pace: Pace) -> dict[int, bytes] | None:
        """Digests by the number of the slice."""
        found: dict[int, bytes] = {}
        for rows in self.devices.values():
            copied = stage_device(rows, data, pace.control, pace.fence)
            if copied is None:
                return None
            found |= copied
        staged = stage(
            self.table,
            data,
            control=pace.control,
            fence=pace.fence,
            max_bytes_per_s=pace.max_bytes_per_s,
            low_priority=pace.low_priority,
        )
        return None if staged is None else found | dict(zip(self.host, staged, strict=True))


_version, _size = attrgetter("_version"), attrgetter("nbytes")
# This is asked in every step, with caches that are full of other things: loops outside of Python.


def _places(tensors: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    return list(map(Tensor.data_ptr, tensors)), list(map(_size, tensors))


def _refuse_duplicates(names: Sequence[str]) -> None:
    twice = next((name for name, before in zip(sorted(names)[1:], sorted(names), strict=False) if name == before), None)
    if twice is not None:
        raise InvariantViolation(f"two slices of one rank are named {twice!r}; names identify slices")
