"""Files of a run as the objects they were written from, whatever has happened to them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from holdfast import events as e
from holdfast.launch.read_back import Unread, event_of, kinds, report_of, time_of
from holdfast.launch.read_lines import NewLines, records
from tests.support.told import story

_EVERY = [
    e.RunStarted("r", 1, 3, "fresh"),
    e.Waiting("for a worker"),
    e.EpochStarted(1, 3, -1),
    e.WorldChanged(2, 3, 2, "node 1 is gone"),
    e.FaultDetected(1, (0, 2), None, None, "killed", "", 4, 0.5),
    e.FaultInjected("sigkill", "worker", 1, 3, "step.begin", "chaos"),
    e.RecoveryPlanned(1, "parity", 4, "complete", ("one", "two"), True),
    e.RecoveryDone(1, 2, 5, 1.5, 0, 10, 1, 10, {"detect": 0.5}),
    e.Protection("full", "all"),
    e.CheckpointWritten(4, "step-4", 100, 0.5),
    e.CheckpointRejected("step-4", "torn"),
    e.Evaluated(4, 2.0, 6),
    e.StepLeftOut(4, "NaN", 3),
    e.SnapshotFailed(1, 4, "disk"),
    e.ProtectionFailed(1, "link"),
    e.SnapshotCost(4, 0.1, 0.01, 0.2, None),
    e.StageRebuilt(1, 4, "checkfree", [0, 2], 0.5, 100),
    e.StageHealed(1, 4, 10, 0.5, None, "too few"),
    e.StagesMeasured(4, {"0": 0.25}),
    e.RankLate(1, "vote", 40, 12.5),
    e.PreemptionNoticed(1, "10.0.0.7", None, "spot"),
    e.BricksHeld(2, 100, {"0": 60}, 100, 40, 20, {"0": 10}),
    e.BricksRestored(1, {"/base": "ab"}, 100, "gone"),
    e.Generated(4, "text"),
    e.StopRequested("SIGTERM"),
    e.RunEnded("finished", 4, 10.0, 1, 0, 0),
]


def test_every_event_comes_back_as_it_was_written() -> None:
    assert set(kinds().values()) == {type(event) for event in _EVERY}
    for event in _EVERY:
        assert event_of(json.loads(json.dumps(e.to_record(event, time_s=1.0)))) == event


@pytest.mark.parametrize(
    "record",
    [
        {"event": "run_paused", "step": 3},
        {"event": "waiting"},
        {"event": "waiting", "what": 3},
        {"event": "epoch_started", "epoch": True, "world": 1, "version": 0},
        {"event": "fault_detected", "number": 1, "ranks": "all", "cause": "x"},
        {"event": "recovery_done", "split_s": {"detect": "long"}},
    ],
)
def test_an_event_that_does_not_fit_is_kept_as_it_is(record: dict[str, object]) -> None:
    found = event_of({"time": 1.0, **record})
    assert found == Unread(str(record["event"]), {k: v for k, v in record.items() if k != "event"})


def test_what_is_no_event_and_no_step_is_nothing() -> None:
    assert event_of({"time": 1.0, "step": 3}) is None
    assert event_of({"event": ["waiting"]}) is None
    assert report_of({"step": 3, "validation_bits_per_byte": 2.0}) is None
    assert [time_of({"time": t}) for t in (1, 2.5, True, "3", None, math.inf)] == [1.0, 2.5, None, None, None, None]


def test_a_loss_that_was_not_finite_is_a_number_again(tmp_path: Path) -> None:
    record = dict(next(records(story(tmp_path).dir.metrics_file)))
    found = report_of({**record, "loss": None, "grad_norm": 2})
    assert found is not None and math.isnan(found.loss) and found.grad_norm == 2.0


def test_a_file_that_grows_is_read_line_by_line_and_once(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    lines = NewLines(path)
    assert list(lines.read()) == []
    path.write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
    assert list(lines.read()) == [{"a": 1}, {"a": 2}]
    assert list(lines.read()) == []
    with path.open("ab") as file:
        file.write(b': 3}\n{"a": 4')
    assert list(lines.read()) == [{"a": 3}]
    with path.open("ab") as file:  # a kill has torn the line; the next writer closes it
        file.write(b'\n{"a": 5}\n[6]\n\xff\x00\n' + b"[" * 100_000 + b'\n{"a": 7}\n')
    assert list(lines.read()) == [{"a": 5}, {"a": 7}]
    path.write_bytes(b'{"a": 8}\n')  # another file
    assert list(lines.read()) == [{"a": 8}]


def test_reading_may_begin_near_the_end_at_a_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"".join(b'{"a": %d}\n' % n for n in range(10, 20)))
    assert [line["a"] for line in NewLines(path, newest_bytes=25).read()] == [18, 19]
    assert [line["a"] for line in NewLines(path, newest_bytes=10_000).read()] == list(range(10, 20))
    assert list(NewLines(tmp_path / "none", newest_bytes=5).read()) == []


def test_a_last_line_without_its_end_counts_where_nobody_writes_any_more(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b'{"a": 1}\n{"a": 2}')
    assert list(records(path)) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'{"a": 1}\n{"a": 2')
    assert list(records(path)) == [{"a": 1}]
