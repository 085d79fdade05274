"""``holdfast wandb-sync``: W&B gets one run of all attempts, equal to the files, and nothing twice."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from holdfast.configs.plain import to_plain
from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.events import (
    EpochStarted,
    Evaluated,
    Event,
    FaultDetected,
    RecoveryDone,
    RunEnded,
    RunStarted,
    StopRequested,
)
from holdfast.fault_tolerance.config import ChaosConfig
from holdfast.launch.cli import main
from holdfast.launch.records import JsonlEvents
from holdfast.launch.replay import happened
from holdfast.launch.run_dir import RunDir
from holdfast.launch.wandb_sync_command import wandb_sync
from holdfast.trainer.config import TrackerConfig
from holdfast.trainer.metrics import MetricsFile
from holdfast.types import StepReport
from tests.support.fake_wandb import Install, calls, install, records

_ID = "run-1"


class _Written:
    """A run on disk, written by what writes runs, with a clock that ticks at every line."""

    def __init__(self, root: Path) -> None:
        config = RunConfig(chaos=ChaosConfig(faults=["sigkill rank=1 step=3"]), tracker=TrackerConfig(entity="us"))
        self.run = RunDir.create(str(root), "project", _ID, config_digest="d")
        self._config, self._now_s = to_plain(config), 1000.0
        self._events = JsonlEvents(self.run.events_file, self._tick)

    def _tick(self) -> float:
        self._now_s += 1.0
        return self._now_s

    def attempt(self, *items: StepReport | Event) -> None:
        number = self.run.begin_attempt(config=self._config, overrides=["experiment=main_job"], command=[])
        metrics = MetricsFile(self.run.metrics_file, attempt=number, clock=self._tick)
        self._events.emit(RunStarted(_ID, number, 3, ""))
        for item in items:
            metrics.write(item) if isinstance(item, StepReport) else self._events.emit(item)

    @property
    def steps(self) -> list[dict[str, Any]]:
        lines = map(json.loads, self.run.metrics_file.read_text().splitlines())
        return [record for record in lines if "loss" in record]


def _report(step: int, epoch: int) -> StepReport:
    return StepReport(step, epoch, epoch + step / 8, 3.0, 1e-3, 0.5, step * 64, 0.5, 0.0, 10, step - 1)


_FIRST: list[StepReport | Event] = [
    EpochStarted(1, 3, -1),
    *(_report(step, 1) for step in (1, 2, 3)),
    FaultDetected(1, (1,), 1, 4242, "killed by SIGKILL", "update", 3, 0.04),
    _report(3, 2),
    RecoveryDone(1, 2, 3, 1.25, 1, 0, 1, 10, {}),
    StopRequested("SIGTERM received"),
    RunEnded("stopped", 3, 1.0, 1, 1, 75),
]
_SECOND: list[StepReport | Event] = [_report(4, 1), Evaluated(4, 2.31, 96), RunEnded("finished", 4, 1.0, 0, 0, 0)]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> _Written:
    for name in ("WANDB_API_KEY", "HOLDFAST_HOME", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    return _Written(tmp_path / "runs")


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    return partial(install, tmp_path, monkeypatch)


# -- what was written is read back ------------------------------------------------------------------------------------


def test_events_and_steps_come_back_in_order_without_what_is_torn_or_unknown(written: _Written) -> None:
    written.attempt(*_FIRST)
    with written.run.events_file.open("a") as file:
        file.write('{"time": 1.0, "event": "of_a_later_version"}\nno json\n{"time": 1.0, "event": "stop_requ')
    found = list(happened(metrics=written.run.metrics_file, events=written.run.events_file))
    assert [h.item for h in found if isinstance(h.item, StepReport)] == [_report(s, e) for s, e in _STEPS]
    assert [h.time_s for h in found] == sorted(h.time_s for h in found)
    assert [type(h.item) for h in found if not isinstance(h.item, StepReport)] == [
        RunStarted,
        *(type(item) for item in _FIRST if not isinstance(item, StepReport)),
    ]


_STEPS = [(1, 1), (2, 1), (3, 1), (3, 2)]


# -- what W&B is told -------------------------------------------------------------------------------------------------


def _replay(written: _Written, *words: str) -> int:
    return wandb_sync([str(written.run.path), *words])


def _told(written: _Written) -> Path:
    """Where the made-up module notes what it was told."""
    return written.run.path / "wandb" / "replay"


def test_a_replay_online_sends_each_step_once_however_often_it_is_said(
    written: _Written, fake_wandb: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_wandb("")
    written.attempt(*_FIRST)
    assert _replay(written, "--mode", "online") == 0
    assert "sent 4 steps and 6 events of 1 attempt to project/run-1" in capsys.readouterr().out
    assert _replay(written, "--mode", "online") == 0
    assert "nothing new" in capsys.readouterr().out
    written.attempt(*_SECOND)
    assert _replay(written, "--mode", "online") == 0
    assert "sent 1 steps and 3 events of 1 attempt" in capsys.readouterr().out

    options = [options for options, *_ in calls(_told(written), "init")]
    assert [(o["id"], o["mode"], o["resume"], o["job_type"], o["group"], o["entity"]) for o in options] == [
        (_ID, "online", "allow", "chaos", "main_job", "us")
    ] * 2
    assert options[0]["config"]["optim"]["lr"] == RunConfig().optim.lr
    logged = [values for (values,) in calls(_told(written), "log") if "train/loss" in values]
    assert [(v["train/step"], v["train/loss"], v["attempt"], v["wall_time"]) for v in logged] == [
        (s["step"], s["loss"], s["attempt"], s["time"]) for s in written.steps
    ]
    assert [title for title, *_ in calls(_told(written), "alert")] == ["fault 1", "recovered from fault 1"]
    assert calls(_told(written), "finish") == [[75], [0]]
    assert calls(_told(written), "preempting") == []


def test_what_wandb_does_not_finish_is_sent_again(
    written: _Written, fake_wandb: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_wandb("""
        def on_finish():
            if not Path(__file__).with_name("failed").exists():
                Path(__file__).with_name("failed").touch()
                raise RuntimeError("not uploaded in time")
    """)
    written.attempt(*_FIRST)
    assert _replay(written, "--mode", "online") == 1
    assert "could not finish" in capsys.readouterr().err
    assert _replay(written, "--mode", "online") == 0
    assert "sent 4 steps" in capsys.readouterr().out


def test_a_wandb_that_does_not_start_is_an_error_and_no_traceback(
    written: _Written, fake_wandb: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_wandb("def on_init(mode): raise RuntimeError('no network')")
    written.attempt(*_FIRST)
    assert _replay(written, "--mode", "online") == 1
    assert capsys.readouterr().err == "error: W&B could not be started: RuntimeError: no network\n"


def test_what_wandb_has_seen_live_is_not_sent_under_the_same_name(written: _Written, fake_wandb: Install) -> None:
    fake_wandb("")
    written.attempt(*_FIRST)
    (written.run.path / "wandb" / f"run-20261129_000000-{_ID}").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match=r"would show its steps twice; --id run-1-replay"):
        _replay(written)
    assert _replay(written, "--id", "run-1-replay", "--mode", "online") == 0
    assert calls(_told(written), "init")[0][0]["id"] == "run-1-replay"


@pytest.mark.parametrize(("words", "says"), [(["--timeout", "0"], "--timeout=0"), (["--mode", "loud"], "--mode")])
def test_bad_words_are_refused(written: _Written, words: list[str], says: str, capsys: Any) -> None:
    written.attempt(*_FIRST)
    assert main(["wandb-sync", str(written.run.path), *words]) == 2
    assert says in capsys.readouterr().err


# -- the real one -----------------------------------------------------------------------------------------------------


def test_an_offline_replay_is_one_file_with_every_step_of_every_attempt(
    written: _Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    written.attempt(*_FIRST)
    assert _replay(written) == 0
    written.attempt(*_SECOND)
    assert _replay(written) == 0
    assert f"wandb sync {_told(written) / 'wandb'}" in capsys.readouterr().out
    (file,) = (_told(written) / "wandb").glob(f"offline-run-*-{_ID}/run-{_ID}.wandb")
    found = list(records(file.read_bytes()))
    history = [
        {item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json) for item in r.history.item}
        for r in found
        if r.WhichOneof("record_type") == "history"
    ]
    steps = [h for h in history if "train/loss" in h]
    wanted = [(s["step"], s["loss"], s["attempt"], s["time"]) for s in written.steps]
    assert [(h["train/step"], h["train/loss"], h["attempt"], h["_timestamp"]) for h in steps] == wanted
    assert [r.exit.exit_code for r in found if r.WhichOneof("record_type") == "exit"] == [0]
    summary = {u.key: json.loads(u.value_json) for r in found for u in r.summary.update if u.key}
    assert (summary["run_dir"], summary["bits_per_byte"], summary["exit_code"]) == (str(written.run.path), 2.31, 0)
    assert 0 < summary["goodput"] < 1
