"""Numbers as people read them: GB are 10^9 bytes, "k" are thousands, seconds have the unit that suits. And tables."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from thermocline.errors import SettingsError

_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SECONDS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "us"))
_LENGTH = re.compile(r"[1-9][0-9]{0,8}k?")
_LONG_SECONDS, _WHOLE_DOLLARS = 120.0, 100


def significant(value: float, digits: int = 3) -> str:
    """A number with so many digits that count, without zeros that say nothing; never with an exponent."""
    if not value:
        return "0"
    text = f"{float(f'{value:.{digits}g}'):,.9f}"
    return text.rstrip("0").rstrip(".")


def count(value: float) -> str:
    """12.3k, 1.5M, 640."""
    step, letter = next(((step, letter) for step, letter in _STEPS if abs(value) >= step), (1.0, ""))
    return significant(value / step) + letter


def tokens(value: float) -> str:
    """32k, 1,000: of tokens, a k is 1,024, as models name their lengths."""
    return f"{value / 1024:,.0f}k" if value >= 1024 and value % 1024 == 0 else f"{value:,.0f}"  # noqa: PLR2004  # a k


def nbytes(value: float) -> str:
    """655 kB, 16.1 GB; 10^9 bytes are a GB."""
    step, letter = next(((step, letter) for step, letter in _STEPS if abs(value) >= step), (1.0, ""))
    return f"{significant(value / step)} {letter}B"


def seconds(value: float) -> str:
    """45 ms, 1.14 s, 12 min: minutes and more from two minutes on."""
    if not value:
        return "0 s"
    units = _SECONDS if abs(value) >= _LONG_SECONDS else _SECONDS[3:]
    step, name = next(((step, name) for step, name in units if abs(value) >= step), units[-1])
    return f"{significant(value / step)} {name}"


def share(value: float) -> str:
    """37.4 %."""
    return f"{100 * value:.1f} %"


def dollars(value: float) -> str:
    """$0.0031, $2.95, $1,065."""
    places = "" if abs(value) < 1 else ".0f" if abs(value) >= _WHOLE_DOLLARS else ".2f"
    return f"${value:,{places}}" if places else f"${significant(value)}"


def percent(value: float) -> str:
    """37 %, for an axis."""
    return f"{100 * value:.0f} %"


def lengths(words: Sequence[str]) -> tuple[int, ...]:
    """Numbers of tokens: 4096, or 4k for 1,024 each; several between commas. Raises SettingsError for anything else."""
    each = [part.strip().lower() for word in words for part in word.split(",") if part.strip()]
    if not all(_LENGTH.fullmatch(part) for part in each):
        raise SettingsError(f"--context {','.join(words)}: not a number of tokens", hint="write it as --context 4k,32k")
    return tuple(int(part.removesuffix("k")) * (1024 if part.endswith("k") else 1) for part in each)


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headers. The first column is words, the others are numbers; `note` is what has to be known of them."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    def text(self) -> str:
        """As lines of text, indented below the title."""
        shown = [self.head, *self.rows]
        widths = [max(len(row[at]) for row in shown) for at in range(len(self.head))]
        lines = [self.title] if self.title else []
        for row in shown:
            cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
            cells[0] = row[0].ljust(widths[0])
            lines.append("  " + "  ".join(cells).rstrip())
        return "\n".join([*lines, *textwrap.wrap(self.note, 108, initial_indent="  ", subsequent_indent="  ")])
