"""A tracker in a helper process: the driver's side, which never waits for it but at the end of a run."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from holdfast.events import Event, RunEnded
from holdfast.trainer.trackers import helper as helpers
from holdfast.trainer.trackers.helper import Helper
from holdfast.trainer.trackers.messages import Message, Narrator, no_step
from holdfast.trainer.trackers.plans import Plan
from holdfast.types import StepReport

__all__ = ["HelperTracker"]

logger = logging.getLogger(__name__)

_QUEUE = 4096
_START_GRACE_S = 30.0
"""For starting the helper and importing the library, on top of the time its server gets to answer."""


class HelperTracker:
    """Feeds a helper process. What that cannot take in time is dropped and counted.

    ``on_stop``: called in some thread when somebody stops the run there. ``stalled_after_s``: seconds without a step
    until that is worth an alert.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        attempt: int,
        on_stop: Callable[[str], None] | None = None,
        stalled_after_s: float = math.inf,
        capacity: int = _QUEUE,
        start_grace_s: float = _START_GRACE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._plan, self._on_stop, self._clock = plan, on_stop, clock
        self._start_grace_s, self._narrator = start_grace_s, Narrator(attempt)
        self._items: queue.Queue[tuple[float, StepReport | Event | Message]] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._run, name=f"holdfast-{plan.title}", daemon=True)
        self._log = _LogTap(self._put)
        self._stall = _Stall(stalled_after_s)
        self._endpoints: Mapping[str, str] = {}
        self._helper: Helper | None = None
        self._closing_s = math.inf  # when ``finish`` began, in monotonic seconds
        self._is_over = self._is_off = False
        self._exit_code = 1  # until the run tells how it has ended
        self.dropped = 0

    def start(self, endpoints: Mapping[str, str]) -> None:
        self._endpoints = endpoints
        _package_log().addHandler(self._log)
        self._thread.start()

    def log_step(self, report: StepReport) -> None:
        self._stall.step()
        self._put(report)

    def emit(self, event: Event) -> None:
        if isinstance(event, RunEnded):
            self._exit_code = event.exit_code
        self._put(event)

    def _put(self, item: StepReport | Event | Message) -> None:
        if self._is_off or self._is_closing:
            return
        try:
            self._items.put_nowait((self._clock(), item))
        except queue.Full:
            self.dropped += 1

    def finish(self) -> None:
        if self._is_closing or self._thread.ident is None:
            return
        self._closing_s = time.monotonic()
        _package_log().removeHandler(self._log)
        self._thread.join(self._plan.finish_timeout_s + helpers.FINISH_GRACE_S)
        self._is_over = True  # before the kill, so that no helper can be started behind its back
        title = self._plan.title
        if self._thread.is_alive():
            logger.warning("%s was not done after %.0f s and is ended", title, self._plan.finish_timeout_s)
        if self._helper is not None:
            self._helper.kill()
        if self.dropped:
            logger.warning("%s lacks %d records it was too slow for; the files have them", title, self.dropped)

    @property
    def _is_closing(self) -> bool:
        return self._closing_s < math.inf

    # -- in the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._helper = self._open()
            if self._helper is not None:
                self._feed(self._helper)
        except Exception as error:  # a thread's boundary: the driver's log learns of it, the run goes on
            if not self._is_over:
                logger.warning("%s is off from here on: %s: %s", self._plan.title, type(error).__name__, error)
        finally:
            self._is_off = True

    def _open(self) -> Helper | None:
        """A helper with an open tracker: as configured, else as the plan says next, else none."""
        problems: list[str] = []
        openings = self._plan.openings(self._endpoints)
        for opening in openings:
            self._helper = helper = Helper()  # known to ``finish`` while it starts
            problem = self._try(helper, opening, is_last=opening is openings[-1])
            if self._is_over:
                break
            if problem is None:
                self._say_how(problems, "offline, for `holdfast wandb-sync`")
                return helper
            problems.append(problem)
            helper.kill()
        helper.kill()
        self._say_how(problems, "without it")
        return None

    def _try(self, helper: Helper, opening: Mapping[str, object], *, is_last: bool) -> str | None:
        """Why it cannot be opened."""
        if self._is_over:
            return None
        patience_s = self._plan.finish_timeout_s + helpers.FINISH_GRACE_S
        return helper.open(self._plan.door, opening, patience_s=patience_s, is_late=self._lateness(is_last))

    def _lateness(self, is_last: bool) -> Callable[[], bool]:
        """Says when a start takes too long: once the run has ended sooner, so that there is time left for the next."""
        limit_s = time.monotonic() + self._plan.init_timeout_s + self._start_grace_s
        left_s = self._plan.finish_timeout_s / (1 if is_last else 2)
        return lambda: time.monotonic() > min(limit_s, self._closing_s + left_s)

    def _say_how(self, problems: Sequence[str], instead: str) -> None:
        if problems:
            why, title = "; ".join(dict.fromkeys(problems)), self._plan.title
            logger.warning(
                "%s could not be started as configured (%s); this attempt is recorded %s", title, why, instead
            )

    def _feed(self, helper: Helper) -> None:
        while True:
            self._listen(helper)
            silent_s = self._stall.news()
            if silent_s is not None:
                self._put(no_step(silent_s))
            try:
                time_s, item = self._items.get(timeout=helpers.POLL_S)
            except queue.Empty:
                if self._is_closing:
                    break
                continue
            for message in self._narrator.tell(time_s, item):
                helper.send(message)
        helper.send({"do": "finish", "exit_code": self._exit_code})
        helper.wait(self._plan.finish_timeout_s + helpers.FINISH_GRACE_S)
        self._listen(helper)

    def _listen(self, helper: Helper) -> None:
        title = self._plan.title
        for said in helper.said():
            if said.get("stop") and self._on_stop is not None:
                self._on_stop(f"somebody stopped the run in {title}")
            if "trouble" in said:
                logger.warning("%s refused a record, and maybe more: %s", title, said["trouble"])


class _Stall:
    """Notices, once each time, that steps have ceased."""

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self.step()

    def step(self) -> None:
        self._due_s = time.monotonic() + self._after_s

    def news(self) -> float | None:
        """Seconds without a step, at least; None where there is nothing to tell."""
        if time.monotonic() < self._due_s:
            return None
        self._due_s = math.inf
        return self._after_s


class _LogTap(logging.Handler):
    """Passes the driver's log on."""

    def __init__(self, put: Callable[[Message], None]) -> None:
        super().__init__(logging.INFO)
        self._pass_on = put

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(TypeError, ValueError):  # arguments that do not fit: the log file's handler says so
            self._pass_on({"do": "line", "level": record.levelno, "text": f"{record.name}: {record.getMessage()}"})


def _package_log() -> logging.Logger:
    return logging.getLogger("holdfast")
