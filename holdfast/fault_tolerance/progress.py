"""What the heartbeats of one membership epoch say: how far it got, who has resumed, who has frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from holdfast.fault_tolerance.detector import Limits, Suspect, suspects
from holdfast.fault_tolerance.messages import BeatSeen, Member
from holdfast.types import Phase

__all__ = ["EpochWatch"]

_NOT_RESTORED_YET = frozenset({Phase.IDLE, Phase.JOIN, Phase.BUILD, Phase.RESTORE, Phase.PARKED})


class EpochWatch:
    """Follows the members of one epoch from its start until the next one starts."""

    def __init__(self, epoch: int, version: int, members: Iterable[Member], now: float) -> None:
        self.epoch, self.started_s = epoch, now
        self.first_step = max(version, 0)
        """Steps finished before the epoch's first one."""
        self.top_step = self.first_step
        """Most steps that any rank is known to have finished."""
        self._rank_of = {member.worker: member.rank for member in members}
        self._ranks = set(self._rank_of.values())
        self._restored: set[int] = set()
        self._resumed: set[int] = set()
        # Nobody is silent before the epoch has begun: its start counts as a sign of life from everybody.
        start = {r: BeatSeen(r, epoch, Phase.IDLE, self.first_step, now, now) for r in self._ranks}
        self._beats: dict[int, BeatSeen] = start

    @property
    def has_restored(self) -> bool:
        """Every rank holds the state it starts from."""
        return self._restored >= self._ranks

    @property
    def has_resumed(self) -> bool:
        """Every rank has finished a step in this epoch, or all there was to do."""
        return self._resumed >= self._ranks

    @property
    def resumed_step(self) -> int:
        """The first step finished in this epoch, or the one it began with if there was nothing to do."""
        return min(self.top_step, self.first_step + 1)

    def last(self, worker: int) -> BeatSeen | None:
        """The newest sign of life of a member, who may have another rank by now; None for anybody else."""
        rank = self._rank_of.get(worker)
        return None if rank is None else self._beats[rank]

    def note(self, beats: Mapping[int, BeatSeen]) -> None:
        """Take over new beats. One of an older epoch proves a heartbeat, but no progress in this epoch."""
        for beat in beats.values():
            if beat.rank in self._ranks and beat.epoch <= self.epoch:
                self._note(beat)

    def _note(self, beat: BeatSeen) -> None:
        known = self._beats[beat.rank]
        if beat.epoch < self.epoch:
            self._beats[beat.rank] = replace(known, beat_s=max(known.beat_s, beat.beat_s))
            return
        self._beats[beat.rank] = replace(
            beat, beat_s=max(known.beat_s, beat.beat_s), progress_s=max(known.progress_s, beat.progress_s)
        )
        self.top_step = max(self.top_step, beat.step)
        has_stepped = beat.step > self.first_step
        if has_stepped or beat.phase not in _NOT_RESTORED_YET:
            self._restored.add(beat.rank)
        if has_stepped:
            self._resumed.add(beat.rank)

    def conclude(self, worker: int) -> None:
        """The member has left because there is nothing more to do."""
        rank = self._rank_of[worker]
        self._restored.add(rank)
        self._resumed.add(rank)

    def overslept(self, seconds: float) -> None:
        """The observer did not look for so long: do not hold that against the ranks."""
        for rank, beat in self._beats.items():
            self._beats[rank] = replace(beat, beat_s=beat.beat_s + seconds, progress_s=beat.progress_s + seconds)

    def suspects(self, ranks: Iterable[int], now: float, limits: Limits) -> list[Suspect]:
        """Those of ``ranks`` that have frozen, or the one that is stuck."""
        return suspects([self._beats[rank] for rank in ranks], now, limits)
