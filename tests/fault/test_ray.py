"""The same oracle through Ray: actors instead of forked processes, a private Ray or a running cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from holdfast.configs.plain import to_plain
from holdfast.configs.schema import LaunchKind, RunConfig
from holdfast.launch.run import Result, train
from tests.support.runs import events_of, outcome_of, tiny_config, write_corpus
from tests.support.strikes import sightings

pytestmark = pytest.mark.timeout(300)

_STEPS = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Result:
    return train(tiny_config(tmp_path_factory.mktemp("undisturbed"), corpus, steps=_STEPS, spares=0))


def _on_ray(config: RunConfig, **options: object) -> RunConfig:
    return replace(config, launch=replace(config.launch, kind=LaunchKind.LOCAL, **options))  # type: ignore[arg-type]


def test_a_killed_and_a_frozen_actor_leave_no_trace_in_the_result(
    tmp_path: Path, corpus: Path, undisturbed: Result, no_snapshot_is_torn: Path
) -> None:
    faults = ["sigkill rank=1 step=3 at=step.after_backward", "sigstop rank=2 step=4"]
    result = train(_on_ray(tiny_config(tmp_path, corpus, steps=_STEPS, faults=faults, suspect_after_s=5.0)))
    killed, frozen = events_of(result.run_dir, "fault_detected")
    assert (killed["ranks"], frozen["ranks"]) == ([1], [2])
    assert "heartbeat" in frozen["cause"]
    assert not psutil.pid_exists(frozen["pid"]), "Ray asks a process to end, and a frozen one does not listen"
    assert result.exit_code == 0
    assert outcome_of(undisturbed.run_dir).differences(outcome_of(result.run_dir)) == []
    assert not list(Path("/tmp").glob(f"hf-ray-{os.getpid()}-*"))
    assert {"live", "stored", "restored"} <= {seen.what for seen in sightings(no_snapshot_is_torn)}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Two raylets that belong to nobody's run."""
    from ray.cluster_utils import Cluster

    running = Cluster()
    try:
        for _ in range(2):
            running.add_node(num_cpus=4, object_store_memory=80_000_000, include_dashboard=False)
        yield str(running.address)
    finally:
        running.shutdown()


def _drive(config: RunConfig, **environment: str) -> subprocess.Popen[bytes]:
    """A driver in a process of its own, so that it can be killed."""
    code = (
        "import json, sys; from holdfast.configs.plain import from_plain; from holdfast.launch.run import train; "
        "sys.exit(train(from_plain(json.loads(sys.argv[1]))).exit_code)"
    )
    plain = json.dumps(to_plain(config))
    return subprocess.Popen(
        [sys.executable, "-c", code, plain], stdout=subprocess.DEVNULL, env=os.environ | environment
    )


def _await(condition: Callable[[], bool], complaint: str, deadline_s: float = 90.0) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"{complaint} within {deadline_s} s"
        time.sleep(0.1)


def _await_step(root: Path, step: int) -> Path:
    """The directory of the only run below ``root``, once it has finished ``step``."""

    def is_done() -> bool:
        lines = [line for metrics in root.glob("*/*/metrics.jsonl") for line in metrics.read_text().splitlines()]
        return any(json.loads(line).get("step", 0) >= step for line in lines)

    _await(is_done, f"step {step} was not finished")
    return next(root.glob("*/*/metrics.jsonl")).parent


@pytest.mark.slow
def test_joined_cluster_keeps_running_and_the_detached_keepers_leave_after_their_lease(
    tmp_path: Path, corpus: Path, cluster: str, undisturbed: Result
) -> None:
    config = _on_ray(tiny_config(tmp_path, corpus, steps=400, lease_s=3.0), address=cluster)
    driver = _drive(replace(config, snapshot=replace(config.snapshot, persist_every_steps=2)))
    run_dir = _await_step(tmp_path, 6)
    _await(lambda: any((run_dir / "checkpoints").glob("step-*/commit.json")), "a checkpoint was not written")
    before = _actors()
    assert len(before) >= 6, "three keepers and three workers"
    driver.send_signal(signal.SIGKILL)
    driver.wait(30)
    assert _gone(before, deadline_s=30.0), "workers die with their driver, keepers when nobody renews their lease"


def test_sigterm_stops_a_run_on_the_cluster_of_ray_address_after_saving(
    tmp_path: Path, corpus: Path, cluster: str
) -> None:
    driver = _drive(_on_ray(tiny_config(tmp_path, corpus, steps=400)), RAY_ADDRESS=cluster)
    run_dir = _await_step(tmp_path, 3)
    before = _actors()
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(60) == 75
    assert _gone(before, deadline_s=15.0)
    (ended,) = events_of(run_dir, "run_ended")
    assert ended["outcome"] == "stopped"
    assert ended["step"] >= 3


def _actors() -> list[psutil.Process]:
    """Processes of Ray that are an actor of ours."""
    return [p for p in psutil.process_iter() if "ray::_Actor" in _title(p)]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _gone(processes: list[psutil.Process], deadline_s: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=deadline_s)
    return not alive
