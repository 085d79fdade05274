"""How large the adapters are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from holdfast.adapters.adapted import adapters_of

__all__ = ["Footprint", "footprint"]


@dataclass(frozen=True, slots=True)
class Footprint:
    """Numbers of elements, over all layers; the base is not counted."""

    stored: int
    """Of every finished task in memory, what a method remembers of it included, and of the current one."""
    active: int
    """That the forward pass of one token reads, with the tasks that are in use."""
    trainable: int
    """That get a gradient."""


def footprint(model: nn.Module) -> Footprint:
    """Counted in the model as it is: between tasks nothing is trainable."""
    layers = adapters_of(model).layers.values()
    own = [[*layer.sealed().values(), *layer.current.values()] for layer in layers]
    return Footprint(
        stored=sum(rows.numel() for tensors in own for rows in tensors),
        active=sum(layer.method.active(part.bank) for layer in layers for part in layer.parts()),
        trainable=sum(rows.numel() for tensors in own for rows in tensors if rows.requires_grad),
    )
