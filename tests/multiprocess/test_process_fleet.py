"""Forked processes for real: they answer, die, are killed, and never outlive the driver."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import pytest

from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.arena import Arena, ArenaRef
from holdfast.launch import process_fleet
from holdfast.launch.fleet import Address, Completion, Lost, Report, Role
from holdfast.launch.process_fleet import ProcessFleet
from holdfast.types import Phase

_DEADLINE_S = 20.0
_LIGHT = ("holdfast.launch.process_fleet",)
"""What a keeper needs, without torch."""


def _keeper(node: int) -> Address:
    return Address(Role.KEEPER, node)


def _spec(node: int) -> dict[str, object]:
    return {"node": node, "run_tag": "run", "limit_bytes": 1 << 22, "buffers": 3, "lease_s": 60.0}


@pytest.fixture(scope="module", autouse=True)
def own_fork_server() -> Iterator[int | None]:
    """Other tests need one that has imported other things. The number of the resource tracker that others have
    started, if one has: that does not shield it from signals."""
    forkserver._forkserver._stop()
    yield resource_tracker._resource_tracker._pid  # type: ignore[attr-defined]
    forkserver._forkserver._stop()


@pytest.fixture
def fleet() -> Iterator[ProcessFleet]:
    made = ProcessFleet(preload=_LIGHT)
    yield made
    made.close()


def _until(fleet: ProcessFleet, is_enough: Callable[[list[Report]], bool]) -> list[Report]:
    """Poll until ``is_enough`` of all reports so far."""
    reports, end = list[Report](), time.monotonic() + _DEADLINE_S
    while not is_enough(reports):
        assert time.monotonic() < end, f"only {reports} within {_DEADLINE_S} s"
        reports += fleet.poll(0.05)
    return reports


def _answer(fleet: ProcessFleet, call: int) -> Completion:
    reports = _until(fleet, lambda so_far: any(isinstance(r, Completion) and r.call == call for r in so_far))
    return next(r for r in reports if isinstance(r, Completion) and r.call == call)


def _start(fleet: ProcessFleet, *nodes: int) -> list[int]:
    """Start keepers together; their process ids."""
    calls = [fleet.start(_keeper(node), node, _spec(node)) for node in nodes]
    reports = _until(fleet, lambda so_far: len(so_far) == len(calls))
    ready = {r.call: r for r in reports if isinstance(r, Completion)}
    assert [ready[call].error for call in calls] == [None] * len(calls)
    return [int(ready[call].result["pid"]) for call in calls]  # type: ignore[index]  # JSON


def _is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _all_gone(pids: Sequence[int], within_s: float = _DEADLINE_S) -> bool:
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if all(map(_is_gone, pids)):
            return True
        time.sleep(0.01)
    return all(map(_is_gone, pids))


# -- calls ------------------------------------------------------------------------------------------------------------


def test_a_started_process_is_another_one_on_this_host_and_says_when_it_is_ready(fleet: ProcessFleet) -> None:
    first, second = _answer(fleet, fleet.start(_keeper(0), 0, _spec(0))), _start(fleet, 1)[0]
    assert first.target == _keeper(0)
    assert first.result == {"pid": first.result["pid"], "host": socket.gethostname(), "address": ""}  # type: ignore[index]  # JSON
    assert len({os.getpid(), first.result["pid"], second}) == 3  # type: ignore[index]  # JSON
    assert list(fleet.hosts(3)) == ["localhost"] * 3


def test_the_memory_of_a_keeper_is_reached_from_here_and_what_is_written_there_is_told(fleet: ProcessFleet) -> None:
    (pid,) = _start(fleet, 0)
    ref = _answer(fleet, fleet.call(_keeper(0), "admit", 3)).result
    board = Arena.attach(ArenaRef(**ref)).board  # type: ignore[arg-type]  # JSON
    board.enter(Phase.UPDATE, 7, time.monotonic())
    pulse = _answer(fleet, fleet.call(_keeper(0), "pulse", {})).result
    assert ref["pid"] == pid  # type: ignore[index]  # JSON
    assert pulse["ranks"]["3"]["beat"]["step"] == 7  # type: ignore[index]  # JSON


def test_a_keeper_does_not_load_torch(fleet: ProcessFleet) -> None:
    (pid,) = _start(fleet, 0)
    maps = Path(f"/proc/{pid}/maps").read_text()
    assert "arrow" in maps
    assert "torch" not in maps


def test_an_error_in_a_process_is_an_answer_and_the_process_lives(fleet: ProcessFleet) -> None:
    (pid,) = _start(fleet, 0)
    unknown = _answer(fleet, fleet.call(_keeper(0), "persist", 5, 1, "/tmp", "step-00000001"))
    assert (unknown.error or "").startswith("InvariantViolation: rank 5 is not admitted on node 0")
    assert "Traceback (most recent call last)" in (unknown.error or "")
    users = _answer(fleet, fleet.call(_keeper(0), "load", 0, "relative", "step-00000001"))
    assert (users.error or "").startswith("ConfigurationError: storage 'relative' must be an absolute path")
    assert "Traceback" not in (users.error or "")
    assert (_answer(fleet, fleet.call(_keeper(0), "no_such_method")).error or "").startswith("AttributeError")
    assert _answer(fleet, fleet.call(_keeper(0), "ready")).result["pid"] == pid  # type: ignore[index]  # JSON


def test_a_process_that_cannot_be_built_answers_with_the_reason_and_waits_to_be_killed(fleet: ProcessFleet) -> None:
    spec = {**_spec(0), "buffers": "three"}
    failed = _answer(fleet, fleet.start(_keeper(0), 0, spec))
    assert (failed.error or "").startswith("ValueError: invalid literal for int() with base 10: 'three'")
    assert fleet.poll(0.2) == []
    fleet.kill(_keeper(0))
    assert _start(fleet, 0)


def test_calls_run_in_order_and_many_at_once(fleet: ProcessFleet) -> None:
    _start(fleet, 0, 1)
    calls = [fleet.call(_keeper(n % 2), "ready") for n in range(40)]
    reports = _until(fleet, lambda so_far: len(so_far) == 40)
    for node in (0, 1):
        answers = [r for r in reports if r.target == _keeper(node) and isinstance(r, Completion)]
        assert [a.call for a in answers] == [call for n, call in enumerate(calls) if n % 2 == node]


def _blocking_checkpoint(root: Path) -> Path:
    """A checkpoint whose storage does not answer: opening its record waits for a writer."""
    folder = root / checkpoint.directory(1)
    folder.mkdir(parents=True)
    os.mkfifo(folder / checkpoint.COMMIT_FILE)
    return folder / checkpoint.COMMIT_FILE


def test_a_pulse_is_answered_while_the_storage_is_not(fleet: ProcessFleet, tmp_path: Path) -> None:
    record = _blocking_checkpoint(tmp_path)
    _start(fleet, 0)
    load = fleet.call(_keeper(0), "load", 0, str(tmp_path), checkpoint.directory(1))
    pulse = _answer(fleet, fleet.call(_keeper(0), "pulse", {}))
    assert pulse.error is None
    record.write_bytes(b"no record")
    assert (_answer(fleet, load).error or "").startswith("ManifestMismatch")


def test_a_poll_without_news_takes_its_time_and_returns_nothing(fleet: ProcessFleet) -> None:
    for nodes in ((), (0,)):
        _start(fleet, *nodes)
        before = time.monotonic()
        assert fleet.poll(0.1) == []
        assert 0.09 < time.monotonic() - before < _DEADLINE_S


# -- death ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
def test_a_death_is_reported_once_with_the_signal_that_caused_it(fleet: ProcessFleet, number: signal.Signals) -> None:
    first, second = _start(fleet, 0, 1)
    os.kill(first, number)
    reports = _until(fleet, lambda so_far: len(so_far) > 0) + fleet.poll(0.1)
    assert reports == [Lost(_keeper(0), f"killed by {number.name} (pid {first})")]
    assert _answer(fleet, fleet.call(_keeper(1), "ready")).result["pid"] == second  # type: ignore[index]  # JSON


def test_what_a_process_answered_before_it_died_comes_before_the_news_of_its_death(fleet: ProcessFleet) -> None:
    (pid,) = _start(fleet, 0)
    call = fleet.call(_keeper(0), "ready")
    assert fleet._members[_keeper(0)].pipe.poll(_DEADLINE_S)
    os.kill(pid, signal.SIGKILL)
    reports = _until(fleet, lambda so_far: any(isinstance(r, Lost) for r in so_far))
    assert [type(r) for r in reports] == [Completion, Lost]
    assert isinstance(reports[0], Completion)
    assert reports[0].call == call


def test_a_call_to_a_process_that_was_lost_never_completes(fleet: ProcessFleet) -> None:
    (pid,) = _start(fleet, 0)
    os.kill(pid, signal.SIGKILL)
    assert _all_gone([pid])
    before = fleet.call(_keeper(0), "ready")  # nobody has noticed yet
    reports = _until(fleet, lambda so_far: len(so_far) > 0)
    after = fleet.call(_keeper(0), "ready")
    assert before < after
    assert [type(r) for r in reports + fleet.poll(0.1)] == [Lost]


def test_whom_the_driver_kills_is_gone_at_once_and_not_reported(fleet: ProcessFleet) -> None:
    first, second = _start(fleet, 0, 1)
    fleet.call(_keeper(0), "ready")
    fleet.kill(_keeper(0))
    assert _is_gone(first)
    fleet.kill(_keeper(0))
    fleet.kill(_keeper(7))
    fleet.call(_keeper(0), "ready")
    assert fleet.poll(0.1) == []
    assert not _is_gone(second)


def test_a_frozen_process_is_killed_like_any_other(fleet: ProcessFleet) -> None:
    (pid,) = _start(fleet, 0)
    os.kill(pid, signal.SIGSTOP)
    fleet.kill(_keeper(0))
    assert _is_gone(pid)
    assert fleet.poll(0.05) == []


def test_a_successor_has_the_address_of_its_predecessor_and_nothing_else(fleet: ProcessFleet) -> None:
    (first,) = _start(fleet, 0)
    _answer(fleet, fleet.call(_keeper(0), "admit", 0))
    fleet.kill(_keeper(0))
    (second,) = _start(fleet, 0)
    assert second != first
    assert _answer(fleet, fleet.call(_keeper(0), "inventory")).result["held"] == {}


def test_a_dead_process_leaves_no_descriptor_behind(fleet: ProcessFleet) -> None:
    _start(fleet, 0)
    fleet.kill(_keeper(0))
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        (pid,) = _start(fleet, 0)
        os.kill(pid, signal.SIGKILL)
        _until(fleet, lambda so_far: len(so_far) > 0)
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2  # the last one's, until the next is started


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_wish_to_stop_is_for_the_driver_alone(
    fleet: ProcessFleet, number: signal.Signals, own_fork_server: int | None
) -> None:
    """Terminals, schedulers and service managers send it to all processes; a keeper holds what is to be saved."""
    (pid,) = _start(fleet, 0)
    for child in {pid, *_children(os.getpid())} - {own_fork_server}:  # the fork server is one of them
        os.kill(child, number)
    assert _answer(fleet, fleet.call(_keeper(0), "ready")).result["pid"] == pid  # type: ignore[index]  # JSON
    assert _start(fleet, 1)


def test_a_start_does_not_wait_for_the_fork_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "slow_to_import.py").write_text("import time; time.sleep(600)")
    monkeypatch.syspath_prepend(tmp_path)
    forkserver._forkserver._stop()
    fleet, before = ProcessFleet(preload=("slow_to_import",)), time.monotonic()
    call = fleet.start(_keeper(0), 0, _spec(0))
    assert fleet.poll(0.1) == []
    fleet.kill(_keeper(0))
    assert call
    assert fleet.poll(0.1) == []
    fleet.close()
    assert time.monotonic() - before < 5.0
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]
    forkserver._forkserver._stop()


def test_a_process_that_cannot_be_started_is_lost_and_its_successor_gets_another_fork_server(
    fleet: ProcessFleet,
) -> None:
    _start(fleet, 0)
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    os.kill(server, signal.SIGSTOP)  # so that it takes the next start and never answers
    fleet.start(_keeper(1), 1, _spec(1))
    time.sleep(0.1)
    os.kill(server, signal.SIGKILL)
    # All its threads are gone, and whoever asks for its exit code learns of it: a zombie alone may still have some.
    os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT)
    reports = _until(fleet, lambda so_far: len(so_far) > 0)
    assert reports == [Lost(_keeper(1), "the process could not be started")]
    assert _start(fleet, 1)


# -- the end ----------------------------------------------------------------------------------------------------------


def test_a_released_process_ends_by_itself_and_is_not_reported(fleet: ProcessFleet) -> None:
    first, second = _start(fleet, 0, 1)
    fleet.release(_keeper(0))
    fleet.release(_keeper(0))
    assert _all_gone([first])
    assert fleet.poll(0.1) == []
    assert not _is_gone(second)


def test_closing_leaves_no_process_not_even_a_frozen_or_a_busy_one(
    fleet: ProcessFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_fleet, "_CLOSE_DEADLINE_S", 1.0)
    _blocking_checkpoint(tmp_path)
    pids = _start(fleet, 0, 1, 2)
    fleet.call(_keeper(1), "load", 0, str(tmp_path), checkpoint.directory(1))
    os.kill(pids[2], signal.SIGSTOP)
    fleet.close()
    assert [_is_gone(pid) for pid in pids] == [True] * 3
    fleet.close()


_DRIVER = """
import json, os, sys, time
from holdfast.launch.fleet import Address, Role
from holdfast.launch.process_fleet import ProcessFleet

fleet = ProcessFleet(preload=("holdfast.launch.process_fleet",))
root, ending = sys.argv[1:]
spec = {"run_tag": "run", "limit_bytes": 1 << 22, "buffers": 3, "lease_s": 60.0}
for node in (0, 1):
    fleet.start(Address(Role.KEEPER, node), node, {**spec, "node": node})
pids = []
while len(pids) < 2:
    pids += [report.result["pid"] for report in fleet.poll(0.05)]
fleet.call(Address(Role.KEEPER, 1), "load", 0, root, "step-00000001")
print(json.dumps(pids), flush=True)
if ending == "crash":
    raise RuntimeError("the driver crashes")
time.sleep(600)
"""


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Callable[[str], tuple[subprocess.Popen[str], list[int]]]]:
    """Start a driver of two keepers, one of which waits for its storage."""
    _blocking_checkpoint(tmp_path)
    started = list[subprocess.Popen[str]]()

    def start(ending: str) -> tuple[subprocess.Popen[str], list[int]]:
        command = [sys.executable, "-c", _DRIVER, str(tmp_path), ending]
        made = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        started.append(made)
        assert made.stdout is not None
        return made, json.loads(made.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.wait(_DEADLINE_S)
        assert process.stdout is not None
        process.stdout.close()


def test_when_the_driver_is_killed_all_its_processes_end_by_themselves(
    driver: Callable[[str], tuple[subprocess.Popen[str], list[int]]],
) -> None:
    process, pids = driver("sleep")
    children = _children(process.pid)
    assert len(children) >= 1  # the fork server at least
    assert not any(map(_is_gone, pids))
    process.kill()
    assert _all_gone([*pids, *children])


def test_a_driver_that_crashes_without_closing_ends_and_so_do_its_processes(
    driver: Callable[[str], tuple[subprocess.Popen[str], list[int]]],
) -> None:
    process, pids = driver("crash")
    assert process.wait(_DEADLINE_S) == 1
    assert _all_gone(pids)


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
