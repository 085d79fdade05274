"""Parts of a run's configuration, read back from its config.yaml, whichever version wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from typing import Any, TypeVar, get_origin, get_type_hints

from holdfast.errors import ConfigurationError

__all__ = ["section"]

T = TypeVar("T")


def section(values: Mapping[str, object], name: str, kind: type[T]) -> T:
    """The dataclass ``kind`` of what :func:`holdfast.launch.records.read_yaml` has found below ``name``.

    Keys that an older version did not know have their defaults. Raises: ConfigurationError for a member that no
    enumeration of this version has.
    """
    types = get_type_hints(kind)
    found: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]  # a dataclass
        key, hint = f"{name}.{field.name}", types[field.name]
        if get_origin(hint) is dict:
            found[field.name] = _below(values, key)
        elif key in values:
            found[field.name] = _member(hint, values[key], key)
    return kind(**found)


def _below(values: Mapping[str, object], key: str) -> dict[str, object]:
    prefix = f"{key}."
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def _member(hint: Any, value: object, key: str) -> object:
    if not (isinstance(hint, type) and issubclass(hint, Enum)):
        return value
    if str(value) not in hint.__members__:
        raise ConfigurationError(f"{key}={value!r} in the run's config.yaml is unknown to this version of Holdfast")
    return hint[str(value)]
