"""Body of a tracker's helper process: it opens the tracker and does what the driver says."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, Protocol, cast

__all__ = ["Door", "serve"]


class Door(Protocol):
    """An open tracker, in the helper. Whatever it raises costs one message."""

    def obey(self, message: Mapping[str, Any]) -> None:
        """One of :data:`holdfast.trainer.trackers.messages.Message`, but for finish."""
        ...

    def finish(self, exit_code: int) -> None: ...


def serve(descriptor: int) -> None:
    """Do what the driver says until that finishes or dies."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the driver decides when it is over, and must get through first
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(descriptor, False)
    channel = Connection(descriptor)
    plan = json.loads(channel.recv_bytes())
    threading.Thread(target=_watch, args=(plan["parent"], plan["patience_s"]), daemon=True).start()
    try:
        door = _open(plan["door"], plan["opening"], lambda: _say(channel, stop=True))
    except BaseException as error:  # a process boundary: the driver learns of it; wandb even raises SystemExit
        _say(channel, failed=f"{type(error).__name__}: {error}")
        return
    _say(channel, failed=None)
    door.finish(_follow(door, channel))


def _open(door: str, opening: Mapping[str, Any], stop: Callable[[], None]) -> Door:
    """Of the module that was named. ``stop``: what to call, in any thread, when somebody stops the run there."""
    module = importlib.import_module(f"holdfast.trainer.trackers.{door}")
    return cast(Door, module.open_door(opening, stop))


def _follow(door: Door, channel: Connection) -> int:
    """Obey until the driver says how the run has ended; 1 if it dies before."""
    has_complained = False
    while True:
        try:
            message = json.loads(channel.recv_bytes())
        except (OSError, EOFError):
            return 1
        if message["do"] == "finish":
            return int(message["exit_code"])
        try:
            door.obey(message)
        except Exception as error:  # a message that is refused costs that one; the driver's log learns of the first
            if not has_complained:
                has_complained = True
                _say(channel, trouble=f"{type(error).__name__}: {error}")


def _say(channel: Connection, **words: object) -> None:
    with contextlib.suppress(OSError):  # the driver is gone; reading will tell
        channel.send_bytes(json.dumps(words).encode())


def _watch(parent: int, patience_s: float) -> None:
    """A helper whose driver has died may bring home what it has, but must not stay."""
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(patience_s)
    os._exit(1)
