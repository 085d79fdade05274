"""What happens inside a fleet's process, without a process: lanes, answers, and the end."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import pytest

from holdfast.errors import Abort, ConfigurationError, InvariantViolation
from holdfast.launch import process_fleet
from holdfast.launch.fleet import Address, Lost, Role
from holdfast.launch.hosts import KeeperHost, make_host
from holdfast.launch.process_fleet import ProcessFleet, _Member, serve
from holdfast.launch.protocol import CONTROL_METHODS, STORAGE_METHODS, describe_error

_DEADLINE_S = 20.0


class _Host:
    """Blocks in whatever method the test holds up."""

    def __init__(self) -> None:
        self.gates: dict[str, threading.Event] = {}
        self.begun: list[str] = []
        self.hung_up = 0

    def ready(self) -> dict[str, object]:
        return {"pid": 1}

    def hang_up(self) -> None:
        self.hung_up += 1

    def _pass(self, name: str, *args: object) -> list[object]:
        self.begun.append(name)
        gate = self.gates.get(name)
        assert gate is None or gate.wait(_DEADLINE_S)
        return [name, *args]

    def verify(self, *args: object) -> list[object]:
        return self._pass("verify", *args)

    def load(self, *args: object) -> list[object]:
        return self._pass("load", *args)

    def persist(self, *args: object) -> list[object]:
        return self._pass("persist", *args)

    def pulse(self, *args: object) -> list[object]:
        return self._pass("pulse", *args)

    def leave(self) -> NoReturn:
        raise Abort("epoch 3 has ended")

    def unspeakable(self) -> object:
        return object()

    def long(self, letter: str) -> str:
        return letter * 1_000_000


class _Line:
    """The driver's end, and a host that serves the other one in a thread."""

    def __init__(self) -> None:
        self.host = _Host()
        self.pipe, self._theirs = Pipe()
        self._thread = threading.Thread(target=serve, args=(self.host, self._theirs))
        self._thread.start()
        self._next = 0

    def call(self, method: str, *args: object) -> int:
        self._next += 1
        self.pipe.send_bytes(json.dumps([self._next, method, list(args)]).encode())
        return self._next

    def answer(self) -> tuple[int, Any, str | None]:
        assert self.pipe.poll(_DEADLINE_S), f"no answer; begun are {self.host.begun}"
        call, result, error = json.loads(self.pipe.recv_bytes())
        return call, result, error

    def hold_up(self, method: str) -> Callable[[], None]:
        """Returns what lets it go on."""
        gate = self.host.gates[method] = threading.Event()
        return gate.set

    def close(self) -> None:
        for gate in self.host.gates.values():
            gate.set()
        self.pipe.close()
        self._thread.join(_DEADLINE_S)
        assert not self._thread.is_alive()
        self._theirs.close()


@pytest.fixture
def line() -> Iterator[_Line]:
    made = _Line()
    yield made
    made.close()


# -- lanes ------------------------------------------------------------------------------------------------------------


def test_calls_are_answered_in_order(line: _Line) -> None:
    calls = [line.call("verify", n) for n in range(20)]
    assert [line.answer() for _ in calls] == [(call, ["verify", n], None) for n, call in enumerate(calls)]


def test_a_long_call_holds_up_ordinary_calls_but_no_pulse(line: _Line) -> None:
    go_on = line.hold_up("load")
    load, verify, pulse = line.call("load"), line.call("verify"), line.call("pulse")
    assert line.answer()[0] == pulse
    assert not line.pipe.poll(0.0)
    go_on()
    assert [line.answer()[0], line.answer()[0]] == [load, verify]


def test_a_checkpoint_that_is_being_written_holds_up_nothing_but_the_next_one(line: _Line) -> None:
    go_on = line.hold_up("persist")
    first, second = line.call("persist", 1), line.call("persist", 2)
    others = [line.call(method) for method in ("verify", "load", "pulse")]
    assert sorted(line.answer()[0] for _ in others) == others
    assert line.host.begun.count("persist") == 1
    go_on()
    assert [line.answer()[:2], line.answer()[:2]] == [(first, ["persist", 1]), (second, ["persist", 2])]


def test_a_method_has_one_lane() -> None:
    assert not CONTROL_METHODS & STORAGE_METHODS


# -- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("leave", "Abort: epoch 3 has ended"),
        ("unspeakable", "TypeError: Object of type object is not JSON serializable"),
        ("no_such_method", "AttributeError: '_Host' object has no attribute 'no_such_method'"),
        ("long", "TypeError: _Host.long() missing 1 required positional argument: 'letter'"),
    ],
)
def test_whatever_a_method_raises_is_an_answer_and_the_next_call_is_served(line: _Line, method: str, says: str) -> None:
    call = line.call(method)
    answered, result, error = line.answer()
    assert (answered, result, (error or "").splitlines()[0]) == (call, None, says)
    line.call("verify")
    assert line.answer()[1] == ["verify"]


def test_long_answers_of_several_threads_do_not_mix(line: _Line, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("persist", "pulse"):
        monkeypatch.setattr(line.host, name, line.host.long)
    for _ in range(5):
        calls = {
            line.call(method, letter): letter for method, letter in (("long", "a"), ("persist", "b"), ("pulse", "c"))
        }
        for _ in calls:
            call, result, _ = line.answer()
            assert result == calls[call] * 1_000_000


def test_a_host_that_has_no_driver_any_more_hangs_up_once_and_finishes_what_it_is_at() -> None:
    line = _Line()
    line.hold_up("verify")
    line.call("verify")
    line.close()
    assert line.host.hung_up == 1
    assert line.host.begun == ["verify"]


# -- the process ------------------------------------------------------------------------------------------------------


class _Exited(BaseException):
    pass


@pytest.fixture
def exit_code(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the body of a process exits with, without the process."""
    codes = list[int]()

    def leave(code: int) -> NoReturn:
        codes.append(code)
        raise _Exited

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return codes


def _run_alone(monkeypatch: pytest.MonkeyPatch, host: object) -> None:
    monkeypatch.setattr(process_fleet, "make_host", lambda role, spec: host)
    ours, theirs = Pipe()
    ours.close()
    with pytest.raises(_Exited):
        process_fleet._run("keeper", "{}", os.environ.copy(), theirs)
    theirs.close()


def test_a_process_ends_well_when_its_driver_is_gone(monkeypatch: pytest.MonkeyPatch, exit_code: list[int]) -> None:
    host = _Host()
    _run_alone(monkeypatch, host)
    assert (exit_code, host.hung_up) == ([0], 1)


def test_a_process_has_the_environment_that_its_driver_has_now(
    monkeypatch: pytest.MonkeyPatch, exit_code: list[int]
) -> None:
    seen = dict[str, str]()
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": "renewed"}
    monkeypatch.setattr(os, "environ", {"OF_THE_FORK_SERVER": "1"})
    monkeypatch.setattr(process_fleet, "make_host", lambda role, spec: seen.update(os.environ) or _Host())
    ours, theirs = Pipe()
    ours.close()
    with pytest.raises(_Exited):
        process_fleet._run("keeper", "{}", environment, theirs)
    assert (seen, exit_code) == (environment, [0])


def test_a_process_that_cannot_hang_up_ends_all_the_same(
    monkeypatch: pytest.MonkeyPatch, exit_code: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    host = _Host()
    monkeypatch.setattr(host, "hang_up", host.leave)
    _run_alone(monkeypatch, host)
    assert exit_code == [1]
    assert "Abort: epoch 3 has ended" in capsys.readouterr().err


def test_a_host_that_cannot_be_built_says_why_when_it_is_asked(exit_code: list[int]) -> None:
    ours, theirs = Pipe()
    ours.send_bytes(b'[1, "ready", []]')
    thread = threading.Thread(target=_until_exited, args=(theirs,))
    thread.start()
    assert ours.poll(_DEADLINE_S)
    call, result, error = json.loads(ours.recv_bytes())
    assert (call, result, error.splitlines()[0]) == (1, None, "KeyError: 'node'")
    ours.close()
    thread.join(_DEADLINE_S)
    theirs.close()
    assert exit_code == [0]


def _until_exited(pipe: Connection) -> None:
    with pytest.raises(_Exited):
        process_fleet._run("keeper", "{}", os.environ.copy(), pipe)


# -- the driver's side ------------------------------------------------------------------------------------------------


class _Stubborn:
    """A process that has let its socket go and does not end by itself."""

    pid, exitcode = 4711, None

    def __init__(self) -> None:
        self.waited = list[float]()

    def join(self, timeout: float) -> None:
        self.waited.append(timeout)

    def is_alive(self) -> bool:
        return self.exitcode is None

    def kill(self) -> None:
        self.exitcode = -signal.SIGKILL


def test_a_process_without_a_socket_does_not_live_on_unnoticed() -> None:
    fleet, process, target = ProcessFleet(preload=()), _Stubborn(), Address(Role.KEEPER, 0)
    ours, theirs = Pipe()
    fleet._members[target] = _Member(process, ours)  # type: ignore[arg-type]  # stands for a process
    theirs.close()
    assert fleet.poll(0.0) == [Lost(target, "killed by SIGKILL (pid 4711)")]
    assert not process.is_alive()
    assert all(timeout > 0 for timeout in process.waited)
    fleet.close()


def test_a_process_that_freezes_in_the_middle_of_an_answer_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_fleet, "_MESSAGE_DEADLINE_S", 1)
    fleet, process, target = ProcessFleet(preload=()), _Stubborn(), Address(Role.KEEPER, 0)
    ours, theirs = Pipe()
    process_fleet._limit_waiting(ours)
    fleet._members[target] = _Member(process, ours)  # type: ignore[arg-type]  # stands for a process
    os.write(theirs.fileno(), b"\x00\x00\x10\x00 the rest never comes")
    assert fleet.poll(0.0) == [Lost(target, "killed by SIGKILL (pid 4711)")]
    theirs.close()
    fleet.close()


def test_closing_waits_a_bounded_time_and_then_kills() -> None:
    fleet, process, target = ProcessFleet(preload=()), _Stubborn(), Address(Role.KEEPER, 0)
    ours, theirs = Pipe()
    fleet._members[target] = _Member(process, ours)  # type: ignore[arg-type]  # stands for a process
    fleet.close()
    assert not process.is_alive()
    assert 0 < sum(process.waited) <= 2 * process_fleet._CLOSE_DEADLINE_S
    theirs.close()


# -- hosts ------------------------------------------------------------------------------------------------------------


def test_a_keeper_is_built_from_json_values() -> None:
    spec = {"node": 3, "run_tag": "run", "limit_bytes": 1 << 22, "buffers": 4, "lease_s": 60}
    host = make_host(Role.KEEPER, json.loads(json.dumps(spec)))
    assert isinstance(host, KeeperHost)
    assert host.ready()["pid"] == os.getpid()
    assert host.pulse({})["node"] == 3
    assert host.admit(0)["rank"] == 0
    host.hang_up()
    assert host.inventory()["held"] == {}


def test_an_error_is_described_by_its_name_and_where_it_happened() -> None:
    try:
        raise InvariantViolation("we are wrong")
    except InvariantViolation as error:
        described = describe_error(error)
    head, *rest = described.splitlines()
    assert head == "InvariantViolation: we are wrong"
    assert "test_process_fleet.py" in "\n".join(rest)


def test_an_error_of_the_user_is_described_by_its_message_alone() -> None:
    assert describe_error(ConfigurationError(["a=1 must be 2", "b=3 must be 4"])) == (
        "ConfigurationError: a=1 must be 2\nb=3 must be 4"
    )
