"""The chart of the README, drawn from the kept result of `bench ttft`."""

from __future__ import annotations

from html import escape

from bench.harness import ROOT, Result, quantity, saved

PATH = ROOT / "docs" / "assets" / "ttft.svg"
WIDTH, BAR_LEFT, BAR_WIDTH_MAX, BAR_HEIGHT, ROW, TOP = 760, 190, 430, 22, 36, 74
COLOURS = {"no cache": "#c2410c", "retained cache": "#71717a"}
COLOUR = "#0e7490"


def svg(result: Result) -> str:
    """One bar per arm, all on one linear scale: the point is how short the warm ones are."""
    arms = {name: row["median"] for name, row in result.details["arms"].items()}
    longest = max(arms.values())
    cold = arms["no cache"]
    rows = [
        _row(at, name, seconds, BAR_WIDTH_MAX * seconds / longest, cold)
        for at, (name, seconds) in enumerate(arms.items())
    ]
    height = TOP + ROW * len(arms) + 44
    known, new = result.details["cached_tokens"], result.details["new_tokens"]
    title = f"Time to first token: {known:,} tokens known, {new} new"
    machine = f"{result.machine['cpu']}, {result.machine['cores']} cores, {result.details['model']}"
    run = f"thermocline bench ttft, {result.date}, commit {result.machine['commit']}"
    fonts = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{fonts}" role="img">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff" stroke="#d4d4d8"/>',
        _text(24, 34, title, 18, "#18181b", 'font-weight="600"'),
        _text(
            24,
            55,
            "median, shorter is better; retained cache: plain transformers whose cache never left the process",
            13,
            "#52525b",
        ),
        *rows,
        _text(24, height - 25, machine, 11.5, "#71717a"),
        _text(24, height - 10, run, 11.5, "#71717a"),
        "</svg>",
    ]
    return "\n".join([*lines, ""])


def _row(at: int, name: str, seconds: float, width: float, cold: float) -> str:
    top = TOP + ROW * at
    middle = top + BAR_HEIGHT / 2 + 5
    times = "" if seconds == cold else f"  ({cold / seconds:.0f}x sooner)"
    end = BAR_LEFT + max(2.0, width)
    bar = f'x="{BAR_LEFT}" y="{top}" width="{end - BAR_LEFT:.1f}" height="{BAR_HEIGHT}" rx="3"'
    return "\n".join(
        [
            _text(BAR_LEFT - 12, middle, name, 14, "#18181b", 'text-anchor="end"'),
            f'<rect {bar} fill="{COLOURS.get(name, COLOUR)}"/>',
            _text(end + 10, middle, quantity(seconds, "s") + times, 14, "#18181b"),
        ]
    )


def _text(left: float, base: float, words: str, size: float, colour: str, more: str = "") -> str:
    return f'<text x="{left:.1f}" y="{base:.1f}" font-size="{size}" fill="{colour}" {more}>{escape(words)}</text>'


def current() -> str | None:
    """The chart as the kept result says, or None where none was kept."""
    result = saved("ttft")
    return None if result is None else svg(result)
