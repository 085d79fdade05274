"""What the driver knows of the keepers' common work: where each is reached, what they have agreed on, what is left."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from holdfast.errors import InvariantViolation
from holdfast.fault_tolerance.commit import CommitRecord, Outcome, Report, derive_outcome, from_json, to_json
from holdfast.fault_tolerance.lanes import Lane, ProtectionPlan, Recorded
from holdfast.fault_tolerance.messages import HeldVersion

__all__ = ["Held", "Protection"]

Held = dict[int, tuple[HeldVersion, ...]]


class Protection:
    """Reads inventories, and writes what keepers are told when an epoch starts or a rank has to be rebuilt."""

    def __init__(self, lanes: Sequence[Lane], *, nodes: int, workers_per_node: int, persist_every: int) -> None:
        self._lanes, self._persist_every = tuple(lanes), persist_every
        self._ranks = {
            node: tuple(range(node * workers_per_node, (node + 1) * workers_per_node)) for node in range(nodes)
        }
        self._addresses: dict[int, str] = {}
        self._outcome = Outcome(0, (), ())

    def reached_at(self, node: int, address: str) -> None:
        """A keeper has started."""
        self._addresses[node] = address

    @staticmethod
    def held(inventories: Mapping[int, Mapping[str, Any]]) -> Held:
        """Complete versions by rank, from the inventories of all nodes."""
        return {
            int(rank): tuple(HeldVersion(v["version"], v["epoch"], v["world"]) for v in versions)
            for inventory in inventories.values()
            for rank, versions in inventory["held"].items()
        }

    def recorded(self, inventories: Mapping[int, Mapping[str, Any]]) -> tuple[Recorded, ...]:
        """What the keepers have committed, newest first, and what is left of it."""
        reports = [cast(Report, from_json(inventory["report"])) for inventory in inventories.values()]
        self._outcome = derive_outcome(reports)
        return tuple(self._left_of(record, inventories) for record in self._outcome.committed)

    def _left_of(self, record: CommitRecord, inventories: Mapping[int, Mapping[str, Any]]) -> Recorded:
        held = {int(rank): v for inventory in inventories.values() for rank, v in inventory["held"].items()}
        digests = {rank: {version["digest"] for version in versions} for rank, versions in held.items()}
        absent = [rank for rank, part in record.parts.items() if part.digest not in digests.get(rank, ())]
        with_parity = {node for node, found in inventories.items() if list(record.key) in map(list, found["parity"])}
        bare = [rank for rank in record.parts if self._node_of(rank) not in with_parity]
        return Recorded(*record.key, tuple(absent), tuple(bare))

    def start(self, epoch: int, version: int) -> tuple[object, object]:
        """Arguments of ``Keeper.begin``."""
        return self._plan(epoch, version), to_json(self._outcome)

    def rebuild(
        self, epoch: int, version: int, record_epoch: int, ranks: Sequence[int]
    ) -> Iterator[tuple[int, list[object]]]:
        """Ranks, and arguments of ``Keeper.rebuild`` for each."""
        key = (version, record_epoch)
        record = next((found for found in self._outcome.committed if found.key == key), None)
        if record is None:
            raise InvariantViolation(f"version {version}, epoch {record_epoch}, is to be rebuilt but was not recorded")
        for rank in ranks:
            yield rank, [rank, to_json(record), self._plan(epoch, version), list(ranks)]

    def _plan(self, epoch: int, version: int) -> dict[str, object]:
        plan = ProtectionPlan(epoch, version, self._ranks, self._lanes, self._addresses, self._persist_every)
        return asdict(plan)

    def _node_of(self, rank: int) -> int:
        return next(node for node, ranks in self._ranks.items() if rank in ranks)
