"""A SIGKILL at every named failpoint, for workers, keepers and the driver: no trace in the result, no torn version.

Here each place has its turn at one ZeRO stage; ``make sweep`` takes all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast import failpoints
from holdfast.fault_tolerance.policy import DISK, LIVE, MEMORY, PARITY
from holdfast.launch.fleet import Role
from tests.support.drivers import records
from tests.support.runs import events_of, write_corpus
from tests.support.strikes import EXAMINE, REBUILD, Sighting, Strike, passed, torn
from tests.support.sweep import (
    PASSES,
    STAGES,
    Cells,
    Truth,
    cells_of,
    differences,
    is_struck,
    sweep,
    sweep_config,
    undisturbed,
)

pytestmark = pytest.mark.timeout(400)

_QUICK_STAGE = 2


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


class Truths:
    """Undisturbed runs, one per stage, made when first asked for."""

    def __init__(self, root: Path, corpus: Path) -> None:
        self._root, self._corpus, self._known = root, corpus, dict[int, Truth]()

    def of(self, stage: int) -> Truth:
        if stage not in self._known:
            self._known[stage] = undisturbed(sweep_config(self._root / str(stage), self._corpus, stage=stage))
        return self._known[stage]


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Truths:
    return Truths(tmp_path_factory.mktemp("truth"), corpus)


def test_a_witness_tells_a_torn_snapshot_from_a_whole_one() -> None:
    live = Sighting("live", 0, 3, {"w": "one"})
    assert torn([live, Sighting("stored", 0, 3, {"w": "one"}), Sighting("stored", 1, 3, {"w": "other"})]) == []
    assert len(torn([live, Sighting("stored", 0, 3, {"w": "other"})])) == 1


# -- one fault after the other ----------------------------------------------------------------------------------------


def test_the_table_of_who_passes_which_failpoint_is_what_a_run_does(tmp_path: Path, corpus: Path) -> None:
    found = is_struck(sweep_config(tmp_path, corpus, stage=2), [Strike(Role.WORKER, 1, "step.begin", 3)])
    assert passed(found.folder) == {(role, name) for role, names in PASSES.items() for name in names}
    assert sorted(name for names in PASSES.values() for name in names) == sorted(failpoints.NAMES)


def test_the_shares_of_all_stages_are_the_whole_sweep() -> None:
    short = [(cells.victim, name) for stage in STAGES for cells in _short(stage) for name in cells.names]
    whole = [(cells.victim, name) for cells in cells_of(stage=1) for name in cells.names]
    assert sorted(short) == sorted(whole)
    assert len(whole) == 2 * len(failpoints.NAMES)  # the driver's, and those of who passes


def _short(stage: int) -> list[Cells]:
    return cells_of(stage, shares=len(STAGES), share=STAGES.index(stage))


def _cells() -> Iterator[Any]:
    """In the quick part one stage stands for all of them."""
    for cells in (cells for stage in STAGES for cells in _short(stage)):
        is_slow = cells.stage != _QUICK_STAGE
        yield pytest.param(cells, id=str(cells), marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.parametrize("cells", list(_cells()))
def test_a_kill_anywhere_leaves_no_trace(cells: Cells, tmp_path: Path, corpus: Path, truths: Truths) -> None:
    found = sweep(cells, tmp_path, corpus)
    assert differences(found, truths.of(cells.stage)) == []


# -- two at once ------------------------------------------------------------------------------------------------------


def _worker(rank: int, at: str, step: int, *victims: str) -> Strike:
    return Strike(Role.WORKER, rank, at, step, victims)


def _keeper(node: int, at: str, *victims: str) -> Strike:
    return Strike(Role.KEEPER, node, at, 0, victims)


_ONE_NODE = _worker(1, "step.after_backward", 5, "worker 1", "keeper 1")


@pytest.mark.parametrize(
    ("strikes", "parity", "source"),
    [
        pytest.param(
            [_worker(1, "step.begin", 5, "worker 0", "worker 2")], 1, MEMORY, id="two workers", marks=pytest.mark.slow
        ),
        pytest.param(
            [_worker(1, "step.begin", 5, "worker 0", "keeper 2")],
            1,
            MEMORY,
            id="worker, keeper elsewhere",
            marks=pytest.mark.slow,
        ),
        pytest.param([_keeper(2, "keeper.mid_encode", "keeper 0", "keeper 1")], 1, MEMORY, id="two keepers"),
        pytest.param([_ONE_NODE], 1, PARITY, id="a node"),
        pytest.param(
            [_ONE_NODE, _worker(0, "recovery.before_restore", 0)],
            1,
            PARITY,
            id="a node, then a worker",
            marks=pytest.mark.slow,
        ),
        pytest.param([_ONE_NODE, _worker(1, "recovery.after_join", 0)], 1, PARITY, id="a node, then its new worker"),
        pytest.param([_ONE_NODE, _keeper(1, REBUILD)], 1, PARITY, id="a node, then its new keeper in the rebuild"),
        pytest.param([_ONE_NODE, _keeper(0, EXAMINE)], 2, PARITY, id="a node, then a keeper it is rebuilt from, m=2"),
        pytest.param(
            [_worker(1, "step.begin", 5, "worker 0", "keeper 0", "worker 2", "keeper 2")], 2, PARITY, id="2 nodes, m=2"
        ),
    ],
)
def test_two_faults_at_once_leave_no_trace(
    strikes: list[Strike], parity: int, source: str, tmp_path: Path, corpus: Path, truths: Truths
) -> None:
    found = is_struck(sweep_config(tmp_path, corpus, stage=2, parity=parity), strikes)
    sources = {event["source"] for event in events_of(found.run_dir, "recovery_planned")}
    assert sources | {LIVE, MEMORY} == {LIVE, MEMORY, source}  # what is rebuilt is in memory for the next recovery
    assert differences(found, truths.of(2)) == []


def test_more_nodes_lost_than_parity_restores_cost_the_steps_since_the_checkpoint(
    tmp_path: Path, corpus: Path, truths: Truths
) -> None:
    strike = _worker(1, "step.begin", 9, "worker 0", "keeper 0", "worker 2", "keeper 2")
    found = is_struck(sweep_config(tmp_path, corpus, stage=2, persist_every=4), [strike])
    told = records(found.run_dir / "events.jsonl")
    (planned,) = (at for at, event in enumerate(told) if event["event"] == "recovery_planned")
    written = [event["step"] for event in told[:planned] if event["event"] == "checkpoint_written"]
    assert (told[planned]["source"], told[planned]["version"]) == (DISK, written[-1])
    assert differences(found, truths.of(2), may_lose=9) == []
