"""Parameters that are a ``DTensor``: where a rank's shard lies in the whole, and what ranks have to agree on.

Quantisation blocks belong to the whole parameter, so that any number of ranks gives the codes and weights of one.
Where every shard holds whole blocks, a rank updates its shard alone and the absmax is sharded along with it. Where
shards cut blocks, each rank keeps the absmax of all blocks, and ranks agree on it in every step (``cut_blocks.py``).

``torch.distributed.tensor`` is looked up and not imported: a process without sharded tensors does without it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError
from holdfast.optim.quantize import block_count

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement

__all__ = ["Axes", "Per", "Piece", "agree", "block_grid", "is_sharded", "local", "new_like", "piece_of", "placed_like"]

Axes: TypeAlias = "tuple[tuple[DeviceMesh, int], ...]"
"""Mesh dims, each with its mesh."""


def is_sharded(tensor: object) -> bool:
    """Whether it is a ``DTensor``, replicated ones included."""
    module = sys.modules.get("torch.distributed.tensor")
    kind = getattr(module, "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of it, by reference; the tensor itself unless it is a ``DTensor``."""
    if type(tensor) in _PLAIN or not is_sharded(tensor):
        return tensor
    held: Tensor = tensor._local_tensor  # type: ignore[attr-defined]  # to_local() makes a new view of a parameter
    return held.wait() if hasattr(held, "wait") else held  # a collective may still be writing it


_PLAIN = (Tensor, torch.nn.Parameter)


class Per(Enum):
    """What each number of a state tensor belongs to, which decides how the tensor is sharded."""

    ELEMENT = "element"
    """Sharded as the parameter."""
    BLOCK = "block"
    """Sharded as the parameter where shards hold whole blocks, else the same on every rank."""
    PARAMETER = "parameter"
    """The same on every rank."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a parameter that this rank holds: a box of it."""

    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: tuple[int, ...]
    size: tuple[int, ...]
    axes: Axes
    """Mesh dims over which the parameter is sharded. Empty when every rank holds all of it."""
    is_cut: bool
    """Whether, on any rank, a shard may end inside a block."""
    is_box: bool
    """False for a strided sharding whose parts are not boxes; where they lie is not worked out here."""

    @property
    def elements(self) -> int:
        return math.prod(self.size)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie side by side in the whole parameter."""
        return not self.elements or math.prod(self._leading()) == 1

    def runs(self) -> list[tuple[int, int, int]]:
        """Elements that lie side by side in the whole parameter: start and stop here, start in the whole.

        Raises: ConfigurationError when the part is not a box.
        """
        leading = self._leading()
        length = math.prod(self.size[len(leading) :])
        firsts = self._index(leading).tolist() if length else []
        return [(number * length, (number + 1) * length, first) for number, first in enumerate(firsts)]

    def index(self) -> Tensor:
        """Of each element, its place in the whole parameter. Shapes: int64 ``[elements]`` on CPU.

        Raises: ConfigurationError when the part is not a box.
        """
        return self._index(self.size)

    def _leading(self) -> tuple[int, ...]:
        """Sizes of the dims before the last one that is sharded."""
        dim = len(self.size)
        while dim > 0 and self.size[dim - 1] == self.shape[dim - 1]:
            dim -= 1
        return self.size[: max(dim - 1, 0)]

    def _index(self, size: Sequence[int]) -> Tensor:
        """Of the first element for each combination of the leading dims."""
        if not self.is_box:
            raise ConfigurationError(
                f"a parameter of shape {list(self.shape)} is sharded unevenly over two mesh dims at once, in blocks "
                "that shards cut or with stochastic rounding; use bits=32 without stochastic rounding for its group"
            )
        strides = [math.prod(self.shape[dim + 1 :]) for dim in range(len(self.shape))]
        found = torch.tensor([sum(at * stride for at, stride in zip(self.start, strides, strict=True))], device="cpu")
        for count, stride in zip(size, strides, strict=False):
            found = (found.unsqueeze(1) + torch.arange(count, device="cpu") * stride).reshape(-1)
        return found


def piece_of(tensor: Tensor, block_size: int) -> Piece | None:
    """Where the local part of a ``DTensor`` lies; None for other tensors."""
    if not is_sharded(tensor):
        return None
    place, shape = _place(tensor), tuple(tensor.shape)
    size, start = place.box(shape)
    is_cut = bool(place.axes) and not place.holds_whole_blocks(shape, block_size)
    return Piece(shape, start, size, place.axes, is_cut, place.makes_boxes(shape))


def block_grid(shape: Sequence[int], block_size: int) -> tuple[int, ...]:
    """The shape of a parameter's absmax, one entry per block in row-major order, whatever it is sharded over.

    Where blocks fit into the trailing dims it is the leading dims and then the blocks of the trailing ones, as few of
    those as possible: ``[d0, d1 / block_size]`` for a matrix. Slicing the parameter along a leading dim then slices the
    absmax likewise. Elsewhere it is flat.
    """
    dim, width = _row(shape, block_size)
    if width % block_size:
        return (block_count(width, block_size),)
    return (*shape[:dim], width // block_size)


def new_like(
    param: Tensor, per: Per, shape: Sequence[int], dtype: torch.dtype, value: float, block_size: int
) -> Tensor:
    """A constant tensor for the state of ``param``. ``shape`` is that of the whole."""
    device = local(param).device
    if not is_sharded(param):
        return torch.full(tuple(shape), value, dtype=dtype, device=device)
    place = _place(param).of_state(per, param.shape, block_size)
    return place.assembled(torch.full(place.box(shape)[0], value, dtype=dtype, device=device), shape)


def placed_like(value: Tensor, param: Tensor, per: Per, block_size: int) -> Tensor:
    """A contiguous copy of a whole ``value`` where ``new_like`` would put it; nothing is cast.

    Collective where ``value`` is a ``DTensor`` that is placed differently.
    """
    device = local(param).device
    place = _place(param).of_state(per, param.shape, block_size) if is_sharded(param) else None
    if is_sharded(value):
        if place is not None and place == _place(value):
            return place.assembled(_copied(local(value), device), value.shape)
        value = value.full_tensor()  # type: ignore[attr-defined]
    return _copied(value, device) if place is None else place.assembled(_copied(place.part(value), device), value.shape)


def agree(tensors: Sequence[tuple[Axes, Tensor]], *, largest: bool) -> None:
    """Collective over every mesh dim that is named. Replace tensors by their sums, or largest values, over ranks.

    One ``all_reduce`` per mesh dim, whatever the number of tensors; those of other devices or dtypes go apart.
    """
    batches: dict[Any, list[Tensor]] = {}  # Any: axes, device and dtype
    for axes, tensor in tensors:
        if axes:
            batches.setdefault((axes, tensor.device, tensor.dtype), []).append(tensor)
    for (axes, _, _), batch in batches.items():
        op = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
        together = torch.cat([tensor.reshape(-1) for tensor in batch])
        for mesh, dim in axes:
            torch.distributed.all_reduce(together, op, group=mesh.get_group(dim))
        for tensor, agreed in zip(batch, torch.split(together, [tensor.numel() for tensor in batch]), strict=True):
            tensor.copy_(agreed.view(tensor.shape))


@dataclass(frozen=True, slots=True)
class _Place:
    """A mesh, and how a tensor is spread over it."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    @property
    def axes(self) -> Axes:
        shards = (dim for dim, at in enumerate(self.placements) if _dim(at) is not None)
        return tuple((self.mesh, dim) for dim in shards if self.mesh.size(dim) > 1)

    def of_state(self, per: Per, shape: Sequence[int], block_size: int) -> _Place:
        """Where state tensors of a parameter of this shape go."""
        from torch.distributed.tensor import Replicate

        if per is Per.ELEMENT or (per is Per.BLOCK and self.holds_whole_blocks(shape, block_size)):
            return self
        return _Place(self.mesh, tuple(Replicate() for _ in self.placements))

    def holds_whole_blocks(self, shape: Sequence[int], block_size: int) -> bool:
        """Whether ``block_grid``, sharded alike, has on each rank the blocks of the elements it holds."""
        last, width = _row(shape, block_size)
        if width % block_size or any((_dim(at) or 0) > last for at in self.placements):
            return False
        ways = math.prod(self.mesh.size(dim) for dim, at in enumerate(self.placements) if _dim(at) == last)
        is_plain = ways == 1 or not any(hasattr(at, "split_factor") for at in self.placements)
        return is_plain and shape[last] % ways == 0 and width // ways % block_size == 0

    def makes_boxes(self, shape: Sequence[int]) -> bool:
        """Without strides always. With them where the dim is cut evenly and later mesh dims make up for the stride,
        which is how FSDP shards what tensor parallelism has sharded.
        """
        for number, at in enumerate(self.placements):
            dims = [d for d, other in enumerate(self.placements) if _dim(other) == _dim(at) is not None]
            later = math.prod(self.mesh.size(d) for d in dims if d > number)
            ways = math.prod(self.mesh.size(d) for d in dims)
            if getattr(at, "split_factor", later) != later and ways > 1:
                return False
            if hasattr(at, "split_factor") and shape[_dim(at) or 0] % ways:
                return False
        return True

    def box(self, shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Size and start of what this rank holds of a tensor."""
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        size, start = compute_local_shape_and_global_offset(tuple(shape), self.mesh, self.placements)
        return tuple(size), tuple(start)

    def part(self, whole: Tensor) -> Tensor:
        """A view of what this rank holds."""
        if not self.makes_boxes(whole.shape):
            raise ConfigurationError(
                f"a whole tensor of shape {list(whole.shape)} is to be sharded unevenly over two mesh dims at once; "
                "load a sharded state dict instead"
            )
        for dim, (length, first) in enumerate(zip(*self.box(whole.shape), strict=True)):
            whole = whole.narrow(dim, first if length else 0, length)
        return whole

    def assembled(self, held: Tensor, shape: Sequence[int]) -> Tensor:
        from torch.distributed.tensor import DTensor

        stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        made: Tensor = DTensor.from_local(
            held, self.mesh, self.placements, run_check=False, shape=torch.Size(shape), stride=stride
        )
        return made.to(held.device)  # back to the CPU when FSDP offloads: from_local goes to the mesh's device


def _place(tensor: Tensor) -> _Place:
    sharded: DTensor = tensor  # type: ignore[assignment]
    return _Place(sharded.device_mesh, tuple(sharded.placements))


def _dim(placement: Placement) -> int | None:
    """The dim that is sharded."""
    return getattr(placement, "dim", None)


def _row(shape: Sequence[int], block_size: int) -> tuple[int, int]:
    """The first of the fewest trailing dims that hold whole blocks, and their elements; dim 0 if none do."""
    for dim in reversed(range(len(shape))):
        width = math.prod(shape[dim:])
        if width and width % block_size == 0:
            return dim, width
    return 0, math.prod(shape)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)
