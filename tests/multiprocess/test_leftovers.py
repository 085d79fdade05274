"""A test session that leaves processes or shared memory behind fails, and says which."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

import psutil

_ROOT = Path(__file__).parents[2]
_LEAKS = """
import os, subprocess, sys, time
from pathlib import Path

out = Path(__file__).with_name("pids")

def note(pid):
    with out.open("a") as file:
        print(pid, file=file)

def test_a_detached_child():
    note(subprocess.Popen(["sleep", "600"], start_new_session=True).pid)

def test_a_child_of_a_child_that_is_gone():
    code = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)"
    with out.open("a") as file:
        subprocess.run([sys.executable, "-c", code], stdout=file)

def test_a_forked_child():
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
    note(pid)

def test_memory():
    open(SHM, "w").close()
"""
_NO_LEAK = """
import multiprocessing

def test_a_fork_server_lives_as_long_as_the_session():
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=print)
    process.start()
    process.join()
"""


def _session(tmp_path: Path, body: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "test_body.py").write_text(body)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.conftest", str(tmp_path)]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)


def test_what_is_left_behind_fails_the_session_and_processes_are_ended(tmp_path: Path) -> None:
    shm = Path("/dev/shm", f"leftover-{uuid.uuid4().hex}")
    try:
        result = _session(tmp_path, f"SHM = {str(shm)!r}\n{_LEAKS}")
    finally:
        shm.unlink()
    pids = [int(line) for line in (tmp_path / "pids").read_text().split()]
    assert result.returncode == 1 and "4 passed" in result.stdout, result.stdout
    assert len(pids) == 3
    for pid in pids:
        assert f"process {pid}:" in result.stdout
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert f"shared memory: {shm}" in result.stdout


def test_the_helpers_of_multiprocessing_are_not_left_behind(tmp_path: Path) -> None:
    result = _session(tmp_path, _NO_LEAK)
    assert result.returncode == 0, result.stdout
