"""What a process suffers at its failpoints: the right thing at the right place, once, and noted before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from holdfast import failpoints
from holdfast.errors import Fault
from holdfast.fault_tolerance import chaos, strikes
from holdfast.fault_tolerance.chaos import Action, Target
from holdfast.fault_tolerance.ledger import Ledger
from holdfast.fault_tolerance.strikes import ChaosException


@pytest.fixture(autouse=True)
def nothing_stays_armed() -> Iterator[None]:
    yield
    failpoints.disarm()


def arm(folder: Path, *entries: str, rank: int = 1) -> None:
    strikes.arm(chaos.parse_all(entries), Target.WORKER, rank, Ledger(folder))


def is_struck(name: str, step: int) -> bool:
    try:
        failpoints.hit(name, step)
    except ChaosException:
        return True
    return False


def test_a_fault_strikes_at_its_place_and_step_only(tmp_path: Path) -> None:
    arm(tmp_path, "exception rank=1 step=5 at=step.after_update")
    places = [("step.begin", 5), ("step.after_update", 4), ("step.after_update", 6), ("step.after_update", 5)]
    assert [is_struck(name, step) for name, step in places] == [False, False, False, True]


def test_a_fault_strikes_its_rank_only(tmp_path: Path) -> None:
    arm(tmp_path, "exception rank=2 step=5", "keeper_sigkill node=1 step=5", "flip rank=1 step=5 what=parity")
    assert not is_struck("step.begin", 5)


def test_a_keeper_is_struck_at_its_failpoint_and_a_worker_of_the_same_number_is_not(tmp_path: Path) -> None:
    faults = chaos.parse_all(["keeper_exception node=1 step=5", "exception rank=1 step=5"])
    strikes.arm(faults, Target.KEEPER, 1, Ledger(tmp_path))
    assert not is_struck("step.begin", 5)
    assert is_struck("keeper.mid_encode", 6), "version 5 was left out"


def test_a_fault_does_not_strike_twice_even_in_the_process_that_replaces_its_victim(tmp_path: Path) -> None:
    arm(tmp_path, "exception rank=1 step=5")
    assert is_struck("step.begin", 5) and not is_struck("step.begin", 5)
    failpoints.disarm()
    arm(tmp_path, "exception rank=1 step=5")
    assert not is_struck("step.begin", 5)


def test_equal_faults_of_one_place_and_step_strike_one_after_the_other(tmp_path: Path) -> None:
    arm(tmp_path, "exception rank=0 step=5", "exception rank=1 step=5", "exception rank=1 step=5")
    assert [is_struck("step.begin", 5) for _ in range(3)] == [True, True, False]


def test_a_rate_strikes_each_place_once_although_steps_are_repeated(tmp_path: Path) -> None:
    arm(tmp_path, "exception rate=0.3 seed=1")
    rate = chaos.Rate(0.3, 1)
    once = [step for step in range(30) if rate.strikes(1, step)]
    assert once and [step for step in (*range(20), *range(10, 30)) if is_struck("step.begin", step)] == once


def test_arming_again_forgets_what_was_armed_before(tmp_path: Path) -> None:
    arm(tmp_path, "exception rank=1 step=5 at=step.after_update")
    arm(tmp_path, "exception rank=1 step=6")
    assert not is_struck("step.after_update", 5)
    assert is_struck("step.begin", 6)


def test_a_strike_is_noted_before_it_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm(tmp_path, "sigkill rank=1 step=5")
    seen: list[tuple[int, int, Sequence[object]]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: seen.append((pid, number, Ledger(tmp_path).news())))
    failpoints.hit("step.begin", 5)
    ((pid, number, noted),) = seen
    assert (pid, number, len(noted)) == (os.getpid(), signal.SIGKILL, 1)


def test_what_cannot_be_noted_does_not_strike(tmp_path: Path) -> None:
    """Otherwise it would strike again and again."""
    (tmp_path / "file").write_text("in the way")
    arm(tmp_path / "file", "exception rank=1 step=5")
    assert not is_struck("step.begin", 5)


def test_actions_that_only_some_processes_know_are_given_by_them(tmp_path: Path) -> None:
    seen: list[float] = []
    own = {Action.NO_HEARTBEAT: lambda fault: seen.append(fault.for_s)}
    faults = chaos.parse_all(["no_heartbeat rank=1 step=5 for=2.5"])
    strikes.arm(faults, Target.WORKER, 1, Ledger(tmp_path), own)
    failpoints.hit("step.begin", 5)
    assert seen == [2.5]


def test_a_clock_that_jumps_changes_the_wall_clock_and_no_duration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", time.time)
    monkeypatch.setattr(time, "time_ns", time.time_ns)
    wall, monotonic = time.time(), time.monotonic()
    strikes.strike(chaos.parse("clock_jump rank=0 step=1 by=-86400"), {})
    assert -86400 <= time.time() - wall < -86340
    assert abs(time.time_ns() / 1e9 - time.time()) < 60
    assert 0 <= time.monotonic() - monotonic < 60


def test_an_injected_exception_is_none_that_recovery_expects() -> None:
    assert not issubclass(ChaosException, Fault)


# -- deaths -----------------------------------------------------------------------------------------------------------


def _script(entry: str, folder: Path, setup: str = "") -> str:
    """A process that meets the fault and would say 'survived' otherwise."""
    code = f"""
        import pathlib, threading, time
        from holdfast import failpoints
        from holdfast.fault_tolerance import chaos, strikes
        from holdfast.fault_tolerance.ledger import Ledger
        ledger = Ledger(pathlib.Path({str(folder)!r}))
        strikes.arm(chaos.parse_all([{entry!r}]), chaos.Target.WORKER, 0, ledger)
        {setup}
        failpoints.hit("step.begin", 1)
        print("survived", flush=True)
    """
    return textwrap.dedent(code)


def suffer(entry: str, folder: Path, setup: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _script(entry, folder, setup)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize(
    ("action", "status", "said"),
    [
        ("sigkill", -signal.SIGKILL, ""),
        ("sigterm", -signal.SIGTERM, ""),
        ("abort", -signal.SIGABRT, ""),
        ("segv", -signal.SIGSEGV, ""),
        ("oom", -signal.SIGKILL, "Out of memory: Killed process "),
        ("exit", 1, ""),
        ("exception", 1, "ChaosException: injected by chaos.faults"),
    ],
)
def test_a_process_dies_in_the_way_it_was_told_to(action: str, status: int, said: str, tmp_path: Path) -> None:
    done = suffer(f"{action} rank=0 step=1", tmp_path)
    assert (done.returncode, done.stdout) == (status, "")
    assert said in done.stderr
    (noted,) = Ledger(tmp_path).news()
    assert (noted.action, noted.target, noted.number, noted.step, noted.at) == (action, "worker", 0, 1, "step.begin")


_ALARM = "import signal; signal.signal(signal.SIGALRM, signal.SIG_DFL); signal.alarm(2); "
_BEAT = "threading.Thread(target=lambda: [(time.sleep(0.1), print('beat', flush=True)) for _ in range(99)]).start()"


@pytest.mark.parametrize(("action", "beats"), [("hang", True), ("gil_hang", False)])
def test_a_hang_keeps_the_heart_beating_unless_it_locks_the_interpreter(
    action: str, beats: bool, tmp_path: Path
) -> None:
    done = suffer(f"{action} rank=0 step=1", tmp_path, _ALARM + _BEAT)
    assert done.returncode == -signal.SIGALRM
    assert "survived" not in done.stdout
    assert (done.stdout.count("beat") > 3) == beats


def test_a_stopped_process_is_alive_and_silent(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _script("sigstop rank=0 step=1", tmp_path)])
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP
    finally:
        process.kill()
        process.wait(10)


# -- the ledger -------------------------------------------------------------------------------------------------------


def test_of_many_processes_one_may_strike(tmp_path: Path) -> None:
    """A keeper and its successor, a worker and its replacement: whoever links the file first."""
    code = f"""
        import pathlib, sys
        from holdfast.fault_tolerance import chaos
        from holdfast.fault_tolerance.ledger import Ledger
        fault = chaos.parse("sigkill rank=0 step=1", source="test")
        sys.stdin.readline()
        print(Ledger(pathlib.Path({str(tmp_path)!r})).claim(fault, 1))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    crowd = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = [process.communicate("go\n", timeout=30)[0].strip() for process in crowd]
    assert sorted(said) == ["False", "False", "False", "True"]


def test_who_has_looked_at_the_same_time_does_not_strike_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: False)
    fault = chaos.parse("sigkill rank=0 step=1", source="test")
    assert [Ledger(tmp_path).claim(fault, 1) for _ in range(3)] == [True, False, False]


def test_news_come_once_in_order_and_half_written_files_are_none(tmp_path: Path) -> None:
    writer, reader = Ledger(tmp_path / "struck"), Ledger(tmp_path / "struck")
    assert list(reader.news()) == []
    faults = [chaos.parse(f"sigkill rank=0 step={step}", source="test") for step in (3, 1)]
    assert all(writer.claim(fault, fault.step) for fault in faults)
    (tmp_path / "struck" / "sigkill-x.json.tmp-1").write_text("{")
    for fault, second in zip(faults, (1, 2), strict=True):
        (path,) = [p for p in (tmp_path / "struck").glob("*.json") if json.loads(p.read_text())["step"] == fault.step]
        os.utime(path, (second, second))
    assert [event.step for event in reader.news()] == [3, 1]
    assert list(reader.news()) == []
    assert reader.has(faults[0]) and not reader.has(chaos.parse("sigkill rank=1 step=3", source="test"))
