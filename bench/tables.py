"""Writes the tables of README.md and docs/ from bench/results. `python -m bench.tables`; with --check it only compares.

A page asks for a table with a pair of comments, `<!-- NAME:begin -->` and `<!-- NAME:end -->`. Besides what
`thermocline bench NAME --save` keeps there, demo.json is what `thermocline demo --json` printed, and make-test.txt the
end of what `make test` printed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench import BENCHES, beside, chart, claims_planner, hit_ratio, state
from bench.claims import CLAIMS
from bench.harness import RESULTS, ROOT, Check, Result, kept, quantity, saved

MARKED = re.compile(r"(<!-- (\w+):begin -->\n).*?(<!-- \2:end -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """Every page that holds such a table, and the chart: what each should say."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {path: path.read_text() for path in files if path.exists()}
    wanted = {path: filled(text) for path, text in texts.items() if MARKED.search(text)}
    drawn = chart.current()
    return wanted | ({chart.PATH: drawn} if drawn is not None else {})


def filled(text: str) -> str:
    """`text` with each marked part as the kept results say. Raises KeyError for a name that is no table of ours."""
    return MARKED.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def _where(machine: Mapping[str, Any], date: str) -> str:
    return f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, {date}"


# -- budgets -----------------------------------------------------------------------------------------------------------


def budgets() -> str:
    """Every check of every kept result, with its interval where it is a ratio."""
    lines = ["| measured | value (95 % interval) | budget | command |", "|---|---|---|---|"]
    results = [result for name in BENCHES if (result := saved(name)) is not None]
    for result in results:
        lines += [_budget(result, each) for each in result.checks]
    return "\n".join([*lines, "", _conditions(results), ""])


def _budget(result: Result, each: Check) -> str:
    spreads = (result.details.get(group, {}).get(each.name) for group in ("ratios", "percent", "arms"))
    row = next(filter(None, spreads), None)
    interval = f" ({quantity(row['low'], each.unit)} to {quantity(row['high'], each.unit)})" if row else ""
    sign = "at most" if each.better == "lower" else "at least"
    short = "" if each.ok else ", **falls short**"
    value = quantity(each.value, each.unit)
    return (
        f"| {each.name} | {value}{interval}{short} | {sign} {quantity(each.target, each.unit)} | {_command(result)} |"
    )


def _command(result: Result) -> str:
    return f"`thermocline bench {result.bench}`"


def _conditions(results: list[Result]) -> str:
    """Machine, date and commit, said once for the benches that share them."""
    said: dict[str, list[str]] = {}
    for result in results:
        where = f"{_where(result.machine, result.date)}, commit {result.machine['commit']}"
        said.setdefault(where, []).append(result.bench)
    return "\n".join(f"Measured on {where}: {', '.join(names)}." for where, names in said.items())


def claims() -> str:
    """What playbooks claim, what came out here, and what has to be said about it."""
    lines = ["| claim | command | our figure | correction |", "|---|---|---|---|"]
    for row in CLAIMS:
        found = kept(row.result)
        figure = "" if found is None else row.figure(found)
        if figure:  # a demo without vLLM, say, has nothing to say of it
            lines.append(f"| {row.claim} | `{row.command}` | {figure} | {row.correction} |")
    results = [result for name in BENCHES if (result := saved(name)) is not None]
    return "\n".join([*lines, "", _conditions(results), ""])


def demo() -> str:
    """What each chapter of `make demo` said at its end, and the table behind them."""
    found = kept("demo")
    if found is None:
        return ""
    chapters = found["chapters"]
    lines = ["```text", "$ make demo"]
    for at, chapter in enumerate(chapters, 1):
        mark = "FAILED" if not chapter["ok"] else "ok" if chapter["details"].get("shown", True) else "--"
        lines += [f"{at}. {chapter['title']}", f"   {mark}    {chapter['verdict']}"]
    seconds = f"{len(chapters)} chapters in {found['seconds']:.0f} s"
    return "\n".join([*lines, "```", "", f"{seconds}, on {_where(found['machine'], found['date'])}.", ""])


def tests() -> str:
    """The end of what `make test` printed: the promises proven, and what was skipped."""
    path = RESULTS / "make-test.txt"
    if not path.exists():
        return ""
    return "\n".join(["```text", "$ make test", "...", path.read_text().strip(), "```", ""])


TABLES: dict[str, Callable[[], str]] = {
    "budgets": budgets,
    "claims": claims,
    "demo": demo,
    "near_hits": hit_ratio.near_hits,
    "near_state": state.table,
    "peers": beside.peers,
    "planner_claims": claims_planner.table,
    "planner_errors": claims_planner.errors,
    "tests": tests,
}


def main(check_only: bool) -> int:  # noqa: FBT001  # the one flag of a script
    """Write what differs, or only name it. Returns 1 where --check found a difference."""
    drifted = [path for path, text in pages().items() if not path.exists() or path.read_text() != text]
    for path in drifted:
        print(f"{path.relative_to(ROOT)}: {'differs from bench/results' if check_only else 'written'}")
        if not check_only:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(pages()[path])
    return 1 if drifted and check_only else 0


if __name__ == "__main__":
    sys.exit(main(check_only="--check" in sys.argv[1:]))
