"""The kernel takes the lease back from a driver that dies, and no child of it keeps the lease."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from holdfast.launch import lease

_DEADLINE_S = 20.0

_DRIVER = """
import os, subprocess, sys, time
from pathlib import Path
from holdfast.launch import lease

path, child = Path(sys.argv[1]), sys.argv[2]
with lease.hold(path, patience_s=20.0):
    pid = os.getpid()
    if child == "forked":
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
    elif child == "started":
        pid = subprocess.Popen(["sleep", "600"], close_fds=False).pid
    elif child == "forked and gone":
        pid = os.fork()
        if pid == 0:
            sys.exit()  # leaves the block of its parent
        _, status = os.waitpid(pid, 0)
        assert status == 0, status
        pid = os.getpid()
    print(pid, flush=True)
    time.sleep(600)
"""

Start = Callable[[str], tuple["subprocess.Popen[str]", int]]


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "driver.lock"


@pytest.fixture
def start(lock: Path) -> Iterator[Start]:
    """Start a driver that holds the lease, and perhaps a child of it; the driver and the pid of the child."""
    started, pids = list[subprocess.Popen[str]](), list[int]()

    def begin(child: str) -> tuple[subprocess.Popen[str], int]:
        made = subprocess.Popen([sys.executable, "-c", _DRIVER, str(lock), child], stdout=subprocess.PIPE, text=True)
        started.append(made)
        assert made.stdout is not None
        pids.append(int(made.stdout.readline()))
        return made, pids[-1]

    yield begin
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for process in started:
        process.kill()
        process.wait(_DEADLINE_S)
        assert process.stdout is not None
        process.stdout.close()


def _is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"


def _freed(lock: Path) -> bool:
    end = time.monotonic() + _DEADLINE_S
    while lease.holder(lock) is not None and time.monotonic() < end:
        time.sleep(0.005)
    return lease.holder(lock) is None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_driver_that_is_killed_leaves_the_lease_to_the_next_one(
    start: Start, lock: Path, number: signal.Signals
) -> None:
    driver, _ = start("none")
    assert (lease.holder(lock) or "").startswith(f"pid {driver.pid} on ")
    driver.send_signal(number)
    assert driver.wait(_DEADLINE_S) == -number
    assert lease.holder(lock) is None
    with lease.hold(lock, patience_s=0.0):
        assert (lease.holder(lock) or "").startswith(f"pid {os.getpid()} on ")


def test_a_frozen_driver_still_has_the_lease(start: Start, lock: Path) -> None:
    driver, _ = start("none")
    driver.send_signal(signal.SIGSTOP)
    assert (lease.holder(lock) or "").startswith(f"pid {driver.pid} on ")


@pytest.mark.parametrize("child", ["forked", "started"])
def test_a_child_that_outlives_the_driver_does_not_keep_the_lease(start: Start, lock: Path, child: str) -> None:
    driver, pid = start(child)
    assert lease.holder(lock) is not None
    driver.kill()
    driver.wait(_DEADLINE_S)
    assert _freed(lock)
    assert _is_running(pid)


def test_a_forked_child_that_leaves_the_block_does_not_release_the_lease_of_its_parent(
    start: Start, lock: Path
) -> None:
    driver, _ = start("forked and gone")
    assert (lease.holder(lock) or "").startswith(f"pid {driver.pid} on ")
