"""Options of the optimizer and its learning-rate schedule, and the rules they obey. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

__all__ = ["OptimConfig", "OptimName", "check", "rule_breaks"]


class OptimName(Enum):
    """Registered optimizers."""

    ADAMW8BIT = "adamw8bit"
    ADAMW = "adamw"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW with 8-bit block-wise or 32-bit moments, linear warm-up and cosine decay."""

    name: OptimName = OptimName.ADAMW8BIT
    """Which optimizer; ADAMW keeps 32-bit moments."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Decay of the first and second moment."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices and embeddings; norms are never decayed."""
    block_size: int = 256
    """Elements that share one quantisation scale, a power of two in 64..4096."""
    min_8bit_size: int = 4096
    """Tensors with fewer elements keep 32-bit moments."""
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    warmup_steps: int = 20
    """Steps of linear warm-up."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the cosine, as a share of ``lr``."""


def check(config: OptimConfig) -> list[str]:
    """Every rule that ``config`` breaks, one sentence each; empty when it is sound."""
    return rule_breaks(asdict(config), prefix="optim.")


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


def _are_betas(value: list[float]) -> bool:
    first, second = value
    return 0 <= first < 1 and 0 <= second < 1


_SMALLEST_EPS = 1e-30
"""Smaller ones come close to the end of fp32, and with eps = 0 a parameter without gradient becomes 0/0."""

_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (_is_finite_and_not_negative, "a finite number of at least 0, for example 0.001"),
    "betas": (_are_betas, "two numbers in [0, 1), for example [0.9, 0.95]"),
    "eps": (lambda v: _SMALLEST_EPS <= v < math.inf, f"a finite number of at least {_SMALLEST_EPS}, for example 1e-08"),
    "weight_decay": (_is_finite_and_not_negative, "a finite number of at least 0, for example 0.1"),
    "block_size": (
        lambda v: isinstance(v, int) and 64 <= v <= 4096 and v & (v - 1) == 0,
        "a power of two in 64..4096, for example 256",
    ),
    "min_8bit_size": (_is_count, "a whole number of at least 0, for example 4096"),
    "grad_clip": (_is_finite_and_not_negative, "a finite number of at least 0, where 0 turns clipping off"),
    "warmup_steps": (_is_count, "a whole number of at least 0"),
    "min_lr_ratio": (lambda v: 0 <= v <= 1, "a share in 0..1"),
}
