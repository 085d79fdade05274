"""TensorBoard: what its own reader finds in the event files is what the run did, repeated steps once."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.configs import validate
from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError
from holdfast.events import EpochStarted, Evaluated, Event, FaultDetected, RunEnded
from holdfast.trainer.config import TrackerConfig, TrackerName
from holdfast.trainer.trackers import HelperTracker, SeveralTrackers, TensorBoardPlan, build_tracker
from holdfast.types import StepReport

_FAULT = FaultDetected(1, (1,), 1, 4242, "killed by SIGKILL", "update", 4, 0.04)
_ENDED = RunEnded("finished", 6, 1.0, 1, 1, 0)


def _report(step: int, epoch: int) -> StepReport:
    return StepReport(step, epoch, epoch + step / 8, 3.0, 1e-3, 0.5, step * 64, 0.1, 0.0, 10, step - 1)


def _follow(directory: Path, *items: StepReport | Event, attempt: int = 1, finish_timeout_s: float = 30.0) -> None:
    tracker = HelperTracker(TensorBoardPlan(str(directory), 30.0, finish_timeout_s), attempt=attempt)
    tracker.start({})
    for item in items:
        tracker.log_step(item) if isinstance(item, StepReport) else tracker.emit(item)
    tracker.finish()


def test_steps_that_are_done_again_after_a_rollback_or_a_restart_replace_those_before(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = [_report(step, 1) for step in (1, 2, 3, 4)]
    again = [_report(step, 2) for step in (3, 4, 5)]
    _follow(tmp_path, EpochStarted(1, 3, -1), *first, _FAULT, EpochStarted(2, 3, 2), *again)
    last = [_report(step, 3) for step in (5, 6)]
    _follow(tmp_path, EpochStarted(3, 3, 4), *last, Evaluated(6, 2.31, 96), _ENDED, attempt=2)

    read = EventAccumulator(str(tmp_path))
    read.Reload()
    kept = {report.step: report.loss for report in (*first, *again, *last)}
    assert [(s.step, s.value) for s in read.Scalars("train/loss")] == sorted(kept.items())
    assert [(s.step, s.value) for s in read.Scalars("attempt")] == [(1, 1), (3, 1), (5, 2)]
    assert [s.value for s in read.Scalars("eval/bits_per_byte")] == [pytest.approx(2.31)]
    assert "alerts/text_summary" in read.Tags()["tensors"]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "tiny"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("a small file system needs the right to mount one")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_costs_event_files_and_nothing_else(tiny_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("tensorboard")
    (tiny_disk / "filler").write_bytes(bytes(8192))
    began_s = time.monotonic()
    _follow(tiny_disk / "tb", EpochStarted(1, 3, -1), *(_report(step, 1) for step in range(1, 400)))
    assert time.monotonic() - began_s < 40.0
    assert "TensorBoard" in caplog.text


def test_without_the_package_a_run_that_wants_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    find = validate.importlib.util.find_spec
    monkeypatch.setattr(
        validate.importlib.util, "find_spec", lambda name: (name != "tensorboard" and find(name)) or None
    )
    for name in (TrackerName.TENSORBOARD, TrackerName.BOTH):
        with pytest.raises(ConfigurationError, match=r"needs the package tensorboard.*holdfast\[tensorboard\]"):
            validate.refuse_bad(RunConfig(root="/tmp", tracker=TrackerConfig(name=name)))


def test_both_trackers_follow_the_same_run(tmp_path: Path) -> None:
    config = TrackerConfig(name=TrackerName.BOTH)
    both = build_tracker(config, run_id="r", project="p", directory=tmp_path, plain_config={}, attempt=1)
    assert isinstance(both, SeveralTrackers)
    titles = [tracker._plan.title for tracker in both._trackers if isinstance(tracker, HelperTracker)]
    assert titles == ["W&B", "TensorBoard"]
