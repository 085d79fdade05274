"""What ``holdfast.train`` returns, and what it takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import holdfast
from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance import checkpoint
from holdfast.fault_tolerance.storage import DirectoryStorage
from holdfast.launch import run as run_module
from holdfast.launch.result import Result


def _result(run_dir: Path, **changes: Any) -> Result:
    told = {"outcome": "finished", "exit_code": 0, "step": 3, "reason": "", "run_dir": run_dir}
    return Result(**{**told, **changes})


def _write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"torn": ')


def test_a_step_that_was_done_again_counts_once_and_evaluations_are_no_steps(tmp_path: Path) -> None:
    rows = [{"step": s, "loss": loss} for s, loss in [(1, 5.0), (2, 4.0), (2, 3.5), (3, 3.0)]]
    _write(tmp_path / "metrics.jsonl", [*rows, {"step": 3, "validation_bits_per_byte": 2.0}])
    assert [(row["step"], row["loss"]) for row in _result(tmp_path).metrics] == [(1, 5.0), (2, 3.5), (3, 3.0)]


def test_events_are_told_in_order_and_a_run_without_files_has_none(tmp_path: Path) -> None:
    assert _result(tmp_path).events == [] and _result(tmp_path).metrics == []
    _write(tmp_path / "events.jsonl", [{"event": "run_started"}, {"event": "run_ended"}])
    assert [event["event"] for event in _result(tmp_path).events] == ["run_started", "run_ended"]


def test_the_checkpoint_is_the_newest_that_is_complete(tmp_path: Path) -> None:
    result = _result(tmp_path)
    assert result.checkpoint is None and result.weights is None
    storage = DirectoryStorage(tmp_path / "checkpoints")
    for step in (5, 9):
        receipt = checkpoint.write_rank(storage, checkpoint.directory(step), 0, data=[b"data"], manifest=b"manifest")
        checkpoint.commit(storage, step, receipts={0: receipt}, config_digest="")
    (tmp_path / "checkpoints" / "step-00000009" / checkpoint.data_file(0)).unlink()
    assert result.checkpoint == str(tmp_path / "checkpoints" / "step-00000005")


def test_it_shows_itself_in_one_line() -> None:
    done = _result(Path("/runs/r"), findings={"bits_per_byte": 2.4091, "text": "x" * 999, "weights": "/runs/r/w"})
    assert repr(done) == "Result(finished at step 3, exit code 0, 2.409 bits/byte; /runs/r)"
    assert done.weights == Path("/runs/r/w")
    failed = _result(Path("/runs/r"), outcome="failed", exit_code=93, reason="no progress")
    assert repr(failed) == "Result(failed at step 3, exit code 93: no progress; /runs/r)"


# -- what train takes -------------------------------------------------------------------------------------------------


def test_words_are_those_of_the_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[RunConfig, Any]] = []
    monkeypatch.setattr(run_module, "run", lambda config, **how: asked.append((config, how)))
    holdfast.train(["trainer.max_steps=20", "model=3m"])
    holdfast.train(RunConfig(seed=7))
    (words, how), (plain, _) = asked
    assert (words.trainer.max_steps, words.model.name) == (20, "3m")
    assert how["command"] == ("holdfast", "train", "trainer.max_steps=20", "model=3m")
    assert plain == RunConfig(seed=7)


def test_mistakes_are_those_of_the_command_line() -> None:
    with pytest.raises(ConfigurationError, match=r"did you mean optim\.lr"):
        holdfast.train(["optm.lr=3"])
    with pytest.raises(ConfigurationError, match="takes a list of words"):
        holdfast.train("model=1m")
