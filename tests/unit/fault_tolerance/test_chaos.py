"""Schedules of injected faults: reading them, and each happening once at its place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from holdfast import failpoints
from holdfast.errors import ConfigurationError, Fault
from holdfast.fault_tolerance import chaos
from holdfast.fault_tolerance.chaos import Action, ChaosFault, Target


@pytest.fixture(autouse=True)
def nothing_stays_armed() -> Iterator[None]:
    yield
    failpoints.disarm()


class Marks:
    """What would be shared memory."""

    def __init__(self) -> None:
        self.fired: list[int] = []

    def mark_fired(self, fault: int) -> None:
        self.fired.append(fault)

    def has_fired(self, fault: int) -> bool:
        return fault in self.fired


def problems_of(read: Callable[[], object]) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        read()
    return caught.value.problems


# -- reading ----------------------------------------------------------------------------------------------------------


def test_an_entry_says_what_where_and_when() -> None:
    fault = chaos.parse("sigkill rank=1 step=150 at=step.after_backward")
    assert fault == ChaosFault(Action.SIGKILL, 1, 150, "step.after_backward", Target.WORKER)


def test_a_step_begins_unless_told_otherwise() -> None:
    assert chaos.parse("exception  step=3 rank=0").at == "step.begin"


def test_a_keeper_is_killed_by_node() -> None:
    assert chaos.parse("keeper_sigkill node=1 step=20") == ChaosFault(
        Action.SIGKILL, 1, 20, "step.begin", Target.KEEPER
    )


@pytest.mark.parametrize("action", list(Action))
def test_every_action_can_be_written_and_read_back(action: Action) -> None:
    fault = ChaosFault(action, 2, 7, "snapshot.mid_capture")
    assert chaos.parse(str(fault)) == fault


def test_a_keeper_fault_can_be_written_and_read_back() -> None:
    fault = ChaosFault(Action.SIGKILL, 1, 20, target=Target.KEEPER)
    assert chaos.parse(str(fault)) == fault


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ("sigkil rank=1 step=1", "action 'sigkil' does not exist; did you mean 'sigkill'?"),
        ("explode rank=1 step=1", "action 'explode' does not exist; choose one of sigkill, sigterm"),
        ("", "action '' does not exist"),
        ("keeper_exit node=1 step=1", "action 'keeper_exit' does not exist"),
        ("sigkill rnak=1 step=1", "'rnak' is unknown; did you mean 'rank'?"),
        ("sigkill 1 step=1", "'1' is unknown; choose one of rank, step, at"),
        ("sigkill node=1 rank=1 step=1", "'node' is unknown"),
        ("keeper_sigkill rank=1 node=1 step=1", "'rank' is unknown; choose one of node, step"),
        ("sigkill step=1", "rank= is missing"),
        ("sigkill rank=1", "step= is missing"),
        ("sigkill rank=-1 step=1", "rank=-1 must be a whole number, 0 or more"),
        ("sigkill rank=1 step=1.5", "step=1.5 must be a whole number, 0 or more"),
        ("sigkill rank=1 step=", "step= must be a whole number, 0 or more"),
        ("sigkill rank=1 rank=2 step=1", "rank is given twice"),
        ("sigkill rank=1 step=1 at=step.begn", "failpoint 'step.begn' does not exist; did you mean 'step.begin'?"),
        ("keeper_sigkill node=1 step=1 at=step.begin", "'at' is unknown"),
    ],
)
def test_a_wrong_entry_is_named_with_the_way_out(entry: str, wanted: str) -> None:
    problems = problems_of(lambda: chaos.parse(entry))
    assert any(problem.startswith(f"chaos fault {entry!r}: {wanted}") for problem in problems), problems


def test_everything_wrong_is_reported_at_once() -> None:
    first = "sigkil rnak=1 step=x at=nowhere"
    problems = problems_of(lambda: chaos.parse_all([first, "sigkill rank=0 step=1", "exit"]))
    assert [problem.removeprefix(f"chaos fault {first!r}: ").split(";")[0] for problem in problems[:5]] == [
        "action 'sigkil' does not exist",
        "'rnak' is unknown",
        "rank= is missing",
        "step=x must be a whole number, 0 or more",
        "failpoint 'nowhere' does not exist",
    ]
    assert problems[5:] == ("chaos fault 'exit': rank= is missing", "chaos fault 'exit': step= is missing")


def test_a_schedule_keeps_its_order() -> None:
    entries = [
        "sigkill rank=1 step=2 at=step.begin",
        "keeper_sigkill node=0 step=3",
        "hang rank=0 step=1 at=step.begin",
    ]
    assert [str(fault) for fault in chaos.parse_all(entries)] == entries
    assert chaos.parse_all([]) == ()


def test_more_faults_than_there_are_marks_are_refused() -> None:
    entries = ["exit rank=0 step=1"] * 257
    assert "257 entries, at most 256" in problems_of(lambda: chaos.parse_all(entries))[0]
    assert len(chaos.parse_all(entries[:256])) == 256


# -- acting -----------------------------------------------------------------------------------------------------------


def arm(*entries: str, rank: int = 1, marks: Marks | None = None) -> Marks:
    marks = marks or Marks()
    chaos.arm(chaos.parse_all(entries), rank, marks)
    return marks


def strikes(name: str, step: int) -> bool:
    try:
        failpoints.hit(name, step)
    except chaos.ChaosException:
        return True
    return False


def test_a_fault_strikes_at_its_place_and_step_only() -> None:
    arm("exception rank=1 step=5 at=step.after_update")
    places = [("step.begin", 5), ("step.after_update", 4), ("step.after_update", 6), ("step.after_update", 5)]
    assert [strikes(name, step) for name, step in places] == [False, False, False, True]


def test_a_fault_strikes_its_rank_only() -> None:
    arm("exception rank=2 step=5", "keeper_sigkill node=1 step=5", rank=1)
    assert not strikes("step.begin", 5)


def test_a_fault_does_not_strike_twice_even_in_the_process_that_replaces_its_victim() -> None:
    marks = arm("exception rank=1 step=5")
    assert strikes("step.begin", 5) and not strikes("step.begin", 5)
    failpoints.disarm()
    arm("exception rank=1 step=5", marks=marks)
    assert not strikes("step.begin", 5)
    assert marks.fired == [0]


def test_two_faults_of_one_place_and_step_strike_one_after_the_other() -> None:
    marks = arm("exception rank=0 step=5", "exception rank=1 step=5", "exception rank=1 step=5")
    assert [strikes("step.begin", 5) for _ in range(3)] == [True, True, False]
    assert marks.fired == [1, 2]


def test_the_mark_is_set_before_the_fault_strikes(monkeypatch: pytest.MonkeyPatch) -> None:
    marks, seen = arm("sigkill rank=1 step=5"), list[tuple[int, int, list[int]]]()
    monkeypatch.setattr(os, "kill", lambda pid, number: seen.append((pid, number, list(marks.fired))))
    failpoints.hit("step.begin", 5)
    assert seen == [(os.getpid(), signal.SIGKILL, [0])]


def test_an_injected_exception_is_none_that_recovery_expects() -> None:
    assert not issubclass(chaos.ChaosException, Fault)


def suffer(entry: str, *, setup: str = "", timeout_s: float = 20.0) -> subprocess.CompletedProcess[str]:
    """A process that meets the fault and would say 'survived' otherwise."""
    code = f"""
        import threading, time
        from holdfast import failpoints
        from holdfast.fault_tolerance import chaos
        class Marks:
            def mark_fired(self, fault): print("marked", flush=True)
            def has_fired(self, fault): return False
        chaos.arm(chaos.parse_all([{entry!r}]), 0, Marks())
        {setup}
        failpoints.hit("step.begin", 1)
        print("survived", flush=True)
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.mark.parametrize(
    ("action", "status"),
    [
        ("sigkill", -signal.SIGKILL),
        ("sigterm", -signal.SIGTERM),
        ("abort", -signal.SIGABRT),
        ("exit", 1),
        ("exception", 1),
    ],
)
def test_a_process_dies_in_the_way_it_was_told_to(action: str, status: int) -> None:
    done = suffer(f"{action} rank=0 step=1")
    assert (done.returncode, done.stdout) == (status, "marked\n")
    assert ("ChaosException" in done.stderr) == (action == "exception")


_ALARM = "import signal; signal.signal(signal.SIGALRM, signal.SIG_DFL); signal.alarm(2); "
_BEAT = "threading.Thread(target=lambda: [(time.sleep(0.1), print('beat', flush=True)) for _ in range(99)]).start()"


@pytest.mark.parametrize(("action", "beats"), [("hang", True), ("gil_hang", False)])
def test_a_hang_keeps_the_heart_beating_unless_it_locks_the_interpreter(action: str, beats: bool) -> None:
    done = suffer(f"{action} rank=0 step=1", setup=_ALARM + _BEAT)
    assert done.returncode == -signal.SIGALRM
    assert "survived" not in done.stdout
    assert (done.stdout.count("beat") > 3) == beats


def test_a_stopped_process_is_alive_and_silent() -> None:
    code = """
        from holdfast import failpoints
        from holdfast.fault_tolerance import chaos
        class Marks:
            def mark_fired(self, fault): pass
            def has_fired(self, fault): return False
        chaos.arm(chaos.parse_all(["sigstop rank=0 step=1"]), 0, Marks())
        failpoints.hit("step.begin", 1)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP
    finally:
        process.kill()
        process.wait(10)


def test_the_real_board_can_keep_the_marks() -> None:
    from holdfast.fault_tolerance.board import HEADER_BYTES, Board

    board: Any = Board.create(memoryview(bytearray(HEADER_BYTES)), rank=1, run_tag="t", buffers=3)
    chaos.arm(chaos.parse_all(["exception rank=1 step=5"]), 1, board)
    assert strikes("step.begin", 5) and not strikes("step.begin", 5)
    assert board.has_fired(0) and not board.has_fired(1)
