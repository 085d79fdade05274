"""The ways of training one model that ``step_time.py`` compares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from holdfast import optim
from holdfast.optim.config import OptimConfig, OptimName
from holdfast.parallel.config import ParallelConfig
from holdfast.parallel.zero import ZeroEngine, ZeroOptions
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.model import Decoder, initialise
from holdfast.types import Precision

__all__ = ["PEER", "Way", "ways"]

PEER = "DDP"
LR = 1e-3
_BUCKET = ParallelConfig().bucket_elements


class Way(Protocol):
    """One way to train; building one is collective."""

    def backward(self, tokens: Tensor, targets: Tensor) -> float:
        """Forward and backward; the loss."""
        ...

    def update(self) -> None: ...

    def unseen_bytes(self) -> int:
        """Memory that Python cannot see."""
        ...

    def close(self) -> None: ...


class Plain:
    """torch alone, on one rank or with DistributedDataParallel."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        exchange: bool = True,
        autocast: bool = False,
        fused: bool = False,
    ) -> None:
        model = Decoder(config)
        initialise(model, 0)
        model.to(dtype)
        options, self._autocast = OptimConfig(), autocast
        groups = optim.parameter_groups(model, options)
        first, second = options.betas
        self._optimizer = torch.optim.AdamW(groups, lr=LR, betas=(first, second), eps=options.eps, fused=fused)
        self._net = DistributedDataParallel(model) if exchange else model
        self._clip_at = options.grad_clip

    def backward(self, tokens: Tensor, targets: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            loss = self._net(tokens, targets)
        loss.backward()
        return float(loss.detach())

    def update(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._net.parameters(), self._clip_at)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def unseen_bytes(self) -> int:
        """The buckets in which DDP reduces gradients."""
        if not isinstance(self._net, DistributedDataParallel):
            return 0
        found = self._net._get_ddp_logging_data()  # type: ignore[no-untyped-call]  # torch's own, without annotations
        sizes = str(found["bucket_sizes"])
        return sum(int(size) for size in sizes.split(","))

    def close(self) -> None:
        del self._net, self._optimizer


class Sharded:
    """Holdfast's engine, built as a rank builds it."""

    def __init__(self, config: ModelConfig, *, stage: int, name: OptimName, precision: Precision, batch: int) -> None:
        model = Decoder(config)
        initialise(model, 0)
        options = OptimConfig(name=name)
        block_size = options.block_size if name.is_8bit else 1
        self._engine = ZeroEngine(
            model,
            optim.parameter_groups(model, options),
            lambda groups: optim.build_optimizer(options, groups),
            optim,
            ZeroOptions(stage, precision, batch, 1, options.grad_clip, _BUCKET, block_size),
        )

    def backward(self, tokens: Tensor, targets: Tensor) -> float:
        loss = self._engine.loss(tokens, targets)
        self._engine.backward(loss)
        return float(loss.detach())

    def update(self) -> None:
        self._engine.update(LR)

    def unseen_bytes(self) -> int:
        return 0

    def close(self) -> None:
        self._engine.close()


def ways(config: ModelConfig, precision: Precision, batch: int) -> dict[str, Callable[[], Way]]:
    """How to build every way of one precision."""
    dtype = torch.float32 if precision is Precision.FP32 else torch.bfloat16
    plain = partial(Plain, config, dtype=dtype)
    found: dict[str, Callable[[], Way]] = {
        PEER: plain,
        "DDP, fused": partial(plain, fused=True),
        "no exchange": partial(plain, exchange=False),
    }
    if precision is Precision.BF16:
        found["DDP, autocast"] = partial(Plain, config, dtype=torch.float32, autocast=True)
    for name, word in ((OptimName.ADAMW8BIT, "AdamW8bit"), (OptimName.ADAMW, "AdamW")):
        for stage in range(4):
            found[f"ZeRO {stage}, {word}"] = partial(
                Sharded, config, stage=stage, name=name, precision=precision, batch=batch
            )
    return found
