"""What crossed a stage's two boundaries lately, kept by its neighbours, and what it is good for once the stage is lost.

In training a stage's inputs pass through the rank before it, its outputs through the rank behind it. Each copies what
it sends or receives anyway into a :class:`BoundaryLog`, so that a stage rebuilt approximately can be fitted to what the
lost one answered, alone: :func:`heal`, :func:`fit_gain`. Logs cost memory and a copy, and no traffic.

The paper (CheckFree, arXiv 2506.15461) has no such step. Its released code holds the idea, unused: the ablations fit
a stage in 8 steps to caches that nothing fills, and the method itself in 0.

:func:`angular_distance` tells from one block's input and output how much that block does.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.errors import ConfigurationError

__all__ = ["BoundaryLog", "Healing", "Pair", "angular_distance", "fit_gain", "heal", "pairs"]

Key = tuple[int, int]
"""Step and microbatch."""


@dataclass(slots=True)
class _Entry:
    tensor: Tensor
    dtype: torch.dtype
    """As it was recorded."""

    @property
    def size_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()


class BoundaryLog:
    """Copies of the newest tensors at one side of one stage, in at most ``limit_bytes``.

    ``dtype``, say ``torch.bfloat16``, is what floating-point tensors are kept in; they come back in their own. Memory
    of an entry that has to go is used again for a new one of its kind, so that a log that has filled up allocates
    nothing. Not for several threads.
    """

    def __init__(self, limit_bytes: int, dtype: torch.dtype | None = None) -> None:
        if limit_bytes < 1:
            raise ConfigurationError(f"limit_bytes={limit_bytes} of a boundary log must be at least 1")
        if dtype is not None and not dtype.is_floating_point:
            raise ConfigurationError(f"a boundary log cannot keep hidden states as {dtype}; use torch.bfloat16")
        self._limit_bytes, self._dtype = limit_bytes, dtype
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        """Oldest first."""
        self.size_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Key]:
        """(step, microbatch) of what is held, in the order it was recorded."""
        return iter(tuple(self._entries))

    def record(self, step: int, microbatch: int, tensor: Tensor) -> None:
        """Copy ``tensor``; the oldest ones go where room is needed. A step made again replaces what it left before.

        Raises: ConfigurationError for a tensor that is larger than the whole log.
        """
        kept_as = self._dtype if self._dtype is not None and tensor.is_floating_point() else tensor.dtype
        size_bytes = tensor.numel() * kept_as.itemsize
        if size_bytes > self._limit_bytes:
            raise ConfigurationError(
                f"a boundary tensor {list(tensor.shape)} of {kept_as} needs {size_bytes:,} bytes, the log has "
                f"{self._limit_bytes:,}; give it room for a few, or keep bfloat16"
            )
        freed = [self._drop(key) for key in ((step, microbatch),) if key in self._entries]
        while self.size_bytes + size_bytes > self._limit_bytes:
            freed.append(self._drop(next(iter(self._entries))))
        room = next((old for old in freed if _is_alike(old, tensor, kept_as)), None)
        del freed  # before anything is allocated
        if room is None:
            room = torch.empty(tensor.shape, dtype=kept_as, device=tensor.device)
        self._entries[step, microbatch] = _Entry(room.copy_(tensor.detach()), tensor.dtype)
        self.size_bytes += size_bytes

    def get(self, step: int, microbatch: int) -> Tensor:
        """What was recorded, in its own dtype. Read it before anything else is recorded, which may overwrite it.

        Raises: KeyError for what is not held.
        """
        entry = self._entries[step, microbatch]
        return entry.tensor.to(entry.dtype)

    def forget_oldest(self) -> None:
        """For whoever counts in something else than bytes."""
        if self._entries:
            self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        self._entries.clear()
        self.size_bytes = 0

    def _drop(self, key: Key) -> Tensor:
        entry = self._entries.pop(key)
        self.size_bytes -= entry.size_bytes
        return entry.tensor


def _is_alike(old: Tensor, tensor: Tensor, dtype: torch.dtype) -> bool:
    return old.shape == tensor.shape and old.dtype == dtype and old.device == tensor.device


@dataclass(frozen=True, slots=True)
class Pair:
    """What a stage was given, and what it answered."""

    key: Key
    inputs: Tensor
    outputs: Tensor


def pairs(inputs: BoundaryLog, outputs: BoundaryLog) -> list[Pair]:
    """What both logs hold of one step and microbatch, oldest first.

    A stage learns while it is logged: old pairs are answers of older weights, so short logs heal better than their
    length suggests. Tensors are as :meth:`BoundaryLog.get` gives them.
    """
    return [Pair(key, inputs.get(*key), outputs.get(*key)) for key in sorted(set(inputs) & set(outputs))]


@dataclass(frozen=True, slots=True)
class Healing:
    """What fitting a stage came to. Losses are of the pairs held out: mean squared error over the outputs' variance."""

    before: float
    fitted: float
    """With the fitted weights, whether they were kept or not; NaN if the fit was given up."""
    is_kept: bool
    """Otherwise the stage has the weights it had."""
    steps: int
    """Updates made."""
    reason: str

    @property
    def after(self) -> float:
        """The loss of the stage as it is left."""
        return self.fitted if self.is_kept else self.before


def heal(
    stage: nn.Module,
    pairs: Sequence[Pair],
    *,
    steps: int,
    lr: float,
    pairs_per_step: int = 1,
    held_out: float = 0.25,
    seed: int = 0,
) -> Healing:
    """Fit a rebuilt stage to what the lost one answered, and keep the result where it is better.

    ``stage`` maps one tensor to one tensor; adjacent lost stages are one module that runs them in turn, healed between
    the outer two boundaries. Adam makes ``steps`` updates of fp32 copies of the trainable parameters, its rate
    falling linearly from ``lr`` to 0, on pairs drawn by ``seed``. The share ``held_out`` of the pairs, at least
    one, is not trained on, and decides. The stage runs in evaluation mode, without dropout; only its parameters'
    values can change, and only all together at the end. No gradient is left behind, inside or outside, and no random
    state is touched. A loss or gradient that is not finite ends the fit.

    Raises: ConfigurationError for fewer than two pairs, outputs of another shape, and options outside of their range.
    """
    if problems := _problems(pairs, steps, lr, pairs_per_step, held_out):
        raise ConfigurationError(problems)
    generator = torch.Generator().manual_seed(seed)
    judges, teachers = _split(pairs, held_out, generator)
    with _evaluating(stage):
        fit = _Fit(stage)
        before = fit.loss(judges)
        made = fit.run(_draws(teachers, steps, pairs_per_step, generator), lr, steps)
        if made < steps:
            return Healing(before, math.nan, False, made, f"the fit was not finite at update {made + 1} of {steps}")
        return _judged(fit, before, judges, made)


def fit_gain(
    stage: nn.Module, pairs: Sequence[Pair], *, output_suffixes: Sequence[str], held_out: float = 0.25, seed: int = 0
) -> Healing:
    """Scale what a rebuilt stage adds to the residual stream by one number, and keep that where it is better.

    The number is the least-squares one of ``outputs - inputs`` on ``stage(inputs) - inputs``, at least 0, over the
    pairs that are not held out, drawn as in :func:`heal`. Matrices whose names end in ``output_suffixes`` are
    multiplied by it: all that write to the stream. Where these are linear and alone that is the best gain there is;
    several in turn also see each other's change, which the pairs held out judge. It costs a forward pass over the
    pairs and no update. In neither the paper nor its code.

    Raises: ConfigurationError as :func:`heal`, and for suffixes of no trainable parameter.
    """
    if problems := _problems(pairs, 1, 1.0, 1, held_out):
        raise ConfigurationError(problems)
    judges, teachers = _split(pairs, held_out, torch.Generator().manual_seed(seed))
    with _evaluating(stage):
        fit = _Fit(stage)
        before = fit.loss(judges)
        gain = fit.gain(teachers)
        if not math.isfinite(gain):
            return Healing(before, math.nan, False, 0, f"the least-squares gain is {gain}, which is not finite")
        fit.scale(max(0.0, gain), output_suffixes)
        return _judged(fit, before, judges, 1)


def _split(pairs: Sequence[Pair], held_out: float, generator: torch.Generator) -> tuple[list[Pair], list[Pair]]:
    """Pairs that judge, and those that teach."""
    order = torch.randperm(len(pairs), generator=generator).tolist()
    n_judges = min(len(pairs) - 1, max(1, round(held_out * len(pairs))))
    return [pairs[i] for i in order[:n_judges]], [pairs[i] for i in order[n_judges:]]


def _judged(fit: _Fit, before: float, judges: Sequence[Pair], made: int) -> Healing:
    fitted = fit.loss(judges)
    is_kept = fitted < before
    if is_kept:
        fit.keep()
    verdict = "lower" if is_kept else "no lower"
    return Healing(
        before, fitted, is_kept, made, f"the loss on {len(judges)} pair(s) held out is {verdict} than before"
    )


def _problems(pairs: Sequence[Pair], steps: int, lr: float, pairs_per_step: int, held_out: float) -> list[str]:
    found = []
    if len(pairs) < 2:
        found.append(f"{len(pairs)} pair(s) of inputs and outputs: healing needs one to learn from and one to judge by")
    if steps < 1 or pairs_per_step < 1:
        found.append(f"steps={steps} and pairs_per_step={pairs_per_step} must be at least 1")
    if not (lr > 0 and math.isfinite(lr)):
        found.append(f"lr={lr} must be positive and finite, for example 1e-3")
    if not 0.0 <= held_out < 1.0:
        found.append(f"held_out={held_out} must be at least 0 and below 1")
    return found


def _draws(teachers: Sequence[Pair], steps: int, size: int, generator: torch.Generator) -> Iterator[list[Pair]]:
    """``steps`` batches; every pair is drawn once before any is drawn again."""
    queue: list[Pair] = []
    for _ in range(steps):
        while len(queue) < size:
            queue += [teachers[i] for i in torch.randperm(len(teachers), generator=generator).tolist()]
        yield queue[:size]
        del queue[:size]


class _Fit:
    """The stage with fp32 copies in the place of its parameters."""

    def __init__(self, stage: nn.Module) -> None:
        self._stage = stage
        self._params = {name: p for name, p in stage.named_parameters() if p.requires_grad}
        if not self._params:
            raise ConfigurationError("the stage has no trainable parameter, so there is nothing to heal")
        self._masters = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32)).clone().requires_grad_()
            for name, p in self._params.items()
        }

    @torch.no_grad()
    def loss(self, pairs: Sequence[Pair]) -> float:
        return sum(float(self._loss(pair)) for pair in pairs) / len(pairs)

    @torch.enable_grad()  # healing happens between steps, where gradients may be off
    def run(self, batches: Iterator[list[Pair]], lr: float, steps: int) -> int:
        """Updates made; fewer than ``steps`` when a loss or gradient was not finite."""
        masters = list(self._masters.values())
        optimizer = torch.optim.Adam(masters, lr=lr)
        for made, batch in enumerate(batches):
            loss = torch.stack([self._loss(pair) for pair in batch]).mean()
            # Not loss.backward(), which would also reach what the stage borrows from outside of itself.
            grads = torch.autograd.grad(loss, masters, allow_unused=True)
            if not all(_is_finite(each) for each in (loss, *grads) if each is not None):
                return made
            for master, grad in zip(masters, grads, strict=True):
                master.grad = grad
            optimizer.param_groups[0]["lr"] = lr * (1.0 - made / steps)
            optimizer.step()
        return steps

    @torch.no_grad()
    def keep(self) -> None:
        for name, param in self._params.items():
            param.copy_(self._masters[name])

    @torch.no_grad()
    def gain(self, pairs: Sequence[Pair]) -> float:
        """Below 0 where what the stage adds points the wrong way; 1 for a stage that adds nothing."""
        product = square = 0.0
        for pair in pairs:
            inputs = pair.inputs.double()
            added = self._answer(pair).double() - inputs
            product += float((added * (pair.outputs.double() - inputs)).sum())
            square += float(added.square().sum())
        return product / square if square else 1.0

    @torch.no_grad()
    def scale(self, gain: float, suffixes: Sequence[str]) -> None:
        found = [master for name, master in self._masters.items() if name.endswith(tuple(suffixes))]
        if not found:
            raise ConfigurationError(f"no trainable parameter of the stage ends in {list(suffixes)}: nothing to scale")
        for master in found:
            master.mul_(gain)

    def _loss(self, pair: Pair) -> Tensor:
        out = self._answer(pair)
        wide = torch.promote_types(out.dtype, torch.float32)
        target = pair.outputs.to(wide)
        return (out.to(wide) - target).square().mean() / target.var(correction=0).clamp_min(_LEAST_VARIANCE)

    def _answer(self, pair: Pair) -> Tensor:
        weights = {name: master.to(self._params[name].dtype) for name, master in self._masters.items()}
        out: Tensor = torch.func.functional_call(self._stage, weights, (pair.inputs,))
        if out.shape != pair.outputs.shape:
            raise ConfigurationError(
                f"the stage answers {list(out.shape)} to step {pair.key[0]}, microbatch {pair.key[1]}; "
                f"logged are outputs {list(pair.outputs.shape)}: the logs are not of this stage"
            )
        return out


_LEAST_VARIANCE = 1e-12
"""Outputs that are all alike are no reason to divide by zero."""


def _is_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


@contextmanager
def _evaluating(stage: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in stage.modules()]
    stage.eval()
    try:
        yield
    finally:
        for module, is_training in modes:
            module.training = is_training


def angular_distance(inputs_BTD: Tensor, outputs_BTD: Tensor, *, is_last_token_only: bool = False) -> float:
    """The mean angle between hidden states before and after a block, in half turns: 0 for a block that only scales.

    Computed in fp32, in [0, 1]; 0.5 where one state is zero and the other is not. Blocks with a low distance are
    redundant: leaving them out, or rebuilding them badly, costs little. The source looks at the last token of each
    sequence only.

    Shapes: both [B, T, D]. Raises: ConfigurationError for other shapes.
    Source: arXiv 2403.17887, section 3.2.
    """
    if inputs_BTD.shape != outputs_BTD.shape or inputs_BTD.ndim != 3 or not inputs_BTD.numel():
        raise ConfigurationError(
            f"hidden states {list(inputs_BTD.shape)} and {list(outputs_BTD.shape)} must have one shape [B, T, D]"
        )
    first_token = -1 if is_last_token_only else 0
    u_BTD, v_BTD = (F.normalize(x_BTD[:, first_token:].detach().float(), dim=-1) for x_BTD in (inputs_BTD, outputs_BTD))
    # arccos of the cosine loses half of the digits where states are nearly parallel, which most blocks' are.
    # The angle of two unit vectors is also 2 atan2(|u - v|, |u + v|), exact everywhere (Kahan).
    half_BT = torch.atan2((u_BTD - v_BTD).norm(dim=-1), (u_BTD + v_BTD).norm(dim=-1))
    return float((half_BT * (2.0 / math.pi)).clamp_max(1.0).mean())
