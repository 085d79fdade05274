"""A full or a slow disk on purpose: what every write of this process to durable storage suffers for a while."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence

from holdfast.clock import Clock, SystemClock
from holdfast.fault_tolerance.chaos import Action, ChaosFault
from holdfast.fault_tolerance.throttle import Throttle

__all__ = ["STORAGE", "Impaired", "Impairment"]


class Impairment:
    """Healthy until an entry is :meth:`suffer`-ed. Any thread."""

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = clock or SystemClock()
        self._full_until_s = self._slow_until_s = 0.0
        self._slow = Throttle(clock=self._clock)

    def suffer(self, fault: ChaosFault) -> None:
        """``disk_full`` or ``slow_disk`` for as long as the entry says; a later one takes the place of the last."""
        until_s = self._clock.now() + fault.for_s
        if fault.action is Action.DISK_FULL:
            self._full_until_s = until_s
        else:
            self._slow, self._slow_until_s = Throttle(fault.mb_per_s * 1e6, self._clock), until_s

    def heal(self) -> None:
        """Whatever was suffered is over."""
        self._full_until_s = self._slow_until_s = 0.0

    def passed(self, view: memoryview) -> Iterator[memoryview]:
        """A piece on its way to storage. Raises: OSError, as a full disk does."""
        now = self._clock.now()
        if now < self._full_until_s:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if now < self._slow_until_s:
            yield from self._slow.paced([view])
        else:
            yield view


STORAGE = Impairment()
"""Of this process."""


class Impaired(Throttle):
    """A throttle behind which the disk may be full or slow."""

    def __init__(self, inner: Throttle, impairment: Impairment = STORAGE) -> None:
        super().__init__()
        self._inner, self._impairment = inner, impairment

    def paced(self, views: Sequence[memoryview]) -> Iterator[memoryview]:
        for part in self._inner.paced(views):
            yield from self._impairment.passed(part)
