"""What `adapt_study.py` trains: a byte-level decoder on mixed text, then adapters on it, one domain after the other.

A :class:`World` is one seed: base weights, batches and the order of the domains, which all methods share, so that
differences are paired. A :class:`Way` is a method with its options. Losses are bits per byte of validation text behind
the first half of each window, which those who choose by what they see may look at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import islice
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from adapt_text import ELSEWHERE, Text
from study import Memo
from torch import Tensor, nn

from holdfast.adapters import (
    LossMatrix,
    TaskPlan,
    Trained,
    adapters_of,
    collect_inputs,
    create_method,
    finish_task,
    footprint,
    inject,
    start_task,
    train_task,
    trainable_parameters,
    use_tasks,
)
from holdfast.adapters.forgetting import evaluating
from holdfast.adapters.training import adamw, half_cosine, snapshot
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.model import Decoder, initialise

__all__ = ["ORDERS", "Batch", "Learner", "Run", "Scale", "Study", "Way", "World", "all_bits", "bits", "learn_all"]

ORDERS = (("docs", "python", "arithmetic", "c"), ("c", "arithmetic", "python", "docs"))
"""Even seeds take the first, odd ones the second."""
_INPUT_BATCHES = 8
"""From which InfLoRA learns what a task's inputs are."""

Batch = tuple[Tensor, Tensor]
"""Tokens and targets, int64 [windows, sequence]."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is."""

    name: str
    d_model: int
    layers: int
    d_ff: int
    sequence: int
    """Tokens."""
    sequences: int
    """Of a batch."""
    seeds: int
    base_steps: int
    base_lr: float
    steps: int
    """Of a domain."""
    warm_up: int
    rank: int
    """Of a task's LoRA: as many rows as MoRA gets atoms and Brainstacks experts of rank 1."""
    rates: tuple[float, ...]
    """Common to all methods that have no range of their own."""
    windows: int
    """Of validation, of each kind of text."""
    router_windows: int
    """Of training text, of each domain, whose best stacks are searched for the router; a quarter more is held out."""
    router_width: int
    router_epochs: int
    """At most 8 in the paper, which has a hundred times as many windows."""
    boost_steps: int
    """Of a round."""
    rounds: int
    boost_rates: tuple[float, ...]
    directions: int
    """That the null space protects for each earlier domain."""
    orders: tuple[tuple[str, ...], ...] = ORDERS

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            name=self.name,
            d_model=self.d_model,
            n_layers=self.layers,
            n_heads=4,
            n_kv_heads=4,
            d_ff=self.d_ff,
            max_seq_len=self.sequence,
        )

    @property
    def tasks(self) -> int:
        return len(self.orders[0])

    def __str__(self) -> str:
        return (
            f"{self.name}: width {self.d_model}, {self.layers} layers, base {self.base_steps} steps at "
            f"{self.base_lr:g}, half of them on {ELSEWHERE}, then {self.tasks} domains of {self.steps} steps, all of "
            f"{self.sequences} × {self.sequence} bytes; AdamW, {self.warm_up} steps of warm-up, half a cosine to 0, "
            f"gradients clipped to 1; rank {self.rank} for each task in every linear layer of the blocks; "
            f"{self.windows} windows of validation for each kind of text, of which the second half counts"
        )


@dataclass(frozen=True, kw_only=True)
class Way:
    """A method with its options."""

    name: str
    method: str = ""
    """Empty: full fine-tuning, as a control."""
    options: Mapping[str, Any] = field(default_factory=dict)
    is_averaged: bool = False
    """Task t keeps 1 / t of its change: the model is the mean of what it was after each task."""
    ladder: float = 1.0
    """Factor of the common rates, for methods whose best rates lie elsewhere."""
    below: int = 0
    """Rates more, each half of the one above it, until the best one is not the lowest."""
    above: int = 0
    """Rates more, each twice the one below it."""


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    loss: Tensor = model(*batch)
    return loss


def window_bits(model: nn.Module, batch: Batch) -> Tensor:
    """[2, windows]: bits per byte of each window's first and second half."""
    tokens, targets = batch
    losses = F.cross_entropy(model(tokens).float().transpose(1, 2), targets, reduction="none") / log(2)
    return torch.stack([half.mean(1) for half in losses.chunk(2, dim=1)])


def all_bits(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """[2, windows] of all batches, in evaluation mode."""
    with evaluating(model):
        return torch.cat([window_bits(model, batch) for batch in batches], 1)


def bits(model: nn.Module, batches: Sequence[Batch]) -> float:
    """What everything is measured in."""
    return float(all_bits(model, batches)[1].mean())


class World:
    """One seed."""

    def __init__(self, scale: Scale, texts: Mapping[str, Text], seed: int) -> None:
        self.scale, self.texts, self.seed = scale, texts, seed
        self.order: Sequence[str] = scale.orders[seed % len(scale.orders)]
        self.kinds = [*self.order, ELSEWHERE]
        self.validation = {kind: self.windows(texts[kind].validation, scale.windows, kind) for kind in self.kinds}

    def windows(self, text: Tensor, count: int, key: str, *, share: tuple[float, float] = (0.0, 1.0)) -> list[Batch]:
        """``count`` windows out of a share of the text, in batches of 32; other ones for other seeds and keys."""
        first, last = (int(edge * (len(text) - self.scale.sequence - 1)) for edge in share)
        starts = torch.randint(first, last, (count,), generator=self._draw(f"windows/{key}"))
        return [_cut(text, part, self.scale.sequence) for part in starts.split(32)]

    def batches(self, part: Callable[[int], Tensor], key: str, steps: int) -> Iterator[Batch]:
        """A function of seed and ``key``; ``part(step)`` is the text of a step."""
        draw = self._draw(key)
        for step in range(steps):
            text = part(step)
            starts = torch.randint(len(text) - self.scale.sequence - 1, (self.scale.sequences,), generator=draw)
            yield _cut(text, starts, self.scale.sequence)

    def domain(self, name: str, steps: int | None = None) -> Iterator[Batch]:
        """Batches of a domain, the same for every method."""
        return self.batches(lambda _: self.texts[name].train, name, self.scale.steps if steps is None else steps)

    def _draw(self, key: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}/{key}".encode(), digest_size=6).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

    @cached_property
    def base(self) -> Decoder:
        """Trained on one kind of text in every second step, on the domains in turns in between."""
        scale, domains = self.scale, sorted(self.order)
        model = Decoder(scale.model)
        initialise(model, self.seed)
        kinds = [kind for domain in domains for kind in (ELSEWHERE, domain)]
        batches = self.batches(lambda step: self.texts[kinds[step % len(kinds)]].base, "base", scale.base_steps)
        plan = TaskPlan(
            steps=scale.base_steps,
            optimizer=adamw(scale.base_lr, fused=True),
            schedule=half_cosine(scale.base_steps, scale.warm_up),
        )
        train_task(model, batches, _loss, plan, [*model.parameters()])
        return model

    def plan(self, rate: float, steps: int | None = None, restarts: int = 1) -> TaskPlan:
        """``restarts``: of the schedule, over equal parts of the steps."""
        steps = self.scale.steps if steps is None else steps
        length = steps // restarts
        schedule = half_cosine(length, self.scale.warm_up)
        return TaskPlan(steps=steps, optimizer=adamw(rate, fused=True), schedule=lambda step: schedule(step % length))

    def losses(self, model: nn.Module) -> dict[str, float]:
        """Bits per byte of every kind of text."""
        return {kind: bits(model, batches) for kind, batches in self.validation.items()}


def _cut(text: Tensor, starts: Tensor, length: int) -> Batch:
    windows = torch.stack([text[start : start + length + 1] for start in starts]).long()
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class Learner:
    """One model that learns in one way."""

    def __init__(self, world: World, way: Way, rate: float) -> None:
        self.world, self.way, self.rate = world, way, rate
        self.model = deepcopy(world.base)
        self.learned = list[str]()
        self.bases: Mapping[str, Tensor] = {}
        """Directions that the last task had to leave alone, by layer."""
        if way.method:
            inject(self.model, create_method(way.method, way.options), r"blocks\..*")
        self._order = hashlib.blake2b(digest_size=8)

    def learn(self, domain: str, *, prepare: Callable[[nn.Module], None] | None = None) -> Trained:
        """``prepare`` is called when the task has started."""
        report = self.train(domain, domain, self.world.plan(self.rate), prepare=prepare)
        self.learned.append(domain)
        return report

    def train(
        self,
        domain: str,
        task: str,
        plan: TaskPlan,
        *,
        after: int = 0,
        prepare: Callable[[nn.Module], None] | None = None,
    ) -> Trained:
        """One task, of any name, on a domain, from the batch ``after`` on."""
        if not self.way.method:
            return train_task(self.model, self._batches(domain, plan, after), _loss, plan, [*self.model.parameters()])
        self._look(domain)
        start_task(self.model, task, seed=self.world.seed)
        before = snapshot(trainable_parameters(self.model))
        if prepare is not None:
            prepare(self.model)
        with torch.random.fork_rng([]):
            torch.manual_seed(self.world.seed)
            report = train_task(self.model, self._batches(domain, plan, after), _loss, plan)
        if self.way.is_averaged:
            self._average(before)
        self._look(domain)
        finish_task(self.model)
        return report

    @property
    def batches_digest(self) -> str:
        """Of all that was trained on, in its order."""
        return self._order.hexdigest()

    def _batches(self, domain: str, plan: TaskPlan, after: int) -> Iterator[Batch]:
        for batch in islice(self.world.domain(domain, after + plan.steps), after, None):
            self._order.update(batch[0].numpy().tobytes())
            yield batch

    def _look(self, domain: str) -> None:
        if adapters_of(self.model).method.needs_inputs:
            with collect_inputs(self.model), evaluating(self.model):
                for tokens, _ in islice(self.world.domain(domain), _INPUT_BATCHES):
                    self.model(tokens)

    @torch.no_grad()
    def _average(self, before: Sequence[Tensor]) -> None:
        share = 1 / (len(self.learned) + 1)
        for rows, old in zip(trainable_parameters(self.model), before, strict=True):
            rows.copy_(old.lerp(rows, share))


@dataclass(frozen=True)
class Run:
    """What one learner has come to: JSON."""

    order: Sequence[str]
    views: Mapping[str, Sequence[Mapping[str, float]]]
    """1 + T rows of bits per byte of each kind of text, by the way in which the trained adapters are used."""
    stored: int
    """Elements of adapters; of the base for full fine-tuning."""
    active: int
    batches: str
    extras: Sequence[Any] = ()
    """What else was measured after each task."""

    def matrix(self, view: str = "plain") -> LossMatrix:
        return LossMatrix.of(self.order, self.views[view], ELSEWHERE)


Views = Callable[[Learner], Mapping[str, Mapping[str, float]]]
"""Losses of each kind of text by view, after some tasks."""
Extras = Callable[[Learner], Any]


def plain(learner: Learner) -> dict[str, dict[str, float]]:
    return {"plain": learner.world.losses(learner.model)}


def learn_all(
    world: World,
    way: Way,
    rate: float,
    *,
    views: Views = plain,
    extras: Extras | None = None,
    prepare: Callable[[Learner, str], Callable[[nn.Module], None]] | None = None,
) -> Run:
    """Every domain in the world's order."""
    learner = Learner(world, way, rate)
    base = world.losses(learner.model)
    rows, more = list[Mapping[str, Mapping[str, float]]](), list[Any]()
    for domain in world.order:
        learner.learn(domain, prepare=prepare(learner, domain) if prepare else None)
        rows.append(views(learner))
        if extras is not None:
            more.append(extras(learner))
    return Run(
        order=world.order,
        views={view: [base, *(row[view] for row in rows)] for view in rows[0]},
        **_sizes(learner),
        batches=learner.batches_digest,
        extras=more,
    )


def _sizes(learner: Learner) -> dict[str, int]:
    if not learner.way.method:
        return dict.fromkeys(("stored", "active"), sum(p.numel() for p in learner.model.parameters()))
    if adapters_of(learner.model).method.needs_task:
        use_tasks(learner.model, only=learner.learned[-1])
    found = footprint(learner.model)
    return {"stored": found.stored, "active": found.active}


@dataclass(frozen=True)
class Study:
    """All seeds of one scale."""

    worlds: Sequence[World]
    memo: Memo

    @property
    def scale(self) -> Scale:
        return self.worlds[0].scale

    def of(self, world: World, key: str, make: Callable[[], Any]) -> Any:
        texts = hashlib.blake2b("".join(world.texts[kind].digest for kind in world.kinds).encode(), digest_size=6)
        return self.memo.of(f"seed {world.seed}, {key}, {texts.hexdigest()}, {asdict(world.scale)}", make)

    def runs(self, way: Way, rate: float, **options: Any) -> list[Run]:
        """One per seed; ``options`` as of :func:`learn_all`, always the same ones for a way."""
        found = []
        for world in self.worlds:
            key = f"{way.name} at {rate:g}, {way.method} {dict(way.options)}"
            found.append(Run(**self.of(world, key, lambda: asdict(learn_all(world, way, rate, **options)))))  # noqa: B023
        return found

    def rates(self, way: Way) -> list[float]:
        """That are tried for a way, lowest first."""
        common = [rate * way.ladder for rate in self.scale.rates]
        lower = [common[0] / 2**number for number in range(way.below, 0, -1)]
        return [*lower, *common, *(common[-1] * 2**number for number in range(1, way.above + 1))]
