"""Every update rule as a free function on fp32 tensors, and what each keeps per parameter.

The functions work in place, are the same for 32-bit moments and for decoded 8-bit ones, and round every tensor
operation once: plain products, sums, quotients and roots. The fused ones (``lerp_``, ``add_(alpha=)``, ``addcmul_``)
round differently from one processor or device to the next, and a rank that moves to another machine must go on with the
same bits. The kernels repeat them operation by operation (``kernels/rules.h``, ``triton_kernels.py``).

The gradient they get is the effective one: scaled, with its L2 term. Elements that must not change are the caller's
business (``torch_engine.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from torch import Tensor

from holdfast.optim.coefficients import Coefficients

__all__ = ["RULES", "Norms", "Rule", "lamb_direction"]


class Norms(IntEnum):
    """Which two sums of squares a trust ratio or a clipping factor needs; numbered as in ``kernels/abi.h``."""

    GRADIENT = 0
    PARAM_AND_GRADIENT = 1
    PARAM_AND_LAMB_DIRECTION = 2


@dataclass(frozen=True, slots=True)
class Rule:
    """An update rule."""

    name: str
    native: int
    """Its number in ``kernels/abi.h``."""
    moments: Mapping[str, bool]
    """Moments by their names in ``torch.optim``, and whether each is signed."""
    update: Callable[[Tensor, Tensor, Sequence[Tensor], Coefficients], None]
    """(parameter, effective gradient, moments, coefficients): changes the parameter and the moments."""


def adam(param: Tensor, grad: Tensor, moments: Sequence[Tensor], by: Coefficients) -> None:
    """m <- b1 m + (1-b1) g; v <- b2 v + (1-b2) g²; p <- decay p - step m / (sqrt(v) root_scale + eps).

    Source: arXiv 1412.6980, algorithm 1, with both bias corrections in the coefficients.
    """
    exp_avg, exp_avg_sq = moments
    _blend(exp_avg, grad, by.beta1, by.blend1)
    _blend_square(exp_avg_sq, grad, by)
    param.mul_(by.decay).sub_((exp_avg * by.step_size).div_(_root(exp_avg_sq).mul_(by.root_scale).add_(by.eps)))


def sgd(param: Tensor, grad: Tensor, moments: Sequence[Tensor], by: Coefficients) -> None:
    """buf <- momentum buf + (1-dampening) g; p <- p - lr buf."""
    (momentum_buffer,) = moments
    _blend(momentum_buffer, grad * by.trust, by.beta1, by.blend1)
    param.sub_(momentum_buffer * by.step_size)


def nesterov(param: Tensor, grad: Tensor, moments: Sequence[Tensor], by: Coefficients) -> None:
    """buf as in ``sgd``; p <- p - lr (g + momentum buf)."""
    (momentum_buffer,) = moments
    grad = grad * by.trust
    _blend(momentum_buffer, grad, by.beta1, by.blend1)
    param.sub_((momentum_buffer * by.beta1).add_(grad).mul_(by.step_size))


def plain_sgd(param: Tensor, grad: Tensor, moments: Sequence[Tensor], by: Coefficients) -> None:
    """p <- p - lr g."""
    param.sub_((grad * by.trust).mul_(by.step_size))


def lion(param: Tensor, grad: Tensor, moments: Sequence[Tensor], by: Coefficients) -> None:
    """p <- decay p - lr sign(b1 m + (1-b1) g); m <- b2 m + (1-b2) g. Source: arXiv 2302.06675, program 1."""
    (exp_avg,) = moments
    way = (exp_avg * by.beta1).add_(grad * by.blend1).sign_()
    _blend(exp_avg, grad, by.beta2, by.blend2)
    param.mul_(by.decay).sub_(way.mul_(by.step_size))


def rmsprop(param: Tensor, grad: Tensor, moments: Sequence[Tensor], by: Coefficients) -> None:
    """v <- a v + (1-a) g²; p <- p - lr g / (sqrt(v) + eps)."""
    (square_avg,) = moments
    _blend_square(square_avg, grad, by)
    param.sub_((grad * by.step_size).div_(_root(square_avg).add_(by.eps)))


def rmsprop_momentum(param: Tensor, grad: Tensor, moments: Sequence[Tensor], by: Coefficients) -> None:
    """buf <- momentum buf + g / (sqrt(v) + eps); p <- p - lr buf."""
    square_avg, momentum_buffer = moments
    _blend_square(square_avg, grad, by)
    momentum_buffer.mul_(by.beta1).add_(grad / _root(square_avg).add_(by.eps))
    param.sub_(momentum_buffer * by.step_size)


def rmsprop_centered(param: Tensor, grad: Tensor, moments: Sequence[Tensor], by: Coefficients) -> None:
    """As ``rmsprop``, with the variance of the gradient in the place of its square."""
    square_avg, grad_avg = moments
    variance = _blend_variance(square_avg, grad_avg, grad, by)
    param.sub_((grad * by.step_size).div_(_root(variance).add_(by.eps)))


def rmsprop_centered_momentum(param: Tensor, grad: Tensor, moments: Sequence[Tensor], by: Coefficients) -> None:
    """Both. Source: arXiv 1308.0850, equations 38 to 41."""
    square_avg, grad_avg, momentum_buffer = moments
    variance = _blend_variance(square_avg, grad_avg, grad, by)
    momentum_buffer.mul_(by.beta1).add_(grad / _root(variance).add_(by.eps))
    param.sub_(momentum_buffer * by.step_size)


def adagrad(param: Tensor, grad: Tensor, moments: Sequence[Tensor], by: Coefficients) -> None:
    """s <- s + g²; p <- p - lr g / (sqrt(s) + eps)."""
    (sum_of_squares,) = moments
    sum_of_squares.add_(grad * grad)
    param.sub_((grad * by.step_size).div_(_root(sum_of_squares).add_(by.eps)))


def lamb(param: Tensor, grad: Tensor, moments: Sequence[Tensor], by: Coefficients) -> None:
    """p <- p - lr trust u, where ``lamb_direction`` is u. Source: arXiv 1904.00962, algorithm 2."""
    param.sub_(lamb_direction(param, grad, moments, by).mul_(by.step_size))


def lamb_direction(param: Tensor, grad: Tensor, moments: Sequence[Tensor], by: Coefficients) -> Tensor:
    """u = m / (1-b1^t) / (sqrt(v) root_scale + eps) + wd p. Changes the moments, not the parameter."""
    exp_avg, exp_avg_sq = moments
    _blend(exp_avg, grad, by.beta1, by.blend1)
    _blend_square(exp_avg_sq, grad, by)
    root = _root(exp_avg_sq).mul_(by.root_scale).add_(by.eps)
    return (exp_avg * by.correction).div_(root).add_(param * by.weight_decay)


def ademamix(param: Tensor, grad: Tensor, moments: Sequence[Tensor], by: Coefficients) -> None:
    """Two first moments, a fast and a slow one. Source: arXiv 2409.03137, algorithm 1."""
    exp_avg, exp_avg_slow, exp_avg_sq = moments
    _blend(exp_avg, grad, by.beta1, by.blend1)
    _blend(exp_avg_slow, grad, by.beta3, by.blend3)
    _blend_square(exp_avg_sq, grad, by)
    mixed = (exp_avg * by.correction).add_(exp_avg_slow * by.mix)
    param.mul_(by.decay).sub_(mixed.mul_(by.step_size).div_(_root(exp_avg_sq).mul_(by.root_scale).add_(by.eps)))


def _blend(moment: Tensor, grad: Tensor, beta: float, blend: float) -> None:
    moment.mul_(beta).add_(grad * blend)


def _blend_square(moment: Tensor, grad: Tensor, by: Coefficients) -> None:
    moment.mul_(by.beta2).add_((grad * by.blend2).mul_(grad))


def _blend_variance(square_avg: Tensor, grad_avg: Tensor, grad: Tensor, by: Coefficients) -> Tensor:
    """Not below 0, where rounding could take it."""
    _blend_square(square_avg, grad, by)
    _blend(grad_avg, grad, by.beta2, by.blend2)
    return (square_avg - grad_avg * grad_avg).clamp_min_(0.0)


def _root(second: Tensor) -> Tensor:
    """Through double precision: torch's fp32 root is that of a vector library where there is one, and then one in five
    is off by a unit in the last place. From double to fp32 a root rounds as if it had been rounded once.
    """
    return second.double().sqrt_().float()


_SIGNED, _UNSIGNED = True, False
_ADAM_MOMENTS = {"exp_avg": _SIGNED, "exp_avg_sq": _UNSIGNED}
_BUFFER = {"momentum_buffer": _SIGNED}
_SQUARE = {"square_avg": _UNSIGNED}
_CENTERED = {**_SQUARE, "grad_avg": _SIGNED}

RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("adam", 0, _ADAM_MOMENTS, adam),
        Rule("sgd", 1, _BUFFER, sgd),
        Rule("nesterov", 2, _BUFFER, nesterov),
        Rule("plain_sgd", 3, {}, plain_sgd),
        Rule("lion", 4, {"exp_avg": _SIGNED}, lion),
        Rule("rmsprop", 5, _SQUARE, rmsprop),
        Rule("rmsprop_momentum", 6, {**_SQUARE, **_BUFFER}, rmsprop_momentum),
        Rule("rmsprop_centered", 7, _CENTERED, rmsprop_centered),
        Rule("rmsprop_centered_momentum", 8, {**_CENTERED, **_BUFFER}, rmsprop_centered_momentum),
        Rule("adagrad", 9, {"sum": _UNSIGNED}, adagrad),
        Rule("lamb", 10, _ADAM_MOMENTS, lamb),
        Rule("ademamix", 11, {"exp_avg": _SIGNED, "exp_avg_slow": _SIGNED, "exp_avg_sq": _UNSIGNED}, ademamix),
    )
}
"""By name."""
