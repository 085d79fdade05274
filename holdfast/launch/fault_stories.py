"""Each fault of a run with everything the files tell about it: what was done on purpose before, what was decided, how
long it took, and the last words of whoever was lost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from holdfast.events import Event, FaultDetected, FaultInjected, RecoveryDone, RecoveryPlanned, RunStarted
from holdfast.launch.records import tail
from holdfast.launch.run_view import RunView

__all__ = ["FaultStory", "fault_stories", "last_words"]

_TAIL_LINES = 40


@dataclass(slots=True)
class FaultStory:
    """A fault, ``ordinal`` counting over all attempts from 1."""

    ordinal: int
    attempt: int
    time_s: float
    fault: FaultDetected
    injected: list[FaultInjected] = field(default_factory=list)
    """What was broken on purpose since the fault before; it may be the cause and need not be."""
    plans: list[RecoveryPlanned] = field(default_factory=list)
    """The last one was carried out."""
    done: RecoveryDone | None = None
    """The end of the outage, which faults that came during it share; None if the run did not go on in this attempt."""
    done_s: float | None = None


def fault_stories(view: RunView) -> list[FaultStory]:
    """In the order in which they were detected."""
    scribe = _Scribe()
    for one in view.events:
        scribe.take(one.time_s, one.event)
    return scribe.stories


class _Scribe:
    def __init__(self) -> None:
        self.stories: list[FaultStory] = []
        self._open: list[FaultStory] = []
        self._injected: list[FaultInjected] = []
        self._attempt = 1

    def take(self, time_s: float, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._attempt, self._open, self._injected = event.attempt, [], []
        elif isinstance(event, FaultInjected):
            self._injected.append(event)
        elif isinstance(event, FaultDetected):
            self._begin(time_s, event)
        elif isinstance(event, RecoveryPlanned):
            for story in self._open[-1:]:
                story.plans.append(event)
        elif isinstance(event, RecoveryDone):
            for story in self._open:
                story.done, story.done_s = event, time_s
            self._open = []

    def _begin(self, time_s: float, fault: FaultDetected) -> None:
        story = FaultStory(len(self.stories) + 1, self._attempt, time_s, fault, self._injected)
        self._injected = []
        self.stories.append(story)
        self._open.append(story)


def last_words(view: RunView, stories: list[FaultStory]) -> dict[int, Mapping[str, str]]:
    """By the ordinal of the fault, the ends of logs that were kept, by the name of their file below ``failures``.

    A directory belongs to the first fault that its summary describes: attempts count their faults anew.
    """
    found: dict[int, Mapping[str, str]] = {}
    left = list(_kept(view.path / "failures"))
    for story in stories:
        mine = next((one for one in left if one[1] == _as_json(story.fault)), None)
        if mine is not None:
            left.remove(mine)
            found[story.ordinal] = dict(_tails(mine[0]))
    return found


def _kept(failures: Path) -> Iterator[tuple[Path, object]]:
    for folder in sorted(failures.glob("[0-9]*")):
        with suppress(OSError, ValueError):
            yield folder, json.loads((folder / "summary.json").read_bytes())


def _as_json(fault: FaultDetected) -> object:
    plain: object = json.loads(json.dumps(asdict(fault)))
    return plain


def _tails(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.glob("*.tail.txt")):
        with suppress(OSError):
            if words := tail(file, _TAIL_LINES):
                yield f"{folder.name}/{file.name}", words
