"""Records of ``events.jsonl`` and ``metrics.jsonl`` as the objects they were written from.

A file may be damaged, edited, or written by another version: what does not fit becomes :class:`Unread`, or nothing.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any

from holdfast import events
from holdfast.events import Event
from holdfast.types import StepReport

__all__ = ["Unread", "event_of", "kinds", "report_of", "time_of"]

_BESIDE = frozenset({"time", "event"})


@dataclass(frozen=True, slots=True)
class Unread(Event):
    """An event of a kind that this version does not know, or without the fields that its kind has."""

    kind: str
    fields: Mapping[str, Any]


@cache
def kinds() -> Mapping[str, type[Event]]:
    """Every kind of event by the name it has in the file: ``fault_detected`` and so on."""
    named = (getattr(events, name) for name in events.__all__)
    every = [one for one in named if isinstance(one, type) and issubclass(one, Event) and one is not Event]
    return {events.kind_name(one): one for one in every}


def time_of(record: Mapping[str, Any]) -> float | None:
    """Seconds since 1970; None if the record does not say when it was written."""
    found = record.get("time")
    is_number = isinstance(found, (int, float)) and not isinstance(found, bool) and math.isfinite(found)
    return float(found) if is_number else None  # type: ignore[arg-type]  # the line above has looked


def event_of(record: Mapping[str, Any]) -> Event | None:
    """None for what is no event."""
    name = record.get("event")
    if not isinstance(name, str):
        return None
    kind = kinds().get(name)
    if kind is not None and (found := _made(kind, record)) is not None:
        return found
    return Unread(name, {key: value for key, value in record.items() if key not in _BESIDE})


def report_of(record: Mapping[str, Any]) -> StepReport | None:
    """None for what is no step, such as an evaluation. A loss that was not finite is NaN."""
    return _made(StepReport, record)


_Made = typing.TypeVar("_Made")


def _made(kind: type[_Made], record: Mapping[str, Any]) -> _Made | None:
    values = {}
    for name, (hint, is_optional) in _fields(kind).items():  # type: ignore[arg-type]  # classes are hashable
        if name not in record:
            if not is_optional:
                return None
            continue
        try:
            values[name] = _fitted(record[name], hint)
        except (TypeError, ValueError, OverflowError):
            return None
    return kind(**values)


@cache
def _fields(kind: type) -> Mapping[str, tuple[Any, bool]]:
    hints = typing.get_type_hints(kind)
    return {
        field.name: (hints[field.name], (field.default, field.default_factory) != (MISSING, MISSING))
        for field in fields(kind)
    }


def _fitted(value: Any, hint: Any) -> Any:
    """``value`` as the annotation wants it; JSON has no tuples and no NaN. Raises: TypeError, ValueError."""
    if type(value) is hint:  # nearly always, and files are long
        return value
    if hint is float:
        return math.nan if value is None else _number(value)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        inner = next(one for one in arguments if one is not types.NoneType)
        return None if value is None else _fitted(value, inner)
    if origin in (tuple, list) and isinstance(value, list):
        return origin(_fitted(one, arguments[0]) for one in value)
    if origin is dict and isinstance(value, dict):
        return {key: _fitted(one, arguments[1]) for key, one in value.items()}
    raise TypeError(f"{value!r} is no {hint}")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    return float(value)
