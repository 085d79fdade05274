"""Who is named as late, and when nobody is."""

from __future__ import annotations

import pytest

from holdfast.events import RankLate
from holdfast.fault_tolerance.laggards import Laggards
from holdfast.fault_tolerance.messages import BeatSeen
from holdfast.types import Phase


def _beat(rank: int, phase: Phase, step: int, progress_s: float, now: float) -> BeatSeen:
    return BeatSeen(rank, 1, phase, step, now, progress_s)


def _train(laggards: Laggards, steps: int, step_s: float) -> float:
    """Two ranks for so many steps; when the last one ended."""
    for step in range(steps):
        now = step * step_s
        assert laggards.look([_beat(r, Phase.FORWARD_BACKWARD, step, now, now) for r in (0, 1)], now) is None
    return (steps - 1) * step_s


def _looks(laggards: Laggards, phases: tuple[Phase, Phase], since: float, until_s: int) -> list[RankLate]:
    """Every second from ``since`` on, at step 9."""
    found = []
    for second in range(until_s):
        now = since + second
        beats = [_beat(rank, phase, 9, since, now) for rank, phase in enumerate(phases)]
        found.append(laggards.look(beats, now))
    return [late for late in found if late is not None]


def test_the_rank_that_others_wait_for_is_named_once() -> None:
    laggards = Laggards(10.0)
    began = _train(laggards, 9, 1.0)
    (late,) = _looks(laggards, (Phase.VOTE, Phase.FORWARD_BACKWARD), began + 1, 60)
    assert (late.rank, late.phase, late.step) == (1, "forward_backward", 9)
    assert 10.0 < late.seconds <= 11.0


def test_steps_that_have_always_been_long_are_not_late() -> None:
    laggards = Laggards(10.0)
    began = _train(laggards, 9, 20.0)
    assert not _looks(laggards, (Phase.VOTE, Phase.FORWARD_BACKWARD), began + 20, 60)
    (late,) = _looks(laggards, (Phase.VOTE, Phase.FORWARD_BACKWARD), began + 20, 62)
    assert late.seconds > 60.0


@pytest.mark.parametrize("phase", [Phase.BUILD, Phase.RESTORE, Phase.EVALUATE, Phase.EXPORT])
def test_what_is_no_step_may_take_its_time(phase: Phase) -> None:
    laggards = Laggards(10.0)
    began = _train(laggards, 9, 1.0)
    assert not _looks(laggards, (phase, phase), began + 1, 300)


def test_nobody_is_late_in_the_first_step() -> None:
    assert not _looks(Laggards(10.0), (Phase.VOTE, Phase.FORWARD_BACKWARD), 0.0, 300)
