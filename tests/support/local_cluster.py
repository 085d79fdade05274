"""Ranks as real processes of this host, forked warm from a server, with a deadline on everything they do."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

__all__ = ["LocalCluster", "Member", "RanksFailed"]

_PRELOAD = ["holdfast.launch.preload", "pytest"]
"""What the fork server imports, once: torch and DeepSpeed take seconds."""
_GRACE_S = 3.0
"""What the others get to fail too, once one rank has."""


class RanksFailed(AssertionError):
    """Some ranks raised, died or did not finish; the message shows what each of them left."""


@dataclass(frozen=True, slots=True)
class Member:
    """What a rank knows."""

    rank: int
    world: int
    directory: Path
    """Shared by all ranks, empty at first."""
    deadline_s: float

    def rendezvous(self, name: str = "epoch") -> str:
        """A file where ranks can meet, once."""
        return str(self.directory / f"{name}.rendezvous")

    @property
    def log(self) -> Path:
        """Where this rank's standard output and standard error go."""
        return self.directory / f"rank{self.rank}.log"


class LocalCluster:
    """Runs a function on every rank. Functions and results are pickled, and functions are found by their name."""

    def __init__(self, deadline_s: float = 40.0) -> None:
        self._deadline_s = deadline_s

    def run(self, body: Callable[..., Any], world: int, *args: object, lost: Collection[int] = ()) -> list[Any]:
        """``body(member, *args)`` on every rank at once; what they return, by rank.

        Ranks in ``lost`` may die or freeze: nobody waits for them, and their result is None. No process is left.

        Raises: RanksFailed with each rank's traceback, or with its stack when the deadline has passed.
        """
        context = _warm_context()
        with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
            members = [Member(rank, world, Path(directory), self._deadline_s) for rank in range(world)]
            ranks = [_Rank(context, member, body, args) for member in members]
            try:
                for rank in ranks:
                    rank.process.start()
                    rank.theirs.close()
                _await([rank for number, rank in enumerate(ranks) if number not in lost], self._deadline_s)
            finally:
                failures = [rank.end() for rank in ranks]
        shown = [f"rank {number} {why}" for number, why in enumerate(failures) if why and number not in lost]
        if shown:
            raise RanksFailed("\n".join(shown))
        return [None if number in lost else rank.result for number, rank in enumerate(ranks)]


class _Rank:
    """The driver's side of one process."""

    def __init__(self, context: Any, member: Member, body: Callable[..., Any], args: tuple[object, ...]) -> None:
        self.pipe, self.theirs = context.Pipe(duplex=False)
        # torch would put tensors into shared memory when multiprocessing pickles them.
        self.process: BaseProcess = context.Process(target=_run, args=(self.theirs, member, body, pickle.dumps(args)))
        self._log = member.log
        self.result: Any = None
        self.is_done, self._failure = False, ""

    @property
    def has_failed(self) -> bool:
        return bool(self._failure)

    def read(self) -> None:
        self.is_done = True
        try:
            self.result, self._failure = pickle.loads(self.pipe.recv_bytes())
        except EOFError:
            self._failure = "died"

    def end(self) -> str:
        """Kill it if it still lives. How it failed, or nothing."""
        if self.process.pid is None:
            return "was never started"
        if self.is_done:
            self.process.join(_GRACE_S)
        self.process.kill()
        self.process.join()
        failure = self._failure if self.is_done else "did not finish in time"
        if failure:
            output = self._log.read_text(errors="replace") if self._log.exists() else ""
            failure = f"{failure}, exit code {self.process.exitcode}, having printed:\n{output}"
        self.process.close()
        self.pipe.close()
        return failure


def _await(ranks: list[_Rank], deadline_s: float) -> None:
    end = time.monotonic() + deadline_s
    while waiting := [rank for rank in ranks if not rank.is_done]:
        ready = wait([rank.pipe for rank in waiting], timeout=max(0.0, end - time.monotonic()))
        if not ready:
            return
        for rank in waiting:
            if rank.pipe in ready:
                rank.read()
                if rank.has_failed:
                    end = min(end, time.monotonic() + _GRACE_S)


def _run(pipe: Connection, member: Member, body: Callable[..., Any], args: bytes) -> None:
    """Body of every process. Here too, warnings are errors, but for those that the package ignores."""
    log = os.open(member.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    warnings.simplefilter("error", append=True)
    gc.freeze()  # collecting what the server imported would copy every page of it
    faulthandler.dump_traceback_later(member.deadline_s - 1.0)
    try:
        answer = pickle.dumps((body(member, *pickle.loads(args)), ""))
    except BaseException:  # a process boundary: the driver learns of it
        answer = pickle.dumps((None, f"raised:\n{traceback.format_exc()}"))
    pipe.send_bytes(answer)
    pipe.close()
    os._exit(0)  # threads that are blocked for good must not keep it


_server: int | None = None


def _warm_context() -> Any:
    """Python has one fork server per process: another's, which may lack what ranks need, is replaced."""
    global _server
    context, server = multiprocessing.get_context("forkserver"), forkserver._forkserver
    if server._forkserver_pid is None or server._forkserver_pid != _server:
        server._stop()
        context.set_forkserver_preload(_PRELOAD)
        server.ensure_running()
        _server = server._forkserver_pid
    return context
