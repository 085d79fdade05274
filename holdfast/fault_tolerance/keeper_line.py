"""A loop's line to its keeper: found at its socket or started, asked without waiting for the answer."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, cast

from holdfast import knobs
from holdfast.errors import ConfigurationError, SnapshotError
from holdfast.fault_tolerance.arena import ArenaRef
from holdfast.fault_tolerance.loop_keeper import Spec, peer_of

__all__ = ["KeeperLine"]

_START_S = 120.0
"""A keeper imports NumPy and Arrow, on a busy machine slowly."""
_RETRY_S = 0.02
_ANSWER_S = 30.0
_END_S = 10.0


class KeeperLine:
    """The connection of one owner. Used by one thread. Raises: SnapshotError once the keeper is gone."""

    def __init__(self, spec: Spec) -> None:
        """Raises: ConfigurationError when another process owns the keeper."""
        self._child: subprocess.Popen[bytes] | None = None
        line = _connect(spec.name)
        self._line = line or self._start(spec)
        self._rest = b""
        self.is_busy, self._is_dead = False, False
        """Whether a question is open, and whether no answer can come any more."""
        try:
            self.answer(_ANSWER_S)  # the keeper speaks first: whether this process may own it
            told = cast(dict[str, Any], self.ask("hello", spec.keep_last, spec.lease_s, deadline_s=_ANSWER_S))
        except SnapshotError as error:
            self._line.close()
            raise ConfigurationError(str(error)) from error
        self.arena = ArenaRef(**told["arena"])
        self.epoch = int(told["epoch"])

    @property
    def pid(self) -> int:
        return self.arena.pid

    def ask(self, what: str, *args: object, deadline_s: float) -> object:
        """The answer, waited for."""
        self.send(what, *args)
        return self.answer(deadline_s)

    def send(self, what: str, *args: object) -> None:
        """Ask; the answer is for :meth:`answer`."""
        try:
            self._line.sendall(json.dumps([what, *args]).encode() + b"\n")
        except OSError as error:
            self._is_dead = True
            raise SnapshotError(f"the keeper is gone: {error}") from error
        self.is_busy = True

    def has_answer(self) -> bool:
        """Whether :meth:`answer` returns, or raises, at once."""
        return self.is_busy and (b"\n" in self._rest or bool(wait([self._line], 0)))

    def answer(self, deadline_s: float) -> object:
        """What the open question was answered with. Raises: SnapshotError if the answer is an error, or none comes."""
        try:
            told = json.loads(self._read_line(time.monotonic() + deadline_s))
        except SnapshotError:
            self._is_dead = True  # a late answer would be taken for that to another question
            raise
        finally:
            self.is_busy = False
        if "error" in told:
            raise SnapshotError(told["error"])
        return told["result"]

    @property
    def is_alive(self) -> bool:
        """As far as can be seen without asking: its end of the line is open."""
        if self._is_dead:
            return False
        return self.is_busy or not wait([self._line], 0)

    def leave(self) -> None:
        """Let go; the keeper waits for the next owner."""
        self._line.close()
        if self._child is not None and self._child.poll() is None:
            self._child.returncode = 0  # not ours to wait for: it is meant to outlive this process
        self._child = None

    def end(self) -> None:
        """Tell the keeper to free its memory and end, and wait until it has."""
        try:
            self.ask("end", deadline_s=_END_S)
            self._line.settimeout(_END_S)
            self._peek()
            if self._child is not None:
                self._child.wait(_END_S)
        except (SnapshotError, OSError, subprocess.TimeoutExpired):  # it is gone, or ends by its lease
            pass
        self.leave()

    def _peek(self) -> bytes:
        try:
            return self._line.recv(1, socket.MSG_PEEK)
        except OSError:
            return b""

    def _read_line(self, until: float) -> bytes:
        while b"\n" not in self._rest:
            try:
                self._line.settimeout(max(until - time.monotonic(), 0.001))
                part = self._line.recv(1 << 16)
            except TimeoutError as error:
                raise SnapshotError("the keeper does not answer") from error
            except OSError as error:
                raise SnapshotError(f"the keeper is gone: {error}") from error
            if not part:
                raise SnapshotError("the keeper is gone: it has ended or was killed")
            self._rest += part
        first, _, self._rest = self._rest.partition(b"\n")
        return first

    def _start(self, spec: Spec) -> socket.socket:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "holdfast.fault_tolerance.loop_keeper", json.dumps(asdict(spec))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # who reads the loop's output must not wait for the end of its keeper
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is not for the keeper
            cwd="/",
            env={**os.environ, "PYTHONPATH": _path()},
        )
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            line = _connect(spec.name)
            if line is not None:
                return line
            if self._child.poll() not in (None, 0):
                break
            time.sleep(_RETRY_S)
        self._child.kill()
        code = self._child.wait(_END_S)
        raise SnapshotError(f"no keeper could be started within {_START_S:g} s; its exit code is {code}")


def _path() -> str:
    """Where ``holdfast`` is found, whatever the loop has done to its path, and then what was there before."""
    return os.pathsep.join([str(Path(__file__).resolve().parents[2]), *knobs.import_path()])


def _connect(name: str) -> socket.socket | None:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        line.connect(b"\0" + name.encode())
    except OSError:
        line.close()
        return None
    if peer_of(line)[1] != os.getuid():
        line.close()
        raise ConfigurationError(f"somebody else's process {peer_of(line)[0]} answers in place of the keeper")
    return line
