"""A report as Markdown, without its pictures. Pure. Foreign words cannot become markup, HTML included."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import singledispatch

from holdfast.launch.report_parts import Block, Facts, Figure, Folded, Quote, Said, Section, Table, Tiles
from holdfast.launch.wording import clean

__all__ = ["as_markdown"]

_MARKUP = re.compile(r"([\\`*_{}\[\]#|~!])")


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """The whole document."""
    parts = [f"# {_text(title)}", *(part for section in sections for part in _section(section))]
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> Iterator[str]:
    blocks = [text for text in map(_block, section.blocks) if text]
    if section.title and blocks:  # a section of nothing but pictures is left out
        yield f"{'#' * section.level} {_text(section.title)}"
    yield from blocks


@singledispatch
def _block(block: Block) -> str:
    raise TypeError(f"{type(block).__name__} is no part of a report")


@_block.register(Facts)
@_block.register(Tiles)
def _(block: Facts | Tiles) -> str:
    return _pairs(block.rows)


def _pairs(rows: Mapping[str, str]) -> str:
    return "\n".join(
        f"- **{_text(name)}**: {'; '.join(map(_text, value.splitlines()))}" for name, value in rows.items()
    )


@_block.register
def _(block: Table) -> str:
    ruler = ["---:" if column in block.numbers else "---" for column in range(len(block.head))]
    rows = [[_cell(cell) for cell in row] for row in (block.head, *block.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ruler, *rows[1:]])


def _cell(text: str) -> str:
    return "<br>".join(map(_text, text.splitlines()))


@_block.register
def _(block: Figure) -> str:
    return ""


@_block.register
def _(block: Said) -> str:
    return _text(block.text)


@_block.register
def _(block: Quote) -> str:
    return _fenced(block.text)


@_block.register
def _(block: Folded) -> str:
    return f"{_text(block.title)}:\n\n{_fenced(block.text)}"


def _fenced(text: str) -> str:
    """Behind a fence that is longer than any inside."""
    inside = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, inside + 1)
    return "\n".join([fence, *(clean(line) for line in text.expandtabs(4).splitlines()), fence])


def _text(text: str) -> str:
    escaped = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\1", escaped)
