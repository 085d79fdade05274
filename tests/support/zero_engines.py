"""Small sharded engines, and the same training in one process without DeepSpeed."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from holdfast import optim
from holdfast.optim.config import OptimConfig, OptimName
from holdfast.parallel.comms import TorchCommunicator
from holdfast.parallel.zero import ZeroEngine, ZeroOptions
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.model import Decoder, initialise
from holdfast.types import Precision, SliceSpec, StateSlice
from tests.support.local_cluster import Member

__all__ = [
    "BLOCK",
    "Plain",
    "Setup",
    "copy_of",
    "join",
    "live_bytes",
    "put_back",
    "ragged_steps",
    "text",
    "whole_state",
]

BLOCK = 64
_SHAPES = [(37, 29), (300,), (7,), (513, 3), (1,), (64, 16), (5, 5, 5), (65,)]
"""Elements: 1073, 300, 7, 1539, 1, 1024, 125, 65. One is a multiple of the block."""


class _Part(nn.Module):
    """A parameter whose gradient at a step is a tensor of small multiples of 6.

    Means over 1, 2 and 3 ranks of it are exact in bf16, whatever the order of summation.
    """

    def __init__(self, number: int, shape: tuple[int, ...]) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(number)
        self.weight = nn.Parameter(torch.randn(shape, generator=draw))
        self._number = number

    def gradient(self, step: int) -> Tensor:
        draw = torch.Generator().manual_seed(1000 * step + self._number)
        return 6.0 * torch.randint(-7, 8, self.weight_shape, generator=draw)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return _SHAPES[self._number]

    def forward(self, step: int) -> Tensor:
        return (self.weight * self.gradient(step).to(self.weight.dtype)).float().sum()


class _Ragged(nn.Module):
    """Parameters of awkward sizes, with gradients that are known beforehand."""

    def __init__(self, has_embedding: bool) -> None:
        super().__init__()
        self.parts = nn.ModuleList(_Part(number, shape) for number, shape in enumerate(_SHAPES))
        self.embedding = optim.StableEmbedding(31, 20, padding_idx=3) if has_embedding else None

    def forward(self, tokens: Tensor, _: Tensor) -> Tensor:
        step = int(tokens[0, 0])
        loss = torch.stack([part(step) for part in self.parts]).sum()
        if self.embedding is None:
            return loss
        rows: Tensor = self.embedding(torch.arange(step, step + 5))
        return loss + (rows * torch.arange(100.0).view(5, 20)).sum()


def text(step: int, *, batch: int = 12, length: int = 16) -> tuple[Tensor, Tensor]:
    """Tokens and targets of a step, the same on every rank."""
    draw = torch.Generator().manual_seed(step)
    drawn = torch.randint(0, 256, (batch, length + 1), generator=draw)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


@dataclass(frozen=True)
class Setup:
    """What to build."""

    stage: int
    precision: Precision = Precision.FP32
    optimizer: OptimName = OptimName.ADAMW8BIT
    options: tuple[tuple[str, object], ...] = ()
    """Of the optimizer."""
    is_ragged: bool = True
    """A model with known gradients, or a decoder."""
    has_embedding: bool = False
    """The ragged model has a stable embedding, too. Its gradients are equal on all ranks, so that means are exact over
    two of them."""
    d_model: int = 48
    """Of the decoder."""
    lr: float = 0.01
    accumulation: int = 2
    grad_clip: float = 0.0
    bucket_elements: int = 1000
    """Smaller than the largest parameter, so that there are several buckets."""

    def model(self) -> nn.Module:
        if self.is_ragged:
            torch.manual_seed(0)
            return _Ragged(self.has_embedding)
        shape = ModelConfig(
            d_model=self.d_model, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=2 * self.d_model, max_seq_len=64
        )
        decoder = Decoder(shape)
        initialise(decoder, 0)
        return decoder

    @property
    def config(self) -> OptimConfig:
        betas = [0.9, 0.95, 0.999] if self.optimizer.kind == "ademamix" else [0.9, 0.95]
        return OptimConfig(
            name=self.optimizer,
            lr=self.lr,
            betas=betas,
            block_size=BLOCK,
            min_8bit_size=256,
            weight_decay=0.1,
            options=dict(self.options),
        )

    def groups(self, model: nn.Module) -> list[dict[str, object]]:
        return optim.parameter_groups(model, self.config)

    def build(self) -> ZeroEngine:
        """Collective."""
        model = self.model()
        return ZeroEngine(
            model,
            self.groups(model),
            lambda groups: optim.build_optimizer(self.config, groups),
            optim,
            ZeroOptions(
                stage=self.stage,
                precision=self.precision,
                micro_batch=1,
                accumulation=self.accumulation,
                grad_clip=self.grad_clip,
                bucket_elements=self.bucket_elements,
                block_size=BLOCK if self.optimizer.is_8bit else 1,
            ),
        )


def join(member: Member, name: str = "epoch", *, rank: int | None = None, world: int = 0) -> TorchCommunicator:
    """Collective. As the rank it has in the cluster, with all ranks, unless something else is said."""
    return TorchCommunicator.join(
        member.rendezvous(name),
        rank=member.rank if rank is None else rank,
        world=world or member.world,
        backend="gloo",
        timeout_s=20.0,
    )


def ragged_steps(engine: ZeroEngine, setup: Setup, steps: range) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step. The microbatches of a step are equal."""
    found = []
    for step in steps:
        tokens = torch.full((1, 1), step)
        for _ in range(setup.accumulation):
            loss = engine.loss(tokens, tokens)
            engine.backward(loss)
        found.append((float(loss.detach()), engine.update(setup.lr)))
    return found


def copy_of(slices: Sequence[StateSlice]) -> list[tuple[SliceSpec, Tensor]]:
    return [(s.spec, s.tensor.clone()) for s in slices]


def put_back(engine: ZeroEngine, whole: Mapping[str, Tensor], scalars: Mapping[str, object]) -> None:
    """Collective. Give every slice its part of the whole state."""
    for held in engine.slices():
        held.tensor.copy_(whole[held.spec.name].view(-1)[held.spec.start : held.spec.stop])
    engine.load_scalars(scalars)
    engine.refresh()


def whole_state(held: Sequence[Sequence[tuple[SliceSpec, Tensor]]]) -> dict[str, Tensor]:
    """All ranks' slices put together; every element must be held, and by all who hold it alike."""
    whole: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for spec, tensor in (entry for rank in held for entry in rank):
        assert tensor.numel() == spec.stop - spec.start, spec
        assert str(tensor.dtype) == f"torch.{spec.dtype}", spec
        total = torch.Size(spec.shape).numel()
        place = whole.setdefault(spec.name, torch.zeros(total, dtype=tensor.dtype))
        count = counts.setdefault(spec.name, torch.zeros(total, dtype=torch.int64))
        seen = count[spec.start : spec.stop] > 0
        assert torch.equal(place[spec.start : spec.stop][seen], tensor[seen]), spec
        place[spec.start : spec.stop] = tensor
        count[spec.start : spec.stop] += 1
    for name, count in counts.items():
        assert int(count.min()) == int(count.max()) >= 1, f"{name}: {count.tolist()}"
    return whole


def live_bytes() -> int:
    """Of all tensors that Python can reach, each storage once. Frozen ones, see ``gc.freeze``, do not count."""
    gc.collect()
    found = [o for o in gc.get_objects() if isinstance(o, Tensor)]
    found += [t.grad for t in found if t.is_leaf and t.grad is not None]
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in found)}.values())


class Plain:
    """One process, no DeepSpeed: fp32 masters with the optimizer of ``setup``, weights that are a cast of them."""

    def __init__(self, setup: Setup) -> None:
        self._setup, self.model = setup, setup.model()
        if setup.precision is Precision.BF16:
            self.model.to(torch.bfloat16)
        self._masters = {n: nn.Parameter(p.detach().float().clone()) for n, p in self.model.named_parameters()}
        exact = [
            self._masters[f"{name}.weight"]
            for name, part in self.model.named_modules()
            if isinstance(part, optim.StableEmbedding)
        ]
        groups = optim.parameter_groups(self._masters.items(), setup.config, exact)
        self._optimizer = optim.build_optimizer(setup.config, groups)
        optim.ensure_state(self._optimizer)

    def step(self, microbatches: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Mean loss, and the norm before clipping."""
        total = 0.0
        for tokens, targets in microbatches:
            loss = self.model(tokens, targets) / len(microbatches)
            loss.backward()
            total += float(loss.detach())
        weights = dict(self.model.named_parameters())
        for name, master in self._masters.items():
            master.grad = cast(Tensor, weights[name].grad).float()
            weights[name].grad = None
        norm = torch.nn.utils.clip_grad_norm_(self._masters.values(), self._setup.grad_clip or float("inf"))
        self._optimizer.step()
        with torch.no_grad():
            for name, master in self._masters.items():
                weights[name].copy_(master)
        return total, float(norm)

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.view(-1) for name, tensor in self._tensors()}

    def weights(self) -> dict[str, Tensor]:
        return {name: master.detach() for name, master in self._masters.items()}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, master in self._masters.items():
            yield f"{name}/master", master.detach()
            for kept in optim.describe_state(self._optimizer, master):
                yield f"{name}/{kept.key}", kept.tensor
