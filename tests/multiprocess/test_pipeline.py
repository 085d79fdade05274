"""A decoder trained by pipeline processes learns what one plain process learns, whatever the schedule."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from holdfast import optim
from holdfast.optim.config import OptimConfig, OptimName
from holdfast.parallel import schedule as schedules
from holdfast.parallel.comms import TorchCommunicator
from holdfast.parallel.partition import equal
from holdfast.parallel.pipeline_engine import PipelineEngine, PipelineOptions, Place
from holdfast.parallel.schedule import Schedule
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.model import Decoder, initialise
from holdfast.trainer.stages import layouts_of, piece_of
from holdfast.types import Precision
from tests.support.local_cluster import LocalCluster, Member

_CLUSTER = LocalCluster(deadline_s=50.0)
_BATCH, _LENGTH, _STEPS, _BLOCK, _RATE = 2, 8, 3, 64, 1e-2


@dataclass(frozen=True)
class _Case:
    processes: int
    kind: str = "1f1b"
    replicas: int = 1
    is_sharded: bool = True
    microbatches: int = 4
    chunks: int = 1
    swapped: bool = False
    tied: bool = False
    checkpointing: bool = False
    precision: Precision = Precision.FP32
    name: OptimName = OptimName.SGD
    clip: float = 0.0

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            name="tiny",
            vocab_size=264,
            d_model=32,
            n_layers=self.processes * self.chunks,
            n_heads=2,
            n_kv_heads=1,
            d_ff=48,
            max_seq_len=_LENGTH,
            tie_embeddings=self.tied,
            activation_checkpointing=self.checkpointing,
        )

    @property
    def optimizer(self) -> OptimConfig:
        return OptimConfig(name=self.name, lr=_RATE, block_size=_BLOCK, min_8bit_size=512)

    @property
    def schedule(self) -> Schedule:
        if self.chunks > 1:
            return schedules.interleaved(self.processes, self.chunks, self.microbatches, swapped=self.swapped)
        build = {"gpipe": schedules.gpipe, "1f1b": schedules.one_f_one_b}[self.kind]
        return build(self.processes, self.microbatches, swapped=self.swapped)


def _batches(case: _Case, step: int) -> list[list[tuple[Tensor, Tensor, int]]]:
    """By replica."""
    draw = torch.Generator().manual_seed(step)
    text = torch.randint(0, 264, (case.replicas, case.microbatches, _BATCH, _LENGTH + 1), generator=draw)
    return [[(m[:, :-1].contiguous(), m[:, 1:].contiguous(), m[:, 1:].numel()) for m in share] for share in text]


@dataclass(frozen=True)
class _Lesson:
    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]
    measured: float = 0.0
    stage_norms: tuple[float, ...] = ()


def _engine(case: _Case, rank: int) -> PipelineEngine:
    place, schedule = Place(case.processes, case.replicas, rank), case.schedule
    partition = equal(case.model.n_layers, processes=case.processes, chunks=case.chunks)
    piece, stages = piece_of(case.model, partition, schedule.layout, place.process)
    initialise(piece, seed=5)
    return PipelineEngine(
        piece,
        stages,
        schedule,
        place,
        optim.parameter_groups(piece, case.optimizer),
        lambda groups: optim.build_optimizer(case.optimizer, groups),
        optim,
        PipelineOptions(
            case.precision,
            (_BATCH, _LENGTH, case.model.d_model),
            case.clip,
            _BLOCK if case.name.is_8bit else 1,
            is_sharded=case.is_sharded,
        ),
        layouts_of(case.model, partition, schedule.layout),
    )


def _learn(member: Member, case: _Case) -> _Lesson:
    comm = TorchCommunicator.join(
        member.rendezvous(), rank=member.rank, world=member.world, backend="gloo", timeout_s=20.0
    )
    try:
        engine, replica = _engine(case, member.rank), member.rank // case.processes
        losses, norms = [], []
        for step in range(_STEPS):
            nats, targets, _ = comm.all_reduce_sum(engine.forward_backward(_batches(case, step)[replica]))
            losses.append(nats / targets)
            norms.append(engine.update(_RATE))
        nats, targets, _ = comm.all_reduce_sum(engine.measure(_batches(case, 99)[replica]))
        return _Lesson(losses, norms, engine.full_weights(), nats / targets, engine.stage_norms)
    finally:
        comm.close()


def _route_of(model: Decoder, order: Sequence[int], tokens: Tensor, targets: Tensor) -> Tensor:
    """Through the blocks in another order. One block per stage."""
    hidden = model.embedding(tokens)
    for number in order:
        hidden = model.blocks[number](hidden)
    logits = model.head(hidden).float()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


@functools.cache
def _alone(case: _Case) -> _Lesson:
    """One process, plain torch loops; the same optimizer."""
    model = Decoder(case.model)
    initialise(model, seed=5)
    optimizer = optim.build_optimizer(case.optimizer, optim.parameter_groups(model, case.optimizer))
    routes, losses, norms = case.schedule.layout.routes, [], []
    for step in range(_STEPS):
        optimizer.zero_grad()
        found = []
        for share in _batches(case, step):
            for number, (tokens, targets, _) in enumerate(share):
                loss = _route_of(model, routes[number], tokens, targets)
                (loss / (case.microbatches * case.replicas)).backward()
                found.append(float(loss.detach()))
        losses.append(sum(found) / len(found))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip or torch.inf)))
        for group in optimizer.param_groups:
            group["lr"] = _RATE
        optimizer.step()
    weights = {name: param.detach().clone() for name, param in model.named_parameters()}
    with torch.no_grad():
        batch = [one for share in _batches(case, 99) for one in share]
        measured = sum(float(model(tokens, targets)) for tokens, targets, _ in batch) / len(batch)
    return _Lesson(losses, norms, weights, measured)


def _compare(case: _Case) -> tuple[_Lesson, _Lesson]:
    found = _CLUSTER.run(_learn, case.processes * case.replicas, case)
    assert all(not lesson.weights for lesson in found[1:])
    return found[0], _alone(case)


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
@pytest.mark.parametrize("processes", [2, 4, 6, 8])
def test_the_gradients_of_a_pipeline_are_those_of_one_process_to_the_bit(processes: int, kind: str) -> None:
    found, want = _compare(_Case(processes, kind, name=OptimName.ADAMW8BIT))
    assert found.losses == pytest.approx(want.losses, rel=1e-12)  # of a sum in another order
    assert sorted(found.weights) == sorted(want.weights)
    assert [name for name, weight in want.weights.items() if not torch.equal(found.weights[name], weight)] == []
    assert found.norms == pytest.approx(want.norms, rel=1e-5)
    assert found.measured == pytest.approx(want.measured, rel=1e-6)


@pytest.mark.parametrize(
    "case",
    [
        _Case(4, swapped=True),
        _Case(4, "gpipe", swapped=True),
        _Case(6, swapped=True),
        _Case(8, swapped=True),
        _Case(4, swapped=True, tied=True),
        _Case(2, chunks=2, microbatches=4),
        _Case(2, chunks=3, microbatches=6),
        _Case(2, chunks=2, microbatches=4, swapped=True),
        _Case(3, tied=True, clip=0.05),
        _Case(2, replicas=2, clip=0.05),
        _Case(4, replicas=2, swapped=True),
        _Case(2, replicas=3, microbatches=2),
        _Case(2, checkpointing=True),
        _Case(2, microbatches=1),
        _Case(1, microbatches=3),
    ],
    ids=str,
)
def test_any_schedule_learns_what_one_process_learns(case: _Case) -> None:
    found, want = _compare(case)
    assert found.losses == pytest.approx(want.losses, rel=1e-6)
    assert found.norms == pytest.approx(want.norms, rel=1e-4)
    assert sorted(found.weights) == sorted(want.weights)
    for name, weight in want.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert found.measured == pytest.approx(want.measured, rel=1e-5)


@pytest.mark.parametrize("name", [OptimName.ADAMW8BIT, OptimName.LAMB], ids=lambda name: name.value)
@pytest.mark.parametrize("precision", list(Precision), ids=lambda precision: precision.value)
def test_replicas_with_all_of_the_state_learn_what_those_with_a_share_learn_to_the_bit(
    name: OptimName, precision: Precision
) -> None:
    cases = [_Case(2, replicas=2, clip=0.05, name=name, precision=precision, is_sharded=s) for s in (True, False)]
    shared, whole = (_CLUSTER.run(_learn, 4, case)[0] for case in cases)
    assert shared.losses == whole.losses
    assert shared.norms == pytest.approx(whole.norms, rel=1e-6)  # of a sum in another order
    assert [n for n in shared.weights if not torch.equal(shared.weights[n], whole.weights[n])] == []


def test_replicas_with_all_of_the_state_hold_the_same_slices() -> None:
    case = _Case(2, replicas=2, name=OptimName.ADAMW8BIT, is_sharded=False)
    held = _CLUSTER.run(_hold, 4, case)
    assert [name for name in held[0] if not torch.equal(held[0][name], held[2][name])] == []
    assert held[0].keys() == held[2].keys()
    assert held[1].keys() == held[3].keys() != held[0].keys()


def _hold(member: Member, case: _Case) -> dict[str, Tensor]:
    """Slices after a step."""
    comm = TorchCommunicator.join(
        member.rendezvous(), rank=member.rank, world=member.world, backend="gloo", timeout_s=20.0
    )
    try:
        engine = _engine(case, member.rank)
        engine.forward_backward(_batches(case, 0)[member.rank // case.processes])
        engine.update(_RATE)
        return {piece.spec.name: piece.tensor.clone() for piece in engine.slices()}
    finally:
        comm.close()


def test_in_bf16_masters_and_sums_of_gradients_stay_fp32() -> None:
    case = _Case(3, replicas=2, precision=Precision.BF16)
    found = _CLUSTER.run(_learn, 6, case)[0]
    want = _alone(_Case(3, replicas=2))
    assert found.losses == pytest.approx(want.losses, rel=5e-3)
    assert found.measured == pytest.approx(want.measured, rel=5e-3)
    assert {weight.dtype for weight in found.weights.values()} == {torch.float32}
    moved = {name: (found.weights[name] - weight).abs().max() for name, weight in want.weights.items()}
    assert max(moved.values()) < 2e-3
    assert any(not torch.equal(w, w.bfloat16().float()) for w in found.weights.values())
