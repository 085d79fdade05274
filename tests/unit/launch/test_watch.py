"""Signs of life: a heart that beats by itself, and what the training loop writes and asks."""

from __future__ import annotations

import threading

import pytest

from holdfast.errors import Abort
from holdfast.fault_tolerance.board import HEADER_BYTES, Beat, Board
from holdfast.launch import watch
from holdfast.launch.watch import BoardWatcher, Heart, StuckWitness
from holdfast.types import Phase, StepReport

_DEADLINE_S = 20.0


def _board() -> Board:
    return Board.create(memoryview(bytearray(HEADER_BYTES)), rank=0, run_tag="run", buffers=3)


class _Time:
    """``time`` for the module under test: it passes when the test says so, and the heart's thread follows. After the
    test that thread sleeps for ever."""

    def __init__(self) -> None:
        self.now, self.slept = 100.0, list[float]()
        self._asleep, self._wake = threading.Semaphore(0), threading.Semaphore(0)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._asleep.release()
        self._wake.acquire()

    def until_asleep(self) -> None:
        assert self._asleep.acquire(timeout=_DEADLINE_S)

    def wake(self) -> None:
        self.now += 1.0
        self._wake.release()

    def tick(self) -> None:
        self.wake()
        self.until_asleep()


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> _Time:
    fake = _Time()
    monkeypatch.setattr(watch, "time", fake)
    return fake


def _heart(time: _Time) -> Heart:
    heart = Heart(0.25, StuckWitness(1e9))
    time.until_asleep()
    return heart


# -- the heart --------------------------------------------------------------------------------------------------------


def test_the_heart_beats_at_once_and_after_every_interval(time: _Time) -> None:
    heart, board = _heart(time), _board()
    heart.move_to(board)
    assert board.read().beat_s == 100.0
    for second in (101.0, 102.0, 103.0):
        time.tick()
        assert board.read().beat_s == second
    assert set(time.slept) == {0.25}


def test_a_heart_that_is_paused_on_purpose_is_silent_for_so_long(time: _Time) -> None:
    heart, board = _heart(time), _board()
    heart.move_to(board)
    heart.pause(2.0)
    for second in (100.0, 102.0, 103.0):
        time.tick()
        assert board.read().beat_s == second


def test_a_heart_without_a_board_waits_for_one(time: _Time) -> None:
    heart, board = _heart(time), _board()
    time.tick()
    time.tick()
    heart.move_to(board)
    assert board.read().beat_s == 102.0


def test_after_a_move_the_old_board_is_silent(time: _Time) -> None:
    heart, old, new = _heart(time), _board(), _board()
    heart.move_to(old)
    heart.move_to(new)
    time.tick()
    assert (old.read().beat_s, new.read().beat_s) == (100.0, 101.0)
    heart.move_to(None)
    time.tick()
    assert new.read().beat_s == 101.0


def test_a_beat_says_nothing_about_phase_step_or_progress(time: _Time) -> None:
    heart, board = _heart(time), _board()
    board.take_over(pid=77, epoch=2)
    board.enter(Phase.VOTE, 5, 60.0)
    heart.move_to(board)
    time.tick()
    beat = board.read()
    assert (beat.pid, beat.epoch, beat.phase, beat.step, beat.progress_s) == (77, 2, Phase.VOTE, 5, 60.0)


class _SlowBoard(Board):
    """Its second beat takes as long as the test wants."""

    def __init__(self) -> None:
        super().__init__(memoryview(bytearray(HEADER_BYTES)))
        self.beats, self.is_beating, self.go_on = 0, threading.Event(), threading.Event()

    def beat(self, now: float) -> None:
        self.beats += 1
        if self.beats == 2:
            self.is_beating.set()
            assert self.go_on.wait(_DEADLINE_S)

    def read(self) -> Beat:
        return _beat(100.0, 100.0)


def test_a_move_waits_for_a_beat_that_has_begun(time: _Time) -> None:
    heart, board = _heart(time), _SlowBoard()
    heart.move_to(board)
    time.wake()
    assert board.is_beating.wait(_DEADLINE_S)
    has_moved = threading.Event()

    def move() -> None:
        heart.move_to(None)
        has_moved.set()

    moving = threading.Thread(target=move)
    moving.start()
    assert not has_moved.wait(0.05)  # the one real wait: that something does not happen
    board.go_on.set()
    assert has_moved.wait(_DEADLINE_S)
    moving.join(_DEADLINE_S)
    time.until_asleep()


def test_the_heart_does_not_keep_its_process_alive(time: _Time) -> None:
    before = set(threading.enumerate())
    _heart(time)
    assert [(t.name, t.daemon) for t in set(threading.enumerate()) - before] == [("holdfast-heart", True)]


# -- the training loop ------------------------------------------------------------------------------------------------


def test_phases_and_progress_are_on_the_board(time: _Time) -> None:
    board = _board()
    watcher = BoardWatcher(board, epoch=3)
    watcher.enter(Phase.VOTE, 5)
    time.now += 2.0
    watcher.enter(Phase.VOTE, 5)
    beat = board.read()
    assert (beat.phase, beat.step, beat.beat_s, beat.progress_s) == (Phase.VOTE, 5, 102.0, 100.0)


def test_a_finished_step_leaves_its_report_and_begins_the_next_one(time: _Time) -> None:
    board = _board()
    report = StepReport(6, 3, 1.5, 2.5, 1e-3, 0.7, 640, 0.25, 0.0, 9000, 5)
    BoardWatcher(board, epoch=3).finished(report)
    assert board.reports(0) == ([report], 1)
    assert (board.read().phase, board.read().step) == (Phase.FORWARD_BACKWARD, 6)


def test_a_watcher_lets_its_epoch_go_on_until_somebody_ends_it(time: _Time) -> None:
    board = _board()
    watcher = BoardWatcher(board, epoch=3)
    board.fence(3)
    watcher.check()
    assert not watcher.is_aborted
    board.fence(4)
    assert watcher.is_aborted
    with pytest.raises(Abort, match="epoch 3 has ended"):
        watcher.check()


def test_an_abort_ends_its_own_epoch_alone(time: _Time) -> None:
    board = _board()
    watcher, successor = BoardWatcher(board, epoch=3), BoardWatcher(board, epoch=4)
    watcher.abort()
    with pytest.raises(Abort):
        watcher.check()
    successor.check()


def test_a_wish_to_stop_is_no_abort(time: _Time) -> None:
    watcher = BoardWatcher(_board(), epoch=3)
    assert not watcher.should_stop()
    watcher.ask_to_stop()
    assert watcher.should_stop()
    watcher.check()


# -- the witness ------------------------------------------------------------------------------------------------------


def _beat(now: float, since: float, phase: Phase = Phase.FORWARD_BACKWARD) -> Beat:
    return Beat(rank=3, pid=1, epoch=0, phase=phase, step=8, beat_s=now, progress_s=since, committed=7)


def test_a_long_phase_is_told_once() -> None:
    witness = StuckWitness(5.0)
    told = [witness.look(_beat(now, 100.0)) for now in range(100, 120)]
    assert [words for words in told if words] == ["rank 3 has been in FORWARD_BACKWARD for 6 s"]
    assert told[6], "as soon as it is longer than 5 s"


def test_a_phase_as_long_as_those_before_is_nothing_special() -> None:
    witness = StuckWitness(5.0)
    witness.look(_beat(100.0, 100.0))
    witness.look(_beat(130.0, 130.0))  # it took 30 s
    assert [bool(witness.look(_beat(now, 130.0))) for now in (150.0, 189.0, 191.0, 200.0)] == [
        False,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("phase", [Phase.IDLE, Phase.PARKED])
def test_who_has_nothing_to_do_may_take_its_time(phase: Phase) -> None:
    assert not StuckWitness(5.0).look(_beat(500.0, 100.0, phase))


def test_every_thread_is_written_down_and_the_main_one_last(caplog: pytest.LogCaptureFixture) -> None:
    waits, may_end = threading.Event(), threading.Event()

    def hangs_somewhere() -> None:
        waits.set()
        may_end.wait(_DEADLINE_S)

    hanging = threading.Thread(target=hangs_somewhere, name="the-other")
    hanging.start()
    assert waits.wait(_DEADLINE_S)
    watch.write_stacks("rank 3 hangs")
    may_end.set()
    hanging.join(_DEADLINE_S)
    (record,) = caplog.records
    assert record.message.startswith("rank 3 hangs")
    other, main = (record.message.rindex(name) for name in ("hangs_somewhere", "test_every_thread_is_written"))
    assert "the-other:" in record.message and other < main


def test_the_heart_of_a_rank_that_hangs_goes_on_and_has_its_stacks_written(
    time: _Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, is_writing, may_end = list[str](), threading.Event(), threading.Event()

    def on_a_disk_that_hangs(why: str) -> None:
        written.append(why)
        is_writing.set()
        may_end.wait(3 * _DEADLINE_S)  # longer than the test waits for the heart

    monkeypatch.setattr(watch, "write_stacks", on_a_disk_that_hangs)
    heart, board = Heart(0.25, StuckWitness(2.0)), _board()
    time.until_asleep()
    board.enter(Phase.VOTE, 4, 100.0)
    heart.move_to(board)
    for _ in range(8):
        time.tick()
    assert is_writing.wait(_DEADLINE_S)
    assert board.read().beat_s == 108.0
    assert written == ["rank 0 has been in VOTE for 3 s"]
    may_end.set()
