"""Where the blocks of a protection group lie, and what is read to restore it."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ConfigurationError, InsufficientShards, InvariantViolation
from holdfast.fault_tolerance.stripes import ParityBlock, StripeLayout, StripeRepair

_lengths = st.lists(st.one_of(st.integers(0, 1), st.integers(0, 1000), st.just(10**6)), min_size=1, max_size=9)
layouts = _lengths.flatmap(lambda ls: st.builds(StripeLayout, st.just(ls), st.integers(0, len(ls) - 1)))


@given(layouts)
def test_stripes_are_rotated_evenly(layout: StripeLayout) -> None:
    n, m = layout.members, layout.parity
    with_parity, with_data = Counter[int](), Counter[int]()
    for stripe in range(n):
        holders, contributors = layout.parity_members(stripe), layout.data_members(stripe)
        assert holders == tuple((stripe + index) % n for index in range(m))
        assert sorted(holders + contributors) == list(range(n))
        with_parity.update(holders)
        with_data.update(contributors)
    assert with_parity == Counter(list(range(n)) * m)
    assert with_data == Counter(list(range(n)) * (n - m))


@given(layouts)
def test_shares_and_members_of_a_stripe_name_each_other(layout: StripeLayout) -> None:
    for stripe in range(layout.members):
        by_share = layout.data_members(stripe) + layout.parity_members(stripe)
        for share, member in enumerate(by_share):
            assert layout.member_of(stripe, share) == member and layout.share_of(stripe, member) == share


@given(layouts)
def test_every_byte_of_a_member_lies_in_one_block_of_one_stripe(layout: StripeLayout) -> None:
    found: dict[int, list[range]] = {member: [] for member in range(layout.members)}
    for stripe, share in itertools.product(range(layout.members), range(layout.data)):
        block = layout.byte_range(stripe, share)
        assert len(block) <= layout.block_bytes
        found[layout.member_of(stripe, share)].append(block)
    for member, blocks in found.items():
        assert len(blocks) == layout.data
        assert _joined(blocks) == range(layout.lengths[member])
        short = [block for block in blocks if len(block) < layout.block_bytes]
        assert all(block.stop == layout.lengths[member] for block in short)


@given(layouts)
def test_every_byte_of_a_parity_buffer_belongs_to_one_block(layout: StripeLayout) -> None:
    for member in range(layout.members):
        blocks = layout.parity_blocks(member)
        shares = [(block.stripe, layout.data + block.index) for block in blocks]
        assert all(
            layout.member_of(*share) == member == block.member for share, block in zip(shares, blocks, strict=True)
        )
        ranges = [layout.byte_range(*share) for share in shares]
        assert ranges == [range(p * layout.block_bytes, (p + 1) * layout.block_bytes) for p in range(layout.parity)]
        assert _joined(ranges) == range(layout.parity_bytes)


@given(layouts, st.integers(1, 2000))
def test_chunks_cut_a_share_into_what_it_is(layout: StripeLayout, chunk_bytes: int) -> None:
    chunks = list(itertools.islice(layout.chunks(chunk_bytes), 3000))
    if layout.block_bytes <= 3000 * chunk_bytes:
        assert _joined(chunks) == range(layout.block_bytes)
    assert all(len(chunk) == chunk_bytes for chunk in chunks[:-1])
    for stripe, share in itertools.product(range(layout.members), repeat=2):
        whole = layout.byte_range(stripe, share)
        for chunk in chunks[:5] + chunks[-5:]:
            part = layout.byte_range(stripe, share, chunk)
            assert list(part) == list(whole[chunk.start : chunk.stop])


@pytest.mark.parametrize(
    ("lengths", "parity", "block_bytes"),
    [
        ([0], 0, 0),
        ([1], 0, 64),
        ([65], 0, 128),
        ([0, 0, 0], 1, 0),
        ([128, 0, 1], 1, 64),
        ([129, 0, 1], 1, 128),
        ([1000, 1000], 1, 1024),
        ([10**12] * 8, 2, 166_666_666_688),
    ],
)
def test_a_block_is_the_longest_members_share_in_whole_cache_lines(
    lengths: list[int], parity: int, block_bytes: int
) -> None:
    assert StripeLayout(lengths, parity).block_bytes == block_bytes


def test_two_members_mirror_each_other() -> None:
    layout = StripeLayout([100, 70], 1)
    assert layout.parity_bytes == layout.block_bytes == 128
    for stripe in (0, 1):
        other = 1 - stripe
        assert layout.parity_blocks(stripe) == (ParityBlock(stripe, 0, stripe),)
        assert layout.data_members(stripe) == (other,)
        assert layout.byte_range(stripe, 0) == range(layout.lengths[other])


def test_a_repair_reads_data_first_and_makes_the_lost_parity_anew() -> None:
    layout = StripeLayout([1000, 1000, 1000, 100], 2)  # k = 2, b = 512: member 3 has nothing in its block 1
    plan = layout.repair([3, 0])
    assert plan.lost == (0, 3)
    # Of stripe 0 only that empty block and parity are lost, of stripe 3 only parity.
    assert plan.stripes == (StripeRepair(1, (2, 3), (0, 1)), StripeRepair(2, (1, 2), (0,)))
    assert plan.parity == (ParityBlock(0, 0, 0), ParityBlock(3, 1, 0), ParityBlock(3, 0, 3), ParityBlock(2, 1, 3))


@given(layouts, st.data())
def test_a_repair_reads_enough_from_the_living_and_misses_nothing(layout: StripeLayout, draw: st.DataObject) -> None:
    lost = draw.draw(st.permutations(range(layout.members)))[: draw.draw(st.integers(0, layout.parity))]
    plan = layout.repair(lost)
    restored: dict[int, list[range]] = {member: [] for member in lost}
    for part in plan.stripes:
        readers = [layout.member_of(part.stripe, share) for share in part.sources]
        assert len(set(readers)) == layout.data and not set(readers) & set(lost)
        alive = [s for s in range(layout.data) if layout.member_of(part.stripe, s) not in lost]
        assert list(part.sources[: len(alive)]) == alive and list(part.sources) == sorted(part.sources)
        for share in part.missing:
            restored[layout.member_of(part.stripe, share)].append(layout.byte_range(part.stripe, share))
    for member, blocks in restored.items():
        assert _joined(blocks) == range(layout.lengths[member]) and all(blocks)
    assert plan.parity == tuple(block for member in sorted(lost) for block in layout.parity_blocks(member))


@given(layouts, st.data())
def test_one_loss_too_many_is_refused_by_name(layout: StripeLayout, draw: st.DataObject) -> None:
    lost = draw.draw(st.permutations(range(layout.members)))[: layout.parity + 1]
    with pytest.raises(InsufficientShards, match=f"its parity restores {layout.parity}") as error:
        layout.repair(lost)
    assert error.value.missing == tuple(sorted(lost))


def test_a_member_lost_twice_is_lost_once() -> None:
    assert StripeLayout([10, 10, 10], 1).repair([2, 2]) == StripeLayout([10, 10, 10], 1).repair({2})


@pytest.mark.parametrize(
    ("lengths", "parity", "problems"),
    [
        ([], 0, ["0 members"]),
        ([1] * 257, 1, ["257 members"]),
        ([1, 2], 2, ["parity=2 must be from 0 to 1"]),
        ([1], 1, ["parity=1 must be from 0 to 0"]),
        ([1, 2], -1, ["parity=-1"]),
        ([-1, 2, -3], 3, ["parity=3", "lengths of members [0, 2]"]),
    ],
)
def test_impossible_groups_are_refused_with_every_reason(lengths: list[int], parity: int, problems: list[str]) -> None:
    with pytest.raises(ConfigurationError) as error:
        StripeLayout(lengths, parity)
    assert len(error.value.problems) == len(problems)
    assert all(want in have for want, have in zip(problems, error.value.problems, strict=True))


@pytest.mark.parametrize("wrong", [-1, 3])
def test_what_does_not_exist_in_the_layout_is_refused(wrong: int) -> None:
    layout = StripeLayout([1, 2, 3], 1)
    for call in (
        lambda: layout.member_of(wrong, 0),
        lambda: layout.member_of(0, wrong),
        lambda: layout.share_of(0, wrong),
        lambda: layout.byte_range(0, wrong),
        lambda: layout.parity_blocks(wrong),
        lambda: layout.repair([wrong]),
    ):
        with pytest.raises(InvariantViolation, match=f"{wrong} does not exist"):
            call()


def test_chunks_of_no_bytes_are_refused() -> None:
    with pytest.raises(InvariantViolation, match="chunk_bytes=0"):
        list(StripeLayout([1, 2], 1).chunks(0))


def _joined(ranges: list[range]) -> range:
    """What ranges cover that follow one another without gap or overlap, in any order."""
    end = 0
    for part in sorted((part for part in ranges if part), key=lambda part: part.start):
        assert part.start == end and part.step == 1
        end = part.stop
    return range(end)
