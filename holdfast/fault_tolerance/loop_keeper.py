"""The keeper of somebody else's loop: a process of this host that holds its versions and outlives it for a while.

``python -m holdfast.fault_tolerance.loop_keeper SPEC`` listens at an abstract Unix socket, which leaves nothing in any
file system and which no two processes can have at once. One owner at a time talks to it, a JSON value a line. The owner
is gone when its process has ended, whoever else has inherited its socket. Without an owner for ``lease_s`` seconds the
keeper makes the newest version durable and ends. It never imports torch.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from holdfast.clock import SystemClock
from holdfast.errors import SnapshotError
from holdfast.fault_tolerance import loop_checkpoints as checkpoints
from holdfast.fault_tolerance.keeper import Keeper
from holdfast.fault_tolerance.storage import Storage, open_storage

__all__ = ["Spec", "main", "peer_of"]

logger = logging.getLogger(__name__)

_BUFFERS = 3
_LOOK_S = 0.2
"""Between two looks at whether the owner lives."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What a keeper is started with; JSON values."""

    name: str
    """Of the socket, without the zero that makes it abstract."""
    identity: str
    """Of the place, see ``loop_checkpoints.identify``."""
    uri: str
    """Where durable checkpoints go."""
    limit_bytes: int
    keep_last: int
    lease_s: float


def peer_of(line: socket.socket) -> tuple[int, int]:
    """Process and user at the other end; the process is 0 when it is in a container that this one cannot see."""
    pid, uid, _ = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return pid, uid


class _Owner:
    def __init__(self, pid: int) -> None:
        self.pid, self._left = pid, False
        self._pidfd = os.pidfd_open(pid) if pid else -1

    @property
    def is_there(self) -> bool:
        has_died = self._pidfd >= 0 and bool(wait([self._pidfd], 0))
        return not (self._left or has_died)

    def leave(self) -> None:
        """Its connection is closed, so it cannot come back as the same owner."""
        self._left = True
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._pidfd = -1


class _LoopKeeper:
    def __init__(self, spec: Spec, listener: socket.socket) -> None:
        self._spec, self._listener = spec, listener
        self._keep_last, self._lease_s = spec.keep_last, spec.lease_s
        self._storage: Storage = open_storage(spec.uri)
        self._keeper = Keeper(
            0,
            spec.name[-32:],
            limit_bytes=spec.limit_bytes,
            buffers=_BUFFERS,
            lease_s=spec.lease_s,
            clock=SystemClock(),
        )
        self._ref = self._keeper.admit(checkpoints.RANK)
        self._epoch = 0
        self._owner: _Owner | None = None
        self._lock = threading.Lock()
        self._saving = threading.Lock()
        self._is_ended = threading.Event()

    def run(self) -> None:
        """Until the owner says so, or nobody has owned this for as long as the lease."""
        deserted_s = time.monotonic()
        while not self._is_ended.is_set() and time.monotonic() - deserted_s < self._lease_s:
            if wait([self._listener], _LOOK_S):
                line, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(line,), daemon=True).start()
            if self._is_owned:
                deserted_s = time.monotonic()
        self._listener.close()
        if not self._is_ended.is_set():
            self._keep_what_is_left()
        self._keeper.close()

    @property
    def _is_owned(self) -> bool:
        with self._lock:
            return self._owner is not None and self._owner.is_there

    # -- owners ---------------------------------------------------------------------------------------------------

    def _serve(self, line: socket.socket) -> None:
        with line, line.makefile("rwb") as file:
            owner = self._admit(line)
            if isinstance(owner, str):
                _say(file, {"error": owner})
                return
            try:
                with suppress(OSError, ValueError):  # the owner is gone, in the middle of a line perhaps
                    _say(file, {"result": owner.pid})
                    for request in file:
                        _say(file, self._answer(*json.loads(request)))
            finally:
                with self._lock:
                    owner.leave()

    def _admit(self, line: socket.socket) -> _Owner | str:
        """The new owner, or why it is none."""
        pid, uid = peer_of(line)
        if uid != os.getuid():
            return f"this keeper belongs to user {os.getuid()}"
        with self._lock:
            if self._owner is not None and self._owner.is_there:
                return f"{self._spec.uri} is in use by process {self._owner.pid}; wait for it or use another place"
            try:
                self._owner = _Owner(pid)
            except OSError as error:  # it has died since it asked
                return f"process {pid} cannot own this: {error}"
            return self._owner

    def _answer(self, what: str, *args: Any) -> dict[str, object]:
        try:
            return {"result": getattr(self, f"_{what}")(*args)}
        except SnapshotError as error:
            return {"error": str(error)}

    # -- what owners ask for --------------------------------------------------------------------------------------

    def _hello(self, keep_last: int, lease_s: float) -> dict[str, object]:
        """Where the memory is. Whoever owned it before must not write any more."""
        self._keep_last, self._lease_s = keep_last, lease_s
        self._epoch += 1
        self._keeper.fence(self._epoch)
        return {"arena": self._ref, "epoch": self._epoch}

    def _save(self, version: int) -> int:
        with self._saving:
            checkpoints.save(self._keeper, self._storage, self._spec.uri, version, self._keep_last)
        return version

    def _end(self) -> None:
        self._is_ended.set()

    def _keep_what_is_left(self) -> None:
        """Nobody came back. A place that has been deleted since, or made anew, is nobody's any more."""
        held = self._keeper.inventory()["held"]
        assert isinstance(held, dict)
        versions = [int(version["version"]) for version in held[checkpoints.RANK]]
        with suppress(SnapshotError):  # nobody is left who could be told
            if versions and checkpoints.identify(self._storage, make=False) == self._spec.identity:
                self._save(versions[0])


def _say(file: Any, answer: dict[str, object]) -> None:
    file.write(json.dumps(answer).encode() + b"\n")
    file.flush()


def main(words: Sequence[str]) -> None:
    """Serve, unless there is such a keeper already."""
    spec = Spec(**json.loads(words[0]))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with listener, suppress(KeyboardInterrupt):
        try:
            listener.bind(b"\0" + spec.name.encode())
        except OSError:  # another process has started one at the same moment
            return
        listener.listen()
        _LoopKeeper(spec, listener).run()


if __name__ == "__main__":
    main(sys.argv[1:])
