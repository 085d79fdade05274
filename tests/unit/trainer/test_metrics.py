"""``metrics.jsonl``: whole lines of valid JSON, whatever the disk and the numbers do."""

from __future__ import annotations

import errno
import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.trainer.jsonl import JsonLines, _encode
from holdfast.trainer.metrics import MetricsFile
from holdfast.types import StepReport

_REPORT = StepReport(
    step=7,
    epoch=2,
    loss=1.25,
    bits_per_byte=2.5,
    learning_rate=3e-4,
    grad_norm=0.83,
    tokens=1 << 40,
    step_s=0.2,
    stall_s=0.001,
    copy_bytes=12_000_000,
    committed=6,
)


def _read(path: Path) -> list[Any]:
    """Strictly: a constant that JSON does not have is an error."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# -- steps ------------------------------------------------------------------------------------------------------------


def test_a_line_holds_every_field_of_the_report_the_time_and_the_attempt(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "m", attempt=3, clock=lambda: 1.5).write(_REPORT)
    assert _read(tmp_path / "m") == [{"time": 1.5, "attempt": 3, **asdict(_REPORT)}]


def test_a_step_is_in_the_file_when_write_returns_and_later_attempts_add_to_it(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "m").write(_REPORT)
    assert [r["step"] for r in _read(tmp_path / "m")] == [7]
    MetricsFile(tmp_path / "m", attempt=2).write(replace(_REPORT, step=8))
    assert [(r["attempt"], r["step"]) for r in _read(tmp_path / "m")] == [(1, 7), (2, 8)]


def test_an_evaluation_is_a_line_of_its_own(tmp_path: Path) -> None:
    MetricsFile(tmp_path / "m", clock=lambda: 1.5).note({"step": 7, "eval_bits_per_byte": 2.31})
    assert _read(tmp_path / "m") == [{"time": 1.5, "attempt": 1, "step": 7, "eval_bits_per_byte": 2.31}]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_json_does_not_have_is_null(tmp_path: Path, loss: float) -> None:
    MetricsFile(tmp_path / "m").write(replace(_REPORT, loss=loss))
    (record,) = _read(tmp_path / "m")
    assert record["loss"] is None
    assert record["grad_norm"] == 0.83


# -- the mechanism ----------------------------------------------------------------------------------------------------


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def _without_strange_numbers(value: object) -> object:
    if isinstance(value, dict):
        return {k: _without_strange_numbers(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_without_strange_numbers(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@settings(max_examples=50)
@given(st.dictionaries(st.text(), _JSON))
def test_any_record_is_one_line_that_reads_back_the_same(record: dict[str, object]) -> None:
    line = _encode(record)
    assert line.count(b"\n") == 1
    assert json.loads(line) == _without_strange_numbers(record)


def test_a_line_torn_by_a_kill_is_closed_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_text('{"a": 1}\n{"b"')
    lines = JsonLines(path)
    lines.append({"c": 3})
    lines.append({"d": 4})
    assert path.read_text().splitlines() == ['{"a": 1}', '{"b"', '{"c": 3}', '{"d": 4}']


def test_what_a_full_disk_has_taken_of_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, write = JsonLines(tmp_path / "m"), os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:4]))
        lines.append({"lost": 1})
    lines.append({"kept": 2})
    assert (tmp_path / "m").read_text() == '{"kept": 2}\n'


def test_a_full_disk_is_logged_once_and_never_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    lines = JsonLines(tmp_path / "m")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        lines.append({"lost": 1})
        lines.append({"lost": 2})
    lines.append({"kept": 3})
    assert _read(tmp_path / "m") == [{"kept": 3}]
    (said,) = [record.message for record in caplog.records]
    assert said == f"lines are missing from {tmp_path / 'm'}: [Errno 28] No space left on device"


def test_a_directory_that_is_gone_is_no_reason_to_raise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    MetricsFile(tmp_path / "gone" / "m").write(_REPORT)
    assert "lines are missing" in caplog.text
