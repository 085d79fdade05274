"""What became of versions in doubt after a crash, read from what the living keepers know. No I/O, no clock.

:mod:`holdfast.fault_tolerance.commit` tells the whole protocol.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from holdfast.errors import InvariantViolation
from holdfast.fault_tolerance.commit import Abort, CommitRecord, Key, Prepare, Vote, make_record

__all__ = ["Outcome", "Promise", "Report", "derive_outcome"]


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
            records[key] = make_record(prepare, [promise.vote for promise in promises])
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
