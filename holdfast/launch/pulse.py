"""Keeping a finger on every node: heartbeats for the supervisor, step reports for the sinks, leases for the keepers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from holdfast.fault_tolerance.messages import BeatSeen
from holdfast.launch.calls import Calls
from holdfast.launch.fleet import Address, Completion, Role
from holdfast.types import Phase, StepReport

__all__ = ["Pulse"]

_FAILURES = 5
"""Attempts in a row that fail before it is worth a word: single ones do, when a rank has skipped the version."""

StepSink = Callable[[StepReport], None]


class Pulse:
    """Asks each keeper a few times per second. A keeper that does not answer in time is reported, never waited for."""

    def __init__(self, calls: Calls, *, interval_s: float, silence_s: float, on_step: StepSink) -> None:
        self._calls, self._interval_s, self._silence_s, self._on_step = calls, interval_s, silence_s, on_step
        self._due_s: dict[int, float] = {}
        self._waiting: set[int] = set()
        self._since: dict[int, int] = {}
        self._asked_s: dict[int, float] = {}
        self._newest = (-1, -1)
        self._roster = 0
        self._committed = (-1, -1)
        self._committed_news: set[tuple[int, int]] = set()
        self._protected: dict[int, tuple[tuple[int, int], int]] = {}
        """By node, its newest committed version, and how many attempts had failed when it was heard of or told of."""
        self.unprotected: list[tuple[int, str]] = []
        """Nodes where one version after the other could not be committed, and why; the conductor empties the list."""
        self._parity_s: dict[int, float] = {}
        self.beats: dict[int, BeatSeen] = {}
        """Newest sign of life by rank, in the driver's clock."""
        self.versions: dict[int, list[Mapping[str, Any]]] = {}
        """Complete versions in memory by rank, as of the last pulse."""
        self.bricks: dict[int, Mapping[str, Any]] = {}
        """What each node has of the run's frozen files, see ``BrickStore.status``; nothing in a run without them."""
        self.heard_s: dict[int, float] = {}
        """When the newest pulse that was answered had been asked for, by node."""
        self.silent: list[tuple[int, str]] = []
        """Nodes whose keeper did not answer in time or failed; the conductor empties the list."""

    def ask(self, nodes: Iterable[int], now: float) -> None:
        """Send a pulse to every keeper whose turn it is."""
        for node in nodes:
            if node in self._waiting or self._due_s.get(node, 0.0) > now:
                continue
            self._waiting.add(node)
            self._due_s[node] = now + self._interval_s
            since = {str(rank): seq for rank, seq in self._since.items()}
            self._calls.ask(
                Address(Role.KEEPER, node),
                "pulse",
                since,
                then=self._receive(node, now),
                deadline_s=now + self._silence_s,
            )

    def beats_at(self, now: float) -> dict[int, BeatSeen]:
        """The newest signs of life by rank, as old as they were when the keeper was asked: that it has told nothing
        since is not the ranks' silence, but its own."""
        return {rank: _later(beat, now - self._asked_s[rank]) for rank, beat in self.beats.items()}

    def committed(self) -> list[tuple[int, int]]:
        """Epoch and version of what the keepers have committed since this was asked last, oldest first."""
        news, self._committed_news = sorted(self._committed_news), set()
        return news

    @property
    def parity_s(self) -> float:
        """Seconds that the newest parity took in the slowest keeper, as far as heard; 0 before there is any."""
        return max(self._parity_s.values(), default=0.0)

    def move_to(self, roster: int) -> None:
        """Ranks are others from now on; what keepers tell of those of another roster is old."""
        self._roster = roster
        for rank in list(self.beats):
            self.forget_rank(rank)

    def forget_rank(self, rank: int) -> None:
        """The rank's keeper starts again with an empty board."""
        self._since.pop(rank, None)
        self.beats.pop(rank, None)
        self.versions.pop(rank, None)

    def _receive(self, node: int, asked_s: float) -> Callable[[Completion], None]:
        def then(answer: Completion) -> None:
            self._waiting.discard(node)
            if answer.error is not None:
                self.silent.append((node, answer.error))
                return
            self.heard_s[node] = asked_s
            pulse = cast(Mapping[str, Any], answer.result)
            # CLOCK_MONOTONIC differs between hosts: carry over ages, not instants. The time of asking errs on
            # the side of an older beat by one round trip at most.
            self._note_protection(node, pulse["protection"])
            if pulse.get("bricks"):
                self.bricks[node] = pulse["bricks"]
            for rank, seen in pulse["ranks"].items() if pulse["roster"] == self._roster else ():
                self._asked_s[int(rank)] = asked_s
                self._note(int(rank), seen, asked_s - float(pulse["now"]))

        return then

    def _note(self, rank: int, seen: Mapping[str, Any], offset_s: float) -> None:
        self._since[rank] = int(seen["next_seq"])
        self.versions[rank] = list(seen["versions"])
        beat = seen["beat"]
        self.beats[rank] = BeatSeen(
            rank=rank,
            epoch=int(beat["epoch"]),
            phase=Phase(int(beat["phase"])),
            step=int(beat["step"]),
            beat_s=float(beat["beat_s"]) + offset_s,
            progress_s=float(beat["progress_s"]) + offset_s,
        )
        self._report(seen["reports"])

    def _note_protection(self, node: int, status: Mapping[str, Any]) -> None:
        self._parity_s = {**self._parity_s, node: float(status["encode_s"])}  # replaced, because other threads read it
        found, aborted = (int(status["epoch"]), int(status["committed"])), int(status["aborted"])
        known, failed = self._protected.get(node, ((-1, -1), 0))
        if found != known:
            self._protected[node] = found, aborted
        elif aborted - failed >= _FAILURES:
            self._protected[node] = found, aborted
            self.unprotected.append((node, str(status["reason"])))
        if found > self._committed:
            self._committed = found
            self._committed_news.add(found)

    def _report(self, reports: Sequence[Mapping[str, Any]]) -> None:
        """Every rank tells the same story: keep the first telling of each step, and replays of a newer epoch."""
        for fields in reports:
            report = StepReport(**fields)
            if (report.epoch, report.step) > self._newest:
                self._newest = (report.epoch, report.step)
                self._on_step(report)


def _later(beat: BeatSeen, seconds: float) -> BeatSeen:
    return replace(beat, beat_s=beat.beat_s + seconds, progress_s=beat.progress_s + seconds)
