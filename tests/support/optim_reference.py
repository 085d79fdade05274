"""Slow, independent truths for the optimizers: the nearest codebook entry, and every update rule in double precision.

The rules are written from the papers and from torch's documentation, not from the package. With a ``Quantiser`` the
moments pass through 8 bits between two steps, so that an 8-bit run has a double-precision truth as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["REFERENCES", "Quantiser", "Reference", "adamw64", "clip_factor", "nearest_code", "nearest_codes"]

F64 = npt.NDArray[np.float64]
_ULP = 2.0**-23


def nearest_code(ratio: float, table: Sequence[float]) -> int:
    """Walk outwards from zero while the ratio lies beyond the fp32 midpoint to the next entry; a tie stays."""
    entries = [np.float32(entry) for entry in table]
    code = entries.index(np.float32(0))
    outwards = 1 if ratio > 0 else -1
    while 0 <= code + outwards < len(entries):
        middle = (entries[code] + entries[code + outwards]) / np.float32(2)
        if abs(ratio) <= abs(middle):
            break
        code += outwards
    return code


def nearest_codes(x: npt.NDArray[np.float32], table: Sequence[float], block_size: int) -> list[int]:
    """The codes of a flat array, block by block."""
    codes: list[int] = []
    for start in range(0, len(x), block_size):
        block = x[start : start + block_size]
        absmax = np.abs(block).max()
        codes += [nearest_code(float(value / absmax) if absmax else 0.0, table) for value in block]
    return codes


def adamw64(
    theta: F64,
    gradient: Callable[[int], F64],
    steps: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> F64:
    """Decoupled weight decay as arXiv 1711.05101, algorithm 2, with the decay scaled by the learning rate."""
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t in range(1, steps + 1):
        g = gradient(t)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        theta = theta - lr * weight_decay * theta - lr * m_hat / (np.sqrt(v_hat) + eps)
    return theta


@dataclass(frozen=True)
class Quantiser:
    """Block-wise 8-bit storage of flat moments: fp32 absmax, nearest entry by fp32 midpoints, ties to the lower
    magnitude, and with ``nonzero`` no positive second moment becomes 0. Source: arXiv 2110.02861, section 2.
    """

    tables: Mapping[bool, Sequence[float]]
    """Codebook by "is signed"."""
    block_size: int
    nonzero: bool = True

    def encode(self, moment: F64, signed: bool) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
        """Codes, and the absmax of each block. As ``nearest_codes``, which takes 50 µs per element, with numpy."""
        x, table = moment.astype(np.float32), np.array(self.tables[signed], np.float32)
        absmax = np.abs(self._blocks(x)).max(1)
        ratio = x / self._per_element(np.where(absmax > 0, absmax, np.float32(1)), len(x))
        middle = (table[1:] + table[:-1]) / np.float32(2)
        from_below, from_above = np.searchsorted(middle, ratio, "left"), np.searchsorted(middle, ratio, "right")
        codes = np.where(ratio > 0, from_below, from_above)
        if self.nonzero and not signed:
            codes = np.where(x > 0, np.maximum(codes, 1), codes)
        return codes, absmax

    def decode(self, codes: npt.NDArray[Any], absmax: npt.NDArray[np.float32], signed: bool) -> F64:
        """Entry times absmax, rounded to fp32 as it is when a step reads it."""
        entries = np.array(self.tables[signed], np.float32)[codes]
        return (entries * self._per_element(absmax, len(codes))).astype(np.float64)

    def misplaced(self, codes: npt.NDArray[Any], moment: F64, before: F64, signed: bool) -> npt.NDArray[np.intp]:
        """Where a code is wrong even when its moment, which came from ``before``, is off by a few fp32 roundings.

        A code owns the ratios between the midpoints to its neighbours; these cells are widened by 16 roundings of
        everything that was added up for the moment.
        """
        table = np.array(self.tables[signed])
        middle = (table[1:] + table[:-1]) / 2
        lower, upper = np.append(-np.inf, middle)[codes], np.append(middle, np.inf)[codes]
        absmax = np.abs(self._blocks(moment)).max(1)
        scale = self._per_element(np.where(absmax > 0, absmax, 1.0), len(moment))
        slack = 8 * _ULP * (2 * np.abs(before) + np.abs(moment)) / scale
        wrong = (moment / scale < lower - slack) | (moment / scale > upper + slack)
        if self.nonzero and not signed:
            lifted = (codes == 1) & (moment > 0) & (moment / scale < upper)
            wrong = (wrong & ~lifted) | ((codes == 0) & (moment > 0))
        return np.flatnonzero(wrong)

    def _blocks(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.pad(x, (0, -len(x) % self.block_size)).reshape(-1, self.block_size)

    def _per_element(self, per_block: npt.NDArray[Any], n: int) -> npt.NDArray[Any]:
        return np.repeat(per_block, self.block_size)[:n]


class Reference:
    """One flat parameter under one optimizer, in double precision. ``options`` may change between steps."""

    def __init__(self, theta: F64, options: Mapping[str, Any], quantiser: Quantiser | None = None) -> None:
        self.theta, self.options, self.quantiser = theta.astype(np.float64), dict(options), quantiser
        self.t = 0
        self.moments: dict[str, F64] = {}
        self.signed: dict[str, bool] = {}
        self.exact: dict[str, F64] = {}
        """The moments of the last step before they were quantised."""
        self.start()

    def start(self) -> None:
        """Create the moments."""

    def update(self, g: F64) -> None:
        """One step: new moments, and the parameter from them."""
        raise NotImplementedError

    def step(self, g: F64) -> None:
        """``update``, then the moments go through 8 bits if there is a quantiser."""
        self.t += 1
        self.update(g)
        self.exact = {name: moment.copy() for name, moment in self.moments.items()}
        if self.quantiser:
            for name, signed in self.signed.items():
                codes, absmax = self.quantiser.encode(self.moments[name], signed)
                self.moments[name] = self.quantiser.decode(codes, absmax, signed)

    def add_moment(self, name: str, *, signed: bool, value: float = 0.0) -> None:
        self.moments[name], self.signed[name] = np.full_like(self.theta, value), signed

    def average(self, name: str, new: F64, beta: float) -> F64:
        """Exponential moving average."""
        self.moments[name] = beta * self.moments[name] + (1 - beta) * new
        return self.moments[name]

    def decay(self) -> None:
        """Decoupled, before the update. Source: arXiv 1711.05101, with the decay scaled by the learning rate."""
        self.theta = self.theta * (1 - self.options["lr"] * self.options["weight_decay"])

    def with_l2(self, g: F64) -> F64:
        return g + self.options["weight_decay"] * self.theta


class _AdamLike(Reference):
    def start(self) -> None:
        self.add_moment("exp_avg", signed=True)
        self.add_moment("exp_avg_sq", signed=False)

    def direction(self, g: F64) -> F64:
        """m_hat / (sqrt(v_hat) + eps). Source: arXiv 1412.6980, algorithm 1."""
        b1, b2 = self.options["betas"]
        m_hat = self.average("exp_avg", g, b1) / (1 - b1**self.t)
        v_hat = self.average("exp_avg_sq", g**2, b2) / (1 - b2**self.t)
        return m_hat / (np.sqrt(v_hat) + self.options["eps"])


class AdamW(_AdamLike):
    """Source: arXiv 1711.05101, algorithm 2."""

    def update(self, g: F64) -> None:
        self.decay()
        self.theta = self.theta - self.options["lr"] * self.direction(g)


class Adam(_AdamLike):
    """Source: arXiv 1412.6980, algorithm 1; L2 as torch.optim.Adam."""

    def update(self, g: F64) -> None:
        self.theta = self.theta - self.options["lr"] * self.direction(self.with_l2(g))


class LAMB(_AdamLike):
    """Source: arXiv 1904.00962, algorithm 2, with the identity as scaling function."""

    def update(self, g: F64) -> None:
        r = self.direction(g) + self.options["weight_decay"] * self.theta
        size, size_of_r = np.linalg.norm(self.theta), np.linalg.norm(r)
        trust = size / size_of_r if size and size_of_r else 1.0
        self.theta = self.theta - self.options["lr"] * trust * r


class SGD(Reference):
    """Source: the documentation of torch.optim.SGD."""

    def start(self) -> None:
        if self.options["momentum"]:
            self.add_moment("momentum_buffer", signed=True)

    def update(self, g: F64) -> None:
        self.descend(self.with_l2(g))

    def descend(self, g: F64) -> None:
        momentum = self.options["momentum"]
        if momentum:
            buffer = momentum * self.moments["momentum_buffer"] + (1 - self.options["dampening"]) * g
            buffer = self.moments["momentum_buffer"] = g if self.t == 1 else buffer
            g = g + momentum * buffer if self.options["nesterov"] else buffer
        self.theta = self.theta - self.options["lr"] * g


class LARS(SGD):
    """Source: arXiv 1708.03888, algorithm 1: the layer's own rate multiplies the gradient with its decay."""

    def update(self, g: F64) -> None:
        w, size, decay = np.linalg.norm(self.theta), np.linalg.norm(g), self.options["weight_decay"]
        local = self.options["trust_coefficient"] * w / (size + decay * w) if w and size else 1.0
        self.descend(local * self.with_l2(g))


class Lion(Reference):
    """Source: arXiv 2302.06675, algorithm 2."""

    def start(self) -> None:
        self.add_moment("exp_avg", signed=True)

    def update(self, g: F64) -> None:
        b1, b2 = self.options["betas"]
        sign = np.sign(b1 * self.moments["exp_avg"] + (1 - b1) * g)
        self.decay()
        self.theta = self.theta - self.options["lr"] * sign
        self.average("exp_avg", g, b2)


class RMSprop(Reference):
    """Source: the documentation of torch.optim.RMSprop."""

    def start(self) -> None:
        self.add_moment("square_avg", signed=False)
        if self.options["centered"]:
            self.add_moment("grad_avg", signed=True)
        if self.options["momentum"]:
            self.add_moment("momentum_buffer", signed=True)

    def update(self, g: F64) -> None:
        g, alpha = self.with_l2(g), self.options["alpha"]
        variance = self.average("square_avg", g**2, alpha)
        if self.options["centered"]:  # 8-bit averages may disagree so much that the difference is negative
            variance = np.maximum(variance - self.average("grad_avg", g, alpha) ** 2, 0)
        move = g / (np.sqrt(variance) + self.options["eps"])
        if self.options["momentum"]:
            move = self.options["momentum"] * self.moments["momentum_buffer"] + move
            self.moments["momentum_buffer"] = move
        self.theta = self.theta - self.options["lr"] * move


class Adagrad(Reference):
    """Source: the documentation of torch.optim.Adagrad."""

    def start(self) -> None:
        self.add_moment("sum", signed=False, value=self.options["initial_accumulator_value"])

    def update(self, g: F64) -> None:
        g = self.with_l2(g)
        rate = self.options["lr"] / (1 + (self.t - 1) * self.options["lr_decay"])
        self.moments["sum"] = self.moments["sum"] + g**2
        self.theta = self.theta - rate * g / (np.sqrt(self.moments["sum"]) + self.options["eps"])


class AdEMAMix(_AdamLike):
    """Source: arXiv 2409.03137, algorithm 1, and the schedulers of its section 3."""

    def start(self) -> None:
        super().start()
        self.add_moment("exp_avg_slow", signed=True)

    def update(self, g: F64) -> None:
        b1, b2, _ = self.options["betas"]
        fast = self.average("exp_avg", g, b1) / (1 - b1**self.t)
        slow = self.average("exp_avg_slow", g, self.beta3())
        v_hat = self.average("exp_avg_sq", g**2, b2) / (1 - b2**self.t)
        self.decay()
        self.theta = self.theta - self.options["lr"] * (fast + self.alpha() * slow) / (
            np.sqrt(v_hat) + self.options["eps"]
        )

    def alpha(self) -> float:
        end, over = self.options["alpha"], self.options["t_alpha"]
        return float(min(self.t * end / over, end) if over else end)

    def beta3(self) -> float:
        start, _, end = self.options["betas"]
        over = self.options["t_beta3"]
        if not over:
            return float(end)
        share = self.t / over
        log = math.log(start) * math.log(end) / ((1 - share) * math.log(end) + share * math.log(start))
        return float(min(math.exp(log), end))


REFERENCES: dict[str, type[Reference]] = {
    rule.__name__: rule for rule in (AdamW, Adam, SGD, Lion, RMSprop, Adagrad, LAMB, LARS, AdEMAMix)
}
"""By the name of the 32-bit class."""


def clip_factor(squared_norms: Sequence[float], percentile: int) -> float:
    """What percentile clipping multiplies a gradient by, given its own squared norm last and all earlier ones before.

    Of the last 100, where the first counts for all that are missing. Source: arXiv 2110.02861, appendix.
    """
    last = [squared_norms[0]] * max(0, 100 - len(squared_norms)) + list(squared_norms[-100:])
    return min(1.0, math.sqrt(sorted(last)[percentile] / squared_norms[-1])) if squared_norms[-1] else 1.0
