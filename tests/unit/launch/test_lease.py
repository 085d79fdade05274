"""One driver per run: who gets the lease, who is refused and what the refused one is told."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from holdfast.errors import ConfigurationError
from holdfast.launch import lease


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    run = tmp_path / "brisk-otter"
    run.mkdir()
    return run / "driver.lock"


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_held_lease_names_its_driver_and_a_released_one_nobody(lock: Path) -> None:
    assert lease.holder(lock) is None
    with lease.hold(lock):
        assert re.fullmatch(
            rf"pid {os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d",
            lease.holder(lock) or "",
        )
    assert lease.holder(lock) is None


def test_looking_does_not_make_the_file_and_does_not_keep_the_lease_from_anybody(lock: Path) -> None:
    assert lease.holder(lock) is None
    assert not lock.exists()
    with lease.hold(lock, patience_s=0.0):
        pass
    assert lease.holder(lock) is None
    with lease.hold(lock, patience_s=0.0):
        pass


def test_the_second_driver_is_told_who_the_first_one_is_and_what_to_do(lock: Path) -> None:
    with lease.hold(lock):
        who = lease.holder(lock)
        with pytest.raises(ConfigurationError) as refused, lease.hold(lock, patience_s=0.0):
            pytest.fail("two drivers")
        assert lease.holder(lock) == who
    assert str(refused.value) == (
        f"run brisk-otter is being driven by {who}; wait for it, stop it, or start another run with resume=never"
    )


def test_an_error_inside_the_block_releases_the_lease_and_leaves_no_descriptor(lock: Path) -> None:
    files = _open_files()
    with pytest.raises(RuntimeError, match="crash"), lease.hold(lock):
        raise RuntimeError("crash")
    assert lease.holder(lock) is None
    assert _open_files() == files


def test_being_refused_leaves_no_descriptor(lock: Path) -> None:
    with lease.hold(lock):
        files = _open_files()
        with pytest.raises(ConfigurationError), lease.hold(lock, patience_s=0.0):
            pass
        assert _open_files() == files


class _Time:
    """``time`` for the module under test: sleeping takes no time, and something may happen meanwhile."""

    def __init__(self) -> None:
        self.now, self.meanwhile = 100.0, list[Callable[[], object]]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.meanwhile:
            self.meanwhile.pop()()

    def strftime(self, form: str) -> str:
        return form


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> _Time:
    fake = _Time()
    monkeypatch.setattr(lease, "time", fake)
    return fake


def test_a_lease_that_is_released_within_the_patience_is_taken(lock: Path, time: _Time) -> None:
    with ExitStack() as first:
        first.enter_context(lease.hold(lock))
        time.meanwhile.append(first.close)
        with lease.hold(lock, patience_s=1.0):
            assert lease.holder(lock) is not None
    assert 100.0 < time.now < 101.0


def test_patience_ends(lock: Path, time: _Time) -> None:
    with lease.hold(lock), pytest.raises(ConfigurationError), lease.hold(lock, patience_s=3.0):
        pass
    assert 103.0 <= time.now < 103.5


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": 1}', b"\xff\xfe", b"null"])
def test_a_holder_that_has_not_written_its_name_yet_is_a_driver_all_the_same(lock: Path, content: bytes) -> None:
    with lease.hold(lock):
        lock.write_bytes(content)
        assert lease.holder(lock) == "a driver that is just starting"


def test_the_name_of_a_predecessor_is_replaced_completely(lock: Path) -> None:
    lock.write_text(json.dumps({"pid": 10**9, "host": "x" * 500, "since": "long ago"}))
    with lease.hold(lock):
        assert json.loads(lock.read_text())["pid"] == os.getpid()


def _without_locks(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_a_file_system_without_locks_is_refused_with_the_way_out(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", _without_locks)
    files = _open_files()
    complaint = r"driver\.lock cannot be locked \(No locks available\).*set root to a file system with flock"
    with pytest.raises(ConfigurationError, match=complaint), lease.hold(lock):
        pytest.fail("no lease")
    assert _open_files() == files


def test_looking_at_a_file_system_without_locks_finds_nobody(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock.touch()
    monkeypatch.setattr(fcntl, "flock", _without_locks)
    files = _open_files()
    assert lease.holder(lock) is None
    assert _open_files() == files


def test_a_directory_that_does_not_take_the_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    complaint = r"file/driver\.lock cannot be opened \(Not a directory\)"
    with pytest.raises(ConfigurationError, match=complaint), lease.hold(tmp_path / "file" / "driver.lock"):
        pytest.fail("no lease")
