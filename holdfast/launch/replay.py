"""What happened in a run, read back from ``metrics.jsonl`` and ``events.jsonl``."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.events import Event
from holdfast.launch.read_back import Unread, event_of, report_of
from holdfast.types import StepReport

__all__ = ["Happened", "happened"]

Told = StepReport | Event


@dataclass(frozen=True, slots=True)
class Happened:
    """A step or an event."""

    time_s: float
    """Unix time."""
    item: Told
    file: str
    end: int
    """Where its line ends in that file, in bytes from the start."""


def happened(*, metrics: Path, events: Path) -> Iterator[Happened]:
    """Everything that both files hold in whole lines, in order of time; what cannot be read is left out."""
    steps = _read(metrics, report_of)
    return heapq.merge(_read(events, _event), steps, key=lambda h: h.time_s)


def _read(path: Path, item_of: Callable[[Mapping[str, Any]], Told | None]) -> Iterator[Happened]:
    end = 0
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            if not line.endswith(b"\n"):  # being written, or torn by a kill
                return
            end += len(line)
            found = _record(line)
            item = item_of(found)
            if item is not None:
                yield Happened(float(found["time"]), item, path.name, end)


def _record(line: bytes) -> Mapping[str, Any]:
    """Empty for what is no record."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("time"), (int, float)) else {}


def _event(record: Mapping[str, Any]) -> Event | None:
    found = event_of(record)
    return None if isinstance(found, Unread) else found
