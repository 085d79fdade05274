"""The coordinator of a membership epoch: which version is tried next, and whether it counts. No I/O, no clock.

:mod:`holdfast.fault_tolerance.commit` tells the whole protocol.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from holdfast.fault_tolerance.commit import (
    Abort,
    Commit,
    Filled,
    Parts,
    Prepare,
    Seen,
    Send,
    Timing,
    Vote,
    make_record,
)

__all__ = ["Coordinator"]

_TRIES = 3
"""Attempts per version: an error may pass, but a version that cannot be encoded must not keep older ones waiting."""


@dataclass(slots=True)
class _Ballot:
    prepare: Prepare
    deadline_s: float
    asked_s: float
    votes: dict[int, Vote] = field(default_factory=dict)

    @property
    def waiting(self) -> list[int]:
        return [node for node in self.prepare.members if node not in self.votes]


class Coordinator:
    """Decides about the versions of one membership epoch, one at a time: the newest that is complete everywhere.

    ``base`` is the version the epoch started from; nothing up to it is looked at. ``world`` ranks make a version.
    To be thrown away when its keeper is fenced.
    """

    def __init__(self, epoch: int, members: Collection[int], world: int, *, base: int, timing: Timing) -> None:
        self._epoch, self._members, self._world = epoch, tuple(sorted(members)), world
        self._timing, self._newest = timing, base
        self._offers: dict[int, Filled] = {}
        self._tries: dict[int, int] = {}
        self._attempt = 0
        self._ballot: _Ballot | None = None
        self._last: Commit | None = None

    def handle(self, message: Filled | Vote, now: float) -> list[Send]:
        """What to send now. ``now`` never decreases."""
        if message.epoch != self._epoch or message.node not in self._members:
            return []
        sends = self._offered(message) if isinstance(message, Filled) else self._voted(message)
        return sends + self._prepare_next(now)

    def tick(self, now: float) -> list[Send]:
        """Repeat what has got no answer, give up what takes too long."""
        ballot = self._ballot
        if ballot is None:
            return []
        if now >= ballot.deadline_s:
            return self._abort(f"no vote of node(s) {ballot.waiting} in time") + self._prepare_next(now)
        if now - ballot.asked_s < self._timing.repeat_s:
            return []
        ballot.asked_s = now
        return [Send(node, ballot.prepare) for node in ballot.waiting]

    def _offered(self, offer: Filled) -> list[Send]:
        known = self._offers.get(offer.node)
        if known is None or offer.number > known.number:
            self._offers[offer.node] = offer
        return [Send(offer.node, Seen(self._epoch, offer.number))]

    def _voted(self, vote: Vote) -> list[Send]:
        ballot = self._ballot
        if ballot is None or vote.attempt != ballot.prepare.attempt:
            return self._remind(vote)
        if not vote.ok:
            return self._abort(f"node {vote.node}: {vote.reason}")
        ballot.votes[vote.node] = vote
        return [] if ballot.waiting else self._commit(ballot)

    def _remind(self, vote: Vote) -> list[Send]:
        """The node has not heard what became of its vote. It votes for nothing else meanwhile, so what came before the
        last commit, for which all have voted, is known to everybody."""
        last = self._last
        if last is not None and vote.attempt == last.attempt:
            return [Send(vote.node, last)]
        if last is None or vote.attempt > last.attempt:
            return [Send(vote.node, Abort(vote.version, self._epoch, vote.attempt, "the attempt is over"))]
        return []

    def _commit(self, ballot: _Ballot) -> list[Send]:
        record = make_record(ballot.prepare, ballot.votes.values())
        self._ballot, self._newest = None, record.version
        self._tries = {version: tries for version, tries in self._tries.items() if version > record.version}
        self._last = Commit(self._epoch, ballot.prepare.attempt, record)
        return [Send(node, self._last) for node in self._members]

    def _abort(self, reason: str) -> list[Send]:
        assert self._ballot is not None, "there is something to abort"
        prepare, self._ballot = self._ballot.prepare, None
        message = Abort(prepare.version, self._epoch, prepare.attempt, reason)
        return [Send(node, message) for node in self._members]

    def _prepare_next(self, now: float) -> list[Send]:
        if self._ballot is not None or (found := self._newest_complete()) is None:
            return []
        version, parts = found
        self._attempt += 1
        self._tries[version] = self._tries.get(version, 0) + 1
        prepare = Prepare(version, self._epoch, self._attempt, self._members, parts)
        self._ballot = _Ballot(prepare, now + self._timing.decide_s, now)
        return [Send(node, prepare) for node in self._members]

    def _newest_complete(self) -> tuple[int, Parts] | None:
        if len(self._offers) < len(self._members):
            return None
        common = set.intersection(*(set(offer.versions) for offer in self._offers.values()))
        for version in sorted(common, reverse=True):
            if version <= self._newest:
                return None
            parts = [item for offer in self._offers.values() for item in offer.versions[version].items()]
            if sorted(rank for rank, _ in parts) == list(range(self._world)) and self._tries.get(version, 0) < _TRIES:
                return version, dict(sorted(parts))
        return None
