"""Wishes to stop: SIGINT, SIGTERM and SIGUSR1 set a flag, a second SIGINT or SIGTERM leaves now, and so does time."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from types import FrameType

__all__ = ["StopSignals"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopSignals:
    """Installed inside a ``with`` block, in the main thread only; elsewhere it waits for :meth:`ask` alone.

    The first signal asks for a graceful stop, also when it comes before anybody can act on it. A second one that
    insists raises KeyboardInterrupt or, for SIGTERM, SystemExit, so that ``finally`` clauses still end what was
    started. SIGUSR1 only announces that time is running out: it does not insist, and what follows it is the first.
    When ``grace_s`` have passed since the first signal, the process behaves as if a second one had come, so that it is
    never found waiting when it is killed.
    """

    def __init__(self, grace_s: float = math.inf) -> None:
        self._grace_s = grace_s
        self._timer: threading.Timer | None = None
        self.is_overdue = False
        """What looked like a second signal was the end of the grace."""
        self._stop: Callable[[str], None] | None = None
        self._reason: str | None = None
        self._before: dict[int, object] = {}
        self._ordered = 0
        """SIGINT or SIGTERM, whichever came last."""

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in _SIGNALS}
            self.install()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what getsignal returned
        self._before = {}
        if self._timer is not None:
            self._timer.cancel()

    @property
    def reason(self) -> str | None:
        """Why to stop; None until somebody has asked."""
        return self._reason

    @property
    def exit_code(self) -> int:
        """For a process that was stopped before it could save: 128 plus the number of SIGINT or SIGTERM."""
        return 128 + (self._ordered or signal.SIGTERM)

    def install(self) -> None:
        """Take the signals over, from whoever has them now."""
        for number in self._before:
            signal.signal(number, self._on_signal)

    def then(self, stop: Callable[[str], None]) -> None:
        """From now on, and for a wish that came already, call ``stop`` with the reason. It must return at once."""
        self._stop = stop
        if self._reason is not None:
            stop(self._reason)

    def ask(self, reason: str) -> None:
        """Any thread: a wish that did not come as a signal."""
        self._reason = reason
        if self._stop is not None:
            self._stop(reason)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if number != signal.SIGUSR1:
            is_second, self._ordered = self._ordered != 0, number
            if is_second:
                raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(self.exit_code)
        if self._timer is None and self._grace_s < math.inf:
            self._timer = threading.Timer(self._grace_s, self._insist)
            self._timer.daemon = True
            self._timer.start()
        self.ask(f"{signal.Signals(number).name} received")

    def _insist(self) -> None:
        """Timer's thread: wake the main thread from whatever it waits in, with a signal that is the second one."""
        self._ordered, self.is_overdue = self._ordered or signal.SIGTERM, True
        signal.pthread_kill(threading.main_thread().ident or 0, self._ordered)
