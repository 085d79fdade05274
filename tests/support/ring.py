"""Keepers of some nodes in the test's own process, with real sockets between them, and a driver's hands."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from holdfast.clock import FakeClock
from holdfast.fault_tolerance.commit_json import from_json, to_json
from holdfast.fault_tolerance.commit_outcome import Outcome, Report, derive_outcome
from holdfast.fault_tolerance.keeper import Keeper
from holdfast.fault_tolerance.lanes import Lane, ProtectionPlan, make_lanes, parity_buffers
from holdfast.fault_tolerance.snapshot import ArenaSnapshotter
from holdfast.fault_tolerance.versions import find_version
from tests.support.keepers import offer, writer
from tests.support.snapshots import RUN_TAG

__all__ = ["Ring", "until"]

_PATIENCE_S = 20.0


class Ring:
    """Keepers of some nodes in this process, with real sockets between them, and a driver's hands."""

    def __init__(self, nodes: int, parity: int, *, per_node: int = 1, persist_every: int = 0) -> None:
        self.world, self.per_node, self.persist_every = nodes * per_node, per_node, persist_every
        self.lanes: tuple[Lane, ...] = make_lanes([range(nodes)], per_node, parity)
        self.ratio = parity_buffers(nodes, parity) if nodes > 1 else 0.0
        self.keepers = {node: self._keeper(node) for node in range(nodes)}
        self.epoch, self.outcome = 0, Outcome(0, (), ())
        self.writers: dict[int, ArenaSnapshotter] = {}

    def _keeper(self, node: int) -> Keeper:
        return Keeper(
            node, RUN_TAG, limit_bytes=1 << 26, buffers=3, lease_s=60.0, clock=FakeClock(1.0), token="secret",
            parity_ratio=self.ratio,
        )  # fmt: skip

    def ranks(self, node: int) -> range:
        return range(node * self.per_node, (node + 1) * self.per_node)

    def node_of(self, rank: int) -> int:
        return rank // self.per_node

    def begin(self, version: int = -1) -> None:
        """A new epoch, as the driver starts one."""
        self.inventory()
        for keeper in self.keepers.values():
            keeper.forget_above(version)
        plan, outcome = (
            json.loads(json.dumps(asdict(self.plan(version)))),
            json.loads(json.dumps(to_json(self.outcome))),
        )
        for keeper in self.keepers.values():
            keeper.begin(plan, outcome)
        self.writers = {
            rank: writer(self.keepers[self.node_of(rank)], rank, world=self.world, epoch=self.epoch)
            for rank in range(self.world)
        }

    def inventory(self) -> dict[int, Mapping[str, Any]]:
        self.epoch += 1
        for node, keeper in self.keepers.items():
            for rank in self.ranks(node):
                keeper.admit(rank)
        found = {node: json.loads(json.dumps(keeper.inventory(self.epoch))) for node, keeper in self.keepers.items()}
        self.outcome = derive_outcome([cast(Report, from_json(one["report"])) for one in found.values()])
        return found

    def plan(self, version: int) -> ProtectionPlan:
        ranks = {node: tuple(self.ranks(node)) for node in self.keepers}
        addresses = {node: keeper.address for node, keeper in self.keepers.items()}
        return ProtectionPlan(self.epoch, version, ranks, self.lanes, addresses, self.persist_every)

    def train(self, *versions: int, ranks: Sequence[int] | None = None) -> None:
        for version in versions:
            for rank in range(self.world) if ranks is None else ranks:
                offer(self.writers[rank], version, commit=False)

    def committed(self) -> int:
        """Newest version that every keeper knows to be committed in this epoch."""
        found = [keeper._protector.status for keeper in self.keepers.values()]
        return min(status.committed if status.epoch == self.epoch else -1 for status in found)

    def lose(self, *nodes: int) -> None:
        """The keeper's process, its memory and its workers are gone; an empty one takes the place."""
        for node in nodes:
            self.keepers[node].close()
            for rank in self.ranks(node):
                self.writers.pop(rank).close()
            self.keepers[node] = self._keeper(node)

    def rebuild(self, rank: int, lost: Sequence[int], version: int) -> None:
        record = next(r for r in self.outcome.committed if r.version == version)
        plan = json.loads(json.dumps(asdict(self.plan(version))))
        self.keepers[self.node_of(rank)].rebuild(rank, json.loads(json.dumps(to_json(record))), plan, lost)

    def stored(self, rank: int, version: int) -> dict[str, bytes]:
        held = find_version(self.keepers[self.node_of(rank)]._arenas[rank], version)
        assert list(held.damage()) == []
        return {e.spec.name: held.data[e.offset : e.offset + e.length].tobytes() for e in held.manifest.entries}

    def close(self) -> None:
        for keeper in self.keepers.values():
            keeper.close()


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.005)
