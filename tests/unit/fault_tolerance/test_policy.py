"""Inventories in, reasoned decisions out."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.fault_tolerance.lanes import Lane, Recorded, Roster, make_lanes
from holdfast.fault_tolerance.messages import HeldVersion
from holdfast.fault_tolerance.policy import (
    DISK,
    FRESH,
    MEMORY,
    NOTHING,
    PARITY,
    View,
    decide,
    name_ranks,
    newest_common,
)


def _held(*versions: int, epoch: int = 1, world: int = 2) -> tuple[HeldVersion, ...]:
    return tuple(HeldVersion(v, epoch, world) for v in versions)


def _roster(nodes: int, lanes: tuple[Lane, ...] = (), *, number: int = 0) -> Roster:
    return Roster(number, tuple(range(nodes)), 1, lanes)


def test_the_newest_version_that_every_rank_holds_is_chosen() -> None:
    decision = decide(View(_roster(2), {0: _held(3, 4, 5), 1: _held(3, 4)}))
    assert (decision.version, decision.source, decision.exit_code) == (4, MEMORY, None)
    assert decision.writer_epoch == 1
    assert decision.rejected == ("version 5 in memory: not complete at rank 1",)


def test_parts_written_in_different_epochs_are_not_mixed() -> None:
    decision = decide(View(_roster(2), {0: _held(4) + _held(5, epoch=2), 1: _held(4, 5)}))
    assert decision.version == 4
    assert "different epochs" in decision.rejected[0]


def test_of_two_copies_of_one_version_the_one_of_the_common_epoch_counts() -> None:
    decision = decide(View(_roster(2), {0: _held(5) + _held(5, epoch=3), 1: _held(5, epoch=3)}))
    assert (decision.version, decision.writer_epoch) == (5, 3)


def test_a_version_of_another_world_is_refused_by_name() -> None:
    decision = decide(View(_roster(2), {0: _held(9, world=3), 1: _held(9, world=3)}))
    assert decision.source == FRESH
    assert decision.rejected == ("version 9 in memory: written by 3 ranks, this run has 2",)


def test_a_rank_that_nobody_has_heard_of_holds_nothing() -> None:
    assert decide(View(_roster(3), {0: _held(5, world=3), 1: _held(5, world=3)})).source == FRESH


def test_a_newer_checkpoint_beats_memory() -> None:
    decision = decide(View(_roster(2), {0: _held(0), 1: _held(0)}, durable=(100, 50)))
    assert (decision.version, decision.source) == (100, DISK)


@pytest.mark.parametrize("durable", [(4,), (3, 2)])
def test_memory_beats_a_checkpoint_that_is_not_newer(durable: tuple[int, ...]) -> None:
    decision = decide(View(_roster(2), {0: _held(4), 1: _held(4)}, durable=durable))
    assert (decision.version, decision.source) == (4, MEMORY)


def test_without_a_common_version_the_newest_checkpoint_is_loaded() -> None:
    decision = decide(View(_roster(2), {0: _held(7), 1: ()}, durable=(3, 5)))
    assert (decision.version, decision.source) == (5, DISK)
    assert decision.rejected == ("version 7 in memory: not complete at rank 1",)


def test_a_checkpoint_that_could_not_be_loaded_gives_way_to_the_next_older() -> None:
    decision = decide(View(_roster(2), {}, durable=(9, 5), refused={9: "digest of rank 1"}))
    assert decision.version == 5
    assert "checkpoint of step 9: digest of rank 1" in decision.rejected


def test_a_refused_checkpoint_is_named_when_memory_is_older() -> None:
    decision = decide(View(_roster(2), {0: _held(4), 1: _held(4)}, durable=(9,), refused={9: "torn"}))
    assert (decision.version, decision.source) == (4, MEMORY)
    assert decision.rejected == ("checkpoint of step 9: torn",)


def test_a_run_without_any_state_starts_fresh() -> None:
    decision = decide(View(_roster(2), {}))
    assert (decision.version, decision.source, decision.exit_code) == (-1, FRESH, None)


@pytest.mark.parametrize(
    "view",
    [
        View(_roster(2), {}, rejected=("step-00000100: no commit record",)),
        View(_roster(2), {}, durable=(100,), refused={100: "digest does not match"}),
        View(_roster(2), {0: _held(101)}, rejected=("step-00000100: no commit record",)),
    ],
)
def test_checkpoints_that_cannot_be_read_are_never_buried_under_a_fresh_start(view: View) -> None:
    decision = decide(view)
    assert (decision.version, decision.source, decision.exit_code) == (-1, NOTHING, 93)
    assert "100" in decision.reason
    assert "repair" in decision.reason


def test_unreadable_checkpoints_do_not_matter_while_memory_is_complete() -> None:
    decision = decide(View(_roster(2), {0: _held(4), 1: _held(4)}, rejected=("step-00000100: garbage",)))
    assert (decision.version, decision.exit_code) == (4, None)


def test_newest_common_is_none_without_ranks_or_copies() -> None:
    assert newest_common({}, 2) is None
    assert newest_common({0: _held(1)}, 2) is None
    assert newest_common({0: _held(0), 1: _held(0)}, 2) == 0


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1, 2, 7], "ranks 0-2, 7"), ([5, 4], "ranks 4-5"), ([1, 3], "ranks 1, 3")],
)
def test_ranks_are_named_in_few_words(ranks: list[int], text: str) -> None:
    assert name_ranks(ranks) == text


_COPIES = st.builds(HeldVersion, st.integers(0, 4), st.integers(1, 2), st.integers(2, 3))
_VIEWS = st.builds(
    View,
    roster=st.just(_roster(3)),
    held=st.dictionaries(st.integers(0, 2), st.lists(_COPIES, max_size=3).map(tuple)),
    durable=st.lists(st.integers(0, 6), max_size=2, unique=True).map(tuple),
    refused=st.dictionaries(st.integers(0, 6), st.just("bad"), max_size=2),
    rejected=st.lists(st.just("step-00000009: bad"), max_size=1).map(tuple),
)


def _everywhere(held: Mapping[int, tuple[HeldVersion, ...]], version: int) -> bool:
    return any(all(HeldVersion(version, epoch, 3) in held.get(r, ()) for r in range(3)) for epoch in (1, 2))


@given(_VIEWS)
def test_whatever_is_chosen_exists_everywhere_and_nothing_newer_does(view: View) -> None:
    decision = decide(view)
    in_memory = [v for v in range(5) if _everywhere(view.held, v)]
    on_disk = [step for step in view.durable if step not in view.refused]
    assert decision.version == max(in_memory + on_disk, default=-1)
    assert (decision.source == DISK) == (decision.version >= 0 and decision.version not in in_memory)
    buried = decision.version == -1 and bool(view.rejected or view.refused)
    assert decision.exit_code == (93 if buried else None)
    newer = {h.version for copies in view.held.values() for h in copies if h.version > decision.version}
    for version in newer:
        assert any(f"version {version} " in reason for reason in decision.rejected)


# -- parity -----------------------------------------------------------------------------------------------------------

_LANES = make_lanes([(0, 1, 2)], 1, 1)


def _view(*recorded: Recorded, held: Mapping[int, tuple[HeldVersion, ...]] | None = None, **rest: object) -> View:
    return View(_roster(3, _LANES), held or {}, recorded=recorded, **rest)  # type: ignore[arg-type]


def test_one_lost_rank_is_restored_from_parity() -> None:
    held = {rank: _held(4, 5, world=3) for rank in (0, 2)}
    decision = decide(_view(Recorded(5, 1, absent=(1,)), Recorded(4, 1, absent=(1,)), held=held))
    assert (decision.version, decision.source, decision.exit_code) == (5, PARITY, None)
    assert decision.recorded == Recorded(5, 1, absent=(1,))
    assert "but for rank 1" in decision.reason


def test_a_newer_version_without_a_record_is_passed_over_with_its_reason() -> None:
    held = {rank: _held(5, 6, world=3) for rank in (0, 2)}
    decision = decide(_view(Recorded(5, 1, absent=(1,)), held=held))
    assert (decision.version, decision.source) == (5, PARITY)
    assert decision.rejected == ("version 6 in memory: not complete at rank 1",)


def test_memory_is_preferred_to_parity_of_the_same_version_and_a_newer_version_to_both() -> None:
    held = {rank: _held(5, world=3) for rank in range(3)}
    assert decide(_view(Recorded(5, 1), held=held)).source == MEMORY
    assert decide(_view(Recorded(5, 1, absent=(1,)), durable=(7,))).source == DISK
    assert decide(_view(Recorded(5, 1, absent=(1,)), durable=(5,))).source == PARITY


@pytest.mark.parametrize("recorded", [Recorded(5, 1, absent=(0, 1)), Recorded(5, 1, absent=(1,), bare=(1, 2))])
def test_more_losses_than_parity_restores_go_to_the_checkpoint_with_the_reason(recorded: Recorded) -> None:
    decision = decide(_view(recorded, durable=(3,)))
    assert (decision.version, decision.source) == (3, DISK)
    assert "version 5 from parity: " in decision.rejected[0]
    assert "their parity restores 1" in decision.rejected[0]


def test_the_rank_that_lost_its_snapshot_may_lack_its_parity_too() -> None:
    assert decide(_view(Recorded(5, 1, absent=(1,), bare=(1,)))).source == PARITY


def test_a_record_that_failed_is_not_tried_again() -> None:
    view = _view(Recorded(5, 1, absent=(1,)), Recorded(4, 1, absent=(1,)), spoilt={(5, 1): "rank 1 was not rebuilt"})
    decision = decide(view)
    assert (decision.version, decision.source) == (4, PARITY)


# -- another roster ---------------------------------------------------------------------------------------------------


def _moved(*former: Recorded, **rest: object) -> View:
    """Two ranks that go on where three have been, of whose versions these are left."""
    before, now = _roster(3, _LANES), _roster(2, number=1)
    return View(now, rest.pop("held", {}), former=former, rosters={0: before, 1: now}, **rest)  # type: ignore[arg-type]


def test_what_the_ranks_before_have_left_in_memory_is_read_by_those_that_go_on() -> None:
    decision = decide(_moved(Recorded(5, 1), Recorded(4, 1), durable=(5, 3)))
    assert (decision.version, decision.source, decision.former) == (5, MEMORY, Recorded(5, 1))
    assert decision.incomplete is None
    assert "divided among 3 rank(s)" in decision.reason and "each of now 2 reads its part" in decision.reason


def test_what_one_of_them_has_lost_is_rebuilt_first() -> None:
    left = Recorded(5, 1, absent=(1,), bare=(1,))
    decision = decide(_moved(left))
    assert (decision.source, decision.former, decision.incomplete) == (PARITY, left, left)
    assert "but for rank 1" in decision.reason


def test_a_version_of_their_own_is_preferred_to_one_that_has_to_be_moved() -> None:
    own = {rank: _held(5, epoch=2) for rank in range(2)}
    assert decide(_moved(Recorded(5, 1), held=own)).former is None
    assert decide(_moved(Recorded(6, 1), held=own)).former == Recorded(6, 1)


def test_what_is_lost_for_good_or_was_found_damaged_is_passed_over_with_its_reason() -> None:
    lost = Recorded(6, 1, absent=(0, 1), bare=(0, 1))
    decision = decide(_moved(lost, Recorded(5, 1), spoilt={(5, 1): "a digest differs"}, durable=(2,)))
    assert (decision.version, decision.source, decision.former) == (2, DISK, None)
    assert "2 of ranks [0, 1, 2] are lost" in decision.rejected[0]
    assert decision.rejected[1].endswith("a digest differs")


def test_losses_in_different_groups_do_not_add_up() -> None:
    lanes = make_lanes([(0, 2), (1, 3)], 1, 1)
    found = decide(View(_roster(4, lanes), {}, recorded=(Recorded(5, 1, absent=(0, 1)),)))
    assert found.source == PARITY
    assert decide(View(_roster(4, lanes), {}, recorded=(Recorded(5, 1, absent=(0, 2)),))).source == FRESH


def test_every_rank_is_in_one_lane_and_the_ranks_of_a_lane_are_on_different_nodes() -> None:
    lanes = make_lanes([(0, 2, 4), (1, 3)], 2, 2)
    assert sorted(rank for lane in lanes for rank in lane.ranks) == list(range(10))
    for lane in lanes:
        assert len({rank // 2 for rank in lane.ranks}) == len(lane.ranks)
        assert lane.parity == min(2, len(lane.ranks) - 1)
