"""A writer that is killed at any moment leaves whole records, and its successor goes on where it stopped."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from holdfast.fault_tolerance.ring import Ring

_FIELDS, _SLOTS, _KILLS = "q" * 40, 8, 25
_DEADLINE_S = 20.0

_WRITERS = """
import mmap, os, sys
from holdfast.fault_tolerance.ring import Ring

path, fields = sys.argv[1:]
with open(path, "r+b") as file:
    view = memoryview(mmap.mmap(file.fileno(), 0))
for _ in sys.stdin:
    pid = os.fork()
    if pid == 0:
        ring = Ring(view[:8].cast("q"), view[8:], fields)
        while True:
            ring.append(*[ring.count] * len(fields))
    print(pid, flush=True)
    os.waitpid(pid, 0)
    print("gone", flush=True)
"""


@pytest.fixture
def memory(tmp_path: Path) -> Path:
    path = tmp_path / "ring"
    path.write_bytes(bytes(8 + _SLOTS * Ring.slot_bytes(_FIELDS)))
    return path


def test_every_record_is_whole_after_any_kill_and_the_numbers_go_on(memory: Path) -> None:
    with memory.open("r+b") as file:
        view = memoryview(mmap.mmap(file.fileno(), 0))
    ring, count = Ring(view[:8].cast("q"), view[8:], _FIELDS), 0
    command = [sys.executable, "-c", _WRITERS, str(memory), _FIELDS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writers:
        assert writers.stdin is not None
        assert writers.stdout is not None
        for _ in range(_KILLS):
            print(file=writers.stdin, flush=True)
            pid = int(writers.stdout.readline())
            end = time.monotonic() + _DEADLINE_S
            while ring.count < count + 100 and time.monotonic() < end:
                records, _ = ring.since(0)
                assert all(record == (record[0],) * len(_FIELDS) for record in records)
            os.kill(pid, signal.SIGKILL)
            assert writers.stdout.readline() == "gone\n"
            records, written = ring.since(0)
            numbers = [record[0] for record in records]
            # The record being written when the kill came may have taken the oldest one's place.
            kept = list(range(written - _SLOTS, written))
            assert numbers in (kept, kept[1:])
            assert written >= count + 100
            count = written
        writers.stdin.close()
        assert writers.wait(_DEADLINE_S) == 0
