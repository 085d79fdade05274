"""Which kernels update the tensors of a device."""

from __future__ import annotations

import logging
from functools import cache

import torch

from holdfast.optim.native import cpu_engine
from holdfast.optim.rows import Engine
from holdfast.optim.torch_engine import TorchEngine

__all__ = ["kernels_for"]

_log = logging.getLogger(__name__)


def kernels_for(device: torch.device) -> Engine:
    """The fastest one: compiled kernels on a CPU, Triton on CUDA, plain torch elsewhere or where those are missing."""
    if device.type == "cpu":
        return cpu_engine()
    return _cuda_engine(device) if device.type == "cuda" else TorchEngine()


@cache
def _cuda_engine(device: torch.device) -> Engine:
    """Triton is imported here, when the first CUDA tensor is updated. Its kernels are for NVIDIA's devices."""
    if torch.version.hip is not None:
        return TorchEngine()
    from holdfast.optim.triton_engine import TritonEngine, problem_on

    problem = problem_on(device)
    if problem is None:
        return TritonEngine()
    _log.warning(
        "No Triton kernels on %s (%s): optimizer steps take plain torch operations, several times slower, with the "
        "same results. Triton comes with torch for CUDA and needs a C compiler.",
        device,
        problem,
    )
    return TorchEngine()
