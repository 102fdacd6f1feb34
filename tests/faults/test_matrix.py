"""The fault matrix says what tests proved, no more: cells, counts, and what a later run changes."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from docs.faults_page import FAULTS, RESULTS, TIERS, VLLM_FAULTS, VLLM_RESULTS, faults_page
from tests.faults import matrix


def _report(test, fault="cut", tier="disk", *, cases=0, passed=True, note=""):
    properties = [(matrix.CELL, (fault, tier))]
    properties += [(matrix.CASES, cases)] if cases else []
    properties += [(matrix.NOTE, note)] if note else []
    return SimpleNamespace(nodeid=test, user_properties=properties, passed=passed)


def test_a_cell_holds_only_if_all_its_cases_do():
    """The parameters of a test count together; one that failed makes the cell fail; saying nothing is one case."""
    reports = [_report("a.py::t[1]", cases=5), _report("a.py::t[2]", cases=7, note="fast"), _report("a.py::u")]
    first, second = matrix.rows(reports)
    assert (first["cases"], first["outcome"], first["wrong_bytes"], first["note"]) == (12, "passed", 0, "fast")
    assert second["cases"] == 1
    (failed,) = matrix.rows([*reports[:2], _report("a.py::t[3]", passed=False)])
    assert (failed["outcome"], failed["wrong_bytes"]) == ("failed", None)


def test_a_run_changes_only_what_it_ran(tmp_path):
    """Keeping a run replaces the rows of its own tests, and leaves those of others."""
    path = tmp_path / "faults.json"
    assert matrix.keep([_report("a.py::t", cases=1), _report("b.py::t", cases=2)], path) == 2
    assert matrix.keep([_report("b.py::t", cases=3)], path) == 1
    assert {row["test"]: row["cases"] for row in json.loads(path.read_text())} == {"a.py::t": 1, "b.py::t": 3}
    live = tmp_path / "vllm-faults.json"
    assert matrix.keep([_report("c.py::t", "node killed", "vllm", cases=10)], path, live) == 1
    assert [row["cases"] for row in json.loads(live.read_text())] == [10]
    assert len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize("cell", [("unheard of", "disk"), ("cut", "tape"), ("cut",), ("cut", "vllm")])
def test_unknown_cells_are_errors(cell):
    """A test cannot name a cell that the page would not show."""
    item = SimpleNamespace(nodeid="t", user_properties=[], iter_markers=lambda name: [pytest.mark.matrix(*cell).mark])
    with pytest.raises(pytest.UsageError):
        matrix.name_cells(item)


def test_kept_rows_are_shown():
    """Every kept row is of a known cell that the tier can have, and passed."""
    for row in json.loads(RESULTS.read_text()) if RESULTS.exists() else []:
        assert row["fault"] in FAULTS
        assert row["tier"] in TIERS
        assert row["outcome"] == "passed"
    for row in json.loads(VLLM_RESULTS.read_text()) if VLLM_RESULTS.exists() else []:
        assert row["fault"] in VLLM_FAULTS
        assert row["outcome"] == "passed"
    page = faults_page()
    assert all(f"| {words} |" in page for words in [*(row.words for row in FAULTS.values()), *VLLM_FAULTS.values()])
