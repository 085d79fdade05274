"""A keeper's side of the commit protocol: what it offers, votes on, promises and learns. No I/O, no clock.

:mod:`holdfast.fault_tolerance.commit` tells the whole protocol.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from holdfast.errors import InvariantViolation
from holdfast.fault_tolerance.commit import (
    Abort,
    Action,
    Commit,
    CommitRecord,
    Drop,
    Filled,
    Flip,
    Key,
    ParityBlock,
    Parts,
    Prepare,
    Seen,
    Send,
    StartEncoding,
    Timing,
    Vote,
)
from holdfast.fault_tolerance.commit_outcome import Outcome, Promise, Report

__all__ = ["Participant"]


@dataclass(slots=True)
class _Task:
    prepare: Prepare
    vote: Vote | None = None
    """None while it is being encoded."""
    told_s: float = 0.0

    @property
    def is_promised(self) -> bool:
        return self.vote is not None and self.vote.ok


class Participant:
    """One keeper's side. Its life is :meth:`fence`, :meth:`settle`, :meth:`begin`, work, and :meth:`fence` again;
    messages of other epochs, and those that come before ``begin``, change nothing.

    ``now`` never decreases. Actions are carried out in the order in which they are returned.
    """

    def __init__(self, node: int, *, timing: Timing) -> None:
        self._node, self._timing = node, timing
        self._epoch = 0
        self._coordinator: int | None = None
        self._attempt = 0  # the latest that was taken up, or known to be over before it was
        self._task: _Task | None = None
        self._record: CommitRecord | None = None
        self._offer: Filled | None = None
        self._offer_told_s = 0.0
        self._seen = 0

    @property
    def record(self) -> CommitRecord | None:
        """Of the newest version that this keeper knows to be committed."""
        return self._record

    @property
    def promise(self) -> Promise | None:
        """The yes-vote whose outcome this keeper does not know."""
        task = self._task
        if task is None or task.vote is None or not task.vote.ok:
            return None
        return Promise(task.prepare, task.vote)

    # -- between epochs -------------------------------------------------------------------------------------------

    def fence(self, epoch: int) -> list[Action]:
        """No vote and no outcome of an earlier epoch counts from now on. What is promised stays."""
        if epoch <= self._epoch:
            return []
        actions = self._give_up()
        self._epoch, self._coordinator, self._attempt = epoch, None, 0
        self._offer, self._seen = None, 0
        return actions

    def report(self, complete: Collection[Key]) -> Report:
        """For :func:`derive_outcome`, once fenced. ``complete``: versions whose data is here, all ranks of this node,
        every manifest intact."""
        records = () if self._record is None else (self._record,)
        promises = () if self.promise is None else (self.promise,)
        return Report(self._node, self._epoch, records, promises, tuple(sorted(complete)))

    def settle(self, outcome: Outcome) -> list[Action]:
        """What became of the promise. An outcome that was derived before the last fence changes nothing: others may
        have followed a later one."""
        promise = self.promise
        if promise is None or outcome.fence != self._epoch or promise.prepare.epoch >= outcome.fence:
            return []
        record = next((r for r in outcome.committed if r.key == promise.prepare.key), None)
        return self._release() if record is None else self._flip(record)

    def adopt(self, record: CommitRecord) -> None:
        """This node was not a member, or had lost its memory; its data and parity of the version have been rebuilt."""
        if self._record is None or self._record.key < record.key:
            self._record = record

    def forget_above(self, version: int) -> list[Action]:
        """The run goes back to ``version``: what is newer never happened."""
        if self._record is not None and self._record.version > version:
            self._record = None
        task = self._task
        return self._release() if task is not None and task.prepare.version > version else []

    def begin(self, epoch: int, coordinator: int) -> None:
        """The epoch runs, and ``coordinator`` is the lowest node of its membership. A late call changes nothing.

        Raises: InvariantViolation if the keeper is not fenced to the epoch, or has an old promise to keep: breaking it
        could cost the only version that all have.
        """
        if epoch < self._epoch:
            return
        promise = self.promise
        if epoch > self._epoch or (promise is not None and promise.prepare.epoch < epoch):
            raise InvariantViolation(
                f"node {self._node}, fenced to epoch {self._epoch}, cannot begin epoch {epoch} with {promise}; "
                "fence it, collect the reports and settle it first"
            )
        self._coordinator = coordinator

    # -- while an epoch runs --------------------------------------------------------------------------------------

    def filled(self, epoch: int, versions: Mapping[int, Parts], now: float) -> list[Action]:
        """What the local boards show of ``epoch``: versions that all ranks of this node have complete. To be called
        again and again; only a change is news."""
        offer = self._offer
        if epoch != self._epoch or self._coordinator is None or (offer is not None and offer.versions == versions):
            return []
        number = 1 if offer is None else offer.number + 1
        self._offer = Filled(self._node, epoch, number, {v: dict(parts) for v, parts in versions.items()})
        return self._tell_offer(now)

    def handle(self, message: Seen | Prepare | Commit | Abort, now: float) -> list[Action]:
        """What to do now that the coordinator has said this."""
        if message.epoch != self._epoch or self._coordinator is None:
            return []
        if isinstance(message, Prepare):
            return self._prepare(message, now)
        if isinstance(message, Seen):
            self._seen = max(self._seen, message.number)
            return []
        return self._commit(message) if isinstance(message, Commit) else self._abort(message)

    def encoded(self, prepare: Prepare, parity: Sequence[ParityBlock], now: float) -> list[Action]:
        """This node's parity blocks are complete in memory, and so is its data still."""
        if not self._is_encoding(prepare):
            return []
        if not self._holds(prepare):
            return self._refuse(f"version {prepare.version} went away while it was encoded", now)
        return self._vote(True, now, parity=tuple(parity))

    def encode_failed(self, prepare: Prepare, reason: str, now: float) -> list[Action]:
        """The version cannot be held or encoded here."""
        return self._refuse(reason, now) if self._is_encoding(prepare) else []

    def tick(self, now: float) -> list[Action]:
        """Repeat what has got no answer."""
        if self._coordinator is None:
            return []
        actions: list[Action] = []
        offer, task = self._offer, self._task
        if offer is not None and offer.number > self._seen and now - self._offer_told_s >= self._timing.repeat_s:
            actions += self._tell_offer(now)
        if task is not None and task.vote is not None and now - task.told_s >= self._timing.repeat_s:
            actions += self._tell_vote(now)
        return actions

    # -- inside ---------------------------------------------------------------------------------------------------

    def _prepare(self, prepare: Prepare, now: float) -> list[Action]:
        task = self._task
        if task is not None and task.is_promised:  # first learn what became of it: the answer to the vote says so
            return self._tell_vote(now)
        if prepare.attempt <= self._attempt:  # doubled, overtaken, or the vote was lost
            return self._tell_vote(now)
        actions = self._give_up()
        self._attempt, self._task = prepare.attempt, _Task(prepare)
        if self._holds(prepare):
            return [*actions, StartEncoding(prepare)]
        return actions + self._vote(False, now, reason=f"version {prepare.version} is not here, or not as described")

    def _holds(self, prepare: Prepare) -> bool:
        offered = {} if self._offer is None else self._offer.versions.get(prepare.version, {})
        return bool(offered) and all(prepare.parts.get(rank) == part for rank, part in offered.items())

    def _is_encoding(self, prepare: Prepare) -> bool:
        return self._task is not None and self._task.vote is None and self._task.prepare == prepare

    def _commit(self, commit: Commit) -> list[Action]:
        task = self._task
        is_mine = task is not None and task.is_promised and task.prepare.attempt == commit.attempt
        return self._flip(commit.record) if is_mine else []

    def _abort(self, abort: Abort) -> list[Action]:
        self._attempt = max(self._attempt, abort.attempt)
        task = self._task
        return self._release() if task is not None and task.prepare.attempt == abort.attempt else []

    def _flip(self, record: CommitRecord) -> list[Action]:
        self._task, self._record = None, record
        return [Flip(record)]

    def _release(self) -> list[Action]:
        """The attempt is over. After a no there is nothing left to free."""
        task, self._task = self._task, None
        if task is None or (task.vote is not None and not task.vote.ok):
            return []
        return [Drop(task.prepare.version, task.prepare.epoch)]

    def _give_up(self) -> list[Action]:
        """Whatever is not promised may end at any time."""
        return [] if self.promise is not None else self._release()

    def _refuse(self, reason: str, now: float) -> list[Action]:
        assert self._task is not None, "there is something to refuse"
        prepare = self._task.prepare
        return [Drop(prepare.version, prepare.epoch), *self._vote(False, now, reason=reason)]

    def _vote(self, ok: bool, now: float, *, parity: tuple[ParityBlock, ...] = (), reason: str = "") -> list[Action]:
        assert self._task is not None, "there is something to vote on"
        prepare = self._task.prepare
        self._task.vote = Vote(self._node, prepare.epoch, prepare.version, prepare.attempt, ok, parity, reason)
        return self._tell_vote(now)

    def _tell_vote(self, now: float) -> list[Action]:
        task = self._task
        if task is None or task.vote is None or self._coordinator is None:
            return []
        task.told_s = now
        return [Send(self._coordinator, task.vote)]

    def _tell_offer(self, now: float) -> list[Action]:
        assert self._offer is not None and self._coordinator is not None, "an epoch runs"
        self._offer_told_s = now
        return [Send(self._coordinator, self._offer)]
