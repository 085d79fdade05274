"""Which machines will be taken away: asked in a thread of its own, as the answer may be late or never come."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

__all__ = ["DrainWatch", "seconds_left"]

logger = logging.getLogger(__name__)

_EVERY_S = 2.0


class DrainWatch:
    """``ask`` tells the deadline of each machine, in milliseconds since 1970, 0 for none. It may raise."""

    def __init__(self, ask: Callable[[], Mapping[str, int]], *, every_s: float = _EVERY_S) -> None:
        self._ask, self._every_s = ask, every_s
        self._deadlines: Mapping[str, int] = {}
        self._is_over = threading.Event()
        self._has_complained = False
        self._look()
        threading.Thread(target=self._watch, name="drain-watch", daemon=True).start()

    def deadlines(self) -> Mapping[str, int]:
        """As of the newest answer; never waits."""
        return self._deadlines

    def close(self) -> None:
        self._is_over.set()

    def _watch(self) -> None:
        while not self._is_over.wait(self._every_s):
            self._look()

    def _look(self) -> None:
        try:
            self._deadlines = dict(self._ask())
        except Exception as error:  # a thread's boundary: without notices a lost node is found like any other
            if not self._has_complained and not self._is_over.is_set():
                self._has_complained = True
                logger.warning("nobody tells which nodes will be taken away: %s", error)


def seconds_left(deadline_ms: int) -> float:
    """Until the deadline; infinite where there is none."""
    return max(deadline_ms / 1000 - time.time(), 0.0) if deadline_ms else float("inf")
