"""Copying live tensors into a buffer: what goes where, and a digest of every slice as it was staged."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import xxhash
from torch import Tensor

from holdfast import failpoints
from holdfast.errors import InvariantViolation
from holdfast.fault_tolerance.buffer import Bytes
from holdfast.fault_tolerance.manifest import Entry, lay_out
from holdfast.types import RankState, StateSlice

__all__ = ["CHUNK_BYTES", "Plan", "byte_view"]

CHUNK_BYTES = 4 << 20
"""Copied between two looks at the fence: about a millisecond. From 256 KiB to 16 MiB the size makes no difference."""


def byte_view(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as uint8 [n_bytes] on the same device."""
    if not tensor.is_contiguous():
        raise InvariantViolation(f"a state slice must be contiguous; shape {list(tensor.shape)} is not")
    return tensor.detach().view(-1).view(torch.uint8)


class Plan:
    """Where the slices of a state lie, and where they go. Made once: addresses and sizes do not change between steps.

    Whether that is still true is checked at every capture, because copying from a stale address would store garbage
    under a digest that fits.
    """

    def __init__(self, slices: Sequence[StateSlice]) -> None:
        self._key = _key(slices)
        self._specs = [s.spec for s in slices]
        self._sources = [byte_view(s.tensor) for s in slices]
        self._lengths = [source.numel() for source in self._sources]
        self._offsets, self.data_bytes = lay_out(self._lengths)
        self._devices = {s.tensor.device for s in slices if s.tensor.is_cuda}
        _refuse_duplicates([spec.name for spec in self._specs])

    def fits(self, state: RankState) -> bool:
        """The state has the slices that this plan was made for, at the addresses it was made for."""
        return _key(state.slices) == self._key

    def capture(self, data: Bytes, check: Callable[[], None], *, version: int) -> tuple[Entry, ...]:
        """Copy every slice to its place in ``data``; ``check`` is called between pieces and may raise.

        Front edge: the update may have been launched on any stream, so each device is drained first. Back
        edge: the copies are synchronous, so the tensors may change when this returns.
        """
        for device in self._devices:
            torch.cuda.synchronize(device)
        target, view, half = torch.from_numpy(data), data.data, len(self._specs) // 2
        entries = []
        for i, (spec, source, offset) in enumerate(zip(self._specs, self._sources, self._offsets, strict=True)):
            if i == half:
                failpoints.hit("snapshot.mid_capture", version)
            digest = _copy(source, target, view, offset, check)
            entries.append(Entry(spec, offset, source.numel(), digest))
        return tuple(entries)

    def blank_entries(self) -> tuple[Entry, ...]:
        """What ``capture`` returns, without digests: enough to know how long a manifest will be."""
        rows = zip(self._specs, self._offsets, self._lengths, strict=True)
        return tuple(Entry(spec, offset, length, "0" * 32) for spec, offset, length in rows)


def _copy(source: Tensor, target: Tensor, view: memoryview, offset: int, check: Callable[[], None]) -> str:
    """Copy one slice in bounded chunks; the digest is taken of the bytes that arrived."""
    length = source.numel()
    if length <= CHUNK_BYTES:  # the usual case, without the cost of slicing and of a streaming digest
        check()
        target[offset : offset + length].copy_(source)
        return xxhash.xxh3_128_hexdigest(view[offset : offset + length])
    staged = xxhash.xxh3_128()
    for start in range(0, length, CHUNK_BYTES):
        check()
        stop = min(start + CHUNK_BYTES, length)
        target[offset + start : offset + stop].copy_(source[start:stop])
        staged.update(view[offset + start : offset + stop])
    return staged.hexdigest()


def _key(slices: Sequence[StateSlice]) -> list[tuple[int, int, int]]:
    return [(id(s.spec), s.tensor.data_ptr(), s.tensor.nbytes) for s in slices]


def _refuse_duplicates(names: Sequence[str]) -> None:
    twice = next((name for name, before in zip(sorted(names)[1:], sorted(names), strict=False) if name == before), None)
    if twice is not None:
        raise InvariantViolation(f"two slices of one rank are named {twice!r}; names identify slices")
