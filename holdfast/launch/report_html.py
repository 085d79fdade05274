"""A report as one HTML file: no address in it, no script, readable in light and dark and on paper. Pure.

Every word that comes from outside passes :func:`_text` or :func:`_lines` and stays text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import singledispatch
from html import escape

from holdfast.launch.report_parts import Block, Facts, Figure, Folded, Quote, Said, Section, Table, Tiles
from holdfast.launch.report_style import STYLE
from holdfast.launch.wording import clean

__all__ = ["as_html"]

# The page is allowed nothing but its own style, whatever a hole in the escaping would let in.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def as_html(title: str, sections: Sequence[Section]) -> str:
    """The whole document."""
    body = "".join(_section(section) for section in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{_text(title)}</h1>\n{body}</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    heading = f"<h{section.level}>{_text(section.title)}</h{section.level}>\n" if section.title else ""
    return f'<section class="level{section.level}">\n{heading}{blocks}\n</section>\n'


@singledispatch
def _block(block: Block) -> str:
    raise TypeError(f"{type(block).__name__} is no part of a report")


@_block.register
def _(block: Facts) -> str:
    return f'<dl class="facts">{_pairs(block.rows)}</dl>'


@_block.register
def _(block: Tiles) -> str:
    tiles = "".join(f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in block.rows.items())
    return f'<dl class="tiles">{tiles}</dl>'


def _pairs(rows: Mapping[str, str]) -> str:
    return "".join(f"<dt>{_text(name)}</dt><dd>{_lines(value)}</dd>" for name, value in rows.items())


@_block.register
def _(block: Table) -> str:
    head = "".join(f"<th{_align(i, block)}>{_text(cell)}</th>" for i, cell in enumerate(block.head))
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(_rows(block))}</tbody></table></div>'
    )


def _rows(block: Table) -> Iterator[str]:
    keys = block.keys or [""] * len(block.rows)
    for key, row in zip(keys, block.rows, strict=True):
        swatch = f'<i class="swatch {key}"></i>' if key else ""
        cells = (f"<td{_align(i, block)}>{swatch if i == 0 else ''}{_lines(cell)}</td>" for i, cell in enumerate(row))
        yield f"<tr>{''.join(cells)}</tr>"


def _align(column: int, block: Table) -> str:
    return ' class="number"' if column in block.numbers else ""


@_block.register
def _(block: Figure) -> str:
    keys = "".join(f'<span><i class="swatch {kind}"></i>{_text(name)}</span>' for kind, name in block.legend.items())
    legend = f"<figcaption>{keys}</figcaption>" if keys else ""
    return f'<figure><div class="wide">{block.svg}</div>{legend}</figure>'


@_block.register
def _(block: Said) -> str:
    return f"<p>{_text(block.text)}</p>"


@_block.register
def _(block: Quote) -> str:
    return f"<pre>{_lines(block.text)}</pre>"


@_block.register
def _(block: Folded) -> str:
    return f"<details><summary>{_text(block.title)}</summary><pre>{_lines(block.text)}</pre></details>"


def _text(text: str) -> str:
    return escape(clean(text))


def _lines(text: str) -> str:
    return "\n".join(map(_text, text.expandtabs(4).splitlines()))
