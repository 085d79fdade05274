"""The status page: what one process writes, another reads whole or not at all."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise

import pytest

from holdfast.errors import InvariantViolation, SnapshotError
from holdfast.fault_tolerance.arena import Arena
from holdfast.fault_tolerance.board import HEADER_BYTES, MAX_BUFFERS, REPORT_SLOTS, Beat, Board
from holdfast.fault_tolerance.ring import Ring
from holdfast.types import Phase, StepReport

_REPORT = StepReport(
    step=7,
    epoch=2,
    loss=1.25,
    bits_per_byte=2.5,
    learning_rate=3e-4,
    grad_norm=0.83,
    tokens=1 << 40,
    step_s=0.2,
    stall_s=0.001,
    copy_bytes=12_000_000,
    committed=6,
)


def _board(memory: bytearray | None = None) -> Board:
    view = memoryview(bytearray(HEADER_BYTES) if memory is None else memory)
    return Board.create(view, rank=3, run_tag="run", buffers=3)


# -- signs of life ----------------------------------------------------------------------------------------------------


def test_a_new_board_tells_of_nobody() -> None:
    assert _board().read() == Beat(3, 0, 0, Phase.IDLE, 0, 0.0, 0.0, -1)


def test_a_beat_is_a_sign_of_life_but_no_progress() -> None:
    board = _board()
    board.enter(Phase.UPDATE, 5, 10.0)
    board.beat(11.5)
    assert (board.read().beat_s, board.read().progress_s) == (11.5, 10.0)


@pytest.mark.parametrize(("phase", "step"), [(Phase.FENCE, 5), (Phase.UPDATE, 6)])
def test_another_phase_or_another_step_is_progress(phase: Phase, step: int) -> None:
    board = _board()
    board.enter(Phase.UPDATE, 5, 10.0)
    board.enter(phase, step, 12.0)
    assert (board.read().phase, board.read().step, board.read().progress_s) == (phase, step, 12.0)


def test_entering_the_same_phase_of_the_same_step_is_no_progress() -> None:
    board = _board()
    board.enter(Phase.VOTE, 5, 10.0)
    board.enter(Phase.VOTE, 5, 99.0)
    assert (board.read().beat_s, board.read().progress_s) == (99.0, 10.0)


def test_a_successor_who_enters_the_phase_its_predecessor_died_in_makes_progress() -> None:
    board = _board()
    board.enter(Phase.JOIN, 5, 10.0)
    board.note_committed(4)
    board.take_over(pid=77, epoch=2)
    assert (board.read().pid, board.read().epoch, board.read().committed) == (77, 2, -1)
    board.enter(Phase.JOIN, 5, 50.0)
    assert board.read().progress_s == 50.0


@pytest.fixture
def hasty_threads() -> Iterator[None]:
    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual_s)


@pytest.mark.usefixtures("hasty_threads")
def test_a_phase_is_not_lost_when_the_heart_beats_at_the_same_time() -> None:
    board, over = _board(), threading.Event()

    def beat() -> None:
        while not over.is_set():
            board.beat(1.0)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        for step in range(3000):
            board.enter(Phase.UPDATE, step, 2.0)
            assert board.read().step == step
    finally:
        over.set()
        heart.join(10)


def test_a_damaged_sign_of_life_is_replaced_by_the_one_before() -> None:
    memory = bytearray(HEADER_BYTES)
    board = _board(memory)
    board.enter(Phase.UPDATE, 5, 10.0)
    before = bytes(memory)
    board.enter(Phase.FENCE, 6, 11.0)
    memory[next(i for i in range(4096, 8192) if memory[i] != before[i])] ^= 1
    assert (board.read().phase, board.read().step) == (Phase.UPDATE, 5)


def test_a_board_whose_beats_are_all_destroyed_says_so() -> None:
    memory = bytearray(HEADER_BYTES)
    board = _board(memory)
    memory[4096:8192] = b"\xff" * 4096
    with pytest.raises(SnapshotError, match="board of rank 3 cannot be read"):
        board.read()


# -- step reports -----------------------------------------------------------------------------------------------------


def test_a_report_comes_back_with_every_field_and_its_type() -> None:
    board = _board()
    board.append(_REPORT)
    (found,), next_seq = board.reports(0)
    assert found == _REPORT
    assert [type(v) for v in asdict(found).values()] == [type(v) for v in asdict(_REPORT).values()]
    assert next_seq == 1


def test_a_loss_that_is_not_a_number_is_reported_as_it_is() -> None:
    board = _board()
    board.append(replace(_REPORT, loss=math.nan, grad_norm=math.inf))
    (found,), _ = board.reports(0)
    assert math.isnan(found.loss)
    assert found.grad_norm == math.inf


def test_each_report_is_told_once_to_a_reader_who_hands_back_the_number() -> None:
    board = _board()
    for step in range(3):
        board.append(replace(_REPORT, step=step))
    first, seq = board.reports(0)
    board.append(replace(_REPORT, step=3))
    second, seq = board.reports(seq)
    assert [r.step for r in first + second] == [0, 1, 2, 3]
    assert board.reports(seq) == ([], 4)


def test_a_reader_who_was_away_too_long_gets_the_reports_that_are_left() -> None:
    board = _board()
    for step in range(REPORT_SLOTS + 10):
        board.append(replace(_REPORT, step=step))
    reports, next_seq = board.reports(0)
    assert [r.step for r in reports] == list(range(10, REPORT_SLOTS + 10))
    assert next_seq == REPORT_SLOTS + 10


def test_a_reader_with_a_number_of_an_earlier_keeper_starts_over() -> None:
    board = _board()
    board.append(_REPORT)
    assert board.reports(500) == ([_REPORT], 1)


@pytest.mark.parametrize("cut", range(1, 40))
def test_a_record_that_its_writer_did_not_finish_is_no_record(cut: int) -> None:
    memory, count = bytearray(Ring.slot_bytes("qdd") * 2), memoryview(bytearray(8)).cast("q")
    ring = Ring(count, memoryview(memory), "qdd")
    ring.append(1, 1.0, 1.0)
    ring.append(2, 2.0, 2.0)
    before = bytes(memory)
    ring.append(3, 3.0, 3.0)  # over the first record ...
    after = bytes(memory)
    memory[:] = after[:cut] + before[cut:]  # ... as a kill after ``cut`` bytes leaves it, whichever way
    for written in (2, 3):  # the count is changed last
        count[0] = written
        records, _ = ring.since(0)
        assert set(records) <= {(1, 1.0, 1.0), (2, 2.0, 2.0), (3, 3.0, 3.0)}
        assert (2, 2.0, 2.0) in records
        assert ring.latest() in {(2, 2.0, 2.0), (3, 3.0, 3.0)}


_WRITER = """
import sys
from dataclasses import replace
from holdfast.fault_tolerance.arena import Arena, ArenaRef
from holdfast.types import Phase, StepReport
pid, fd = map(int, sys.argv[1:])
board = Arena.attach(ArenaRef(pid, fd, 0, "run")).board
i = 0
while board.fence_epoch == 0:
    i += 1
    board.enter(Phase.UPDATE, i, float(i))
    board.append(StepReport(i, i, float(i), float(i), float(i), float(i), i, float(i), float(i), i, i, float(i), i))
print(i)
"""


def test_no_record_is_torn_while_another_process_writes_as_fast_as_it_can() -> None:
    arena = Arena.create(0, "run", 0, 3)
    command = [sys.executable, "-c", _WRITER, str(arena.ref.pid), str(arena.ref.fd)]
    seen, seq, beats = 0, 0, 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        try:
            deadline, end = time.monotonic() + 30.0, float("inf")
            while time.monotonic() < min(deadline, end):
                beat = arena.board.read()
                assert beat.step == beat.beat_s == beat.progress_s
                beats += 1
                reports, seq = arena.board.reports(seq)
                for report in reports:
                    assert len(set(asdict(report).values())) == 1, report
                assert all(a.step < b.step for a, b in pairwise(reports))
                if reports and not seen:
                    end = time.monotonic() + 1.0
                seen += len(reports)
            arena.board.fence(1)
            written = int(writer.communicate(timeout=20)[0])
        finally:
            writer.kill()
    assert beats > 100
    assert 100 < seen <= written
    assert arena.board.read().step == written


# -- fence, faults, succession ----------------------------------------------------------------------------------------


def test_a_fence_never_moves_back() -> None:
    board = _board()
    board.fence(4)
    board.fence(2)
    assert board.fence_epoch == 4


def test_the_board_of_a_new_keeper_continues_the_old_one() -> None:
    old, new = _board(), _board()
    old.take_over(pid=7, epoch=3)
    old.enter(Phase.VOTE, 41, 9.0)
    for step in range(REPORT_SLOTS + 3):
        old.append(replace(_REPORT, step=step))
    _, seq = old.reports(0)
    old.append(replace(_REPORT, step=9999))
    new.beat(12.0)
    new.carry_over(old)
    new.carry_over(old)
    assert new.read() == replace(old.read(), beat_s=12.0)
    reports, next_seq = new.reports(seq)
    assert [r.step for r in reports] == [9999]
    assert next_seq == REPORT_SLOTS + 4


def test_reports_of_the_new_board_are_not_overwritten_when_the_old_one_is_carried_over_late() -> None:
    old, new = _board(), _board()
    old.append(replace(_REPORT, step=1))
    new.append(replace(_REPORT, step=2))
    new.carry_over(old)
    assert [r.step for r in new.reports(0)[0]] == [2]


# -- who may open it --------------------------------------------------------------------------------------------------


def test_memory_of_another_run_or_rank_is_refused_by_name() -> None:
    memory = bytearray(HEADER_BYTES)
    _board(memory)
    with pytest.raises(SnapshotError, match="rank 3 of run 'run', not to rank 3 of 'other'"):
        Board.open(memoryview(memory), rank=3, run_tag="other")
    with pytest.raises(SnapshotError, match="rank 3 of run 'run', not to rank 0"):
        Board.open(memoryview(memory), rank=0, run_tag="run")


@pytest.mark.parametrize("damaged", [0, 8])
def test_memory_without_the_magic_or_with_another_layout_is_refused(damaged: int) -> None:
    memory = bytearray(HEADER_BYTES)
    _board(memory)
    memory[damaged] ^= 2
    with pytest.raises(SnapshotError, match="no board of layout 3"):
        Board.open(memoryview(memory), rank=3, run_tag="run")


@pytest.mark.parametrize(("tag", "buffers"), [("", 3), ("x" * 65, 3), ("run", 0), ("run", MAX_BUFFERS + 1)])
def test_what_does_not_fit_the_page_is_refused_when_it_is_made(tag: str, buffers: int) -> None:
    with pytest.raises(InvariantViolation, match="run_tag"):
        Board.create(memoryview(bytearray(HEADER_BYTES)), rank=0, run_tag=tag, buffers=buffers)
