"""What is known about a model with adapters: kept at the model itself, so that functions need only the model."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from holdfast.adapters.layer import AdaptedLinear
from holdfast.adapters.method import Method
from holdfast.errors import ConfigurationError

__all__ = ["ATTRIBUTE", "Adapters", "adapters_of", "trainable_parameters"]

ATTRIBUTE = "holdfast_adapters"


@dataclass(slots=True)
class Adapters:
    """One method in one model. A deep copy of the model has its own."""

    method: Method
    layers: dict[str, AdaptedLinear]
    """By the name of the module that each adapts, in the model's order."""
    was_trainable: list[str]
    """Parameters that had a gradient before, by the names that they had."""
    tasks: list[str] = field(default_factory=list)
    """Finished tasks, oldest first."""
    current: str | None = None
    """The task that is being trained."""
    origin: object = None
    """What they were read from, for a writer of the same format that loses nothing."""


def adapters_of(model: nn.Module) -> Adapters:
    """Raises: ConfigurationError if there are none."""
    found = getattr(model, ATTRIBUTE, None)
    if not isinstance(found, Adapters):
        raise ConfigurationError(f"this {type(model).__name__} has no adapters; inject them into it first")
    return found


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The current task's, for an optimizer of its own: these are new objects in each task. Empty between tasks."""
    layers = adapters_of(model).layers.values()
    return [rows for layer in layers for rows in layer.current.values() if rows.requires_grad]
