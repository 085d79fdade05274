"""Whole runs of models of transformers and of the user's own module: killed half-way, they end with the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast.configs.schema import RunConfig
from holdfast.launch.run import train
from holdfast.parallel.config import ParallelConfig
from holdfast.trainer.config import ModelConfig, ModelInit, ModelKind
from tests.support.hf_models import hf_config, write_model
from tests.support.runs import events_of, outcome_of, tiny_config, write_corpus

pytestmark = pytest.mark.timeout(600)

_KILLS = ["sigkill rank=1 step=2 at=step.after_backward", "sigkill rank=0 step=4"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def _check(config: RunConfig, quiet: RunConfig) -> None:
    undisturbed, killed = train(quiet), train(config)
    assert (undisturbed.exit_code, killed.exit_code) == (0, 0)
    assert [e["ranks"] for e in events_of(killed.run_dir, "fault_detected")] == [[1], [0]]
    assert outcome_of(undisturbed.run_dir).differences(outcome_of(killed.run_dir)) == []


def _pair(root: Path, corpus: Path, model: ModelConfig, **options: int) -> tuple[RunConfig, RunConfig]:
    configs = []
    for name, faults in (("killed", _KILLS), ("quiet", [])):
        config = tiny_config(root / name, corpus, steps=6, nodes=2, faults=faults, spares=len(faults) // 2, **options)
        config.model = model
        configs.append(config)
    return configs[0], configs[1]


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("llama", 2), *(pytest.param(kind, stage, marks=pytest.mark.slow) for kind, stage in [("gpt2", 3), ("gpt2", 0)])],
)
def test_a_killed_run_of_a_model_of_transformers_ends_with_the_same_bits(
    kind: str, stage: int, tmp_path: Path, corpus: Path
) -> None:
    """GPT-2 with dropout: the random numbers, too, come back."""
    write_model(tmp_path / "model", kind, **({"resid_pdrop": 0.1} if kind == "gpt2" else {}))
    _check(*_pair(tmp_path, corpus, hf_config(tmp_path / "model", ModelInit.WEIGHTS), stage=stage))


@pytest.mark.slow
def test_a_killed_pipeline_of_a_model_of_transformers_ends_with_the_same_bits(tmp_path: Path, corpus: Path) -> None:
    write_model(tmp_path / "model", "llama tied")
    pair = _pair(tmp_path, corpus, hf_config(tmp_path / "model"))
    for config in pair:
        config.parallel = ParallelConfig(pipeline=2, zero_stage=1)
    _check(*pair)


@pytest.mark.slow
def test_a_killed_run_of_the_users_own_module_ends_with_the_same_bits(tmp_path: Path, corpus: Path) -> None:
    model = ModelConfig(
        name="own", kind=ModelKind.MODULE, path="tests.support.own_model:build", options={"width": 16, "depth": 2}
    )
    _check(*_pair(tmp_path, corpus, model))


def test_a_run_that_is_continued_does_not_read_the_weights_that_it_began_with(tmp_path: Path, corpus: Path) -> None:
    write_model(tmp_path / "model", "llama")
    config = tiny_config(tmp_path, corpus, steps=2, nodes=1, spares=0)
    config.model, config.resume = hf_config(tmp_path / "model", ModelInit.WEIGHTS), "auto"
    first = train(config)
    assert first.exit_code == 0
    (tmp_path / "model" / "model.safetensors").unlink()
    config.trainer.max_steps, config.run_id = 4, first.run_dir.name
    second = train(config)
    assert (second.exit_code, second.step, second.run_dir) == (0, 4, first.run_dir)
