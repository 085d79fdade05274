"""Whole runs whose layers are divided among processes: kills leave no trace, other layouts go on with their state."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.configs.schema import RunConfig
from holdfast.launch.run import train
from tests.support.drivers import records, steps_of
from tests.support.runs import events_of, outcome_of, tiny_config, write_corpus

pytestmark = pytest.mark.timeout(180)

_STEPS, _BATCH = 8, 16


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def _config(root: Path, corpus: Path, *, nodes: int = 4, pipeline: int = 4, steps: int = _STEPS) -> RunConfig:
    config = tiny_config(root, corpus, stage=1, steps=steps, nodes=nodes, spares=0)
    config.model.n_layers, config.trainer.global_batch, config.optim.min_lr_ratio = 4, _BATCH, 1.0
    config.trainer.eval_windows, config.parallel.pipeline = 4, pipeline
    config.data.cache = str(corpus.with_name("cache"))
    return config


def _losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in records(run_dir / "metrics.jsonl") if "loss" in record]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[float]:
    """Losses of four ranks that have all layers each."""
    result = train(_config(tmp_path_factory.mktemp("plain"), corpus, pipeline=1))
    assert result.exit_code == 0
    return _losses(result.run_dir)


@pytest.mark.parametrize("swapped", [False, True], ids=["along the model", "swapped"])
def test_kills_of_workers_and_of_a_node_leave_no_trace(
    swapped: bool, tmp_path: Path, corpus: Path, plain: list[float]
) -> None:
    whole, struck = (_config(tmp_path / name, corpus) for name in ("whole", "struck"))
    whole.parallel.swapped = struck.parallel.swapped = swapped
    struck.chaos.faults = [
        "sigkill rank=0 step=2 at=step.after_backward",
        "node_sigkill node=3 step=4",
        "sigkill rank=2 step=6",
    ]
    undisturbed, result = train(whole), train(struck)
    assert (undisturbed.exit_code, result.exit_code) == (0, 0)
    assert len(events_of(result.run_dir, "fault_injected")) == 3
    assert "parity" in {event["source"] for event in events_of(result.run_dir, "recovery_planned")}
    assert outcome_of(undisturbed.run_dir).differences(outcome_of(result.run_dir)) == []
    assert swapped or _losses(undisturbed.run_dir) == pytest.approx(plain, rel=1e-5)


def test_a_run_goes_on_as_a_pipeline_with_replicas_without_one_and_again(
    tmp_path: Path, corpus: Path, plain: list[float]
) -> None:
    config = _config(tmp_path, corpus, steps=2)
    config.run_id, config.resume = "moved", "auto"
    assert train(config).exit_code == 0
    for goal, nodes, pipeline, stage in ((3, 2, 1, 2), (4, 2, 2, 1), (5, 4, 2, 1), (6, 1, 1, 0), (_STEPS, 4, 4, 1)):
        config.trainer.max_steps, config.launch.nodes = goal, nodes
        config.parallel.pipeline, config.parallel.zero_stage = pipeline, stage
        result = train(config)
        assert (result.outcome, result.step) == ("finished", goal), result.reason
    assert [steps_of(result.run_dir, attempt) for attempt in (1, 2)] == [[1, 2], [3]]
    assert _losses(result.run_dir) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("pipeline", "lost"),
    [(2, [1]), pytest.param(1, [0, 3], marks=pytest.mark.slow)],
    ids=["a stage of one of two pipelines", "two of four ranks"],
)
def test_a_lost_node_whose_state_a_replica_holds_is_copied_from_it_to_the_bit(
    pipeline: int, lost: list[int], tmp_path: Path, corpus: Path
) -> None:
    whole, struck = (_config(tmp_path / name, corpus, pipeline=pipeline) for name in ("whole", "struck"))
    for config in (whole, struck):
        config.parallel.zero_stage, config.snapshot.parity = 0, 0
    struck.chaos.faults = [f"node_sigkill node={node} step=4" for node in lost]
    undisturbed, result = train(whole), train(struck)
    assert (undisturbed.exit_code, result.exit_code) == (0, 0)
    plans = events_of(result.run_dir, "recovery_planned")
    assert {(plan["source"], plan["is_approximate"]) for plan in plans} == {("replicas", False)}
    assert _losses(undisturbed.run_dir) == _losses(result.run_dir)
    assert outcome_of(undisturbed.run_dir).weights == outcome_of(result.run_dir).weights
    assert events_of(result.run_dir, "stage_rebuilt") == []
