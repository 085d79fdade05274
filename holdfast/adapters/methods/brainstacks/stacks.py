"""What is known of a frozen stack, and which stacks act in each mode.

Everything is keyed by (domain, round); a task of ``holdfast.adapters`` is called ``domain/round``. A mode is a weight
for every stack that acts, by task name, for ``use_tasks(model, weights=...)``; stacks without one are off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from holdfast.adapters.adapted import adapters_of
from holdfast.adapters.tensor_file import tensors_digest
from holdfast.errors import ConfigurationError, InvariantViolation

__all__ = [
    "Stack",
    "check_frozen",
    "domains_of",
    "own_only",
    "prefix",
    "replay",
    "routed",
    "stack_digest",
    "task_name",
    "ungated",
]

_DOMAIN = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, slots=True)
class Stack:
    """One round of one domain."""

    domain: str
    round: int
    """From 1."""
    after: Mapping[str, str]
    """Its lineage: the tasks that acted while it was trained, oldest first, and their digests."""
    digest: str
    """sha256 over its tensors in all layers."""
    before: float
    """Validation loss without it, nats."""
    loss: float
    """Validation loss with it, over those that it was trained on."""
    steps: int
    """That were trained; the kept tensors may be of an earlier one."""
    seconds: float
    ended: str
    """Why the round ended."""

    @property
    def task(self) -> str:
        """Its name among the adapters' tasks."""
        return task_name(self.domain, self.round)


def task_name(domain: str, number: int) -> str:
    """Raises: ConfigurationError for a domain that cannot be part of a file's name."""
    if not _DOMAIN.fullmatch(domain):
        raise ConfigurationError(f"domain {domain!r} must consist of letters, digits, _ and -")
    return f"{domain}/{number}"


def domains_of(stacks: Iterable[Stack]) -> list[str]:
    """Oldest first."""
    return list(dict.fromkeys(stack.domain for stack in stacks))


def ungated(stacks: Iterable[Stack]) -> dict[str, float]:
    """All of them, on every input."""
    return {stack.task: 1.0 for stack in stacks}


def own_only(stacks: Iterable[Stack], domain: str) -> dict[str, float]:
    """The domain's own. Not what they were trained as, unless the domain was the first or independent of the others."""
    return routed(stacks, {domain: 1.0})


def prefix(stacks: Sequence[Stack], domain: str) -> dict[str, float]:
    """Those that acted when the domain's last round was frozen: its loss then, bit by bit.

    Raises: ConfigurationError for a domain without stacks, or where :func:`replay` does.
    """
    own = [stack for stack in stacks if stack.domain == domain]
    if not own:
        raise ConfigurationError(f"domain {domain!r} has no stack; there are {domains_of(stacks)}")
    return replay(stacks, max(own, key=lambda stack: stack.round))


def replay(stacks: Iterable[Stack], stack: Stack) -> dict[str, float]:
    """The lineage of one stack and itself. Raises: ConfigurationError if part of it has been removed or replaced, or
    comes in another order."""
    lineage = {**stack.after, stack.task: stack.digest}
    present = {other.task: other.digest for other in stacks if other.task in lineage}
    if lost := [task for task, digest in lineage.items() if present.get(task) != digest]:
        raise ConfigurationError(f"stack {stack.task!r} was trained on {lost}, which have been removed or replaced")
    if list(present) != list(lineage):
        raise ConfigurationError(
            f"stack {stack.task!r} was trained on {list(lineage)}, which now act as {list(present)}"
        )
    return dict.fromkeys(lineage, 1.0)


def routed(stacks: Iterable[Stack], weights: Mapping[str, float]) -> dict[str, float]:
    """Each domain's stacks times its weight; a domain without a weight, or with zero, is off. Nothing is the base.

    Raises: ConfigurationError for a domain without stacks.
    """
    stacks = list(stacks)
    known = domains_of(stacks)
    if unknown := [domain for domain in weights if domain not in known]:
        raise ConfigurationError(f"domains {unknown} have no stack; there are {known}")
    return {stack.task: weights[stack.domain] for stack in stacks if weights.get(stack.domain)}


def stack_digest(model: nn.Module, task: str) -> str:
    """sha256 over a finished task's tensors in all layers."""
    adapters = adapters_of(model)
    number = adapters.tasks.index(task)
    rows = {name: layer.task_rows(number) for name, layer in adapters.layers.items()}
    return tensors_digest({f"{name}.{key}": t for name, tensors in rows.items() for key, t in tensors.items()})


def check_frozen(model: nn.Module, stacks: Iterable[Stack]) -> None:
    """Raises: InvariantViolation if a stack is no longer what was frozen."""
    changed = [stack.task for stack in stacks if stack_digest(model, stack.task) != stack.digest]
    if changed:
        raise InvariantViolation(f"frozen stacks {changed} have changed")
