"""8-bit AdamW, its quantiser and its schedule. Needs torch and nothing else: ``from holdfast.optim import AdamW8bit``.

Names are imported when they are first used, so that a process that only reads the options never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.optim.adamw8bit import AdamW8bit
    from holdfast.optim.build import build_optimizer, ensure_state, parameter_groups
    from holdfast.optim.config import OptimConfig, OptimName
    from holdfast.optim.describe import StateTensor, describe_state, load_scalars, scalars
    from holdfast.optim.quantize import codebook, dequantize_blockwise, quantize_blockwise
    from holdfast.optim.schedules import learning_rate

__all__ = [
    "AdamW8bit",
    "OptimConfig",
    "OptimName",
    "StateTensor",
    "build_optimizer",
    "codebook",
    "dequantize_blockwise",
    "describe_state",
    "ensure_state",
    "learning_rate",
    "load_scalars",
    "parameter_groups",
    "quantize_blockwise",
    "scalars",
]

_HOMES = {
    "AdamW8bit": "adamw8bit",
    "OptimConfig": "config",
    "OptimName": "config",
    "StateTensor": "describe",
    "build_optimizer": "build",
    "codebook": "quantize",
    "dequantize_blockwise": "quantize",
    "describe_state": "describe",
    "ensure_state": "build",
    "learning_rate": "schedules",
    "load_scalars": "describe",
    "parameter_groups": "build",
    "quantize_blockwise": "quantize",
    "scalars": "describe",
}


def __getattr__(name: str) -> Any:  # Any: whatever the module holds; type checkers read the imports above
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
