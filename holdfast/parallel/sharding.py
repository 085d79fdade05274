"""Where each ZeRO stage keeps its state, seen from outside: flat master weights, and how they become the weights.

DeepSpeed's optimizers come as arguments and are read by attribute, so this module needs no deepspeed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from holdfast.parallel.slices import Flat, Piece, cut, pieces_of_partition

__all__ = ["Names", "ParamGroups", "Sharding", "pad_to_blocks", "sharding_of"]

ParamGroups = list[dict[str, Any]]
"""``torch.optim`` parameter groups: ``params`` and options, which are the optimizer's own."""

Names = Mapping[int, str]
"""Parameters' names by ``id``."""


class Sharding(Protocol):
    """One stage's memory: this rank's flat masters, and how they become the weights that train."""

    @property
    def flats(self) -> Sequence[Flat]: ...

    def refresh(self) -> None:
        """Collective. Give the weights the values of the masters."""
        ...

    def gather(self, flat: Flat) -> Iterator[dict[str, Tensor]]:
        """Collective. Whole parameters on rank 0, a few at a time; nothing elsewhere."""
        ...

    def clip(self, limit: float) -> Tensor | None:
        """Clip where DeepSpeed does not; the norm, or None where it does. 0 is no limit."""
        ...


def sharding_of(optimizer: Any, stage: int, names: Names) -> Sharding:
    """What DeepSpeed has made of the optimizer."""
    if stage == 0:
        return _Replicated(optimizer, names)
    return _FlatGroups(optimizer, names) if stage < 3 else _Partitioned(optimizer, names)


class _Replicated:
    """Stage 0: every rank holds everything. In fp32 the weights are their own masters."""

    def __init__(self, optimizer: Any, names: Names) -> None:
        self._has_masters = hasattr(optimizer, "fp32_groups")
        groups = optimizer.fp16_groups if self._has_masters else [g["params"] for g in optimizer.param_groups]
        masters = optimizer.fp32_groups if self._has_masters else groups
        self._weights = [weight for group in groups for weight in group]
        self.flats = [
            Flat(number, master, (Piece(names[id(weight)], tuple(weight.shape), 0, weight.numel(), 0),))
            for number, pairs in enumerate(map(zip, groups, masters))
            for weight, master in pairs
        ]

    def refresh(self) -> None:
        if self._has_masters:
            for weight, flat in zip(self._weights, self.flats, strict=True):
                weight.copy_(flat.master)

    def gather(self, flat: Flat) -> Iterator[dict[str, Tensor]]:
        if dist.get_rank() == 0:
            yield {flat.pieces[0].name: flat.master.detach().cpu().clone()}

    def clip(self, limit: float) -> Tensor | None:
        return None if self._has_masters else torch.nn.utils.clip_grad_norm_(self._weights, limit or math.inf)


class _FlatGroups:
    """Stages 1 and 2: each parameter group is one flat tensor, cut into equal shares."""

    def __init__(self, optimizer: Any, names: Names) -> None:
        self._optimizer = optimizer
        self._sizes = [[(names[id(p)], tuple(p.shape)) for p in group] for group in optimizer.bit16_groups]
        self.flats = [
            Flat(number, master, tuple(self._pieces(number, dist.get_rank() * master.numel(), master.numel())))
            for number, master in enumerate(optimizer.single_partition_of_fp32_groups)
        ]

    def _pieces(self, group: int, low: int, length: int) -> Iterator[Piece]:
        for piece in pieces_of_partition(self._sizes[group], low, low + length):
            if not piece.name.startswith(_PADDING):
                yield piece

    def refresh(self) -> None:
        self._optimizer.update_lp_params()

    def gather(self, flat: Flat) -> Iterator[dict[str, Tensor]]:
        whole = _on_rank_0(flat.master)
        if whole is not None:
            for piece in self._pieces(flat.group, 0, whole.numel()):
                yield {piece.name: whole[piece.at : piece.at + piece.stop].view(piece.shape).clone()}

    def clip(self, limit: float) -> Tensor | None:
        return None


class _Partitioned:
    """Stage 3: each parameter is cut into equal shares, and a rank's shares lie one behind the other."""

    def __init__(self, optimizer: Any, names: Names) -> None:
        self._optimizer, self._names, self.flats = optimizer, names, list[Flat]()
        for number, master in enumerate(optimizer.fp32_partitioned_groups_flat):
            cuts = [
                cut(names[id(weight)], tuple(weight.ds_shape), part, dist.get_rank(), at)
                for weight, part, at in self._shares(number)
            ]
            pieces = tuple(piece for piece in cuts if piece is not None)
            _clear_padding(master, pieces)
            self.flats.append(Flat(optimizer.sub_group_to_group_id[number], master, pieces))

    def _shares(self, number: int) -> Iterator[tuple[Any, int, int]]:
        """Each weight of a flat tensor, the length of a rank's share of it, and where that share lies."""
        weights = self._optimizer.fp16_groups[number]
        parts = [weight.partition_numel() for weight in weights]
        return zip(weights, parts, accumulate(parts[:-1], initial=0), strict=True)

    def refresh(self) -> None:
        optimizer = self._optimizer
        for number, flat in enumerate(self.flats):
            optimizer.fp16_partitioned_groups_flat[number].data.copy_(flat.master.data)
            optimizer._unflatten_partitioned_parameters(number)
        kept = optimizer.persistent_parameters
        if kept:  # gathered already: cut them again, or they would keep their old values
            kept[0].partition(kept)
            kept[0].all_gather(kept)

    def gather(self, flat: Flat) -> Iterator[dict[str, Tensor]]:
        number = next(n for n, other in enumerate(self.flats) if other is flat)
        for weight, part, at in self._shares(number):
            whole = _on_rank_0(flat.master[at : at + part])
            if whole is not None:
                yield {self._names[id(weight)]: whole[: weight.ds_numel].view(tuple(weight.ds_shape)).clone()}

    def clip(self, limit: float) -> Tensor | None:
        return None


@torch.no_grad()
def _clear_padding(master: Tensor, pieces: Sequence[Piece]) -> None:
    """DeepSpeed leaves what fills up a share uninitialised. With weight decay in its gradient it would reach a moment,
    and so the scale of the block that it shares with others."""
    ends = [0, *(piece.at + piece.stop - piece.start for piece in pieces)]
    for end, start in zip(ends, [*(piece.at for piece in pieces), master.numel()], strict=True):
        master[end:start].zero_()


def _on_rank_0(part: Tensor) -> Tensor | None:
    """Collective. All ranks' parts one behind the other, on the CPU of rank 0."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())] if dist.get_rank() == 0 else None
    dist.gather(part.detach().contiguous(), parts)
    return None if parts is None else torch.cat(parts).cpu()


_PADDING = "holdfast_padding_"


def pad_to_blocks(model: nn.Module, groups: ParamGroups, block_size: int) -> ParamGroups:
    """Behind every parameter that ends inside a quantisation block, one that fills it up, never used and always zero.

    Stages 1 and 2 lay the parameters of a group one behind the other; two of them must not share a block.
    """
    padded, count = [], 0
    for group in groups:
        params: list[Tensor] = []
        for param in group["params"]:
            params.append(param)
            missing = -param.numel() % block_size
            if missing:
                filler = nn.Parameter(torch.zeros(missing, dtype=param.dtype, device=param.device))
                model.register_parameter(f"{_PADDING}{count}", filler)
                params.append(filler)
                count += 1
        padded.append({**group, "params": params})
    return padded
