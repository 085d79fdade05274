"""Whole pipeline runs that lose a stage of which no memory is left: it is made from its neighbours, and said to be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from holdfast.configs.schema import LaunchKind, RunConfig
from holdfast.fault_tolerance.policy import FRESH, NEIGHBOURS
from holdfast.fault_tolerance.stage_policy import MomentRepair, RateMode, Repair
from holdfast.launch.run import Result, train
from holdfast.optim.config import OptimName
from tests.support.drivers import records
from tests.support.runs import events_of, tiny_config, write_corpus

pytestmark = pytest.mark.timeout(180)

_STEPS = 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def _config(root: Path, corpus: Path, *faults: str, repair: Repair, swapped: bool = False) -> RunConfig:
    config = tiny_config(root, corpus, stage=1, steps=_STEPS, nodes=4, spares=0, faults=faults)
    config.model.n_layers, config.trainer.global_batch, config.optim.min_lr_ratio = 4, 16, 1.0
    config.trainer.eval_windows, config.parallel.pipeline, config.parallel.swapped = 4, 4, swapped
    config.parallel.blocks = [1, 1, 1, 1]
    config.snapshot.parity, config.recovery.stage.repair = 0, repair
    config.data.cache = str(corpus.with_name("cache"))
    return config


def _losses(result: Result) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(result.run_dir / "metrics.jsonl") if "loss" in record}


def _plans(result: Result) -> list[dict[str, Any]]:
    return events_of(result.run_dir, "recovery_planned")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> dict[int, float]:
    result = train(_config(tmp_path_factory.mktemp("undisturbed"), corpus, repair=Repair.EXACT, swapped=True))
    assert result.exit_code == 0
    return _losses(result)


@pytest.mark.parametrize("stage", [0, 2, 3], ids=["first", "middle", "last"])
def test_a_stage_that_is_lost_with_its_node_is_made_from_its_neighbours(
    stage: int, tmp_path: Path, corpus: Path, undisturbed: dict[int, float]
) -> None:
    fault = f"node_sigkill node={stage} step=8"
    config = _config(tmp_path, corpus, fault, repair=Repair.CHECKFREE_PLUS, swapped=True)
    config.recovery.stage.heal_steps, config.trainer.eval_every = 40, 4
    result = train(config)
    assert (result.exit_code, result.step) == (0, _STEPS)
    (plan,) = _plans(result)
    assert (plan["source"], plan["is_approximate"]) == (NEIGHBOURS, True)
    (rebuilt,) = events_of(result.run_dir, "stage_rebuilt")
    wanted = {0: ("copy_next", [1]), 2: ("checkfree", [1, 3]), 3: ("copy_previous", [2])}[stage]
    assert (rebuilt["stage"], (rebuilt["repair"], rebuilt["sources"])) == (stage, wanted)
    healed = events_of(result.run_dir, "stage_healed")
    assert [event["stage"] for event in healed] == ([stage] if stage == 2 else [])  # tokens and losses are not logged
    assert all(event["pairs"] >= 8 and event["after"] < event["before"] for event in healed)
    assert ("of a half turn" in plan["reason"]) == (stage == 2)  # ends are not measured
    *_, measured = events_of(result.run_dir, "stages_measured")
    assert measured["angular_distance"].keys() == {"1", "2"}
    assert all(0.0 < angle < 1.0 for angle in measured["angular_distance"].values())
    losses = _losses(result)
    assert [losses[s] for s in range(1, plan["version"] + 1)] == [undisturbed[s] for s in range(1, plan["version"] + 1)]
    assert losses[_STEPS] != undisturbed[_STEPS]
    assert losses[_STEPS] < undisturbed[8] + 0.3  # what was learned is not lost
    assert events_of(result.run_dir, "checkpoint_written")[-1]["step"] == _STEPS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("repair", "stages"),
    [(Repair.CHECKFREE_PLUS, [0, 2, 3]), (Repair.CHECKFREE, [1, 2])],  # which has one neighbour too few at the ends
    ids=["the first, a middle and the last", "both between the ends"],
)
def test_on_ray_stages_are_lost_in_turn(
    repair: Repair, stages: list[int], tmp_path: Path, corpus: Path, undisturbed: dict[int, float]
) -> None:
    faults = [f"node_sigkill node={stage} step={step}" for stage, step in zip(stages, (3, 7, 11), strict=False)]
    config = _config(tmp_path, corpus, *faults, repair=repair, swapped=repair is Repair.CHECKFREE_PLUS)
    config.launch.kind = LaunchKind.LOCAL
    result = train(config)
    assert (result.exit_code, result.step) == (0, _STEPS)
    assert [event["stage"] for event in events_of(result.run_dir, "stage_rebuilt")] == stages
    assert {plan["source"] for plan in _plans(result)} == {NEIGHBOURS}
    assert all(done["steps_lost"] <= 1 for done in events_of(result.run_dir, "recovery_done"))
    untouched = next(rank for rank in range(4) if rank not in stages)
    survivor = (result.run_dir / "logs" / f"rank{untouched:05d}.attempt1.log").read_text()
    assert survivor.count(" begins at version ") == len(stages) + 1
    assert _losses(result)[_STEPS] < undisturbed[8] + 0.3


def test_neighbours_that_are_lost_together_are_not_averaged_and_the_reason_is_told(
    tmp_path: Path, corpus: Path
) -> None:
    faults = ["node_sigkill node=1 step=6", "node_sigkill node=2 step=6"]
    config = _config(tmp_path, corpus, *faults, repair=Repair.CHECKFREE)
    config.trainer.max_steps = 8
    result = train(config)
    assert result.exit_code == 0
    last = _plans(result)[-1]
    assert (last["source"], last["is_approximate"]) == (FRESH, False)
    assert any("lost with it" in reason for reason in last["rejected"])


@pytest.mark.slow
def test_a_rebuilt_stage_has_its_own_steps_and_rate_also_after_it_was_restored_exactly(
    tmp_path: Path, corpus: Path
) -> None:
    lost = ("hang rank=1 step=4", "node_sigkill node=1 step=4")  # it waits, so that both runs lose the same version
    config = _config(tmp_path, corpus, *lost, "sigkill rank=1 step=9", repair=Repair.CHECKFREE)
    stage = config.recovery.stage
    stage.rate_factor, stage.rate_mode, stage.moments = 1.1, RateMode.DECAYING, MomentRepair.AVERAGED
    config.optim.name = OptimName.ADAMW
    struck = train(config)
    calm = _config(tmp_path / "calm", corpus, *lost, repair=Repair.CHECKFREE)
    calm.recovery.stage, calm.optim.name = stage, OptimName.ADAMW
    expected = train(calm)
    assert (struck.exit_code, expected.exit_code) == (0, 0)
    sources = [plan["source"] for plan in _plans(struck)]
    assert sources[0] == NEIGHBOURS
    assert NEIGHBOURS not in sources[1:]
    assert _plans(struck)[0]["version"] == _plans(expected)[0]["version"]
    assert _losses(struck) == _losses(expected)
    assert all(math.isfinite(loss) for loss in _losses(struck).values())
