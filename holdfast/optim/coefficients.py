"""The scalars of one update of one tensor, for every rule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

__all__ = ["FIELDS", "Coefficients", "adagrad", "adam", "adamw", "ademamix", "lamb", "lion", "rmsprop", "sgd"]


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Computed in double precision and rounded to fp32 once, where they are used. A rule reads those it needs.

    The order of the fields is that of ``Coefficients`` in ``kernels/abi.h``.
    """

    grad_scale: float = 1.0
    """Factor of the gradient: -1 to maximise, times a clipping factor."""
    l2: float = 0.0
    """Weight decay that is added to the gradient."""
    decay: float = 1.0
    """Factor of the parameter before the update, 1 - lr x weight_decay."""
    step_size: float = 0.0
    beta1: float = 0.0
    """Decay of the first moment or of the momentum."""
    blend1: float = 1.0
    """Share of the new gradient in it."""
    beta2: float = 0.0
    blend2: float = 1.0
    beta3: float = 0.0
    """Decay of the slow first moment."""
    blend3: float = 1.0
    eps: float = 0.0
    root_scale: float = 1.0
    """1 / sqrt(1 - beta2^t), the bias correction of the root of the second moment."""
    correction: float = 1.0
    """1 / (1 - beta1^t), where it is not part of ``step_size``."""
    mix: float = 0.0
    """Weight of the slow first moment."""
    trust: float = 1.0
    """Factor of the gradient and its L2 term."""
    weight_decay: float = 0.0
    """Weight decay that is added to the direction."""


FIELDS = tuple(field.name for field in fields(Coefficients))


def adamw(group: Mapping[str, Any], step: int) -> Coefficients:
    """Decoupled weight decay. Source: arXiv 1711.05101, algorithm 2."""
    return replace(adam(group, step), l2=0.0, decay=_decay(group))


def adam(group: Mapping[str, Any], step: int) -> Coefficients:
    """Weight decay as an L2 term. Source: arXiv 1412.6980, algorithm 1."""
    moments = _moments(group, step)
    step_size = float(group["lr"]) / (1.0 - moments.beta1**step)
    return replace(moments, l2=group["weight_decay"], step_size=step_size)


def lamb(group: Mapping[str, Any], step: int) -> Coefficients:
    """Without the trust ratio, which multiplies ``step_size``. Source: arXiv 1904.00962, algorithm 2."""
    moments = _moments(group, step)
    correction = 1.0 / (1.0 - moments.beta1**step)
    return replace(moments, step_size=float(group["lr"]), correction=correction, weight_decay=group["weight_decay"])


def ademamix(group: Mapping[str, Any], step: int) -> Coefficients:
    """Source: arXiv 2409.03137, algorithm 1 with the schedules of section 3.1."""
    moments, beta3 = _moments(group, step), _slow_decay(group, step)
    return replace(
        moments,
        decay=_decay(group),
        step_size=float(group["lr"]),
        beta3=beta3,
        blend3=1.0 - beta3,
        correction=1.0 / (1.0 - moments.beta1**step),
        mix=_slow_weight(group, step),
    )


def sgd(group: Mapping[str, Any], step: int) -> Coefficients:
    """The first momentum is the gradient itself, without dampening, as in ``torch.optim.SGD``."""
    return Coefficients(
        grad_scale=_sign(group),
        l2=group["weight_decay"],
        step_size=float(group["lr"]),
        beta1=group["momentum"],
        blend1=1.0 if step == 1 else 1.0 - group["dampening"],
    )


def lion(group: Mapping[str, Any], step: int) -> Coefficients:
    """Source: arXiv 2302.06675, program 1."""
    return replace(_moments(group, step), root_scale=1.0, decay=_decay(group), step_size=float(group["lr"]))


def rmsprop(group: Mapping[str, Any], step: int) -> Coefficients:
    """As ``torch.optim.RMSprop``. Source: arXiv 1308.0850, equations 38 to 41, for the centered form."""
    return Coefficients(
        grad_scale=_sign(group),
        l2=group["weight_decay"],
        step_size=float(group["lr"]),
        beta1=group["momentum"],
        beta2=group["alpha"],
        blend2=1.0 - group["alpha"],
        eps=group["eps"],
    )


def adagrad(group: Mapping[str, Any], step: int) -> Coefficients:
    """As ``torch.optim.Adagrad``. Source: JMLR 12 (2011) 2121, the diagonal form."""
    return Coefficients(
        grad_scale=_sign(group),
        l2=group["weight_decay"],
        step_size=float(group["lr"]) / (1.0 + (step - 1) * group["lr_decay"]),
        eps=group["eps"],
    )


def _moments(group: Mapping[str, Any], step: int) -> Coefficients:
    """What all rules with two betas share."""
    beta1, beta2 = group["betas"][:2]
    return Coefficients(
        grad_scale=_sign(group),
        beta1=beta1,
        blend1=1.0 - beta1,
        beta2=beta2,
        blend2=1.0 - beta2,
        eps=group.get("eps", 0.0),
        root_scale=(1.0 - beta2**step) ** -0.5,
    )


def _decay(group: Mapping[str, Any]) -> float:
    return 1.0 - float(group["lr"]) * float(group["weight_decay"])


def _sign(group: Mapping[str, Any]) -> float:
    return -1.0 if group["maximize"] else 1.0


def _slow_weight(group: Mapping[str, Any], step: int) -> float:
    alpha, over = group["alpha"], group["t_alpha"]
    return float(alpha if over is None else min(alpha * step / over, alpha))


def _slow_decay(group: Mapping[str, Any], step: int) -> float:
    """From beta1 to beta3 so that the half-life grows linearly."""
    (beta1, _, beta3), over = group["betas"], group["t_beta3"]
    if over is None or step >= over or beta1 == 0 or beta3 == 0:
        return float(beta3)
    start, end, done = math.log(beta1), math.log(beta3), step / over
    return float(min(math.exp(start * end / ((1.0 - done) * end + done * start)), beta3))
