"""What a test session leaves behind: processes that still run, and shared memory that nobody uses any more.

Processes started by tests carry a mark in their environment, which they inherit however far they detach themselves:
Ray's daemons and actors, keepers, the workers of a fork server. Forked children that never called exec lack
it; they are known by their parent.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import psutil

__all__ = ["MARK", "orphaned_memory", "running", "shared_memory", "wait_for_end"]

MARK = "HOLDFAST_TEST_SESSION"
_SHM = Path("/dev/shm")


def running(mark: str) -> dict[int, str]:
    """Process number and command line of what this session has started and has not ended."""
    children = {process.pid for process in psutil.Process().children(recursive=True)}
    found = {}
    for process in psutil.process_iter():
        try:
            ours = process.pid in children or process.environ().get(MARK) == mark
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = " ".join(process.cmdline())[:200] or process.name()
        except psutil.Error:  # it has just ended, or it is another user's
            continue
    for pid in _helpers_of_python() | {os.getpid()}:
        found.pop(pid, None)
    return found


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return {path.name for path in _SHM.iterdir()}


def orphaned_memory(names: Iterable[str]) -> set[str]:
    """Those of the names that no living process of any session has open or mapped."""
    by_inode = {}
    for name in names:
        with contextlib.suppress(FileNotFoundError):  # gone since it was listed
            by_inode[(_SHM / name).stat().st_ino] = name
    for process in Path("/proc").glob("[0-9]*") if by_inode else ():
        with contextlib.suppress(OSError):  # it has just ended, or it is another user's
            for inode in _inodes_in_shared_memory(process):
                by_inode.pop(inode, None)
    return set(by_inode.values())


def _inodes_in_shared_memory(process: Path) -> set[int]:
    """By number, because a semaphore is mapped under another name than the one it gets in the end."""
    mapped = [line.split(maxsplit=5) for line in (process / "maps").read_text().splitlines() if str(_SHM) in line]
    inodes = {int(fields[4]) for fields in mapped}
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed in the meantime
            if os.readlink(descriptor).startswith(str(_SHM)):
                inodes.add(descriptor.stat().st_ino)
    return inodes


def wait_for_end(mark: str, before: set[str], timeout_s: float) -> tuple[dict[int, str], set[str]]:
    """Processes and names in /dev/shm that are still there after the time it may take to go away."""
    end = time.monotonic() + timeout_s
    while True:
        processes, memory = running(mark), orphaned_memory(shared_memory() - before)
        if not (processes or memory) or time.monotonic() > end:
            return processes, memory
        time.sleep(0.1)


def _helpers_of_python() -> set[int]:
    """multiprocessing's fork server and resource tracker, which live as long as this process."""
    pids = (
        getattr(forkserver._forkserver, "_forkserver_pid", None),
        getattr(resource_tracker._resource_tracker, "_pid", None),
    )
    return {pid for pid in pids if pid is not None}
