"""One training run handed from layout to layout through checkpoints, against one process that never stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from holdfast.fault_tolerance.resharding import StoredCheckpoint
from holdfast.fault_tolerance.storage import DirectoryStorage
from holdfast.trainer.state import StateView, TrainState
from holdfast.types import Precision, RankState, SliceSpec
from tests.support.local_cluster import LocalCluster, Member
from tests.support.stored import write_checkpoint
from tests.support.zero_engines import Plain, Setup, copy_of, join, ragged_steps, whole_state

_CLUSTER = LocalCluster(deadline_s=50.0)
_EACH = 2
"""Steps in each layout."""


@dataclass(frozen=True)
class _Turn:
    """One rank in one layout."""

    restored: list[tuple[SliceSpec, Tensor]]
    """Before the first step."""
    end: list[tuple[SliceSpec, Tensor]]
    scalars: dict[str, object]


def _turn(member: Member, setup: Setup, root: Path, step: int) -> _Turn:
    comm = join(member)
    torch.manual_seed(100 * member.rank + 1000 * step)
    engine = setup.build()
    view = StateView(TrainState(), engine, rank=member.rank)
    if step:
        stored = StoredCheckpoint(DirectoryStorage(root), config_digest="cfg")
        view.adopt(stored.restore_into(view.capture(), step))
    restored = copy_of(view.capture().slices)
    assert view.train.step == step
    ragged_steps(engine, setup, range(step, step + _EACH))
    for _ in range(_EACH):
        view.train.advance(10)
    torch.rand(member.rank + 1)  # random states move on, too
    end: RankState = view.capture()
    turn = _Turn(restored, copy_of(end.slices), dict(end.scalars))
    engine.close()
    comm.close()
    return turn


def _parts(held: list[tuple[SliceSpec, Tensor]], *, random: bool) -> list[tuple[SliceSpec, Tensor]]:
    return [(spec, tensor) for spec, tensor in held if spec.name.startswith("rng/") == random]


@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize(
    "layouts",
    [[(3, 2), (2, 3), (4, 1), (1, 0), (3, 3)], [(2, 1), (2, 3), (3, 0), (1, 2)]],
    ids=lambda layouts: "-".join(f"{world}x{stage}" for world, stage in layouts),
)
def test_state_survives_every_change_of_ranks_and_stage_and_trains_on(
    layouts: list[tuple[int, int]], precision: Precision, tmp_path: Path
) -> None:
    """Masters, codes, absmax and scalars, to the bit. Sources: ZeRO, arXiv 1910.02054, section 5."""
    plain, before = Plain(Setup(0, precision)), dict[str, Tensor]()
    randoms = dict[str, Tensor]()
    for number, (world, stage) in enumerate(layouts):
        step = _EACH * number
        turns = _CLUSTER.run(_turn, world, Setup(stage, precision), tmp_path, step)
        if step:
            restored = whole_state([_parts(turn.restored, random=False) for turn in turns])
            assert restored.keys() == before.keys()
            assert [name for name in before if not torch.equal(restored[name], before[name])] == []
            drawn = {spec.name: tensor for turn in turns for spec, tensor in _parts(turn.restored, random=True)}
            kept = drawn.keys() & randoms.keys()
            assert len(kept) == min(world, layouts[number - 1][0])
            assert all(torch.equal(drawn[name], randoms[name]) for name in kept)
            assert len({tuple(tensor.tolist()) for tensor in drawn.values()}) == world
        for _ in range(_EACH):
            plain.step([(torch.full((1, 1), step),) * 2])
            step += 1
        before, want = whole_state([_parts(turn.end, random=False) for turn in turns]), plain.state()
        assert before.keys() == want.keys()
        assert [name for name in want if not torch.equal(before[name], want[name])] == []
        randoms = {spec.name: tensor for turn in turns for spec, tensor in _parts(turn.end, random=True)}
        scalars = turns[0].scalars
        assert scalars == {"step": step, "tokens": 10 * step, "owner": {str(g): {"step": step} for g in range(4)}}
        ranks = [[(spec, tensor.view(torch.uint8).numpy().tobytes()) for spec, tensor in turn.end] for turn in turns]
        write_checkpoint(DirectoryStorage(tmp_path), step, ranks, scalars=scalars)
