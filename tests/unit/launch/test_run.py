"""What the end of a run says: the command that continues it, and what is saved."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from holdfast.errors import ConfigurationError
from holdfast.launch import farewell, run
from holdfast.launch.conductor import Verdict
from holdfast.launch.process_fleet import ProcessFleet
from tests.support.runs import tiny_config, write_corpus
from tests.support.told import Told, story


@pytest.mark.parametrize(
    ("words", "overrides", "changes", "says"),
    [
        (
            ["data=text", "data.path=/a b/c", "resume=auto"],
            ["data=text", "data.path=/a b/c", "resume=auto"],
            {"run_id": "r-1"},
            "holdfast train data=text 'data.path=/a b/c' run_id=r-1",
        ),
        (
            ["run_id=r-1", "--config-dir", "conf", "experiment=mine", "trainer.max_steps=10"],
            ["run_id=r-1", "experiment=mine", "trainer.max_steps=10"],
            {"run_id": "r-1", "trainer.max_steps": "20"},
            "holdfast train --config-dir conf experiment=mine run_id=r-1 trainer.max_steps=20",
        ),
        (  # a sweep, of which this was one run
            ["-m", "optim.lr=1e-3,1e-4", "seed=1"],
            ["optim.lr=1e-4", "seed=1"],
            {"run_id": "r-2"},
            "holdfast train optim.lr=1e-4 seed=1 run_id=r-2",
        ),
    ],
)
def test_the_command_to_type_next_means_the_same_run(
    words: Sequence[str], overrides: Sequence[str], changes: Mapping[str, str], says: str
) -> None:
    assert farewell._with_changes(["holdfast", "train", *words], overrides, changes) == says


def test_a_run_that_python_code_has_started_has_no_command() -> None:
    assert farewell._with_changes(["holdfast.train"], [], {"run_id": "r-1"}) == "the same configuration with run_id=r-1"


@pytest.mark.parametrize(
    ("step", "saved", "says"),
    [
        (8, 8, {"saved": "checkpoint of step 8, step-00000008"}),
        (8, 4, {"saved": "checkpoint of step 4, step-00000004, and nothing later"}),
        (8, -1, {"saved": "no checkpoint"}),
        (-1, None, {}),
    ],
)
def test_what_is_saved_is_what_is_on_disk(step: int, saved: int | None, says: Mapping[str, str]) -> None:
    verdict = Verdict("finished", 0, "", step, faults=0, steps_lost=0, findings={}, saved=saved)
    assert farewell.what_is_saved(verdict) == says


def test_a_run_writes_its_report_at_the_end(tmp_path: Path) -> None:
    for told in (story(tmp_path), Told(tmp_path, "failed-before-a-step").attempt()):
        assert farewell.report(told.dir) == {"report": f"{told.dir.path}/report.html"}
        assert (told.dir.path / "report.html").exists() and (told.dir.path / "report.md").exists()


def test_a_report_that_would_take_long_is_left_to_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(farewell, "_QUICKLY_REPORTED_BYTES", 100)
    told = story(tmp_path)
    assert farewell.report(told.dir) == {"report": f"holdfast report {told.dir.path}"}
    assert not (told.dir.path / "report.html").exists()


def test_a_report_that_cannot_be_written_costs_the_run_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = story(tmp_path)
    (told.dir.path / "report.html").mkdir()
    with caplog.at_level(logging.ERROR, "holdfast"):
        assert farewell.report(told.dir) == {}
    assert "the report was not written" in caplog.text


def test_a_node_that_does_not_see_the_root_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class _Fleet(ProcessFleet):
        def unshared(self, marker: Path, word: str) -> list[str]:
            seen.extend((marker.read_text(), word))
            return ["Ray node 7 does not see the root"]

        def start(self, *_: object) -> int:
            raise AssertionError("nothing is to be started")

    monkeypatch.setattr(run, "_make_fleet", lambda *_: _Fleet())
    config = tiny_config(tmp_path / "runs", write_corpus(tmp_path / "corpus"))
    with pytest.raises(ConfigurationError, match="Ray node 7"):
        run.train(config)
    assert seen[0] == seen[1] != ""
    (record,) = (tmp_path / "runs").glob("*/*/run.json")
    assert json.loads(record.read_text())["ended"]["exit_code"] == 2
    assert not (record.parent / "rendezvous").exists()
