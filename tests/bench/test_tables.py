from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from bench import BENCHES, chart, claims, harness, tables


@pytest.mark.parametrize("path", tables.pages(), ids=lambda path: path.relative_to(harness.ROOT).as_posix())
def test_tables_are_generated(path):
    """Every table and the chart are what bench/results says; `python -m bench.tables` writes them again."""
    assert path.read_text() == tables.pages()[path]


def test_drift_is_found(tmp_path, monkeypatch, capsys):
    """A page that differs from the kept results is named by --check, and written without it."""
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- claims:begin -->\nold\n<!-- claims:end -->\nafter\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(chart, "current", lambda: None)
    assert tables.main(check_only=True) == 1
    assert "README.md" in capsys.readouterr().out
    assert "old" in page.read_text()
    assert tables.main(check_only=False) == 0
    assert tables.main(check_only=True) == 0
    assert page.read_text().startswith("before\n<!-- claims:begin -->\n| claim |")
    assert page.read_text().endswith("<!-- claims:end -->\nafter\n")


def test_unknown_table_is_an_error():
    """A page cannot ask for a table that does not exist."""
    with pytest.raises(KeyError):
        tables.filled("<!-- unheard:begin -->\n<!-- unheard:end -->")


def test_every_page_asks_for_what_it_needs():
    """README shows the demo, the tests and the budgets, and the page of claims shows the claims."""
    readme = (harness.ROOT / "README.md").read_text()
    page = (harness.ROOT / "docs" / "claims.md").read_text()
    assert _marks(readme) == {"demo", "tests", "budgets"}
    assert _marks(page) == {"claims", "planner_claims"}


def _marks(text):
    return {found[2] for found in tables.MARKED.finditer(text)}


@pytest.mark.parametrize("name", [name for name in BENCHES if harness.saved(name) is not None])
def test_kept_results_are_whole(name):
    """A kept result names its bench, its machine and its date, and its checks are judged as they would be now."""
    result = harness.saved(name)
    assert result.bench == name
    assert {"cpu", "cores", "python", "commit", "load_average_before", "load_average_after"} <= result.machine.keys()
    assert len(result.date.split("-")) == 3
    for each in result.checks:
        assert each == harness.check(each.name, each.value, each.unit, each.target, each.better)


@pytest.mark.parametrize("row", claims.CLAIMS, ids=lambda row: row.claim)
def test_every_claim_has_a_figure(row):
    """Every claim whose result is kept reads its figure from there."""
    found = harness.kept(row.result)
    if found is None:
        pytest.skip(f"bench/results/{row.result}.json is not kept yet")
    figure = row.figure(found)
    if not figure:
        pytest.skip(f"bench/results/{row.result}.json does not show it yet")
    assert any(letter.isdigit() for letter in figure)


def test_chart_is_an_image():
    """The chart is well-formed, and shows every arm of the kept result with its time."""
    result = harness.saved("ttft")
    drawn = ET.fromstring(chart.svg(result))  # noqa: S314  # we have just drawn it
    words = " ".join(each.text or "" for each in drawn.iter("{http://www.w3.org/2000/svg}text"))
    for name, row in result.details["arms"].items():
        assert name in words
        assert harness.quantity(row["median"], "s") in words
    assert result.machine["cpu"] in words
    assert result.date in words


def test_numbers_are_not_finer_than_they_are():
    """Kept figures have five digits."""
    assert harness.rounded({"a": [0.123456789, 1]}) == {"a": [0.12346, 1]}
    assert json.loads(json.dumps(harness.rounded(1 / 3))) == 0.33333
