"""Options of the optimizer and its learning-rate schedule, and the rules they obey. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

__all__ = ["OptimConfig", "OptimName", "check", "constructor_options", "moment_count", "momentum_breaks", "rule_breaks"]


class OptimName(Enum):
    """The optimizers of ``holdfast.optim``, with 8-bit and with 32-bit moments."""

    ADAMW8BIT = "adamw8bit"
    ADAMW = "adamw"
    ADAM8BIT = "adam8bit"
    ADAM = "adam"
    SGD8BIT = "sgd8bit"
    SGD = "sgd"
    LION8BIT = "lion8bit"
    LION = "lion"
    RMSPROP8BIT = "rmsprop8bit"
    RMSPROP = "rmsprop"
    ADAGRAD8BIT = "adagrad8bit"
    ADAGRAD = "adagrad"
    LAMB8BIT = "lamb8bit"
    LAMB = "lamb"
    LARS8BIT = "lars8bit"
    LARS = "lars"
    ADEMAMIX8BIT = "ademamix8bit"
    ADEMAMIX = "ademamix"

    @property
    def is_8bit(self) -> bool:
        return self.value.endswith("8bit")

    @property
    def kind(self) -> str:
        """The name without the number of bits."""
        return self.value.removesuffix("8bit")


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """An optimizer with 8-bit block-wise or 32-bit moments, linear warm-up and cosine decay."""

    name: OptimName = OptimName.ADAMW8BIT
    """Which optimizer, by default with 8-bit moments; without ``8BIT`` in its name it keeps 32-bit ones."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of the first and second moment; AdEMAMix has a third, slow one."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Decay of matrices and embeddings, decoupled where the optimizer has it so; norms are never decayed."""
    momentum: float = 0.9
    """Of SGD and LARS."""
    block_size: int = 256
    """Elements that share one quantisation scale, a power of two in 64..4096."""
    min_8bit_size: int = 4096
    """Tensors with fewer elements keep 32-bit moments."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the optimizer's constructor: ``optim.options.nesterov=true`` for one of them,
    ``optim.options={nesterov: true, dampening: 0.0}`` for several."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the cosine, as a share of ``lr``."""


_OWN: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "adamw": (("betas", "eps"), ()),
    "adam": (("betas", "eps"), ()),
    "sgd": (("momentum",), ("dampening", "nesterov")),
    "lion": (("betas",), ()),
    "rmsprop": (("eps",), ("alpha", "momentum", "centered")),
    "adagrad": (("eps",), ("lr_decay", "initial_accumulator_value")),
    "lamb": (("betas", "eps"), ()),
    "lars": (("momentum",), ("dampening", "nesterov", "trust_coefficient")),
    "ademamix": (("betas", "eps"), ("alpha", "t_alpha", "t_beta3")),
}
"""Optimizer -> fields of ``OptimConfig`` that it takes, and what may stand in ``options`` besides ``_COMMON``."""

_SHARED = ("lr", "weight_decay", "block_size", "min_8bit_size")
"""Fields that every optimizer takes."""

_COMMON = ("maximize", "nonzero_second_moment", "percentile_clipping", "stochastic_rounding", "seed")


def constructor_options(config: OptimConfig) -> dict[str, Any]:
    """Arguments for the constructor of the optimizer that ``config`` names."""
    fields, _ = _OWN[config.name.kind]
    own = {key: getattr(config, key) for key in fields}
    if "betas" in own:
        own["betas"] = tuple(own["betas"])
    shared = {key: getattr(config, key) for key in _SHARED}
    return {**shared, **own, **config.options}


def moment_count(config: OptimConfig) -> int:
    """Moments that the optimizer keeps for each element of a parameter. ``config`` must be sound."""
    kind, options = config.name.kind, config.options
    if kind in ("sgd", "lars"):
        return int(config.momentum > 0)
    if kind == "rmsprop":
        return 1 + bool(options.get("centered")) + bool(options.get("momentum"))
    return {"lion": 1, "adagrad": 1, "ademamix": 3}.get(kind, 2)


def check(config: OptimConfig) -> list[str]:
    """Every rule that ``config`` breaks, one sentence each; empty when it is sound."""
    fields, _ = _OWN[config.name.kind]
    values = {key: value for key, value in asdict(config).items() if key not in ("betas", "momentum") or key in fields}
    problems = [problem for key in config.options if (problem := _stray(key, config.name))]
    problems += rule_breaks(values, prefix="optim.") + rule_breaks(config.options, prefix="optim.options.")
    if problems:
        return problems
    if "betas" in fields and len(config.betas) != (needed := 3 if config.name.kind == "ademamix" else 2):
        problems.append(f"optim.betas={config.betas!r} must be {needed} numbers for {config.name.value}")
    if "momentum" in fields:
        bits = 8 if config.name.is_8bit else 32
        values = {"dampening": 0.0, "nesterov": False, "bits": bits, **constructor_options(config)}
        problems += [f"optim: {problem}" for problem in momentum_breaks(values)]
    return problems


def momentum_breaks(values: Mapping[str, Any]) -> list[str]:
    """Every rule about ``momentum``, ``dampening``, ``nesterov`` and ``bits`` together that ``values`` break."""
    problems = []
    if values["bits"] == 8 and values["momentum"] == 0:
        problems.append("momentum=0 keeps no state to quantise; set momentum, or take the optimizer with 32 bits")
    if values["nesterov"] and (values["momentum"] == 0 or values["dampening"] != 0):
        problems.append(
            f"nesterov=True needs momentum > 0 and dampening=0, not momentum={values['momentum']!r} and "
            f"dampening={values['dampening']!r}"
        )
    return problems


def _stray(key: str, name: OptimName) -> str | None:
    """Why ``key`` may not stand in ``options``; None when it may."""
    fields, more = _OWN[name.kind]
    allowed = (*more, *_COMMON)
    if key in allowed:
        return None
    if key in (*_SHARED, *fields):
        return f"optim.options.{key} is an option of its own; write optim.{key}"
    return f"optim.options.{key} is not an argument of {name.value}; it takes {', '.join(allowed)}"


def rule_breaks(values: Mapping[str, Any], *, prefix: str = "") -> list[str]:
    """Every rule broken by the known keys among ``values``; other keys are ignored."""
    return [
        f"{prefix}{key}={values[key]!r} must be {rule}"
        for key, (holds, rule) in _RULES.items()
        if key in values and not _holds(holds, values[key])
    ]


def _holds(rule: Callable[[Any], bool], value: object) -> bool:
    try:
        return rule(value)
    except (TypeError, ValueError):  # a value of the wrong type breaks the rule like any other wrong value
        return False


def _is_finite_and_not_negative(value: float) -> bool:
    return 0 <= value < math.inf


def _is_count(value: int) -> bool:
    return isinstance(value, int) and value >= 0


def _is_decay(value: float) -> bool:
    return 0 <= value < 1


def _are_betas(value: list[float]) -> bool:
    return 2 <= len(value) <= 3 and all(map(_is_decay, value))


def _is_truth(value: object) -> bool:
    return isinstance(value, bool)


_SMALLEST_EPS = 1e-30
"""Smaller ones come close to the end of fp32, and with eps = 0 a parameter without gradient becomes 0/0."""
_NUMBER = "a finite number of at least 0"
_STEPS = (lambda v: v is None or (isinstance(v, int) and v >= 1), "None or a whole number of steps of at least 1")

_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_is_finite_and_not_negative, f"{_NUMBER}, for example 0.001"),
    "betas": (_are_betas, "two numbers in [0, 1), for example [0.9, 0.95]"),
    "eps": (lambda v: _SMALLEST_EPS <= v < math.inf, f"a finite number of at least {_SMALLEST_EPS}, for example 1e-08"),
    "weight_decay": (_is_finite_and_not_negative, f"{_NUMBER}, for example 0.1"),
    "momentum": (_is_decay, "a number in [0, 1), for example 0.9"),
    "dampening": (_is_decay, "a number in [0, 1)"),
    "nesterov": (_is_truth, "true or false"),
    "centered": (_is_truth, "true or false"),
    "alpha": (_is_finite_and_not_negative, _NUMBER),
    "lr_decay": (_is_finite_and_not_negative, _NUMBER),
    "initial_accumulator_value": (_is_finite_and_not_negative, _NUMBER),
    "trust_coefficient": (lambda v: 0 < v < math.inf, "a finite number above 0, for example 0.001"),
    "t_alpha": _STEPS,
    "t_beta3": _STEPS,
    "maximize": (_is_truth, "true or false"),
    "bits": (lambda v: v in (8, 32), "8 or 32"),
    "block_size": (
        lambda v: isinstance(v, int) and 64 <= v <= 4096 and v & (v - 1) == 0,
        "a power of two in 64..4096, for example 256",
    ),
    "min_8bit_size": (_is_count, "a whole number of at least 0, for example 4096"),
    "nonzero_second_moment": (_is_truth, "true or false"),
    "percentile_clipping": (
        lambda v: isinstance(v, int) and 0 <= v <= 100,
        "a whole number in 0..100, where 100 turns it off",
    ),
    "stochastic_rounding": (_is_truth, "true or false"),
    "seed": (_is_count, "a whole number of at least 0"),
    "grad_clip": (_is_finite_and_not_negative, f"{_NUMBER}, where 0 turns clipping off"),
    "warmup_steps": (_is_count, "a whole number of at least 0"),
    "min_lr_ratio": (lambda v: 0 <= v <= 1, "a share in 0..1"),
}
