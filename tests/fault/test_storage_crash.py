"""A writer killed at every system call it makes, and at any time: readers see old content or new, never a part."""

from __future__ import annotations

import os
import random
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from holdfast.errors import SnapshotError
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.storage import DirectoryStorage

CALLS = ("open", "write", "fsync", "close", "replace", "rename", "mkdir", "unlink", "rmdir")
_MOST_CALLS = 400


def fork(body: Callable[[], None]) -> int:
    """Run ``body`` in a child that never returns; its exit status is 0 when it came to its end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child only makes system calls, threads or not
        pid = os.fork()
    if pid == 0:
        try:
            body()
            os._exit(0)
        finally:
            os._exit(70)
    return pid


def end_of(pid: int, deadline_s: float = 20.0) -> int:
    """Exit status, negative for a signal."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"the writer did not end within {deadline_s} s")


def die_at(moment: int) -> None:
    """From now on, the ``moment``-th of our system calls kills this process; a write is half done by then."""
    left = [moment]

    def killing(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, killing(name, getattr(os, name)))


def every_crash(body: Callable[[], None], prepare: Callable[[], None]) -> Iterator[int]:
    """Run ``prepare`` and then ``body`` with a death one call later each time, until it comes through."""
    for moment in range(_MOST_CALLS):
        prepare()

        def doomed(moment: int = moment) -> None:
            die_at(moment)
            body()

        status = end_of(fork(doomed))
        assert status in (0, -signal.SIGKILL)
        yield moment
        if status == 0:
            assert moment > 4, "the sweep must have killed somebody"
            return
    raise AssertionError(f"not finished after {_MOST_CALLS} calls")


def test_a_file_is_old_or_new_whichever_call_is_the_last(tmp_path: Path) -> None:
    storage = DirectoryStorage(tmp_path)
    old, new = b"old" * 1000, b"new!" * 3000
    seen = set()
    for _ in every_crash(
        body=lambda: _ignore(storage.write("d/f", [new[:5000], new[5000:]])),
        prepare=lambda: _ignore(storage.write("d/f", [old])),
    ):
        seen.add(storage.read("d/f"))
        assert list(storage.list("d")) == ["f"]
        storage.sweep()
        assert os.listdir(tmp_path / "d") == ["f"]
    assert seen == {old, new}


def write_checkpoint(storage: DirectoryStorage, step: int) -> None:
    receipts: dict[int, Mapping[str, Any]] = {}
    for rank in range(2):
        data, manifest = [bytes([step, rank]) * 500], f"manifest {step} {rank}".encode()
        receipts[rank] = checkpoint.write_rank(storage, checkpoint.directory(step), rank, data=data, manifest=manifest)
    checkpoint.commit(storage, step, receipts=receipts, config_digest="cfg")
    checkpoint.retain(storage, 1)


def check_readers(storage: DirectoryStorage) -> int:
    """Whatever is listed is whole; the newest step, of which there must be one."""
    good, rejected = checkpoint.list_checkpoints(storage)
    assert rejected == ()
    for found in good:
        for rank in range(2):
            manifest, data = checkpoint.read_rank(storage, checkpoint.directory(found.step), rank)
            assert (manifest, data) == (f"manifest {found.step} {rank}".encode(), bytes([found.step, rank]) * 500)
    return good[0].step


def test_a_checkpoint_exists_or_not_whichever_call_is_the_last(tmp_path: Path) -> None:
    """Two ranks, the commit, LATEST and the deletion of the one before, all in one process that dies once."""
    storage = DirectoryStorage(tmp_path)

    def prepare() -> None:
        for name in storage.list(""):
            storage.delete(name)
        write_checkpoint(storage, 1)

    newest = []
    for _ in every_crash(body=lambda: write_checkpoint(storage, 2), prepare=prepare):
        newest.append(check_readers(storage))
        storage.sweep()
        if newest[-1] == 1:
            write_checkpoint(storage, 2)  # the next attempt is not in the way of what the last one left
        checkpoint.retain(storage, 1)
        assert check_readers(storage) == 2
        named = checkpoint.latest(storage)  # 1 after a death between the commit and the hint: it is kept for that
        assert named is not None
        assert set(os.listdir(tmp_path)) == {"LATEST", "step-00000002", checkpoint.directory(named)}
    assert newest == sorted(newest) and set(newest) == {1, 2}


def test_a_quarantine_holds_or_did_not_happen_whichever_call_is_the_last(tmp_path: Path) -> None:
    storage = DirectoryStorage(tmp_path)

    def prepare() -> None:
        for name in storage.list(""):
            storage.delete(name)
        write_checkpoint(storage, 1)

    for _ in every_crash(body=lambda: _ignore(checkpoint.quarantine(storage, 1, "bad")), prepare=prepare):
        good, rejected = checkpoint.list_checkpoints(storage)
        assert len(good) + len(rejected) == 1


def test_a_writer_killed_at_any_time_never_shows_a_half_file(tmp_path: Path) -> None:
    """Readers look while it writes and after its death; 30 deaths at random times, the seed is printed."""
    storage, size = DirectoryStorage(tmp_path), 300_000
    seed = random.randrange(2**32)
    print("seed", seed)
    rng, deaths = random.Random(seed), 30
    storage.write("f", [bytes(size)])

    def write_for_ever() -> None:
        for generation in range(1, 10**9):
            storage.write("f", [bytes([generation % 256]) * (size // 2)] * 2)

    contents = set()
    for _ in range(deaths):
        writer = fork(write_for_ever)
        end = time.monotonic() + rng.uniform(0.001, 0.05)
        try:
            while time.monotonic() < end:
                contents.add(whole(storage, size))
        finally:
            os.kill(writer, signal.SIGKILL)
            assert end_of(writer) == -signal.SIGKILL
        contents.add(whole(storage, size))
    assert len(contents) > 3, "the readers must have seen it change"
    storage.sweep()
    assert os.listdir(tmp_path) == ["f"]


def whole(storage: DirectoryStorage, size: int) -> int:
    """The one byte that all of the file consists of."""
    content = storage.read("f")
    assert len(content) == size and content == content[:1] * size
    return content[0]


def test_a_writer_whose_unfinished_file_was_swept_fails_and_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, real = DirectoryStorage(tmp_path), os.fsync
    storage.write("f", [b"old"])

    def fsync(descriptor: int) -> None:
        storage.sweep()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SnapshotError, match="cannot write 3 bytes"):
        storage.write("f", [b"new"])
    assert storage.read("f") == b"old"


def _ignore(_: object) -> None:
    return None
