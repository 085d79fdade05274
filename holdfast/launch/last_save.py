"""The last checkpoint of a run, which nothing comes after: it is begun in time, and tried more than once."""

from __future__ import annotations

import math
from collections.abc import Callable

from holdfast.launch.durable import DurableTier

__all__ = ["LastSave"]

_TRIES, _PAUSE_S = 3, 1.0
"""A storage that fails once may be back a moment later."""
_PATIENCE = 0.1
"""Share of the grace in which ranks may leave by themselves; then the newest version is written without their last."""


class LastSave:
    """``persist`` begins to write the newest version that every rank holds, unless it is on disk, and gives up at the
    instant that it is told."""

    def __init__(self, durable: DurableTier, persist: Callable[[float], None]) -> None:
        self._durable, self._persist = durable, persist
        self._tries, self._began_s, self._again_s, self._end_s = 0, 0.0, -math.inf, math.inf

    def look(self, now: float, stop_by_s: float, grace_s: float) -> None:
        """The ranks have been asked to leave. A step may last longer than there is time: what they have finished
        before it is safe meanwhile. What is being written already is not disturbed."""
        is_late = now >= stop_by_s - (1 - _PATIENCE) * grace_s
        if is_late and self._durable.is_idle and now >= self._again_s and self._tries < _TRIES:
            self._tries += bool(self._durable.last_error)
            self._again_s = now + _PAUSE_S
            self._persist(stop_by_s)

    def begin(self, now: float, end_s: float) -> None:
        """All ranks have left; what :meth:`look` has begun is waited for, and then whatever is newer is written."""
        self._tries, self._began_s, self._again_s, self._end_s = 0, now, now, end_s

    def hurry(self, end_s: float) -> None:
        """There is less time now."""
        self._end_s = min(self._end_s, end_s)

    def is_over(self, now: float) -> bool:
        """Look what became of it and do what is due; whether nothing is left to wait for."""
        durable = self._durable
        if durable.is_idle and self._tries and (self._tries == _TRIES or not durable.last_error):
            return True
        if now > self._end_s:
            durable.give_up(f"not written after {now - self._began_s:.1f} s")
            return True
        if durable.is_idle and now >= self._again_s:
            self._tries, self._again_s = self._tries + 1, now + _PAUSE_S
            self._persist(self._end_s)
        return False
