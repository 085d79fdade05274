"""Pipelines with lost stages in, reasoned plans out."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance.stage_policy import (
    EndPairs,
    GapRepair,
    RateMode,
    Refusal,
    Repair,
    RepairPlan,
    StageRepair,
    plan_repair,
    rate_factor,
)

_SIX = (4,) * 6


def _only(plan: RepairPlan) -> StageRepair:
    (repair,) = plan.repairs
    assert plan.is_complete
    return repair


def _refusal(plan: RepairPlan) -> Refusal:
    (refusal,) = plan.refusals
    assert not plan.is_complete and not plan.repairs
    return refusal


def _table(wish: Repair, stages: int, end_pairs: EndPairs = EndPairs.PAPER) -> dict[int, tuple[str, tuple[int, ...]]]:
    """What is done when each stage is lost alone, refusals left out; stages as the paper counts them."""
    plans = {lost: plan_repair((2,) * stages, {lost}, wish=wish, end_pairs=end_pairs) for lost in range(stages)}
    done = {lost + 1: plan.repairs[0] for lost, plan in plans.items() if plan.is_complete}
    return {lost: (each.repair.name, tuple(s + 1 for s in each.sources)) for lost, each in done.items()}


def test_checkfree_averages_both_neighbours_and_leaves_the_ends_alone() -> None:
    """arXiv 2506.15461, section 4.2."""
    assert _table(Repair.CHECKFREE, 6) == {i: ("CHECKFREE", (i - 1, i + 1)) for i in (2, 3, 4, 5)}


def test_the_paper_copies_the_ends_only() -> None:
    """Section 4.3: S1 is a copy of S2, Ss of S(s-1)."""
    assert _table(Repair.CHECKFREE_PLUS, 6) == {
        1: ("COPY_NEXT", (2,)),
        2: ("CHECKFREE", (1, 3)),
        3: ("CHECKFREE", (2, 4)),
        4: ("CHECKFREE", (3, 5)),
        5: ("CHECKFREE", (4, 6)),
        6: ("COPY_PREVIOUS", (5,)),
    }


def test_the_released_code_copies_both_stages_of_both_end_pairs() -> None:
    assert _table(Repair.CHECKFREE_PLUS, 6, EndPairs.CODE) == {
        1: ("COPY_NEXT", (2,)),
        2: ("COPY_PREVIOUS", (1,)),
        3: ("CHECKFREE", (2, 4)),
        4: ("CHECKFREE", (3, 5)),
        5: ("COPY_NEXT", (6,)),
        6: ("COPY_PREVIOUS", (5,)),
    }


def test_of_four_stages_the_released_code_never_averages_any() -> None:
    repairs = {repair for repair, _ in _table(Repair.CHECKFREE_PLUS, 4, EndPairs.CODE).values()}
    assert repairs == {"COPY_NEXT", "COPY_PREVIOUS"}


def test_plain_copies_reach_every_stage_but_one() -> None:
    assert _table(Repair.COPY_PREVIOUS, 4) == {i: ("COPY_PREVIOUS", (i - 1,)) for i in (2, 3, 4)}
    assert _table(Repair.COPY_NEXT, 4) == {i: ("COPY_NEXT", (i + 1,)) for i in (1, 2, 3)}
    assert _table(Repair.UNIFORM, 4) == {i: ("UNIFORM", (i - 1, i + 1)) for i in (2, 3)}


def test_a_live_replica_is_copied_whatever_was_wished() -> None:
    for wish in Repair:
        repair = _only(plan_repair(_SIX, {0}, wish=wish, replicated={0, 3}))
        assert (repair.repair, repair.sources, repair.is_approximate) == (Repair.EXACT, (0,), False)


def test_a_lost_stage_with_a_live_replica_is_a_source_for_its_neighbour() -> None:
    plan = plan_repair(_SIX, {2, 3}, wish=Repair.CHECKFREE, replicated={3})
    assert [(each.stage, each.repair, each.sources) for each in plan.repairs] == [
        (2, Repair.CHECKFREE, (1, 3)),
        (3, Repair.EXACT, (3,)),
    ]
    assert plan.is_complete and plan.is_approximate


def test_nothing_is_approximate_where_replicas_live() -> None:
    assert not plan_repair(_SIX, {2, 3}, wish=Repair.CHECKFREE, replicated={2, 3}).is_approximate


def test_adjacent_stages_lost_together_cannot_be_averaged() -> None:
    plan = plan_repair(_SIX, {2, 3}, wish=Repair.CHECKFREE)
    assert [each.reason for each in plan.refusals] == [
        "CHECKFREE of stage 2: stage 3, which it would be rebuilt from, is lost with it",
        "CHECKFREE of stage 3: stage 2, which it would be rebuilt from, is lost with it",
    ]


@pytest.mark.parametrize(
    ("wish", "gaps", "lost", "done"),
    [
        (Repair.CHECKFREE, GapRepair.INTERPOLATED, {2, 3}, [("CHECKFREE", (1, 4)), ("CHECKFREE", (1, 4))]),
        (Repair.UNIFORM, GapRepair.INTERPOLATED, {1, 2, 3}, [("UNIFORM", (0, 4))] * 3),
        (Repair.UNIFORM, GapRepair.INTERPOLATED, {1, 3, 4}, [("UNIFORM", (0, 2)), *[("UNIFORM", (2, 5))] * 2]),
        (Repair.COPY_PREVIOUS, GapRepair.INTERPOLATED, {2, 3}, [("COPY_PREVIOUS", (1,))] * 2),
        (Repair.CHECKFREE_PLUS, GapRepair.INTERPOLATED, {0, 1}, [("COPY_NEXT", (2,)), None]),
        (Repair.CHECKFREE, GapRepair.COPIED, {2, 3}, [("COPY_PREVIOUS", (1,)), ("COPY_NEXT", (4,))]),
        (Repair.CHECKFREE, GapRepair.COPIED, {1, 2, 3}, [("COPY_PREVIOUS", (0,))] * 2 + [("COPY_NEXT", (4,))]),
        (Repair.COPY_PREVIOUS, GapRepair.COPIED, {0, 1}, [None, ("COPY_NEXT", (2,))]),
        (Repair.UNIFORM, GapRepair.COPIED, set(range(6)), [None] * 6),
        (Repair.IDENTITY, GapRepair.INTERPOLATED, {2, 3}, [("IDENTITY", (1,)), ("IDENTITY", (4,))]),
    ],
)
def test_a_gap_is_rebuilt_from_what_is_left_around_it(
    wish: Repair, gaps: GapRepair, lost: set[int], done: list[tuple[str, tuple[int, ...]] | None]
) -> None:
    plan = plan_repair(_SIX, lost, wish=wish, gaps=gaps)
    found = {each.stage: (each.repair.name, each.sources) for each in plan.repairs}
    assert [found.get(stage) for stage in sorted(lost)] == done
    assert {each.stage for each in plan.refusals} == lost - set(found)


def test_layers_across_a_gap_must_match_and_a_lone_loss_is_no_gap() -> None:
    assert _refusal(plan_repair((2, 1, 1, 1), {1}, wish=Repair.UNIFORM, gaps=GapRepair.INTERPOLATED)).stage == 1
    plan = plan_repair((2, 1, 1, 1), {1, 2}, wish=Repair.UNIFORM, gaps=GapRepair.INTERPOLATED)
    assert [each.reason for each in plan.refusals] == [
        f"UNIFORM of stage {stage}: it has 1 layers and stage 0 has 2; they must be equal" for stage in (1, 2)
    ]
    for wish in Repair:
        alone = {gaps: plan_repair(_SIX, {2, 4}, wish=wish, gaps=gaps) for gaps in GapRepair}
        assert len({(plan.repairs, plan.refusals) for plan in alone.values()}) == 1


def test_stages_lost_apart_are_averaged_together() -> None:
    plan = plan_repair(_SIX, {1, 3}, wish=Repair.CHECKFREE)
    assert [each.sources for each in plan.repairs] == [(0, 2), (2, 4)]


def test_a_rebuilt_stage_is_no_source() -> None:
    """Stage 3 could be copied from 2 once that is a copy of 1; it would be a copy of 1 in truth."""
    plan = plan_repair(_SIX, {2, 3}, wish=Repair.COPY_PREVIOUS)
    assert [each.stage for each in plan.repairs] == [2]
    assert [each.stage for each in plan.refusals] == [3]


@pytest.mark.parametrize(
    ("layers", "lost", "wish", "words"),
    [
        (_SIX, 0, Repair.CHECKFREE, "no stage before it"),
        (_SIX, 5, Repair.CHECKFREE, "no stage behind it"),
        (_SIX, 0, Repair.COPY_PREVIOUS, "no stage before it"),
        (_SIX, 5, Repair.COPY_NEXT, "no stage behind it"),
        ((2, 2, 2), 1, Repair.CHECKFREE_PLUS, "3 stages are too few, 4 are needed"),
        ((4, 4, 4, 3), 2, Repair.CHECKFREE, "it has 4 layers and stage 3 has 3"),
        ((4, 4, 4, 3), 3, Repair.CHECKFREE_PLUS, "it has 3 layers and stage 2 has 4"),
        (_SIX, 2, Repair.EXACT, "no data-parallel replica of stage 2"),
        ((4,), 0, Repair.UNIFORM, "no stage before it"),
    ],
)
def test_a_refusal_says_why(layers: tuple[int, ...], lost: int, wish: Repair, words: str) -> None:
    refusal = _refusal(plan_repair(layers, {lost}, wish=wish))
    assert refusal.stage == lost and words in refusal.reason


def test_fresh_weights_need_nobody() -> None:
    plan = plan_repair((1, 2, 3), {0, 1, 2}, wish=Repair.RANDOM)
    assert plan.is_complete and {each.sources for each in plan.repairs} == {()}


def test_an_identity_takes_its_inside_from_a_neighbour_where_one_fits() -> None:
    layers, lost = (4, 4, 4, 3, 3), {0, 2, 3}
    plan = plan_repair(layers, lost, wish=Repair.IDENTITY)
    assert {each.stage: each.sources for each in plan.repairs} == {0: (1,), 2: (1,), 3: (4,)}
    assert _only(plan_repair((4, 3), {0}, wish=Repair.IDENTITY)).sources == ()


def test_what_does_not_exist_is_reported_together() -> None:
    with pytest.raises(ConfigurationError) as raised:
        plan_repair((2, 0), {5}, wish=Repair.RANDOM, replicated={-1})
    assert [problem.split(";")[0] for problem in raised.value.problems] == [
        "stage 1 has 0 layers",
        "stage -1 does not exist",
        "stage 5 does not exist",
    ]


@given(
    st.lists(st.integers(1, 2), min_size=1, max_size=8),
    st.sets(st.integers(0, 7)),
    st.sets(st.integers(0, 7)),
    st.sampled_from(Repair),
    st.sampled_from(EndPairs),
    st.sampled_from(GapRepair),
)
def test_no_plan_reads_a_stage_that_is_gone(
    layers: list[int], lost: set[int], replicated: set[int], wish: Repair, end_pairs: EndPairs, gaps: GapRepair
) -> None:
    lost, replicated = ({s for s in given_ if s < len(layers)} for given_ in (lost, replicated))
    plan = plan_repair(layers, lost, wish=wish, replicated=replicated, end_pairs=end_pairs, gaps=gaps)
    assert sorted(each.stage for each in (*plan.repairs, *plan.refusals)) == sorted(lost)
    for each in plan.repairs:
        assert not set(each.sources) & (lost - replicated)
        assert each.repair is not Repair.CHECKFREE_PLUS
        assert each.is_approximate == (each.stage not in replicated) == (each.repair is not Repair.EXACT)
        assert all(layers[source] == layers[each.stage] for source in each.sources)
    assert not {each.stage for each in plan.refusals} & replicated


def test_a_stage_never_recovered_keeps_its_rate() -> None:
    assert {rate_factor(1.2, mode, 0, decay_steps=10) for mode in RateMode} == {1.0}


def test_the_released_codes_factor_never_compounds_and_the_papers_does() -> None:
    assert [rate_factor(1.1, RateMode.ONCE, n) for n in (1, 2, 9)] == [1.1, 1.1, 1.1]
    compounded = [rate_factor(1.1, RateMode.COMPOUNDING, n) for n in (1, 2, 3)]
    assert compounded == pytest.approx([1.1, 1.21, 1.331], rel=1e-12)


def test_a_decaying_factor_falls_to_one_and_stays() -> None:
    factors = [rate_factor(1.2, RateMode.DECAYING, 3, steps_since=n, decay_steps=100) for n in (0, 25, 50, 100, 999)]
    assert factors == pytest.approx([1.2, 1.15, 1.1, 1.0, 1.0], rel=1e-12)


@pytest.mark.parametrize(
    ("base", "mode", "recoveries", "steps"),
    [
        (0.0, RateMode.ONCE, 1, 0),
        (float("nan"), RateMode.ONCE, 1, 0),
        (1.1, RateMode.ONCE, -1, 0),
        (1.1, RateMode.DECAYING, 1, -1),
        (1.1, RateMode.DECAYING, 1, 0),
        (1.1, RateMode.COMPOUNDING, 100_000, 0),
    ],
)
def test_a_rate_nobody_can_train_with_is_refused(base: float, mode: RateMode, recoveries: int, steps: int) -> None:
    with pytest.raises(ConfigurationError):
        rate_factor(base, mode, recoveries, steps_since=steps)


def test_planning_does_not_load_torch() -> None:
    """The driver and the keepers plan; they have no torch."""
    code = "import sys, holdfast.fault_tolerance.stage_policy; print('torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert answer.stdout.strip() == "False"
