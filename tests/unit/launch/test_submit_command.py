"""What `holdfast submit` refuses, chooses and prints, without a cluster."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdfast.errors import ConfigurationError
from holdfast.launch.cli import main
from holdfast.launch.planned_job import PlannedJob, plan_job, run_record
from holdfast.launch.run_dir import RunDir
from holdfast.launch.submit_command import submit_line
from holdfast.launch.upload import SHIPPED, read_runtime_env


@pytest.fixture(autouse=True)
def _in_a_directory_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path / "code")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.delenv("HOLDFAST_HOME", raising=False)


def _plan(*words: str) -> tuple[PlannedJob, list[str]]:
    planned, problems, doubts = plan_job(["train", *words], read_runtime_env(None))
    assert problems == [] and planned is not None
    return planned, doubts


def test_a_dry_run_prints_the_exact_line_and_needs_no_cluster(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["train", "run_id=kelp", f"root={tmp_path / 'root'}", "data.field=a b"]
    assert main(["submit", "--dry-run", "--address", "http://head:8265", "--", *words]) == 0
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed == (
        f"submit: ray job submit --address http://head:8265 --runtime-env {SHIPPED} --submission-id kelp-a1 "
        f"-- holdfast train run_id=kelp root={tmp_path / 'root'} 'data.field=a b'"
    )


def test_everything_that_is_wrong_is_told_at_once_and_nothing_is_sent(capsys: pytest.CaptureFixture[str]) -> None:
    Path("code.py").write_text("")
    with Path("huge.npy").open("wb") as file:
        file.truncate(101 * 2**20)
    assert main(["submit", "--", "train", "trainer.max_steps=0", "launch=process"]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in ("trainer.max_steps=0", "launch=process", "code.py", "huge.npy (101.0 MiB)"))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "must be `train KEY=VALUE"),
        (["--", "python", "x.py"], "not python"),
        (["--", "train", "optim.lrr=1"], "did you mean optim.lr"),
        (["--", "train", "-m", "seed=1,2"], "-m"),
        (["--attach", "a", "--stop", "b"], "one of them"),
        (["--attach", "a", "--", "train"], "no command"),
        (["--runtime-env", "none.yaml", "--", "train"], "none.yaml"),
    ],
)
def test_words_that_mean_no_job_are_refused(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", *words]) == 2
    assert complaint in capsys.readouterr().err


def test_the_shipped_runtime_environment_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--print-runtime-env"]) == 0
    assert capsys.readouterr().out == SHIPPED.read_text()


def test_a_submission_is_numbered_after_every_one_that_ray_knows(tmp_path: Path) -> None:
    planned, _ = _plan("run_id=kelp", f"root={tmp_path / 'root'}")
    assert planned.submission_id([]) == "kelp-a1"
    assert (
        planned.submission_id(["kelp-a1", "kelp-a10", "kelp-a2", "kelp2-a99", "x-kelp-a50", "raysubmit_1"])
        == "kelp-a11"
    )


def _run(root: Path, name: str, config: str, ended: dict[str, object] | None, attempts: int = 2) -> Path:
    """A run as a driver leaves it behind, written by the driver's own code from what ``--cfg job`` prints."""
    run = RunDir.create(str(root), "holdfast", name, config_digest="d")
    (run.path / "config.yaml").write_text(config)
    record = run.record()
    record["attempts"] = [{"number": n, "ray_job": f"{name}-a{n}", "ended": ended} for n in range(1, attempts + 1)]
    (run.path / "run.json").write_text(json.dumps({**record, "ended": ended}))
    return run.path


def test_the_same_words_continue_the_newest_unfinished_run_of_the_same_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    stopped: dict[str, object] = {"outcome": "stopped", "exit_code": 75, "step": 4}
    main(["train", "--cfg", "job", f"root={root}"])
    same = capsys.readouterr().out
    main(["train", "--cfg", "job", f"root={root}", "seed=7"])
    other = capsys.readouterr().out
    _run(root, "20260101-a", same, stopped)
    _run(root, "20260102-b", same, None)
    _run(root, "20260103-c", same, {**stopped, "outcome": "finished", "exit_code": 0})
    _run(root, "20260104-d", other, stopped)
    planned, doubts = _plan(f"root={root}")
    assert (planned.run_id, planned.attempt, doubts) == ("20260102-b", 3, [])
    assert planned.words == ("holdfast", "train", f"root={root}", "run_id=20260102-b")
    fresh, _ = _plan(f"root={root}", "trainer.global_batch=96")
    assert fresh.run_id not in {"20260101-a", "20260102-b", "20260104-d"} and fresh.attempt == 1
    never, _ = _plan(f"root={root}", "resume=never")
    assert never.attempt == 1 and never.words[-1] == f"run_id={never.run_id}"
    free, _ = _plan(f"root={root}", "launch.nodes=1", "trainer.max_steps=77")
    assert free.run_id == "20260102-b", "what does not decide what is computed may differ"


def test_a_root_that_is_not_seen_from_here_leaves_the_choice_to_the_driver() -> None:
    planned, doubts = _plan("root=/mnt/on/the/cluster")
    assert planned.words == ("holdfast", "train", "root=/mnt/on/the/cluster")
    assert any("/mnt/on/the/cluster" in doubt for doubt in doubts)
    _, doubts = _plan()
    assert any("root is not given" in doubt for doubt in doubts)


def test_a_stopped_job_has_its_exit_code_in_run_json(tmp_path: Path) -> None:
    run = _run(tmp_path / "root", "kelp", "", {"outcome": "stopped", "exit_code": 75, "step": 4}, attempts=1)
    assert run_record({"holdfast_run": str(run)}, "kelp-a1") == 75
    assert run_record({"holdfast_run": str(run)}, "kelp-a2") is None
    assert run_record({"holdfast_run": str(tmp_path / "nowhere")}, "kelp-a1") is None
    assert run_record({}, "kelp-a1") is None


def test_the_line_can_be_given_to_a_shell() -> None:
    line = submit_line("http://h:1", read_runtime_env(None), "a-a1", ["holdfast", "train", "data.path=/a b"])
    assert line.endswith("-- holdfast train 'data.path=/a b'")
    with pytest.raises(ConfigurationError, match="must be `train"):
        plan_job(["trian"], read_runtime_env(None))
