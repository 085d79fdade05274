"""A keeper's arenas: those of its ranks, and those of ranks that are counted anew."""

from __future__ import annotations

from dataclasses import replace

import pytest

from holdfast.errors import SnapshotError, SnapshotMemory
from holdfast.fault_tolerance.holdings import Holdings
from holdfast.types import StepReport
from tests.support.snapshots import RUN_TAG

_PAGE = 4096
_LIMIT = 16 << 20


def _holdings(*, parity_ratio: float = 1.0) -> Holdings:
    return Holdings(RUN_TAG, limit_bytes=_LIMIT, buffers=3, parity_ratio=parity_ratio)


def test_ranks_of_a_newer_roster_get_fresh_memory_and_the_old_one_stays() -> None:
    holdings = _holdings()
    before = holdings.admit(2, 0, fence=4)
    before.reserve(_PAGE)
    now = holdings.admit(2, 1, fence=7)
    assert now is not before and now.board.capacity == 0
    assert now.board.fence_epoch == 7
    assert (holdings.roster, list(holdings.present), list(holdings.former)) == (1, [2], [(0, 2)])
    assert holdings.of(2) == [now, before]
    assert holdings.admit(2, 1, fence=7) is now


def test_memory_that_nobody_has_used_is_not_kept() -> None:
    holdings = _holdings()
    holdings.admit(0, 0, fence=1)
    holdings.admit(0, 1, fence=2)
    assert holdings.former == {}


def test_reports_that_nobody_has_heard_yet_are_told_by_the_new_ranks() -> None:
    holdings = _holdings()
    told = StepReport(7, 1, 2.5, 3.0, 1e-3, 0.7, 64, 0.25, 0.0, 9000, 6)
    holdings.admit(1, 0, fence=1).board.append(told)
    now = holdings.admit(0, 1, fence=2).board
    assert now.reports(0) == ([told], 1)
    now.append(replace(told, step=8))
    assert [report.step for report in now.reports(0)[0]] == [7, 8]


def test_a_late_call_of_an_older_roster_changes_nothing() -> None:
    holdings = _holdings()
    holdings.admit(1, 2, fence=1)
    with pytest.raises(SnapshotError, match="rank 0 belongs to roster 1, and roster 2 is here by now"):
        holdings.admit(0, 1, fence=1)
    assert (holdings.roster, list(holdings.present)) == (2, [1])


def test_the_limit_counts_what_former_ranks_hold_until_it_goes() -> None:
    holdings = _holdings()
    before = holdings.admit(0, 0, fence=1)
    assert before.board.limit_bytes == _LIMIT * 3 // 4
    before.reserve(1 << 20)
    taken = before.board.capacity * 4  # three buffers, and parity as large as one
    now = holdings.admit(0, 1, fence=2)
    assert now.board.limit_bytes == (_LIMIT - taken) * 3 // 4
    guest = holdings.guest(5, 0, 1 << 20)
    assert guest.board.buffers == 1
    assert now.board.limit_bytes == (_LIMIT - taken - guest.board.capacity * 2) * 3 // 4
    holdings.drop_former()
    assert now.board.limit_bytes == _LIMIT * 3 // 4
    assert holdings.arenas == [now]


def test_a_guest_for_whom_there_is_no_room_is_refused_with_the_numbers() -> None:
    holdings = _holdings()
    holdings.admit(0, 1, fence=1)
    with pytest.raises(SnapshotMemory):
        holdings.guest(5, 0, 2 * _LIMIT)


def test_the_same_guest_is_the_same_memory() -> None:
    holdings = _holdings()
    holdings.admit(0, 1, fence=1)
    assert holdings.guest(5, 0, _PAGE) is holdings.guest(5, 0, _PAGE)
    assert holdings.guest(5, 0, _PAGE).board.capacity >= _PAGE
