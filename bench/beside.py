"""The page that sets thermocline beside LMCache, from the kept result of `bench vs-lmcache`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.harness import kept, quantity

CACHES = ("thermocline", "LMCache")
PHASES = {
    "hit": "hit, after vLLM's own cache was emptied",
    "restart": "hit, after engine and cache were ended and started again",
}


def peers() -> str:
    """First tokens, what a miss costs, and every fault: a column for each cache. Empty where nothing is kept."""
    found = kept("vs-lmcache")
    if found is None:
        return ""
    where = found["machine"]
    lines = ["| first token, over vLLM's own prefix hit | thermocline | LMCache |", "|---|---|---|"]
    lines += _first_tokens(found["details"]["ratios"])
    lines += _miss(found["details"])
    lines += ["", "| fault | thermocline | LMCache |", "|---|---|---|", *_faults(found["details"]["faults"]), ""]
    measured = f"{where['cpu']}, {where['cores']} cores, Python {where['python']}, {found['date']}"
    return "\n".join([*lines, f"Measured on {measured}, commit {where['commit']}.", ""])


def _first_tokens(ratios: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = []
    for name in ratios:
        phase, _, rest = name.partition(": thermocline / ")
        if phase not in PHASES:
            continue
        cells = [_range(ratios.get(f"{phase}: {who} / {rest}"), "x") for who in CACHES]
        lines.append(f"| {rest.rpartition(', ')[2]}: {PHASES[phase]} | {' | '.join(cells)} |")
    return lines


def _miss(details: Mapping[str, Any]) -> list[str]:
    cells = []
    for who in CACHES:
        row = details["ratios"][f"CPU time of a miss: {who} / vLLM alone"]
        percent = {name: 100 * (row[name] - 1) for name in ("median", "low", "high")}
        own = quantity(details["cache_cpu_seconds"][who], "s")
        cells.append(f"{_range(percent, '%')}, and {own} in the cache's own process")
    return [f"| CPU time that a miss adds in the engine | {' | '.join(cells)} |"]


def _range(row: Mapping[str, float] | None, unit: str) -> str:
    if row is None:
        return "no hit"
    return f"{quantity(row['median'], unit)} ({quantity(row['low'], unit)} to {quantity(row['high'], unit)})"


def _faults(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(row["fault"] for row in rows)
    told = {(row["fault"], row["who"]): _answers(row) for row in rows}
    return [f"| {name} | {' | '.join(told.get((name, who), 'not reached') for who in CACHES)} |" for name in names]


def _answers(row: Mapping[str, Any]) -> str:
    """What the requests after a fault got: the first one, and then the slowest of the others."""
    answers = row["answers"]
    right = sum(answer == "right" for answer in answers)
    words = [f"{right} of {len(answers)} right" if right else ", ".join(dict.fromkeys(answers))]
    if 0 < right < len(answers):
        words.append(", ".join(dict.fromkeys(answer for answer in answers if answer != "right")))
    first, *others = row["first_token_seconds"]
    words.append(f"first token after {quantity(first, 's')}")
    words += [f"then {quantity(max(others), 's')}"] if others else []
    words.append(f"{', '.join(str(count) for count in row['cached_tokens'])} tokens cached")
    again = row.get("hits_again_after_seconds")
    words += [f"hits again after {quantity(again, 's')}"] if again is not None else []
    return "; ".join(words)
