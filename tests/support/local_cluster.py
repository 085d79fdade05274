"""Ranks as real processes of this host, forked warm from a server, with a deadline on everything they do."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

__all__ = ["LocalCluster", "Member", "RanksFailed"]

_PRELOAD = ["holdfast.launch.preload"]
"""What the fork server imports, once; torch and DeepSpeed take seconds."""


class RanksFailed(AssertionError):
    """Some ranks raised, died or did not finish; the message shows what each of them left."""


@dataclass(frozen=True, slots=True)
class Member:
    """What a rank of a cluster knows."""

    rank: int
    world: int
    directory: Path
    """Shared by all ranks, empty at first."""
    deadline_s: float

    def rendezvous(self, name: str = "epoch") -> str:
        """A file where the ranks can meet, once."""
        return str(self.directory / name)

    @property
    def log(self) -> Path:
        """Where this rank's standard output and standard error go."""
        return self.directory / f"rank{self.rank}.log"


class LocalCluster:
    """Runs a function on every rank. Functions and results are pickled, so functions are found by their name."""

    def __init__(self, deadline_s: float = 40.0) -> None:
        self._deadline_s = deadline_s
        self._context = multiprocessing.get_context("forkserver")
        forkserver._forkserver._stop()  # one that others use may lack what the ranks need, or outlive its usefulness
        self._context.set_forkserver_preload(_PRELOAD)

    def close(self) -> None:
        """End the server."""
        forkserver._forkserver._stop()

    def run(
        self, body: Callable[..., Any], world: int, *args: object, lost: Collection[int] = (), setting: str = ""
    ) -> list[Any]:
        """``body(member, *args)`` on every rank at once; what they return, by rank.

        Ranks in ``lost`` are not waited for: they may die or freeze, and their result is None. No process is left.

        Raises: RanksFailed with every rank's traceback, or its stack when the deadline has passed.
        """
        with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
            members = [Member(rank, world, Path(directory), self._deadline_s) for rank in range(world)]
            ranks = [_Rank(self._context.Pipe(duplex=False), m.log) for m in members]
            try:
                for rank, member in zip(ranks, members, strict=True):
                    rank.start(self._context, member, body, args)
                self._await([rank for number, rank in enumerate(ranks) if number not in lost])
            finally:
                for rank in ranks:
                    rank.end()
            failed = {n: r.failure for n, r in enumerate(ranks) if r.failure and n not in lost}
            if failed:
                raise RanksFailed("\n".join(f"rank {n} {why}" for n, why in failed.items()))
            return [rank.result for rank in ranks]

    def _await(self, ranks: list[_Rank]) -> None:
        """Until all have answered or one has failed, when the others get a moment to fail too."""
        end = time.monotonic() + self._deadline_s
        while open_ranks := [rank for rank in ranks if rank.is_running]:
            if not (ready := wait([rank.pipe for rank in open_ranks], timeout=max(0.0, end - time.monotonic()))):
                return
            for rank in open_ranks:
                if rank.pipe in ready:
                    rank.read()
                    if rank.failure:
                        end = min(end, time.monotonic() + 3.0)


class _Rank:
    """The driver's side of one process."""

    def __init__(self, ends: tuple[Connection, Connection], log: Path) -> None:
        self.pipe, self._theirs = ends
        self._log = log
        self._process: BaseProcess | None = None
        self.is_running = True
        self.result: Any = None
        self.failure = ""

    def start(self, context: Any, member: Member, body: Callable[..., Any], args: tuple[object, ...]) -> None:
        self._process = context.Process(target=_run, args=(self._theirs, member, body, args))
        self._process.start()
        self._theirs.close()

    def read(self) -> None:
        self.is_running = False
        try:
            self.result, self.failure = self.pipe.recv()
        except EOFError:  # it died without a word
            self.failure = "died"

    def end(self) -> None:
        """Kill it if it still lives, and write down how it ended."""
        if self._process is None:
            return
        if self.is_running and not self.failure:
            self.failure = "did not finish in time"
        if self.failure:
            self._process.kill()
        self._process.join(5.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        if self.failure:
            with suppress(FileNotFoundError):
                output = self._log.read_text(errors="replace")
                self.failure += f" (exit code {self._process.exitcode}), having printed:\n{output}"
        self._process.close()
        self.pipe.close()


def _run(pipe: Connection, member: Member, body: Callable[..., Any], args: tuple[object, ...]) -> None:
    """Body of every process. Warnings are errors here too."""
    descriptor = os.open(member.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    warnings.simplefilter("error", append=True)  # behind what the package itself filters
    faulthandler.dump_traceback_later(member.deadline_s - 1.0, file=2)  # type: ignore[arg-type]  # a descriptor is one
    try:
        pipe.send((body(member, *args), ""))
    except BaseException:  # a process boundary: the driver learns of it
        pipe.send((None, f"raised:\n{traceback.format_exc()}"))
    faulthandler.cancel_dump_traceback_later()
    pipe.close()
    os._exit(0)  # threads that are blocked for good must not keep it
