"""The parts of the wall time: whatever files tell, none is negative and together they are the time there was."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.launch.goodput import Driven, Fault, Part, Start, Step, counts, goodput

_TIMES = st.floats(-10.0, 200.0)
_SECONDS = st.one_of(st.floats(-1.0, 50.0), st.sampled_from([math.nan, math.inf]))
_STEPS = st.builds(Step, _TIMES, st.integers(1, 4), st.integers(1, 20), _SECONDS, _SECONDS)
_STARTS = st.builds(Start, st.integers(1, 4), st.integers(-1, 20))


@st.composite
def _attempts(draw: st.DrawFn) -> list[Driven]:
    """One after the other; inside, anything."""
    moments = sorted(draw(st.lists(st.floats(0.0, 190.0), min_size=2, max_size=6)))
    return [
        Driven(
            began,
            ended,
            draw(st.lists(_STEPS, max_size=12)),
            draw(st.lists(st.builds(Fault, _TIMES, _SECONDS), max_size=4)),
            draw(st.lists(_STARTS, max_size=4)),
            draw(st.booleans()),
        )
        for began, ended in zip(moments[::2], moments[1::2], strict=False)
    ]


@given(_attempts())
def test_the_parts_are_not_negative_and_sum_to_the_wall_time(attempts: list[Driven]) -> None:
    split = goodput(attempts)
    assert set(split.seconds) == set(Part)
    assert all(seconds >= 0.0 for seconds in split.seconds.values())
    assert split.wall_s == pytest.approx(sum(one.ended_s - one.began_s for one in attempts), abs=1e-6)
    assert 0.0 <= split.ratio <= 1.0 + 1e-9


def _counted_slowly(attempts: list[Driven]) -> list[list[bool]]:
    """By definition: nothing later starts from an earlier version or makes the same step, or an earlier one, again."""
    moments = []
    for number, attempt in enumerate(attempts):
        moments += [(number, one.epoch, -1, one.version + 1) for one in attempt.starts]
        moments += [(number, one.epoch, index, one.step) for index, one in enumerate(attempt.steps)]
    return [
        [
            all(step > one.step for *when, step in moments if tuple(when) > (number, one.epoch, index))
            for index, one in enumerate(attempt.steps)
        ]
        for number, attempt in enumerate(attempts)
    ]


@given(_attempts())
def test_a_step_counts_unless_something_later_takes_it_back(attempts: list[Driven]) -> None:
    assert counts(attempts) == _counted_slowly(attempts)
