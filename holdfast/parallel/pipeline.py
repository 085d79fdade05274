"""Executes a pipeline schedule: receive, compute, send, for one process and one optimizer step.

Activations and their gradients have one static shape, and travel point to point over the default process group, whose
connections a fault can shut down. A message is named by its direction and microbatch. ``schedule_check`` proves that
both ends of a connection name them in the same order, which is what NCCL goes by, and that nobody waits in a circle.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from holdfast.errors import InvariantViolation
from holdfast.parallel.schedule import Kind, Schedule, Step

__all__ = ["Executor", "Mail", "Observer", "Part"]

_SENDS_AHEAD = 16
"""Messages on their way, whose tensors are kept alive, before a process waits for the oldest."""


class Part(Protocol):
    """The layers of one stage. Hidden states are [B, T, D] in the dtype of the weights."""

    def embed(self, tokens: Tensor) -> Tensor:
        """Of a stage that is first on some route. Tokens int64 [B, T]."""
        ...

    def __call__(self, hidden: Tensor) -> Tensor: ...

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Of a stage that is last on some route: mean nats per target, an fp32 scalar. Targets int64 [B, T]."""
        ...


class Observer(Protocol):
    """Sees the hidden states that this process exchanges with those of the stages before and behind its own. They
    change once the call has returned: copy what is to stay."""

    def sent(self, microbatch: int, hidden: Tensor) -> None:
        """To the stage behind."""
        ...

    def received(self, microbatch: int, hidden: Tensor) -> None:
        """From the stage before."""
        ...


class Mail:
    """Tensors from process to process of one replica's pipeline, or between replicas: peers are ranks."""

    def __init__(self) -> None:
        self._sent: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, tensor: Tensor, to: int, tag: int = 0) -> None:
        """Returns at once; the tensor must not change before :meth:`settle`."""
        work = dist.isend(tensor, to, tag=tag)
        if work is None:
            raise InvariantViolation(f"rank {to} is not in the process group")
        self._sent.append((work, tensor))
        while len(self._sent) > _SENDS_AHEAD:
            self._sent.popleft()[0].wait()

    def receive(self, into: Tensor, source: int, tag: int = 0) -> Tensor:
        """Waits until it is here."""
        dist.recv(into, source, tag=tag)
        return into

    def settle(self) -> None:
        """Wait until everything that was sent has left."""
        while self._sent:
            self._sent.popleft()[0].wait()


@dataclass(slots=True)
class _Flight:
    """One microbatch in one stage, between its forward and its backward."""

    hidden: Tensor | None
    """What it came in as; None where it came in as tokens."""
    out: Tensor
    """Hidden states, or the loss."""


class Executor:
    """One process of a pipeline. ``parts`` are its stages, first chunk first; ``ranks`` those of all processes.

    ``shape`` is [B, T, D] of every hidden state and ``dtype`` that of the weights.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        schedule: Schedule,
        *,
        process: int,
        ranks: Sequence[int],
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device,
        observer: Observer | None = None,
    ) -> None:
        self._observer = observer
        self._parts, self._schedule, self._process, self._ranks = parts, schedule, process, tuple(ranks)
        self._steps = schedule.steps(process)
        self._shape, self._dtype, self._device = shape, dtype, device
        self._mail = Mail()
        self._flights: dict[tuple[int, int], _Flight] = {}
        self._at_home: dict[int, Tensor] = {}
        """By tag, what one of this process's chunks has handed to another."""
        self._losses: dict[int, Tensor] = {}

    @property
    def microbatches(self) -> int:
        """That a step takes."""
        return self._schedule.layout.microbatches

    def run(self, batch: Sequence[tuple[Tensor, Tensor]], *, scale: float) -> dict[int, float]:
        """Collective over the pipeline. Forward and backward of a whole step; gradients add up in ``.grad``.

        ``batch`` are tokens and targets, int64 [B, T], of every microbatch, the same ones in every process. ``scale``
        multiplies each loss before its backward pass. The mean losses, nats, of the microbatches that end here.
        """
        if len(batch) != self.microbatches:
            raise InvariantViolation(f"the schedule takes {self.microbatches} microbatches, here are {len(batch)}")
        self._flights.clear()  # of a step that was interrupted
        self._at_home.clear()
        self._losses.clear()
        for step in self._steps:
            if step.action.kind is Kind.FORWARD:
                self._forward(step, *batch[step.action.microbatch])
            else:
                self._backward(step, scale)
        self._mail.settle()
        return {microbatch: float(loss) for microbatch, loss in self._losses.items()}

    @torch.no_grad()
    def measure(self, batch: Iterable[tuple[Tensor, Tensor]]) -> list[float]:
        """Collective over the pipeline. Mean losses, nats, without gradients and always along the model; empty but in
        the process that ends it. Microbatches may be shorter than those of training."""
        losses, stages = [], self._schedule.layout.stages
        for tokens, targets in batch:
            shape = (*tokens.shape, self._shape[2])
            for stage in range(self._process, stages, len(self._ranks)):
                part, before, after = self._part(stage), stage - 1, stage + 1
                hidden = part.embed(tokens) if stage == 0 else self._receive(before % len(self._ranks), 0, shape)
                out = part(hidden)
                if after == stages:
                    losses.append(float(part.loss(out, targets)))
                else:
                    self._send(out, after % len(self._ranks), 0)
        self._mail.settle()
        return losses

    # -- one action -----------------------------------------------------------------------------------------------

    def _forward(self, step: Step, tokens: Tensor, targets: Tensor) -> None:
        part, microbatch = self._part(step.action.stage), step.action.microbatch
        hidden = None
        if step.receive_from is not None:
            hidden = self._receive(step.receive_from, _tag(step), self._shape).requires_grad_()
            if self._observer is not None and step.receive_from == self._process - 1:
                self._observer.received(microbatch, hidden)
        out = part(part.embed(tokens) if hidden is None else hidden)
        if step.send_to is None:
            out = part.loss(out, targets)
            self._losses[microbatch] = out.detach()
        else:
            self._send(out.detach(), step.send_to, _tag(step))
            if self._observer is not None and step.send_to == self._process + 1:
                self._observer.sent(microbatch, out)
        self._flights[microbatch, step.action.stage] = _Flight(hidden, out)

    def _backward(self, step: Step, scale: float) -> None:
        flight = self._flights.pop((step.action.microbatch, step.action.stage))
        if step.receive_from is None:
            (flight.out * scale).backward()  # type: ignore[no-untyped-call]  # torch: untyped
        else:
            flight.out.backward(self._receive(step.receive_from, _tag(step), self._shape))  # type: ignore[no-untyped-call]
        if step.send_to is not None:
            assert flight.hidden is not None and flight.hidden.grad is not None, "only tokens have no gradient"
            self._send(flight.hidden.grad, step.send_to, _tag(step))

    def _part(self, stage: int) -> Part:
        return self._parts[stage // len(self._ranks)]

    def _send(self, tensor: Tensor, process: int, tag: int) -> None:
        if process == self._process:
            self._at_home[tag] = tensor
        else:
            self._mail.send(tensor.contiguous(), self._ranks[process], tag)

    def _receive(self, process: int, tag: int, shape: tuple[int, ...]) -> Tensor:
        if process == self._process:
            return self._at_home.pop(tag).detach()
        into = torch.empty(shape, dtype=self._dtype, device=self._device)
        return self._mail.receive(into, self._ranks[process], tag)


def _tag(step: Step) -> int:
    return 2 * step.action.microbatch + (step.action.kind is Kind.BACKWARD)
