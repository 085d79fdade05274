"""Holdfast keeps a language-model training run alive while processes and nodes go away under it.

``holdfast.train(["model=1m"])`` is ``holdfast train model=1m`` for scripts and notebooks. ``holdfast.Snapshotter``
keeps the state of your own torch loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.fault_tolerance.own_loop import Snapshotter
    from holdfast.launch.run import train

__all__ = ["Snapshotter", "__version__", "train"]

__version__ = "0.1.0"

_WHERE = {"train": "holdfast.launch.run", "Snapshotter": "holdfast.fault_tolerance.own_loop"}
"""Loaded when first used: the optimizer and the snapshot engine are used alone, too."""


def __getattr__(name: str) -> Any:  # Any: type checkers read the imports above
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
