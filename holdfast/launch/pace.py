"""How fast a run goes, by its newest steps."""

from __future__ import annotations

from collections import deque

from holdfast.types import StepReport

__all__ = ["Pace"]


class Pace:
    """Tokens and seconds of the newest steps, from reports that may have gaps and may go back."""

    def __init__(self, window: int) -> None:
        self._tokens: deque[float] = deque(maxlen=window)
        self._seconds: deque[float] = deque(maxlen=window)
        self._last = (0, 0)
        self._tokens_per_step = 0.0

    def note(self, report: StepReport) -> None:
        steps, tokens = report.step - self._last[0], report.tokens - self._last[1]
        if steps != 0:  # negative after a rollback, and then so are the tokens
            self._tokens_per_step = tokens / steps
        self._last = (report.step, report.tokens)
        self._tokens.append(self._tokens_per_step)
        self._seconds.append(report.step_s)

    @property
    def tokens_per_s(self) -> float | None:
        """None before a step."""
        seconds = sum(self._seconds)
        return sum(self._tokens) / seconds if seconds > 0 else None

    @property
    def step_s(self) -> float:
        """Mean; 0 before a step."""
        return sum(self._seconds) / max(len(self._seconds), 1)
