"""A rank's status page: heartbeats from a thread, phases and reports from the training loop."""

from __future__ import annotations

import threading
import time

from holdfast.errors import Abort
from holdfast.fault_tolerance.board import Board
from holdfast.types import Phase, StepReport

__all__ = ["BoardWatcher", "Heart"]


_LOOK_S = 0.002


class Heart:
    """Beats on whatever board it was given last, from its own thread, until the process ends."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s, self._board, self._lock = interval_s, None, threading.Lock()
        self._silent_until_s = 0.0
        threading.Thread(target=self._beat, name="holdfast-heart", daemon=True).start()

    _board: Board | None

    def move_to(self, board: Board | None) -> None:
        """Beat there from now on. The old board is not touched after this returns."""
        with self._lock:
            self._board = board
            if board is not None:
                board.beat(time.monotonic())

    def pause(self, seconds: float) -> None:
        """On purpose: no beats for so long."""
        self._silent_until_s = time.monotonic() + seconds

    def _beat(self) -> None:
        while True:
            time.sleep(self._interval_s)
            with self._lock:
                if self._board is not None and time.monotonic() >= self._silent_until_s:
                    self._board.beat(time.monotonic())


class BoardWatcher:
    """See :class:`holdfast.trainer.observers.Watcher`. One per membership epoch."""

    def __init__(self, board: Board, epoch: int) -> None:
        self._board, self._epoch = board, epoch
        self._aborted, self._stop = threading.Event(), threading.Event()

    @property
    def is_aborted(self) -> bool:
        return self._aborted.is_set() or self._board.fence_epoch > self._epoch

    def abort(self) -> None:
        """Any thread. The training loop leaves at its next check."""
        self._aborted.set()

    def await_update(self, timeout_s: float) -> None:
        """Any thread. Let the ranks finish what they have voted on, or are about to."""
        end = time.monotonic() + timeout_s
        while self._board.read().phase in (Phase.VOTE, Phase.UPDATE) and time.monotonic() < end:
            time.sleep(_LOOK_S)

    def ask_to_stop(self) -> None:
        """Any thread. The ranks agree at the next vote."""
        self._stop.set()

    def enter(self, phase: Phase, step: int) -> None:
        self._board.enter(phase, step, time.monotonic())

    def finished(self, report: StepReport) -> None:
        self._board.append(report)
        self.enter(Phase.FORWARD_BACKWARD, report.step)

    def check(self) -> None:
        if self.is_aborted:
            raise Abort(f"epoch {self._epoch} has ended")

    def should_stop(self) -> bool:
        return self._stop.is_set()
