"""Which directions a new domain has to leave alone: those in which the earlier stacks answer, or are asked.

A basis is kept as its rows V [M, D or O]; the projector V Vᵀ itself, [O, O], is never formed.

Suffixes as in ``holdfast.adapters.method``; N samples, M directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.adapters.adapted import adapters_of
from holdfast.adapters.forgetting import evaluating
from holdfast.adapters.layer import AdaptedLinear
from holdfast.adapters.tasks import using_tasks
from holdfast.errors import ConfigurationError

__all__ = ["outside", "protect", "protected_directions", "top_directions"]

_OVERSAMPLING = 8
_POWER_ITERATIONS = 2
_NOTHING = 1e-6
"""Of the largest singular value: below it a direction is rounding."""


def outside(rows_RO: Tensor, basis_MO: Tensor) -> Tensor:
    """What of each row is orthogonal to the basis; in the rows' dtype, computed in the wider one. Differentiable."""
    wide_RO = rows_RO.to(torch.promote_types(rows_RO.dtype, basis_MO.dtype))
    wide_MO = basis_MO.to(wide_RO.dtype)
    outside_RO = wide_RO - (wide_RO @ wide_MO.T) @ wide_MO
    return outside_RO.to(rows_RO.dtype)


def top_directions(rows_NO: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """At most ``count`` right singular vectors [M, O], strongest first, without those of no weight.

    Exact up to 2 ``count`` rows, beyond by random projections with power iterations: the cost is then that of products
    with O × (count + 8) numbers. Source: arXiv 0909.4061, algorithms 4.4 and 5.1.
    """
    rows_NO = rows_NO.to(torch.promote_types(rows_NO.dtype, torch.float32))
    if len(rows_NO) <= 2 * count:
        _, values_M, vectors_MO = torch.linalg.svd(rows_NO, full_matrices=False)
    else:
        values_M, vectors_MO = _randomised(rows_NO, count + _OVERSAMPLING, seed)
    kept_M = values_M > _NOTHING * values_M[:1].clamp_min(torch.finfo(values_M.dtype).tiny)
    directions_MO: Tensor = vectors_MO[kept_M][:count]
    return directions_MO


def _randomised(rows_NO: Tensor, width: int, seed: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    random_OW = torch.randn(rows_NO.shape[1], min(width, *rows_NO.shape), generator=draw).to(rows_NO)
    range_NW = torch.linalg.qr(rows_NO @ random_OW)[0]
    for _ in range(_POWER_ITERATIONS):
        range_NW = torch.linalg.qr(rows_NO @ torch.linalg.qr(rows_NO.T @ range_NW)[0])[0]
    _, values_W, vectors_WO = torch.linalg.svd(range_NW.T @ rows_NO, full_matrices=False)
    return values_W, vectors_WO


def protected_directions(
    model: nn.Module, samples: Mapping[str, Callable[[], object]], *, count: int, side: str = "output", seed: int = 0
) -> dict[str, Tensor]:
    """An orthonormal basis for each layer, of the ``count`` strongest directions of every earlier domain.

    ``samples``: for each domain, a call that runs the model on some of *its* data. On the ``"output"`` side a row is
    what all finished stacks add, on the ``"input"`` side what the layer sees, each the mean over a sample's positions.
    The finished stacks act, a current one does not.

    The paper speaks of ``count`` directions per domain, while the authors' code has ``count`` for all of them, from the
    new domain's own data. One entry in ``samples`` for all domains pools them.

    Raises: ConfigurationError for a layer in which no direction would be left. Source: arXiv 2604.01152.
    """
    adapters = adapters_of(model)
    found = {name: list[Tensor]() for name in adapters.layers}
    for run in samples.values():
        seen = _capture(model, run, side)
        for name, rows in seen.items():
            found[name].append(top_directions(torch.cat(rows), count, seed=seed))
    bases = {name: _joined(parts) for name, parts in found.items() if parts}
    full = [name for name, basis in bases.items() if len(basis) >= basis.shape[1]]
    if full:
        raise ConfigurationError(
            f"{count} directions for each of {len(samples)} domains leave nothing of {', '.join(full[:3])} to learn "
            "in; protect fewer directions, or pool the domains"
        )
    return bases


def protect(model: nn.Module, bases: Mapping[str, Tensor]) -> None:
    """Keep the current task's stack out of these directions, [M, D or O] by layer, from its first step on.

    Raises: ConfigurationError without a current task, and for bases that do not fit the layers.
    """
    adapters = adapters_of(model)
    if adapters.current is None:
        raise ConfigurationError("no task is being trained; start one, then protect the earlier ones from it")
    widths = {name: layer.current["basis"].shape[1] for name, layer in adapters.layers.items()}
    if wrong := [name for name, basis in bases.items() if widths.get(name) != basis.shape[1]]:
        raise ConfigurationError(
            f"the bases of {', '.join(wrong[:3])} do not fit: layers' widths are {widths}; collect them on the side "
            "that the method protects"
        )
    for name, basis in bases.items():
        layer = adapters.layers[name]
        layer.current["basis"] = nn.Parameter(basis.to(layer.weight.device), requires_grad=False)


def _joined(parts: list[Tensor]) -> Tensor:
    """One orthonormal basis of several: what a later one shares with an earlier one counts once."""
    rows = torch.cat(parts)
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    basis: Tensor = vectors[values > _NOTHING * max(1, len(rows))]
    return basis


def _capture(model: nn.Module, run: Callable[[], object], side: str) -> dict[str, list[Tensor]]:
    adapters = adapters_of(model)
    rows = dict[str, list[Tensor]]()
    handles = [
        layer.register_forward_pre_hook(partial(_note, rows.setdefault(layer.name, []), side))
        for layer in adapters.layers.values()
    ]
    try:
        with evaluating(model), using_tasks(model, first=len(adapters.tasks)):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {name: found for name, found in rows.items() if found}


def _note(rows: list[Tensor], side: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
    assert isinstance(layer, AdaptedLinear)
    seen = args[0]
    if side == "output":
        parts = [layer.method.delta(seen, p.bank, is_training=False) * p.weight for p in layer.parts()]
        if not parts:
            return
        seen = torch.stack(parts).sum(0)
    rows.append(seen.float().flatten(1, -2).mean(1) if seen.ndim > 2 else seen.float())
