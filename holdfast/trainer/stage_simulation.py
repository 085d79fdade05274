"""All stages of a pipeline in one process, with stages that die: what a way of rebuilding them costs in training.

The same partition, routes, repairs and healing as between processes; only messages are missing. Failures and batches
come from outside, so that every method meets the same ones. A stage that fails is destroyed first: its weights and
moments become NaN, so that whatever reads them shows, and what it has logged of its neighbours is gone.

Source: CheckFree and CheckFree+, arXiv 2506.15461, sections 4.2, 4.3 and 5; failures happen at the start of a step.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast import optim
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.boundary_log import BoundaryLog, Healing, Pair, angular_distance, fit_gain, heal, pairs
from holdfast.fault_tolerance.stage_policy import MomentRepair, Repair, StageRepair, plan_repair, rate_factor
from holdfast.fault_tolerance.stage_repair import (
    GradientNorms,
    average,
    previous_share,
    rebuild,
    rebuild_moments,
    share_across,
)
from holdfast.optim.config import OptimConfig
from holdfast.parallel.partition import equal
from holdfast.parallel.schedule import one_f_one_b
from holdfast.trainer.config import ModelConfig
from holdfast.trainer.model import RESIDUAL_OUTPUTS, Decoder, initial_weight, initialise
from holdfast.trainer.stage_method import Method

__all__ = ["Failure", "Rebuilt", "StageSimulation", "draw_failures"]

_LOG_BYTES = 64 << 20

Batch = Sequence[tuple[Tensor, Tensor]]
"""Tokens and targets, int64 [B, T], of every microbatch of a step."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Stages that are lost together before the step that follows ``step`` finished ones."""

    step: int
    stages: tuple[int, ...]


def draw_failures(rate: float, *, steps: int, stages: int, seed: int, immune: Collection[int] = ()) -> list[Failure]:
    """Each stage fails before each step but the first with probability ``rate``. Drawn for ``immune`` stages too, so
    that methods with other immune stages meet the same failures of the rest."""
    draw = torch.Generator().manual_seed(seed)
    hits = torch.rand(steps, stages, generator=draw) < rate
    mortal = [stage for stage in range(stages) if stage not in immune]
    found = [(step, tuple(stage for stage in mortal if hits[step, stage])) for step in range(1, steps)]
    return [Failure(step, lost) for step, lost in found if lost]


@dataclass(frozen=True, slots=True)
class Rebuilt:
    """One recovery."""

    step: int
    stage: int
    repair: Repair
    sources: tuple[int, ...]
    gain: Healing | None
    healing: Healing | None
    """Both are one for all stages of a gap; None without a plan, or without enough pairs."""


@dataclass
class _History:
    recoveries: int = 0
    last_step: int = 0


class _Chain(nn.Module):
    """The blocks of a stage, or of adjacent ones."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.layers:
            hidden = block(hidden)
        return hidden


class _Logs:
    """What goes into each stage, kept by the one before it, and what comes out, kept by the one behind."""

    def __init__(self, stages: int) -> None:
        self._inputs, self._outputs = ([BoundaryLog(_LOG_BYTES) for _ in range(stages)] for _ in range(2))

    def record(self, stage: int, key: tuple[int, int], hidden: Tensor, out: Tensor, *, limit: int) -> None:
        for log, tensor in ((self._inputs[stage], hidden), (self._outputs[stage], out)):
            log.record(*key, tensor)
            while len(log) > limit:  # logs are bounded by bytes; here, by microbatches
                log.forget_oldest()

    def lose(self, stage: int) -> None:
        """What the stage itself kept."""
        for log in (*self._outputs[max(0, stage - 1) : stage], *self._inputs[stage + 1 : stage + 2]):
            log.clear()

    def forget(self, stage: int) -> None:
        """What others kept of the stage, which is another one now."""
        self._inputs[stage].clear()
        self._outputs[stage].clear()

    def pairs(self, stages: Sequence[int]) -> list[Pair]:
        """What went into the first and came out of the last of adjacent stages."""
        return pairs(self._inputs[stages[0]], self._outputs[stages[-1]])


class StageSimulation:
    """A decoder whose stages can be destroyed and rebuilt between steps. Deterministic in everything given.

    ``batch_of`` is a pure function of the number of steps whose result counts, which a rollback lowers. With
    ``is_joined`` microbatches of one route, which must have one shape, go through together: the same gradients up to
    rounding, in less time. Raises: ConfigurationError for stages that do not divide the layers, and for swapped routes
    without four stages.
    """

    def __init__(
        self,
        model: ModelConfig,
        optimizer: OptimConfig,
        method: Method,
        *,
        stages: int,
        microbatches: int,
        batch_of: Callable[[int], Batch],
        learning_rate: Callable[[int], float],
        seed: int = 0,
        is_joined: bool = False,
    ) -> None:
        self.model, self.method, self.seed = Decoder(model), method, seed
        initialise(self.model, seed)
        self._config, self._batch_of, self._learning_rate = optimizer, batch_of, learning_rate
        partition = equal(model.n_layers, processes=stages)
        self._blocks = [stage.blocks for stage in partition.stages]
        routes = one_f_one_b(stages, microbatches, swapped=method.swapped).layout.routes
        self._groups = _groups([tuple(route) for route in routes], is_joined)
        self._chains = [_Chain([self.model.blocks[number] for number in blocks]) for blocks in self._blocks]
        self._optimizers = [self._optimizer(chain) for chain in self._chains]
        ends = nn.ModuleList([self.model.embedding, self.model.head])
        self._ends = self._optimizer(ends)
        self.norms = GradientNorms(optimizer.grad_clip)
        self._histories = [_History() for _ in range(stages)]
        self._logs = _Logs(stages)
        self.step = 0
        """Steps whose result counts."""
        self.executed = 0
        """Steps made, those that were lost included."""
        self.rebuilt: list[Rebuilt] = []
        self._saved: dict[str, Any] = {}
        self._own_copies: list[dict[str, Tensor]] = []
        """Weights of each stage, from a while ago."""
        self._copy_first()

    @property
    def stages(self) -> int:
        return len(self._chains)

    # -- training -------------------------------------------------------------------------------------------------

    def train_step(self) -> float:
        """Mean loss of the step, nats per target."""
        total = 0.0
        batch = self._batch_of(self.step)
        for route, members in self._groups:
            loss = self._through(route, members, batch) * len(members)
            (loss / len(batch)).backward()  # type: ignore[no-untyped-call]  # torch: untyped
            total += float(loss.detach())
        self._update()
        self.step, self.executed = self.step + 1, self.executed + 1
        self._copy_when_due()
        return total / len(batch)

    def fork(self, method: Method) -> StageSimulation:
        """A copy that goes on alone, by another method, with the old copies of stages that it has.

        Raises: ConfigurationError for a method of other routes.
        """
        if method.swapped != self.method.swapped:
            raise ConfigurationError(f"swapped={method.swapped}: routes are chosen at the start; build another one")
        shared = (self._batch_of, self._learning_rate)
        made = copy.deepcopy(self, {id(function): function for function in shared})
        made.method = method
        made._copy_first()
        return made

    def _copy_first(self) -> None:
        if self.method.rollback_every:
            self._save()
        if self.method.own_copy and not self._own_copies:
            self._copy_stages()

    def _copy_when_due(self) -> None:
        method = self.method
        if method.rollback_every and self.executed % method.rollback_every == 0:
            self._save()
        if method.own_copy and self.executed % method.own_copy.every == 0:
            self._copy_stages()

    @torch.no_grad()
    def validate(self, batch: Batch) -> float:
        """Mean loss, always along the model."""
        return sum(float(self.model(tokens, targets)) for tokens, targets in batch) / len(batch)

    @torch.no_grad()
    def redundancy(self, batch: Batch) -> list[float]:
        """Angular distance between what goes into each stage and what comes out, averaged over the microbatches; a
        stage with a small one can be done without, or rebuilt badly, at little cost. Source: arXiv 2403.17887."""
        sums = [0.0] * self.stages
        for tokens, _ in batch:
            hidden = self.model.embedding(tokens)
            for number, chain in enumerate(self._chains):
                out = chain(hidden)
                sums[number] += angular_distance(hidden, out) / len(batch)
                hidden = out
        return sums

    def _through(self, route: Sequence[int], members: Sequence[int], batch: Batch) -> Tensor:
        tokens, targets = (torch.cat([batch[number][side] for number in members]) for side in (0, 1))
        hidden = self.model.embedding(tokens)
        for stage in route:
            out = self._chains[stage](hidden)
            self._log(stage, members, hidden, out)
            hidden = out
        logits = self.model.head(hidden).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def _log(self, stage: int, members: Sequence[int], hidden: Tensor, out: Tensor) -> None:
        if (plan := self.method.healing) is None:
            return
        split = (joined.chunk(len(members)) for joined in (hidden, out))
        for microbatch, own_hidden, own_out in zip(members, *split, strict=True):
            self._logs.record(stage, (self.executed, microbatch), own_hidden, own_out, limit=plan.logged)

    def _update(self) -> None:
        squares = [_square(chain.parameters()) for chain in self._chains]
        whole = math.sqrt(sum(squares) + _square(self._end_parameters()))
        alone = self.method.clips_each_stage
        for stage, (chain, square) in enumerate(zip(self._chains, squares, strict=True)):
            norm = math.sqrt(square)
            self.norms.record(stage, norm, clipped_by=None if alone else whole)
            self._clip(chain.parameters(), norm if alone else whole)
        self._clip(self._end_parameters(), math.sqrt(_square(self._end_parameters())) if alone else whole)
        rate = self._learning_rate(self.step)
        for stage, optimizer in enumerate(self._optimizers):
            _step(optimizer, rate * self._rate_factor(stage))
        _step(self._ends, rate)

    def _clip(self, parameters: Iterator[nn.Parameter], norm: float) -> None:
        clip = self._config.grad_clip
        factor = min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def _end_parameters(self) -> Iterator[nn.Parameter]:
        yield from nn.ModuleList([self.model.embedding, self.model.head]).parameters()  # a tied table once

    def _rate_factor(self, stage: int) -> float:
        method, history = self.method, self._histories[stage]
        since = self.step - history.last_step
        return rate_factor(
            method.rate, method.rate_mode, history.recoveries, steps_since=since, decay_steps=method.decay_steps
        )

    def _optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return optim.build_optimizer(self._config, optim.parameter_groups(module, self._config))

    # -- failures -------------------------------------------------------------------------------------------------

    def fail(self, lost: Sequence[int]) -> list[Rebuilt]:
        """Destroy these stages and do what the method does about it.

        Raises: ConfigurationError with the reasons when the method cannot rebuild them; they are destroyed by then.
        """
        if self.method.repair is Repair.EXACT:
            return []
        for stage in lost:
            self._destroy(stage)
        if self.method.rollback_every:
            self._roll_back()
            return []
        plan = plan_repair(
            [len(blocks) for blocks in self._blocks],
            lost,
            wish=self.method.repair,
            end_pairs=self.method.end_pairs,
            gaps=self.method.gaps,
        )
        if not plan.is_complete:
            raise ConfigurationError([refusal.reason for refusal in plan.refusals])
        for repair in plan.repairs:
            self._rebuild(repair)
        fits = {stage: fit for gap in _adjacent(lost) for fit in [self._fit(gap)] for stage in gap}
        found = [Rebuilt(self.step, each.stage, each.repair, each.sources, *fits[each.stage]) for each in plan.repairs]
        self.rebuilt += found
        return found

    @torch.no_grad()
    def _destroy(self, stage: int) -> None:
        self._logs.lose(stage)
        for parameter in self._chains[stage].parameters():
            parameter.fill_(math.nan)
            parameter.grad = None
        if self.method.moments is MomentRepair.EXACT:
            return  # a copy of them, though not of the weights, is held elsewhere
        for state in self._optimizers[stage].state.values():
            for value in state.values():
                if isinstance(value, Tensor) and value.is_floating_point():
                    value.fill_(math.nan)

    def _rebuild(self, repair: StageRepair) -> None:
        stage, chain, share = repair.stage, self._chains[repair.stage], self._share(repair)
        weights = rebuild(
            repair.repair,
            dict(chain.named_parameters()),
            [dict(self._chains[source].named_parameters()) for source in repair.sources],
            share=share,
            initial=self._initial(stage),
            output_suffixes=RESIDUAL_OUTPUTS,
        )
        if own := self.method.own_copy:
            weights = average(self._own_copies[stage], weights, own.share)
        with torch.no_grad():
            for name, parameter in chain.named_parameters():
                parameter.copy_(weights[name])
        self._renew_optimizer(repair, share)
        self._histories[stage] = _History(self._histories[stage].recoveries + 1, self.step)

    def _share(self, repair: StageRepair) -> float:
        """Of the first source in an average."""
        if repair.repair not in (Repair.CHECKFREE, Repair.UNIFORM):
            return 0.5
        first, second = repair.sources
        share = 0.5
        if repair.repair is Repair.CHECKFREE:
            before, behind = (self.norms.get(source, self.method.weighting) for source in (first, second))
            share = previous_share(before, behind, self.method.weighting)
        return share_across(share, repair.stage, (first, second))

    def _initial(self, stage: int) -> Callable[[str, Sequence[int]], Tensor]:
        """Fresh weights, other ones at every recovery."""
        seed = self.seed + 1 + self._histories[stage].recoveries

        def make(name: str, shape: Sequence[int]) -> Tensor:
            _, layer, rest = name.split(".", 2)
            number = self._blocks[stage][int(layer)]
            return initial_weight(f"blocks.{number}.{rest}", shape, seed=seed, n_layers=self.model.config.n_layers)

        return make

    def _renew_optimizer(self, repair: StageRepair, share: float) -> None:
        stage, how = repair.stage, self.method.moments
        if how is MomentRepair.EXACT:
            return
        self._optimizers[stage] = self._optimizer(self._chains[stage])
        if how is MomentRepair.RESET or len(repair.sources) < 2:
            return
        states = rebuild_moments(how, [self._state_of(source) for source in repair.sources], share=share)
        optimizer = self._optimizers[stage]
        optim.ensure_state(optimizer)
        for name, parameter in self._chains[stage].named_parameters():
            optimizer.state[parameter].update(states[name])

    def _state_of(self, stage: int) -> dict[str, Mapping[str, Any]]:
        optimizer = self._optimizers[stage]
        return {name: optimizer.state[parameter] for name, parameter in self._chains[stage].named_parameters()}

    def _fit(self, gap: Sequence[int]) -> tuple[Healing | None, Healing | None]:
        """The gain of adjacent rebuilt stages, and how they were healed; swapped routes have no one order of them."""
        found = self._logs.pairs(gap)
        for stage in gap:
            self._logs.forget(stage)
        plan, is_one_chain = self.method.healing, len(gap) == 1 or not self.method.swapped
        if plan is None or not is_one_chain or len(found) < 2:
            return None, None
        chain = nn.Sequential(*(self._chains[stage] for stage in gap))
        gain = fit_gain(chain, found, output_suffixes=RESIDUAL_OUTPUTS, seed=self.seed) if plan.has_gain else None
        healed = heal(chain, found, steps=plan.steps, lr=plan.lr, seed=self.seed) if plan.steps else None
        return gain, healed

    # -- copies ---------------------------------------------------------------------------------------------------

    def _copy_stages(self) -> None:
        self._own_copies = [{n: p.detach().clone() for n, p in chain.named_parameters()} for chain in self._chains]

    def _save(self) -> None:
        state = [optimizer.state_dict() for optimizer in (*self._optimizers, self._ends)]
        self._saved = copy.deepcopy({"step": self.step, "model": self.model.state_dict(), "optimizers": state})

    def _roll_back(self) -> None:
        saved = copy.deepcopy(self._saved)
        self.step = saved["step"]
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip((*self._optimizers, self._ends), saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)


def _groups(routes: Sequence[tuple[int, ...]], is_joined: bool) -> list[tuple[tuple[int, ...], list[int]]]:
    """Routes with the microbatches that take them together."""
    if not is_joined:
        return [(route, [number]) for number, route in enumerate(routes)]
    return [(route, [n for n, other in enumerate(routes) if other == route]) for route in dict.fromkeys(routes)]


def _adjacent(stages: Sequence[int]) -> list[list[int]]:
    """The gaps that these stages leave, in the order of the pipeline."""
    gaps = list[list[int]]()
    for stage in sorted(set(stages)):
        if gaps and stage == gaps[-1][-1] + 1:
            gaps[-1].append(stage)
        else:
            gaps.append([stage])
    return gaps


def _square(parameters: Iterator[nn.Parameter]) -> float:
    return sum(float(p.grad.double().square().sum()) for p in parameters if p.grad is not None)


def _step(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
