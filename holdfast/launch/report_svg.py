"""Charts as inline SVG: lines over bands and marks, one stacked bar, rows along a time axis. Pure.

Nothing here has a colour: every shape has a class, and the page's style sheet gives it one in light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby

from holdfast.launch.wording import clean

__all__ = ["Axis", "Band", "Chart", "Line", "Mark", "Row", "draw", "stacked_bar", "timeline"]

_WIDTH, _LEFT, _RIGHT = 960, 64, 12
_TOP, _BOTTOM = 30, 40
_POINTS = 1200
"""Of a line, at most: more than a screen can show makes a large file and no better picture."""

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Line:
    """Points from left to right; a NaN leaves a gap. ``kind`` becomes the class."""

    kind: str
    points: Sequence[Point]
    is_steps: bool = False
    """Keeps each value until the next one."""
    is_dots: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened at one place of the x axis; ``label`` stands above it, ``title`` is shown on hovering."""

    at: float
    kind: str
    title: str
    label: str = ""


@dataclass(frozen=True, slots=True)
class Band:
    """From one place of the x axis to another."""

    start: float
    stop: float
    kind: str
    title: str
    label: str = ""
    """Stands inside, where there is room."""


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows; its range comes from the data, widened to ``include``."""

    title: str
    include: Sequence[float] = ()
    is_duration: bool = False
    """Seconds, written as minutes or hours where that is shorter."""


@dataclass(frozen=True, slots=True)
class Chart:
    """Everything in one chart. ``about`` says in words what it shows, for those who cannot see it."""

    about: str
    x: Axis
    y: Axis
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    bands: Sequence[Band] = ()
    height: int = 280


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a timeline."""

    name: str
    bands: Sequence[Band] = field(default_factory=tuple)
    marks: Sequence[Mark] = field(default_factory=tuple)


# -- lines ------------------------------------------------------------------------------------------------------------


def draw(chart: Chart) -> str:
    """The chart as one ``<svg>`` element; what is outside of the axes' ranges cannot be."""
    xs = [x for line in chart.lines for x, _ in line.points] + [*chart.x.include, *(m.at for m in chart.marks)]
    ys = [y for line in chart.lines for _, y in line.points] + list(chart.y.include)
    x = _Scale.over(xs, _LEFT, _WIDTH - _RIGHT)
    y = _Scale.over(ys, chart.height - _BOTTOM, _TOP, is_rounded=True)
    parts = [*_bands(chart.bands, x, _TOP, chart.height - _BOTTOM), *_grid(chart, x, y)]
    parts += [_path(line, x, y) for line in chart.lines]
    parts += _marks(chart.marks, x, _TOP, chart.height - _BOTTOM)
    return _svg(chart.about, chart.height, parts)


@dataclass(frozen=True, slots=True)
class _Scale:
    """Numbers to pixels."""

    low: float
    high: float
    start: float
    stop: float

    @classmethod
    def over(cls, values: Iterable[float], start: float, stop: float, *, is_rounded: bool = False) -> _Scale:
        finite = [value for value in values if math.isfinite(value)]
        low, high = min(finite, default=0.0), max(finite, default=1.0)
        if high <= low:
            low, high = low - abs(low) / 2 - 0.5, high + abs(high) / 2 + 0.5
        if is_rounded:
            tick = _tick(high - low, 5)
            low, high = math.floor(low / tick) * tick, math.ceil(high / tick) * tick
        return cls(low, high, start, stop)

    def __call__(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self, count: int, *, is_duration: bool = False) -> list[float]:
        tick = _tick(self.high - self.low, count, _DURATIONS if is_duration else ())
        first = math.ceil(self.low / tick - 1e-9)
        return [n * tick for n in range(first, math.floor(self.high / tick + 1e-9) + 1)]


_DURATIONS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400)


def _tick(extent: float, count: int, allowed: Sequence[float] = ()) -> float:
    """A round distance of which about ``count`` fill the extent."""
    rough = extent / count
    if allowed and allowed[0] <= rough <= allowed[-1]:
        return next(step for step in allowed if step >= rough)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def _grid(chart: Chart, x: _Scale, y: _Scale) -> Iterator[str]:
    bottom = chart.height - _BOTTOM
    y_ticks, x_ticks = y.ticks(5), x.ticks(8, is_duration=chart.x.is_duration)
    for value in y_ticks:
        at = y(value)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text class="tick" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_number(value, y_ticks)}</text>'
    yield from _x_axis(chart.x, x, x_ticks, bottom)
    yield f'<text class="axis" x="{_LEFT - 8}" y="14" text-anchor="start" dx="-48">{_text(chart.y.title)}</text>'


def _x_axis(axis: Axis, x: _Scale, ticks: Sequence[float], bottom: float) -> Iterator[str]:
    yield f'<line class="base" x1="{x.start}" x2="{x.stop}" y1="{bottom}" y2="{bottom}"/>'
    for value in ticks:
        at = x(value)
        label = _clock(value) if axis.is_duration else _number(value, ticks)
        yield f'<line class="base" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        yield f'<text class="tick" x="{at:.1f}" y="{bottom + 17}" text-anchor="middle">{label}</text>'
    right = _WIDTH - _RIGHT
    yield f'<text class="axis" x="{right}" y="{bottom + 34}" text-anchor="end">{_text(axis.title)}</text>'


def _number(value: float, ticks: Sequence[float]) -> str:
    """With as many digits as tell the ticks apart."""
    apart = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    digits = max(0, -math.floor(math.log10(apart) + 1e-9))
    return f"{value:,.{digits}f}" if digits <= 6 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    """``45 s``, ``3:20``, ``2:05:00``: minutes and hours."""
    whole = round(seconds)
    if abs(seconds) < 60:
        return f"{seconds:g} s"
    head = f"{whole // 3600}:{whole % 3600 // 60:02d}" if whole >= 3600 else f"{whole // 60}"
    return f"{head}:{whole % 60:02d}"


def _path(line: Line, x: _Scale, y: _Scale) -> str:
    if line.is_dots:
        dots = (f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="4"/>' for a, b in line.points if math.isfinite(b))
        return f'<g class="dots {line.kind}">{"".join(dots)}</g>'
    data = []
    for is_finite, group in groupby(_thinned(line.points), key=lambda p: math.isfinite(p[0]) and math.isfinite(p[1])):
        if is_finite:
            data.append(_run([(x(a), y(b)) for a, b in group], is_steps=line.is_steps))
    return f'<path class="line {line.kind}" d="{"".join(data)}"/>'


def _run(pixels: Sequence[Point], *, is_steps: bool) -> str:
    (first_x, first_y), *rest = pixels
    start = f"M{first_x:.1f} {first_y:.1f}"
    if not rest:
        return f"{start}h0.1"  # one point is seen, too
    return start + "".join(f"H{a:.1f}V{b:.1f}" if is_steps else f"L{a:.1f} {b:.1f}" for a, b in rest)


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """The lowest and the highest of each few neighbours, in their order, so that no peak is lost."""
    if len(points) <= _POINTS:
        return points
    size = -(-len(points) // (_POINTS // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        few = range(start, min(start + size, len(points)))
        heights = {i: points[i][1] for i in few if math.isfinite(points[i][1])} or {start: math.nan}
        kept += [
            points[i] for i in sorted({min(heights, key=heights.__getitem__), max(heights, key=heights.__getitem__)})
        ]
    return kept


# -- what happened ----------------------------------------------------------------------------------------------------


def _bands(bands: Sequence[Band], x: _Scale, top: float, bottom: float) -> Iterator[str]:
    for band in bands:
        left, width = x(band.start), max(x(band.stop) - x(band.start), 1.0)
        yield (
            f'<rect class="band {band.kind}" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" '
            f'height="{bottom - top:.1f}"><title>{_text(band.title)}</title></rect>'
        )
        if band.label and width > 7.0 * len(band.label) + 8:
            middle = left + width / 2
            place = f'x="{middle:.1f}" y="{top + 15:.1f}" text-anchor="middle"'
            yield f'<text class="row" {place}>{_text(band.label)}</text>'


def _marks(marks: Sequence[Mark], x: _Scale, top: float, bottom: float) -> Iterator[str]:
    taken = -math.inf
    for mark in sorted(marks, key=lambda m: m.at):
        at = x(mark.at)
        label = ""
        if mark.label and at - taken > 7.0 * len(mark.label) + 8:  # one that would cover another is left out
            taken = at
            label = f'<text class="tag" x="{at:.1f}" y="{top - 5:.1f}" text-anchor="middle">{_text(mark.label)}</text>'
        yield (
            f'<g class="mark {mark.kind}"><title>{_text(mark.title)}</title>{label}'
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>{_sign(mark.kind, at, bottom)}</g>'
        )


def _sign(kind: str, at: float, bottom: float) -> str:
    """A shape at the foot of a mark, so that marks in one place, or without colour, can be told apart."""
    corners = _SIGNS.get(kind, ())
    points = " ".join(f"{at + dx:.1f},{bottom + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="sign" points="{points}"/>' if corners else ""


_SIGNS: Mapping[str, Sequence[Point]] = {
    "injected": ((-6, 0), (6, 0), (0, -10)),
    "recovered": ((0, -5), (9, -10), (0, -15)),
}

# -- bars and rows ----------------------------------------------------------------------------------------------------


def stacked_bar(about: str, parts: Sequence[tuple[str, float, str]]) -> str:
    """Kind, share and title of each part, side by side, with the share inside where there is room."""
    height, at, shapes = 46, 0.0, []
    for kind, share, title in parts:
        width = max(share, 0.0) * _WIDTH
        shapes.append(
            f'<rect class="part {kind}" x="{at:.2f}" y="4" width="{width:.2f}" height="38">'
            f"<title>{_text(title)}</title></rect>"
        )
        if width >= 48:
            middle = at + width / 2
            shapes.append(f'<text class="inside" x="{middle:.1f}" y="28" text-anchor="middle">{share:.0%}</text>')
        at += width
    return _svg(about, height, shapes, kind="bar")


def timeline(about: str, axis: Axis, rows: Sequence[Row]) -> str:
    """Rows of bands and marks over one x axis."""
    ends = [*axis.include, *(m.at for row in rows for m in row.marks)]
    left = _LEFT + 56
    x = _Scale.over([*ends, *(e for row in rows for b in row.bands for e in (b.start, b.stop))], left, _WIDTH - _RIGHT)
    step, top, shapes = 30, 8, []
    for number, row in enumerate(rows):
        above = top + number * step
        shapes.append(f'<text class="row" x="{left - 10}" y="{above + 15}" text-anchor="end">{_text(row.name)}</text>')
        shapes += [*_bands(row.bands, x, above, above + 20), *_marks(row.marks, x, above, above + 20)]
    bottom = top + len(rows) * step
    shapes += [*_x_axis(axis, x, x.ticks(8, is_duration=axis.is_duration), bottom)]
    return _svg(about, bottom + _BOTTOM, shapes)


def _svg(about: str, height: int, parts: Iterable[str], kind: str = "chart") -> str:
    head = f'<svg class="{kind}" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{_text(about)}">'
    return head + "".join(parts) + "</svg>"


def _text(text: str) -> str:
    return escape(clean(text))
