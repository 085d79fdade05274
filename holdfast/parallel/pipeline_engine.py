"""A pipeline stage with its optimizer, as one engine: the pipeline's answer to :mod:`zero`, of the same shape.

World size is processes of the pipeline times replicas; rank = replica x processes + process. What several processes
hold, such as the embedding that CheckFree+ keeps on the first two stages (arXiv 2506.15461, section 4.3) or a tied
table, gets the sum of its gradients over them before each update, in the order of the processes, and so stays the
same to the bit on all of them: each is the other's copy, refreshed by every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.parallel.microbatches import Microbatch, sums_of
from holdfast.parallel.optimizer_states import OptimizerStates
from holdfast.parallel.pipeline import Executor, Mail, Observer, Part
from holdfast.parallel.schedule import Schedule
from holdfast.parallel.sharding import ParamGroups
from holdfast.parallel.slices import state_slices
from holdfast.parallel.stage_shards import FlatGroup, clip_factor, exchange_sum, group_members
from holdfast.types import Precision, StateSlice

__all__ = ["PipelineEngine", "PipelineOptions", "Place"]

_SHARED_TAG, _EXPORT_TAG = 1 << 24, 1 << 26
_MOST_GROUPS = 4
"""Of ``optim.parameter_groups``: with decay and without, of 8 bits and of 32."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands."""

    processes: int
    replicas: int
    rank: int

    @property
    def process(self) -> int:
        return self.rank % self.processes

    @property
    def name(self) -> str:
        """Of the process, and of how many; what layers it has depends on both."""
        return f"{self.process}/{self.processes}"

    @property
    def replica(self) -> int:
        return self.rank // self.processes

    @property
    def pipeline(self) -> tuple[int, ...]:
        """Ranks of this replica's pipeline, by process."""
        return tuple(self.replica * self.processes + process for process in range(self.processes))

    @property
    def peers(self) -> tuple[int, ...]:
        """Ranks with the same stages, by replica."""
        return tuple(replica * self.processes + self.process for replica in range(self.replicas))


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """What the engine must know of the step."""

    precision: Precision
    shape: tuple[int, int, int]
    """[B, T, D] of a microbatch's hidden states."""
    grad_clip: float
    """Largest global gradient norm; 0 turns clipping off."""
    block_size: int = 1
    """Elements of a quantisation block; 1 when no state is quantised."""
    is_sharded: bool = True
    """Replicas share the optimizer state, as ZeRO-1 does; otherwise each of them has all of it."""
    rate_factor: Callable[[int, int], float] = lambda times, steps_since: 1.0
    """By what the learning rate is multiplied of a stage that was rebuilt so often, last so many steps ago."""


class PipelineEngine:
    """All methods but ``slices`` and ``scalars`` are collective. The addresses of slices do not change.

    ``parts`` are this process's stages, fp32, first chunk first; together they are a module whose parameters have the
    names that they have in the whole model. ``layouts`` gives names and shapes of every process's parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        parts: Sequence[Part],
        schedule: Schedule,
        place: Place,
        groups: ParamGroups,
        make_optimizer: Callable[[ParamGroups], torch.optim.Optimizer],
        states: OptimizerStates,
        options: PipelineOptions,
        layouts: Sequence[Mapping[str, tuple[int, ...]]],
        observer: Observer | None = None,
    ) -> None:
        self._model = model
        self._place, self._options, self._states, self._layouts = place, options, states, layouts
        dtype = torch.bfloat16 if options.precision is Precision.BF16 else torch.float32
        device = next(model.parameters()).device
        numbers = {name: number for number, (name, _) in enumerate(model.named_parameters())}
        self._groups = _flat_groups(model, groups, place, options, dtype)
        self._flats = [group.flat() for group in self._groups]
        flat_groups = [{**group, "params": [own.master]} for group, own in zip(groups, self._groups, strict=True)]
        self._optimizer = make_optimizer(flat_groups)
        self._mail = Mail()
        self._executor = Executor(
            parts,
            schedule,
            process=place.process,
            ranks=place.pipeline,
            shape=options.shape,
            dtype=dtype,
            device=device,
            observer=observer,
        )
        self._scale = 1.0 / (schedule.layout.microbatches * place.replicas)
        parts_of = {f.master: [(p.at, p.at + p.stop - p.start, numbers[p.name]) for p in f.pieces] for f in self._flats}
        states.set_segments(self._optimizer, parts_of, len(numbers), self._total)
        states.ensure_state(self._optimizer)
        self._slices = tuple(self._make_slices())
        self._shared = _shared(layouts, place.process)
        self._owned = {name for name in numbers if place.process == _owner(layouts, name)}
        self._rebuilt: Mapping[str, Mapping[str, int]] = {}
        self.stage_norms: tuple[float, ...] = ()
        """Norm of each process's gradient in the last step, before clipping; what several hold counts at the first."""

    # -- a step ---------------------------------------------------------------------------------------------------

    def forward_backward(self, batch: Sequence[Microbatch]) -> list[float]:
        """Gradients of a whole step. Sums over the microbatches that end here: nats, targets, targets that are
        bytes."""
        for group in self._groups:
            group.gradients.zero_()
        losses = self._executor.run([(tokens, targets) for tokens, targets, _ in batch], scale=self._scale)
        return sums_of(losses, batch)

    def measure(self, batches: Iterable[Microbatch]) -> list[float]:
        """The same sums without gradients."""
        batch = list(batches)
        self._model.eval()
        try:
            losses = self._executor.measure([(tokens, targets) for tokens, targets, _ in batch])
        finally:
            self._model.train()
        return sums_of(dict(enumerate(losses)), batch)

    def update(self, lr: float) -> float:
        """Sum gradients, clip, update, make the new weights known. Returns the global norm before clipping."""
        self._sum_shared()
        for group in self._groups:
            group.reduce(self._mail)
        norm = self._measure_norms()
        factor, lr = clip_factor(norm, self._options.grad_clip), lr * self._rate_factor()
        for group, options in zip(self._groups, self._optimizer.param_groups, strict=True):
            options["lr"] = lr
            if factor != 1.0:
                assert group.master.grad is not None
                group.master.grad.mul_(factor)
        self._optimizer.step()
        for group in self._groups:
            group.spread(self._mail)
        return norm

    def _rate_factor(self) -> float:
        own = self._rebuilt.get(self._place.name)
        return 1.0 if own is None else self._options.rate_factor(own["times"], self._steps() - own["at"])

    def _steps(self) -> int:
        """Of the run that the optimizer has made, whatever its own moments know of."""
        values = self._states.scalars(self._optimizer, self._flats[0].master)
        return cast(int, values.get("step", 0)) + self._unknown_steps

    @property
    def _unknown_steps(self) -> int:
        """Steps before the moments of this stage began anew."""
        return self._rebuilt.get(self._place.name, {"steps": 0})["steps"]

    def _sum_shared(self) -> None:
        """What several processes of a pipeline hold gets the gradients of all of them."""
        for number, name, holders in self._shared:
            ranks = [self._place.pipeline[process] for process in holders]
            own = next(group for group in self._groups if name in group.names).gradient(name)
            place = holders.index(self._place.process)
            own.copy_(exchange_sum(self._mail, own, ranks, place, _always(own), _SHARED_TAG + number))

    def _measure_norms(self) -> float:
        """Every process's, and the global one. Each parameter counts once."""
        squares = torch.zeros(self._place.processes, dtype=torch.float64)
        counts_here = self._options.is_sharded or self._place.replica == 0
        for flat in self._flats if counts_here else ():
            gradient = cast(Tensor, flat.master.grad)
            for piece in flat.pieces:
                if piece.name in self._owned:
                    part = gradient[piece.at : piece.at + piece.stop - piece.start]
                    squares[self._place.process] += float(part.double().square().sum())
        squares = squares.to(self._flats[0].master.device)
        dist.all_reduce(squares)
        self.stage_norms = tuple(math.sqrt(square) for square in squares.tolist())
        return math.sqrt(float(squares.sum()))

    # -- state ----------------------------------------------------------------------------------------------------

    def slices(self) -> Sequence[StateSlice]:
        """Master weights and optimizer state that this rank holds."""
        return self._slices

    def scalars(self) -> Mapping[str, object]:
        """What the optimizer keeps besides tensors, as JSON values, by parameter group, and the stages' norms."""
        # All groups count the same steps, and stages differ in the groups that they have: so every rank names all.
        values = self._states.scalars(self._optimizer, self._flats[0].master)
        whole = {**values, **({"step": self._steps()} if "step" in values else {})}
        of_groups = {str(number): dict(whole) for number in range(_MOST_GROUPS)}
        rebuilt = {"rebuilt": dict(self._rebuilt)} if self._rebuilt else {}
        return {**of_groups, "stage_norms": list(self.stage_norms), **rebuilt}

    def load_scalars(self, scalars: Mapping[str, object]) -> None:
        """Put back what ``scalars`` returned, here or on any other rank or in another layout."""
        self.stage_norms = tuple(cast(Sequence[float], scalars.get("stage_norms", ())))
        self._rebuilt = cast(Mapping[str, Mapping[str, int]], scalars.get("rebuilt", {}))
        of_groups = {key: values for key, values in scalars.items() if key.isdecimal()}
        for flat in self._flats:
            values = dict(cast(Mapping[str, int], of_groups.get(str(flat.group), next(iter(of_groups.values())))))
            if "step" in values:
                values["step"] -= self._unknown_steps
            self._states.load_scalars(self._optimizer, flat.master, values)

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the weights that train what the masters say, on every replica, after slices were written to."""
        for group in self._groups:
            group.spread(self._mail)

    @contextmanager
    def as_modules(self) -> Iterator[tuple[nn.Module, Mail, Place]]:
        """The module whose weights train, to be written to inside the block, and how to reach the other processes."""
        yield self._model, self._mail, self._place
        for group in self._groups:
            group.follow_weights()

    @torch.no_grad()
    def full_weights(self) -> dict[str, Tensor]:
        """Whole fp32 master weights by name, on the CPU of rank 0; empty elsewhere."""
        own = {name: tensor.float() for group in self._groups for name, tensor in group.whole_masters(self._mail)}
        if self._place.replica:
            return {}
        mine = {name: own[name] for name in own if name in self._owned}
        if self._place.process:
            for number, name in enumerate(sorted(mine)):
                self._mail.send(mine[name].contiguous().view(-1), self._place.pipeline[0], _EXPORT_TAG + number)
            self._mail.settle()
            return {}
        whole = {name: tensor.cpu().clone() for name, tensor in mine.items()}
        for process in range(1, self._place.processes):
            whole.update(self._received_from(process))
        return whole

    def _received_from(self, process: int) -> Iterator[tuple[str, Tensor]]:
        layout, device = self._layouts[process], self._flats[0].master.device
        owned = sorted(name for name in layout if _owner(self._layouts, name) == process)
        for number, name in enumerate(owned):
            into = torch.empty(math.prod(layout[name]), device=device)
            self._mail.receive(into, self._place.pipeline[process], _EXPORT_TAG + number)
            yield name, into.cpu().view(layout[name])

    def close(self) -> None:
        """Free every tensor. Not collective: the peers may be gone."""
        self._slices, self._flats, self._groups = (), [], []
        self._model = None  # type: ignore[assignment]  # closed for good
        self._executor = None  # type: ignore[assignment]  # closed for good
        self._optimizer = None  # type: ignore[assignment]

    def _make_slices(self) -> Iterator[StateSlice]:
        for flat in self._flats:
            yield from state_slices(flat, self._states.describe_state(self._optimizer, flat.master))

    def _total(self, vector: Tensor) -> Tensor:
        """Collective over the replicas. Sums a vector over those that have different shares."""
        if not self._options.is_sharded:
            return vector
        peers, place = self._place.peers, self._place.replica
        vector.copy_(exchange_sum(self._mail, vector, peers, place, _always(vector), _SHARED_TAG - 1))
        return vector


def _flat_groups(
    model: nn.Module, groups: ParamGroups, place: Place, options: PipelineOptions, dtype: torch.dtype
) -> list[FlatGroup]:
    """The model's weights become views of these, in ``dtype``."""
    names = {id(p): name for name, p in model.named_parameters()}
    masters = list(group_members(groups, names))
    if dtype is not torch.float32:
        model.to(dtype)
    return [
        FlatGroup(
            number,
            members,
            replicas=place.peers,
            place=place.replica,
            is_sharded=options.is_sharded,
            block_size=options.block_size,
            dtype=dtype,
        )
        for number, members in enumerate(masters)
    ]


def _always(tensor: Tensor) -> Callable[[int], Tensor]:
    return lambda _: tensor


def _owner(layouts: Sequence[Mapping[str, object]], name: str) -> int:
    """The first process that holds a parameter."""
    return next(process for process, layout in enumerate(layouts) if name in layout)


def _shared(layouts: Sequence[Mapping[str, object]], process: int) -> list[tuple[int, str, tuple[int, ...]]]:
    """Parameters of a process that others hold too: a number that is the same on all, the name, and who holds it."""
    holders: dict[str, list[int]] = {}
    for one, layout in enumerate(layouts):
        for name in layout:
            holders.setdefault(name, []).append(one)
    shared = [(name, tuple(who)) for name, who in sorted(holders.items()) if len(who) > 1]
    return [(number, name, who) for number, (name, who) in enumerate(shared) if process in who]
