"""Snapshots of tensors on a GPU: taken after the update that was launched last, restored to the bit."""

from __future__ import annotations

import pytest
import torch

from holdfast.fault_tolerance.snapshot import ArenaSnapshotter
from holdfast.fault_tolerance.versions import find_version
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


def test_a_copy_runs_beside_kernels_of_the_next_step_and_is_whole_at_the_fence() -> None:
    weights = torch.arange(1 << 24, device="cuda", dtype=torch.float32)
    state = _state(weights)
    arena = make_arena(state)
    snapshots = ArenaSnapshotter(arena, rank=0, world=1, epoch=1)
    assert snapshots.offer(state, 1)
    other = torch.randn(2048, 2048, device="cuda")
    for _ in range(20):
        other = other @ other / 2048
    assert snapshots.fence().is_complete
    weights.fill_(-1.0)
    snapshots.restore_into(state, 1)
    assert torch.equal(weights, torch.arange(1 << 24, device="cuda", dtype=torch.float32))


def test_a_state_that_changes_before_the_fence_is_no_version() -> None:
    weights = torch.zeros(1 << 26, device="cuda")
    state = _state(weights)
    snapshots = ArenaSnapshotter(make_arena(state), rank=0, world=1, epoch=1)
    assert snapshots.offer(state, 1)
    weights.add_(1.0)
    report = snapshots.fence()
    assert not report.is_complete
    assert "written to while it was copied" in report.why_not


@pytest.mark.parametrize("numel", [1, 1000, (8 << 20) // 4, (8 << 20) // 4 + 1, 5_000_001])
def test_slices_of_any_length_arrive_with_the_digest_of_their_bytes(numel: int) -> None:
    weights = torch.randn(numel, device="cuda")
    state = _state(weights)
    arena = make_arena(state)
    assert snapshotter(arena).offer(state, 1)
    held = find_version(arena, 1)
    assert list(held.damage()) == []
    assert held.data[: 4 * numel].tobytes() == weights.cpu().numpy().tobytes()
