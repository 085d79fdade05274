"""The flat list of options. ``python tests/unit/configs/test_options.py`` writes the golden file anew."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

import holdfast.configs
from holdfast.configs.options import GROUPS, did_you_mean, enum_of, kind_words, kinds
from holdfast.configs.plain import to_plain
from holdfast.configs.schema import RunConfig

GOLDEN = Path(__file__).parents[2] / "golden" / "options.txt"


def listing() -> str:
    """One line per option: key, type and default value."""
    defaults = dict(_flat(to_plain(RunConfig()), ""))
    return "".join(f"{key}: {_words(kind)} = {defaults[key]!r}\n" for key, kind in kinds().items())


def _flat(section: Mapping[str, object], prefix: str) -> Iterator[tuple[str, object]]:
    for name, value in section.items():
        if isinstance(value, Mapping) and prefix + name not in kinds():
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _words(kind: Any) -> str:
    if inspect.isclass(kind) and issubclass(kind, Enum):
        return "|".join(member.name for member in kind)
    return kind.__name__ if inspect.isclass(kind) else str(kind)


def test_options_change_only_together_with_the_golden_list() -> None:
    """A new, renamed or removed option, or a new default, is visible to users: it needs a line in the changelog."""
    assert listing().splitlines() == GOLDEN.read_text().splitlines()


def test_every_group_is_a_directory_of_options() -> None:
    root = Path(holdfast.configs.__file__).parent
    assert sorted(GROUPS) == sorted({path.parent.name for path in root.glob("*/*.yaml")})


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_steps", "trainer.max_steps"),
        ("max_step", "trainer.max_steps"),
        ("trainer.max_step", "trainer.max_steps"),
        ("optim.max_steps", "trainer.max_steps"),
        ("optt.lr", "optim.lr"),
        ("optimizer", "optim"),
        ("zero_stage", "parallel.zero_stage"),
        ("lr", "optim.lr"),
        ("experimnt", "experiment"),
        ("sead", "seed"),
        ("wibble", None),
    ],
)
def test_a_misspelled_key_finds_the_one_that_was_meant(wrong: str, right: str | None) -> None:
    assert did_you_mean(wrong) == right


@pytest.mark.parametrize("key", kinds())
def test_every_option_says_what_it_takes(key: str) -> None:
    words = kind_words(key)
    assert "section" not in words
    members = enum_of(key)
    assert members is None or all(member.name in words for member in members)


def test_a_section_says_that_it_is_one() -> None:
    assert kind_words("optim") == "a section: set the keys below it, for example optim.name=…"
    assert enum_of("optim") is None


if __name__ == "__main__":
    GOLDEN.write_text(listing())
