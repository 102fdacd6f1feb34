"""The fault matrix: which test proved which cell, on how many cases, kept beside the results of the benches.

A test names its cells with `@pytest.mark.matrix(FAULT, TIER)` and says with the fixture `cases` how many cases it
ran; a test that does not say ran one. With `--keep-matrix` a run writes what it proved to bench/results/faults.json,
from which docs/faults.md is made. Rows of tests that did not run stay as they are. What was tried on a live vLLM has
the word "vllm" in the place of a tier, and a file of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from bench import harness
from docs.faults_page import FAULTS, RESULTS, TIERS, VLLM, VLLM_FAULTS, VLLM_RESULTS

CELL, CASES, NOTE = "matrix cell", "matrix cases", "matrix note"


def name_cells(item: pytest.Item) -> None:
    """Write the cells of a test into its report. Raises UsageError for one that is not in the matrix."""
    for mark in item.iter_markers("matrix"):
        fault, *tiers = mark.args
        known = fault in VLLM_FAULTS if tiers == [VLLM] else fault in FAULTS and tiers and set(tiers) <= set(TIERS)
        if not known:
            raise pytest.UsageError(f"{item.nodeid}: the matrix has no cell {mark.args}")
        item.user_properties += [(CELL, (fault, tier)) for tier in tiers]


def rows(reports: Iterable[pytest.TestReport]) -> Iterator[dict[str, object]]:
    """One row for each cell and test that ran; the parameters of a test count together."""
    proven: dict[tuple[str, str, str], list[tuple[int, bool, str]]] = {}
    for report in reports:
        test = report.nodeid.partition("[")[0]
        count = sum(value for name, value in report.user_properties if name == CASES)
        note = "; ".join(value for name, value in report.user_properties if name == NOTE)
        for name, cell in report.user_properties:
            if name == CELL:
                proven.setdefault((*cell, test), []).append((count or 1, report.passed, note))
    now = {"date": datetime.now(UTC).date().isoformat(), "commit": harness._commit()}
    for (fault, tier, test), runs in sorted(proven.items()):
        outcome = "passed" if all(passed for _, passed, _ in runs) else "failed"
        cases, note = sum(count for count, _, _ in runs), "; ".join(note for _, _, note in runs if note)
        told = {"cases": cases, "outcome": outcome, "wrong_bytes": 0 if outcome == "passed" else None}
        yield {"fault": fault, "tier": tier, "test": test, **told, **now, "note": note}


def keep(reports: Iterable[pytest.TestReport], path: Path = RESULTS, vllm_path: Path = VLLM_RESULTS) -> int:
    """Put what was proven beside what earlier runs proved. Returns how many rows are new."""
    fresh = list(rows(reports))
    _put([row for row in fresh if row["tier"] != VLLM], path)
    _put([row for row in fresh if row["tier"] == VLLM], vllm_path)
    return len(fresh)


def _put(fresh: list[dict[str, object]], path: Path) -> None:
    if not fresh:
        return
    names = {(row["fault"], row["tier"], row["test"]) for row in fresh}
    kept = json.loads(path.read_text()) if path.exists() else []
    kept = [row for row in kept if (row["fault"], row["tier"], row["test"]) not in names]
    ordered = sorted([*kept, *fresh], key=lambda row: (row["fault"], row["tier"], row["test"]))
    path.write_text("[\n" + ",\n".join(json.dumps(row) for row in ordered) + "\n]\n")
