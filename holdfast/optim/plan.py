"""What a step needs to know about the parameters of a group, kept from one step to the next.

Most tensors are the same at every step, and finding them anew costs more than updating small ones. A plan remembers
them and notices when they are others: each step compares the identity of parameters and state tensors, their addresses,
and what gradients are like, in loops that run outside Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from operator import attrgetter, is_, itemgetter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from holdfast.optim.coefficients import Coefficients
from holdfast.optim.cut_blocks import CutUpdate, settle
from holdfast.optim.ops import engine_for
from holdfast.optim.rows import Row, Settings
from holdfast.optim.rules import Norms, Rule
from holdfast.optim.sharded import Axes, Piece, agree, is_sharded, local, piece_of
from holdfast.optim.state8bit import HISTORY, ParamState, moment_tensors, state_names
from holdfast.optim.table import RowTable

__all__ = ["Plan", "finish", "whole_norms"]

_address = Tensor.data_ptr
_dtype, _layout, _device, _is_cpu = map(attrgetter, ("dtype", "layout", "device", "is_cpu"))
_step = itemgetter("step")

_Call: TypeAlias = "tuple[torch.device, Sequence[int], Sequence[Row]]"


@dataclass(slots=True)
class _Job:
    """One parameter, without what varies from step to step."""

    held: Tensor
    """What this rank has of it."""
    moments: list[Tensor]
    absmax: list[Tensor]
    """Flat, of this rank; of the whole parameter where shards cut blocks."""
    piece: Piece | None
    """None for a parameter that is no ``DTensor``."""
    runs: list[tuple[int, int, int]]
    """Start and stop in ``held``, start in the whole parameter: a row for each."""

    @property
    def is_cut(self) -> bool:
        return self.piece is not None and self.piece.is_cut and bool(self.absmax)

    @property
    def is_steady(self) -> bool:
        """Whether the same single row will do at every step."""
        return not self.is_cut and len(self.runs) == 1 and self.held.is_contiguous()


class _Loose:
    """One update of a parameter whose rows have to be made at every step."""

    def __init__(self, job: _Job, grad: Tensor, rule: Rule, settings: Settings, by: Coefficients, key: int) -> None:
        self._held, self._flat = job.held, job.held.contiguous().view(-1)
        whole = Row(self._flat, grad.contiguous().view(-1), job.moments, job.absmax, by, 0, key)
        self.cut = CutUpdate(rule, whole, job.piece, settings) if job.is_cut and job.piece is not None else None
        self.rows = [_run(whole, run, settings.block_size) for run in job.runs] if self.cut is None else self.cut.rows

    def put_back(self) -> None:
        if not self._held.is_contiguous():
            self._held.copy_(self._flat.view(self._held.shape))


class Plan:
    """The parameters of a group that have gradients, and what each step does with them.

    A step is ``prepare``, which changes nothing; ``advance``; ``sums`` and changes of ``by`` as clipping and trust
    ratios ask for; ``update``; and for all plans together ``finish``.
    """

    def __init__(
        self, rule: Rule, params: Sequence[Tensor], states: Sequence[ParamState], grads: Sequence[Tensor],
        group: Mapping[str, Any], positions: Sequence[int],
    ) -> None:  # fmt: skip
        self.params, self.states, self.positions = list(params), list(states), list(positions)
        self._options = _options(rule, group)
        self._moments, self._block_size = tuple(rule.moments), group["block_size"]
        self._is_plain = not any(map(is_sharded, params))
        stochastic = group["stochastic_rounding"]
        self._jobs = [self._job(param, state, stochastic) for param, state in zip(params, states, strict=True)]
        self._watch([local(grad) for grad in grads])
        self._device = next((job.held.device for job in self._jobs if job.is_steady), torch.device("cpu"))
        are_steady = [job.is_steady and job.held.device == self._device for job in self._jobs]
        self._steady = [number for number, is_steady in enumerate(are_steady) if is_steady]
        self._loose = [number for number, is_steady in enumerate(are_steady) if not is_steady]
        self._table = RowTable([_row(self._jobs[number]) for number in self._steady]) if self._steady else None
        self._updates: dict[int, _Loose] = {}
        self._grads: Sequence[Tensor] = ()
        self._grads_of_table: Sequence[Tensor] = ()
        self.by: list[Coefficients] = []
        """Of each parameter, for this step."""
        self.instead: list[Row] | None = None
        """Rows to update in the place of the plan's own, for this step."""

    # -- between steps ------------------------------------------------------------------------------------------------

    def fits(self, params: Sequence[Tensor], grads: Sequence[Tensor], rule: Rule, group: Mapping[str, Any]) -> bool:
        """Whether these are the parameters, with the state tensors and the kinds of gradients, of this plan."""
        if _options(rule, group) != self._options:
            return False
        if len(params) != len(self.params) or not all(map(is_, params, self.params)):
            return False
        if not all(self.states):  # one has been emptied
            return False
        if not all(all(map(is_, _values(names, states), tensors)) for names, states, tensors in self._kinds):
            return False
        return self._addresses_and_gradients_fit(grads)

    def _addresses_and_gradients_fit(self, grads: Sequence[Tensor]) -> bool:
        held = self._watched if self._is_plain else [local(tensor) for tensor in self._watched]
        params = held[: len(self.params)]
        if list(map(_address, held)) != self._addresses or list(map(_dtype, params)) != self._dtypes:
            return False
        if list(map(Tensor.is_contiguous, params)) != self._are_contiguous:
            return False
        if set(map(type, grads)) != {Tensor}:
            if list(map(is_sharded, grads)) != self._are_sharded:
                return False
            grads = [local(grad) for grad in grads]
        return (
            list(map(_layout, grads)) == self._layouts
            and list(map(_dtype, grads)) == self._grad_dtypes
            and (all(map(_is_cpu, grads)) if self._is_on_cpu else list(map(_device, grads)) == self._devices)
        )

    def _watch(self, grads: Sequence[Tensor]) -> None:
        by_names: dict[tuple[str, ...], list[ParamState]] = {}
        for state in self.states:
            by_names.setdefault(state_names(state, self._moments), []).append(state)
        self._kinds = [(names, states, _values(names, states)) for names, states in by_names.items() if names]
        self.tensors = [tensor for _, _, tensors in self._kinds for tensor in tensors]
        """Of the state, those that an update writes."""
        self._watched = [*self.params, *self.tensors]
        held = [local(tensor) for tensor in self._watched]
        self._versions = self._watched if self._is_plain else [*self._watched, *held]
        self._addresses = list(map(_address, held))
        self._dtypes = list(map(_dtype, held[: len(self.params)]))
        self._are_contiguous = list(map(Tensor.is_contiguous, held[: len(self.params)]))
        self._layouts = [torch.strided] * len(grads)
        self._grad_dtypes = list(map(_dtype, grads))
        self._devices = [tensor.device for tensor in held[: len(self.params)]]
        self._is_on_cpu = all(device.type == "cpu" for device in self._devices)
        self._are_sharded = list(map(is_sharded, self.params))

    def _job(self, param: Tensor, state: ParamState, stochastic: bool) -> _Job:
        held, piece = local(param), piece_of(param, self._block_size)
        moments, absmax = moment_tensors(state, self._moments)
        whole = [(0, held.numel(), 0)] if held.numel() else []
        needs_place = stochastic and held.dtype == torch.bfloat16
        runs = piece.runs() if piece is not None and needs_place else whole
        return _Job(held, moments, absmax, piece, runs)

    # -- one step -----------------------------------------------------------------------------------------------------

    def prepare(
        self, grads: Sequence[Tensor], rule: Rule, settings: Settings,
        coefficients: Callable[[int], Coefficients], key: Callable[[int, int], int],
    ) -> None:  # fmt: skip
        """Collective where gradients are placed differently from their parameters."""
        self._rule, self._settings, self.instead = rule, settings, None
        steps = [step + 1 for step in map(_step, self.states)]
        known = {step: coefficients(step) for step in set(steps)}
        self.by = [known[step] for step in steps] if len(known) > 1 else list(known.values()) * len(steps)
        self._grads = self._held(grads)
        stochastic = settings.stochastic_rounding
        self._keys = list(map(key, steps, self.positions)) if stochastic else [0] * len(steps)
        self._grads_of_table = self._contiguous_grads()
        self._updates = {
            n: _Loose(self._jobs[n], self._grads[n], rule, settings, self.by[n], self._keys[n]) for n in self._loose
        }

    def advance(self) -> None:
        """Count the step."""
        for state in self.states:
            state["step"] += 1

    def sums(self, kind: Norms) -> list[tuple[float, float]]:
        """Two sums of squares for each parameter, as ``Engine.norms``, over what this rank holds of it."""
        self._hand_out()
        found = [(0.0, 0.0)] * len(self.params)
        for device, numbers, rows in self._calls():
            sums = engine_for(device).norms(kind, rows, self._settings)
            for number, (first, second) in zip(numbers, sums, strict=True):
                found[number] = (found[number][0] + first, found[number][1] + second)
        return found

    def places(self) -> list[tuple[Axes, torch.device]]:
        """Mesh dims over which each parameter is sharded, and where this rank has it."""
        return [(() if job.piece is None else job.piece.axes, job.held.device) for job in self._jobs]

    def rows(self) -> list[tuple[Tensor, Row]]:
        """Every row, with its parameter."""
        self._hand_out()
        return [
            (self.params[n], row) for _, numbers, rows in self._calls() for n, row in zip(numbers, rows, strict=True)
        ]

    def update(self) -> None:
        """Everything but shards that cut blocks."""
        self._hand_out()
        for update in self.cuts():
            update.before_update()
        calls = (
            [(device, rows) for device, _, rows in self._calls()] if self.instead is None else _by_device(self.instead)
        )
        for device, rows in calls:
            engine_for(device).update(self._rule, rows, self._settings)

    def cuts(self) -> list[CutUpdate]:
        """Updates that ranks have to agree on, the same ones in the same order on every rank."""
        return [update.cut for update in self._updates.values() if update.cut is not None]

    def release(self) -> None:
        """Copy back what was updated in a copy, let go of gradients, and tell autograd."""
        for update in self._updates.values():
            update.put_back()
        self._grads, self._grads_of_table, self.instead, self._updates = (), (), None, {}
        if self._table is not None:
            self._table.release()
        torch.autograd.graph.increment_version(self._versions)

    def _held(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        if self._is_plain:
            return grads
        return [local(_placed(grad, param)) for grad, param in zip(grads, self.params, strict=True)]

    def _contiguous_grads(self) -> Sequence[Tensor]:
        """Of the table."""
        grads = self._grads if not self._loose else [self._grads[number] for number in self._steady]
        return grads if all(map(Tensor.is_contiguous, grads)) else [grad.contiguous() for grad in grads]

    def _hand_out(self) -> None:
        """Give all rows their coefficients."""
        if self._table is not None:
            every = not self._loose
            by = self.by if every else [self.by[number] for number in self._steady]
            keys = self._keys if every else [self._keys[number] for number in self._steady]
            self._table.renew(self._grads_of_table, by, keys)
        for number, update in self._updates.items():
            for row in update.rows:
                row.by = self.by[number]

    def _calls(self) -> list[_Call]:
        """Rows that an engine takes together, with the number of each one's parameter."""
        numbers = {id(row): number for number, update in self._updates.items() for row in update.rows}
        loose = _by_device([row for update in self._updates.values() for row in update.rows])
        calls: list[_Call] = [(device, [numbers[id(row)] for row in rows], rows) for device, rows in loose]
        return calls if self._table is None else [(self._device, self._steady, self._table), *calls]


def whole_norms(kind: Norms, plans: Sequence[Plan]) -> list[list[tuple[float, float]]]:
    """Collective over the mesh dims that parameters are sharded over. Norms of whole parameters, for each plan."""
    sums = [pair for plan in plans for pair in plan.sums(kind)]
    shared: dict[tuple[Axes, torch.device], list[int]] = {}
    for number, place in enumerate(place for plan in plans for place in plan.places()):
        if place[0]:
            shared.setdefault(place, []).append(number)
    for (axes, device), numbers in shared.items():
        together = torch.tensor([sums[number] for number in numbers], dtype=torch.float64, device=device)
        agree([(axes, together)], largest=False)
        for number, (first, second) in zip(numbers, together.tolist(), strict=True):
            sums[number] = (first, second)
    roots = iter([(math.sqrt(first), math.sqrt(second)) for first, second in sums])
    return [list(islice(roots, len(plan.params))) for plan in plans]


def finish(plans: Sequence[Plan]) -> None:
    """Collective where shards cut blocks. After ``update`` of all plans."""
    cuts = [cut for plan in plans for cut in plan.cuts()]
    if cuts:
        settle(cuts)
    for plan in plans:
        plan.release()


def _options(rule: Rule, group: Mapping[str, Any]) -> tuple[object, ...]:
    """Those that decide about state or rows."""
    does_clip = group["percentile_clipping"] < HISTORY
    return tuple(rule.moments), group["block_size"], group["stochastic_rounding"], does_clip


def _values(names: tuple[str, ...], states: Sequence[ParamState]) -> list[Tensor]:
    found = map(itemgetter(*names), states)
    return list(found if len(names) == 1 else chain.from_iterable(found))


def _placed(grad: Tensor, param: Tensor) -> Tensor:
    """Collective where the gradient of a ``DTensor`` is placed differently, for example not summed up yet."""
    if not is_sharded(param) or grad.placements == param.placements:  # type: ignore[attr-defined]
        return grad
    moved: Tensor = grad.redistribute(param.device_mesh, param.placements)  # type: ignore[attr-defined]
    return moved


def _row(job: _Job) -> Row:
    """Gradient, coefficients and key are to come."""
    flat, ((_, _, first),) = job.held.detach().view(-1), job.runs
    return Row(flat, flat, job.moments, job.absmax, Coefficients(), first)


def _run(whole: Row, run: tuple[int, int, int], block_size: int) -> Row:
    start, stop, first = run
    return replace(whole.part(start, stop, block_size), first=first)


def _by_device(rows: Iterable[Row]) -> list[tuple[torch.device, list[Row]]]:
    groups: dict[torch.device, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.param.device, []).append(row)
    return list(groups.items())
