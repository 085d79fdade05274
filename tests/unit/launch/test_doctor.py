"""What `holdfast doctor` finds, against a machine that is made to have it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdfast.configs.schema import LaunchConfig, LaunchKind, RunConfig
from holdfast.fault_tolerance.storage import DirectoryStorage
from holdfast.launch import doctor_host
from holdfast.launch.cli import main
from holdfast.launch.doctor_cluster import cluster_checks
from holdfast.launch.doctor_run import run_checks
from holdfast.launch.finding import BAD, OK, WARN, Finding
from holdfast.launch.ray_fleet import NodeReport
from holdfast.launch.run_dir import RunDir


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_JOB_CONFIG_JSON_ENV_VAR", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "no token"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def _worst(findings: list[Finding], about: str) -> str:
    return max((f.level for f in findings if f.about == about), key=[OK, WARN, BAD].index)


def test_a_machine_that_is_fit_ends_with_0_and_one_line_per_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", f"root={tmp_path / 'runs'}", "launch=process"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("OK ", "WARN ")) for line in lines)
    found = {line[6:16].strip() for line in lines}
    assert {"versions", "GPUs", "optimizer", "snapshots", "options", "root", "names", "W&B"} <= found
    assert list((tmp_path / "runs").iterdir()) == [], "it leaves nothing behind"


def test_what_is_wrong_ends_with_1_and_is_told_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("queue.py").write_text("")
    (tmp_path / "file").write_text("")
    assert main(["doctor", f"root={tmp_path / 'file'}", "launch=process", "trainer.global_batch=7"]) == 1
    said = capsys.readouterr().out
    assert "BAD   names" in said and "queue.py" in said and "rename it" in said
    assert "BAD   root" in said
    assert "BAD   options" in said and "trainer.global_batch=7" in said


def test_disk_is_measured_against_what_checkpoints_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(root=str(tmp_path), launch=LaunchConfig(kind=LaunchKind.PROCESS))
    assert _worst(list(doctor_host._root(config)), "root") == OK
    monkeypatch.setattr("holdfast.launch.run_dir.shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**6})())
    assert _worst(list(doctor_host._root(config)), "root") == BAD


@pytest.mark.parametrize(
    ("mode", "has_token", "address", "level", "word"),
    [
        ("token", True, "head:1", OK, "there is one"),
        ("token", False, "head:1", BAD, "get-auth-token"),
        ("", True, "head:1", WARN, "on all of them"),
        ("", False, "head:1", WARN, "can run code"),
        ("disabled", True, "head:1", WARN, "can run code"),
        ("", False, "", OK, "private"),
    ],
)
def test_the_state_of_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, has_token: bool, address: str, level: str, word: str
) -> None:
    monkeypatch.setattr("holdfast.launch.doctor_cluster._cluster", lambda config, address: iter(()))
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    if has_token:
        (tmp_path / "no token").write_text("secret")
    findings = list(cluster_checks(RunConfig(launch=LaunchConfig(address=address))))
    (found,) = [finding for finding in findings if finding.about == "Ray token"]
    assert (found.level, word in found.text) == (level, True)
    assert "secret" not in found.text


def test_a_node_that_cannot_take_part_says_why(tmp_path: Path) -> None:
    from holdfast import __version__

    marker = tmp_path / "runs" / "p" / "r" / "rendezvous" / "marker"
    assert NodeReport("n", version=__version__, read="w").problems(marker, "w") == []
    (stale,) = NodeReport("n", version=__version__, read="another").problems(marker, "w")
    assert f"root={tmp_path / 'runs'}" in stale and "n does not see" in stale
    old, blind = NodeReport("n", version="0.0.1").problems(marker, "w")
    assert "0.0.1" in old and "does not see" in blind
    (broken,) = NodeReport("n", broken="No module named 'holdfast'").problems(marker, "w")
    assert "No module named" in broken


def _run(root: Path, **changes: object) -> RunDir:
    run = RunDir.create(str(root), "holdfast", "kelp", config_digest="d")
    (run.path / "run.json").write_text(json.dumps({**run.record(), **changes}))
    return run


def test_a_run_without_a_checkpoint_begins_anew_and_one_with_damaged_ones_only_does_not(tmp_path: Path) -> None:
    run, config = _run(tmp_path), RunConfig(root=str(tmp_path))
    assert _worst(list(run_checks("kelp", config, [])), "resume") == WARN
    DirectoryStorage(run.checkpoints).write("step-00000004/commit.json", [b"no json"])
    findings = list(run_checks("kelp", config, []))
    assert _worst(findings, "resume") == BAD
    assert _worst(findings, "checkpoint") == WARN


def test_runs_that_cannot_be_continued(tmp_path: Path) -> None:
    config = RunConfig(root=str(tmp_path))
    assert _worst(list(run_checks("nobody", config, [])), "run") == BAD
    _run(tmp_path, format_version=99)
    (found,) = run_checks("kelp", config, [])
    assert found.level == BAD and "format_version=99" in found.text


def test_other_options_than_those_of_the_run_are_bad_and_where_it_is_does_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(tmp_path)
    main(["train", "--cfg", "job", f"root={tmp_path}"])
    run.config_file.write_text(capsys.readouterr().out)
    config = RunConfig(root=str(tmp_path))
    assert not [f for f in run_checks("kelp", config, ["root=/x"]) if f.about == "same run"]
    main(["doctor", f"root={tmp_path}", "launch=process", "--run", "kelp", "launch.nodes=2"])
    assert "OK    same run" in capsys.readouterr().out
    main(["doctor", f"root={tmp_path}", "launch=process", "--run", "kelp", "seed=9"])
    assert "BAD   same run" in capsys.readouterr().out
