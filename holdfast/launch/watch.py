"""A rank's status page: heartbeats from a thread, phases and reports from the training loop."""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback

from holdfast.errors import Abort
from holdfast.fault_tolerance.board import Beat, Board
from holdfast.types import Phase, StepReport

__all__ = ["BoardWatcher", "Heart", "StuckWitness"]

logger = logging.getLogger(__name__)

_LOOK_S = 0.002


class StuckWitness:
    """Writes down, once, where every thread is while a phase lasts unusually long. Whoever hangs is ended in the end,
    and cannot be asked then; its log has the last word."""

    def __init__(self, least_s: float) -> None:
        self._least_s = least_s
        self._longest_s = 0.0
        """Of the phases that have ended."""
        self._seen: Beat | None = None
        self._has_told = False

    def look(self, beat: Beat) -> None:
        """Often."""
        if self._seen is None or beat.progress_s != self._seen.progress_s:
            if self._seen is not None and beat.epoch == self._seen.epoch:
                self._longest_s = max(self._longest_s, beat.progress_s - self._seen.progress_s)
            self._has_told = False
        self._seen = beat
        lasts_s = beat.beat_s - beat.progress_s
        is_at_work = beat.phase not in (Phase.IDLE, Phase.PARKED)
        if is_at_work and not self._has_told and lasts_s > max(self._least_s, 2 * self._longest_s):
            self._has_told = True
            place = f"rank {beat.rank} has been in {beat.phase.name} for {lasts_s:.0f} s"
            logger.warning("%s; its threads:\n%s", place, _stacks())


def _stacks() -> str:
    """Of all threads, the main one last: who keeps the end of a log keeps that."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] == main)
    return "".join(f"{names.get(n, n)}:\n{''.join(traceback.format_stack(frame))}" for n, frame in frames)


class Heart:
    """Beats on whatever board it was given last, from its own thread, until the process ends."""

    def __init__(self, interval_s: float, witness: StuckWitness) -> None:
        self._interval_s, self._board, self._lock = interval_s, None, threading.Lock()
        self._witness = witness
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
                    self._witness.look(self._board.read())


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
