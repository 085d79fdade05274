"""The benchmark of the pipeline times equal work only: torch.distributed.pipelining has to agree with it to the bit."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from holdfast.parallel.comms import TorchCommunicator
from holdfast.trainer.config import ModelConfig
from tests.support.local_cluster import LocalCluster, Member

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
_CLUSTER = LocalCluster(deadline_s=50.0)
_MODEL = ModelConfig(vocab_size=256, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=48, max_seq_len=8)


def _benchmark() -> ModuleType:
    """Which imports its neighbours as scripts do."""
    sys.path.insert(0, str(_BENCHMARKS))
    try:
        return importlib.import_module("pipeline_overhead")
    finally:
        sys.path.remove(str(_BENCHMARKS))


def _job(module: ModuleType, kind: str) -> Any:  # Any: its class is in a script
    return module.Job(kind, _MODEL, micro_batch=2, seq_len=8, microbatches=4)


def _timed(member: Member, kind: str) -> dict[str, tuple[list[float], list[float]]]:
    module, options = _benchmark(), argparse.Namespace(rounds=2, steps=1, deadline_s=30.0)
    found = module.run_rank(member.rank, member.rendezvous(), _job(module, kind), options)
    return {name: (samples.step_s, samples.cpu_s) for name, samples in found.items()}


@pytest.mark.parametrize("kind", ["GPipe", "1F1B"])
def test_every_way_agrees_with_torch_and_is_timed_in_every_round(kind: str) -> None:
    first, second = _CLUSTER.run(_timed, 2, kind)
    assert first == second  # of the slower process, on both
    assert len(first) == 3
    assert all(len(values) == 2 and min(values) > 0 for samples in first.values() for values in samples)


class _Defect:
    """A way that does one thing wrong, in the last process."""

    def __init__(self, way: Any, what: str, rank: int) -> None:
        self.piece, self._way, self._what = way.piece, way, what if rank else ""

    def step(self) -> float:
        loss: float = self._way.step()
        weight = self.piece.head.norm.weight if self._what else None
        if self._what == "gradient":
            weight.grad.view(torch.int32)[0] += 1  # one bit or two
        elif self._what == "no gradient":
            weight.grad = None
        return loss * 1.001 if self._what == "loss" else loss


def _objection(member: Member, what: str) -> str:
    module = _benchmark()
    comm = TorchCommunicator.join(
        member.rendezvous(), rank=member.rank, world=member.world, backend="gloo", timeout_s=20.0
    )
    try:
        job = _job(module, "1F1B")
        found = module.ways(job, member.rank)
        found[module.OURS] = _Defect(found[module.OURS], what, member.rank)
        if what == "order":
            module.SCHEDULES["1F1B"] = module.gpipe, module.SCHEDULES["1F1B"][1]
        module.agree(job, member.rank, found)
        return ""
    except RuntimeError as error:
        return str(error)
    finally:
        comm.close()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("gradient", "process 1: **Holdfast, Executor** has other gradients than torch in head.norm.weight"),
        ("no gradient", "process 1: **Holdfast, Executor** has other gradients than torch in head.norm.weight"),
        ("loss", "process 1: **Holdfast, Executor** has a loss of "),
        ("order", "process 0: our 1F1B is F0 F1 F2 F3 B0 B1 B2 B3, torch's F0 F1 B0 F2 B1 F3 B2 B3"),
    ],
)
def test_nothing_is_timed_when_a_way_does_something_else(what: str, said: str) -> None:
    first, second = _CLUSTER.run(_objection, 2, what)
    assert said in first
    assert first == second
