"""The helper process of a tracker, and the channel to it: the driver's side."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Pipe
from typing import cast

__all__ = ["FINISH_GRACE_S", "POLL_S", "Helper"]

POLL_S = 0.2
FINISH_GRACE_S = 3.0
"""For the helper's own end, on top of the time its tracker gets for uploads."""


class Helper:
    """``kill`` may be called from any thread."""

    _COMMAND = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
        "from holdfast.trainer.trackers.serving import serve; serve(int(sys.argv[1]))"
    )

    def __init__(self) -> None:
        self._channel, theirs = Pipe()
        with contextlib.closing(theirs):
            self._process = subprocess.Popen(
                [sys.executable, "-c", self._COMMAND, str(theirs.fileno()), json.dumps(sys.path)],
                pass_fds=[theirs.fileno()],
                # Without a terminal nobody can be asked for a login.
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,
            )
        self.pid = self._process.pid

    def open(
        self, door: str, opening: Mapping[str, object], *, patience_s: float, is_late: Callable[[], bool]
    ) -> str | None:
        """Start the tracker; returns why that failed. ``patience_s``: how long the helper may outlive its driver."""
        try:
            self.send({"door": door, "opening": opening, "parent": os.getpid(), "patience_s": patience_s})
            while not self._channel.poll(POLL_S):
                if is_late():
                    return "no answer in time"
            problem = json.loads(self._channel.recv_bytes())["failed"]
        except (OSError, EOFError):
            return "its process has died"
        if problem is not None:
            self.wait(FINISH_GRACE_S)  # it leaves by itself, and then takes the tracker's own processes along
        return cast("str | None", problem)

    def send(self, message: Mapping[str, object]) -> None:
        """Blocks while the tracker is behind. Raises: OSError when the helper is gone."""
        self._channel.send_bytes(json.dumps(message).encode())

    def said(self) -> Iterator[dict[str, object]]:
        """What it has said since, as far as it is here."""
        with contextlib.suppress(OSError, EOFError):  # gone: sending will tell
            while self._channel.poll():
                yield json.loads(self._channel.recv_bytes())

    def wait(self, timeout_s: float) -> int | None:
        """Its exit status; None if it has not ended by then."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def kill(self) -> None:
        """End it at once; the tracker's own processes follow by themselves. No effect on one that has ended."""
        self._process.kill()
        self._process.wait()


def _environment() -> dict[str, str]:
    """A service that somebody else has started in this process is not ours to use; telemetry stays off."""
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return {**inherited, "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false", "CUDA_VISIBLE_DEVICES": ""}
