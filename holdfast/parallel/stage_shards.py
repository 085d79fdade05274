"""The training state of one pipeline process: flat groups, point to point, sharded over its replicas as ZeRO-1 does or
whole on each of them.

Every parameter starts on a block boundary of its flat group and every shard ends on one, as in :mod:`zero`, so that
the codes of 8-bit state are those of a single process. Sums are taken in the order of ranks: they have the same bits
on every replica, and do not depend on who is late.

Source: ZeRO stage 1, arXiv 1910.02054, section 5.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from holdfast.parallel.pipeline import Mail
from holdfast.parallel.sharding import ParamGroups
from holdfast.parallel.slices import Flat, pieces_of_partition

__all__ = ["FlatGroup", "clip_factor", "exchange_sum", "group_members"]

_GRADIENT_TAG, _WEIGHT_TAG, _MASTER_TAG = 1 << 20, 2 << 20, 3 << 20
"""Above every microbatch's."""


class FlatGroup:
    """One parameter group as flat tensors: weights and gradients whole, masters this replica's share, or whole too.

    The parameters become views of the flat weights. In float32 the masters are a part of the weights themselves.
    ``replicas`` are the ranks that hold the same parameters, this one among them at ``place``.
    """

    def __init__(
        self,
        number: int,
        params: Sequence[tuple[str, nn.Parameter]],
        *,
        replicas: Sequence[int],
        place: int,
        is_sharded: bool,
        block_size: int,
        dtype: torch.dtype,
    ) -> None:
        self.number, self._replicas, self._place, self._is_sharded = number, tuple(replicas), place, is_sharded
        shares, share = (len(replicas), place) if is_sharded else (1, 0)
        self._params = list(params)
        self._offsets, end = dict[str, int](), 0
        for name, param in params:
            self._offsets[name] = end
            end += -(-param.numel() // block_size) * block_size
        multiple = block_size * shares
        total, device = -(-end // multiple) * multiple, params[0][1].device
        self._share = total // shares
        self.weights = torch.zeros(total, dtype=dtype, device=device)
        self.gradients = torch.zeros(total, dtype=torch.float32, device=device)
        self._low = share * self._share
        own = self.weights[self._low : self._low + self._share]
        self._take_over()
        self.master = nn.Parameter(own if dtype == torch.float32 else own.float())
        self._has_copy = dtype != torch.float32

    @torch.no_grad()
    def _take_over(self) -> None:
        for name, param in self._params:
            view = self._view(self.weights, name, param)
            view.copy_(param)
            param.data = view
            param.grad = self._view(self.gradients, name, param) if param.dtype == torch.float32 else None
            if param.grad is None:  # sums of many small numbers need more bits than the weights have
                param.register_post_accumulate_grad_hook(self._adder(name))  # type: ignore[no-untyped-call]  # torch: untyped

    def _adder(self, name: str) -> Callable[[Tensor], None]:
        def add(param: Tensor) -> None:
            assert param.grad is not None
            self._view(self.gradients, name, param).add_(param.grad)
            param.grad = None

        return add

    def _view(self, flat: Tensor, name: str, param: Tensor) -> Tensor:
        start = self._offsets[name]
        return flat[start : start + param.numel()].view(param.shape)

    @torch.no_grad()
    def follow_weights(self) -> None:
        """The weights have been written to: make the masters say what they say."""
        if self._has_copy:
            self.master.copy_(self._own(self.weights))

    @property
    def names(self) -> list[str]:
        """Of its parameters, in the order in which they lie in the flat tensors."""
        return [name for name, _ in self._params]

    def gradient(self, name: str) -> Tensor:
        """The whole gradient of a parameter, flat."""
        param = dict(self._params)[name]
        return self._view(self.gradients, name, param).view(-1)

    def flat(self) -> Flat:
        """What this replica's share holds."""
        sizes = list[tuple[str, tuple[int, ...]]]()
        ends = [*list(self._offsets.values())[1:], self.weights.numel()]
        for (name, param), end in zip(self._params, ends, strict=True):
            sizes.append((name, tuple(param.shape)))
            padding = end - self._offsets[name] - param.numel()
            if padding:
                sizes.append(("", (padding,)))
        pieces = pieces_of_partition(sizes, self._low, self._low + self._share)
        return Flat(self.number, self.master, tuple(piece for piece in pieces if piece.name))

    # -- collective over the replicas -----------------------------------------------------------------------------

    def reduce(self, mail: Mail) -> None:
        """Sum the gradients of all replicas into each one's share, and hand them to the masters."""
        mine = self._own(self.gradients)
        self.master.grad = exchange_sum(
            mail, mine, self._replicas, self._place, lambda place: self._share_of(self.gradients, place), _GRADIENT_TAG
        )

    @torch.no_grad()
    def spread(self, mail: Mail) -> None:
        """Give every replica the weights that the masters say."""
        if self._has_copy:
            self._own(self.weights).copy_(self.master)
        others = [(place, rank) for place, rank in enumerate(self._replicas) if place != self._place]
        for _, rank in others if self._is_sharded else ():
            mail.send(self._own(self.weights), rank, _WEIGHT_TAG + self.number)
        for place, rank in others if self._is_sharded else ():
            mail.receive(self._share_of(self.weights, place), rank, _WEIGHT_TAG + self.number)
        mail.settle()
        self.master.grad = None

    @torch.no_grad()
    def whole_masters(self, mail: Mail) -> Iterator[tuple[str, Tensor]]:
        """All masters on the first replica, in float32; nothing on the others."""
        whole = self.weights
        if self._has_copy and not self._is_sharded:
            whole = self.master.detach()
        elif self._has_copy and self._place:
            mail.send(self.master.detach(), self._replicas[0], _MASTER_TAG + self.number)
            mail.settle()
        elif self._has_copy:
            parts = [self.master.detach()]
            for rank in self._replicas[1:]:
                parts.append(mail.receive(torch.empty_like(self.master), rank, _MASTER_TAG + self.number))
            whole = torch.cat(parts)
        if self._place == 0:
            for name, param in self._params:
                yield name, self._view(whole, name, param)

    def _own(self, flat: Tensor) -> Tensor:
        return flat[self._low : self._low + self._share]

    def _share_of(self, flat: Tensor, place: int) -> Tensor:
        """What the replica at ``place`` needs."""
        return flat[place * self._share : (place + 1) * self._share] if self._is_sharded else flat


def exchange_sum(
    mail: Mail, own: Tensor, ranks: Sequence[int], place: int, part_for: Callable[[int], Tensor], tag: int
) -> Tensor:
    """Send ``part_for(place)`` to each of the other ranks, and sum what they send, and ``own``, in their order."""
    for other, rank in enumerate(ranks):
        if other != place:
            mail.send(part_for(other), rank, tag)
    total: Tensor | None = None
    for other, rank in enumerate(ranks):
        one = own if other == place else mail.receive(torch.empty_like(own), rank, tag)
        total = one.clone() if total is None else total.add_(one)
    mail.settle()
    assert total is not None, "this rank is one of them"
    return total


def group_members(groups: ParamGroups, names: Mapping[int, str]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Parameters of each group with their names."""
    for group in groups:
        yield [(names[id(param)], param) for param in group["params"]]


def clip_factor(norm: float, limit: float) -> float:
    """What gradients of this norm are multiplied with; the rule of ``torch.nn.utils.clip_grad_norm_``."""
    return 1.0 if not limit or not math.isfinite(norm) else min(1.0, limit / (norm + 1e-6))
