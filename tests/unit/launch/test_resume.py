"""Which run a command continues, why it starts another one, and that a refusal leaves nothing behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.config import SnapshotConfig
from holdfast.fault_tolerance.storage import DirectoryStorage
from holdfast.launch.resume import Opening, checkpoints_uri, open_run
from holdfast.launch.run_dir import RunDir
from holdfast.trainer.config import TrainerConfig

_DIGEST = "d1"


def _config(root: Path, *, max_steps: int = 300, run_id: str = "", resume: str = "auto") -> RunConfig:
    return RunConfig(
        project="project", root=str(root), run_id=run_id, resume=resume, trainer=TrainerConfig(max_steps=max_steps)
    )


def _made(
    root: Path, run_id: str, *, created: float, digest: str = _DIGEST, ended: tuple[str, int] | None = None
) -> RunDir:
    """A run with one attempt, which has ended with this outcome at this step, or has been killed."""
    run = RunDir.create(str(root), "project", run_id, config_digest=digest, clock=lambda: created)
    run.begin_attempt(config={}, overrides=["seed=3", "model=tiny"], command=["holdfast", "train"])
    if ended is not None:
        outcome, step = ended
        run.end_attempt(outcome, 0, step=step)
    return run


def _names(root: Path) -> set[str]:
    """Of everything there is in the project."""
    folder = root / "project"
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def _how(opening: Opening) -> tuple[str, list[str]]:
    first, *passed_over = opening.how.split("\n")
    return first, passed_over


# -- auto -------------------------------------------------------------------------------------------------------------


def test_without_a_run_a_new_one_is_made(tmp_path: Path) -> None:
    opening = open_run(_config(tmp_path), _DIGEST)
    assert opening.how == "auto: nothing to continue, starting fresh"
    assert not opening.is_finished
    assert _names(tmp_path) == {opening.run_dir.run_id}
    assert opening.run_dir.record()["config_digest"] == _DIGEST
    assert opening.run_dir.path == tmp_path / "project" / opening.run_dir.run_id


@pytest.mark.parametrize("policy", ["auto", "must"])
@pytest.mark.parametrize("ended", [None, ("stopped", 20), ("failed", 20)])
def test_the_newest_run_that_is_not_finished_is_continued(
    tmp_path: Path, policy: str, ended: tuple[str, int] | None
) -> None:
    for name, created in (("b-new", 3000.0), ("c-old", 1000.0), ("a-older", 500.0)):
        _made(tmp_path, name, created=created, ended=ended)
    opening = open_run(_config(tmp_path, resume=policy), _DIGEST)
    assert (opening.run_dir.run_id, opening.how) == ("b-new", f"{policy}: continuing b-new")
    assert not opening.is_finished
    assert _names(tmp_path) == {"b-new", "c-old", "a-older"}


def test_every_newer_run_that_is_passed_over_has_its_reason_told_newest_first(tmp_path: Path) -> None:
    _made(tmp_path, "old", created=1000.0, ended=("stopped", 20))
    _made(tmp_path, "other", created=2000.0, digest="d2")
    _made(tmp_path, "done", created=3000.0, ended=("finished", 300))
    damaged = _made(tmp_path, "damaged", created=4000.0)
    (damaged.path / "run.json").write_text("{")
    driven = _made(tmp_path, "driven", created=5000.0)
    _made(tmp_path, "older", created=500.0, digest="d2")  # nobody has got so far
    with driven.lock():
        opening = open_run(_config(tmp_path), _DIGEST)
    first, passed_over = _how(opening)
    assert (opening.run_dir.run_id, first) == ("old", "auto: continuing old")
    assert [line.split(":")[:2] for line in passed_over] == [
        ["not resumed", f" {name}"] for name in ("damaged", "driven", "done", "other")
    ]
    assert "run.json cannot be read" in passed_over[0]
    assert "driven by" in passed_over[1]
    assert "finished at step 300" in passed_over[2]
    assert "another model, data, optimizer, batch, seed or precision" in passed_over[3]


def test_a_new_run_says_why_the_others_are_not_continued(tmp_path: Path) -> None:
    _made(tmp_path, "done", created=3000.0, ended=("finished", 300))
    opening = open_run(_config(tmp_path), _DIGEST)
    first, passed_over = _how(opening)
    assert first == "auto: nothing to continue, starting fresh"
    assert passed_over == ["not resumed: done: finished at step 300"]
    assert _names(tmp_path) == {"done", opening.run_dir.run_id}


def test_runs_of_another_project_are_none_of_ours(tmp_path: Path) -> None:
    RunDir.create(str(tmp_path), "another", "run1", config_digest=_DIGEST)
    assert open_run(_config(tmp_path), _DIGEST).run_dir.run_id != "run1"


# -- must -------------------------------------------------------------------------------------------------------------


def test_must_refuses_to_start_a_run_and_says_why_each_one_is_passed_over(tmp_path: Path) -> None:
    _made(tmp_path, "done", created=3000.0, ended=("finished", 300))
    _made(tmp_path, "other", created=2000.0, digest="d2")
    with pytest.raises(ConfigurationError) as refused:
        open_run(_config(tmp_path, resume="must"), _DIGEST)
    text = str(refused.value)
    assert f"resume=must, but project 'project' below {tmp_path} has no unfinished run" in text
    assert "not resumed: done: finished at step 300" in text
    assert "not resumed: other: another model" in text
    assert text.endswith("use resume=auto to start one")
    assert _names(tmp_path) == {"done", "other"}


def test_must_makes_not_even_the_folder_of_the_project(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="has no unfinished run"):
        open_run(_config(tmp_path, resume="must"), _DIGEST)
    assert list(tmp_path.iterdir()) == []


# -- never ------------------------------------------------------------------------------------------------------------


def test_never_starts_fresh_whatever_there_is(tmp_path: Path) -> None:
    _made(tmp_path, "run1", created=1000.0)
    opening = open_run(_config(tmp_path, resume="never"), _DIGEST)
    assert (opening.how, opening.is_finished) == ("never: starting fresh", False)
    assert _names(tmp_path) == {"run1", opening.run_dir.run_id}


def test_never_does_not_touch_a_run_of_the_same_name(tmp_path: Path) -> None:
    before = _made(tmp_path, "run1", created=1000.0).record()
    with pytest.raises(ConfigurationError, match=r"run run1 exists already and resume=never; choose another run_id"):
        open_run(_config(tmp_path, run_id="run1", resume="never"), _DIGEST)
    assert _names(tmp_path) == {"run1"}
    assert RunDir.open(str(tmp_path), "project", "run1").record() == before


# -- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["auto", "never"])
def test_a_name_that_is_new_names_a_new_run(tmp_path: Path, policy: str) -> None:
    _made(tmp_path, "run1", created=1000.0)
    opening = open_run(_config(tmp_path, run_id="run2", resume=policy), _DIGEST)
    assert (opening.run_dir.run_id, opening.how) == ("run2", f"{policy}: run run2 is new")
    assert _names(tmp_path) == {"run1", "run2"}


@pytest.mark.parametrize(("run_id", "policy"), [("run1", "auto"), ("run1", "must"), ("", "run1"), ("run1", "run1")])
def test_a_run_is_continued_by_name_although_newer_ones_exist(tmp_path: Path, run_id: str, policy: str) -> None:
    _made(tmp_path, "run1", created=1000.0, ended=("stopped", 20))
    _made(tmp_path, "run2", created=2000.0)
    opening = open_run(_config(tmp_path, run_id=run_id, resume=policy), _DIGEST)
    assert (opening.run_dir.run_id, opening.how, opening.is_finished) == ("run1", "continuing run1", False)
    assert _names(tmp_path) == {"run1", "run2"}


@pytest.mark.parametrize(("run_id", "policy"), [("run1", "must"), ("", "run1"), ("run1", "run1")])
def test_a_run_that_must_exist_and_does_not_is_refused(tmp_path: Path, run_id: str, policy: str) -> None:
    with pytest.raises(ConfigurationError, match=r"run run1 does not exist: there is no .*run\.json"):
        open_run(_config(tmp_path, run_id=run_id, resume=policy), _DIGEST)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("run_id", "policy"), [("../run1", "auto"), ("a/b", "never"), ("", "../run1")])
def test_what_is_no_name_is_refused_and_nothing_is_made(tmp_path: Path, run_id: str, policy: str) -> None:
    with pytest.raises(ConfigurationError, match="must be letters, digits"):
        open_run(_config(tmp_path, run_id=run_id, resume=policy), _DIGEST)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("run_id", "policy"), [("run1", "auto"), ("run1", "must"), ("", "run1")])
def test_a_run_that_is_made_of_other_parts_is_refused_with_the_options_it_was_started_with(
    tmp_path: Path, run_id: str, policy: str
) -> None:
    before = _made(tmp_path, "run1", created=1000.0, digest="d2").record()
    with pytest.raises(ConfigurationError, match=r"run1 was started with another model.*\(seed=3 model=tiny\)"):
        open_run(_config(tmp_path, run_id=run_id, resume=policy), _DIGEST)
    assert _names(tmp_path) == {"run1"}
    assert RunDir.open(str(tmp_path), "project", "run1").record() == before


def test_a_run_of_other_parts_that_nobody_has_worked_on_is_refused_too(tmp_path: Path) -> None:
    RunDir.create(str(tmp_path), "project", "run1", config_digest="d2")
    with pytest.raises(ConfigurationError, match=r"was started with another model.*\(other options\)"):
        open_run(_config(tmp_path, run_id="run1"), _DIGEST)


@pytest.mark.parametrize(
    ("ended", "max_steps", "is_finished"),
    [
        (("finished", 300), 300, True),
        (("finished", 300), 200, True),
        (("finished", 300), 301, False),  # a farther goal
        (("stopped", 300), 300, False),
        (("failed", 300), 300, False),
        (None, 300, False),
    ],
)
def test_a_named_run_is_finished_if_it_has_reached_the_goal_of_today(
    tmp_path: Path, ended: tuple[str, int] | None, max_steps: int, is_finished: bool
) -> None:
    _made(tmp_path, "run1", created=1000.0, ended=ended)
    opening = open_run(_config(tmp_path, run_id="run1", max_steps=max_steps), _DIGEST)
    assert opening.is_finished == is_finished


def test_a_new_attempt_makes_a_finished_run_unfinished(tmp_path: Path) -> None:
    run = _made(tmp_path, "run1", created=1000.0, ended=("finished", 300))
    run.begin_attempt(config={}, overrides=[], command=[])
    config = _config(tmp_path)
    assert open_run(config, _DIGEST).run_dir.run_id == "run1"
    assert not open_run(replace(config, run_id="run1"), _DIGEST).is_finished


# -- checkpoints in another place -------------------------------------------------------------------------------------


def _stored(uri: Path, run_id: str, *, commit: bool = True) -> None:
    storage = DirectoryStorage(uri / "project" / run_id)
    receipts: dict[int, Mapping[str, Any]] = {
        0: checkpoint.write_rank(storage, checkpoint.directory(5), 0, data=[b"data"], manifest=b"manifest")
    }
    if commit:
        checkpoint.commit(storage, 5, receipts=receipts, config_digest=_DIGEST)


def _elsewhere(root: Path, durable: Path, *, run_id: str = "run1", resume: str = "auto") -> RunConfig:
    return replace(_config(root, run_id=run_id, resume=resume), snapshot=SnapshotConfig(storage=str(durable)))


@pytest.mark.parametrize("policy", ["auto", "must", "run1"])
def test_a_run_whose_checkpoints_another_machine_wrote_is_continued_in_a_new_directory(
    tmp_path: Path, policy: str
) -> None:
    _stored(tmp_path / "durable", "run1")
    opening = open_run(_elsewhere(tmp_path / "root", tmp_path / "durable", resume=policy), _DIGEST)
    assert opening.how == f"continuing run1 from {tmp_path}/durable/project/run1; its directory is new here"
    assert opening.run_dir.path == tmp_path / "root" / "project" / "run1"
    assert checkpoints_uri(_elsewhere(tmp_path, tmp_path / "durable"), opening.run_dir) == str(
        tmp_path / "durable" / "project" / "run1"
    )


def test_never_refuses_a_run_that_has_checkpoints_anywhere(tmp_path: Path) -> None:
    _stored(tmp_path / "durable", "run1")
    with pytest.raises(ConfigurationError, match=r"run run1 exists already in .*durable/project/run1 and resume=never"):
        open_run(_elsewhere(tmp_path / "root", tmp_path / "durable", resume="never"), _DIGEST)
    assert _names(tmp_path / "root") == set()


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_what_was_never_committed_is_no_run(tmp_path: Path, resume: str) -> None:
    _stored(tmp_path / "durable", "run1", commit=False)
    opening = open_run(_elsewhere(tmp_path / "root", tmp_path / "durable", resume=resume), _DIGEST)
    assert opening.how == f"{resume}: run run1 is new"


def test_a_storage_that_does_not_answer_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "durable" / "project").mkdir(parents=True)
    (tmp_path / "durable" / "project" / "run1").write_bytes(b"no directory")
    with pytest.raises(ConfigurationError, match="nobody knows whether it has checkpoints"):
        open_run(_elsewhere(tmp_path / "root", tmp_path / "durable"), _DIGEST)
    assert _names(tmp_path / "root") == set()


def test_without_a_storage_checkpoints_are_in_the_run_directory(tmp_path: Path) -> None:
    run = _made(tmp_path, "run1", created=1.0)
    assert checkpoints_uri(_config(tmp_path), run) == str(run.checkpoints)
