"""Snapshots of tensors on a GPU: taken after the update that was launched last, restored to the bit."""

from __future__ import annotations

import pytest
import torch

from holdfast.types import RankState, SliceSpec, StateSlice
from tests.support.snapshots import make_arena, snapshotter

pytestmark = pytest.mark.gpu


def _state(tensor: torch.Tensor) -> RankState:
    spec = SliceSpec("w/master", (tensor.numel(),), 0, tensor.numel(), "float32")
    return RankState([StateSlice(spec, tensor)], {"step": 1})


def test_a_version_is_the_state_after_the_update_even_on_another_stream() -> None:
    weights = torch.zeros(1 << 24, device="cuda")
    state = _state(weights)
    arena = make_arena(state)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(50):  # enough work that it is not over when offer is called
            weights.add_(1.0)
    assert snapshotter(arena).offer(state, 1)
    weights.fill_(-1.0)
    assert snapshotter(arena, epoch=2).restore_into(state, 1)["step"] == 1
    assert torch.equal(weights, torch.full_like(weights, 50.0))
