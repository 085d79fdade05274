"""A frozen linear layer and what the tasks so far have added to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from holdfast.adapters.method import Method, Site, Tensors
from holdfast.adapters.nf4 import NF4Linear
from holdfast.errors import ConfigurationError

__all__ = ["AdaptedLinear", "Part", "Shown", "Source", "compute_dtype", "features", "is_linear", "is_transposed"]

Shown = tuple[int, int] | Mapping[int, float] | None
"""Tasks first to last - 1; or tasks by number, each with a weight, where the method acts apart; or what it does
itself."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows that answer together."""

    bank: Tensors
    weight: float = 1.0
    is_current: bool = False
    """With a task that is being trained among them."""


class Source(Protocol):
    """Finished tasks of one layer that are kept elsewhere. Called in the forward pass; may block, may raise."""

    def __len__(self) -> int: ...

    def __getitem__(self, task: int, /) -> Tensors:
        """On the layer's device, in its dtype, not to be changed."""


def is_transposed(module: nn.Module) -> bool:
    """GPT-2's Conv1D: a linear layer whose weight is [D, O]. Told by its looks, so that transformers can be absent."""
    weight, width = getattr(module, "weight", None), getattr(module, "nf", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and bool(width == weight.shape[1])


def is_linear(module: nn.Module) -> bool:
    """Whether a layer can be adapted."""
    return isinstance(module, nn.Linear | NF4Linear) or is_transposed(module)


def features(base: nn.Module) -> tuple[int, int]:
    """D and O."""
    if isinstance(base, nn.Linear | NF4Linear):
        return base.in_features, base.out_features
    weight_DO: Tensor = base.weight  # type: ignore[assignment]  # what is_transposed asks for
    return weight_DO.shape[0], weight_DO.shape[1]


def compute_dtype(base: nn.Module) -> torch.dtype:
    """The weight's; what a quantised layer says that it computes in, or torch's default."""
    weight: Tensor = base.weight  # type: ignore[assignment]  # of a linear layer
    if weight.is_floating_point():
        return weight.dtype
    said = getattr(base, "compute_dtype", None)
    return said if isinstance(said, torch.dtype) else torch.get_default_dtype()


class AdaptedLinear(nn.Module):
    """``base`` plus the method's ``delta``; exactly ``base`` where no rows are in use.

    In training the finished tasks and the current one act. In evaluation the current one takes part only after it has
    been trained on: untrained rows would dilute what the others have learned. :meth:`show` limits both to some tasks.

    Finished tasks are buffers, ``sealed_<tensor>``, the current one's tensors are parameters, new for each task.

    Shapes: [..., D] to [..., O].
    """

    def __init__(self, name: str, base: nn.Module, method: Method) -> None:
        super().__init__()
        self.base = base
        self.current = nn.ParameterDict()
        self.name, self.method = name, method
        self.in_features, self.out_features = features(base)
        self.inputs: Tensor | None = None
        """Filled by ``collect_inputs``."""
        self.cost: Tensor | None = None
        """What the method adds to the loss of the last training pass's tokens."""
        self.source: Source | None = None
        """Its tasks come before the layer's own. Only for a method that acts apart."""
        self._rows = list[dict[str, int]]()
        self._shown: Shown = None
        self._has_trained = False

    @property
    def weight(self) -> Tensor:
        """The base's: models look at its dtype and device."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]  # of a linear layer
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The base's."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]  # of a linear layer
        return bias

    def forward(self, x_PD: Tensor) -> Tensor:
        y_PO: Tensor = self.base(x_PD)
        if self.training and torch.is_grad_enabled() and self.current:
            self._has_trained = True
        for part in self.parts():
            is_training = self.training and (part.is_current or not self.method.acts_apart)
            delta_PO, cost = self.method.answer(x_PD, part.bank, is_training=is_training)
            y_PO = y_PO + (delta_PO if part.weight == 1 else delta_PO * part.weight).to(y_PO.dtype)
            # Activations that are computed again, in the backward pass, come too late for the loss, and a cost would
            # keep them in memory.
            if cost is not None and torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
                self.cost = cost
        return y_PO

    def parts(self) -> Iterator[Part]:
        """What acts, in the order in which it is added."""
        if not self.method.acts_apart:
            if bank := self.bank():
                yield Part(bank, is_current=bool(self.current))
            return
        finished, has_current = self.finished, bool(self.current) and (self.training or self._has_trained)
        for number, weight in self._weights():
            if number < finished:
                yield Part(self.task_rows(number), weight)
            elif has_current:
                yield Part(self.method.fold(dict(self.current)), weight, is_current=True)

    @property
    def finished(self) -> int:
        """How many tasks are, in the source and here."""
        return len(self.source or ()) + len(self._rows)

    # -- the bank -----------------------------------------------------------------------------------------------------

    def bank(self) -> dict[str, Tensor]:
        """The rows in use, finished tasks first; empty if there are none."""
        finished = len(self._rows)
        first, last = self._span()
        bank = self.sealed(first, min(last, finished))
        if first <= finished < last and self.current and (self.training or self._has_trained):
            new = self.method.fold(dict(self.current))
            stays = bank if self.method.keeps_tasks else {}
            bank = {name: torch.cat([stays[name], rows]) if name in stays else rows for name, rows in new.items()}
        return bank if any(len(rows) for rows in bank.values()) else {}

    def rows_in_use(self, name: str) -> list[int]:
        """How many rows of one tensor of :meth:`bank` each task has, in order."""
        first, last = self._span()
        counts = [rows.get(name, 0) for rows in self._rows[first:last]]
        new = len(self.bank().get(name, ())) - sum(counts)
        return [*counts, new] if new else counts

    def sealed(self, first: int = 0, last: int | None = None) -> dict[str, Tensor]:
        """Rows of the finished tasks ``first`` to ``last`` - 1. Empty if there are no such tasks."""
        found = {}
        for name in self._rows[-1] if self._rows[first:last] else ():
            start = sum(rows[name] for rows in self._rows[:first])
            count = sum(rows[name] for rows in self._rows[first:last])
            part = self.get_buffer(f"sealed_{name}")[start : start + count]
            found[name] = part.clone() if start else part  # products may differ in the last bit by memory alignment
        return found

    @property
    def shown(self) -> Shown:
        """What :meth:`show` was told."""
        return self._shown

    def show(self, tasks: Shown) -> None:
        """Use these tasks only, the current one being the last of all."""
        self._shown = tasks

    def count_untrained(self) -> None:
        """Let the current task take part in evaluation, trained or not, to measure what its rows do."""
        self._has_trained = True

    # -- tasks --------------------------------------------------------------------------------------------------------

    def begin(self, generator: torch.Generator) -> None:
        """New parameters for a new task."""
        site = self.site()
        with torch.no_grad():
            new = self.method.begin(site, self.sealed(), generator)
        for name, rows in new.items():
            placed = rows.to(device=site.device, dtype=site.dtype, copy=True)
            self.current[name] = nn.Parameter(placed, requires_grad=name in self.method.trains)
        self.abandon_inputs()

    @torch.no_grad()
    def seal(self) -> None:
        """The current task becomes a finished one."""
        site = self.site()
        self.append(self.method.seal(site, dict(self.current), self.sealed()))
        self.abandon()

    def append(self, new: Mapping[str, Tensor]) -> None:
        """Add a finished task, or put it in the place of the last one where the method keeps one."""
        site = self.site()
        old = self.sealed() if self.method.keeps_tasks else {}
        if not self.method.keeps_tasks:
            self._rows = [dict.fromkeys(new, 0) for _ in self._rows]
        self._rows.append({name: len(rows) for name, rows in new.items()})
        for name, rows in new.items():
            placed = rows.detach().to(device=site.device, dtype=site.dtype)
            together = torch.cat([old[name], placed]) if name in old else placed.clone()
            self.register_buffer(f"sealed_{name}", together)

    def abandon(self) -> None:
        """Forget the current task."""
        self.current.clear()
        self._has_trained, self.cost = False, None
        self.abandon_inputs()

    def abandon_inputs(self) -> None:
        """Forget the inputs that were collected."""
        self.inputs = None

    def clear(self) -> None:
        """Forget every task."""
        self.abandon()
        for name in self._rows[-1] if self._rows else ():
            delattr(self, f"sealed_{name}")
        self._rows, self._shown, self.source = [], None, None

    def task_rows(self, task: int) -> Tensors:
        """What one finished task has left."""
        outside = 0 if self.source is None else len(self.source)
        if self.source is not None and task < outside:
            return self.source[task]
        return self.sealed(task - outside, task - outside + 1)

    def site(self) -> Site:
        """Where a task's tensors go, and in which dtype."""
        dtype = compute_dtype(self.base)
        return Site(self.name, self.in_features, self.out_features, self.weight.device, dtype, self.inputs)

    def _span(self) -> tuple[int, int]:
        finished = len(self._rows)
        if isinstance(self._shown, tuple):
            return self._shown
        if not self.method.needs_task:
            return 0, finished + 1
        if finished and not self.current:
            raise ConfigurationError(
                f"{self.method.name} does not know the task of its input; name it: use_tasks(model, only=...)"
            )
        return finished, finished + 1

    def _weights(self) -> list[tuple[int, float]]:
        if self._shown is None or isinstance(self._shown, tuple):
            first, last = self._shown or (0, self.finished + 1)
            return [(number, 1.0) for number in range(first, last)]
        return sorted(self._shown.items())

    def __getstate__(self) -> dict[str, Any]:
        """For copies: a cost belongs to the graph of a pass, which cannot be copied."""
        return {**self.__dict__, "cost": None}

    def extra_repr(self) -> str:
        return f"{self.name}, method={self.method.name}, tasks={self.finished}"
