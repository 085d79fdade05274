"""What ranks have left in their keepers' memory, read by ranks that are counted in another way."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import pytest
import torch

from holdfast.errors import ManifestMismatch, PeerError, ShardCorrupt, SnapshotError
from holdfast.fault_tolerance.commit_json import to_json
from holdfast.fault_tolerance.held_shards import HeldPart
from holdfast.fault_tolerance.lanes import ProtectionPlan, Roster, make_lanes
from holdfast.fault_tolerance.resharding import HeldSnapshot
from holdfast.fault_tolerance.snapshot import ArenaSnapshotter, required_bytes
from holdfast.launch.protection import Protection
from holdfast.types import RankState, SliceSpec, StateSlice
from tests.support.keepers import attach
from tests.support.ring import Ring, until
from tests.support.snapshots import AtOnce

_TOTAL, _LOST = 6_000, 1
_BEFORE = Roster(0, (0, 1, 2), 1, make_lanes([range(3)], 1, 1))
_AFTER = Roster(1, (0, 2), 1, make_lanes([range(2)], 1, 1))


def _part(rank: int, world: int, version: int) -> RankState:
    """The rank's share of a state whose every element is known; all elements are equal at version -1."""
    share = _TOTAL // world
    start, stop = rank * share, (rank + 1) * share
    numbers = torch.arange(start, stop) if version >= 0 else torch.zeros(share, dtype=torch.int64)
    pieces = [
        ("w/master", (numbers * 0.37 + version).float()),
        ("w/codes", ((numbers * 7 + version) % 251).to(torch.uint8)),
    ]
    slices = [
        StateSlice(SliceSpec(name, (_TOTAL,), start, stop, str(t.dtype).removeprefix("torch.")), t)
        for name, t in pieces
    ]
    return RankState(slices, {"step": max(version, 0)})


class _Shrinking(Ring):
    """Three nodes, of which one is lost for good; and what the driver knows of it."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.protection = Protection(_BEFORE, persist_every=0)
        for node, keeper in self.keepers.items():
            self.protection.reached_at(node, keeper.address)
        self.hands: dict[int, ArenaSnapshotter] = {}

    def start(self, roster: Roster, version: int) -> None:
        """A new epoch with these nodes."""
        self.look(roster)
        plan, outcome = (json.loads(json.dumps(value)) for value in self.protection.start(self.epoch, version))
        for node in roster.nodes:
            self.keepers[node].forget_above(version)
            self.keepers[node].begin(plan, outcome)
        for rank in range(roster.world):
            arena = attach(self.keepers[roster.node_of(rank)], rank, roster.number)
            arena.reserve(required_bytes(_part(rank, roster.world, 0)))
            self.hands[rank] = AtOnce(arena, rank=rank, world=roster.world, epoch=self.epoch, config_digest="cfg")

    def look(self, roster: Roster) -> None:
        self.epoch += 1
        self.protection.move_to(roster)
        for rank in range(roster.world):
            self.keepers[roster.node_of(rank)].admit(rank, roster.number)
        found = {node: json.loads(json.dumps(keeper.inventory(self.epoch))) for node, keeper in self.keepers.items()}
        self.protection.take(found)

    def make(self, roster: Roster, version: int) -> None:
        """All ranks take a version, and the keepers commit it."""
        for rank in range(roster.world):
            assert self.hands[rank].offer(_part(rank, roster.world, version), version)
        members = [self.keepers[node]._protector for node in roster.nodes]
        until(lambda: all((p.status.epoch, p.status.committed) == (self.epoch, version) for p in members))

    def lose_for_good(self, node: int) -> None:
        self.keepers.pop(node).close()

    def make_whole(self, version: int) -> dict[int, HeldPart]:
        (former,) = self.protection.former()
        assert (former.version, former.absent) == (version, (_LOST,))
        for _, node, arguments in self.protection.rebuild(self.epoch, version, former.epoch, former.absent):
            self.keepers[node].rebuild(*json.loads(json.dumps(arguments)))
        parts = {str(rank): asdict(part) for rank, part in self.protection.parts(former).items()}
        return HeldPart.from_json(json.loads(json.dumps(parts)))


@pytest.fixture
def ring() -> Iterator[_Shrinking]:
    made = _Shrinking()
    yield made
    made.close()


def _shrunk(ring: _Shrinking) -> dict[int, HeldPart]:
    """Version 7 was committed by three ranks, one node is gone, and what it held is a guest elsewhere."""
    ring.start(_BEFORE, -1)
    ring.make(_BEFORE, 6)
    ring.make(_BEFORE, 7)
    ring.lose_for_good(_LOST)
    ring.look(_AFTER)
    return ring.make_whole(7)


def _read(
    parts: Mapping[int, HeldPart], rank: int, version: int = 7, *, digest: str = "cfg", token: str = "secret"
) -> Any:
    state = _part(rank, 2, -1)
    scalars = HeldSnapshot(parts, token, config_digest=digest).restore_into(state, version)
    return state, scalars


def test_two_ranks_read_what_three_have_left_although_one_of_them_is_lost(ring: _Shrinking) -> None:
    parts = _shrunk(ring)
    assert {rank: part.address for rank, part in parts.items()} == {
        0: ring.keepers[0].address,
        1: ring.keepers[0].address,
        2: ring.keepers[2].address,
    }
    for rank in range(2):
        state, scalars = _read(parts, rank)
        want = _part(rank, 2, 7)
        assert scalars == {"step": 7}
        assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(state.slices, want.slices, strict=True))


def test_what_the_former_ranks_left_goes_with_the_second_version_of_the_new_ones(ring: _Shrinking) -> None:
    parts = _shrunk(ring)
    ring.start(_AFTER, 7)
    _read(parts, 0)
    ring.make(_AFTER, 8)
    assert {v["version"] for v in ring.keepers[2].inventory(0)["former"]} == {6, 7}  # type: ignore[attr-defined]
    _read(parts, 1)
    ring.make(_AFTER, 9)
    until(lambda: not any(keeper.inventory(0)["former"] for keeper in ring.keepers.values()))
    with pytest.raises(PeerError, match="is not on node"):
        _read(parts, 0)


def test_a_loss_before_the_first_version_of_the_new_ranks_leaves_the_state_where_it_is(ring: _Shrinking) -> None:
    _shrunk(ring)
    ring.start(_AFTER, 7)
    ring.look(Roster(2, (2, 0), 1))
    (whole,) = [former for former in ring.protection.former() if former.version == 7]
    assert whole.absent == ()
    state, _ = _read(ring.protection.parts(whole), 1)
    assert torch.equal(state.slices[0].tensor, _part(1, 2, 7).slices[0].tensor)


def test_a_damaged_part_is_refused_before_anything_is_written(ring: _Shrinking) -> None:
    parts = _shrunk(ring)
    arena = ring.keepers[2]._holdings.former[0, 2]
    held = next(b for b in arena.buffers if b.describe().version == 7)
    held.data[10] ^= 4
    state = _part(1, 2, -1)
    with pytest.raises(ShardCorrupt, match="of rank 2, version 7"):
        HeldSnapshot(parts, "secret", config_digest="cfg").restore_into(state, 7)
    untouched = _part(1, 2, -1)
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(state.slices, untouched.slices, strict=True))


def test_readers_that_do_not_belong_to_it_are_refused(ring: _Shrinking) -> None:
    parts = _shrunk(ring)
    with pytest.raises(PeerError, match="token"):
        _read(parts, 0, token="another")
    with pytest.raises(ManifestMismatch, match="another model"):
        _read(parts, 0, digest="other")
    with pytest.raises(ManifestMismatch, match="is offered as version 6"):
        _read(parts, 0, version=6)


def test_a_keeper_refuses_ranks_of_a_roster_that_is_history(ring: _Shrinking) -> None:
    _shrunk(ring)
    with pytest.raises(SnapshotError, match="belongs to roster 0, and roster 1 is here"):
        ring.keepers[0].admit(0, 0)


def test_a_former_plan_names_the_ranks_of_its_own_roster(ring: _Shrinking) -> None:
    _shrunk(ring)
    (former,) = ring.protection.former()
    ((_, node, arguments),) = ring.protection.rebuild(ring.epoch, 7, former.epoch, (_LOST,))
    plan = ProtectionPlan.from_json(json.loads(json.dumps(arguments))[2])
    assert (node, plan.roster, plan.world, plan.lanes) == (0, 0, 3, _BEFORE.lanes)
    assert json.loads(json.dumps(arguments))[1]["digest"] == to_json(ring.protection._outcome.committed[0])["digest"]
