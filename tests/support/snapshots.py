"""Training states whose every byte is a function of the version, so that any copy can be judged without a reference."""

from __future__ import annotations

import numpy as np
import torch

from holdfast.fault_tolerance.arena import Arena
from holdfast.fault_tolerance.snapshot import ArenaSnapshotter, required_bytes
from holdfast.types import Quantization, RankState, SliceSpec, StateSlice

__all__ = [
    "RUN_TAG",
    "AtOnce",
    "bytes_of",
    "expected_bytes",
    "filled_state",
    "make_arena",
    "set_version",
    "snapshotter",
]

RUN_TAG = "test-run"

_SLICES = [
    ("embed.weight/master", "float32", 1000),
    ("embed.weight/model", "bfloat16", 1001),
    ("embed.weight/exp_avg_codes", "uint8", 777),
    ("embed.weight/exp_avg_absmax", "float32", 4),
    ("nothing.bias/master", "float32", 0),
    ("rng/rank0/cpu", "uint8", 13),
    ("counter", "int64", 3),
]


def filled_state(version: int, scale: int = 1) -> RankState:
    """A state of seven slices, ``scale`` times 9 kB, as it is after update ``version``."""
    slices = []
    for name, dtype, numel in _SLICES:
        blocks = Quantization(256, "dynamic-signed", "embed.weight/exp_avg_absmax") if "codes" in name else None
        spec = SliceSpec(name, (2, numel * scale), numel * scale, 2 * numel * scale, dtype, blocks)
        slices.append(StateSlice(spec, torch.zeros(numel * scale, dtype=getattr(torch, dtype))))
    return set_version(RankState(slices), version)


def set_version(state: RankState, version: int) -> RankState:
    """Overwrite the tensors in place with what they hold after update ``version``; the scalars follow."""
    for piece in state.slices:
        target = piece.tensor.view(torch.uint8)
        target.copy_(torch.from_numpy(_pattern(piece.spec.name, target.numel(), version)))
    return RankState(state.slices, {"step": version, "owner": {"steps": [version, version]}})


def bytes_of(state: RankState) -> dict[str, bytes]:
    return {s.spec.name: s.tensor.view(torch.uint8).numpy().tobytes() for s in state.slices}


def expected_bytes(version: int, scale: int = 1) -> dict[str, bytes]:
    """What every slice holds after update ``version``, worked out without a snapshot."""
    sizes = {"float32": 4, "bfloat16": 2, "uint8": 1, "int64": 8}
    return {name: _pattern(name, numel * scale * sizes[dtype], version).tobytes() for name, dtype, numel in _SLICES}


def _pattern(name: str, length: int, version: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    salt = sum(name.encode()) + 101 * version
    return ((np.arange(length, dtype=np.int64) * 31 + salt) % 251).astype(np.uint8)


def make_arena(state: RankState, *, rank: int = 0, buffers: int = 3) -> Arena:
    """An arena of this process with room for ``state``."""
    arena = Arena.create(rank, RUN_TAG, 1 << 30, buffers)
    arena.reserve(required_bytes(state))
    return arena


class AtOnce(ArenaSnapshotter):
    """Has copied everything when ``offer`` returns; False also for what could not be copied."""

    def offer(self, state: RankState, version: int) -> bool:
        return super().offer(state, version) and self.fence().is_complete


def snapshotter(arena: Arena, *, epoch: int = 1, persist_every: int = 0) -> ArenaSnapshotter:
    return AtOnce(arena, rank=arena.board.rank, world=1, epoch=epoch, persist_every=persist_every)
