"""Environment variables, and that no other module reads any."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

import holdfast
from holdfast import knobs
from holdfast.fault_tolerance.config import RecoveryConfig

_OF_A_JOB = ("RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_JOB_STOP_WAIT_TIME_S")
_TOKENS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*knobs.set_knobs(), "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "WANDB_API_KEY", *_OF_A_JOB, *_TOKENS):
        monkeypatch.delenv(name, raising=False)


def test_runs_go_to_the_users_home_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert knobs.home() == Path("/home/somebody/holdfast-runs")
    monkeypatch.setenv("HOLDFAST_HOME", "")  # set to nothing is not set
    assert knobs.home() == Path("/home/somebody/holdfast-runs")
    monkeypatch.setenv("HOLDFAST_HOME", "/data/runs")
    assert knobs.home() == Path("/data/runs")
    monkeypatch.setenv("HOLDFAST_HOME", "~/runs")
    assert knobs.home() == Path("/home/somebody/runs")
    monkeypatch.setenv("HOLDFAST_HOME", "here")
    monkeypatch.chdir(tmp_path)
    assert knobs.home() == tmp_path / "here"


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (knobs.ray_address, "RAY_ADDRESS"),
        (knobs.ray_dashboard, "RAY_API_SERVER_ADDRESS"),
        (knobs.wandb_key, "WANDB_API_KEY"),
    ],
)
def test_other_programs_variables_count_when_they_hold_something(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[], str | None], name: str
) -> None:
    assert read() is None
    monkeypatch.setenv(name, "")
    assert read() is None
    monkeypatch.setenv(name, "value")
    assert read() == "value"


@pytest.mark.parametrize(
    ("wait", "is_job", "leaves_s", "grace_s"),
    [
        ("", False, None, 60.0),
        ("", True, 3.0, 2.7),  # what Ray does unless told otherwise
        ("30", True, 30.0, 27.0),
        ("120", False, 120.0, 108.0),
        ("soon", True, 3.0, 2.7),
        ("-1", False, None, 60.0),
        ("inf", False, None, 60.0),
    ],
)
def test_a_ray_job_has_as_much_time_to_stop_as_ray_leaves_it(
    monkeypatch: pytest.MonkeyPatch, wait: str, is_job: bool, leaves_s: float | None, grace_s: float
) -> None:
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", wait)
    if is_job:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert (knobs.ray_stop_wait_s(), knobs.stop_grace_s()) == (leaves_s, grace_s)
    assert RecoveryConfig().stop_grace_s == grace_s


@pytest.mark.parametrize(
    ("told", "job"),
    [
        ('{"metadata": {"job_submission_id": "kelp-a1"}}', knobs.RayJob("kelp-a1")),
        ('{"metadata": {}}', knobs.RayJob("")),
        ("of another version", knobs.RayJob("")),
    ],
)
def test_the_job_that_this_process_drives(monkeypatch: pytest.MonkeyPatch, told: str, job: knobs.RayJob) -> None:
    assert knobs.ray_job() is None
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", told)
    assert knobs.ray_job() == job


def test_a_token_is_looked_for_where_ray_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not knobs.has_ray_token()
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("x")
    assert knobs.has_ray_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "other"))
    assert not knobs.has_ray_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    assert knobs.has_ray_token()


def test_our_variables_are_listed_in_order_and_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    assert knobs.set_knobs() == {}
    for name in ("HOLDFAST_ZEBRA", "HOLDFAST_HOME", "WANDB_API_KEY", "MY_HOLDFAST_X"):
        monkeypatch.setenv(name, name.lower())
    assert list(knobs.set_knobs().items()) == [("HOLDFAST_HOME", "holdfast_home"), ("HOLDFAST_ZEBRA", "holdfast_zebra")]


_NO_SETTINGS = ("'COMP_LINE'",)
"""What a shell passes to the program that completes its line."""


def _reads_of_the_environment(path: Path) -> list[str]:
    """Setting a variable for a library is allowed, reading one is not."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        text = ast.unparse(node) if isinstance(node, (ast.Call, ast.Subscript)) else ""
        is_store = isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load)
        is_read = text.startswith(("os.getenv(", "os.environ.get(", "os.environ[", "os.environ.pop(")) and not is_store
        if is_read and not any(name in text for name in _NO_SETTINGS):
            found.append(f"{path.name}: {text}")
    return found


def test_no_other_module_reads_the_environment() -> None:
    package = Path(holdfast.__path__[0])
    assert len(_reads_of_the_environment(package / "knobs.py")) == 12
    others = [path for path in package.rglob("*.py") if path.name != "knobs.py"]
    assert [read for path in others for read in _reads_of_the_environment(path)] == []
