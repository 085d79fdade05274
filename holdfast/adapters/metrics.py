"""What adapters do to a model: how its atoms share the work, and what a new task costs before it has learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from holdfast.adapters.adapted import adapters_of
from holdfast.adapters.forgetting import evaluating
from holdfast.adapters.layer import AdaptedLinear
from holdfast.adapters.methods.mora import MoRA
from holdfast.adapters.routing import effective_atoms
from holdfast.adapters.tasks import abandon_task, same_tasks, start_task
from holdfast.errors import ConfigurationError

__all__ = ["RoutingStats", "boundary_jump", "measure_routing"]


@dataclass(slots=True)
class RoutingStats:
    """How the atoms of one layer, or its groups of atoms, answered. Sums, and means of them over the tokens seen."""

    tokens: int = 0
    atoms_sum: float = 0.0
    answered: int = 0
    mass_sum: list[float] = field(default_factory=list)

    @property
    def effective_atoms(self) -> float:
        """Mean of 1 / Σ w², weights before the threshold."""
        return self.atoms_sum / self.tokens

    @property
    def answered_share(self) -> float:
        """Share of the tokens for which an atom passes the threshold of inference."""
        return self.answered / self.tokens

    @property
    def mass_by_task(self) -> list[float]:
        """Share of the weights that falls on the atoms of each task in use, oldest first; before the threshold."""
        return [mass / self.tokens for mass in self.mass_sum]


@contextmanager
def measure_routing(model: nn.Module) -> Iterator[dict[str, RoutingStats]]:
    """While the block runs the model, fill one record per adapted layer. Dropout is left out of what is measured.

    Raises: ConfigurationError for a method that does not route.
    """
    adapters = adapters_of(model)
    if not isinstance(adapters.method, MoRA):
        raise ConfigurationError(f"{adapters.method.name} does not route, so there is nothing to measure")
    found = {name: RoutingStats() for name in adapters.layers}
    handles = [
        layer.register_forward_pre_hook(partial(_note, found[name], adapters.method))
        for name, layer in adapters.layers.items()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def boundary_jump(model: nn.Module, loss: Callable[[], Tensor | float], *, seed: int = 0) -> float:
    """``loss()`` of the model in evaluation mode right after a new task's untrained tensors join, minus before.

    Rounding for methods that add up their tasks; more for MoRA, where new keys join the norm and the selection.
    The model is afterwards as it was. Raises: ConfigurationError while a task is being trained.
    """
    with evaluating(model), same_tasks(model):
        before = float(loss())
        start_task(model, "(untrained)", seed=seed)
        try:
            for layer in adapters_of(model).layers.values():
                layer.count_untrained()
            return float(loss()) - before
        finally:
            abandon_task(model)


@torch.no_grad()
def _note(stats: RoutingStats, method: MoRA, layer: nn.Module, args: tuple[Any, ...]) -> None:
    assert isinstance(layer, AdaptedLinear)
    bank = layer.bank()
    if not bank:
        return
    x_PD = args[0].flatten(0, -2)
    responses_PE = method.responses(x_PD, F.linear(x_PD, bank["down"]), bank)
    routing = method.route(responses_PE)
    mass_PE = torch.zeros_like(responses_PE, dtype=routing.weights.dtype)
    mass_E = mass_PE.scatter(-1, routing.index, routing.weights).sum(0)
    experts = [rows // method.group for rows in layer.rows_in_use("down")]
    by_task = [float(part.sum()) for part in torch.split(mass_E, experts)]
    stats.mass_sum = [a + b for a, b in zip(stats.mass_sum or [0.0] * len(by_task), by_task, strict=True)]
    stats.tokens += len(x_PD)
    stats.atoms_sum += float(effective_atoms(routing.weights).sum())
    stats.answered += int(method.answers(routing, responses_PE.shape[-1]).any(-1).sum())
