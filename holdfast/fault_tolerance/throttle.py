"""A bound on bytes per second, shared by whoever writes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from holdfast.clock import Clock, SystemClock

__all__ = ["PART_BYTES", "Throttle", "parts"]

PART_BYTES = 8 << 20
"""Most bytes that are handed over at once."""


class Throttle:
    """Lets at most ``bytes_per_s`` pass; 0 lets everything pass. Shared by threads, which take turns part by part.

    In any interval of t seconds no more than ``bytes_per_s`` x t bytes begin to pass, and one part of at most
    ``PART_BYTES``. Idle time is not saved up: a burst after a pause is what the bound is there to prevent.
    """

    def __init__(self, bytes_per_s: float = 0.0, clock: Clock | None = None) -> None:
        self._bytes_per_s, self._clock = bytes_per_s, clock or SystemClock()
        self._free_s = self._clock.now()
        self._lock = threading.Lock()

    def paced(self, views: Sequence[memoryview]) -> Iterator[memoryview]:
        """The views in parts, each when its turn has come."""
        for part in parts(views):
            self._wait_for(part.nbytes)
            yield part

    def _wait_for(self, count: int) -> None:
        if not self._bytes_per_s:
            return
        with self._lock:
            now = self._clock.now()
            turn_s = max(self._free_s, now)
            self._free_s = turn_s + count / self._bytes_per_s
        if turn_s > now:
            self._clock.sleep(turn_s - now)


def parts(views: Sequence[memoryview]) -> Iterator[memoryview]:
    """Byte views cut into pieces of at most ``PART_BYTES``, without a copy."""
    for view in views:
        for start in range(0, view.nbytes, PART_BYTES):
            yield view[start : start + PART_BYTES]
