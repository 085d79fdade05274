"""Moving sharded optimizer state from N ranks to M without touching a bit of it.

The state of a job is one flat index of ``elements`` elements, cut into quantisation blocks of ``block_size``. That grid
belongs to the job, whatever the number of ranks: a boundary between ranks is always a boundary between blocks, so a
block's codes and its one absmax travel together and nothing is decoded on the way. All here is arithmetic on block
numbers; only ``reshard`` touches tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from holdfast.errors import ConfigurationError

__all__ = ["Layout", "Move", "minimal", "plan", "reshard"]

Interval = tuple[int, int]
"""Half-open."""

_PER_BLOCK = "_absmax"
"""How keys of tensors end that have one entry per block; all others have one per element."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Which rank holds which blocks of one flat grid.

    A rank holds its blocks in ascending order, one behind the other, so only the grid's own end can be a short block.
    Every block has exactly one holder; a rank may hold none. Neighbouring intervals of a rank are one interval: use
    the constructors below, which see to that, and layouts that mean the same are equal.

    Raises: ConfigurationError with all that is wrong: intervals that overlap, leave gaps, or are out of order.
    """

    elements: int
    """Used length F of the flat index, without padding behind its last block."""
    block_size: int
    """Elements that share one absmax."""
    intervals: tuple[tuple[Interval, ...], ...]
    """For each rank, half-open intervals of block numbers."""

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ConfigurationError(problems)

    @classmethod
    def contiguous(cls, elements: int, block_size: int, ranks: int, *, align: int = 1) -> Layout:
        """Equal shares of whole blocks, ``block_size * ceil(blocks / ranks)`` elements each; trailing ranks may get
        less or nothing. ``align`` is what a collective wants shares to be a multiple of.

        Source: the alignment rule of DeepSpeed's partitions, with the least common multiple of both for its unit.
        """
        if min(elements + 1, block_size, ranks, align) < 1:
            raise ConfigurationError(
                f"elements={elements} must be at least 0; block_size={block_size}, ranks={ranks} and align={align} "
                "at least 1"
            )
        unit = math.lcm(block_size, align) // block_size
        blocks = -(-elements // block_size)
        share = unit * -(-blocks // (unit * ranks))
        cuts = [min(rank * share, blocks) for rank in range(ranks + 1)]
        return cls.of_intervals(elements, block_size, [[pair] for pair in pairwise(cuts)])

    @classmethod
    def of_intervals(cls, elements: int, block_size: int, intervals: Sequence[Sequence[Interval]]) -> Layout:
        """From half-open intervals of block numbers, one list per rank. Empty ones are left out."""
        return cls(elements, block_size, tuple(tuple(_joined(held)) for held in intervals))

    @classmethod
    def of_elements(cls, elements: int, block_size: int, intervals: Sequence[Sequence[Interval]]) -> Layout:
        """From half-open intervals of elements, one list per rank.

        Raises: ConfigurationError for a boundary inside a block, whose halves would need an absmax each.
        """
        problems = [
            f"rank {rank} would hold elements {start}..{stop}, which cuts a block of {block_size} in two: its halves "
            f"would need an absmax each; move the boundary to a multiple of {block_size} (only {elements}, the end, "
            "may be none)"
            for rank, held in enumerate(intervals)
            for start, stop in held
            if start % block_size or (stop % block_size and stop != elements)
        ]
        if problems:
            raise ConfigurationError(problems)
        in_blocks = [[(start // block_size, -(-stop // block_size)) for start, stop in held] for held in intervals]
        return cls.of_intervals(elements, block_size, in_blocks)

    @property
    def ranks(self) -> int:
        return len(self.intervals)

    @property
    def blocks(self) -> int:
        """Blocks of the grid, a short last one included."""
        return -(-self.elements // self.block_size)

    def blocks_of(self, rank: int) -> int:
        """Entries of a per-block tensor on this rank."""
        return sum(stop - start for start, stop in self.intervals[rank])

    def elements_of(self, rank: int) -> int:
        """Entries of a per-element tensor on this rank."""
        held, size = self.intervals[rank], self.block_size
        return sum(min(stop * size, self.elements) - start * size for start, stop in held)


@dataclass(frozen=True, slots=True)
class Move:
    """Elements ``start .. stop`` of the flat index go from one rank of the old layout to one of the new."""

    source: int
    """Rank in the old layout."""
    target: int
    """Rank in the new layout."""
    start: int
    stop: int
    source_element: int
    """Where the elements begin in the source's per-element tensors."""
    target_element: int
    source_block: int
    """Where their blocks begin in the source's per-block tensors."""
    target_block: int
    blocks: int
    is_local: bool
    """Both ranks are the same process, so nothing has to be sent."""


def plan(old: Layout, new: Layout, origins: Sequence[int | None] | None = None) -> tuple[Move, ...]:
    """The moves that turn ``old`` into ``new``, ascending in the flat index; each block is in exactly one of them.

    ``origins[r]`` is the old rank of the process that has new rank ``r``, None for a newcomer; without it, ranks keep
    their numbers. No two moves could be one, so between contiguous layouts of N and M ranks there are at most N+M-1.

    Raises: ConfigurationError when the layouts are not of one grid.
    """
    problems = _grid_problems(old, new)
    if origins is None:
        origins = [rank if rank < old.ranks else None for rank in range(new.ranks)]
    problems += _origin_problems(old, origins)
    if len(origins) != new.ranks:
        problems.append(f"origins names {len(origins)} ranks, the new layout has {new.ranks}")
    if problems:
        raise ConfigurationError(problems)
    return tuple(_moves(old, new, origins))


def reshard(shards: Sequence[Mapping[str, Tensor]], old: Layout, new: Layout) -> list[dict[str, Tensor]]:
    """The shards of ``new``, made of those of ``old``; bits are copied, never interpreted, and nothing is shared.

    Shapes: per rank any number of flat tensors of any dtype. Those whose key ends in ``_absmax`` have one entry per
    block that the rank holds, all others (codes, 32-bit moments, master weights) one per element.
    Raises: ConfigurationError when the layouts are not of one grid or a shard does not fit its layout.
    """
    moves = plan(old, new)
    problems = _shard_problems(shards, old)
    if problems:
        raise ConfigurationError(problems)
    keys = shards[0]
    made = [
        {key: torch.empty(_length(new, rank, key), dtype=like.dtype, device=like.device) for key, like in keys.items()}
        for rank in range(new.ranks)
    ]
    for move in moves:
        for key in keys:
            _copy(move, shards[move.source][key], made[move.target][key], per_block=key.endswith(_PER_BLOCK))
    return made


def minimal(old: Layout, origins: Sequence[int | None]) -> Layout:
    """The layout of ``len(origins)`` ranks that moves the fewest blocks, with at most ``ceil(blocks / ranks)`` on any.

    ``origins[r]`` is the old rank of new rank ``r``, None for a newcomer: after rank 3 of 8 is lost,
    ``[0, 1, 2, 4, 5, 6, 7]``. A rank keeps what it has up to that limit; blocks of ranks that are gone, and those above
    the limit, go to the ranks that have least. So where ranks were even, only the lost one's blocks move.

    Raises: ConfigurationError when an origin does not exist or is named twice.
    """
    problems = _origin_problems(old, origins)
    if problems or not origins:
        raise ConfigurationError(problems or "origins is empty; the state needs at least one rank")
    limit = -(-old.blocks // len(origins))
    kept = [[] if origin is None else _head(old.intervals[origin], limit) for origin in origins]
    loose = _complement([pair for held in kept for pair in held], old.blocks)
    grants = _poured([sum(stop - start for start, stop in held) for held in kept], _size(loose))
    held_by_rank = []
    for held, grant in zip(kept, grants, strict=True):
        given = _head(loose, grant)
        loose = _tail(loose, grant)
        held_by_rank.append(sorted([*held, *given]))
    return Layout.of_intervals(old.elements, old.block_size, held_by_rank)


def _problems(layout: Layout) -> list[str]:
    if layout.elements < 0 or layout.block_size < 1 or not layout.intervals:
        have = f"elements={layout.elements}, block_size={layout.block_size} and {len(layout.intervals)} ranks"
        return [f"a layout of {have} is none: it needs elements of at least 0, blocks of at least 1, and a rank"]
    problems = []
    for rank, held in enumerate(layout.intervals):
        at = 0
        for start, stop in held:
            if not at <= start < stop <= layout.blocks:
                problems.append(
                    f"rank {rank} lists blocks {start}..{stop}; its intervals must ascend without overlap and lie in "
                    f"0..{layout.blocks}"
                )
            at = max(at, stop)
    return problems or _cover_problems(layout)


def _cover_problems(layout: Layout) -> list[str]:
    """Blocks without a holder, or with two."""
    problems, at, before = [], 0, 0
    for start, stop, rank, _ in _by_block(layout):
        if start > at:
            problems.append(f"no rank holds blocks {at}..{start}; every block needs exactly one")
        if start < at:
            problems.append(f"ranks {before} and {rank} both hold blocks {start}..{min(stop, at)}; one must go")
        if stop > at:
            at, before = stop, rank
    if at < layout.blocks:
        problems.append(f"no rank holds blocks {at}..{layout.blocks}; every block needs exactly one")
    return problems


def _grid_problems(old: Layout, new: Layout) -> list[str]:
    problems = []
    if old.elements != new.elements:
        problems.append(
            f"the old layout has {old.elements} elements, the new one {new.elements}; both must be cuts of one job's "
            "flat index, without its padding"
        )
    if old.block_size != new.block_size:
        problems.append(
            f"the old layout has blocks of {old.block_size}, the new one of {new.block_size}; another block size means "
            "other scales, which is lossy: reshard with the old one, or dequantize_blockwise with the old and "
            "quantize_blockwise with the new, and say so"
        )
    return problems


def _origin_problems(old: Layout, origins: Sequence[int | None]) -> list[str]:
    known = [origin for origin in origins if origin is not None]
    problems = [f"origin {rank} is no rank of 0..{old.ranks - 1}" for rank in known if not 0 <= rank < old.ranks]
    return problems + [f"origin {rank} is named twice" for rank in sorted(set(known)) if known.count(rank) > 1]


def _shard_problems(shards: Sequence[Mapping[str, Tensor]], old: Layout) -> list[str]:
    if len(shards) != old.ranks:
        return [f"{len(shards)} shards for {old.ranks} ranks; give one per rank, with empty tensors where it is empty"]
    problems = []
    for rank, shard in enumerate(shards):
        if set(shard) != set(shards[0]):
            problems.append(f"rank {rank} has the keys {sorted(shard)}, rank 0 has {sorted(shards[0])}")
            continue
        for key, tensor in shard.items():
            need = _length(old, rank, key)
            if tuple(tensor.shape) != (need,) or tensor.dtype != shards[0][key].dtype:
                problems.append(
                    f"{key} of rank {rank} is {_kind(tensor.dtype, list(tensor.shape))}, its layout needs "
                    f"{_kind(shards[0][key].dtype, [need])}"
                )
    return problems


def _kind(dtype: torch.dtype, shape: list[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {shape}"


def _length(layout: Layout, rank: int, key: str) -> int:
    return layout.blocks_of(rank) if key.endswith(_PER_BLOCK) else layout.elements_of(rank)


def _copy(move: Move, source: Tensor, target: Tensor, *, per_block: bool) -> None:
    if per_block:
        have, put, count = move.source_block, move.target_block, move.blocks
    else:
        have, put, count = move.source_element, move.target_element, move.stop - move.start
    target[put : put + count].copy_(source.detach()[have : have + count])


def _moves(old: Layout, new: Layout, origins: Sequence[int | None]) -> Iterator[Move]:
    """Both lists of intervals ascend, so one walk along the grid meets every pair that has blocks in common."""
    size = old.block_size
    targets = _by_block(new)
    at = 0
    for source_start, source_stop, source, source_at in _by_block(old):
        while at < len(targets):
            target_start, target_stop, target, target_at = targets[at]
            start, stop = max(source_start, target_start), min(source_stop, target_stop)
            if start < stop:
                have, put = source_at + start - source_start, target_at + start - target_start
                yield Move(
                    source, target, start * size, min(stop * size, old.elements), have * size, put * size, have, put,
                    stop - start, origins[target] == source,
                )  # fmt: skip
            if target_stop > source_stop:
                break
            at += 1


def _by_block(layout: Layout) -> list[tuple[int, int, int, int]]:
    """All intervals in ascending order: start, stop, rank, and the offset at which the rank holds it; in blocks."""
    found = []
    for rank, held in enumerate(layout.intervals):
        at = 0
        for start, stop in held:
            found.append((start, stop, rank, at))
            at += stop - start
    return sorted(found)


def _joined(held: Sequence[Interval]) -> Iterator[Interval]:
    """The same blocks in the same order, without empty intervals and with those that touch made one."""
    last: Interval | None = None
    for start, stop in held:
        if start == stop:
            continue
        if last is not None and last[1] == start:
            last = (last[0], stop)
            continue
        if last is not None:
            yield last
        last = (start, stop)
    if last is not None:
        yield last


def _size(held: Sequence[Interval]) -> int:
    return sum(stop - start for start, stop in held)


def _head(held: Sequence[Interval], count: int) -> list[Interval]:
    """The first ``count`` blocks, or all."""
    taken = []
    for start, stop in held:
        part = min(stop - start, count)
        if part:
            taken.append((start, start + part))
        count -= part
    return taken


def _tail(held: Sequence[Interval], count: int) -> list[Interval]:
    """What ``_head`` leaves."""
    left = []
    for start, stop in held:
        part = min(stop - start, count)
        if start + part < stop:
            left.append((start + part, stop))
        count -= part
    return left


def _complement(held: Sequence[Interval], blocks: int) -> list[Interval]:
    gaps, at = [], 0
    for start, stop in sorted(held):
        if start > at:
            gaps.append((at, start))
        at = stop
    return gaps if at == blocks else [*gaps, (at, blocks)]


def _poured(loads: Sequence[int], amount: int) -> list[int]:
    """What each of these gets of ``amount`` when it is poured where least is: levels end up as even as they can."""
    level, rest = 0, amount
    for count, load in enumerate(sorted(loads), start=1):
        following = sorted(loads)[count] if count < len(loads) else None
        room = (amount if following is None else following - load) * count
        if following is None or room >= rest:
            level, rest = load + rest // count, rest % count
            break
        rest -= room
    grants = [max(0, level - load) for load in loads]
    for rank, load in enumerate(loads):  # the remainder, one each, to those that stand at the level
        if rest and load + grants[rank] == level:
            grants[rank] += 1
            rest -= 1
    return grants
