"""A fleet of forked processes on this host, without Ray: starts in tenths of a second.

A fork server imports torch and DeepSpeed once; every worker is forked from it, warm. Calls travel as
JSON over one socket pair per process. Every process ends itself when its socket closes, so none can outlive the
driver; memory that outlives the driver needs Ray's detached actors.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from holdfast.launch.fleet import Address, Completion, Draining, Lost, Report, Role
from holdfast.launch.hosts import Host, make_host
from holdfast.launch.protocol import CONTROL_METHODS, STORAGE_METHODS, describe_error

__all__ = ["ProcessFleet", "serve"]

logger = logging.getLogger(__name__)

_CLOSE_DEADLINE_S = 5.0
_MESSAGE_DEADLINE_S = 10
"""For the rest of a message that has begun, and for room for one."""
_WISHES = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
"""What a terminal, a scheduler or a service manager sends to all processes of a run when it means the driver."""


@dataclass(slots=True)
class _Member:
    process: BaseProcess
    pipe: Connection


def serve(host: Host, pipe: Connection) -> None:
    """Answer calls until the socket closes, then let the host hang up."""
    desk = _Desk(host, pipe)
    while True:
        try:
            call, method, args = json.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            break
        desk.take(call, method, args)
    host.hang_up()


class _Desk:
    """Answers calls: of each kind in order, of different kinds side by side."""

    def __init__(self, host: Host, pipe: Connection) -> None:
        self._host, self._pipe, self._sending = host, pipe, threading.Lock()
        self._main, self._storage, self._control = ThreadPoolExecutor(1), ThreadPoolExecutor(1), ThreadPoolExecutor(2)

    def take(self, call: int, method: str, args: Sequence[object]) -> None:
        storage_or_main = self._storage if method in STORAGE_METHODS else self._main
        lane = self._control if method in CONTROL_METHODS else storage_or_main
        lane.submit(self._answer, call, method, args)

    def _answer(self, call: int, method: str, args: Sequence[object]) -> None:
        try:
            reply = json.dumps([call, getattr(self._host, method)(*args), None])
        except BaseException as error:  # a process boundary: the caller learns of it as Completion.error
            reply = json.dumps([call, None, describe_error(error)])
        with self._sending, contextlib.suppress(OSError):  # the driver is gone: the reading loop ends this process
            self._pipe.send_bytes(reply.encode())  # more than one write, which must not mix with another thread's


class _Unbuilt:
    """In place of a host that could not be built: whatever it is asked, the answer is why."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def ready(self) -> NoReturn:
        raise self._error

    def hang_up(self) -> None:
        """There is nothing to free."""


def _run(role: str, spec: str, environment: Mapping[str, str], pipe: Connection) -> None:
    """Body of every process. Never returns: threads that are busy, or blocked for good, must not keep it alive.

    The fork server has the environment of the driver's first run; credentials and paths may have changed since.
    """
    try:
        os.environ.clear()
        os.environ.update(environment)
        _leave_wishes_to_driver(Role(role))
        serve(_build(role, spec), pipe)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _leave_wishes_to_driver(role: Role) -> None:
    """A keeper outlives them, because it holds what is to be saved. A worker runs the user's code, whose own processes
    must not inherit a SIGTERM that does nothing; the loss of a worker can be repaired."""
    for number in _WISHES if role is Role.KEEPER else _WISHES - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _WISHES)


def _build(role: str, spec: str) -> Host:
    try:
        return make_host(Role(role), json.loads(spec))
    except Exception as error:  # a process boundary: the driver learns of it when it asks whether the host is ready
        return _Unbuilt(error)


class ProcessFleet:
    """See :class:`holdfast.launch.fleet.Fleet`."""

    def __init__(self, preload: Sequence[str] = ("holdfast.launch.preload",)) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        self._members: dict[Address, _Member] = {}
        self._leaving: list[BaseProcess] = []
        self._next_call = 0
        self._forking = threading.Lock()
        # Python waits at its end for processes that wait for this one to close their sockets.
        atexit.register(self.close)

    def hosts(self, nodes: int) -> Sequence[str]:
        return ("localhost",) * nodes

    def host_of(self, target: Address) -> str:
        return "localhost"

    def draining(self) -> Mapping[int, Draining]:
        return {}

    def zones(self, nodes: int) -> Sequence[str]:
        return [""] * nodes

    def metrics_endpoints(self) -> Mapping[str, str]:
        return {}

    def meter(self) -> None:
        return None

    def unshared(self, marker: Path, word: str) -> list[str]:
        return []

    def adopt(self, run_tag: str) -> Sequence[Address]:
        return ()  # they end with their driver

    def start(self, target: Address, node: int, spec: Mapping[str, object]) -> int:
        ours, theirs = multiprocessing.Pipe()
        name = f"holdfast-{target.role.value}-{target.number}"
        process = self._context.Process(
            target=_run,
            args=(target.role.value, json.dumps(dict(spec)), dict(os.environ), theirs),
            name=name,
            daemon=False,
        )
        _limit_waiting(ours)
        self._members[target] = _Member(process, ours)
        threading.Thread(target=self._fork, args=(process, theirs), daemon=True).start()
        return self.call(target, "ready")

    def _fork(self, process: BaseProcess, theirs: Connection) -> None:
        """In a thread of its own: the first fork waits until the fork server has imported everything. The server, and
        through it every process until it decides for itself, inherits the thread's blocked signals."""
        try:
            with self._forking:
                signal.pthread_sigmask(signal.SIG_BLOCK, _WISHES)
                resource_tracker.ensure_running()  # an heir, too; Python unblocks SIGINT and SIGTERM behind its back
                signal.pthread_sigmask(signal.SIG_BLOCK, _WISHES)
                with _without_the_users_script():
                    process.start()
        except (EOFError, OSError) as error:  # the server has ended; the next start makes a new one
            logger.warning("%s could not be started: %r", process.name, error)
        finally:
            theirs.close()  # the process has its own copy; if there is no process, poll sees the end of the line

    @contextlib.contextmanager
    def _nobody_forks(self) -> Iterator[None]:
        """multiprocessing looks after all processes whenever it starts one, and an exit code can be read only once."""
        is_alone = self._forking.acquire(timeout=_CLOSE_DEADLINE_S)
        try:
            yield
        finally:
            if is_alone:
                self._forking.release()

    def call(self, target: Address, method: str, *args: object) -> int:
        self._next_call += 1
        member = self._members.get(target)
        if member is not None:  # otherwise it is reported as lost already and the call never completes
            with contextlib.suppress(OSError):  # poll reports the loss
                member.pipe.send_bytes(json.dumps([self._next_call, method, list(args)]).encode())
        return self._next_call

    def poll(self, timeout_s: float) -> list[Report]:
        if not self._members:
            time.sleep(timeout_s)
            return []
        readable = wait([member.pipe for member in self._members.values()], timeout_s)
        reports: list[Report] = []
        for target, member in list(self._members.items()):
            if member.pipe in readable:
                reports += self._read(target, member)
        return reports

    def _read(self, target: Address, member: _Member) -> list[Report]:
        reports: list[Report] = []
        try:
            while member.pipe.poll():
                call, result, error = json.loads(member.pipe.recv_bytes())
                reports.append(Completion(call, target, result, error))
        except (EOFError, OSError):
            reports.append(Lost(target, self._bury(target)))
        return reports

    def _bury(self, target: Address) -> str:
        member = self._members.pop(target)
        member.pipe.close()
        if member.process.pid is None:
            return "the process could not be started"
        with self._nobody_forks():
            _end(member.process, _CLOSE_DEADLINE_S)
            code = member.process.exitcode
        if code is not None and code < 0:
            return f"killed by {signal.Signals(-code).name} (pid {member.process.pid})"
        return f"exited with code {code} (pid {member.process.pid})"

    def kill(self, target: Address) -> None:
        if target in self._members:
            process = self._members[target].process
            if process.pid is not None:  # one that starts later ends at once, because its line is dead
                process.kill()
            self._bury(target)

    def release(self, target: Address) -> None:
        if target in self._members:
            member = self._members.pop(target)
            member.pipe.close()
            self._leaving.append(member.process)

    def close(self) -> None:
        for target in list(self._members):
            self.release(target)
        end = time.monotonic() + _CLOSE_DEADLINE_S
        with self._nobody_forks():
            for process in self._leaving:
                if process.pid is not None:
                    _end(process, max(0.0, end - time.monotonic()))
        self._leaving.clear()
        atexit.unregister(self.close)


@contextlib.contextmanager
def _without_the_users_script() -> Iterator[None]:
    """multiprocessing lets a new process import the file that is ``__main__`` here. Nothing of it is needed there, and
    a script that calls ``holdfast.train`` without asking for its name would train again in every process."""
    main = sys.modules["__main__"]
    stand_in = ModuleType("__main__")
    stand_in.__dict__.update({key: value for key, value in vars(main).items() if key not in ("__file__", "__spec__")})
    sys.modules["__main__"] = stand_in
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _limit_waiting(pipe: Connection) -> None:
    """A process may freeze in the middle of a message; whoever reads or writes the rest gets an OSError in the end."""
    limit = struct.pack("ll", _MESSAGE_DEADLINE_S, 0)  # struct timeval
    with socket.socket(fileno=os.dup(pipe.fileno())) as line:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            line.setsockopt(socket.SOL_SOCKET, option, limit)


def _end(process: BaseProcess, patience_s: float) -> None:
    """Wait for a process that is about to end; one that does not is killed."""
    process.join(patience_s)
    if process.is_alive():
        process.kill()
        process.join(_CLOSE_DEADLINE_S)
