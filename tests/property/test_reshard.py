"""For any grid and any two layouts: resharding is gathering and cutting, bit for bit, with few messages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from holdfast.errors import ConfigurationError
from holdfast.optim.quantize import quantize_blockwise
from holdfast.optim.reshard import Layout, Move, minimal, plan, reshard

_law = settings(deadline=None)  # a busy machine is no counter-example

elements = st.integers(0, 3000)
block_sizes = st.sampled_from([1, 2, 8, 64, 256])
worlds = st.integers(1, 20)

Shards = list[dict[str, Tensor]]


@st.composite
def _listed(draw: st.DrawFn, count: int, size: int) -> Layout:
    """Any owner for any block: the most broken-up layouts there are."""
    ranks = draw(worlds)
    blocks = -(-count // size)
    runs = draw(st.lists(st.tuples(st.integers(0, ranks - 1), st.integers(1, 40)), max_size=30))
    held: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
    at = 0
    for rank, length in [*runs, (0, blocks)]:
        stop = min(at + length, blocks)
        held[rank].append((at, stop))
        at = stop
    return Layout.of_intervals(count, size, held)


@st.composite
def _layouts(draw: st.DrawFn) -> tuple[Layout, Layout]:
    """Two layouts of one grid, each of equal shares or of a list."""
    count, size = draw(elements), draw(block_sizes)
    one = st.one_of(worlds.map(lambda ranks: Layout.contiguous(count, size, ranks)), _listed(count, size))
    return draw(one), draw(one)


def _whole(layout: Layout) -> dict[str, Tensor]:
    """State of one rank in which every entry differs from its neighbours; NaNs too, whose bits must survive."""
    count = torch.arange(layout.elements, dtype=torch.int32)
    return {
        "exp_avg_codes": (count * 167).to(torch.uint8),
        "exp_avg_absmax": torch.arange(float(layout.blocks)) + 0.5,
        "master": (count * -1640531527).view(torch.float32),
        "half": (count * 40503).to(torch.int16).view(torch.bfloat16),
    }


def _cut(whole: dict[str, Tensor], layout: Layout) -> Shards:
    """What each rank holds, element by element."""
    shards = []
    for held in layout.intervals:
        blocks = [block for start, stop in held for block in range(start, stop)]
        size = layout.block_size
        each = [e for block in blocks for e in range(block * size, min((block + 1) * size, layout.elements))]
        shards.append({k: v[blocks] if k.endswith("_absmax") else v[each] for k, v in whole.items()})
    return shards


def _bits(shards: Sequence[dict[str, Tensor]]) -> list[dict[str, bytes]]:
    return [{key: value.view(torch.uint8).numpy().tobytes() for key, value in shard.items()} for shard in shards]


def _sent(moves: Sequence[Move]) -> int:
    return sum(move.blocks for move in moves if not move.is_local)


@_law
@given(_layouts())
def test_resharding_is_gathering_and_cutting(pair: tuple[Layout, Layout]) -> None:
    old, new = pair
    whole = _whole(old)
    assert _bits(reshard(_cut(whole, old), old, new)) == _bits(_cut(whole, new))


@_law
@given(_layouts())
def test_every_block_moves_once_and_no_two_moves_could_be_one(pair: tuple[Layout, Layout]) -> None:
    moves, size = plan(*pair), pair[0].block_size
    assert [block for m in moves for block in range(m.start // size, m.start // size + m.blocks)] == list(
        range(pair[0].blocks)
    )
    assert all(m.stop - m.start == min(m.blocks * size, pair[0].elements - m.start) for m in moves)
    for one, next_one in pairwise(moves):
        assert (one.source, one.target) != (next_one.source, next_one.target)


@_law
@given(elements, block_sizes, worlds, worlds, st.sampled_from([1, 2, 3, 96]))
def test_contiguous_layouts_need_at_most_as_many_moves_as_both_have_ranks_less_one(
    count: int, size: int, old: int, new: int, align: int
) -> None:
    moves = plan(Layout.contiguous(count, size, old, align=align), Layout.contiguous(count, size, new))
    assert len(moves) <= old + new - 1


@_law
@given(elements, block_sizes, worlds, st.sampled_from([1, 2, 3, 96]))
def test_equal_shares_are_whole_blocks_and_as_small_as_they_can_be(
    count: int, size: int, ranks: int, align: int
) -> None:
    layout = Layout.contiguous(count, size, ranks, align=align)
    unit = math.lcm(size, align)
    share = unit * -(-count // (unit * ranks))
    for rank in range(ranks):
        assert layout.elements_of(rank) == max(0, min((rank + 1) * share, count) - rank * share)
        assert layout.blocks_of(rank) == -(-layout.elements_of(rank) // size)


def _equal_shares(old: Layout, ranks: int) -> Layout:
    return Layout.contiguous(old.elements, old.block_size, ranks)


def _fewest_moves(old: Layout, ranks: int) -> Layout:
    return minimal(old, [rank if rank < old.ranks else None for rank in range(ranks)])


@_law
@given(elements, block_sizes, st.sampled_from([_equal_shares, _fewest_moves]))
@pytest.mark.parametrize("way", [(8, 7, 3, 8), (20, 1, 14, 5)])
def test_there_and_back_again_changes_no_bit(
    way: tuple[int, ...], count: int, size: int, next_layout: Callable[[Layout, int], Layout]
) -> None:
    layout = first = Layout.contiguous(count, size, way[0])
    whole = _whole(layout)
    shards = _cut(whole, layout)
    for ranks in way[1:]:
        following = next_layout(layout, ranks)
        shards = reshard(shards, layout, following)
        assert _bits(shards) == _bits(_cut(whole, following))
        layout = following
    assert _bits(reshard(shards, layout, first)) == _bits(_cut(whole, first))


@_law
@given(
    x=st.integers(0, 2**31 - 1).map(lambda seed: torch.randn(4301, generator=torch.Generator().manual_seed(seed))),
    signed=st.booleans(),
    ranks=worlds,
)
def test_shards_quantised_by_their_ranks_join_to_what_one_rank_quantises(x: Tensor, signed: bool, ranks: int) -> None:
    x = x if signed else x.square()
    alone, many = Layout.contiguous(len(x), 256, 1), Layout.contiguous(len(x), 256, ranks)
    parts = x.split([many.elements_of(rank) for rank in range(ranks)])
    shards = [dict(zip(("m_codes", "m_absmax"), quantize_blockwise(part, signed, 256), strict=True)) for part in parts]
    one = dict(zip(("m_codes", "m_absmax"), quantize_blockwise(x, signed, 256), strict=True))
    assert _bits(reshard(shards, many, alone)) == _bits([one])
    assert _bits(reshard([one], alone, many)) == _bits(shards)


@pytest.mark.parametrize("ranks", [2, 3, 7, 8, 20])
def test_boundaries_at_multiples_of_two_are_refused(ranks: int) -> None:
    """DeepSpeed's own rule. The codes would depend on the number of ranks, as the quantised halves show."""
    share = 2 * -(-4301 // (2 * ranks))
    cuts = [(rank * share, min((rank + 1) * share, 4301)) for rank in range(ranks)]
    with pytest.raises(ConfigurationError, match=f"rank 0 would hold elements 0..{share}, which cuts a block of 256"):
        Layout.of_elements(4301, 256, [[pair] for pair in cuts])
    x = torch.randn(4301, generator=torch.Generator().manual_seed(0))
    halves = torch.cat([quantize_blockwise(x[start:stop], True, 256)[0] for start, stop in cuts])
    assert not torch.equal(halves, quantize_blockwise(x, True, 256)[0])


@_law
@given(elements, block_sizes, worlds)
def test_layouts_in_elements_and_in_blocks_are_the_same(count: int, size: int, ranks: int) -> None:
    layout = Layout.contiguous(count, size, ranks)
    in_elements = [[(start * size, min(stop * size, count)) for start, stop in held] for held in layout.intervals]
    assert Layout.of_elements(count, size, in_elements) == layout


@_law
@given(elements, block_sizes, st.integers(2, 20), st.data())
def test_after_a_loss_only_the_blocks_of_the_lost_rank_move(
    count: int, size: int, ranks: int, data: st.DataObject
) -> None:
    old = Layout.contiguous(count, size, ranks)
    lost = data.draw(st.integers(0, ranks - 1))
    survivors = [rank for rank in range(ranks) if rank != lost]
    new = minimal(old, survivors)
    moves = plan(old, new, survivors)
    assert {m.source for m in moves if not m.is_local} <= {lost}
    assert _sent(moves) == old.blocks_of(lost)
    loads = [new.blocks_of(rank) for rank in range(ranks - 1)]
    gains = [load - old.blocks_of(origin) for load, origin in zip(loads, survivors, strict=True)]
    assert max(loads) <= -(-old.blocks // (ranks - 1))
    assert max((load for load, gain in zip(loads, gains, strict=True) if gain), default=0) <= min(loads) + 1


@_law
@given(_layouts(), st.data())
def test_no_layout_within_the_even_share_moves_fewer_blocks(pair: tuple[Layout, Layout], data: st.DataObject) -> None:
    old = pair[0]
    known = data.draw(st.lists(st.sampled_from(range(old.ranks)), unique=True))
    origins: list[int | None] = data.draw(st.permutations([*known, *[None] * data.draw(st.integers(not known, 5))]))
    new = minimal(old, origins)
    limit = -(-old.blocks // len(origins))
    assert max(new.blocks_of(rank) for rank in range(new.ranks)) <= limit
    could_stay = sum(min(old.blocks_of(origin), limit) for origin in origins if origin is not None)
    assert _sent(plan(old, new, origins)) == old.blocks - could_stay
    assert _bits(reshard(_cut(_whole(old), old), old, new)) == _bits(_cut(_whole(old), new))


def test_eight_ranks_that_lose_one_move_an_eighth_where_equal_shares_move_up_to_half() -> None:
    old = Layout.contiguous(8 * 70 * 256, 256, 8)
    moved = []
    for lost in range(8):
        survivors = [rank for rank in range(8) if rank != lost]
        assert _sent(plan(old, minimal(old, survivors), survivors)) == 70
        moved.append(_sent(plan(old, Layout.contiguous(old.elements, 256, 7), survivors)) / old.blocks)
    assert (min(moved), max(moved)) == pytest.approx((0.286, 0.5), abs=0.001)


def test_offsets_count_in_elements_for_codes_and_in_blocks_for_absmax() -> None:
    old, new = Layout.contiguous(1000, 256, 2), Layout.of_intervals(1000, 256, [[(0, 1), (3, 4)], [(1, 3)]])
    assert plan(old, new) == (
        Move(0, 0, 0, 256, 0, 0, 0, 0, 1, True),
        Move(0, 1, 256, 512, 256, 0, 1, 0, 1, False),
        Move(1, 1, 512, 768, 0, 256, 0, 1, 1, True),
        Move(1, 0, 768, 1000, 256, 256, 1, 1, 1, False),
    )
    assert [new.elements_of(rank) for rank in range(2)] == [488, 512]


def test_who_is_local_follows_the_processes_not_the_numbers() -> None:
    old, new = Layout.contiguous(512, 256, 2), Layout.contiguous(512, 256, 2)
    assert [m.is_local for m in plan(old, new)] == [True, True]
    assert [m.is_local for m in plan(old, new, [1, None])] == [False, False]


def test_results_share_no_memory_with_their_sources() -> None:
    layout = Layout.contiguous(512, 256, 1)
    whole = _whole(layout)
    (made,) = reshard([whole], layout, layout)
    assert all(made[key].data_ptr() != whole[key].data_ptr() for key in whole)


@pytest.mark.parametrize(
    ("intervals", "message"),
    [
        ([[(0, 2)], [(1, 4)]], r"ranks 0 and 1 both hold blocks 1\.\.2"),
        ([[(0, 2)], [(2, 4)], [(0, 4)]], r"ranks 0 and 2 both hold blocks 0\.\.2"),
        ([[(0, 2)], [(3, 4)]], r"no rank holds blocks 2\.\.3"),
        ([[(0, 2)], []], r"no rank holds blocks 2\.\.4"),
        (
            [[(2, 4), (0, 2)]],
            r"rank 0 lists blocks 0\.\.2; its intervals must ascend without overlap and lie in 0\.\.4",
        ),
        ([[(0, 5)]], r"rank 0 lists blocks 0\.\.5; its intervals must ascend without overlap and lie in 0\.\.4"),
        ([], "and 0 ranks is none: it needs"),
    ],
)
def test_unsound_layouts_are_refused(intervals: list[list[tuple[int, int]]], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Layout.of_intervals(1000, 256, intervals)


@pytest.mark.parametrize("bad", [{"elements": -1}, {"block_size": 0}, {"ranks": 0}, {"align": 0}])
def test_unsound_shares_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match="at least"):
        Layout.contiguous(**{"elements": 1000, "block_size": 256, "ranks": 2, **bad})


def test_layouts_of_two_grids_are_refused_with_the_way_out() -> None:
    old = Layout.contiguous(1000, 256, 2)
    with pytest.raises(ConfigurationError) as caught:
        plan(old, Layout.contiguous(1024, 128, 3))
    elements, block_size = caught.value.problems
    assert elements.startswith("the old layout has 1000 elements, the new one 1024;")
    assert "is lossy: reshard with the old one, or dequantize_blockwise" in block_size


def test_shards_that_do_not_fit_are_named() -> None:
    old = Layout.contiguous(1000, 256, 2)
    shards = _cut(_whole(old), old)
    shards[1]["exp_avg_absmax"] = torch.zeros(3)
    shards[1]["master"] = shards[1]["master"].double()
    with pytest.raises(ConfigurationError) as caught:
        reshard(shards, old, old)
    assert caught.value.problems == (
        "exp_avg_absmax of rank 1 is float32 [3], its layout needs float32 [2]",
        "master of rank 1 is float64 [488], its layout needs float32 [488]",
    )
    with pytest.raises(ConfigurationError, match=r"rank 1 has the keys \['m'\], rank 0 has \[\]"):
        reshard([{}, {"m": torch.zeros(1)}], old, old)
    with pytest.raises(ConfigurationError, match="1 shards for 2 ranks"):
        reshard(shards[:1], old, old)


def test_unsound_origins_are_refused() -> None:
    old = Layout.contiguous(1000, 256, 2)
    with pytest.raises(ConfigurationError, match="origin 2 is no rank of"):
        minimal(old, [0, 2])
    with pytest.raises(ConfigurationError, match="origin 1 is named twice"):
        minimal(old, [1, 1])
    with pytest.raises(ConfigurationError, match="needs at least one rank"):
        minimal(old, [])
    with pytest.raises(ConfigurationError, match="origins names 1 ranks, the new layout has 2"):
        plan(old, old, [0])
