"""When a version counts: the commit protocol of the keepers. No I/O, no clock, no threads, no chance.

::

    board ─▶ filled ─▶ Filled ─▶ coordinator ─▶ Prepare ─▶ StartEncoding ─▶ encoded ─▶ Vote ─▶ coordinator
                                 coordinator ─▶ Commit ─▶ Flip  when all have voted yes, else  Abort ─▶ Drop

Two-phase commit with presumed abort. Every keeper runs a :class:`Participant`; the keeper of the lowest node of a
membership epoch also runs its :class:`Coordinator`. A version is committed from the moment its record exists, and by
then every member has promised to hold data and parity until it knows the outcome. Readers trust records only.

Messages may be lost, doubled, late and overtaken. Whoever waits repeats itself on ``tick``: the coordinator a
``Prepare`` without a vote, a participant its ``Filled`` until it is ``Seen`` and its ``Vote`` until it hears the
outcome. Attempts are numbered through the whole epoch, and a participant takes up one at a time, in that order.

An epoch's coordinator never comes back after a crash. Whoever recovers fences the living keepers to a newer epoch, so
that nobody votes any more, collects their reports, and lets :func:`derive_outcome` say what became of versions in
doubt. A keeper that has not reported is out for good, its memory with it.

What is promised, for an erasure code that tolerates m losses: once m + 1 keepers have heard of a record, it or a newer
one can be restored from the living, as long as no more than m members have died since it was prepared.

Source: arXiv 2406.10707 section 4 (two phases), arXiv 2310.12670 (versions and parity among nodes).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cached_property
from typing import Any

from holdfast.errors import ConfigurationError, InvariantViolation, ManifestMismatch

__all__ = [
    "Abort",
    "Action",
    "Commit",
    "CommitRecord",
    "Coordinator",
    "Drop",
    "Filled",
    "Flip",
    "Outcome",
    "ParityBlock",
    "Participant",
    "Prepare",
    "Promise",
    "RankVote",
    "Report",
    "Seen",
    "Send",
    "StartEncoding",
    "Timing",
    "Vote",
    "derive_outcome",
    "from_json",
    "to_json",
]

Key = tuple[int, int]
"""Version and epoch: one without the other names nothing."""

_TRIES = 3
"""Attempts per version: an error may pass, but a version that cannot be encoded must not keep older ones waiting."""


# -- what is agreed on ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RankVote:
    """What a rank has written: bytes of data and manifest together, and the digest of its manifest."""

    length: int
    digest: str
    manifest_bytes: int = 0
    """The last so many of them."""


Parts = Mapping[int, RankVote]
"""By rank."""


@dataclass(frozen=True, slots=True, order=True)
class ParityBlock:
    """One parity block. Of a stripe there are as many as losses are tolerated, each on another node."""

    group: int
    stripe: int
    index: int
    """Which of the stripe's parity blocks."""
    digest: str


@dataclass(frozen=True)
class CommitRecord:
    """The proof that a version is complete everywhere. Two records of one version and epoch are equal."""

    version: int
    epoch: int
    world: int
    parts: Parts
    parity: tuple[ParityBlock, ...]
    """In order; empty without an erasure code."""

    def __post_init__(self) -> None:
        if sorted(self.parts) != list(range(self.world)):
            raise InvariantViolation(f"{self} needs the parts of ranks 0-{self.world - 1}")
        if len({(block.group, block.stripe, block.index) for block in self.parity}) < len(self.parity):
            raise InvariantViolation(f"{self} has one parity block from two nodes")

    @property
    def key(self) -> Key:
        return self.version, self.epoch

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the other fields, in hexadecimal."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


# -- messages between keepers ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Filled:
    """To the coordinator: what ``node`` has complete, all of its ranks, and may still offer."""

    node: int
    epoch: int
    number: int
    """Counts the node's offers of this epoch, so that an old one cannot replace a newer one."""
    versions: Mapping[int, Parts]


@dataclass(frozen=True, slots=True)
class Seen:
    """The answer to :class:`Filled`."""

    epoch: int
    number: int


@dataclass(frozen=True, slots=True)
class Prepare:
    """To every member: hold the version, compute the parity blocks that are yours, then vote."""

    version: int
    epoch: int
    attempt: int
    members: tuple[int, ...]
    parts: Parts
    """Of all ranks: parity is computed over the longest."""

    @property
    def key(self) -> Key:
        return self.version, self.epoch


@dataclass(frozen=True, slots=True)
class Vote:
    """To the coordinator. A yes is a promise: data and parity stay until the outcome is known."""

    node: int
    epoch: int
    version: int
    attempt: int
    ok: bool
    parity: tuple[ParityBlock, ...] = ()
    """What this node holds."""
    reason: str = ""
    """Of a no."""


@dataclass(frozen=True, slots=True)
class Commit:
    """To every member: the version counts."""

    epoch: int
    attempt: int
    record: CommitRecord


@dataclass(frozen=True, slots=True)
class Abort:
    """To every member: the attempt has failed. What the ranks have written may be offered again."""

    version: int
    epoch: int
    attempt: int
    reason: str


# -- what a keeper has to do ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Send:
    """Bring the message to the participant or the coordinator of a node, perhaps this one; it may be lost."""

    node: int
    message: Filled | Seen | Prepare | Vote | Commit | Abort


@dataclass(frozen=True, slots=True)
class StartEncoding:
    """Pin the ranks' data, compute this node's parity blocks, and answer with ``encoded`` or ``encode_failed``. The pin
    and the parity stay until :class:`Flip` or :class:`Drop`, which may come before the answer."""

    prepare: Prepare


@dataclass(frozen=True, slots=True)
class Flip:
    """Mark the version COMMITTED, with its parity, and release every older one."""

    record: CommitRecord


@dataclass(frozen=True, slots=True)
class Drop:
    """Free the parity of the version, and lift the pin from its data."""

    version: int
    epoch: int


Action = Send | StartEncoding | Flip | Drop


@dataclass(frozen=True, slots=True)
class Timing:
    """How patient keepers are with each other, in seconds."""

    repeat_s: float = 0.5
    """What has got no answer is said again."""
    decide_s: float = 60.0
    """An attempt without all votes is aborted; encoding has to fit."""

    def __post_init__(self) -> None:
        if not 0 < self.repeat_s < self.decide_s:
            raise ConfigurationError(
                f"repeat_s={self.repeat_s} must be positive and less than decide_s={self.decide_s}: "
                "a lost message is repeated before the attempt is given up"
            )


# -- the coordinator ------------------------------------------------------------------------------------------------


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
        record = _make_record(ballot.prepare, ballot.votes.values())
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


# -- the participant ------------------------------------------------------------------------------------------------


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


# -- after a crash --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Promise:
    """A yes-vote, and what it was given for."""

    prepare: Prepare
    vote: Vote


@dataclass(frozen=True, slots=True)
class Report:
    """What one living, fenced keeper knows."""

    node: int
    fence: int
    """The epoch it is fenced to."""
    records: tuple[CommitRecord, ...]
    promises: tuple[Promise, ...]
    complete: tuple[Key, ...]
    """Versions whose data is there and intact."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has become of every version that anybody alive has a record of or a promise for."""

    fence: int
    """The epoch all reports were fenced to: nothing can have changed since."""
    committed: tuple[CommitRecord, ...]
    """Newest first."""
    aborted: tuple[Abort, ...]
    """Parity of these is void. What the ranks have written may still be good, where every rank has it."""


def derive_outcome(reports: Sequence[Report]) -> Outcome:
    """Read from the reports of all living keepers what the last coordinator decided, or might have.

    A version with a record anywhere is committed. One for which every member of its epoch lives, has promised and has
    its data still, is committed now, with the record its coordinator would have made: nobody can have acted on an
    abort. All others are aborted: a coordinator that committed them has taken the news with it. Asking again, after
    some have settled and some have died, gives an answer that does no harm to those who followed the first.

    Raises: InvariantViolation when keepers are not fenced to one epoch, or two records contradict each other.
    """
    fence = _common_fence(reports)
    records = _records(reports)
    aborted: list[Abort] = []
    for key, promises in _promises(reports).items():
        if key in records:
            continue
        prepare = promises[0].prepare
        reason = _why_not(promises, {report.node for report in reports if key in report.complete})
        if reason:
            aborted.append(Abort(*key, prepare.attempt, reason))
        else:
            records[key] = _make_record(prepare, [promise.vote for promise in promises])
    return Outcome(fence, tuple(records[key] for key in sorted(records, reverse=True)), tuple(aborted))


def _common_fence(reports: Sequence[Report]) -> int:
    fences = {report.node: report.fence for report in reports}
    latest = max(fences.values(), default=0)
    if any(fence < latest for fence in fences.values()):
        raise InvariantViolation(f"keepers are fenced to different epochs, by node: {fences}; fence all and ask again")
    voting = [p.vote for report in reports for p in report.promises if p.vote.epoch >= latest]
    if voting:
        raise InvariantViolation(f"epoch {latest} still votes: {voting[0]}; fence it first")
    return latest


def _records(reports: Sequence[Report]) -> dict[Key, CommitRecord]:
    found: dict[Key, CommitRecord] = {}
    for record in (record for report in reports for record in report.records):
        if found.setdefault(record.key, record).digest != record.digest:
            raise InvariantViolation(f"two records of version {record.version}, epoch {record.epoch}, contradict")
    return found


def _promises(reports: Sequence[Report]) -> dict[Key, list[Promise]]:
    found: dict[Key, list[Promise]] = {}
    for promise in (promise for report in reports for promise in report.promises):
        found.setdefault(promise.prepare.key, []).append(promise)
    return found


def _why_not(promises: Sequence[Promise], holders: Collection[int]) -> str:
    """The reason against committing a version without a record; nothing if there is none."""
    latest = max(promise.prepare.attempt for promise in promises)
    voters = {promise.vote.node for promise in promises if promise.prepare.attempt == latest}
    members = set(promises[0].prepare.members)
    if members - voters:
        return f"no yes of node(s) {sorted(members - voters)}, and nobody has a record"
    if members - set(holders):
        return f"node(s) {sorted(members - set(holders))} have lost it"
    return ""


def _make_record(prepare: Prepare, votes: Collection[Vote]) -> CommitRecord:
    """Depends on nothing but what was voted on, so that whoever makes it makes the same."""
    parity = sorted(block for vote in votes for block in vote.parity)
    return CommitRecord(prepare.version, prepare.epoch, len(prepare.parts), prepare.parts, tuple(parity))


# -- as JSON --------------------------------------------------------------------------------------------------------

Spoken = Filled | Seen | Prepare | Vote | Commit | Abort | CommitRecord | Promise | Report | Outcome


def to_json(spoken: Spoken) -> dict[str, object]:
    """As a JSON value. Records carry their digest."""
    return {"kind": type(spoken).__name__, **_plain(spoken)}


def from_json(value: Mapping[str, object]) -> Spoken:
    """Inverse of :func:`to_json`; integer keys may have become strings. Raises: ManifestMismatch for anything else,
    and for a record that does not match its digest."""
    try:
        content = dict(value)
        return _KINDS[str(content.pop("kind"))](content)
    except (KeyError, TypeError, ValueError, AttributeError, InvariantViolation) as error:
        raise ManifestMismatch(f"no message of the commit protocol ({error!r}): {str(value)[:200]}") from error


def _plain(value: Any) -> Any:  # Any: a JSON value of whatever shape the fields have
    if isinstance(value, CommitRecord):
        return {**asdict(value), "digest": value.digest}
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def _reader(kind: Callable[..., Any]) -> Callable[[Mapping[str, Any]], Any]:
    """Fields of one name have one type in every message."""
    return lambda value: kind(**{n: _FIELDS[n](entry) if n in _FIELDS else entry for n, entry in value.items()})


def _parts(entry: Mapping[str, Mapping[str, Any]]) -> Parts:
    return {int(rank): RankVote(**part) for rank, part in entry.items()}


def _record(value: Mapping[str, Any]) -> CommitRecord:
    content = dict(value)
    digest = content.pop("digest")
    record: CommitRecord = _reader(CommitRecord)(content)
    if record.digest != digest:
        raise ManifestMismatch(f"the record of version {record.version}, epoch {record.epoch}, is damaged: {digest}")
    return record


def _each(read: Callable[[Any], Any]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    return lambda entries: tuple(read(entry) for entry in entries)


_FIELDS: Mapping[str, Callable[[Any], object]] = {
    "parts": _parts,
    "versions": lambda entry: {int(version): _parts(parts) for version, parts in entry.items()},
    "parity": _each(lambda block: ParityBlock(**block)),
    "members": tuple,
    "complete": _each(tuple),
    "record": _record,
    "records": _each(_record),
    "committed": _each(_record),
    "aborted": _each(lambda abort: Abort(**abort)),
    "promises": _each(_reader(Promise)),
    "prepare": _reader(Prepare),
    "vote": _reader(Vote),
}

_KINDS: Mapping[str, Callable[[Mapping[str, Any]], Spoken]] = {
    **{k.__name__: _reader(k) for k in (Filled, Seen, Prepare, Vote, Commit, Abort, Promise, Report, Outcome)},
    "CommitRecord": _record,
}
