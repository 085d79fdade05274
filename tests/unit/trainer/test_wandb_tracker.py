"""Trackers: W&B learns what there is to know, and whatever it does, the run neither waits nor ends for it.

Made-up ``wandb`` modules stand in for one that hangs, raises or dies; one test runs the real one, offline.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from holdfast.events import (
    CheckpointWritten,
    Evaluated,
    Event,
    EventSink,
    FaultDetected,
    RecoveryDone,
    RunEnded,
    RunStarted,
    StopRequested,
    WorldChanged,
)
from holdfast.trainer.config import TrackerConfig, TrackerName, WandbMode
from holdfast.trainer.trackers import HelperTracker, MemoryTracker, NullTracker, Tracker, WandbPlan, build_tracker
from holdfast.types import StepReport
from tests.support.fake_wandb import Install, calls, install, records

_FAULT = FaultDetected(1, (1,), 1, 4242, "killed by SIGKILL", "update", 3, 0.04)
_DONE = RecoveryDone(1, 2, 3, 1.31, 1, 0, 1, 10, {})


def _report(step: int, epoch: int = 1) -> StepReport:
    return StepReport(
        step=step,
        epoch=epoch,
        loss=2.0 + epoch / 8,
        bits_per_byte=3.0,
        learning_rate=1e-3,
        grad_norm=0.5,
        tokens=step * 64,
        step_s=0.1,
        stall_s=0.0,
        copy_bytes=10,
        committed=step - 1,
    )


def _tracker(directory: Path, *, mode: str | None = "offline", capacity: int = 4096, **limits: float) -> HelperTracker:
    plan = WandbPlan(
        run_id="run-1",
        project="project",
        directory=str(directory),
        mode=mode,
        init_timeout_s=limits.get("init_timeout_s", 10.0),
        finish_timeout_s=limits.get("finish_timeout_s", 10.0),
        config={"optim": {"lr": 0.001}},
        checkpoints=str(directory / "checkpoints"),
    )
    return HelperTracker(
        plan,
        attempt=2,
        capacity=capacity,
        start_grace_s=limits.get("start_grace_s", 10.0),
        stalled_after_s=limits.get("stalled_after_s", 60.0),
        clock=lambda: 1.5,
    )


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    before = _children()
    yield
    assert _children() <= before


def _children() -> set[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


# -- small ones -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracker", [NullTracker(), MemoryTracker()])
def test_every_tracker_is_an_event_sink_that_may_be_finished_twice(tracker: Tracker) -> None:
    sink: EventSink = tracker
    tracker.start({})
    tracker.log_step(_report(1))
    sink.emit(_FAULT)
    tracker.finish()
    tracker.finish()


def test_the_memory_tracker_keeps_everything() -> None:
    tracker = MemoryTracker()
    tracker.log_step(_report(1))
    tracker.emit(_FAULT)
    assert (tracker.reports, tracker.events) == ([_report(1)], [_FAULT])


def _build(config: TrackerConfig, directory: Path) -> Tracker:
    return build_tracker(config, run_id="r", project="p", directory=directory, plain_config={}, attempt=1)


@pytest.mark.parametrize(
    ("mode", "key", "told"),
    [
        (WandbMode.AUTO, None, "offline"),
        (WandbMode.AUTO, "k" * 40, None),
        (WandbMode.ONLINE, None, "online"),
        (WandbMode.OFFLINE, "k" * 40, "offline"),
    ],
)
def test_without_a_key_the_default_is_offline(
    mode: WandbMode, key: str | None, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    tracker = _build(TrackerConfig(name=TrackerName.WANDB, mode=mode), tmp_path)
    assert isinstance(tracker, HelperTracker)
    assert tracker._plan.mode == told


def test_by_default_nothing_follows_a_run(tmp_path: Path) -> None:
    assert isinstance(_build(TrackerConfig(), tmp_path), NullTracker)


def test_a_tracker_that_was_never_started_takes_everything_and_finishes_at_once(tmp_path: Path) -> None:
    tracker = _tracker(tmp_path)
    tracker.log_step(_report(1))
    tracker.finish()
    assert list(tmp_path.iterdir()) == []


# -- a made-up wandb --------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    return partial(install, tmp_path, monkeypatch)


def _run(tracker: HelperTracker, *items: StepReport | Event) -> float:
    """The life of a run; returns how long its end took."""
    tracker.start({})
    for item in items:
        tracker.log_step(item) if isinstance(item, StepReport) else tracker.emit(item)
    started_s = time.monotonic()
    tracker.finish()
    return time.monotonic() - started_s


def test_wandb_is_told_who_the_run_is_and_to_keep_quiet(
    tmp_path: Path, fake_wandb: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_wandb("")
    monkeypatch.setenv("WANDB_SERVICE", "of somebody else")
    _run(_tracker(tmp_path))
    ((options, settings, service, can_be_asked),) = calls(tmp_path, "init")
    assert options == {
        "id": "run-1",
        "name": "run-1",
        "project": "project",
        "entity": None,
        "dir": str(tmp_path),
        "config": {"optim": {"lr": 0.001}},
        "group": None,
        "job_type": "train",
        "resume": "allow",
        "allow_val_change": True,
        "mode": "offline",
    }
    assert (settings["console"], settings["silent"], settings["x_disable_stats"]) == ("off", True, True)
    assert settings["capture_loggers"] == {"holdfast": "INFO"}
    assert (settings["init_timeout"], settings["finish_timeout"]) == (10.0, 10.0)
    assert (service, can_be_asked) == (None, False)


def test_settings_that_the_installed_wandb_lacks_are_left_out(tmp_path: Path, fake_wandb: Install) -> None:
    fake_wandb("Settings.model_fields = {'console': 0, 'silent': 0, 'stop_fn': 0}")
    _run(_tracker(tmp_path))
    assert calls(tmp_path, "init")[0][1] == {"console": "off", "silent": True}


def test_replayed_steps_overlay_on_train_step_and_no_step_is_passed(tmp_path: Path, fake_wandb: Install) -> None:
    fake_wandb("")
    _run(_tracker(tmp_path), _report(1), _report(2), _report(2, epoch=2))
    assert calls(tmp_path, "define_metric") == [["train/step", None], ["*", "train/step"]]
    logged = [values for (values,) in calls(tmp_path, "log")]
    assert [(v["train/step"], v["train/epoch"], v["train/loss"]) for v in logged] == [
        (1, 1, 2.125),
        (2, 1, 2.125),
        (2, 2, 2.25),
    ]
    assert {(v["attempt"], v["wall_time"]) for v in logged} == {(2, 1.5)}


def test_events_become_metrics_alerts_and_the_exit_code(tmp_path: Path, fake_wandb: Install) -> None:
    fake_wandb("")
    ended = RunEnded("failed", 9, 1.0, 1, 1, 93, "no progress")
    fewer = WorldChanged(2, 3, 2, "node(s) 1 are not ready after 10 s")
    begun, stop = RunStarted("r", 1, 3, ""), StopRequested("SIGTERM received")
    _run(_tracker(tmp_path), begun, _FAULT, fewer, _DONE, Evaluated(9, 2.31, 96), stop, ended)
    assert calls(tmp_path, "alert") == [
        ["fault 1", "WARN"],
        ["2 ranks instead of 3", "WARN"],
        ["recovered from fault 1", "INFO"],
        ["the run has failed", "ERROR"],
    ]
    recovery, evaluation = (values for (values,) in calls(tmp_path, "log"))
    assert (recovery["train/step"], recovery["recovery/repaired_in_s"], recovery["recovery/steps_lost"]) == (3, 1.31, 1)
    assert (evaluation["train/step"], evaluation["eval/bits_per_byte"]) == (9, 2.31)
    assert calls(tmp_path, "preempting", "finish") == [[], [93]]


def test_the_summary_says_what_became_of_the_run_and_where_it_is(tmp_path: Path, fake_wandb: Install) -> None:
    fake_wandb("")
    begun, ended = RunStarted("r", 2, 3, ""), RunEnded("finished", 2, 1.0, 1, 4, 0)
    seconds = iter((10.0, 10.1, 10.2, 10.5))
    tracker = _tracker(tmp_path)
    tracker._clock = lambda: next(seconds)
    _run(tracker, begun, _report(1), Evaluated(2, 2.31, 96), ended)
    told: dict[str, object] = {}
    for (values,) in calls(tmp_path, "summary"):
        told |= values
    assert told.pop("goodput") == pytest.approx(0.1 / 0.5)
    assert told == {
        "run_dir": str(tmp_path),
        "bits_per_byte": 2.31,
        "outcome": "finished",
        "reason": "",
        "faults": 1,
        "preemptions": 0,
        "steps_lost": 4,
        "exit_code": 0,
    }


def test_a_checkpoint_that_is_there_is_linked_by_reference_without_reading_it(
    tmp_path: Path, fake_wandb: Install
) -> None:
    fake_wandb("")
    (tmp_path / "checkpoints" / "step-2").mkdir(parents=True)
    gone, there = (CheckpointWritten(step, f"step-{step}", 10, 0.1) for step in (1, 2))
    _run(_tracker(tmp_path), gone, there)
    uri = (tmp_path / "checkpoints" / "step-2").as_uri()
    assert calls(tmp_path, "artifact") == [["checkpoint-run-1", "checkpoint", [[uri, False]], ["step-2"]]]


def test_a_run_without_steps_is_worth_one_alert_each_time(tmp_path: Path, fake_wandb: Install) -> None:
    fake_wandb("")
    tracker = _tracker(tmp_path, stalled_after_s=1.0)
    tracker.start({})
    for count in (1, 2):
        _wait_for(lambda: _alerts(tmp_path) == count)  # noqa: B023  # called at once
        time.sleep(0.5)
        assert _alerts(tmp_path) == count
        tracker.log_step(_report(count))
    tracker.finish()
    assert calls(tmp_path, "alert")[0] == ["no progress", "WARN", 1.0]


def _alerts(directory: Path) -> int:
    return len(calls(directory, "alert")) if (directory / "calls").exists() else 0


def test_what_the_driver_logs_is_repeated_where_wandb_listens(tmp_path: Path, fake_wandb: Install) -> None:
    fake_wandb("""
        import logging

        class Note(logging.Handler):
            def emit(self, record):
                Path(__file__).with_name("lines").write_text(record.getMessage())

        def on_init(mode):
            logging.getLogger("holdfast").addHandler(Note())
    """)
    tracker, log = _tracker(tmp_path), logging.getLogger("holdfast.launch")
    log.setLevel(logging.INFO)
    tracker.start({})
    log.info("node %d is back", 3)
    tracker.finish()
    log.info("and nobody is told of this")
    log.setLevel(logging.NOTSET)
    assert (tmp_path / "fake" / "lines").read_text() == "holdfast.launch: node 3 is back"


def test_where_nodes_export_metrics_wandb_reads_them_for_its_system_charts(tmp_path: Path) -> None:
    endpoints = {"node-1": "http://10.0.0.1:8080/metrics"}
    settings = WandbPlan("r", "p", str(tmp_path), None, 1.0, 1.0).settings(endpoints)
    assert (settings["x_stats_open_metrics_endpoints"], settings["x_disable_stats"]) == (endpoints, False)
    real = pytest.importorskip("wandb").Settings
    assert real(**settings).x_stats_open_metrics_endpoints == endpoints


@pytest.mark.parametrize(
    ("faults", "group", "expected"),
    [([], "", ("main_job", "train")), (["sigkill rank=1 step=3"], "mine", ("mine", "chaos"))],
)
def test_a_run_is_grouped_by_its_experiment_and_one_with_faults_is_chaos(
    faults: list[str], group: str, expected: tuple[str, str], tmp_path: Path
) -> None:
    tracker = build_tracker(
        TrackerConfig(name=TrackerName.WANDB, group=group),
        run_id="r",
        project="p",
        directory=tmp_path,
        plain_config={"chaos": {"faults": faults}},
        attempt=1,
        group="main_job",
    )
    assert isinstance(tracker, HelperTracker)
    plan = tracker._plan
    assert isinstance(plan, WandbPlan)
    assert (plan.group, plan.job_type) == expected


def test_a_run_that_does_not_say_how_it_ended_has_failed(tmp_path: Path, fake_wandb: Install) -> None:
    fake_wandb("")
    _run(_tracker(tmp_path), _report(1))
    assert calls(tmp_path, "finish") == [[1]]


def test_stop_in_the_user_interface_stops_the_run(tmp_path: Path, fake_wandb: Install) -> None:
    fake_wandb("def on_log(values): stop()")
    heard = threading.Event()
    tracker = _tracker(tmp_path)
    tracker._on_stop = lambda reason: heard.set()
    tracker.start({})
    tracker.log_step(_report(1))
    assert heard.wait(20.0)
    tracker.finish()


# -- a wandb that cannot be used --------------------------------------------------------------------------------------


_UNUSABLE = {
    "is missing": "raise ModuleNotFoundError('no wandb here')",
    "ends the process": "def on_init(mode): sys.exit(1)",
    "dies": "def on_init(mode): os.kill(os.getpid(), 9)",
    "raises": "def on_init(mode): raise RuntimeError('service is down')",
}


@pytest.mark.parametrize("twist", _UNUSABLE.values(), ids=_UNUSABLE.keys())
def test_a_wandb_that_cannot_be_started_costs_one_warning(
    twist: str, tmp_path: Path, fake_wandb: Install, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb(twist)
    _run(_tracker(tmp_path, mode="online"), _report(1), _FAULT)
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("W&B could not be started as configured (")
    assert said.endswith("this attempt is recorded without it")


def test_an_init_that_fails_online_falls_back_to_offline(
    tmp_path: Path, fake_wandb: Install, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb("""
        def on_init(mode):
            if mode != "offline":
                raise RuntimeError("no network")
    """)
    _run(_tracker(tmp_path, mode=None), _report(1))
    assert [options["mode"] for options, *_ in calls(tmp_path, "init")] == [None, "offline"]
    assert len(calls(tmp_path, "log")) == 1
    (said,) = [record.message for record in caplog.records]
    assert "(RuntimeError: no network); this attempt is recorded offline, for `holdfast wandb-sync`" in said


def test_an_init_that_hangs_falls_back_to_offline_while_the_run_goes_on(tmp_path: Path, fake_wandb: Install) -> None:
    fake_wandb("""
        def on_init(mode):
            if mode != "offline":
                time.sleep(3600)
    """)
    tracker = _tracker(tmp_path, mode="online", init_timeout_s=0.3, start_grace_s=1.0)
    tracker.start({})
    for step in range(1, 9):
        tracker.log_step(_report(step))
    _wait_for(lambda: (tmp_path / "calls").exists() and len(calls(tmp_path, "log")) == 8)
    tracker.finish()


def test_a_run_that_is_over_before_init_gives_up_is_still_recorded_offline(tmp_path: Path, fake_wandb: Install) -> None:
    fake_wandb("""
        def on_init(mode):
            if mode != "offline":
                time.sleep(3600)
    """)
    tracker = _tracker(tmp_path, mode="online", init_timeout_s=90.0, finish_timeout_s=4.0)
    assert _run(tracker, _report(1), RunEnded("finished", 1, 1.0, 0, 0, 0)) < 4.0 + 3.0
    assert (len(calls(tmp_path, "log")), calls(tmp_path, "finish")) == (1, [[0]])


_HANGING = {
    "import": "time.sleep(3600)",
    "init": "def on_init(mode): time.sleep(3600)",
    "log": "def on_log(values): time.sleep(3600)",
    "finish": "def on_finish(): time.sleep(3600)",
}


@pytest.mark.parametrize("twist", _HANGING.values(), ids=_HANGING.keys())
def test_a_wandb_that_hangs_is_ended_in_time(
    twist: str, tmp_path: Path, fake_wandb: Install, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("holdfast.trainer.trackers.helper.FINISH_GRACE_S", 0.5)
    fake_wandb(twist)
    tracker = _tracker(tmp_path, finish_timeout_s=0.5)
    assert _run(tracker, _report(1)) < 5.0
    assert len(caplog.records) >= 1


def test_logging_takes_microseconds_though_wandb_hangs(
    tmp_path: Path, fake_wandb: Install, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb("def on_log(values): time.sleep(3600)")
    tracker = _tracker(tmp_path, capacity=500, finish_timeout_s=0.2)
    tracker.start({})
    took_s = []
    for step in range(1, 5001):
        report, began_s = _report(step), time.perf_counter()
        tracker.log_step(report)
        took_s.append(time.perf_counter() - began_s)
    # Far above what it takes (1 us), far below what any waiting would: the machine may be busy.
    assert statistics.median(took_s) < 100e-6
    tracker.finish()
    assert tracker.dropped > 0
    assert f"W&B lacks {tracker.dropped} records it was too slow for" in caplog.text


def test_a_record_that_is_refused_costs_that_record_and_one_warning(
    tmp_path: Path, fake_wandb: Install, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb("""
        def on_log(values):
            if values["train/step"] < 3:
                raise ValueError("what is this?")
    """)
    _run(_tracker(tmp_path), *(_report(step) for step in range(1, 5)))
    assert [values["train/step"] for (values,) in calls(tmp_path, "log")] == [3, 4]
    assert [r.message for r in caplog.records] == ["W&B refused a record, and maybe more: ValueError: what is this?"]


def test_a_wandb_that_dies_half_way_is_off_from_there_on(
    tmp_path: Path, fake_wandb: Install, caplog: pytest.LogCaptureFixture
) -> None:
    fake_wandb("def on_log(values): os.kill(os.getpid(), 9)")
    tracker = _tracker(tmp_path)
    tracker.start({})
    tracker.log_step(_report(1))
    _wait_for(lambda: tracker.log_step(_report(2)) or tracker._is_off)  # type: ignore[func-returns-value]
    tracker.finish()
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("W&B is off from here on: ")


def test_the_death_of_the_driver_ends_the_run_in_wandb_and_the_helper(tmp_path: Path, fake_wandb: Install) -> None:
    fake_wandb("")
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", _DRIVER, str(tmp_path), *sys.path], os.environ)
    os.waitpid(child, 0)
    _wait_for(lambda: (tmp_path / "calls").exists() and calls(tmp_path, "finish") == [[1]])
    helper = int((tmp_path / "helper").read_text())
    _wait_for(lambda: not _is_alive(helper))


_DRIVER = """
import os, sys, time
from pathlib import Path
folder, sys.path[:] = Path(sys.argv[1]), sys.argv[2:]
from holdfast.trainer.trackers import HelperTracker, WandbPlan
tracker = HelperTracker(WandbPlan("r", "p", str(folder), "offline", 10.0, 10.0), attempt=1)
tracker.start({})
while not (folder / "calls").exists():
    time.sleep(0.01)
(folder / "helper").write_text(str(tracker._helper.pid))
os.kill(os.getpid(), 9)
"""


def _is_alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def _wait_for(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


# -- the real one -----------------------------------------------------------------------------------------------------


def test_a_real_offline_run_without_a_network_holds_every_step_and_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "WANDB_BASE_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    tracker = _tracker(tmp_path, init_timeout_s=30.0)
    ended = RunEnded("stopped", 3, 1.0, 1, 1, 75)
    _run(tracker, _report(1), _report(2), _FAULT, _report(2, epoch=2), _DONE, _report(3), StopRequested("x"), ended)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")

    (file,) = (tmp_path / "wandb").glob("offline-run-*-run-1/run-run-1.wandb")
    written = list(records(file.read_bytes()))
    history = [
        {item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json) for item in r.history.item}
        for r in written
        if r.WhichOneof("record_type") == "history"
    ]
    losses = [(h["train/step"], h["train/loss"]) for h in history if "train/loss" in h]
    assert losses == [(1, 2.125), (2, 2.125), (2, 2.25), (3, 2.125)]
    assert {h["attempt"] for h in history} == {2}
    assert [r.metric.step_metric for r in written if r.metric.glob_name == "*"] == ["train/step"]
    assert [r.alert.title for r in written if r.alert.title] == ["fault 1", "recovered from fault 1"]
    assert [r.exit.exit_code for r in written if r.WhichOneof("record_type") == "exit"] == [75]
