"""Copying slices of a CUDA device into a buffer: a side stream, pinned memory, and a digest of what arrived."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from holdfast.fault_tolerance.buffer import Bytes
from holdfast.fault_tolerance.staging import Control, Fence

__all__ = ["DeviceRows", "stage_device"]

_BOUNCE_BYTES, _BOUNCES = 8 << 20, 2
"""One crosses the link while the other goes on to its place: about a third of a millisecond each at 25 GB/s."""


class _Piece(NamedTuple):
    number: int
    source: Tensor
    at: int
    """Byte of the target."""
    is_last: bool
    """Of its slice."""


class DeviceRows:
    """Slices of one device, uint8 each, with what copying them needs again and again."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, Tensor, int]] = []
        self._stream: torch.cuda.Stream | None = None
        self._bounces: list[tuple[Tensor, torch.cuda.Event]] = []

    def add(self, number: int, source: Tensor, offset: int) -> None:
        self._rows.append((number, source, offset))

    @property
    def device(self) -> torch.device:
        return self._rows[0][1].device

    @property
    def stream(self) -> torch.cuda.Stream:
        """Apart from every stream that computes, so that a copy waits for no kernel of the next step."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._stream

    @property
    def bounces(self) -> list[tuple[Tensor, torch.cuda.Event]]:
        """Pinned memory, because other copies are not asynchronous; each with an event that says when it is full."""
        if not self._bounces:
            self._bounces = [
                (torch.empty(_BOUNCE_BYTES, dtype=torch.uint8, pin_memory=True), torch.cuda.Event())  # type: ignore[no-untyped-call]
                for _ in range(_BOUNCES)
            ]
        return self._bounces

    def pieces(self) -> Iterator[_Piece]:
        for number, source, offset in self._rows:
            length = source.numel()
            for start in range(0, max(length, 1), _BOUNCE_BYTES):
                stop = min(start + _BOUNCE_BYTES, length)
                yield _Piece(number, source[start:stop], offset + start, stop == length)


def stage_device(rows: DeviceRows, target: Bytes, control: Control, fence: Fence | None) -> dict[int, bytes] | None:
    """Copy all rows; their xxh3-128 digests by number, None when the call was ended. Blocks the calling thread only.

    Front edge: whatever has been launched on any stream of the device is waited for first.
    """
    torch.cuda.synchronize(rows.device)
    digests: dict[int, bytes] = {}
    on_the_way: list[tuple[_Piece, Tensor, torch.cuda.Event]] = []
    digest = xxhash.xxh3_128()
    with torch.cuda.stream(rows.stream):
        for turn, piece in enumerate(rows.pieces()):
            if control.is_stopped or (fence is not None and fence.is_closed):
                rows.stream.synchronize()
                return None
            if len(on_the_way) == _BOUNCES:
                digest = _land(on_the_way.pop(0), target, digest, digests)
            bounce, full = rows.bounces[turn % _BOUNCES]
            held = bounce[: piece.source.numel()]
            held.copy_(piece.source, non_blocking=True)
            full.record(rows.stream)
            on_the_way.append((piece, held, full))
    for arrival in on_the_way:
        digest = _land(arrival, target, digest, digests)
    return digests


def _land(
    arrival: tuple[_Piece, Tensor, torch.cuda.Event], target: Bytes, digest: xxhash.xxh3_128, found: dict[int, bytes]
) -> xxhash.xxh3_128:
    """Carry a piece on to its place; the digest of its slice so far, or a new one after the last piece."""
    piece, held, full = arrival
    full.synchronize()
    place = target[piece.at : piece.at + held.numel()]
    np.copyto(place, held.numpy())
    digest.update(place.data)
    if not piece.is_last:
        return digest
    found[piece.number] = digest.digest()
    return xxhash.xxh3_128()
