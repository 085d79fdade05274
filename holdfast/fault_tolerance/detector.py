"""Which ranks have frozen or got stuck, judged from their own signs of life. Pure: time is an argument.

A dead process is reported by whoever started it. What nobody reports is a process that exists and does nothing:
stopped, swapping, hung in a driver call. Its peers wait in a collective and look healthy; so the rank that
is *not* waiting for others is the one to name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from holdfast.fault_tolerance.messages import BeatSeen
from holdfast.types import Phase

__all__ = ["Limits", "Suspect", "blame", "suspects"]

_WAITS_FOR_OTHERS = frozenset({Phase.JOIN, Phase.VOTE})
"""Phases in which a healthy rank stands still because another one does."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a rank may be silent."""

    suspect_after_s: float
    """Without a heartbeat."""
    step_timeout_s: float
    """With heartbeats, but in one phase of one step."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A rank to be replaced."""

    rank: int
    cause: str
    detected_after_s: float
    """Seconds since its last heartbeat (frozen) or progress (stuck)."""


def suspects(beats: Iterable[BeatSeen], now: float, limits: Limits) -> list[Suspect]:
    """All frozen ranks, longest silence first; if there are none, at most one rank that is stuck."""
    seen = list(beats)
    frozen = [beat for beat in seen if now - beat.beat_s > limits.suspect_after_s]
    if frozen:
        return [_frozen(beat, now) for beat in sorted(frozen, key=lambda b: (b.beat_s, b.rank))]
    slowest = min(seen, key=blame, default=None)
    if slowest is None or now - slowest.progress_s <= limits.step_timeout_s:
        return []
    return [_stuck(slowest, now)]


def blame(beat: BeatSeen) -> tuple[bool, int, float, int]:
    """Smallest first: not waiting for others, then behind in steps, then longest without progress."""
    return beat.phase in _WAITS_FOR_OTHERS, beat.step, beat.progress_s, beat.rank


def _frozen(beat: BeatSeen, now: float) -> Suspect:
    silence_s = now - beat.beat_s
    return Suspect(beat.rank, f"no heartbeat for {silence_s:.1f} s, {_place(beat)}", silence_s)


def _stuck(beat: BeatSeen, now: float) -> Suspect:
    silence_s = now - beat.progress_s
    return Suspect(beat.rank, f"heartbeats but no progress for {silence_s:.1f} s, {_place(beat)}", silence_s)


def _place(beat: BeatSeen) -> str:
    return f"last seen in phase {beat.phase.name.lower()} at step {beat.step}"
