"""Learning rate as a pure function of the step."""

from __future__ import annotations

import math

from holdfast.optim.config import OptimConfig

__all__ = ["learning_rate"]


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """The rate of the update that follows ``step`` finished ones: linear warm-up, then a half cosine.

    The last update of the warm-up has the full rate, the last of the run (``step == max_steps - 1``) and any after
    it ``lr * min_lr_ratio``.

    Source: arXiv 1608.03983, equation 5, without restarts.
    """
    update = step + 1
    if update <= config.warmup_steps:
        return config.lr * update / config.warmup_steps
    progress = min(1.0, (update - config.warmup_steps) / max(1, max_steps - config.warmup_steps))
    share = config.min_lr_ratio + (1.0 - config.min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * share
