"""Keepers that commit versions together, hold parity for each other, and bring back what one of them has lost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import pytest

from holdfast.clock import FakeClock
from holdfast.errors import InsufficientShards, ShardCorrupt
from holdfast.fault_tolerance.buffer import BufferState
from holdfast.fault_tolerance.commit import Outcome, Report, derive_outcome, from_json, to_json
from holdfast.fault_tolerance.keeper import Keeper
from holdfast.fault_tolerance.lanes import Lane, ProtectionPlan, make_lanes, parity_buffers
from holdfast.fault_tolerance.snapshot import ArenaSnapshotter
from holdfast.fault_tolerance.versions import find_version
from tests.support.keepers import offer, writer
from tests.support.snapshots import RUN_TAG, expected_bytes, filled_state

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


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.005)


@pytest.fixture
def rings() -> Iterator[Callable[..., Ring]]:
    made: list[Ring] = []

    def make(*arguments: int, **options: int) -> Ring:
        made.append(Ring(*arguments, **options))
        return made[-1]

    yield make
    for ring in made:
        ring.close()


@pytest.mark.parametrize(("nodes", "parity", "per_node"), [(1, 0, 1), (1, 0, 2), (2, 1, 1), (3, 1, 2), (4, 2, 1)])
def test_a_version_that_all_ranks_have_filled_is_committed_everywhere(
    rings: Callable[..., Ring], nodes: int, parity: int, per_node: int
) -> None:
    ring = rings(nodes, parity, per_node=per_node)
    ring.begin()
    for version in range(1, 5):
        ring.train(version)
        _until(lambda version=version: ring.committed() == version)  # type: ignore[misc]
    assert all(snapshots.newest_committed == 4 for snapshots in ring.writers.values())


def test_a_version_that_one_rank_lacks_is_not_committed_and_the_next_one_is(rings: Callable[..., Ring]) -> None:
    ring = rings(3, 1)
    ring.begin()
    ring.train(1)
    _until(lambda: ring.committed() == 1)
    ring.train(2, ranks=[0, 2])
    time.sleep(0.1)
    assert ring.committed() == 1
    ring.train(3)
    _until(lambda: ring.committed() == 3)


@pytest.mark.parametrize(("nodes", "parity", "lost"), [(2, 1, [1]), (3, 1, [0]), (3, 1, [2]), (4, 2, [0, 3])])
def test_what_lost_nodes_held_comes_back_to_the_bit_and_is_protected_again(
    rings: Callable[..., Ring], nodes: int, parity: int, lost: list[int]
) -> None:
    ring = rings(nodes, parity, per_node=2)
    ring.begin()
    ring.train(1, 2)
    _until(lambda: ring.committed() == 2)
    ring.lose(*lost)
    ring.inventory()
    ranks = [rank for node in lost for rank in ring.ranks(node)]
    for rank in ranks:
        ring.rebuild(rank, ranks, 2)
    for rank in ranks:
        assert ring.stored(rank, 2) == expected_bytes(2)
    ring.begin(2)
    _until(lambda: ring.committed() == 2)  # encoded anew, over all nodes
    ring.lose(lost[0])
    ring.inventory()
    ring.rebuild(ring.ranks(lost[0])[0], list(ring.ranks(lost[0])), 2)


def test_one_loss_more_than_parity_is_refused_by_name(rings: Callable[..., Ring]) -> None:
    ring = rings(3, 1)
    ring.begin()
    ring.train(1)
    _until(lambda: ring.committed() == 1)
    ring.lose(0, 1)
    ring.inventory()
    with pytest.raises(InsufficientShards, match=r"ranks \[0, 1\] .* parity restores 1"):
        ring.rebuild(0, [0, 1], 1)


def test_a_flipped_bit_of_a_survivor_counts_as_a_loss(rings: Callable[..., Ring]) -> None:
    ring = rings(4, 2)
    ring.begin()
    ring.train(1)
    _until(lambda: ring.committed() == 1)
    find_version(ring.keepers[2]._arenas[2], 1).data[77] ^= 4
    ring.lose(0)
    ring.inventory()
    ring.rebuild(0, [0], 1)
    assert ring.stored(0, 1) == expected_bytes(1)
    find_version(ring.keepers[3]._arenas[3], 1).data[77] ^= 4
    ring.keepers[0].quarantine(0, 1)
    with pytest.raises(InsufficientShards):
        ring.rebuild(0, [0], 1)


def test_a_flipped_bit_of_parity_is_found_before_it_is_used(rings: Callable[..., Ring]) -> None:
    ring = rings(3, 1)
    ring.begin()
    ring.train(1)
    _until(lambda: ring.committed() == 1)
    store = ring.keepers[1]._protector._stores[1]
    store.read(store.keys[0], range(100))[50] ^= 1
    ring.lose(0)
    ring.inventory()
    with pytest.raises(InsufficientShards):
        ring.rebuild(0, [0], 1)


def test_a_buffer_is_not_reused_while_its_version_is_encoded(rings: Callable[..., Ring]) -> None:
    ring = rings(3, 1)
    ring.begin()
    for version in range(1, 60):
        for snapshots in ring.writers.values():  # as fast as it goes: some find no buffer and skip the version
            snapshots.offer(filled_state(version), version)
        newest = ring.committed()
        for rank in range(3) if newest >= 0 else ():
            assert ring.stored(rank, newest) == expected_bytes(newest)
    assert ring.committed() > 1


def test_the_driver_may_be_gone_while_keepers_commit(rings: Callable[..., Ring]) -> None:
    """Nobody calls a keeper between the epoch's start and the commit."""
    ring = rings(2, 1)
    ring.begin()
    ring.train(1)
    for snapshots in ring.writers.values():
        snapshots.close()  # neither do workers live
    _until(lambda: ring.committed() == 1)


def test_versions_due_for_a_checkpoint_are_kept_until_the_next_one_is_due(rings: Callable[..., Ring]) -> None:
    ring = rings(2, 1, persist_every=2)
    ring.begin()
    for version in (1, 2, 3):
        ring.train(version)
        _until(lambda version=version: ring.committed() == version)  # type: ignore[misc]
    kept = [[slot.version for slot in k._arenas[n].slots() if slot.is_kept] for n, k in ring.keepers.items()]
    assert kept == [[2], [2]]


def test_damage_that_slips_into_what_is_decoded_is_not_published(
    rings: Callable[..., Ring], monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = rings(3, 1)
    ring.begin()
    ring.train(1)
    _until(lambda: ring.committed() == 1)
    ring.lose(0)
    ring.inventory()
    find_version(ring.keepers[2]._arenas[2], 1).data[77] ^= 4
    monkeypatch.setattr("holdfast.fault_tolerance.protector.Protector.examine", lambda *_: [])
    with pytest.raises(ShardCorrupt):
        ring.rebuild(0, [0], 1)
    assert [slot.state for slot in ring.keepers[0]._arenas[0].slots()] == [BufferState.FREE] * 3
