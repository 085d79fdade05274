"""Put adapters into a model, and take them out again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from holdfast.adapters.adapted import ATTRIBUTE, Adapters, adapters_of
from holdfast.adapters.layer import AdaptedLinear, is_transposed
from holdfast.adapters.method import Method
from holdfast.adapters.targets import ALL_LINEAR, find_targets
from holdfast.errors import ConfigurationError

__all__ = ["eject", "inject", "merge"]

_WAY_OUT = "dequantise_base(model) makes floats of NF4 ones, which merge without being rounded again"


def inject(
    model: nn.Module,
    method: Method,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    exclude: Sequence[str] = (),
) -> Adapters:
    """Wrap the chosen layers in place and freeze every parameter of the model; no task has begun.

    Names of the wrapped layers' own parameters change, so load base weights before. For the choice see
    :func:`holdfast.adapters.targets.find_targets`.

    Raises: ConfigurationError with every reason against it; the model is then as it was.
    """
    names = find_targets(model, target_modules, exclude)
    was_trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    layers = {name: AdaptedLinear(name, model.get_submodule(name), method) for name in names}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in layers.items():
        layer.train(layer.base.training)
        _put(model, name, layer)
    adapters = Adapters(method, layers, was_trainable)
    setattr(model, ATTRIBUTE, adapters)
    return adapters


def eject(model: nn.Module) -> None:
    """Put the original layers back, the same objects with the same bits, and thaw what was not frozen before."""
    adapters = adapters_of(model)
    for name, layer in adapters.layers.items():
        _put(model, name, layer.base)
    delattr(model, ATTRIBUTE)
    trainable = set(adapters.was_trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)


@torch.no_grad()
def merge(model: nn.Module) -> dict[str, Tensor]:
    """Eject, and return new weights that hold the finished tasks in use: names and layouts as in the model's state
    dict, for ``load_state_dict(weights, strict=False)``. The model itself keeps its base weights.

    Raises: ConfigurationError where the method has no such weights, a base is quantised, or a task is being trained.
    """
    adapters = adapters_of(model)
    if adapters.method.merge_refusal:
        raise ConfigurationError(f"{adapters.method.name} cannot be merged: {adapters.method.merge_refusal}")
    if adapters.current is not None:
        raise ConfigurationError(f"task {adapters.current!r} is being trained; finish or abandon it before merging")
    merged = {f"{name}.weight": _merged(layer) for name, layer in adapters.layers.items()}
    eject(model)
    return merged


def _merged(layer: AdaptedLinear) -> Tensor:
    weight, bank = layer.weight, layer.bank()
    if not weight.is_floating_point():
        raise ConfigurationError(
            f"{layer.name} has {weight.dtype} weights, into which nothing can be merged; {_WAY_OUT}"
        )
    if not bank:
        return weight.clone()
    wide = torch.promote_types(weight.dtype, torch.float32)
    update_OD = layer.method.merged({name: rows.to(wide) for name, rows in bank.items()})
    return (weight.to(wide) + (update_OD.T if is_transposed(layer.base) else update_OD)).to(weight.dtype)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
