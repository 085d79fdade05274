"""Events line by line, yaml that every parser reads alike, and the ends of logs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest
import yaml  # type: ignore[import-untyped]  # comes with ray, wandb and hydra; only the tests read yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.configs.plain import to_plain
from holdfast.configs.schema import RunConfig
from holdfast.events import Evaluated, EventSink, FaultDetected, Waiting
from holdfast.launch.records import JsonlEvents, read_yaml, tail, to_yaml

# -- events -----------------------------------------------------------------------------------------------------------


def test_an_event_is_one_line_in_the_file_when_emit_returns(tmp_path: Path) -> None:
    sink: EventSink = JsonlEvents(tmp_path / "events", clock=lambda: 1.5)
    sink.emit(Waiting("two\nlines"))
    sink.emit(FaultDetected(1, (0, 1), None, 7, "x", "update", 3, 0.1))
    first, second = map(json.loads, (tmp_path / "events").read_text().splitlines())
    assert first == {"time": 1.5, "event": "waiting", "what": "two\nlines"}
    assert (second["event"], second["ranks"], second["node"]) == ("fault_detected", [0, 1], None)


def test_a_line_torn_by_the_death_of_the_last_driver_is_closed(tmp_path: Path) -> None:
    (tmp_path / "events").write_text('{"time": 1, "eve')
    JsonlEvents(tmp_path / "events").emit(Waiting("x"))
    torn, whole = (tmp_path / "events").read_text().splitlines()
    assert torn == '{"time": 1, "eve'
    assert json.loads(whole)["what"] == "x"


def test_a_number_that_json_does_not_have_is_null(tmp_path: Path) -> None:
    JsonlEvents(tmp_path / "events").emit(Evaluated(1, math.nan, 3))
    assert '"bits_per_byte": null' in (tmp_path / "events").read_text()


def test_a_file_that_cannot_be_written_is_logged_and_never_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sink = JsonlEvents(tmp_path / "gone" / "events")
    sink.emit(Waiting("x"))
    sink.emit(Waiting("y"))
    assert len(caplog.records) == 1


# -- logs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "lines", "kept"),
    [
        (b"", 3, ""),
        (b"a\nb\nc\n", 2, "b\nc\n"),
        (b"a\nb\nc", 2, "b\nc"),
        (b"a\n", 9, "a\n"),
        (b"\xff\n", 1, "\ufffd\n"),
    ],
)
def test_the_tail_of_a_log_is_its_last_lines(tmp_path: Path, content: bytes, lines: int, kept: str) -> None:
    (tmp_path / "log").write_bytes(content)
    assert tail(tmp_path / "log", lines) == kept


def test_the_tail_of_a_huge_log_comes_from_its_last_megabyte(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"x" * (3 << 20) + b"\nlast\n")
    assert tail(tmp_path / "log", 1) == "last\n"
    assert len(tail(tmp_path / "log", 2)) == 1 << 20


# -- yaml -------------------------------------------------------------------------------------------------------------


_KEYS = st.text(max_size=20) | st.sampled_from(["no", "On", "NULL", "y", "a: b", "1", "- x", "<<", "="])
_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(["no", "1e3", "0x1F", "2026-11-23", "~", "", "1_000", "12:30:00"])
)
_VALUES = st.recursive(_SCALARS, lambda v: st.lists(v) | st.dictionaries(_KEYS, v), max_leaves=12)


@settings(max_examples=50)
@given(st.dictionaries(_KEYS, _VALUES))
def test_yaml_reads_back_to_the_same_values(plain: dict[str, object]) -> None:
    text = to_yaml(plain)
    assert text.encode().decode() == text
    read = yaml.safe_load(text)
    assert read == plain
    assert json.dumps(read) == json.dumps(plain)  # tells 1 from 1.0 and from True


def test_the_configuration_of_a_run_reads_back_the_same() -> None:
    plain = to_plain(RunConfig())
    assert yaml.safe_load(to_yaml(plain)) == plain


def test_yaml_is_nested_and_has_bare_keys() -> None:
    assert to_yaml({"optim": {"lr": 1e-5, "betas": [0.9, 0.95]}, "project": "no", "empty": {}}) == (
        'optim:\n  lr: 1.0e-05\n  betas: [0.9, 0.95]\nproject: "no"\nempty: {}\n'
    )


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_yaml_has_numbers_that_json_lacks(value: float) -> None:
    read = yaml.safe_load(to_yaml({"x": value}))["x"]
    assert read == value or (math.isnan(read) and math.isnan(value))


_PLAIN_VALUES = _SCALARS.filter(lambda v: not isinstance(v, float) or math.isfinite(v))
_NAMES = st.text('ab_:# "\\\x1b\U0001f600', max_size=3) | st.just("no")
_SECTIONS = st.recursive(
    st.dictionaries(_NAMES, _PLAIN_VALUES | st.lists(_PLAIN_VALUES), max_size=4),
    lambda below: st.dictionaries(_NAMES, below, max_size=4),
    max_leaves=12,
)


def _dotted(plain: Mapping[str, object], above: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in plain.items():
        section = isinstance(value, Mapping) and bool(value)
        found |= _dotted(cast(Mapping[str, object], value), f"{above}{key}.") if section else {above + key: value}
    return found


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_SECTIONS)
def test_what_was_written_is_read_by_dotted_keys(tmp_path: Path, plain: dict[str, object]) -> None:
    (tmp_path / "x.yaml").write_text(to_yaml(plain), encoding="utf-8")
    assert json.dumps(read_yaml(tmp_path / "x.yaml")) == json.dumps(_dotted(plain))


def test_what_json_lacks_or_a_user_broke_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    assert read_yaml(path) == {}
    path.write_bytes(b'# mine\na: .inf\nb:\n  c: yes\n  d: "\\U0001F600 \\x41"\n  e: 2\n\xff\nf: "\\U0001f600"\n')
    assert read_yaml(path) == {"b.e": 2, "f": "\U0001f600"}


def test_every_option_of_a_run_is_read_again(tmp_path: Path) -> None:
    plain = to_plain(RunConfig())
    (tmp_path / "x.yaml").write_text(to_yaml(plain))
    assert read_yaml(tmp_path / "x.yaml") == _dotted(plain)
