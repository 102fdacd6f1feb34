"""Metrics: counted exactly, shown in the Prometheus text format, bounded in number."""

from __future__ import annotations

import ast
import re
import threading
from pathlib import Path

import pytest

from thermocline import metrics
from thermocline.metrics import DECLARED, Metrics

SOURCE = Path(metrics.__file__).parent
LINE = re.compile(
    r'(# (HELP|TYPE) thermocline_[a-z_]+ .+|thermocline_[a-z_]+(\{([a-z]+="([^"\\]|\\.)*",?)+\})? [0-9.e+-]+)'
)


def test_text():
    """Every line of the text is HELP, TYPE or a series with its value, and HELP and TYPE come once, before them."""
    counters = Metrics()
    counters.count("load_bytes_total", 10, (("tier", "memory"),))
    counters.count("load_bytes_total", 5, (("tier", "disk"),))
    counters.count("load_bytes_total", 1, (("tier", "disk"),))
    counters.gauge("requests_in_flight", 3)
    lines = counters.text().splitlines()
    assert all(LINE.fullmatch(line) for line in lines)
    assert lines[1:4] == [
        "# TYPE thermocline_load_bytes_total counter",
        'thermocline_load_bytes_total{tier="disk"} 6',
        'thermocline_load_bytes_total{tier="memory"} 10',
    ]
    assert lines[-1] == "thermocline_requests_in_flight 3"


def test_large_counts_are_exact():
    """A counter of bytes stays exact beyond what short float notation can hold."""
    counters = Metrics()
    counters.count("load_bytes_total", (1 << 53) - 1, (("tier", "disk"),))
    assert str((1 << 53) - 1) in counters.text()


@pytest.mark.parametrize("name", DECLARED)
def test_declarations(name):
    """Every metric is a counter that ends in _total or a gauge that does not, and has a line of documentation."""
    metric = DECLARED[name]
    assert (metric.kind == "counter") == name.endswith("_total")
    assert metric.doc.endswith(".")


def test_undeclared():
    """A metric or label that is not in the table cannot be counted."""
    with pytest.raises(KeyError):
        Metrics().count("nonsense_total")
    with pytest.raises(KeyError):
        Metrics().count("load_bytes_total", 1, (("user", "x"),))


def test_what_is_counted_is_declared():
    """Every metric that the source counts is declared, and every declared one is counted somewhere."""
    counted = {
        node.args[0].value
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in {"count", "gauge", "observe"}
        and ast.unparse(node.func.value).endswith("metrics")
        and isinstance(node.args[0], ast.Constant)
    }
    assert counted | {"series_refused_total"} == set(DECLARED)


def test_escaping():
    """A label value cannot break out of its quotes."""
    counters = Metrics()
    counters.count("load_bytes_total", 1, (("tier", 'a"} 1\n\\'),))
    assert counters.text().splitlines()[2] == 'thermocline_load_bytes_total{tier="a\\"} 1\\n\\\\"} 1'


def test_bounded(monkeypatch):
    """However many label values arrive, the number of series stays bounded, and what is not shown is counted."""
    monkeypatch.setattr(metrics, "SERIES_MAX", 10)
    counters = Metrics()
    for number in range(100):
        counters.count("load_bytes_total", 1, (("tier", str(number)),))
    assert counters.value("series_refused_total") == 90
    assert counters.value("load_bytes_total", (("tier", "9"),)) == 1
    assert len([line for line in counters.text().splitlines() if not line.startswith("#")]) == 11


def test_threads():
    """Counts from several threads at once all arrive."""
    counters = Metrics()
    threads = [threading.Thread(target=_count_many, args=(counters,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counters.value("matches_total") == 20_000


def _count_many(counters: Metrics) -> None:
    for _ in range(5000):
        counters.count("matches_total")
