"""Which ranks protect each other, and what of a recorded version can be restored. Pure.

A *lane* is the ranks with the same place on each node of a protection group. Each is encoded by itself, so a node with
several ranks needs nothing more, and the loss of a node costs every lane one member at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "PARITY_SLOTS",
    "Lane",
    "ProtectionPlan",
    "Recorded",
    "Roster",
    "lost_beyond_repair",
    "make_lanes",
    "parity_buffers",
]

PARITY_SLOTS = 2
"""Versions whose parity a node keeps: the newest committed one and the one that is being encoded."""


@dataclass(frozen=True, slots=True)
class Lane:
    """Ranks that protect each other, one on each node of a group."""

    number: int
    ranks: tuple[int, ...]
    parity: int
    """Losses that the lane survives; 0 for a lane without protection."""


@dataclass(frozen=True, slots=True)
class Roster:
    """The nodes of a membership, in the order of their ranks."""

    number: int
    """Grows by one whenever the nodes change; what was written under another number is divided in another way."""
    nodes: tuple[int, ...]
    workers_per_node: int
    lanes: tuple[Lane, ...] = ()
    """Which ranks protect each other."""

    @property
    def world(self) -> int:
        return len(self.nodes) * self.workers_per_node

    def node_of(self, rank: int) -> int:
        return self.nodes[rank // self.workers_per_node]

    def ranks_of(self, node: int) -> range:
        """None for a node that does not take part."""
        if node not in self.nodes:
            return range(0)
        first = self.nodes.index(node) * self.workers_per_node
        return range(first, first + self.workers_per_node)


@dataclass(frozen=True, slots=True)
class Recorded:
    """A version that the keepers have committed, and what is left of it."""

    version: int
    epoch: int
    """In which it was committed."""
    absent: tuple[int, ...] = ()
    """Ranks whose snapshot is not in any memory."""
    bare: tuple[int, ...] = ()
    """Ranks on whose node their lane's parity is not."""
    roster: int = 0
    """Number of the membership that its ranks belong to."""


@dataclass(frozen=True, slots=True)
class ProtectionPlan:
    """Who keeps what in one membership epoch; the same on every keeper."""

    epoch: int
    version: int
    """From which the epoch starts; -1 for a fresh model."""
    ranks: Mapping[int, tuple[int, ...]]
    """Of each node."""
    lanes: tuple[Lane, ...]
    addresses: Mapping[int, str]
    """Of each node's keeper."""
    persist_every: int = 0
    """Committed versions whose number is a multiple wait for their durable checkpoint; 0: none does."""
    roster: int = 0
    """Number of the membership that the ranks belong to."""

    @property
    def world(self) -> int:
        return sum(map(len, self.ranks.values()))

    def node_of(self, rank: int) -> int:
        return next(node for node, ranks in self.ranks.items() if rank in ranks)

    def lane_of(self, rank: int) -> Lane:
        return next(lane for lane in self.lanes if rank in lane.ranks)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ProtectionPlan:
        """Inverse of ``dataclasses.asdict``; integer keys may have become strings."""
        ranks = {int(node): tuple(held) for node, held in value["ranks"].items()}
        lanes = tuple(Lane(lane["number"], tuple(lane["ranks"]), lane["parity"]) for lane in value["lanes"])
        addresses = {int(node): str(address) for node, address in value["addresses"].items()}
        return cls(
            value["epoch"], value["version"], ranks, lanes, addresses, value["persist_every"], value.get("roster", 0)
        )


def make_lanes(groups: Sequence[Sequence[int]], workers_per_node: int, parity: int) -> tuple[Lane, ...]:
    """Lanes of protection groups of nodes; node ``n`` has ranks ``n * workers_per_node`` and following."""
    members = [
        (tuple(node * workers_per_node + place for node in group), min(parity, len(group) - 1))
        for group in groups
        for place in range(workers_per_node)
    ]
    return tuple(Lane(number, ranks, tolerated) for number, (ranks, tolerated) in enumerate(members))


def parity_buffers(members: int, parity: int) -> float:
    """Memory for the parity of a lane on each of its nodes, in buffers of a rank."""
    return PARITY_SLOTS * parity / (members - parity)


def lost_beyond_repair(recorded: Recorded, lanes: Sequence[Lane]) -> str:
    """Why the version cannot be restored from parity; nothing if it can. A rank without its snapshot and one on whose
    node parity is missing both cost their lane a member."""
    if not lanes and recorded.absent:
        return "there is no parity"
    for lane in lanes:
        lost = sorted({*recorded.absent, *recorded.bare} & set(lane.ranks))
        if set(lost) & set(recorded.absent) and len(lost) > lane.parity:
            names = ", ".join(map(str, lost))
            return (
                f"{len(lost)} of ranks {list(lane.ranks)} are lost ({names}), and their parity restores {lane.parity}"
            )
    return ""
