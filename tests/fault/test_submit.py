"""Runs as Ray jobs on a cluster of two nodes with token authentication: submitted, stopped, killed, submitted again."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.configs.schema import LaunchKind, RunConfig
from holdfast.launch.run import Result, train
from tests.support.drivers import options_of, records, sound_record, steps_of, until
from tests.support.ray_cluster import RayCluster, ray_cluster
from tests.support.runs import events_of, outcome_of, tiny_config, write_corpus

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

_STEPS = 120
_STRUCK_AT = 6
_DEADLINE_S = 240.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    with ray_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Result:
    return train(tiny_config(tmp_path_factory.mktemp("undisturbed"), corpus, steps=_STEPS, nodes=2, spares=0))


class Submission:
    """``holdfast submit`` in a process of its own, from a directory of its own."""

    def __init__(self, cluster: RayCluster, folder: Path, words: Sequence[str]) -> None:
        folder.mkdir(exist_ok=True)
        self._said = (folder / "said.txt").open("w+")
        command = [sys.executable, "-m", "holdfast", "submit", "--address", cluster.address, *words]
        self._process = subprocess.Popen(
            command, cwd=folder, env=cluster.environment, stdout=self._said, stderr=subprocess.STDOUT
        )

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str]:
        """Exit code, and everything that was shown."""
        code = self._process.wait(_DEADLINE_S)
        return code, self.said()

    def said(self) -> str:
        return Path(self._said.name).read_text()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._said.close()


class Jobs:
    """Trains one configuration as jobs, one after the other."""

    def __init__(self, cluster: RayCluster, root: Path, config: RunConfig) -> None:
        self.cluster, self.root, self._open = cluster, root, list[Submission]()
        launch = replace(config.launch, kind=LaunchKind.LOCAL)
        self._words = options_of(replace(config, root=str(root / "runs"), resume="auto", launch=launch))
        (root / "runs").mkdir()

    def submit(self, *options: str) -> Submission:
        return self._begin([*options, "--", "train", *self._words])

    def look_after(self, *words: str) -> Submission:
        return self._begin(words)

    def _begin(self, words: Sequence[str]) -> Submission:
        self._open.append(Submission(self.cluster, self.root / "code", words))
        return self._open[-1]

    def await_step(self, step: int, attempt: int) -> Path:
        until(
            lambda: any(s >= step for run in self.runs() for s in _reached(run, attempt)), f"step {step}", _DEADLINE_S
        )
        return self.runs()[0]

    def runs(self) -> list[Path]:
        return [path.parent for path in (self.root / "runs").glob("*/*/run.json")]

    def close(self) -> None:
        for submission in self._open:
            submission.close()


def _reached(run: Path, attempt: int) -> list[int]:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True) if (run / "metrics.jsonl").exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [record["step"] for record in found if record.get("attempt") == attempt]


@pytest.fixture
def jobs(tmp_path: Path, corpus: Path, cluster: RayCluster) -> Iterator[Jobs]:
    used = Jobs(cluster, tmp_path, tiny_config(tmp_path, corpus, steps=_STEPS, nodes=2, spares=0))
    yield used
    used.close()


def test_a_killed_driver_loses_nothing_that_its_keepers_hold(jobs: Jobs, undisturbed: Result) -> None:
    """No checkpoint is ever written before the end, so what the second attempt begins with was in memory only."""
    first = jobs.submit()
    run = jobs.await_step(_STRUCK_AT, attempt=1)
    jobs.cluster.driver().send_signal(signal.SIGKILL)
    code, said = first.end()
    assert code == 137, said
    assert not list((run / "checkpoints").glob("step-*"))

    code, said = jobs.submit().end()
    assert code == 0, said
    assert [attempt["ray_job"] for attempt in sound_record(run)["attempts"]] == [f"{run.name}-a1", f"{run.name}-a2"]
    assert steps_of(run, 1) + steps_of(run, 2) == list(range(1, _STEPS + 1)), "no step is lost, and none made twice"
    assert "have outlived its driver" in events_of(run, "run_started")[1]["resume"]
    assert outcome_of(undisturbed.run_dir).differences(outcome_of(run)) == []


def test_a_run_goes_on_from_its_checkpoint_on_a_head_that_was_started_anew(
    tmp_path: Path, corpus: Path, undisturbed: Result
) -> None:
    """All nodes are gone at once, and with them keepers, driver and whatever the job server knew."""
    config = tiny_config(tmp_path, corpus, steps=_STEPS, nodes=2, spares=0)
    config.snapshot.persist_every_steps = 4
    with ray_cluster() as running, contextlib.closing(Jobs(running, tmp_path, config)) as jobs:
        first = jobs.submit()
        run = jobs.await_step(_STRUCK_AT + 4, attempt=1)
        until(lambda: bool(list((run / "checkpoints").glob("step-*"))), "a checkpoint", _DEADLINE_S)
        running.close()
        running.start()
        code, said = first.end()
        assert code == 1 and "has forgotten the job" in said, said

        code, said = jobs.submit().end()
        assert code == 0, said
    assert "outlived" not in events_of(run, "run_started")[1]["resume"], "nothing is left in memory"
    assert steps_of(run, 2)[0] > 4
    assert outcome_of(undisturbed.run_dir).differences(outcome_of(run)) == []


def test_a_job_that_nobody_follows_is_stopped_by_its_name(jobs: Jobs) -> None:
    code, said = jobs.submit("--no-wait").end()
    assert code == 0, said
    run = jobs.await_step(_STRUCK_AT, attempt=1)
    code, said = jobs.look_after("--stop", f"{run.name}-a1").end()
    assert code == 75, said
    assert sound_record(run)["ended"]["step"] >= _STRUCK_AT


def test_doctor_asks_every_node_of_the_cluster(cluster: RayCluster, tmp_path: Path) -> None:
    words = [
        f"launch.address={cluster.gcs}",
        "launch.kind=LOCAL",
        "launch.nodes=2",
        f"root={tmp_path}",
        "trainer.global_batch=16",
    ]
    command = [sys.executable, "-m", "holdfast", "doctor", *words]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, text=True, timeout=_DEADLINE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(set(re.findall(r"Ray node (\w{8}) at", done.stdout))) == 2, done.stdout


def test_ctrl_c_stops_the_job_after_saving_and_the_same_command_goes_on(jobs: Jobs, undisturbed: Result) -> None:
    first = jobs.submit()
    run = jobs.await_step(_STRUCK_AT, attempt=1)
    first.interrupt()
    code, said = first.end()
    assert code == 75, said
    assert "END   stopped" in said, "the log is shown to its end"
    saved = sound_record(run)["ended"]["step"]
    assert saved >= _STRUCK_AT

    second = jobs.submit()
    jobs.await_step(saved + 1, attempt=2)
    second.interrupt()
    time.sleep(0.3)
    second.interrupt()
    code, said = second.end()
    assert code == 130
    assert f"--attach {run.name}-a2" in said, "a second Ctrl-C leaves the job alone and says how to come back"
    code, said = jobs.look_after("--attach", f"{run.name}-a2").end()
    assert code == 75, said

    third = jobs.submit()
    code, said = third.end()
    assert code == 0, said
    assert said.count("END   finished") == 1, "each line once"
    logged = (run / "logs" / "driver.attempt3.log").read_text()
    assert "END   finished" in logged, "the run keeps what Ray's own log loses with the cluster"
    assert outcome_of(undisturbed.run_dir).differences(outcome_of(run)) == []
    assert records(run / "events.jsonl")[-1]["event"] == "run_ended"
