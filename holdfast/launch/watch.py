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

__all__ = ["BoardWatcher", "Heart", "StuckWitness", "write_stacks"]

logger = logging.getLogger(__name__)

_LOOK_S = 0.002


class StuckWitness:
    """Tells, once, that a phase lasts unusually long. Pure."""

    def __init__(self, least_s: float) -> None:
        self._least_s = least_s
        self._longest_s = 0.0
        """Of the phases that have ended."""
        self._seen: Beat | None = None
        self._has_told = False

    def look(self, beat: Beat) -> str:
        """Often. Who has been where for how long, the first time that it is too long; else empty."""
        if self._seen is None or beat.progress_s != self._seen.progress_s:
            if self._seen is not None and beat.epoch == self._seen.epoch:
                self._longest_s = max(self._longest_s, beat.progress_s - self._seen.progress_s)
            self._has_told = False
        self._seen = beat
        lasts_s = beat.beat_s - beat.progress_s
        is_at_work = beat.phase not in (Phase.IDLE, Phase.PARKED)
        if not is_at_work or self._has_told or lasts_s <= max(self._least_s, 2 * self._longest_s):
            return ""
        self._has_told = True
        return f"rank {beat.rank} has been in {beat.phase.name} for {lasts_s:.0f} s"


def write_stacks(why: str) -> None:
    """Into the log, where every thread is: whoever hangs is ended in the end, and cannot be asked then. The main thread
    comes last, since who keeps the end of a log keeps that."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] == main)
    stacks = (f"{names.get(n, n)}:\n{''.join(traceback.format_stack(frame))}" for n, frame in frames)
    logger.warning("%s; its threads:\n%s", why, "".join(stacks))


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
                if self._board is None or time.monotonic() < self._silent_until_s:
                    continue
                self._board.beat(time.monotonic())
                why = self._witness.look(self._board.read())
            if why:  # by somebody else: a disk that hangs must not stop the heart
                threading.Thread(target=write_stacks, args=(why,), name="holdfast-stacks", daemon=True).start()


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
