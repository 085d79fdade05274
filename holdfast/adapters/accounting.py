"""How large the adapters are, and the base that they act on."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from holdfast.adapters.adapted import adapters_of
from holdfast.adapters.fingerprint import base_state
from holdfast.adapters.nf4 import NF4Linear

__all__ = ["BaseFootprint", "Footprint", "base_footprint", "footprint"]


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


@dataclass(frozen=True, slots=True)
class BaseFootprint:
    """What the frozen model takes, with or without adapters, which are not counted."""

    quantised: int
    """Weights that are kept in four bits."""
    quantised_bytes: int
    """Of their codes and scales."""
    other_bytes: int
    """Of everything else in the state dict: embeddings, norms, biases, layers that were left out."""

    @property
    def bits_per_weight(self) -> float:
        """Of those that are quantised; 4.127 in blocks of 64, 0 without any."""
        return 8 * self.quantised_bytes / self.quantised if self.quantised else 0.0


def base_footprint(model: nn.Module) -> BaseFootprint:
    """Counted in the model as it is. A tensor with several names counts once."""
    layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
    quantised_bytes = sum(layer.size_bytes for layer in layers)
    tensors = {tensor.data_ptr() or name: tensor.nbytes for name, tensor in base_state(model).items()}
    return BaseFootprint(
        quantised=sum(layer.in_features * layer.out_features for layer in layers),
        quantised_bytes=quantised_bytes,
        other_bytes=sum(tensors.values()) - quantised_bytes,
    )
