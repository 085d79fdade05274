"""Who everybody waits for, long before it is replaced. Pure: time is an argument."""

from __future__ import annotations

from collections.abc import Collection

from holdfast.events import RankLate
from holdfast.fault_tolerance.detector import blame
from holdfast.fault_tolerance.messages import BeatSeen
from holdfast.types import Phase

__all__ = ["Laggards"]

_OF_A_STEP = frozenset({Phase.FORWARD_BACKWARD, Phase.FENCE, Phase.VOTE, Phase.UPDATE, Phase.CAPTURE})
_FACTOR = 3.0
"""How much longer than any phase so far is unusual."""


class Laggards:
    """Names the rank that is late, once in a step: one that beats and does not get on is no fault before
    ``recovery.step_timeout_s``, which has to be long enough for the longest step."""

    def __init__(self, least_s: float) -> None:
        self._least_s = least_s
        self._longest_s = 0.0
        """That ranks were seen to spend on a part of a step."""
        self._seen: dict[int, BeatSeen] = {}
        self._named: tuple[int, int] | None = None
        """Epoch and step."""

    def look(self, beats: Collection[BeatSeen], now: float) -> RankLate | None:
        """Often, with the newest beat of every rank."""
        for beat in beats:
            self._learn(beat)
        slowest = min(beats, key=blame, default=None)
        if slowest is None or slowest.phase not in _OF_A_STEP or not self._longest_s:
            return None
        lasts_s, place = now - slowest.progress_s, (slowest.epoch, slowest.step)
        if place == self._named or lasts_s <= max(self._least_s, _FACTOR * self._longest_s):
            return None
        self._named = place
        return RankLate(slowest.rank, slowest.phase.name.lower(), slowest.step, lasts_s)

    def _learn(self, beat: BeatSeen) -> None:
        before = self._seen.get(beat.rank)
        self._seen[beat.rank] = beat
        if before is not None and before.epoch == beat.epoch and before.phase in _OF_A_STEP:
            self._longest_s = max(self._longest_s, beat.progress_s - before.progress_s)
