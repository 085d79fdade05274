"""A run goes on with other ranks and another ZeRO stage than it was started with: the same state, the same samples."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.manifest import Manifest
from holdfast.fault_tolerance.storage import DirectoryStorage
from holdfast.launch import identity
from holdfast.launch.cli import main
from holdfast.launch.run import train
from holdfast.parallel.config import ParallelConfig
from tests.support.drivers import records, run_dirs, sound_record, steps_of
from tests.support.runs import events_of, outcome_of, tiny_config, write_corpus
from tests.support.stored import Held, whole_tensors, write_checkpoint

pytestmark = pytest.mark.timeout(180)

_RUN, _BATCH, _FIRST = "moved", 12, 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The root of a run that three ranks in stage 2 have brought to its first goal, with two checkpoints on disk."""
    root = tmp_path_factory.mktemp("begun")
    assert train(_config(root, corpus, world=3, stage=2, steps=_FIRST)).exit_code == 0
    return root


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory, corpus: Path, begun: Path) -> Path:
    """The directory of the same run after two ranks in stage 3 have gone on without a disturbance."""
    root = shutil.copytree(begun, tmp_path_factory.mktemp("continued") / "root")
    assert train(_config(root, corpus, world=2, stage=3, steps=8)).exit_code == 0
    return run_dirs(root)[0]


def _config(root: Path, corpus: Path, *, world: int, stage: int, steps: int, **options: Any) -> RunConfig:
    config = tiny_config(root, corpus, stage=stage, steps=steps, nodes=world, spares=0, **options)
    config.run_id, config.resume, config.snapshot.persist_every_steps = _RUN, "auto", 2
    config.trainer.global_batch, config.trainer.micro_batch, config.trainer.eval_windows = _BATCH, 12 // world, _BATCH
    config.optim.min_lr_ratio = 1.0  # so that a farther goal changes no rate
    config.data.cache = str(corpus.with_name("cache"))
    return config


def _storage(run_dir: Path) -> DirectoryStorage:
    return DirectoryStorage(run_dir / "checkpoints")


def _steps(run_dir: Path) -> dict[int, dict[str, Any]]:
    """By number; none twice."""
    found = [record for record in records(run_dir / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in found] == list(range(1, len(found) + 1))
    return {record["step"]: record for record in found}


def test_three_ranks_then_two_then_four_then_one_train_as_three_would_have(
    tmp_path: Path, corpus: Path, continued: Path
) -> None:
    undisturbed = train(_config(tmp_path / "three", corpus, world=3, stage=2, steps=16))
    root = shutil.copytree(continued.parent.parent, tmp_path / "root")
    for world, stage, goal in ((4, 1, 12), (1, 0, 16)):
        result = train(_config(root, corpus, world=world, stage=stage, steps=goal))
        assert (result.outcome, result.step) == ("finished", goal)
        assert not events_of(result.run_dir, "fault_detected")
    (run_dir,) = run_dirs(root)
    attempts = [steps_of(run_dir, attempt) for attempt in range(1, 5)]
    assert attempts == [list(range(at + 1, at + 5)) for at in (0, 4, 8, 12)]
    plans = events_of(run_dir, "recovery_planned")
    assert [(plan["source"], plan["version"]) for plan in plans] == [("disk", at) for at in (4, 8, 12)]
    assert all("another layout wrote it, each rank reads its part" in plan["reason"] for plan in plans)
    newest = checkpoint.read_commit(_storage(run_dir), 16)
    assert (newest.world, newest.layout) == (1, "1 rank, ZeRO stage 0")
    have, want = _steps(run_dir), _steps(undisturbed.run_dir)
    assert have.keys() == want.keys()
    for step in want:  # only the order of summation differs
        assert have[step]["tokens"] == want[step]["tokens"] == step * _BATCH * 32
        assert have[step]["loss"] == pytest.approx(want[step]["loss"], rel=1e-5)
    sound_record(run_dir)
    assert main(["checkpoint", "verify", str(run_dir)]) == 0
    assert main(["checkpoint", "export", str(run_dir), "--to", str(tmp_path / "exported")]) == 0
    exported, wanted = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "exported", run_dir / "export")
    )
    assert exported.keys() == wanted.keys()
    assert all(torch.equal(exported[name], wanted[name]) for name in wanted)


def test_the_restored_state_goes_on_as_one_that_was_cut_by_hand(
    tmp_path: Path, corpus: Path, begun: Path, continued: Path
) -> None:
    """The whole tensors, cut as the two ranks hold them, in a checkpoint that their keepers load as their own."""
    root = shutil.copytree(begun, tmp_path / "root")
    (run_dir,) = run_dirs(root)
    storage, folder = _storage(run_dir), checkpoint.directory(_FIRST)
    whole, first = whole_tensors(storage, _FIRST), _manifest(storage, _FIRST, 0)
    cuts = [_manifest(_storage(continued), 8, rank) for rank in range(2)]
    ranks = [[_part(whole, entry.spec) for entry in manifest.entries] for manifest in cuts]
    storage.delete(folder)
    write_checkpoint(
        storage,
        _FIRST,
        ranks,
        scalars=first.scalars,
        config_digest=first.config_digest,
        layout=identity.layout(ParallelConfig(zero_stage=3), world=2),
    )
    result = train(_config(root, corpus, world=2, stage=3, steps=8))
    (plan,) = events_of(result.run_dir, "recovery_planned")
    assert "another layout" not in plan["reason"]
    assert outcome_of(continued).differences(outcome_of(result.run_dir)) == []


def _manifest(storage: DirectoryStorage, step: int, rank: int) -> Manifest:
    return Manifest.from_bytes(checkpoint.read_rank(storage, checkpoint.directory(step), rank)[0])


def _part(whole: Mapping[str, bytes], spec: Any) -> Held:
    size = len(whole[spec.name]) // _count(spec.shape)
    return spec, whole[spec.name][spec.start * size : spec.stop * size]


def _count(shape: tuple[int, ...]) -> int:
    return 1 if not shape else shape[0] * _count(shape[1:])


def test_a_rank_lost_before_the_first_snapshot_of_its_own_layout_reads_the_checkpoint_again(
    tmp_path: Path, corpus: Path, begun: Path, continued: Path
) -> None:
    root = shutil.copytree(begun, tmp_path / "root")
    faults = ["sigkill rank=1 step=4 at=recovery.after_restore"]
    result = train(_config(root, corpus, world=2, stage=3, steps=8, faults=faults))
    assert result.exit_code == 0
    assert len(events_of(result.run_dir, "fault_detected")) == 1
    plans = events_of(result.run_dir, "recovery_planned")
    assert [(plan["source"], plan["version"]) for plan in plans] == [("disk", 4), ("disk", 4)]
    assert outcome_of(continued).differences(outcome_of(result.run_dir)) == []


def test_a_damaged_checkpoint_of_another_layout_is_put_aside_and_the_one_before_it_is_used(
    tmp_path: Path, corpus: Path
) -> None:
    root = tmp_path / "root"
    for steps in (2, _FIRST):  # a run saves its last version in any case; those on the way only if the driver sees them
        assert train(_config(root, corpus, world=3, stage=2, steps=steps)).exit_code == 0
    (run_dir,) = run_dirs(root)
    path = run_dir / "checkpoints" / checkpoint.directory(_FIRST) / checkpoint.data_file(2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    result = train(_config(root, corpus, world=2, stage=3, steps=6))
    assert (result.outcome, result.step) == ("finished", 6)
    plans = events_of(run_dir, "recovery_planned")[-2:]
    assert [(plan["source"], plan["version"]) for plan in plans] == [("disk", 4), ("disk", 2)]
    assert any("ShardCorrupt" in reason and "of rank 2" in reason for reason in plans[1]["rejected"])
    (rejected,) = (run_dir / "checkpoints").glob("rejected-*")
    assert rejected.name == "rejected-step-00000004"
    assert re.match(r"ShardCorrupt: slice '\S+' of rank 2, version 4: digest", (rejected / "reason.txt").read_text())
    assert steps_of(run_dir, attempt=3) == [3, 4, 5, 6]


def test_ranks_that_cannot_share_the_batch_are_refused_before_anything_starts(
    tmp_path: Path, corpus: Path, begun: Path
) -> None:
    root = shutil.copytree(begun, tmp_path / "root")
    config = _config(root, corpus, world=5, stage=2, steps=8)
    with pytest.raises(ConfigurationError, match="keeps its batch: give it 4 or 6 ranks"):
        train(config)
    config.trainer.global_batch = 10
    with pytest.raises(ConfigurationError, match=f"run {_RUN} was started with another model, data, optimizer, batch"):
        train(config)
    assert len(sound_record(run_dirs(root)[0])["attempts"]) == 1
