"""What all optimizers here share: state, state dicts, options, and what they refuse."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import is_
from typing import Any, ClassVar, TypeAlias, TypedDict, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT

from holdfast.errors import ConfigurationError
from holdfast.optim.coefficients import Coefficients
from holdfast.optim.config import rule_breaks
from holdfast.optim.ops import engine_for
from holdfast.optim.plan import Plan, finish, whole_norms
from holdfast.optim.quantize import SIGNED, UNSIGNED
from holdfast.optim.rows import Row, Settings
from holdfast.optim.rules import Norms, Rule
from holdfast.optim.segments import rows_with_norms, segments_of
from holdfast.optim.sharded import is_sharded, local
from holdfast.optim.state8bit import HISTORY, ParamState, copy_state, new_state, option_problems, state_problems

__all__ = ["BlockwiseOptimizer", "Options"]

_Planned: TypeAlias = "tuple[Plan, dict[str, Any], Settings]"

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FORMAT = ("block_size", "codebooks")
"""Options that say how stored bytes become numbers; a state dict must agree on them."""


class Options(TypedDict, total=False):
    """Keyword options of every optimizer. Each can be set per parameter group."""

    maximize: bool
    """Climb instead of descend."""
    bits: int
    """Bits per element of a moment, 8 or 32. The class's own by default; 32 keeps a group exact."""
    block_size: int
    """Elements that share one quantisation scale, a power of two in 64..4096; 256 by default."""
    min_8bit_size: int
    """Parameters with fewer elements keep 32-bit moments; the whole parameter counts, not a shard. 4096 by default."""
    nonzero_second_moment: bool
    """Keep positive second moments from rounding to 0, which makes the next step divide by little. On by default."""
    percentile_clipping: int
    """Scale a gradient down to this percentile of its last 100 norms; 100, the default, turns it off."""
    stochastic_rounding: bool
    """Round bfloat16 parameters up or down at random: small steps add up without fp32 copies. Off by default."""
    seed: int
    """Of stochastic rounding."""


_DEFAULTS = Options(
    maximize=False,
    bits=32,
    block_size=256,
    min_8bit_size=4096,
    nonzero_second_moment=True,
    percentile_clipping=HISTORY,
    stochastic_rounding=False,
    seed=0,
)


class BlockwiseOptimizer(torch.optim.Optimizer):
    """Base of the family. A subclass names its rule and its coefficients, and gives its constructor.

    Arithmetic is fp32 whatever the dtype of parameters and gradients (float32, bfloat16 or float16). Steps use the
    exact new moments, which are quantised afterwards. Operations are rounded one by one so that all machines, engines
    and numbers of threads agree on every bit; 32-bit moments agree with ``torch.optim`` to a few units in the last
    place.

    A gradient element that is NaN, infinite or above 2^63 is skipped: its parameter and moments stay as they are.

    Raises: ConfigurationError with all problems of a parameter group; from ``step`` for gradients that are sparse or on
    another device, before anything has changed; from ``load_state_dict`` for a state dict that does not fit.

    Parameters may be ``DTensor``, of FSDP2 (``fully_shard``) or placed by hand: any number of ranks gives the codes
    and weights of one. Then ``step`` is collective where shards cut quantisation blocks, for trust ratios and for
    percentile clipping, and each rank has to step the same parameters, as FSDP sees to.

    Source: arXiv 2110.02861, section 2 (block-wise 8-bit state), section 2.3 (stable embedding: ``StableEmbedding``).
    """

    BITS: ClassVar[int] = 32
    BETAS: ClassVar[int] = 2
    """How many ``betas`` a group has, where it has some."""
    NORMS: ClassVar[Norms | None] = None
    """What the trust ratio needs; None for rules without one."""

    def __init__(self, params: ParamsT, own: Mapping[str, Any], options: Options) -> None:
        unknown = set(options) - set(_DEFAULTS)
        if unknown:
            raise TypeError(
                f"{type(self).__name__}() got unknown options {sorted(unknown)}; it takes {sorted({*own, *_DEFAULTS})}"
            )
        defaults = {**_DEFAULTS, "bits": self.BITS, "codebooks": (SIGNED, UNSIGNED), **own, **options}
        self._plans: dict[int, Plan] = {}
        """By the number of the group. No part of the state: a plan that is missing or does not fit is made again."""
        self._known: tuple[list[Tensor], list[ParamState]] = ([], [])
        """Keys and values of ``state`` that the plans were made for."""
        super().__init__(params, defaults)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        """The update rule of a parameter group."""
        raise NotImplementedError

    def coefficients(self, group: Mapping[str, Any], step: int) -> Coefficients:
        """The scalars of update number ``step``, from 1, of a parameter group."""
        raise NotImplementedError

    def trusted(self, by: Coefficients, norms: tuple[float, float], group: Mapping[str, Any]) -> Coefficients:
        """The scalars with the trust ratio that follows from the two norms of ``NORMS``."""
        raise NotImplementedError

    def group_problems(self, group: Mapping[str, Any]) -> list[str]:
        """Every rule that a group's options break, one sentence each."""
        problems = rule_breaks(group)
        if "betas" in group and not problems and len(group["betas"]) != self.BETAS:
            problems.append(f"betas={group['betas']!r} must be {self.BETAS} numbers for {type(self).__name__}")
        if tuple(group["codebooks"]) != (SIGNED, UNSIGNED):
            problems.append(f"codebooks={group['codebooks']!r} must be {(SIGNED, UNSIGNED)!r}")
        return problems

    def fresh_state(self, param: Tensor, group: Mapping[str, Any]) -> ParamState:
        """The state before the first step."""
        return new_state(param, self.rule(group).moments, group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take another group of parameters, or none of it when an option or a parameter is unfit."""
        super().add_param_group(param_group)
        group, number = self.param_groups[-1], len(self.param_groups) - 1
        problems = self.group_problems(group)
        problems += [
            p for position, param in enumerate(group["params"]) if (p := _unfit(param, group, number, position))
        ]
        if problems:
            self.param_groups.pop()
            raise ConfigurationError(problems)

    def ensure_state(self) -> None:
        """Allocate the state of every parameter with ``requires_grad`` that has none yet.

        Afterwards the state's tensors keep their addresses; ``step`` writes into them.
        """
        for param, group, _ in _named(self.param_groups):
            if param.requires_grad:
                self._state_of(param, group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @_disable_dynamo  # a compiled caller gains nothing by tracing a kernel call
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns what ``closure`` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._update()
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans, self._known = {}, ([], [])

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Become the optimizer that wrote ``state_dict``; codes stay codes, and nothing of it is shared.

        Collective when it holds a ``DTensor`` that is placed differently here. Plain tensors are whole ones, of which
        each rank takes its part.

        torch's own method would cast every state tensor to its parameter's dtype, codes included.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        groups = self._loaded_groups(state_dict)
        targets = self._load_targets(state_dict, groups)
        state = {
            param: self._loaded(state_dict["state"][index], param, group) for index, (param, group) in targets.items()
        }
        self.__setstate__({"state": defaultdict(dict, state), "param_groups": groups})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _loaded_groups(self, state_dict: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The saved options, as in torch, with the live parameters."""
        saved = state_dict["param_groups"]
        problems = _format_problems(self.param_groups, saved)
        groups = [] if problems else [_loaded_group(*pair) for pair in zip(self.param_groups, saved, strict=True)]
        for number, group in enumerate(groups):
            problems += [f"group {number} of the state dict: {problem}" for problem in self.group_problems(group)]
        if problems:
            raise ConfigurationError(problems)
        return groups

    def _load_targets(
        self, state_dict: Mapping[str, Any], groups: Sequence[dict[str, Any]]
    ) -> dict[Any, tuple[Tensor, dict[str, Any]]]:
        """By the keys of the state dict, whose types are the writer's: the parameters, with their groups, they fit."""
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        targets = dict(zip(saved, _named(groups), strict=True))
        loaded = {index: state for index, state in state_dict["state"].items() if state}
        problems = []
        for index, state in loaded.items():
            problems += self._load_problems(state, targets.get(index), index)
        if problems:
            raise ConfigurationError(problems)
        return {index: targets[index][:2] for index in loaded}

    def _loaded(self, state: Mapping[str, Any], param: Tensor, group: Mapping[str, Any]) -> ParamState:
        return copy_state(state, param, self.rule(group).moments, group)

    def _state_of(self, param: Tensor, group: Mapping[str, Any]) -> ParamState:
        if not self.state.get(param):
            self.state[param] = self.fresh_state(param, group)
        state: ParamState = self.state[param]
        return state

    def _update(self) -> None:
        """Collective over the meshes of sharded parameters, which on every rank must be the same with a gradient."""
        plans = self._plans_of_step()
        for plan, _, _ in plans:
            plan.advance()
        self._clip([(plan, group) for plan, group, _ in plans if group["percentile_clipping"] < HISTORY])
        if self.NORMS is not None:
            self._trust(self.NORMS, plans)
        for plan, _, _ in plans:
            plan.update()
        finish([plan for plan, _, _ in plans])

    def _plans_of_step(self) -> list[_Planned]:
        """A plan, ready for the step, for each group with gradients. What can go wrong goes wrong here."""
        if not _are_same(self.state, self._known):
            self._plans.clear()
        found, problems = [], []
        for number, group in enumerate(self.param_groups):
            params, grads = _with_gradients(group["params"])
            if not params:
                continue
            plan = self._plans.get(number)
            if plan is None or not plan.fits(params, grads, self.rule(group), group):
                self._plans.pop(number, None)
                problems += self._gradient_problems(group, number)
            found.append((number, group, params, grads))
        if problems:
            raise ConfigurationError(problems)
        return [self._plan(*of_group) for of_group in found]

    def _plan(self, number: int, group: dict[str, Any], params: Sequence[Tensor], grads: Sequence[Tensor]) -> _Planned:
        rule = self.rule(group)
        settings = Settings(group["block_size"], group["nonzero_second_moment"], group["stochastic_rounding"])
        if number not in self._plans:
            states = [self._state_of(param, group) for param in params]
            positions = [at for at, param in enumerate(group["params"]) if param.grad is not None]
            self._plans[number] = Plan(rule, params, states, grads, group, positions)
            self._known = (list(self.state), list(self.state.values()))
        plan = self._plans[number]
        coefficients, key = partial(self.coefficients, group), partial(_key, group["seed"], number)
        plan.prepare(grads, rule, settings, coefficients, key)
        return plan, group, settings

    def _trust(self, kind: Norms, plans: Sequence[_Planned]) -> None:
        segments = segments_of(self)
        if segments is not None:
            for plan, group, settings in plans:
                measure = partial(_sums, kind, settings=settings)
                pairs = rows_with_norms(segments, plan.rows(), measure, settings.block_size)
                plan.instead = [replace(row, by=self.trusted(row.by, norms, group)) for row, norms in pairs]
            return
        for (plan, group, _), norms in zip(plans, whole_norms(kind, [plan for plan, _, _ in plans]), strict=True):
            plan.by = [self.trusted(by, pair, group) for by, pair in zip(plan.by, norms, strict=True)]

    def _clip(self, plans: Sequence[tuple[Plan, Mapping[str, Any]]]) -> None:
        """Scale gradients whose norm exceeds a percentile of the last 100. Source: arXiv 2110.02861, appendix."""
        for (plan, group), norms in zip(plans, whole_norms(Norms.GRADIENT, [plan for plan, _ in plans]), strict=True):
            percentile = group["percentile_clipping"]
            scales = [_clip_scale(state, norm, percentile) for state, (norm, _) in zip(plan.states, norms, strict=True)]
            plan.by = [
                by if scale == 1.0 else replace(by, grad_scale=by.grad_scale * scale)
                for by, scale in zip(plan.by, scales, strict=True)
            ]

    def _gradient_problems(self, group: Mapping[str, Any], number: int) -> list[str]:
        """What is wrong with gradients, and with the state of parameters that have one."""
        problems = []
        for position, param in enumerate(group["params"]):
            if param.grad is not None:
                name, state = _name(group, number, position), self.state.get(param)
                unfit = _unfit_gradient(param, param.grad, name, type(self).__name__)
                problems += [unfit] if unfit else []
                problems += option_problems(state, param, self.rule(group).moments, group, name) if state else []
        return problems

    def _load_problems(
        self, state: Mapping[str, Any], target: tuple[Tensor, dict[str, Any], str] | None, index: object
    ) -> list[str]:
        if target is None:
            return [f"the state dict holds state for parameter {index!r}, which is in none of its groups"]
        param, group, name = target
        return state_problems(state, param, self.rule(group).moments, group, name)


def _named(groups: Iterable[dict[str, Any]]) -> Iterator[tuple[Tensor, dict[str, Any], str]]:
    """Every parameter with its group and a name for messages."""
    for number, group in enumerate(groups):
        for position, param in enumerate(group["params"]):
            yield param, group, _name(group, number, position)


def _are_same(state: Mapping[Tensor, ParamState], known: tuple[list[Tensor], list[ParamState]]) -> bool:
    params, states = known
    return len(state) == len(params) and all(map(is_, state, params)) and all(map(is_, state.values(), states))


def _with_gradients(params: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Tensor]]:
    """The parameters that have one, and their gradients."""
    grads = [grad for param in params if (grad := param.grad) is not None]
    return params if len(grads) == len(params) else [param for param in params if param.grad is not None], grads


def _sums(kind: Norms, rows: Sequence[Row], settings: Settings) -> list[tuple[float, float]]:
    """Of rows of one device, sums of squares."""
    return engine_for(rows[0].param.device).norms(kind, rows, settings) if rows else []


def _clip_scale(state: ParamState, norm: float, percentile: int) -> float:
    """Write a gradient's norm into the history, and what to multiply the gradient by. After the step was counted."""
    history, step = local(state["grad_norms"]), state["step"]
    norm_now = torch.tensor(norm, dtype=torch.float32)
    if step == 1:
        history.fill_(norm_now)
    else:
        history[step % HISTORY] = norm_now
    bound = float(history.sort().values[percentile])
    return bound / norm if bound < norm else 1.0


def _key(seed: int, group: int, step: int, position: int) -> int:
    """64 bits, signed, that differ between steps and between parameters."""
    key = 0
    for number in (seed, step, group, position):
        key = _splitmix(key ^ number)
    return key - (1 << 64) if key >> 63 else key


def _splitmix(x: int) -> int:
    """A bijection of 64-bit numbers that spreads neighbours. Source: Steele et al., OOPSLA 2014, figure 17."""
    word = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & word
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
    return x ^ (x >> 31)


def _name(group: Mapping[str, Any], number: int, position: int) -> str:
    if "param_names" in group:
        return f"parameter {group['param_names'][position]!r}"
    return f"parameter {position} of group {number}"


def _unfit(param: Tensor, group: Mapping[str, Any], number: int, position: int) -> str | None:
    if is_sharded(param) and any(placement.is_partial() for placement in param.placements):  # type: ignore[attr-defined]
        return f"{_name(group, number, position)} is a DTensor of partial sums; redistribute it first"
    if param.dtype in _DTYPES and param.layout == torch.strided:
        return None
    return (
        f"{_name(group, number, position)} is {param.dtype}, {param.layout}; only dense float32, bfloat16 and float16 "
        "parameters are updated, leave others to torch.optim"
    )


def _unfit_gradient(param: Tensor, grad: Tensor, name: str, optimizer: str) -> str | None:
    if is_sharded(param) != is_sharded(grad):
        kinds = ("a DTensor" if is_sharded(tensor) else "a plain tensor" for tensor in (param, grad))
        return "{} is {} and its gradient {}; both must be sharded alike".format(name, *kinds)
    if grad.layout != torch.strided:
        dense = f"{optimizer} needs dense ones (for an embedding: sparse=False)"
        return f"{name} has a gradient of layout {grad.layout}; {dense}"
    if grad.dtype not in _DTYPES:
        return f"{name} has a gradient of {grad.dtype}; {optimizer} takes float32, bfloat16 and float16"
    if grad.device != param.device:
        return f"{name} is on {param.device} and its gradient on {grad.device}; both must be on one device"
    return None


def _format_problems(groups: list[dict[str, Any]], saved: Iterable[Mapping[str, Any]]) -> list[str]:
    """Why saved parameter groups do not fit the live ones."""
    saved = list(saved)
    sizes, saved_sizes = [len(g["params"]) for g in groups], [len(g["params"]) for g in saved]
    if sizes != saved_sizes:
        return [f"the state dict has groups of {saved_sizes} parameters, this optimizer has groups of {sizes}"]
    if any(key not in theirs for theirs in saved for key in _FORMAT):
        return [
            (
                f"the state dict's groups do not record {' and '.join(_FORMAT)}: no optimizer of holdfast wrote it; "
                "holdfast.optim.interop reads those of torch, bitsandbytes and torchao"
            )
        ]
    return [
        f"group {number} of the state dict has {key}={_plain(theirs[key])!r}, this optimizer has "
        f"{_plain(ours[key])!r}; build it with the state dict's value, or start with fresh moments"
        for number, (ours, theirs) in enumerate(zip(groups, saved, strict=True))
        for key in _FORMAT
        if _plain(ours[key]) != _plain(theirs[key])
    ]


def _loaded_group(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Their options, ours where they lack one, with our parameters."""
    return {**ours, **copy.deepcopy({**theirs, "params": None}), "params": ours["params"]}


def _plain(value: object) -> object:
    """Tuples and lists alike, because a state dict may have gone through JSON."""
    return list(value) if isinstance(value, (tuple, list)) else value
