"""``metrics.jsonl``: every step of a run, as the truth that trackers only show."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

from holdfast.trainer.jsonl import JsonLines
from holdfast.types import StepReport

__all__ = ["MetricsFile"]


class MetricsFile:
    """One JSON line per finished step, in the file when ``write`` returns; see :class:`JsonLines`.

    A step that is replayed after a rollback gets a second line: the later one is the one that counts.
    """

    def __init__(self, path: Path, *, attempt: int = 1, clock: Callable[[], float] = time.time) -> None:
        self._lines, self._attempt, self._clock = JsonLines(path), attempt, clock

    def write(self, report: StepReport) -> None:
        self.note(asdict(report))

    def note(self, record: Mapping[str, object]) -> None:
        """What is known now and then only, for example an evaluation; JSON values."""
        self._lines.append({"time": self._clock(), "attempt": self._attempt, **record})
