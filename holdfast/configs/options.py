"""The flat list of options: what ``key=value`` may name, and what kind of value each key takes."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, cast, get_origin, get_type_hints

from holdfast.configs.schema import RunConfig

__all__ = ["GROUPS", "did_you_mean", "enum_of", "kind_words", "kinds", "takes_names"]

GROUPS = ("model", "data", "optim", "parallel", "snapshot", "recovery", "launch", "tracker", "chaos", "experiment")
"""Directories of ready-made options, chosen by ``group=option``."""

_WORDS: dict[object, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list[int]: "a list of whole numbers, for example [2,2,3]",
    list[float]: "a list of numbers, for example [0.9,0.95]",
    list[str]: 'a list of texts, for example ["one","two"]',
    dict[str, Any]: "names with values, for example {nesterov: true}",
}


@cache
def kinds() -> dict[str, Any]:
    """Dotted key -> annotated type, in the order of the schema. The types are opaque: ``int``, ``list[float]``, …"""
    return dict(_leaves(RunConfig, ""))


def _leaves(part: type[Any], prefix: str) -> Iterator[tuple[str, Any]]:
    types = get_type_hints(part)
    for field in fields(part):
        kind = types[field.name]
        if is_dataclass(kind):
            yield from _leaves(cast(type[Any], kind), f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, kind


def enum_of(key: str) -> type[Enum] | None:
    """The enum that ``key`` takes a member of, if it takes one."""
    kind = kinds().get(key)
    return kind if isinstance(kind, type) and issubclass(kind, Enum) else None


def takes_names(key: str) -> bool:
    """Whether ``key`` takes names that the schema does not know, as ``optim.options`` does, or is such a name."""
    return any(get_origin(kinds().get(k)) is dict for k in (key, key.rpartition(".")[0]))


def kind_words(key: str) -> str:
    """What ``key`` takes, for an error message; a section takes ``key.name=value``."""
    members = enum_of(key)
    if members is not None:
        return "one of " + ", ".join(member.name for member in members)
    return _WORDS.get(kinds().get(key), f"a section: set the keys below it, for example {_first_below(key)}=…")


def _first_below(section: str) -> str:
    return next((key for key in kinds() if key.startswith(f"{section}.")), section)


def did_you_mean(key: str) -> str | None:
    """The option or group that ``key`` was probably meant to be; None when nothing is close.

    ``max_steps`` finds ``trainer.max_steps``: the right last word in the wrong section wins over similar letters.
    """
    known = [*kinds(), *GROUPS, *dict.fromkeys(k.partition(".")[0] for k in kinds() if "." in k)]
    last = key.rpartition(".")[2]
    same_last = [k for k in known if k.rpartition(".")[2] == last]
    near = difflib.get_close_matches(key, same_last or known, n=1, cutoff=0.0 if same_last else 0.6)
    return near[0] if near else _near_last_word(last, known)


def _near_last_word(last: str, known: list[str]) -> str | None:
    by_last = {k.rpartition(".")[2]: k for k in reversed(known)}
    near = difflib.get_close_matches(last, by_last, n=1, cutoff=0.75)
    return by_last[near[0]] if near else None
