"""The life of a whole run: started, stopped, killed, damaged, given up, and continued with the same bits."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.fault_tolerance import checkpoint
from holdfast.launch.cli import main
from holdfast.launch.conductor import Conductor
from holdfast.launch.console import Console
from holdfast.launch.fleet import Address, Role
from holdfast.launch.process_fleet import ProcessFleet
from holdfast.launch.run import train
from holdfast.launch.run_dir import RunDir
from holdfast.types import StepReport
from tests.support.drivers import (
    Driver,
    at_step,
    await_event,
    options_of,
    records,
    run_dirs,
    sound_record,
    steps_of,
    until,
)
from tests.support.runs import Outcome, events_of, outcome_of, tiny_config, write_corpus
from tests.support.strikes import sightings

pytestmark = pytest.mark.timeout(180)

_STEPS = 24


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Outcome:
    """What a run of ``_STEPS`` steps that nothing happens to ends with."""
    result = train(_config(tmp_path_factory.mktemp("reference"), corpus))
    assert result.exit_code == 0
    return outcome_of(result.run_dir)


@pytest.fixture
def driver() -> Iterator[Callable[..., Driver]]:
    started = list[Driver]()

    def start(config: RunConfig, temporary: Path | None = None) -> Driver:
        started.append(Driver(config, temporary))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def pid_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Address], int]:
    """Number of a process of the run that this process drives."""
    fleets, make = list[ProcessFleet](), ProcessFleet.__init__

    def noted(self: ProcessFleet, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        fleets.append(self)

    monkeypatch.setattr(ProcessFleet, "__init__", noted)
    return lambda address: fleets[-1]._members[address].process.pid or -1


def _config(root: Path, corpus: Path, *, persist_every: int = 0, **options: Any) -> RunConfig:
    """Two ranks without a spare, because each process takes its time to start."""
    config = tiny_config(root, corpus, **{"steps": _STEPS, "nodes": 2, "spares": 0, **options})
    config.resume, config.snapshot.persist_every_steps = "auto", persist_every
    return config


def _keeper(node: int) -> Address:
    return Address(Role.KEEPER, node)


def _next_command(said: str) -> list[str]:
    """What the end block advises to type."""
    return shlex.split(said.splitlines()[-1].removeprefix("NEXT  "))


# -- again ------------------------------------------------------------------------------------------------------------


def test_a_finished_run_trains_nothing_more_until_it_gets_a_farther_goal(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path, corpus, steps=4)
    first = train(config)
    config.run_id = first.run_dir.name
    before = _content(first.run_dir)
    capfd.readouterr()
    again = train(config)
    assert (again.outcome, again.exit_code, again.step, again.run_dir) == ("finished", 0, 4, first.run_dir)
    assert "is finished: step 4 was its goal; nothing to do" in capfd.readouterr().out
    assert _content(first.run_dir) == before

    config.trainer.max_steps = 6
    farther = train(config)
    assert (farther.outcome, farther.exit_code, farther.step) == ("finished", 0, 6)
    assert steps_of(first.run_dir, attempt=2) == [5, 6]
    (plan,) = events_of(first.run_dir, "recovery_planned")
    assert (plan["source"], plan["version"]) == ("disk", 4)
    tokens = {r["step"]: r["tokens"] for r in records(first.run_dir / "metrics.jsonl") if "loss" in r}
    assert tokens[5] - tokens[4] == tokens[4] - tokens[3]
    assert sound_record(first.run_dir)["ended"]["step"] == 6


def _content(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# -- stopped ----------------------------------------------------------------------------------------------------------


def test_a_signal_to_all_processes_saves_and_the_advised_command_ends_with_the_same_bits(
    tmp_path: Path, corpus: Path, reference: Outcome, driver: Callable[..., Driver]
) -> None:
    """Ctrl-C, a scheduler and a service manager reach workers, keepers and the fork server, too."""
    saved = 0
    for number in (signal.SIGINT, signal.SIGTERM):
        run = driver(_config(tmp_path, corpus))
        run.await_step(saved + 3)
        run.signal_group(number)
        code, said = run.await_end()
        (run_dir,) = run_dirs(tmp_path)
        ended = sound_record(run_dir)["ended"]
        assert (code, ended["outcome"], ended["exit_code"]) == (75, "stopped", 75), said
        # SIGTERM ends workers at once, and a version is complete only after the step that follows it.
        assert saved + 2 <= ended["step"] < _STEPS
        assert f"{number.name} received" in ended["reason"]
        saved = ended["step"]
        written = events_of(run_dir, "checkpoint_written")[-1]
        assert written["step"] == saved
        assert f"END   stopped (exit code 75): step {saved} of {_STEPS} in" in said
        assert re.search(rf"^ +saved +checkpoint of step {saved}, {written['path']}$", said, re.MULTILINE)
        assert run.family() == []

    command = _next_command(said)
    assert command[:2] == ["holdfast", "train"]
    assert main(command[1:]) == 0
    assert run_dirs(tmp_path) == [run_dir]
    assert steps_of(run_dir, attempt=3) == list(range(saved + 1, _STEPS + 1))
    assert reference.differences(outcome_of(run_dir)) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_driver_ends_the_run_at_a_step_that_all_ranks_agree_on(
    number: signal.Signals, tmp_path: Path, corpus: Path, reference: Outcome
) -> None:
    config = _config(tmp_path, corpus)
    with at_step(tmp_path, 2, lambda: os.kill(os.getpid(), number)):
        stopped = train(config)
    assert (stopped.outcome, stopped.exit_code) == ("stopped", 75)
    assert stopped.reason == f"{number.name} received"
    assert not events_of(stopped.run_dir, "fault_detected")
    assert steps_of(stopped.run_dir, attempt=1) == list(range(1, stopped.step + 1))
    resumed = train(config)
    assert (resumed.run_dir, resumed.exit_code) == (stopped.run_dir, 0)
    assert reference.differences(outcome_of(resumed.run_dir)) == []


def test_control_c_before_anything_is_saved_leaves_nothing_behind(
    tmp_path: Path, corpus: Path, driver: Callable[..., Driver]
) -> None:
    with tempfile.TemporaryDirectory() as temporary:  # a short name: there will be a socket in it
        run = driver(_config(tmp_path, corpus), Path(temporary))
        run.await_processes(3)  # the fork server imports torch, in the middle of which an exception would be ugly
        before = time.monotonic()
        run.signal_group(signal.SIGINT)
        code, said = run.await_end()
        assert code == 130, said
        assert time.monotonic() - before < 10
        assert "Traceback" not in said
        assert "END   stopped (exit code 130): no step saved" in said
        until(lambda: run.family() == [], "the end of all processes")
        assert [path.name for path in Path(temporary).iterdir() if "torchinductor" not in path.name] == []
    (run_dir,) = run_dirs(tmp_path)
    assert sound_record(run_dir)["ended"]["exit_code"] == 130
    assert list((run_dir / "checkpoints").iterdir()) == []


def test_a_second_signal_leaves_at_once(
    tmp_path: Path, corpus: Path, reference: Outcome, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the middle of a step that lasts, so that the first one cannot have ended the run."""
    config, left_s = _config(tmp_path, corpus, persist_every=2, faults=["hang rank=1 step=5"]), list[float]()

    def insist() -> None:
        await_event(tmp_path, "checkpoint_written", step=4)
        os.kill(os.getpid(), signal.SIGTERM)
        await_event(tmp_path, "stop_requested")
        left_s.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    with at_step(tmp_path, 5, insist):
        result = train(config)
    assert time.monotonic() - left_s[0] < 10
    assert (result.outcome, result.exit_code, result.step) == ("stopped", 143, 4)
    assert f"END   stopped (exit code 143): step 4 of {_STEPS}" in capfd.readouterr().out
    ended = sound_record(result.run_dir)["ended"]
    assert (ended["outcome"], ended["exit_code"], ended["step"]) == ("stopped", 143, 4)
    config.chaos.faults = []
    resumed = train(config)
    assert (resumed.exit_code, resumed.run_dir) == (0, result.run_dir)
    assert reference.differences(outcome_of(resumed.run_dir)) == []


def test_a_killed_driver_takes_its_processes_with_it_and_the_next_one_continues(
    tmp_path: Path, corpus: Path, reference: Outcome, driver: Callable[..., Driver], no_snapshot_is_torn: Path
) -> None:
    config = _config(tmp_path, corpus, persist_every=8, faults=["hang rank=1 step=9"])
    run = driver(config)
    run.await_step(9)
    await_event(tmp_path, "checkpoint_written", step=8)
    assert len(run.family()) >= 6  # driver, fork server, two keepers, two workers
    run.signal(signal.SIGKILL)
    until(lambda: run.family() == [], "the end of all processes", within_s=10)
    assert {seen.what for seen in sightings(no_snapshot_is_torn)} == {"live", "stored"}
    (run_dir,) = run_dirs(tmp_path)
    config.chaos.faults = []
    resumed = train(config)
    assert (resumed.run_dir, resumed.exit_code) == (run_dir, 0)
    (plan,) = events_of(run_dir, "recovery_planned")
    assert (plan["source"], plan["version"]) == ("disk", 8)
    record = sound_record(run_dir)
    assert record["attempts"][0]["ended"] is None  # nobody was left to note it
    assert reference.differences(outcome_of(run_dir)) == []


# -- damaged ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """The root of a run that was stopped with two checkpoints on disk."""
    root = tmp_path_factory.mktemp("interrupted")

    def stop() -> None:
        await_event(root, "checkpoint_written", step=5)
        os.kill(os.getpid(), signal.SIGTERM)

    with at_step(root, 6, stop):
        result = train(_config(root, corpus, persist_every=5, faults=["hang rank=0 step=6"], stop_grace_s=6.0))
    assert (result.exit_code, result.step) == (75, 6)
    assert "had not left the step with" in result.reason
    assert [folder.name for folder in _checkpoints(result.run_dir)] == ["step-00000005", "step-00000006"]
    return root


def _checkpoints(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "checkpoints").glob("step-*"))


def _flip_a_bit(folder: Path) -> None:
    path = folder / checkpoint.data_file(1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def _cut_off_the_end(folder: Path) -> None:
    path = folder / checkpoint.data_file(0)
    os.truncate(path, path.stat().st_size - 1)


def _lose_a_manifest(folder: Path) -> None:
    (folder / checkpoint.manifest_file(0)).unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_flip_a_bit, "digest .* does not match"),
        (_cut_off_the_end, "bytes, .* were written"),
        (_lose_a_manifest, "is missing"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_it_is_used(
    damage: Callable[[Path], None],
    reason: str,
    tmp_path: Path,
    corpus: Path,
    interrupted: Path,
    reference: Outcome,
    capfd: pytest.CaptureFixture[str],
) -> None:
    root = shutil.copytree(interrupted, tmp_path / "root")
    (run_dir,) = run_dirs(root)
    older, newer = _checkpoints(run_dir)
    damage(newer)
    config = _config(root, corpus, persist_every=5)
    result = train(config)
    assert (result.exit_code, result.run_dir) == (0, run_dir)
    plan = events_of(run_dir, "recovery_planned")[-1]
    assert (plan["source"], plan["version"]) == ("disk", checkpoint.step_of(older.name))
    refused = {event["path"]: event["reason"] for event in events_of(run_dir, "checkpoint_rejected")}
    assert re.search(reason, refused[newer.name])
    assert any(re.search(reason, one) for one in plan["rejected"])
    assert re.search(f"SKIP .* checkpoint {newer.name}: .*{reason}", capfd.readouterr().out)
    assert reference.differences(outcome_of(run_dir)) == []
    sound_record(run_dir)


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over(
    tmp_path: Path, corpus: Path, interrupted: Path
) -> None:
    root = shutil.copytree(interrupted, tmp_path / "root")
    (run_dir,) = run_dirs(root)
    older, newer = _checkpoints(run_dir)
    _flip_a_bit(older)
    _cut_off_the_end(newer)
    before = sorted(_content(run_dir / "checkpoints").values())
    for _ in range(2):  # the second time knows no more than the first
        result = train(_config(root, corpus, persist_every=5))
        assert (result.exit_code, result.outcome, result.run_dir) == (93, "failed", run_dir)
        assert "2 checkpoint(s) exist but none can be used" in result.reason
        assert "start a new run with resume=never" in result.reason
        left = _content(run_dir / "checkpoints")
        assert sorted(h for name, h in left.items() if not name.endswith("reason.txt")) == before
    assert steps_of(run_dir, attempt=2) == steps_of(run_dir, attempt=3) == []
    assert sound_record(run_dir)["ended"]["exit_code"] == 93


# -- full -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path, str], None]]:
    """Put a small file system at a path."""
    mounted = list[Path]()

    def mount(place: Path, size: str) -> None:
        place.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system takes root")
        mounted.append(place)

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def test_a_run_outlives_a_disk_without_room_for_another_checkpoint_and_says_what_is_saved(
    tmp_path: Path, corpus: Path, small_disk: Callable[[Path, str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """There is room for one checkpoint and a half."""
    config = _config(tmp_path, corpus, steps=4)
    config.run_id = "full"
    small_disk(tmp_path / "test" / "full" / "checkpoints", "1200k")
    assert train(config).exit_code == 0
    config.trainer.max_steps = 8
    result = train(config)
    assert (result.outcome, result.exit_code, result.step) == ("finished", 0, 8)
    assert not events_of(result.run_dir, "fault_detected")
    rejected = events_of(result.run_dir, "checkpoint_rejected")
    assert [(e["path"], "no space left" in e["reason"]) for e in rejected] == [("step-00000008", True)] * 3
    assert [f.name for f in _checkpoints(result.run_dir) if (f / checkpoint.COMMIT_FILE).exists()] == ["step-00000004"]
    assert re.search(
        r"^ +saved +checkpoint of step 4, step-00000004, and nothing later", capfd.readouterr().out, re.MULTILINE
    )
    sound_record(result.run_dir)


def test_a_run_whose_weights_find_no_room_can_be_finished_when_there_is_some(
    tmp_path: Path, corpus: Path, small_disk: Callable[[Path, str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    root, filler = tmp_path / "disk", tmp_path / "disk" / "filler"
    small_disk(root, "3m")
    config = _config(root, corpus, steps=60)  # enough for the disk to be full before the last one
    config.data.cache = str(tmp_path / "cache")
    with at_step(root, 3, lambda: _fill_up(filler)):
        result = train(config)
    assert (result.outcome, result.exit_code, result.step) == ("failed", 1, 60)
    assert "the goal is reached, but the weights are not exported: " in result.reason
    assert "No space left on device" in result.reason
    said, complained = capfd.readouterr()
    assert "      saved  no checkpoint" in said
    assert "record run.json does not know how it ended: no space left" in said
    assert "Logging error" not in complained
    filler.unlink()
    again = train(config)
    assert (again.outcome, again.exit_code, again.step, again.run_dir) == ("finished", 0, 60, result.run_dir)
    assert sound_record(result.run_dir)["ended"]["exit_code"] == 0


def _fill_up(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    with contextlib.suppress(OSError):
        while os.write(descriptor, bytes(4096)):
            pass
    os.close(descriptor)


# -- refused ----------------------------------------------------------------------------------------------------------


def test_a_run_that_somebody_drives_is_not_driven_twice(
    tmp_path: Path, corpus: Path, interrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shutil.copytree(interrupted, tmp_path / "root")
    (run_dir,) = run_dirs(root)
    config = _config(root, corpus)
    config.run_id = run_dir.name
    before = _content(run_dir)
    with RunDir(run_dir).lock():
        assert main(["train", *options_of(config)]) == 2
    assert f"run {run_dir.name} is being driven by pid {os.getpid()} on " in capsys.readouterr().err
    after = _content(run_dir)
    assert {k: v for k, v in after.items() if k != "driver.lock"} == {
        k: v for k, v in before.items() if k != "driver.lock"
    }


def test_a_root_that_cannot_be_written_to_is_refused_before_anything_starts(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert main(["train", *options_of(_config(tmp_path / "file" / "root", corpus))]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path / "file") in said
    assert "Traceback" not in said


def test_all_mistakes_are_told_together_and_nothing_is_made(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path / "root", corpus)
    config.trainer.global_batch, config.recovery.heartbeat_s, config.snapshot.keep_last = 7, -1.0, 1
    config.data.path = str(tmp_path / "missing")
    assert main(["train", *options_of(config)]) == 2
    said = capsys.readouterr().err.splitlines()
    for mistake in (
        "trainer.global_batch=7 must be a multiple of trainer.micro_batch x ranks",
        "recovery.heartbeat_s=-1.0 must be a positive number of seconds",
        "snapshot.keep_last=1 must be at least 2",
        f"data.path='{tmp_path / 'missing'}' does not exist",
    ):
        assert sum(mistake in line for line in said) == 1, said
    assert not (tmp_path / "root").exists()


# -- repaired ---------------------------------------------------------------------------------------------------------


def test_all_ranks_and_the_spare_die_at_once_and_memory_restores_them(
    tmp_path: Path, corpus: Path, reference: Outcome, pid_of: Callable[[Address], int]
) -> None:
    def kill_all() -> None:
        for number in range(3):  # two ranks and a spare
            os.kill(pid_of(Address(Role.WORKER, number)), signal.SIGKILL)

    with at_step(tmp_path, 3, kill_all):
        result = train(_config(tmp_path, corpus, spares=1))
    assert result.exit_code == 0
    (done,) = events_of(result.run_dir, "recovery_done")
    assert done["steps_lost"] <= 1
    assert reference.differences(outcome_of(result.run_dir)) == []


def test_a_frozen_keeper_is_replaced_and_few_steps_are_lost(
    tmp_path: Path, corpus: Path, reference: Outcome, pid_of: Callable[[Address], int]
) -> None:
    """A rank that hangs gives the silence of the keeper the time it takes."""
    config = _config(tmp_path, corpus, faults=["hang rank=0 step=8"], suspect_after_s=2.0, abort_after_s=0.5)
    with at_step(tmp_path, 5, lambda: os.kill(pid_of(_keeper(1)), signal.SIGSTOP)):
        result = train(config)
    assert result.exit_code == 0
    fault, *_ = events_of(result.run_dir, "fault_detected")
    assert fault["node"] == 1
    assert "keeper of node 1: no answer before the deadline" in fault["cause"]
    # One, and as many as the keepers were behind when one froze: what is not committed keeps its buffer.
    assert all(event["steps_lost"] <= 2 for event in events_of(result.run_dir, "recovery_done"))
    assert reference.differences(outcome_of(result.run_dir)) == []


def test_a_node_that_dies_with_its_memory_falls_back_to_disk_and_says_what_that_costs(
    tmp_path: Path, corpus: Path, reference: Outcome, pid_of: Callable[[Address], int]
) -> None:
    def kill_node() -> None:
        await_event(tmp_path, "checkpoint_written", step=5)
        for address in (_keeper(1), Address(Role.WORKER, 1)):
            os.kill(pid_of(address), signal.SIGKILL)

    config = _config(tmp_path, corpus, persist_every=5, faults=["hang rank=0 step=8"], abort_after_s=0.5)
    config.snapshot.parity = 0
    with at_step(tmp_path, 8, kill_node):
        result = train(config)
    assert result.exit_code == 0
    (plan,) = events_of(result.run_dir, "recovery_planned")
    assert (plan["source"], plan["version"]) == ("disk", 5)
    assert any("not complete at rank 1" in reason for reason in plan["rejected"])
    (done,) = events_of(result.run_dir, "recovery_done")
    assert done["steps_lost"] == 3
    assert steps_of(result.run_dir, attempt=1) == [*range(1, 9), *range(6, _STEPS + 1)]
    assert reference.differences(outcome_of(result.run_dir)) == []


def test_a_run_that_was_suspended_as_a_whole_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, corpus: Path, reference: Outcome, pid_of: Callable[[Address], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-Z and fg: every answer is overdue, and nobody is to blame."""
    everybody = [*map(_keeper, range(2)), *(Address(Role.WORKER, number) for number in range(2))]
    show = Console.step

    def suspend(self: Console, report: StepReport) -> None:
        show(self, report)
        if report.step == 5:
            for address in everybody:
                os.kill(pid_of(address), signal.SIGSTOP)
            time.sleep(3.0)  # the driver's own thread
            for address in everybody:
                os.kill(pid_of(address), signal.SIGCONT)

    monkeypatch.setattr(Console, "step", suspend)
    result = train(_config(tmp_path, corpus, suspect_after_s=1.0))
    assert result.exit_code == 0
    assert not events_of(result.run_dir, "fault_detected")
    assert reference.differences(outcome_of(result.run_dir)) == []


def test_a_stop_while_a_lost_rank_is_replaced_saves_what_memory_holds(
    tmp_path: Path, corpus: Path, reference: Outcome
) -> None:
    config = _config(tmp_path, corpus, faults=["sigkill rank=1 step=6"])

    def stop() -> None:
        await_event(tmp_path, "fault_detected")
        os.kill(os.getpid(), signal.SIGTERM)

    with at_step(tmp_path, 4, stop):
        stopped = train(config)
    assert (stopped.outcome, stopped.exit_code) == ("stopped", 75)
    assert stopped.step >= 5
    config.chaos.faults = []
    assert train(config).exit_code == 0
    assert reference.differences(outcome_of(stopped.run_dir)) == []


# -- given up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("max_failures", "code", "faults"), [(10, 93, 4), (2, 1, 3)])
def test_a_worker_that_dies_at_each_restart_ends_the_run_with_its_history(
    max_failures: int, code: int, faults: int, tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # At whatever version: on a busy machine keepers are some behind.
    again = [f"sigkill rate=1 ranks=1-1 from=1 seed={number} at=recovery.before_restore" for number in range(5)]
    dies = ["sigkill rank=1 step=4 at=step.before_update", *again]
    result = train(_config(tmp_path, corpus, steps=8, faults=dies, max_failures=max_failures))
    assert (result.outcome, result.exit_code) == ("failed", code)
    assert result.reason.count("(rank 1) at step") == result.reason.count("killed by SIGKILL") == faults
    folders = sorted((result.run_dir / "failures").iterdir())
    assert [folder.name for folder in folders] == [f"{n:04d}" for n in range(1, faults + 1)]
    for folder in folders:
        assert "chaos: sigkill rank=1 step=" in (folder / "rank00001.tail.txt").read_text()
        assert (folder / "driver.tail.txt").exists()
        assert (folder / "summary.json").exists()
    said = capfd.readouterr().out
    assert re.search(rf"END   failed \(exit code {code}\): step [1-4] of 8", said)
    is_saved = bool(_checkpoints(result.run_dir))
    assert is_saved == (code == 1)  # what made no progress is not trusted
    assert bool(re.search(r"^ +saved +no checkpoint", said, re.MULTILINE)) == (not is_saved)
    assert sound_record(result.run_dir)["ended"]["exit_code"] == code


def test_an_exception_is_named_on_the_console_and_kept(
    tmp_path: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = train(_config(tmp_path, corpus, steps=4, faults=["exception rank=1 step=2"]))
    assert result.exit_code == 0
    assert re.search(
        r"FAULT \S+ rank 1 lost \(node 1, pid \d+\): ChaosException: injected by chaos.faults", capfd.readouterr().out
    )
    (fault,) = events_of(result.run_dir, "fault_detected")
    assert fault["cause"].startswith("ChaosException: injected by chaos.faults\nTraceback")
    (folder,) = (result.run_dir / "failures").iterdir()
    assert "ChaosException: injected by chaos.faults" in (folder / "summary.json").read_text()
    assert "ChaosException: injected by chaos.faults" in (folder / "rank00001.tail.txt").read_text()


def test_an_error_of_the_driver_itself_is_noted_wherever_one_looks(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Conductor) -> None:
        raise RuntimeError("the driver is wrong")

    monkeypatch.setattr(Conductor, "run", fail)
    assert main(["train", *options_of(_config(tmp_path, corpus))]) == 1
    said, complained = capfd.readouterr()
    assert "END   failed (exit code 1): no step saved" in said
    assert re.search(r"^ +why +RuntimeError: the driver is wrong", said, re.MULTILINE)
    assert "Traceback" in complained
    (run_dir,) = run_dirs(tmp_path)
    assert events_of(run_dir, "run_ended")[0]["reason"] == "RuntimeError: the driver is wrong"
    assert sound_record(run_dir)["ended"]["exit_code"] == 1


def test_a_run_that_diverges_ends_with_the_reason(tmp_path: Path, corpus: Path) -> None:
    config = _config(tmp_path, corpus)
    config.optim.lr = 1e30
    result = train(config)
    assert (result.outcome, result.exit_code) == ("failed", 93)
    assert "is not finite; lower optim.lr" in result.reason
    assert result.step < _STEPS
    assert _checkpoints(result.run_dir) == []


# -- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "per_node", "spares"), [(1, 1, 0), (2, 2, 1)])
def test_a_rank_is_replaced_in_runs_of_other_shapes(
    nodes: int, per_node: int, spares: int, tmp_path: Path, corpus: Path
) -> None:
    last = nodes * per_node - 1
    config = _config(tmp_path, corpus, steps=4, nodes=nodes, spares=spares, faults=[f"sigkill rank={last} step=2"])
    config.launch.workers_per_node = per_node
    config.trainer.global_batch, config.trainer.eval_windows = 2 * (last + 1), 2 * (last + 1)
    result = train(config)
    assert (result.exit_code, result.step) == (0, 4)
    (fault,) = events_of(result.run_dir, "fault_detected")
    assert (fault["ranks"], fault["node"]) == ([last], nodes - 1)
    (done,) = events_of(result.run_dir, "recovery_done")
    assert done["steps_lost"] <= 1


def test_a_batch_that_the_ranks_cannot_share_is_refused(tmp_path: Path, corpus: Path) -> None:
    config = _config(tmp_path / "root", corpus)
    config.launch.workers_per_node = 3
    config.trainer.eval_windows = 6
    with pytest.raises(ConfigurationError, match=r"trainer.global_batch=8 must be a multiple of .* 2 x 6 = 12"):
        train(config)
    assert not (tmp_path / "root").exists()


# -- records ----------------------------------------------------------------------------------------------------------


def test_evaluations_on_the_way_are_told_with_their_steps(tmp_path: Path, corpus: Path) -> None:
    config = _config(tmp_path, corpus, steps=9)
    config.trainer.eval_every = 2
    result = train(config)
    evaluated = events_of(result.run_dir, "evaluated")
    assert [event["step"] for event in evaluated] == [2, 4, 6, 8, 9]
    noted = {
        r["step"]: r["validation_bits_per_byte"] for r in records(result.run_dir / "metrics.jsonl") if "loss" not in r
    }
    assert noted == {event["step"]: event["bits_per_byte"] for event in evaluated}
    assert result.findings["bits_per_byte"] == noted[9]
    kinds = [event["event"] for event in records(result.run_dir / "events.jsonl")]
    assert (kinds[0], kinds[-1]) == ("run_started", "run_ended")
    assert sound_record(result.run_dir)["ended"] == {
        "outcome": "finished",
        "exit_code": 0,
        "step": 9,
        "reason": "the goal is reached",
        "world": 2,
        "time": pytest.approx(time.time(), abs=60),
        "findings": result.findings,
    }
