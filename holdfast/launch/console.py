"""What the driver prints: a progress bar and events on a terminal, plain lines in a pipe. A sink that never raises."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, TextIO, cast

import rich.console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from holdfast.events import (
    CheckpointWritten,
    Evaluated,
    Event,
    FaultDetected,
    FaultInjected,
    RecoveryDone,
    RunEnded,
    StageRebuilt,
)
from holdfast.launch.pace import Pace
from holdfast.launch.wording import TAG_COLUMNS, aligned, describe, duration, ending, step_line
from holdfast.types import StepReport

__all__ = ["Console"]

logger = logging.getLogger(__name__)

_REDRAW_S = 0.1
_PASSING = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EAGAIN})
"""Troubles of a stream that may end: try again with the next line."""
_STYLES = {
    "FAULT": "bold red",
    "DRAIN": "bold yellow",
    "PLAN": "bold yellow",
    "DONE": "bold green",
    "WAIT": "yellow",
    "SKIP": "yellow",
    "STOP": "bold yellow",
    "END": "bold",
    "NEXT": "bold",
}


class Console:
    """Event sink and step sink of the driver. Nothing that happens to the output can stop or fail the run.

    ``is_terminal`` overrides what the stream says of itself. Use it in a ``with`` block: on leaving, the terminal
    is clean and the end block, if the run has ended, is the last thing on it.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        log_every: int,
        stream: TextIO | None = None,
        is_terminal: bool | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._total_steps, self._log_every, self._clock = total_steps, log_every, clock
        stream = sys.stdout if stream is None else stream
        self._out = _Unbreakable(stream)
        self._screen = _Logged(_screen(self._out, is_terminal, total_steps, clock, owns_stdout=stream is sys.stdout))
        self._pace = Pace(window=log_every)
        self._failures = self._preemptions = self._injected = self._rebuilt = 0
        self._bits_per_byte: float | None = None
        self._saved: CheckpointWritten | None = None
        self._ended: RunEnded | None = None
        self._facts: Mapping[str, str] = {}
        self._next_command = ""
        self._has_banner = self._is_closed = self._has_complained = False

    # -- what to print --------------------------------------------------------------------------------------------

    def banner(self, facts: Mapping[str, str]) -> None:
        """The first screenful: run, devices, memory, data, resume, look. Printed once, whoever asks again."""
        if not self._has_banner:
            self._has_banner = True
            self._guarded(lambda: self._screen.show(aligned(facts)))

    def step(self, report: StepReport) -> None:
        """Every ``log_every`` steps a line; a step that is replayed after a rollback counts like any other."""
        self._guarded(lambda: self._step(report))

    def emit(self, event: Event) -> None:
        """See :class:`holdfast.events.EventSink`. The end of the run is kept for :meth:`close`."""
        self._guarded(lambda: self._emit(event))

    def conclude(self, facts: Mapping[str, str], *, next_command: str = "") -> None:
        """What the end block says besides how the run ended, and the one command to type next."""
        self._facts, self._next_command = facts, next_command

    def close(self) -> None:
        """Leave the terminal clean, the end block last."""
        if not self._is_closed:
            self._is_closed = True
            self._guarded(self._screen.close)
            self._guarded(self._end)
            self._out.settle()

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # -- how ------------------------------------------------------------------------------------------------------

    def _guarded(self, show: Callable[[], None]) -> None:
        """A sink must not raise: a run is worth more than its display. The driver's log learns of it, once."""
        try:
            show()
        except Exception:
            if not self._has_complained:
                self._has_complained = True
                logger.exception("something could not be shown on the console; the run goes on")

    def _step(self, report: StepReport) -> None:
        self._pace.note(report)
        self._screen.progress(report, self._pace)
        if report.step % self._log_every == 0 or report.step == self._total_steps:
            line = step_line(
                report, tokens_per_s=self._pace.tokens_per_s, failures=self._failures, rebuilt=self._rebuilt
            )
            self._screen.show([line])

    def _emit(self, event: Event) -> None:
        if isinstance(event, FaultDetected):
            self._preemptions += event.is_preemption
            self._failures = event.number - self._preemptions
        elif isinstance(event, RecoveryDone):  # by now it is known what was a preemption
            self._failures, self._preemptions = event.failures, event.preemptions
        elif isinstance(event, FaultInjected):
            self._injected += 1
        elif isinstance(event, StageRebuilt):
            self._rebuilt += 1
        elif isinstance(event, Evaluated):
            self._bits_per_byte = event.bits_per_byte
        elif isinstance(event, CheckpointWritten):
            self._saved = event
        elif isinstance(event, RunEnded):
            self._ended = event
        lines = describe(event, time.strftime("%H:%M:%S", time.localtime(self._clock())))
        if lines:
            self._screen.show(lines)

    def _end(self) -> None:
        if self._ended is None:
            return
        lines = ending(
            self._ended,
            total_steps=self._total_steps,
            bits_per_byte=self._bits_per_byte,
            injected=self._injected,
            rebuilt=self._rebuilt,
            facts={**self._what_is_saved(self._ended), **self._facts},
            next_command=self._next_command,
        )
        self._screen.show(lines)

    def _what_is_saved(self, ended: RunEnded) -> dict[str, str]:
        if self._saved is not None:
            return {"saved": f"checkpoint of step {self._saved.step:,}, {self._saved.path}"}
        return {} if ended.outcome == "finished" else {"saved": "no checkpoint was written in this attempt"}


# -- screens ----------------------------------------------------------------------------------------------------------


class _Screen(Protocol):
    """Where lines go. Called in the driver's thread; ``show`` has written when it returns."""

    def show(self, lines: Sequence[str]) -> None: ...

    def progress(self, report: StepReport, pace: Pace) -> None: ...

    def close(self) -> None: ...


def _screen(
    out: _Unbreakable, is_terminal: bool | None, total_steps: int, clock: Callable[[], float], *, owns_stdout: bool
) -> _Screen:
    canvas = _Canvas(file=cast(TextIO, out), force_terminal=True, highlight=False, markup=False, emoji=False)
    # Rich alone would also take a pipe for a terminal where FORCE_COLOR is set, as many CI systems do.
    if is_terminal is None:
        is_terminal = out.isatty() and not canvas.is_dumb_terminal
    if is_terminal:
        return _Terminal(canvas, total_steps, clock, owns_stdout=owns_stdout)
    return _Plain(out)


class _Logged:
    """Another screen, whose lines go into the driver's log too: that is in the run directory, and outlives the window,
    the Ray job and the cluster."""

    def __init__(self, screen: _Screen) -> None:
        self._screen = screen
        self.progress, self.close = screen.progress, screen.close

    def show(self, lines: Sequence[str]) -> None:
        for line in lines:
            logger.info("| %s", line)
        self._screen.show(lines)


class _Plain:
    """Lines and nothing else, for pipes, files and Ray's job log."""

    def __init__(self, out: _Unbreakable) -> None:
        self._out = out

    def show(self, lines: Sequence[str]) -> None:
        self._out.write("".join(f"{line}\n" for line in lines))
        self._out.flush()

    def progress(self, report: StepReport, pace: Pace) -> None:
        return

    def close(self) -> None:
        return


class _Terminal:
    """A progress bar at the bottom, lines above it. Drawn only when something happens: no thread, no timer."""

    def __init__(
        self, canvas: rich.console.Console, total_steps: int, clock: Callable[[], float], *, owns_stdout: bool
    ) -> None:
        self._canvas, self._clock = canvas, clock
        self._bar = Progress(
            _column("step {task.completed:,.0f}/{task.total:,.0f}"),
            BarColumn(bar_width=24),
            _column("{task.fields[numbers]}"),
            console=canvas,
            auto_refresh=False,
            transient=True,
            # So that a stray warning appears above the bar instead of tearing it.
            redirect_stdout=owns_stdout,
            redirect_stderr=owns_stdout,
        )
        self._task = self._bar.add_task("", total=total_steps, numbers="")
        self._drawn_s = -math.inf
        self._is_stale = self._is_closed = False

    def show(self, lines: Sequence[str]) -> None:
        if self._is_stale:
            self._draw()
        self._canvas.print(Text("\n").join(map(_painted, lines)), soft_wrap=True)

    def progress(self, report: StepReport, pace: Pace) -> None:
        if self._is_closed:
            return
        self._bar.start()  # at the first step; no effect at the others
        self._bar.update(self._task, completed=report.step, numbers=self._numbers(report, pace))
        self._is_stale = True
        if not 0 <= self._clock() - self._drawn_s < _REDRAW_S:  # a wall clock may be set back
            self._draw()

    def _draw(self) -> None:
        self._bar.refresh()
        self._drawn_s, self._is_stale = self._clock(), False

    def _numbers(self, report: StepReport, pace: Pace) -> str:
        rate = "" if pace.tokens_per_s is None else f"tok/s {pace.tokens_per_s:,.0f} "
        left = max(self._bar.tasks[0].total or 0, report.step) - report.step
        return f"loss {report.loss:.4f} bpb {report.bits_per_byte:.3f} {rate}ETA {duration(left * pace.step_s)}"

    def close(self) -> None:
        self._is_closed, self._is_stale = True, False
        self._bar.stop()


def _column(text: str) -> TextColumn:
    return TextColumn(text, markup=False, table_column=Column(no_wrap=True))


def _painted(line: str) -> Text:
    text = Text(line)
    tag = line[:TAG_COLUMNS].rstrip()
    if tag in _STYLES:
        text.stylize(_STYLES[tag], 0, len(tag))
    return text


class _Canvas(rich.console.Console):
    """Rich's console, with the cursor always visible: a driver that is killed could not bring it back."""

    def show_cursor(self, show: bool = True) -> bool:
        return False


class _Unbreakable:
    """A text stream that goes silent when its other end is gone, and writes what its encoding lacks as escapes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._is_gone = False
        self.encoding = getattr(stream, "encoding", None) or "utf-8"

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(self._encodable(text)))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def isatty(self) -> bool:
        return bool(getattr(self._stream, "isatty", bool)())

    def fileno(self) -> int:
        return self._stream.fileno()

    def settle(self) -> None:
        """The last word is written: what cannot be flushed now is given up."""
        if not self._is_gone:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._abandon(error)

    def _encodable(self, text: str) -> str:
        return text.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._is_gone:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: somebody has closed the stream
            if getattr(error, "errno", None) not in _PASSING:
                self._abandon(error)

    def _abandon(self, error: Exception) -> None:
        self._is_gone = True
        logger.warning("nothing more is shown on the console (%s); events.jsonl has it all", error)
        # What is still buffered would fail again when Python exits, and turn the run's exit code into 120.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
