"""Where the wall time of a run went: known answers, and what must hold of any files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from holdfast import events as e
from holdfast.launch.goodput import Driven, Fault, Part, Start, Step, counts, driven, goodput
from holdfast.launch.run_view import RunReader
from tests.support.told import Told, story


def _split(told: Told) -> dict[str, float]:
    split = goodput(driven(RunReader(told.dir).view()))
    return {part.value: pytest.approx(seconds) for part, seconds in split.seconds.items()}


def test_a_run_with_a_fault_is_split_into_what_each_second_was_for(tmp_path: Path) -> None:
    assert _split(story(tmp_path)) == {
        "useful": 9 * 0.9,
        "stall": 10 * 0.1,
        "lost": 0.9 + 1.0,  # the step that was made again, and the one that was under way
        "detect": 0.5,
        "restore": 2.5,
        "startup": 10.0,
        "between": 2.0,
        "closing": 4.0,
    }


def test_an_attempt_that_goes_back_takes_steps_of_the_one_before_with_it(tmp_path: Path) -> None:
    told = Told(tmp_path).attempt().event(e.RunStarted("r1", 1, 3, "fresh")).event(e.EpochStarted(1, 3, -1), 1001.0)
    for step in range(1, 5):
        told.step(step, 1001.0 + step, stall_s=0.0)
    told.at = 2000.0  # killed; a while later
    told.attempt().event(e.RunStarted("r1", 2, 3, "auto")).event(e.EpochStarted(1, 3, 2), 2004.0)
    told.step(3, 2006.0, stall_s=0.0).end(2007.0, "stopped", 75, step=3)
    view = RunReader(told.dir).view()
    split = goodput(driven(view))
    assert (split.seconds[Part.USEFUL], split.seconds[Part.LOST]) == (3.0, 2.0)
    assert split.wall_s == pytest.approx(5.0 + 7.0)
    assert split.idle_s == pytest.approx(995.0)
    assert counts(driven(view)) == [[True, True, False, False], [True]]


def test_what_a_stop_has_not_saved_is_lost(tmp_path: Path) -> None:
    told = Told(tmp_path).attempt().event(e.RunStarted("r1", 1, 3, "fresh")).event(e.EpochStarted(1, 3, -1), 1001.0)
    for step in range(1, 5):
        told.step(step, 1001.0 + step, stall_s=0.0)
    told.end(1006.0, "stopped", 75, step=3)
    assert counts(driven(RunReader(told.dir).view())) == [[True, True, True, False]]


def test_a_version_that_is_restored_takes_steps_back_before_any_is_made_again() -> None:
    steps = [Step(float(n), 1, n, 1.0) for n in (1, 2, 3)]
    assert counts([Driven(0.0, 9.0, steps, starts=[Start(1, -1), Start(2, 1)])]) == [[True, False, False]]
    assert counts([Driven(0.0, 9.0, steps, starts=[Start(2, -1)])]) == [[False, False, False]]


def test_reports_that_come_late_take_nothing_from_the_time_before_a_fault_was_noticed() -> None:
    """Four steps of 1 s, all told of at once, 0.4 s after the rank had died."""
    steps = [Step(14.4, 1, n, 1.0) for n in range(1, 5)]
    split = goodput([Driven(0.0, 20.0, [Step(11.0, 1, 0, 1.0), *steps], [Fault(15.5, 1.5)])])
    assert split.seconds[Part.DETECT] == pytest.approx(1.1)  # five seconds of steps leave no more
    split = goodput([Driven(0.0, 20.0, [Step(10.0, 1, 0, 0.1), *steps], [Fault(15.5, 1.5)])])
    assert split.seconds[Part.DETECT] == pytest.approx(1.5)
    assert split.wall_s == pytest.approx(20.0)


def test_a_run_that_never_made_a_step_was_starting_all_the_time() -> None:
    split = goodput([Driven(5.0, 8.0, faults=[Fault(6.0, 1.0)])])
    assert split.seconds[Part.STARTUP] == 3.0 and split.ratio == 0.0
    assert goodput([]).wall_s == 0.0


def test_a_fault_that_ends_a_run_is_told_from_an_orderly_end() -> None:
    steps = [Step(2.0, 1, 1, 1.0)]
    failed = goodput([Driven(0.0, 9.0, steps, [Fault(4.0, 1.0)])]).seconds
    assert (failed[Part.LOST], failed[Part.DETECT], failed[Part.RESTORE], failed[Part.CLOSING]) == (1.0, 1.0, 5.0, 0.0)
    going_on = goodput([Driven(0.0, 9.0, steps, has_ended=False)]).seconds
    assert (going_on[Part.BETWEEN], going_on[Part.CLOSING]) == (7.0, 0.0)


def test_numbers_that_are_none_cost_nothing() -> None:
    steps = [Step(2.0, 1, 1, math.nan, math.nan), Step(3.0, 1, 2, -1.0, 5.0), Step(4.0, 1, 3, math.inf)]
    split = goodput([Driven(0.0, 5.0, steps, [Fault(4.5, math.nan)])])
    assert split.wall_s == pytest.approx(5.0) and split.seconds[Part.USEFUL] == 0.0
