"""What keepers hold whose driver has died, brought to a real directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from holdfast.clock import FakeClock
from holdfast.errors import Abort
from holdfast.events import MemoryEvents
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.config import SnapshotConfig
from holdfast.fault_tolerance.snapshot import ArenaSnapshotter
from holdfast.fault_tolerance.storage import DirectoryStorage
from holdfast.launch.durable import DurableTier
from holdfast.launch.fleet import Address, Lost, Report, Role
from holdfast.launch.records import last_step
from holdfast.launch.salvage import Salvaged, salvage, steps_between
from holdfast.types import StepReport
from tests.support.keepers import LocalFleet, make_keeper, offer, writer
from tests.support.snapshots import filled_state

_DEADLINE_S = 60.0


class _Fleet(LocalFleet):
    """Time passes while it is polled; one keeper may be lost instead of answering."""

    clock: FakeClock
    lost: Address | None = None

    def poll(self, timeout_s: float) -> list[Report]:
        self.clock.advance(timeout_s)
        lost, self.lost = self.lost, None
        return [*super().poll(timeout_s), *([] if lost is None else [Lost(lost, "gone")])]


class _Left:
    """Two nodes of one rank each, whose driver is dead; workers have published ``versions``."""

    def __init__(self, root: Path, versions: Sequence[Sequence[int]]) -> None:
        self.clock, self.root = FakeClock(100.0), root
        self.keepers = [make_keeper(node, clock=self.clock) for node in range(2)]
        self.ranks: list[ArenaSnapshotter] = [writer(k, rank, world=2) for rank, k in enumerate(self.keepers)]
        for rank, published in zip(self.ranks, versions, strict=True):
            offer(rank, *published)
        self.fleet = _Fleet.of_keepers(*self.keepers)
        self.fleet.clock = self.clock
        self.addresses = [Address(Role.KEEPER, node) for node in range(2)]

    def salvage(self, *, world: int = 2) -> Salvaged:
        durable = DurableTier(
            str(self.root), SnapshotConfig(), world=world, config_digest="cfg", events=MemoryEvents(), clock=self.clock
        )
        return salvage(self.fleet, self.addresses, durable, clock=self.clock, deadline_s=_DEADLINE_S)

    def stored(self) -> list[int]:
        return [found.step for found in checkpoint.list_checkpoints(DirectoryStorage(self.root))[0]]


@pytest.mark.parametrize("world", [2, 5])
def test_the_newest_version_that_all_ranks_hold_is_written_whatever_world_the_next_attempt_has(
    tmp_path: Path, world: int
) -> None:
    left = _Left(tmp_path, [[7, 8], [7, 8]])
    offer(left.ranks[0], 9, commit=False)
    assert left.salvage(world=world) == Salvaged(True, 8, [])
    assert left.stored() == [8]
    found = checkpoint.list_checkpoints(DirectoryStorage(tmp_path))[0][0]
    assert (found.world, found.layout) == (2, ""), "readable in any layout, because its own is not known"
    assert not left.fleet.bodies, "the keepers are let go"


def test_a_worker_that_has_not_noticed_can_publish_nothing_more(tmp_path: Path) -> None:
    left = _Left(tmp_path, [[7], [7]])
    left.salvage()
    with pytest.raises(Abort):
        left.ranks[0].offer(filled_state(8), 8)
    assert left.stored() == [7]


def test_what_storage_has_already_is_not_written_again(tmp_path: Path) -> None:
    assert _Left(tmp_path, [[7], [7]]).salvage().is_written
    again = _Left(tmp_path, [[6, 7], [6, 7]])
    assert again.salvage() == Salvaged(False, 7, [])
    assert "persist" not in again.fleet.methods()
    assert again.stored() == [7]


@pytest.mark.parametrize("how", ["silent", "lost", "without its rank"])
def test_if_a_rank_cannot_be_had_nothing_is_written_and_nothing_waits_for_ever(tmp_path: Path, how: str) -> None:
    left = _Left(tmp_path, [[7], [] if how == "without its rank" else [7]])
    if how == "silent":
        left.fleet.bodies.pop(left.addresses[1])
    elif how == "lost":
        left.fleet.bodies.pop(left.addresses[1])
        left.fleet.lost = left.addresses[1]
    began = left.clock.now()
    assert left.salvage() == Salvaged(False, -1, [])
    assert left.stored() == []
    assert left.clock.now() - began <= _DEADLINE_S + 1
    assert not left.fleet.bodies


def _report(step: int, epoch: int = 1) -> StepReport:
    return StepReport(step, epoch, 1.0 / step, 1.0, 1e-3, 1.0, step * 10, 0.1, 0.0, 0, step - 1)


def test_steps_that_nobody_has_recorded_are_told_once_and_of_the_newest_epoch(tmp_path: Path) -> None:
    left = _Left(tmp_path, [[7], [7]])
    for rank, steps in enumerate([(5, 6, 7, 8), (5, 6, 7)]):
        board = left.ranks[rank]._arena.board
        for step in steps:
            board.append(_report(step))
        board.append(_report(6, epoch=2))
    reports = left.salvage().reports
    assert [(report.step, report.epoch) for report in reports] == [(5, 1), (6, 2), (7, 1), (8, 1)]
    assert [report.step for report in steps_between(reports, recorded=5, step=7)] == [6, 7]


def test_the_last_recorded_step_is_found_behind_an_evaluation_and_a_torn_line(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert last_step(metrics) == -1
    whole = ['{"step": 4, "loss": 1.0}', '{"step": 5, "loss": 0.9}', '{"step": 6, "validation_bits_per_byte": 1}']
    metrics.write_text("\n".join([*whole, '{"ste']))
    assert last_step(metrics) == 5
