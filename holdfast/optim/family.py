"""The optimizers, each with 32-bit and with 8-bit moments.

Constructors follow ``torch.optim`` where it has the optimizer. ``X8bit`` is ``X`` with 2.03 bytes instead of 8 per
parameter for two moments (1.02 instead of 4 for one). Keyword options, the same for all: see ``Options``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from holdfast.optim import coefficients
from holdfast.optim.coefficients import Coefficients
from holdfast.optim.config import momentum_breaks
from holdfast.optim.optimizer import BlockwiseOptimizer, Options
from holdfast.optim.rules import RULES, Norms, Rule
from holdfast.optim.state8bit import ParamState

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "Adagrad",
    "Adagrad8bit",
    "Adam",
    "Adam8bit",
    "AdamW",
    "AdamW8bit",
    "LAMB8bit",
    "LARS8bit",
    "Lion",
    "Lion8bit",
    "RMSprop",
    "RMSprop8bit",
    "SGD8bit",
]


class AdamW(BlockwiseOptimizer):
    """Adam with decoupled weight decay, applied before the update. Source: arXiv 1711.05101, algorithm 2."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, options)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["adam"]

    def coefficients(self, group: Mapping[str, Any], step: int) -> Coefficients:
        return coefficients.adamw(group, step)


class Adam(AdamW):
    """Adam; weight decay is an L2 term of the gradient. Source: arXiv 1412.6980, algorithm 1."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def coefficients(self, group: Mapping[str, Any], step: int) -> Coefficients:
        return coefficients.adam(group, step)


class SGD(BlockwiseOptimizer):
    """Momentum, with L2 weight decay; Nesterov's form on request. With 8 bits the momentum must be above 0."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, {**own, "nesterov": nesterov}, options)

    def group_problems(self, group: Mapping[str, Any]) -> list[str]:
        return super().group_problems(group) or momentum_breaks(group)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        if group["momentum"] == 0:
            return RULES["plain_sgd"]
        return RULES["nesterov" if group["nesterov"] else "sgd"]

    def coefficients(self, group: Mapping[str, Any], step: int) -> Coefficients:
        return coefficients.sgd(group, step)


class Lion(BlockwiseOptimizer):
    """The sign of an interpolated momentum, with decoupled weight decay. Source: arXiv 2302.06675, program 1."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, options)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["lion"]

    def coefficients(self, group: Mapping[str, Any], step: int) -> Coefficients:
        return coefficients.lion(group, step)


class RMSprop(BlockwiseOptimizer):
    """The gradient over the root of its mean square, with L2 weight decay; centered and with momentum on request."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        **options: Unpack[Options],
    ) -> None:
        own = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(params, {**own, "centered": centered}, options)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["rmsprop" + "_centered" * group["centered"] + "_momentum" * (group["momentum"] > 0)]

    def coefficients(self, group: Mapping[str, Any], step: int) -> Coefficients:
        return coefficients.rmsprop(group, step)


class Adagrad(BlockwiseOptimizer):
    """The gradient over the root of the sum of its squares, with L2 weight decay. Source: JMLR 12 (2011) 2121."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        **options: Unpack[Options],
    ) -> None:
        own = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, {**own, "initial_accumulator_value": initial_accumulator_value}, options)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["adagrad"]

    def coefficients(self, group: Mapping[str, Any], step: int) -> Coefficients:
        return coefficients.adagrad(group, step)

    def fresh_state(self, param: Tensor, group: Mapping[str, Any]) -> ParamState:
        """Sums start at ``initial_accumulator_value``: in 8 bits the code of 1.0 with that absmax."""
        state, start = super().fresh_state(param, group), group["initial_accumulator_value"]
        if "sum" in state:
            state["sum"].fill_(start)
        elif start > 0:
            state["sum_codes"].fill_(255)
            state["sum_absmax"].fill_(start)
        return state


class LAMB(BlockwiseOptimizer):
    """Adam's direction with decoupled weight decay, scaled per parameter to the parameter's own norm.

    The trust ratio |p| / |u| is over the whole parameter, and 1 where either norm is 0. Source: arXiv 1904.00962,
    algorithm 2, with the identity for phi.
    """

    NORMS = Norms.PARAM_AND_LAMB_DIRECTION

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, options)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["lamb"]

    def coefficients(self, group: Mapping[str, Any], step: int) -> Coefficients:
        return coefficients.lamb(group, step)

    def trusted(self, by: Coefficients, norms: tuple[float, float], group: Mapping[str, Any]) -> Coefficients:
        of_param, of_direction = norms
        ratio = of_param / of_direction if of_param > 0 and of_direction > 0 else 1.0
        return replace(by, step_size=by.step_size * _fp32(ratio))


class LARS(SGD):
    """Momentum on gradients scaled per parameter to a share of the parameter's norm.

    The trust ratio is trust_coefficient |p| / (|g| + weight_decay |p|) over the whole parameter, and 1 where either
    norm is 0. Source: arXiv 1708.03888, equation 6, algorithm 1.
    """

    NORMS = Norms.PARAM_AND_GRADIENT

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        trust_coefficient: float = 1e-3,
        **options: Unpack[Options],
    ) -> None:
        own = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        more = {"nesterov": nesterov, "trust_coefficient": trust_coefficient}
        BlockwiseOptimizer.__init__(self, params, {**own, **more}, options)

    def trusted(self, by: Coefficients, norms: tuple[float, float], group: Mapping[str, Any]) -> Coefficients:
        of_param, of_gradient = norms
        if of_param == 0 or of_gradient == 0:
            return by
        ratio = group["trust_coefficient"] * of_param / (of_gradient + group["weight_decay"] * of_param)
        return replace(by, trust=_fp32(ratio))


class AdEMAMix(BlockwiseOptimizer):
    """AdamW with a second, slow first moment, weighted by ``alpha``.

    ``t_alpha`` and ``t_beta3`` are the steps over which the weight and the slow decay grow to their values; None starts
    with them.
    Source: arXiv 2409.03137, algorithm 1 and section 3.1.
    """

    BETAS = 3

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        **options: Unpack[Options],
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**own, "alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3}, options)

    def rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["ademamix"]

    def coefficients(self, group: Mapping[str, Any], step: int) -> Coefficients:
        return coefficients.ademamix(group, step)


def _fp32(ratio: float) -> float:
    """Rounded, so that the last bits of a norm, which depend on the order of a sum over ranks, do not matter."""
    return float(torch.tensor(ratio, dtype=torch.float32))


class AdamW8bit(AdamW):
    """AdamW with 8-bit moments."""

    BITS = 8


class Adam8bit(Adam):
    """Adam with 8-bit moments."""

    BITS = 8


class SGD8bit(SGD):
    """SGD with 8-bit moments."""

    BITS = 8


class Lion8bit(Lion):
    """Lion with 8-bit moments."""

    BITS = 8


class RMSprop8bit(RMSprop):
    """RMSprop with 8-bit moments."""

    BITS = 8


class Adagrad8bit(Adagrad):
    """Adagrad with 8-bit moments."""

    BITS = 8


class LAMB8bit(LAMB):
    """LAMB with 8-bit moments."""

    BITS = 8


class LARS8bit(LARS):
    """LARS with 8-bit moments."""

    BITS = 8


class AdEMAMix8bit(AdEMAMix):
    """AdEMAMix with 8-bit moments."""

    BITS = 8
