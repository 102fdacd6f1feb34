"""Charts as SVG, without a library: lines, and bars in parts.

    line_chart(title, [Series("with reuse", points), ...], Axis("tokens", count, log=True), Axis("seconds", seconds))
    bar_chart(title, [Bar("4k tokens", (("weights", 65e9), ("KV", 16e9))), ...], Axis("bytes", nbytes))

A chart is narrow, so that it can be read on a phone as it is; a page shows several beside each other. Colours follow
the reader's light or dark preference; lines differ in dashes as well. A chart stands alone as a file, or within a page.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape

from thermocline.lens.figures import significant

WIDTH, HEIGHT, LEFT, RIGHT, TOP, FOOT = 420, 280, 64, 16, 40, 46
LEGEND_ROW, BAR_ROW, BAR_HEIGHT, LETTER = 17, 26, 16, 6.6
TICKS_WANTED = 5
TINY = 1e-30
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2", "1 2")
_LIGHT = ("#0e7490", "#c2410c", "#6d28d9", "#4d7c0f", "#be185d", "#57534e")
_DARK = ("#22d3ee", "#fb923c", "#c4b5fd", "#a3e635", "#f9a8d4", "#d6d3d1")


def _colours(palette: Sequence[str], ink: str, faint: str, ground: str) -> str:
    named = "".join(f"--c{at}:{colour};" for at, colour in enumerate(palette))
    return f"{named}--ink:{ink};--faint:{faint};--ground:{ground};"


STYLE = (
    f".chart{{{_colours(_LIGHT, '#1c1917', '#d6d3d1', '#ffffff')}"
    "font:12px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}"
    f"@media(prefers-color-scheme:dark){{.chart{{{_colours(_DARK, '#e7e5e4', '#44403c', '#1c1917')}}}}}"
    ".chart text{fill:var(--ink);stroke:var(--ground);stroke-width:3px;paint-order:stroke}"
    ".chart .title{font-size:14px;font-weight:600}.chart .grid{stroke:var(--faint)}"
    ".chart .mark{stroke:var(--ink);stroke-dasharray:2 2;opacity:.6}.chart .line{fill:none;stroke-width:2}"
    ".chart .ground{fill:var(--ground)}"
)


@dataclass(frozen=True, slots=True)
class Axis:
    """What is measured, and how a value of it is written. Without `stop`, an axis ends where its values do.

    It starts at 0, or with `log` at its smallest value. `ticks` are chosen where none are given.
    """

    label: str
    show: Callable[[float], str] = significant
    log: bool = False
    stop: float | None = None
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Series:
    """One line: points (x, y) in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: its parts, one behind the other. Parts of the same name have the same colour in all bars."""

    label: str
    parts: Sequence[tuple[str, float]]


class _Scale:
    """Values of an axis to places between two ends."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, stop: float) -> None:
        self.axis, self._start, self._stop = axis, start, stop
        good = [value for value in values if math.isfinite(value) and (value > TINY or not axis.log)]
        high = axis.stop if axis.stop is not None else max(good, default=1.0)
        self.low = min(good, default=high / 10) if axis.log else min(0.0, *good, high)
        self.high = high if high - self.low > TINY or axis.log else self.low + 1
        if axis.log and self.high <= self.low:
            self.high = 10 * self.low
        self._step = _round_step((self.high - self.low) / TICKS_WANTED)
        if not axis.log and axis.stop is None:
            self.high = self._step * math.ceil(self.high / self._step - 1e-9)

    def at(self, value: float) -> float:
        """The place of a value; one beyond an end is put at that end."""
        value = min(max(value, self.low), self.high)
        if self.axis.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return self._start + part * (self._stop - self._start)

    def ticks(self) -> list[float]:
        """Round values, about five of them."""
        if self.axis.ticks:
            return [tick for tick in self.axis.ticks if self.low <= tick <= self.high]
        return list(self._decades() if self.axis.log else self._steps())

    def _steps(self) -> Iterator[float]:
        step = self._step
        for number in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1):
            yield number * step

    def _decades(self) -> Iterator[float]:
        decades = math.log10(self.high / self.low)
        factors = (1, 2, 5) if decades <= 2 else (1,)  # noqa: PLR2004  # of ten
        every = max(1, round(decades / TICKS_WANTED))
        for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1):
            values = (factor * 10.0**power for factor in factors if power % every == 0)
            yield from (value for value in values if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9))


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def line_chart(title: str, series: Sequence[Series], x: Axis, y: Axis, marks: Sequence[tuple[str, float]] = ()) -> str:
    """Lines over one pair of axes, as one `<svg>`. `marks` are upright lines at values of x, with a word each."""
    legend, top = _legend([each.name for each in series if len(series) > 1], dashes=True)
    bottom = HEIGHT + top - FOOT
    points = [point for each in series for point in each.points]
    marked = [value for _, value in marks]
    across = _Scale(x, [point[0] for point in points] + marked, LEFT, WIDTH - RIGHT)
    up = _Scale(y, [point[1] for point in points], bottom, top + 6)
    parts = [*legend, *_grid_rows(up, bottom), *_grid_columns(across, top + 6, bottom)]
    for at, (word, value) in enumerate(marks):
        place = across.at(value)
        parts.append(f'<line class="mark" x1="{place:.1f}" x2="{place:.1f}" y1="{top + 6}" y2="{bottom}"/>')
        near_end = place > WIDTH - RIGHT - LETTER * len(word) - 6
        parts.append(
            _text(place + (-4 if near_end else 4), top + 17 + 14 * (at % 3), word, "end" if near_end else "start")
        )
    for at, each in enumerate(series):
        colour, dash = _colour(at), DASHES[at % len(DASHES)]
        places = [(across.at(a), up.at(b)) for a, b in each.points if math.isfinite(b) and (a > TINY or not x.log)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline class="line" stroke="{colour}" stroke-dasharray="{dash}" points="{path}"/>')
        if len(places) <= WIDTH // 20:
            told = (f"{each.name}: {x.show(a)}, {y.show(b)}" for a, b in each.points)
            parts += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"><title>{escape(word)}</title></circle>'
                for (a, b), word in zip(places, told, strict=False)
            ]
    parts.append(_text(LEFT, top - 2, y.label, "start", "font-style:italic"))
    parts.append(_text(WIDTH - RIGHT, bottom + 36, x.label, "end", "font-style:italic"))
    return _svg(title, parts, bottom + FOOT)


def bar_chart(title: str, bars: Sequence[Bar], axis: Axis, marks: Sequence[tuple[str, float]] = ()) -> str:
    """Lying bars in parts, as one `<svg>`, each with its sum behind it. `marks` are upright lines with a word each."""
    names = list(dict.fromkeys(name for bar in bars for name, _ in bar.parts))
    legend, top = _legend(names if len(names) > 1 else [], dashes=False)
    sums = [sum(value for _, value in bar.parts) for bar in bars]
    left = min(WIDTH * 0.4, 16 + LETTER * max((len(bar.label) for bar in bars), default=0))
    room = LETTER * max((len(axis.show(value)) for value in sums), default=0) + 10
    longest = max([*sums, *(value for _, value in marks)], default=1.0)
    across = _Scale(replace(axis, stop=axis.stop or longest), sums, left, WIDTH - RIGHT - room)
    first = top + 14 * bool(marks)
    bottom = first + BAR_ROW * len(bars)
    parts = [*legend]
    for word, value in marks:
        where = across.at(value)
        parts.append(f'<line class="mark" x1="{where:.1f}" x2="{where:.1f}" y1="{first}" y2="{bottom}"/>')
        parts.append(_text(where, first - 3, word, "middle"))
    for at, (bar, whole) in enumerate(zip(bars, sums, strict=True)):
        upper, reached = first + BAR_ROW * at + (BAR_ROW - BAR_HEIGHT) / 2, 0.0
        parts.append(_text(left - 8, upper + 12, bar.label, "end"))
        for name, value in bar.parts:
            start, stop = across.at(reached), across.at(reached + value)
            told = f"<title>{escape(f'{bar.label}: {name} {axis.show(value)}')}</title>"
            place = f'x="{start:.1f}" y="{upper:.1f}" width="{max(0.0, stop - start):.1f}" height="{BAR_HEIGHT}"'
            parts.append(f'<rect {place} fill="{_colour(names.index(name))}">{told}</rect>')
            reached += value
        parts.append(_text(across.at(whole) + 6, upper + 12, axis.show(whole), "start"))
    parts.append(_text(WIDTH - RIGHT, bottom + 16, axis.label, "end", "font-style:italic"))
    return _svg(title, parts, bottom + 24)


def _colour(at: int) -> str:
    return f"var(--c{at % len(_LIGHT)})"


def _text(left: float, base: float, words: str, anchor: str, style: str = "") -> str:
    styled = f' style="{style}"' if style else ""
    return f'<text x="{left:.1f}" y="{base:.1f}" text-anchor="{anchor}"{styled}>{escape(words)}</text>'


def _legend(names: Sequence[str], *, dashes: bool) -> tuple[list[str], int]:
    """Swatch and name of each, in rows; and where the chart itself may begin."""
    parts: list[str] = []
    left, base = 16.0, TOP + 4 if names else TOP - 12
    for at, name in enumerate(names):
        width = 38 + LETTER * len(name)
        if left + width > WIDTH and left > 16:  # noqa: PLR2004  # the margin
            left, base = 16.0, base + LEGEND_ROW
        dash = f' stroke-dasharray="{DASHES[at % len(DASHES)]}"' if dashes else ""
        line = f'x1="{left:.0f}" x2="{left + 18:.0f}" y1="{base - 4}" y2="{base - 4}"'
        parts.append(f'<line {line} stroke="{_colour(at)}" stroke-width="{2 if dashes else 10}"{dash}/>')
        parts.append(_text(left + 23, base, name, "start"))
        left += width
    return parts, base + (26 if dashes else 14)


def _grid_rows(up: _Scale, bottom: float) -> Iterator[str]:
    for tick in up.ticks():
        place = up.at(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
        yield _text(LEFT - 6, place + 4, up.axis.show(tick), "end")
    yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'


def _grid_columns(across: _Scale, top: float, bottom: float) -> Iterator[str]:
    free = 0.0
    for tick in across.ticks():
        place, words = across.at(tick), across.axis.show(tick)
        yield f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{top}" y2="{bottom}"/>'
        half = LETTER * len(words) / 2
        if place - half >= free:  # a word that would touch the one before is left out
            free = place + half + 6
            yield _text(min(place, WIDTH - half - 2), bottom + 17, words, "middle")


def _svg(title: str, parts: Sequence[str], height: float) -> str:
    size = f'viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" height="{height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" {size} role="img" aria-label="{escape(title)}">'
    ground = f'<rect class="ground" width="{WIDTH}" height="{height:.0f}" rx="6"/>'
    heading = f'<text class="title" x="16" y="24">{escape(title)}</text>'
    return "\n".join([head, f"<style>{STYLE}</style>", ground, heading, *parts, "</svg>"])
