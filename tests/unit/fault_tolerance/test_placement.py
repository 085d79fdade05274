"""Which nodes protect each other, against every possible division of few nodes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.placement import DEFAULT_SIZE, Grouping, make_groups
from holdfast.fault_tolerance.stripes import MAX_MEMBERS, StripeLayout

_zones = st.lists(st.sampled_from(["", "a", "b", "c", "d"]), min_size=1, max_size=40)
_few = st.lists(st.sampled_from("abcd"), min_size=1, max_size=7)
_parity = st.integers(0, 4)


def _harmful(zones: Sequence[str], groups: Sequence[Sequence[int]], parity: int) -> set[str]:
    """Zones whose loss takes more than ``parity`` members of some group."""
    return {zone for zone in set(zones) - {""} for g in groups if sum(zones[node] == zone for node in g) > parity}


def _all_divisions(nodes: int, sizes: Sequence[int]) -> Iterator[list[list[int]]]:
    """Every way to divide the nodes into groups of these sizes."""
    for assigned in itertools.product(range(len(sizes)), repeat=nodes):
        groups = [[node for node in range(nodes) if assigned[node] == number] for number in range(len(sizes))]
        if sorted(map(len, groups)) == sorted(sizes):
            yield groups


def _size_for(draw: st.DataObject, parity: int) -> int:
    return draw.draw(st.one_of(st.just(0), st.integers(parity + 1, 12)))


@given(_zones, _parity, st.data())
def test_every_node_has_one_group_and_groups_are_balanced(zones: list[str], parity: int, draw: st.DataObject) -> None:
    grouping = make_groups(zones, _size_for(draw, parity), parity)
    assert sorted(itertools.chain(*grouping.groups)) == list(range(len(zones)))
    assert all(list(group) == sorted(group) for group in grouping.groups)
    sizes = [len(group) for group in grouping.groups]
    assert max(sizes) - min(sizes) <= 1


@given(_zones, _parity, st.data())
def test_every_group_can_carry_the_parity(zones: list[str], parity: int, draw: st.DataObject) -> None:
    grouping = make_groups(zones, _size_for(draw, parity), parity)
    assert grouping.parity == min(parity, len(zones) - 1)
    assert all(len(group) > grouping.parity for group in grouping.groups)


@given(_zones, _parity, st.data())
def test_no_other_number_of_groups_comes_closer_to_the_size(zones: list[str], parity: int, draw: st.DataObject) -> None:
    nodes, size = len(zones), _size_for(draw, parity)
    made = len(make_groups(zones, size, parity).groups)
    possible = [count for count in range(1, nodes + 1) if nodes // count > parity] or [1]
    if size:
        assert made == min(possible, key=lambda count: (abs(nodes / count - size), count))
    else:
        small_enough = [count for count in possible if -(-nodes // count) <= DEFAULT_SIZE]
        assert made == (small_enough[0] if small_enough else possible[-1])


@given(_few, st.integers(1, 2), st.data())
def test_a_zone_is_harmful_only_if_it_is_in_every_division(zones: list[str], parity: int, draw: st.DataObject) -> None:
    grouping = make_groups(zones, draw.draw(st.sampled_from([0, 3, 4])), parity)
    sizes = [len(group) for group in grouping.groups]
    ours = _harmful(zones, grouping.groups, grouping.parity)
    for other in _all_divisions(len(zones), sizes):
        assert ours <= _harmful(zones, other, grouping.parity)


@given(_zones, _parity, st.data())
def test_every_harmful_zone_is_named_with_what_it_destroys(zones: list[str], parity: int, draw: st.DataObject) -> None:
    grouping = make_groups(zones, _size_for(draw, parity), parity)
    harmful = _harmful(zones, grouping.groups, grouping.parity) if grouping.parity else set()
    for zone in set(zones):
        warning = [text for text in grouping.warnings if text.startswith(f"losing zone {zone!r} ")]
        assert len(warning) == (zone in harmful)
        for text in warning:
            members = [sum(zones[node] == zone for node in group) for group in grouping.groups]
            numbers = [str(number) for number, held in enumerate(members) if held > grouping.parity]
            assert f"destroys protection group(s) {', '.join(numbers)}: it has {max(members)} members" in text


@given(_zones, st.integers(1, 3), st.data())
def test_the_size_that_a_warning_advises_helps(zones: list[str], parity: int, draw: st.DataObject) -> None:
    for text in make_groups(zones, _size_for(draw, parity), parity).warnings:
        before, found, _ = text.partition(" would survive it")
        if found:
            size = int(before.rpartition(" ")[2])
            assert not _harmful(zones, make_groups(zones, size, parity).groups, parity)
        elif text.startswith("losing"):
            every = range(parity + 1, len(zones) + 1)
            assert all(
                _harmful(zones, make_groups(zones, s, parity).groups, min(parity, len(zones) - 1)) for s in every
            )


@given(_zones, _parity)
def test_the_same_nodes_are_divided_the_same_way(zones: list[str], parity: int) -> None:
    assert make_groups(zones, 0, parity) == make_groups(tuple(zones), 0, parity)


@pytest.mark.parametrize(
    ("zones", "size", "parity", "groups"),
    [
        ("a", 0, 0, ((0,),)),
        ("ab", 0, 1, ((0, 1),)),
        ("aaaabbbb", 2, 1, ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("abababab", 4, 2, ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("aabbccdd", 4, 1, ((0, 2, 4, 6), (1, 3, 5, 7))),
    ],
)
def test_zones_that_can_be_survived_are_divided_without_a_warning(
    zones: str, size: int, parity: int, groups: tuple[tuple[int, ...], ...]
) -> None:
    assert make_groups(tuple(zones), size, parity) == Grouping(groups, parity, ())


def test_nodes_without_zones_are_divided_without_a_warning() -> None:
    assert make_groups([""] * 16, 0, 1) == Grouping((tuple(range(0, 16, 2)), tuple(range(1, 16, 2))), 1, ())


@pytest.mark.parametrize(
    ("zones", "size", "parity", "warnings"),
    [
        ([""], 8, 1, ["a single node has no other to hold its parity"]),
        (["", ""], 0, 2, ["parity=1 is used instead of 2; for that, give the run 3 nodes"]),
        ([""] * 10, 4, 1, ["10 nodes do not divide into groups of 4; there will be 1 of 4 and 2 of 3"]),
        ([""] * 3, 8, 1, ["3 nodes do not divide into groups of 8; there will be 1 of 3"]),
        (["a", "", "b", ""], 0, 1, ["node(s) 1, 3 have no zone"]),
        (["a", "a", "b"], 0, 1, ["spread the nodes over more zones or raise the parity"]),
        (["a", "a", "b", "b"], 0, 1, ["groups of 2 would survive it", "groups of 2 would survive it"]),
        (["a", "a"], 2, 0, []),
    ],
)
def test_what_cannot_be_protected_is_said(zones: list[str], size: int, parity: int, warnings: list[str]) -> None:
    made = make_groups(zones, size, parity).warnings
    assert len(made) == len(warnings)
    assert all(want in have for want, have in zip(warnings, made, strict=True))


@pytest.mark.parametrize(
    ("zones", "size", "parity", "problems"),
    [
        ([], 0, 0, ["no nodes"]),
        (["a"], 2, 2, ["group size=2 must be more than parity=2"]),
        (["a"], 129, 128, ["parity=128 must be from 0 to 127", "group size=129 must be from 1 to 128"]),
        ([], -1, -1, ["no nodes", "parity=-1", "group size=-1"]),
    ],
)
def test_impossible_wishes_are_refused_with_every_reason(
    zones: list[str], size: int, parity: int, problems: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as error:
        make_groups(zones, size, parity)
    assert len(error.value.problems) == len(problems)
    assert all(want in have for want, have in zip(problems, error.value.problems, strict=True))


@pytest.mark.parametrize("parity", [0, 1, 64, 126, 127])
@pytest.mark.parametrize("size", [0, 120, 128])
@pytest.mark.parametrize("nodes", [129, 170, 171, 255, 256, 300, 511, 1000])
def test_every_group_has_a_code(nodes: int, size: int, parity: int) -> None:
    if 0 < size <= parity:
        return
    for group in make_groups([""] * nodes, size, parity).groups:
        assert len(group) <= MAX_MEMBERS
        StripeLayout([1] * len(group), parity)
