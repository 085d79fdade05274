"""What the driver knows of the keepers' common work: where each is reached, what they have agreed on, what is left."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

from holdfast.errors import InvariantViolation
from holdfast.fault_tolerance.commit import CommitRecord
from holdfast.fault_tolerance.commit_json import from_json, to_json
from holdfast.fault_tolerance.commit_outcome import Outcome, Report, derive_outcome
from holdfast.fault_tolerance.held_shards import HeldPart
from holdfast.fault_tolerance.lanes import ProtectionPlan, Recorded, Roster
from holdfast.fault_tolerance.messages import HeldVersion

__all__ = ["Held", "Protection"]

Held = dict[int, tuple[HeldVersion, ...]]


@dataclass(frozen=True, slots=True)
class _Copy:
    """A complete version of a rank in the memory of a node."""

    node: int
    roster: int
    rank: int
    version: int
    epoch: int
    world: int
    digest: str
    size_bytes: int
    manifest_bytes: int


class Protection:
    """Reads inventories, and writes what keepers are told when an epoch starts or a rank has to be rebuilt."""

    def __init__(self, roster: Roster, *, persist_every: int) -> None:
        self.roster, self._persist_every = roster, persist_every
        self._rosters = {roster.number: roster}
        self._epochs: dict[int, Roster] = {}
        self._addresses: dict[int, str] = {}
        self._outcome = Outcome(0, (), ())
        self._copies: tuple[_Copy, ...] = ()
        self._left: dict[tuple[int, int], Recorded] = {}
        self._hosts: dict[tuple[int, int], int] = {}
        """Nodes where ranks of other rosters are guests, by roster and rank."""

    def move_to(self, roster: Roster) -> None:
        """Other nodes take part from now on."""
        self.roster = self._rosters[roster.number] = roster

    def reached_at(self, node: int, address: str) -> None:
        """A keeper has started."""
        self._addresses[node] = address

    def addresses(self, nodes: Collection[int]) -> dict[int, str]:
        """Where the keepers of these nodes are reached."""
        return {node: address for node, address in sorted(self._addresses.items()) if node in nodes}

    def take(self, inventories: Mapping[int, Mapping[str, Any]]) -> None:
        """What the keepers of all nodes have told."""
        self._copies = tuple(copy for node, found in inventories.items() for copy in _copies(node, found))
        self._outcome = derive_outcome([cast(Report, from_json(found["report"])) for found in inventories.values()])
        with_parity = {node: set(map(tuple, found["parity"])) for node, found in inventories.items()}
        self._left = {record.key: self._left_of(record, with_parity) for record in self._outcome.committed}

    def held(self) -> Held:
        """Complete versions by rank."""
        found: Held = dict.fromkeys(range(self.roster.world), ())
        for copy in self._copies:
            if copy.roster == self.roster.number and copy.rank in found:
                found[copy.rank] += (HeldVersion(copy.version, copy.epoch, copy.world),)
        return found

    def recorded(self) -> tuple[Recorded, ...]:
        """What the keepers have committed, newest first, and what is left of it."""
        return tuple(left for left in self._left.values() if left.roster == self.roster.number)

    def former(self) -> tuple[Recorded, ...]:
        """The same of other rosters, and what all of their ranks hold without a record."""
        recorded = {key: left for key, left in self._left.items() if left.roster != self.roster.number}
        complete = {key: left for key, left in self._complete_elsewhere().items() if key not in recorded}
        return tuple(left for _, left in sorted((recorded | complete).items(), reverse=True))

    def start(self, epoch: int, version: int) -> tuple[object, object]:
        """Arguments of ``Keeper.begin``."""
        self._epochs[epoch] = self.roster
        return self._plan(epoch, version, self.roster), to_json(self._outcome)

    def rebuild(
        self, epoch: int, version: int, record_epoch: int, ranks: Sequence[int]
    ) -> Iterator[tuple[int, int, list[object]]]:
        """Ranks, the node to rebuild each on, and arguments of its ``Keeper.rebuild``. Ranks of another roster are
        spread over the nodes that take part."""
        left = self._left.get((version, record_epoch))
        record = next((found for found in self._outcome.committed if found.key == (version, record_epoch)), None)
        if record is None or left is None:
            raise InvariantViolation(f"version {version}, epoch {record_epoch}, is to be rebuilt but was not recorded")
        roster, is_own = self._rosters[left.roster], left.roster == self.roster.number
        lost = list(ranks) if is_own else sorted({*ranks, *left.bare})
        for number, rank in enumerate(ranks):
            node = roster.node_of(rank) if is_own else self.roster.nodes[number % len(self.roster.nodes)]
            self._hosts[left.roster, rank] = node
            yield rank, node, [rank, to_json(record), self._plan(epoch, version, roster), lost]

    def parts(self, former: Recorded) -> dict[int, HeldPart]:
        """Where the ranks' snapshots of a version of another roster are now."""
        key = (former.roster, former.version, former.epoch)
        copies = {c.rank: c for c in self._copies if (c.roster, c.version, c.epoch) == key}
        found = {
            rank: HeldPart(self._addresses[c.node], c.digest, c.size_bytes - c.manifest_bytes, c.manifest_bytes)
            for rank, c in copies.items()
        }
        return {**self._rebuilt(former), **found}

    def _rebuilt(self, former: Recorded) -> dict[int, HeldPart]:
        if not former.absent:
            return {}
        record = next(one for one in self._outcome.committed if one.key == (former.version, former.epoch))
        parts = {rank: record.parts[rank] for rank in former.absent}
        return {
            rank: HeldPart(
                self._addresses[self._hosts[former.roster, rank]],
                part.digest,
                part.length - part.manifest_bytes,
                part.manifest_bytes,
            )
            for rank, part in parts.items()
        }

    def _left_of(self, record: CommitRecord, with_parity: Mapping[int, set[tuple[int, ...]]]) -> Recorded:
        roster = self._epochs.get(record.epoch, self.roster)
        digests = {(copy.rank, copy.digest) for copy in self._copies}
        absent = [rank for rank, part in record.parts.items() if (rank, part.digest) not in digests]
        bare = [rank for rank in record.parts if record.key not in with_parity.get(roster.node_of(rank), ())]
        return Recorded(*record.key, tuple(absent), tuple(bare), roster.number)

    def _complete_elsewhere(self) -> dict[tuple[int, int], Recorded]:
        ranks: dict[tuple[int, int, int], set[int]] = {}
        for copy in self._copies:
            if copy.roster != self.roster.number:
                ranks.setdefault((copy.version, copy.epoch, copy.roster), set()).add(copy.rank)
        return {
            (version, epoch): Recorded(version, epoch, roster=number)
            for (version, epoch, number), found in ranks.items()
            if len(found) == self._rosters[number].world
        }

    def _plan(self, epoch: int, version: int, roster: Roster) -> dict[str, object]:
        ranks = {node: tuple(roster.ranks_of(node)) for node in roster.nodes}
        plan = ProtectionPlan(
            epoch, version, ranks, roster.lanes, self._addresses, self._persist_every, roster=roster.number
        )
        return asdict(plan)


def _copies(node: int, inventory: Mapping[str, Any]) -> Iterator[_Copy]:
    """Those of the ranks that the keeper takes for the present ones, and of former ones."""
    own = [
        {"roster": inventory["roster"], "rank": int(rank), **version}
        for rank, versions in inventory["held"].items()
        for version in versions
    ]
    for found in (*own, *inventory["former"]):
        yield _Copy(
            node,
            found["roster"],
            found["rank"],
            found["version"],
            found["epoch"],
            found["world"],
            found["digest"],
            found["bytes"],
            found["manifest_bytes"],
        )
