"""One page that needs nothing else: no script, no font, no picture from elsewhere. Light or dark as the reader prefers.

On a phone charts stand below each other, and a wide table is moved sideways by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from thermocline.errors import SettingsError
from thermocline.lens.figures import Table

_STYLE = """
:root{color-scheme:light dark;--ink:#1c1917;--soft:#57534e;--line:#d6d3d1;--ground:#fff;--page:#f5f5f4;--strong:#0e7490}
@media(prefers-color-scheme:dark){
:root{--ink:#e7e5e4;--soft:#a8a29e;--line:#44403c;--ground:#1c1917;--page:#0c0a09;--strong:#22d3ee}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:1.6rem;line-height:1.25;margin:.4em 0}h2{font-size:1.2rem;margin:2em 0 .6em}
h3{font-size:1rem;margin:0;padding:12px 14px 4px}
p{max-width:75ch;margin:.5em 0}
.so{font-size:1.1rem;font-weight:600;border-left:4px solid var(--strong);padding-left:12px}
.charts,.tables{display:grid;gap:16px;margin:16px 0;align-items:start}
.charts{grid-template-columns:repeat(auto-fit,minmax(min(100%,340px),1fr))}
.tables{grid-auto-flow:dense;grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr))}
.charts svg{width:100%;height:auto;max-width:520px;border:1px solid var(--line);border-radius:6px}
.wide{grid-column:1/-1}
.table{min-width:0;overflow-x:auto;background:var(--ground);border:1px solid var(--line);border-radius:6px}
table{border-collapse:separate;border-spacing:0;font-size:.875rem;font-variant-numeric:tabular-nums;min-width:100%}
th,td{padding:6px 14px;text-align:right;border-top:1px solid var(--line);white-space:nowrap;vertical-align:top}
th{color:var(--soft);font-weight:600}thead th{border-top:0;white-space:normal}
th:first-child{text-align:left;position:sticky;left:0;background:var(--ground);white-space:normal;min-width:9em}
tbody th{font-weight:400;color:var(--ink)}.note{font-size:.8125rem;color:var(--soft);padding:4px 14px 12px;margin:0}
td.words{text-align:left;white-space:normal;min-width:18em}ul{padding-left:1.2em;font-size:.875rem;color:var(--soft)}
li{overflow-wrap:anywhere}
@media(max-width:480px){th,td{padding:5px 7px}th:first-child{min-width:6em;padding-left:14px}table{font-size:.8125rem}}
footer{margin-top:3em;font-size:.8125rem;color:var(--soft)}
"""
WORDS = 24
"""Cells that are longer are text, not numbers."""
COLUMNS = 4
"""Tables with more take a whole row of the page."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page: paragraphs, then charts (`<svg>` of `chart.py`) beside each other, tables, and a list."""

    heading: str = ""
    paragraphs: Sequence[str] = ()
    charts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    points: Sequence[str] = ()


def page(title: str, so: Sequence[str], sections: Sequence[Section], foot: str = "") -> str:
    """The whole page. `so` is what follows from all of it, and stands first. All words are text: none is HTML."""
    parts = [f"<h1>{escape(title)}</h1>", *(f'<p class="so">{escape(line)}</p>' for line in so)]
    parts += [_section(section) for section in sections]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>",
            *parts,
            f"<footer>{escape(foot)}</footer></main></body></html>\n",
        ]
    )


def write(path: Path, text: str) -> None:
    """Keep a page. Raises SettingsError where it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}", hint="name a file in a folder of yours") from None


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.heading)}</h2>"] if section.heading else []
    parts += [f"<p>{escape(text)}</p>" for text in section.paragraphs]
    if section.charts:
        parts.append(f'<div class="charts">{"".join(section.charts)}</div>')
    if section.tables:
        parts.append(f'<div class="tables">{"".join(map(_table, section.tables))}</div>')
    if section.points:
        parts.append(f"<ul>{''.join(f'<li>{escape(point)}</li>' for point in section.points)}</ul>")
    return "\n".join(parts)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.head)
    rows = (f'<tr><th scope="row">{escape(row[0])}</th>{"".join(map(_cell, row[1:]))}</tr>' for row in table.rows)
    title = f"<h3>{escape(table.title)}</h3>" if table.title else ""
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    wide = " wide" if len(table.head) > COLUMNS else ""
    return f'<div class="table{wide}">{title}<table>{body}</table>{note}</div>'


def _cell(text: str) -> str:
    words = ' class="words"' if len(text) > WORDS else ""
    return f"<td{words}>{escape(text)}</td>"
