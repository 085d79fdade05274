"""Give a model a 4-bit base, before it gets adapters, and take it back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from holdfast.adapters.nf4 import NF4Linear
from holdfast.adapters.targets import ALL_LINEAR, find_targets
from holdfast.errors import ConfigurationError

__all__ = ["dequantise_base", "quantise_base"]


@torch.no_grad()
def quantise_base(
    model: nn.Module,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    exclude: Sequence[str] = (),
    *,
    block_size: int = 64,
    backend: str = "auto",
) -> list[str]:
    """Replace the chosen ``nn.Linear`` layers in place by :class:`~holdfast.adapters.nf4.NF4Linear`, which ``inject``
    wraps like any other. Returns their names, in the model's order.

    For the choice see :func:`holdfast.adapters.targets.find_targets`; an output layer (``exclude=["lm_head"]``) is best
    left out. The same call on a model of the same shapes makes the place for a saved state dict.

    Raises: ConfigurationError with every reason against it; the model is then as it was.
    """
    names = find_targets(model, target_modules, exclude)
    modules = {name: model.get_submodule(name) for name in names}
    if problems := [problem for name, module in modules.items() for problem in _unfit(name, module)]:
        raise ConfigurationError(problems)
    # Built before any takes its place, so that a block size or weights that are refused leave the model alone.
    new = {name: _quantised(name, module, block_size, backend) for name, module in modules.items()}
    for name, layer in new.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    return names


@torch.no_grad()
def dequantise_base(model: nn.Module) -> None:
    """Put ordinary frozen layers with the quantised weights in the place of all that are quantised, adapters or not:
    what they compute stays, but adapters that are saved afterwards belong to another base.

    Raises: ConfigurationError if none is quantised.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, NF4Linear)
    ]
    if not found:
        raise ConfigurationError(f"no layer of this {type(model).__name__} is quantised")
    for parent, name, child in found:
        setattr(parent, name, child.dense())


def _unfit(name: str, module: nn.Module) -> Iterator[str]:
    if isinstance(module, NF4Linear):
        yield f"{name} is quantised already; exclude it, or dequantise_base(model) first"
    elif not isinstance(module, nn.Linear) or type(module).forward is not nn.Linear.forward:
        yield f"{name} is a {type(module).__name__}, which computes something else than nn.Linear does; exclude it"
    elif not module.weight.is_floating_point():
        yield f"{name} has {module.weight.dtype} weights, which are quantised in another way already; exclude it"


def _quantised(name: str, module: nn.Module, block_size: int, backend: str) -> NF4Linear:
    assert isinstance(module, nn.Linear)  # or it would be unfit
    try:
        return NF4Linear.of(module, block_size=block_size, backend=backend)
    except ConfigurationError as error:
        raise ConfigurationError([f"{name}: {problem}" for problem in error.problems]) from error
