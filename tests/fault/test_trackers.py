"""Trackers that cannot work: the run has the losses, the state and the pace of one without any."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from holdfast.configs.schema import RunConfig
from holdfast.launch.run import Result, train
from holdfast.trainer.config import TrackerConfig, TrackerName, WandbMode
from tests.support.runs import events_of, outcome_of, tiny_config, write_corpus

pytestmark = pytest.mark.timeout(300)

_STEPS = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Result:
    return train(tiny_config(tmp_path_factory.mktemp("undisturbed"), corpus, steps=_STEPS, spares=0))


def _tracked(root: Path, corpus: Path, name: TrackerName, mode: WandbMode) -> RunConfig:
    tracker = TrackerConfig(name=name, mode=mode, init_timeout_s=2.0, finish_timeout_s=10.0)
    return replace(tiny_config(root, corpus, steps=_STEPS, spares=0), tracker=tracker, run_id="tracked")


def _is_as_without(result: Result, undisturbed: Result) -> None:
    assert result.exit_code == 0
    assert outcome_of(undisturbed.run_dir).differences(outcome_of(result.run_dir)) == []
    (alone,), (tracked,) = events_of(undisturbed.run_dir, "run_ended"), events_of(result.run_dir, "run_ended")
    # Far above what others on the machine cost, far below what a tracker that is waited for would.
    assert tracked["seconds"] < 3 * alone["seconds"] + 10.0


def _log(result: Result) -> str:
    return (result.run_dir / "logs" / "driver.attempt1.log").read_text()


def test_wandb_without_a_network(
    tmp_path: Path, corpus: Path, undisturbed: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    result = train(_tracked(tmp_path / "runs", corpus, TrackerName.WANDB, WandbMode.ONLINE))
    _is_as_without(result, undisturbed)
    assert "W&B could not be started as configured" in _log(result)


@pytest.mark.slow
def test_wandb_whose_service_is_killed_again_and_again(
    tmp_path: Path, corpus: Path, undisturbed: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    with _meanwhile(_kill_services) as killed:
        result = train(_tracked(tmp_path / "runs", corpus, TrackerName.WANDB, WandbMode.OFFLINE))
    _is_as_without(result, undisturbed)
    assert killed


@contextlib.contextmanager
def _meanwhile(strike: Callable[[list[int]], None]) -> Iterator[list[int]]:
    struck: list[int] = []
    over = threading.Event()

    def run() -> None:
        while not over.wait(0.2):
            strike(struck)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield struck
    finally:
        over.set()
        thread.join()


def _kill_services(killed: list[int]) -> None:
    """W&B's own process, a child of our helper."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "wandb-core" in process.name():
                process.kill()
                killed.append(process.pid)


@pytest.fixture
def tiny_disks(tmp_path: Path) -> Iterator[Path]:
    """A root where what trackers write lies on full file systems, and nothing else does."""
    run_dir = tmp_path / "runs" / "test" / "tracked"
    mounted: list[Path] = []
    for place in (run_dir / "wandb", run_dir / "tensorboard"):
        place.mkdir(parents=True)
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(place)], capture_output=True)
        if made.returncode:
            pytest.skip("a small file system needs the right to mount one")
        mounted.append(place)
    yield tmp_path / "runs"
    for place in mounted:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.mark.slow
def test_both_trackers_on_a_full_disk(
    tiny_disks: Path, corpus: Path, undisturbed: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    result = train(_tracked(tiny_disks, corpus, TrackerName.BOTH, WandbMode.OFFLINE))
    _is_as_without(result, undisturbed)
