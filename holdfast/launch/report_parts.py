"""What a report is made of, whatever it is written as: sections of facts, tables, figures and text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

__all__ = ["Block", "Facts", "Figure", "Folded", "Quote", "Said", "Section", "Table", "Tiles"]


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and what is known."""

    rows: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Tiles:
    """The few numbers to see first: name, value."""

    rows: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Table:
    """``numbers``: columns that are aligned to the right. ``keys``: one class of colour per row, or none."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()
    keys: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture; ``legend`` has the class and the meaning of what is in it. Left out where there are no pictures."""

    svg: str
    legend: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Said:
    """A paragraph of our own."""

    text: str


@dataclass(frozen=True, slots=True)
class Quote:
    """Foreign text of several lines."""

    text: str


@dataclass(frozen=True, slots=True)
class Folded:
    """Foreign text that is shown on demand."""

    title: str
    text: str


Block = Facts | Tiles | Table | Figure | Said | Quote | Folded


@dataclass(frozen=True, slots=True)
class Section:
    """A chapter, or with ``level`` 3 a part of the one before."""

    title: str
    blocks: Sequence[Block]
    level: int = 2
