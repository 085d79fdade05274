"""The life of a task: start, train with an optimizer of its own, finish; and which tasks act afterwards."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from holdfast.adapters.adapted import Adapters, adapters_of
from holdfast.adapters.layer import Shown
from holdfast.errors import ConfigurationError

__all__ = ["abandon_task", "finish_task", "penalty", "same_tasks", "seed_of", "start_task", "use_tasks", "using_tasks"]


def start_task(model: nn.Module, name: str, *, seed: int = 0) -> None:
    """Give every adapted layer new parameters for a task. All tasks are shown again.

    Random values depend on ``seed``, the task's and the layer's name only, so they are equal on every rank. Make a new
    optimizer over ``trainable_parameters(model)``: the last task's holds other tensors.

    Raises: ConfigurationError for a name that is taken, an unfinished task, or inputs that were not collected.
    """
    adapters = adapters_of(model)
    if adapters.current is not None:
        raise ConfigurationError(f"task {adapters.current!r} is being trained; finish or abandon it first")
    if not name or name in adapters.tasks:
        raise ConfigurationError(f"task name {name!r} must be new and not empty; finished are {adapters.tasks}")
    _need_inputs(adapters, f"before task {name!r} starts")
    for layer in adapters.layers.values():
        layer.show(None)
        layer.begin(_generator(f"{seed}/{name}/{layer.name}"))
    adapters.current = name


def finish_task(model: nn.Module) -> None:
    """Freeze the current task's tensors into the bank.

    Raises: ConfigurationError without a current task, for one that was never trained, or if inputs were not collected.
    """
    adapters = adapters_of(model)
    name = _current(adapters)
    if not any(layer.current[adapters.method.zero_at_start].any() for layer in adapters.layers.values()):
        raise ConfigurationError(f"task {name!r} was never trained: train it, or abandon it")
    _need_inputs(adapters, f"before task {name!r} is finished")
    for layer in adapters.layers.values():
        layer.seal()
    adapters.tasks.append(name)
    adapters.current = None


def abandon_task(model: nn.Module) -> None:
    """Drop the current task's tensors; the finished tasks are as they were. Raises: ConfigurationError without one."""
    adapters = adapters_of(model)
    _current(adapters)
    for layer in adapters.layers.values():
        layer.abandon()
    adapters.current = None


def use_tasks(
    model: nn.Module,
    *,
    first: int | None = None,
    only: str | None = None,
    weights: Mapping[str, float] | None = None,
) -> None:
    """Show the ``first`` tasks (0: the bare base), or ``only`` one, or those that have ``weights``, each times its own,
    or without any of the three what the method does by itself.

    A prefix computes bit by bit what the model computed when those were all its tasks.

    Raises: ConfigurationError for tasks that do not exist, or that the method has overwritten, or cannot weigh.
    """
    adapters = adapters_of(model)
    if weights is not None and (first is not None or only is not None):
        raise ConfigurationError(f"weights go without first={first} and only={only!r}")
    tasks: Shown = _span(adapters, first, only) if weights is None else _weighted(adapters, weights)
    for layer in adapters.layers.values():
        layer.show(tasks)


@contextmanager
def using_tasks(
    model: nn.Module,
    *,
    first: int | None = None,
    only: str | None = None,
    weights: Mapping[str, float] | None = None,
) -> Iterator[None]:
    """:func:`use_tasks` for the length of a ``with`` block; then again what was shown before."""
    with same_tasks(model):
        use_tasks(model, first=first, only=only, weights=weights)
        yield


@contextmanager
def same_tasks(model: nn.Module) -> Iterator[None]:
    """Afterwards every layer shows its own tasks again."""
    before = [(layer, layer.shown) for layer in adapters_of(model).layers.values()]
    try:
        yield
    finally:
        for layer, tasks in before:
            layer.show(tasks)


def penalty(model: nn.Module) -> Tensor:
    """What the method adds to the loss of the current task, summed over layers: a scalar, zero for most methods.

    Some of it may depend on the tokens of the last pass in training, so ask after that pass, once for each.
    """
    layers = list(adapters_of(model).layers.values())
    found = [layer.method.penalty(dict(layer.current), layer.sealed()) for layer in layers if layer.current]
    terms = [term for term in [*found, *(layer.cost for layer in layers)] if term is not None]
    return torch.stack(terms).sum() if terms else layers[0].weight.new_zeros(()).float()


def _span(adapters: Adapters, first: int | None, only: str | None) -> tuple[int, int] | None:
    if first is None and only is None:
        return None
    names = [*adapters.tasks, *([adapters.current] if adapters.current else [])]
    if first is not None and (only is not None or not 0 <= first <= len(names)):
        raise ConfigurationError(f"first={first} must be from 0 to {len(names)}, and go without only={only!r}")
    if only is not None and only not in names:
        raise ConfigurationError(f"there is no task {only!r}; there are {names}")
    start, stop = (0, first or 0) if only is None else (names.index(only), names.index(only) + 1)
    if not adapters.method.keeps_tasks and 0 < stop < len(adapters.tasks):
        raise ConfigurationError(
            f"{adapters.method.name} has overwritten {names[stop - 1]!r} by {adapters.tasks[-1]!r}"
        )
    return start, stop


def _weighted(adapters: Adapters, weights: Mapping[str, float]) -> dict[int, float]:
    names = [*adapters.tasks, *([adapters.current] if adapters.current else [])]
    problems = [f"there is no task {name!r}; there are {names}" for name in weights if name not in names]
    problems += [
        f"the weight {w} of task {name!r} is not finite" for name, w in weights.items() if not math.isfinite(w)
    ]
    if not adapters.method.acts_apart:
        problems.append(f"{adapters.method.name} computes its tasks together, so that none has a weight of its own")
    if problems:
        raise ConfigurationError(problems)
    return {names.index(name): weight for name, weight in weights.items()}


def _current(adapters: Adapters) -> str:
    if adapters.current is None:
        raise ConfigurationError(f"no task is being trained; start one (finished are {adapters.tasks})")
    return adapters.current


def _need_inputs(adapters: Adapters, when: str) -> None:
    missing = [name for name, layer in adapters.layers.items() if layer.inputs is None]
    if adapters.method.needs_inputs and missing:
        raise ConfigurationError(
            f"{adapters.method.name} needs the inputs of {', '.join(missing[:3])}{' …' * (len(missing) > 3)} {when}: "
            "run some of the task's data under collect_inputs(model)"
        )


def seed_of(key: str) -> int:
    """For a generator: a function of these letters only."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)


def _generator(key: str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(key))
