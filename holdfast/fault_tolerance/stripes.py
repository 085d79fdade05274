"""Where the blocks of a protection group lie: pure index arithmetic of a rotated erasure code.

A group of ``n`` members, each with bytes of its own length, survives the loss of any ``m`` of them. Every member's
bytes are cut into ``k = n - m`` blocks of ``b`` bytes, ``b`` being the longest member's length over ``k``, rounded up
to 64; what a block has beyond its member's length counts as zeros. There are ``n`` stripes of ``n`` shares: data
shares ``0 .. k-1``, then parity shares ``k .. n-1``. One line is the whole layout::

    share s of stripe j belongs to member (j + m + s) mod n; a data share s is block s of that member

so the parity of stripe ``j`` lies with members ``j .. j+m-1``, every member holds parity of exactly ``m`` stripes and
data of the others, and a lost member costs each stripe one share. A member keeps its parity blocks one behind the
other, by parity index, in a buffer of ``m * b`` bytes. With two members and m = 1 this is mirroring.

Source: RAIM5, arXiv 2310.12670, with any number of parity blocks. Byte ranges are ``range`` objects of step 1.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from holdfast.errors import ConfigurationError, InsufficientShards, InvariantViolation

__all__ = ["ALIGNMENT_BYTES", "MAX_MEMBERS", "ParityBlock", "Repair", "StripeLayout", "StripeRepair"]

ALIGNMENT_BYTES = 64
"""Blocks begin and end on cache lines."""
MAX_MEMBERS = 256
"""As many shares as GF(256), in which the code computes, can tell apart."""


@dataclass(frozen=True, slots=True)
class ParityBlock:
    """One parity block of one stripe."""

    stripe: int
    index: int
    """0 .. m-1; its share number is ``k + index``."""
    member: int
    """Who holds it."""


@dataclass(frozen=True, slots=True)
class StripeRepair:
    """How a stripe's lost data comes back."""

    stripe: int
    sources: tuple[int, ...]
    """``k`` surviving shares to decode from, ascending: all the data there is, then parity."""
    missing: tuple[int, ...]
    """Lost data shares that have bytes."""


@dataclass(frozen=True, slots=True)
class Repair:
    """What makes a group whole again: first every stripe's data, then parity from the stripes' data shares."""

    lost: tuple[int, ...]
    stripes: tuple[StripeRepair, ...]
    """Stripes that lost bytes, ascending."""
    parity: tuple[ParityBlock, ...]
    """Blocks to make anew."""


class StripeLayout:
    """The layout of one group. Members, stripes and shares are counted from 0.

    ``lengths``: bytes of each member; 0 is allowed. ``parity``: losses to survive, ``m``, less than there are members.
    With m = 0, hence in a group of one, there is no parity and everything else holds.
    Raises: ConfigurationError. Methods raise InvariantViolation for what does not exist in this layout.
    """

    def __init__(self, lengths: Sequence[int], parity: int) -> None:
        problems = _problems(lengths, parity)
        if problems:
            raise ConfigurationError(problems)
        self.lengths, self.parity = tuple(lengths), parity
        self.members = len(self.lengths)
        """``n``, the number of members, of stripes, and of shares of a stripe."""
        self.data = self.members - parity
        """``k``, data shares of a stripe and blocks of a member."""
        self.block_bytes = -(-max(self.lengths) // (self.data * ALIGNMENT_BYTES)) * ALIGNMENT_BYTES
        """``b``; 0 if no member has bytes."""

    @property
    def parity_bytes(self) -> int:
        """Size of every member's parity buffer."""
        return self.parity * self.block_bytes

    def member_of(self, stripe: int, share: int) -> int:
        """Who has this share."""
        self._require(stripe=stripe, share=share)
        return (stripe + self.parity + share) % self.members

    def share_of(self, stripe: int, member: int) -> int:
        """Which share of the stripe this member has."""
        self._require(stripe=stripe, member=member)
        return (member - stripe - self.parity) % self.members

    def data_members(self, stripe: int) -> tuple[int, ...]:
        """Who has data shares 0 .. k-1."""
        return tuple(self.member_of(stripe, share) for share in range(self.data))

    def parity_members(self, stripe: int) -> tuple[int, ...]:
        """Who has parity 0 .. m-1."""
        return tuple(self.member_of(stripe, share) for share in range(self.data, self.members))

    def parity_blocks(self, member: int) -> tuple[ParityBlock, ...]:
        """What lies in this member's parity buffer, in the order in which it lies there."""
        self._require(member=member)
        return tuple(ParityBlock((member - index) % self.members, index, member) for index in range(self.parity))

    def byte_range(self, stripe: int, share: int, chunk: range | None = None) -> range:
        """Where this share, or ``chunk`` (offsets in a block) of it, lies.

        A data share: in its member's bytes, clipped to their length and therefore perhaps empty; what is clipped off
        counts as zeros. A parity share: in its member's parity buffer.
        """
        self._require(stripe=stripe, share=share)
        chunk = range(self.block_bytes) if chunk is None else chunk
        if share >= self.data:
            base, end = (share - self.data) * self.block_bytes, self.parity_bytes
        else:
            base, end = share * self.block_bytes, self.lengths[self.member_of(stripe, share)]
        return range(min(base + chunk.start, end), min(base + chunk.stop, end))

    def chunks(self, chunk_bytes: int) -> Iterator[range]:
        """A block's offsets in pieces of ``chunk_bytes``, the last one perhaps shorter."""
        if chunk_bytes < 1:
            raise InvariantViolation(f"chunk_bytes={chunk_bytes} must be at least 1")
        for start in range(0, self.block_bytes, chunk_bytes):
            yield range(start, min(start + chunk_bytes, self.block_bytes))

    def repair(self, lost: Collection[int]) -> Repair:
        """How to restore what these members had. Raises: InsufficientShards for more than ``m`` of them."""
        gone = tuple(sorted(set(lost)))
        for member in gone:
            self._require(member=member)
        if len(gone) > self.parity:
            names = ", ".join(map(str, gone))
            reason = f"members {names} of a group of {self.members} are lost, and its parity restores {self.parity}"
            raise InsufficientShards(gone, reason)
        stripes = (self._repair_stripe(stripe, gone) for stripe in range(self.members))
        return Repair(
            gone,
            tuple(stripe for stripe in stripes if stripe.missing),
            tuple(block for member in gone for block in self.parity_blocks(member)),
        )

    def _repair_stripe(self, stripe: int, gone: Collection[int]) -> StripeRepair:
        lost = {self.share_of(stripe, member) for member in gone}
        left = [share for share in range(self.members) if share not in lost]
        missing = (share for share in sorted(lost) if share < self.data and self.byte_range(stripe, share))
        return StripeRepair(stripe, tuple(left[: self.data]), tuple(missing))

    def _require(self, **indices: int) -> None:
        for name, index in indices.items():
            if not 0 <= index < self.members:
                raise InvariantViolation(f"{name} {index} does not exist in a group of {self.members} members")


def _problems(lengths: Sequence[int], parity: int) -> list[str]:
    members, problems = len(lengths), list[str]()
    if not 1 <= members <= MAX_MEMBERS:
        problems.append(f"a protection group of {members} members is not possible; give it 1 to {MAX_MEMBERS}")
    elif not 0 <= parity < members:
        problems.append(f"parity={parity} must be from 0 to {members - 1}, less than the group's {members} members")
    negative = [member for member, length in enumerate(lengths) if length < 0]
    if negative:
        problems.append(f"lengths of members {negative} are negative; a member without bytes has length 0")
    return problems
