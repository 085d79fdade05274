"""The lease on a run directory: a file lock that its driver holds as long as it lives, and not a moment longer."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from holdfast.errors import ConfigurationError

__all__ = ["hold", "holder"]

_RETRY_S = 0.05

_descriptors: set[int] = set()


def _let_go_in_child() -> None:
    """A forked child must not keep the lease of a driver that has died."""
    for descriptor in _descriptors:
        os.close(descriptor)
    _descriptors.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def hold(path: Path, *, patience_s: float = 1.0) -> Iterator[None]:
    """Hold the lease inside a ``with`` block. The kernel takes it back from a process that dies in any way.

    ``patience_s`` outlasts others who only look, see :func:`holder`. Raises: ConfigurationError naming the holder, or
    saying why nobody can hold it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be opened ({error.strerror}), so the run cannot be driven") from error
    _descriptors.add(descriptor)
    try:
        _lock(descriptor, path, time.monotonic() + patience_s)
        os.ftruncate(descriptor, 0)
        who = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.pwrite(descriptor, json.dumps(who).encode(), 0)
        yield
    finally:
        if descriptor in _descriptors:  # not in a child that was forked inside the block
            _descriptors.discard(descriptor)
            os.close(descriptor)


def holder(path: Path) -> str | None:
    """Who holds the lease, in words; None if nobody does, or if nobody can: :func:`hold` says why."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _who(path)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None


def _lock(descriptor: int, path: Path, until: float) -> None:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as taken:
            if time.monotonic() >= until:
                raise ConfigurationError(
                    f"run {path.parent.name} is being driven by {_who(path)}; wait for it, stop it, "
                    "or start another run with resume=never"
                ) from taken
            time.sleep(_RETRY_S)
        except OSError as error:
            raise ConfigurationError(
                f"{path} cannot be locked ({error.strerror}), so two drivers could write to one run; "
                "set root to a file system with flock"
            ) from error


def _who(path: Path) -> str:
    try:
        who = json.loads(path.read_text())
        return f"pid {who['pid']} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "a driver that is just starting"
