"""A pipeline of real processes trains a model of transformers to the weights of one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from holdfast import optim
from holdfast.fault_tolerance.config import RecoveryConfig
from holdfast.optim.config import OptimConfig, OptimName
from holdfast.parallel.comms import TorchCommunicator
from holdfast.parallel.config import ParallelConfig
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.engines import Work, build_engine
from holdfast.trainer.models import model_of
from tests.support.hf_models import hf_config, write_model
from tests.support.local_cluster import LocalCluster, Member

pytestmark = pytest.mark.timeout(240)  # each rank imports transformers

_RATE, _STEPS, _BATCH, _LENGTH, _MICROBATCHES = 3e-3, 2, 2, 12, 4


@dataclass(frozen=True)
class _Options:
    parallel: ParallelConfig
    seed: int = 9
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(name=OptimName.ADAMW, lr=_RATE, grad_clip=0.0))
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)


def _batch(step: int) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    draw = torch.Generator().manual_seed(step)
    text = torch.randint(259, (_MICROBATCHES, _BATCH, _LENGTH + 1), generator=draw)
    return [(m[:, :-1].contiguous(), m[:, 1:].contiguous(), m[:, 1:].numel()) for m in text]


def _train(member: Member, model: ModelConfig, options: _Options) -> tuple[dict[str, torch.Tensor], float]:
    comm = TorchCommunicator.join(
        member.rendezvous(), rank=member.rank, world=member.world, backend="gloo", timeout_s=30.0
    )
    work = Work(_BATCH, _MICROBATCHES, _LENGTH)
    try:
        engine = build_engine(options, model, torch.device("cpu"), work, rank=member.rank, world=member.world)
        for step in range(_STEPS):
            engine.forward_backward(_batch(step))
            engine.update(_RATE)
        nats, targets, _ = comm.all_reduce_sum(engine.measure(_batch(99)))
        return engine.full_weights(), nats / targets
    finally:
        comm.close()


def _alone(model: ModelConfig, options: _Options) -> tuple[dict[str, torch.Tensor], float]:
    whole = model_of(model).build(options.seed)
    optimizer = optim.build_optimizer(options.optim, optim.parameter_groups(whole, options.optim))
    for step in range(_STEPS):
        optimizer.zero_grad()
        for tokens, targets, _ in _batch(step):
            (whole(tokens, targets) / _MICROBATCHES).backward()
        optimizer.step()
    with torch.no_grad():
        whole.eval()
        loss = sum(float(whole(tokens, targets)) for tokens, targets, _ in _batch(99)) / _MICROBATCHES
    return {name: p.detach() for name, p in whole.named_parameters()}, loss


@pytest.mark.parametrize("kind", ["llama", "llama tied", "gpt2"])
def test_two_processes_train_to_the_weights_of_one(kind: str, tmp_path: Path) -> None:
    write_model(tmp_path, kind)
    model, options = hf_config(tmp_path), _Options(ParallelConfig(pipeline=2, zero_stage=1))
    (weights, loss), _ = LocalCluster(deadline_s=180.0).run(_train, 2, model, options)
    expected, expected_loss = _alone(model, options)
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        if kind == "llama":
            assert torch.equal(weights[name], tensor), name
        else:  # the two uses of a tied table are added up in another order
            torch.testing.assert_close(weights[name], tensor, rtol=0, atol=2e-5, msg=name)
    assert loss == pytest.approx(expected_loss, abs=1e-5)


def test_dropout_is_off_while_a_pipeline_measures(tmp_path: Path) -> None:
    write_model(tmp_path, "gpt2", resid_pdrop=0.5)
    options = _Options(
        ParallelConfig(pipeline=2, zero_stage=1), optim=OptimConfig(name=OptimName.SGD, lr=0.0, grad_clip=0.0)
    )
    (weights, loss), _ = LocalCluster(deadline_s=180.0).run(_train, 2, hf_config(tmp_path), options)
    whole = model_of(hf_config(tmp_path)).with_weights(weights)
    with torch.no_grad():
        expected = sum(float(whole(tokens, targets)) for tokens, targets, _ in _batch(99)) / _MICROBATCHES
    assert loss == pytest.approx(expected, abs=1e-6)
