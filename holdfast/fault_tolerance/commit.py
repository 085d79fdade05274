"""When a version counts: the commit protocol of the keepers. No I/O, no clock, no threads, no chance.

::

    board ─▶ filled ─▶ Filled ─▶ coordinator ─▶ Prepare ─▶ StartEncoding ─▶ encoded ─▶ Vote ─▶ coordinator
                                 coordinator ─▶ Commit ─▶ Flip  when all have voted yes, else  Abort ─▶ Drop

Two-phase commit with presumed abort. Every keeper runs a participant (``commit_participant``); the keeper of the lowest
node of an epoch also runs its coordinator (``commit_coordinator``). A version is committed from the moment its record
exists, and by then every member has promised to hold data and parity until it knows the outcome. Readers trust records
only. In this module is what keepers agree on, what they say to each other, and what they have to do.

Messages may be lost, doubled, late and overtaken. Whoever waits repeats itself on ``tick``: the coordinator a
``Prepare`` without a vote, a participant its ``Filled`` until it is ``Seen`` and its ``Vote`` until it hears the
outcome. Attempts are numbered through the whole epoch, and a participant takes up one at a time, in that order.

An epoch's coordinator never comes back after a crash. Whoever recovers fences the living keepers to a newer epoch, so
that nobody votes any more, collects their reports, and lets ``commit_outcome`` say what became of versions in doubt. A
keeper that has not reported is out for good, its memory with it.

What is promised, for an erasure code that tolerates m losses: once m + 1 keepers have heard of a record, it or a newer
one can be restored from the living, as long as no more than m members have died since it was prepared.

Source: arXiv 2406.10707 section 4 (two phases), arXiv 2310.12670 (versions and parity among nodes).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property

from holdfast.errors import ConfigurationError, InvariantViolation

__all__ = [
    "Abort",
    "Action",
    "Commit",
    "CommitRecord",
    "Drop",
    "Filled",
    "Flip",
    "Key",
    "ParityBlock",
    "Parts",
    "Prepare",
    "RankVote",
    "Seen",
    "Send",
    "StartEncoding",
    "Timing",
    "Vote",
    "make_record",
]

Key = tuple[int, int]
"""Version and epoch: one without the other names nothing."""


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


def make_record(prepare: Prepare, votes: Collection[Vote]) -> CommitRecord:
    """Of a version for which all have voted. Depends on nothing else, so that whoever makes it makes the same."""
    parity = sorted(block for vote in votes for block in vote.parity)
    return CommitRecord(prepare.version, prepare.epoch, len(prepare.parts), prepare.parts, tuple(parity))


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
