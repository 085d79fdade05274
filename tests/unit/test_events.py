"""Events as records: names, fields, JSON."""

from __future__ import annotations

import inspect
import json
from dataclasses import FrozenInstanceError, fields

import pytest

from holdfast import events
from holdfast.events import Event, FaultDetected, MemoryEvents, RunStarted, StopRequested, Waiting, kind_of, to_record


def _kinds() -> list[type[Event]]:
    return [k for k in vars(events).values() if inspect.isclass(k) and issubclass(k, Event) and k is not Event]


def _example(kind: type[Event]) -> Event:
    """Any values: the record does not look at them."""
    return kind(**{field.name: f"<{field.name}>" for field in fields(kind)})


def test_every_event_is_public() -> None:
    assert {kind.__name__ for kind in _kinds()} < set(events.__all__)
    assert all(hasattr(events, name) for name in events.__all__)


def test_kinds_are_words_with_underscores() -> None:
    assert kind_of(FaultDetected((), (), None, None, "", "", 0, 0.0)) == "fault_detected"  # type: ignore[arg-type]
    assert kind_of(Waiting("for a node")) == "waiting"
    assert kind_of(Event()) == "event"


@pytest.mark.parametrize("kind", _kinds(), ids=lambda kind: kind.__name__)
def test_a_record_is_time_kind_and_every_field_under_its_own_name(kind: type[Event]) -> None:
    record = to_record(_example(kind), time_s=12.5)
    names = [field.name for field in fields(kind)]
    assert list(record) == ["time", "event", *names]  # a field named time or event would be missing here
    assert record["time"] == 12.5
    assert record["event"] == kind_of(_example(kind))
    assert all(record[name] == f"<{name}>" for name in names)


def test_no_two_kinds_share_a_word() -> None:
    words = [kind_of(_example(kind)) for kind in _kinds()]
    assert len(set(words)) == len(words) > 10


def test_a_record_is_one_json_line() -> None:
    event = FaultDetected(1, (0, 2), None, 4711, "killed\nby SIGKILL", "VOTE", 12, 0.25)
    line = json.dumps(to_record(event, time_s=1.0))
    assert "\n" not in line
    assert json.loads(line)["ranks"] == [0, 2]
    assert json.loads(line)["node"] is None


@pytest.mark.parametrize("kind", _kinds(), ids=lambda kind: kind.__name__)
def test_what_has_happened_cannot_be_changed(kind: type[Event]) -> None:
    event = _example(kind)
    with pytest.raises(FrozenInstanceError):
        setattr(event, fields(kind)[0].name, "another")


def test_a_sink_in_memory_keeps_order_and_finds_kinds() -> None:
    sink, happened = MemoryEvents(), [RunStarted("r", 1, 3, "fresh"), StopRequested("SIGTERM"), Waiting("a node")]
    for event in happened:
        sink.emit(event)
    assert sink.events == happened
    assert sink.of(StopRequested) == [StopRequested("SIGTERM")]
    assert sink.of(Event) == happened
