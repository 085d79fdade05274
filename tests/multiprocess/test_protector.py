"""Keepers that commit versions together, hold parity for each other, and bring back what one of them has lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from holdfast.errors import InsufficientShards, ShardCorrupt, SnapshotError
from holdfast.fault_tolerance.buffer import BufferState
from holdfast.fault_tolerance.versions import find_version
from tests.support.keepers import offer, writer
from tests.support.ring import Ring, until
from tests.support.snapshots import expected_bytes, filled_state


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
        until(lambda version=version: ring.committed() == version)  # type: ignore[misc]
    assert all(snapshots.newest_committed == 4 for snapshots in ring.writers.values())


def test_a_version_that_one_rank_lacks_is_not_committed_and_the_next_one_is(rings: Callable[..., Ring]) -> None:
    ring = rings(3, 1)
    ring.begin()
    ring.train(1)
    until(lambda: ring.committed() == 1)
    ring.train(2, ranks=[0, 2])
    time.sleep(0.1)
    assert ring.committed() == 1
    ring.train(3)
    until(lambda: ring.committed() == 3)


@pytest.mark.parametrize(("nodes", "parity", "lost"), [(2, 1, [1]), (3, 1, [0]), (3, 1, [2]), (4, 2, [0, 3])])
def test_what_lost_nodes_held_comes_back_to_the_bit_and_is_protected_again(
    rings: Callable[..., Ring], nodes: int, parity: int, lost: list[int]
) -> None:
    ring = rings(nodes, parity, per_node=2)
    ring.begin()
    ring.train(1, 2)
    until(lambda: ring.committed() == 2)
    ring.lose(*lost)
    ring.inventory()
    ranks = [rank for node in lost for rank in ring.ranks(node)]
    for rank in ranks:
        ring.rebuild(rank, ranks, 2)
    for rank in ranks:
        assert ring.stored(rank, 2) == expected_bytes(2)
    ring.begin(2)
    until(lambda: ring.committed() == 2)  # encoded anew, over all nodes
    ring.lose(lost[0])
    ring.inventory()
    ring.rebuild(ring.ranks(lost[0])[0], list(ring.ranks(lost[0])), 2)


def test_one_loss_more_than_parity_is_refused_by_name(rings: Callable[..., Ring]) -> None:
    ring = rings(3, 1)
    ring.begin()
    ring.train(1)
    until(lambda: ring.committed() == 1)
    ring.lose(0, 1)
    ring.inventory()
    with pytest.raises(InsufficientShards, match=r"ranks \[0, 1\] .* parity restores 1"):
        ring.rebuild(0, [0, 1], 1)


def test_a_flipped_bit_of_a_survivor_counts_as_a_loss(rings: Callable[..., Ring]) -> None:
    ring = rings(4, 2)
    ring.begin()
    ring.train(1)
    until(lambda: ring.committed() == 1)
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
    until(lambda: ring.committed() == 1)
    store = ring.keepers[1]._protector._stores[1]
    store.read(store.keys[0], range(100))[50] ^= 1
    ring.lose(0)
    ring.inventory()
    with pytest.raises(InsufficientShards):
        ring.rebuild(0, [0], 1)


def test_a_buffer_is_not_reused_while_its_version_is_encoded(rings: Callable[..., Ring]) -> None:
    ring = rings(3, 1)
    ring.begin()
    end_s = time.monotonic() + 30.0
    for version in count(1):
        if version >= 60 and (ring.committed() > 1 or time.monotonic() > end_s):
            break
        for snapshots in ring.writers.values():  # as fast as it goes: some find no buffer and skip the version
            snapshots.offer(filled_state(version), version)
        newest = ring.committed()
        for rank in range(3) if newest >= 0 else ():
            assert ring.stored(rank, newest) == expected_bytes(newest)
    assert ring.committed() > 1


def test_a_restored_version_does_not_push_the_protected_one_out_before_it_is_protected_itself(
    rings: Callable[..., Ring], monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = rings(2, 1)
    ring.begin()
    ring.train(1)
    until(lambda: ring.committed() == 1)
    ring.inventory()  # fenced: nobody encodes version 2
    late = {rank: writer(ring.keepers[rank], rank, world=2, epoch=ring.epoch) for rank in range(2)}
    for snapshots in late.values():
        offer(snapshots, 2, commit=False)
    with monkeypatch.context() as stopped:
        stopped.setattr("holdfast.fault_tolerance.protector.encode", _refuse)
        ring.begin(2)
        for snapshots in ring.writers.values():
            snapshots.restore_into(filled_state(0), 2)
            for version in (3, 4, 5):
                snapshots.offer(filled_state(version), version)
        time.sleep(0.1)
        held = [[slot.version for slot in k._arenas[n].slots() if slot.is_complete] for n, k in ring.keepers.items()]
    assert all(1 in versions for versions in held)


def _refuse(*_: object, **__: object) -> None:
    raise SnapshotError("nothing is encoded here")


def test_the_driver_may_be_gone_while_keepers_commit(rings: Callable[..., Ring]) -> None:
    """Nobody calls a keeper between the epoch's start and the commit."""
    ring = rings(2, 1)
    ring.begin()
    ring.train(1)
    for snapshots in ring.writers.values():
        snapshots.close()  # neither do workers live
    until(lambda: ring.committed() == 1)


def test_versions_due_for_a_checkpoint_are_kept_until_the_next_one_is_due(rings: Callable[..., Ring]) -> None:
    ring = rings(2, 1, persist_every=2)
    ring.begin()
    for version in (1, 2, 3):
        ring.train(version)
        until(lambda version=version: ring.committed() == version)  # type: ignore[misc]
    kept = [[slot.version for slot in k._arenas[n].slots() if slot.is_kept] for n, k in ring.keepers.items()]
    assert kept == [[2], [2]]


def test_damage_that_slips_into_what_is_decoded_is_not_published(
    rings: Callable[..., Ring], monkeypatch: pytest.MonkeyPatch
) -> None:
    ring = rings(3, 1)
    ring.begin()
    ring.train(1)
    until(lambda: ring.committed() == 1)
    ring.lose(0)
    ring.inventory()
    find_version(ring.keepers[2]._arenas[2], 1).data[77] ^= 4
    monkeypatch.setattr("holdfast.fault_tolerance.protector.Protector.examine", lambda *_: [])
    with pytest.raises(ShardCorrupt):
        ring.rebuild(0, [0], 1)
    assert [slot.state for slot in ring.keepers[0]._arenas[0].slots()] == [BufferState.FREE] * 3
