"""Slow, independent truths for the optimizer: the nearest codebook entry, and AdamW in double precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["adamw64", "nearest_code", "nearest_codes"]

F64 = npt.NDArray[np.float64]


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
