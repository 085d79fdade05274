"""Signs of life in, suspects out."""

from __future__ import annotations

import random

from holdfast.fault_tolerance.detector import Limits, suspects
from holdfast.fault_tolerance.messages import BeatSeen
from holdfast.types import Phase

_LIMITS = Limits(suspect_after_s=10.0, step_timeout_s=600.0)
_NOW = 1000.0


def _beat(
    rank: int, *, phase: Phase = Phase.VOTE, step: int = 7, silent_s: float = 0.1, stuck_s: float = 0.1
) -> BeatSeen:
    return BeatSeen(rank, 1, phase, step, _NOW - silent_s, _NOW - stuck_s)


def test_ranks_that_beat_and_move_are_not_suspected() -> None:
    assert suspects([_beat(0), _beat(1)], _NOW, _LIMITS) == []
    assert suspects([], _NOW, _LIMITS) == []


def test_a_rank_without_a_heartbeat_is_frozen_and_named_with_its_phase_and_step() -> None:
    (found,) = suspects([_beat(0), _beat(1, phase=Phase.UPDATE, step=41, silent_s=10.5)], _NOW, _LIMITS)
    assert found.rank == 1
    assert found.detected_after_s == 10.5
    assert "no heartbeat for 10.5 s" in found.cause
    assert "update" in found.cause
    assert "41" in found.cause


def test_silence_of_exactly_the_limit_is_not_enough() -> None:
    assert suspects([_beat(0, silent_s=10.0)], _NOW, _LIMITS) == []


def test_all_frozen_ranks_are_named_longest_silence_first() -> None:
    found = suspects([_beat(0, silent_s=11), _beat(1), _beat(2, silent_s=30)], _NOW, _LIMITS)
    assert [s.rank for s in found] == [2, 0]


def test_of_stuck_ranks_the_one_that_does_not_wait_for_others_is_named() -> None:
    waiting = [_beat(r, phase=Phase.VOTE, stuck_s=700) for r in (0, 2)]
    (found,) = suspects([*waiting, _beat(1, phase=Phase.FORWARD_BACKWARD, stuck_s=650)], _NOW, _LIMITS)
    assert found.rank == 1
    assert "no progress for 650.0 s" in found.cause


def test_a_rank_that_waits_long_is_innocent_while_another_one_moves() -> None:
    assert suspects([_beat(0, phase=Phase.VOTE, stuck_s=900), _beat(1, phase=Phase.UPDATE)], _NOW, _LIMITS) == []


def test_if_all_wait_for_each_other_the_one_that_is_behind_is_named() -> None:
    beats = [_beat(0, step=8, stuck_s=700), _beat(1, step=7, stuck_s=650), _beat(2, step=8, stuck_s=900)]
    (found,) = suspects(beats, _NOW, _LIMITS)
    assert found.rank == 1


def test_a_frozen_rank_takes_the_blame_from_those_that_are_stuck_behind_it() -> None:
    beats = [_beat(0, stuck_s=700), _beat(1, silent_s=11, stuck_s=700), _beat(2, phase=Phase.UPDATE, stuck_s=800)]
    assert [s.rank for s in suspects(beats, _NOW, _LIMITS)] == [1]


def test_the_answer_does_not_depend_on_the_order_of_the_beats() -> None:
    beats = [_beat(r, silent_s=11 + r % 3) for r in range(9)]
    want = suspects(beats, _NOW, _LIMITS)
    for seed in range(10):
        shuffled = random.Random(seed).sample(beats, len(beats))
        assert suspects(shuffled, _NOW, _LIMITS) == want
