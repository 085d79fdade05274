"""RunConfig <-> plain JSON values. Standard library only: workers read their configuration without Hydra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, cast, get_args, get_origin, get_type_hints

from holdfast.configs.schema import RunConfig
from holdfast.errors import ConfigurationError

__all__ = ["from_plain", "to_plain"]

_WRONG = object()
"""Stands for a value that could not be read; its problem has been noted."""


def to_plain(config: RunConfig) -> dict[str, object]:
    """JSON values that :func:`from_plain` reads back to an equal config; enums by member name."""
    return cast(dict[str, object], _plain(config))


def _plain(value: object) -> object:
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Mapping):
        return {name: _plain(below) for name, below in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def from_plain(data: Mapping[str, Any]) -> RunConfig:
    """The config that :func:`to_plain` wrote. Nothing is filled in: every key must be there, and no other.

    Raises: ConfigurationError naming every missing key, unknown key and wrong value.
    """
    problems: list[str] = []
    config = _read(RunConfig, data, "", problems)
    if problems:
        raise ConfigurationError(problems)
    return cast(RunConfig, config)


def _read(kind: Any, value: object, path: str, problems: list[str]) -> object:
    """``kind`` is an annotation of the schema: a dataclass, an enum, a list, a dict, or int, float, bool, str."""
    if is_dataclass(kind):
        return _read_section(cast(type[Any], kind), value, path, problems)
    if get_origin(kind) is list:
        return _read_list(get_args(kind)[0], value, path, problems)
    if get_origin(kind) is dict:
        return _read_names(value, path, problems)
    if issubclass(kind, Enum):
        return _read_member(kind, value, path, problems)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:  # exact: True is no int here
        return value
    return _wrong(problems, f"{path}={value!r} must be of type {kind.__name__}")


def _read_section(kind: type[Any], value: object, path: str, problems: list[str]) -> object:
    if not isinstance(value, Mapping):
        return _wrong(problems, f"{path or 'the configuration'}={value!r} must be a mapping")
    prefix, types = f"{path}." if path else "", get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    problems += [f"{prefix}{name} is missing" for name in names if name not in value]
    problems += [f"{prefix}{name} is unknown" for name in value if name not in names]
    read = {n: _read(types[n], value[n], prefix + n, problems) for n in names if n in value}
    return _WRONG if problems else kind(**read)


def _read_list(kind: Any, value: object, path: str, problems: list[str]) -> object:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return _wrong(problems, f"{path}={value!r} must be a list")
    return [_read(kind, v, f"{path}[{i}]", problems) for i, v in enumerate(value)]


def _read_names(value: object, path: str, problems: list[str]) -> object:
    """Names that the schema does not know, each with a single value."""
    if not isinstance(value, Mapping):
        return _wrong(problems, f"{path}={value!r} must be a mapping")
    for name, below in value.items():
        if not isinstance(name, str) or not (below is None or isinstance(below, (bool, int, float, str))):
            _wrong(problems, f"{path}.{name}={below!r} must be a name and a number, text, true, false or null")
    return dict(value)


def _read_member(kind: type[Enum], value: object, path: str, problems: list[str]) -> object:
    if isinstance(value, str) and value in kind.__members__:
        return kind[value]
    return _wrong(problems, f"{path}={value!r} must be one of {', '.join(kind.__members__)}")


def _wrong(problems: list[str], problem: str) -> object:
    problems.append(problem)
    return _WRONG
