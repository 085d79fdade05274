"""Holdfast keeps a language-model training run alive while processes and nodes go away under it.

``holdfast.train(config)`` is ``holdfast train`` for scripts and notebooks.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from holdfast.launch.run import train

__all__ = ["__version__", "train"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:  # Any: type checkers read the import above
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from holdfast.launch.run import train  # the optimizer and the snapshot engine are used alone, too

    return train
