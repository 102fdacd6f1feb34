"""Charts as SVG, and numbers as people read them."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.lens import figures
from thermocline.lens.chart import HEIGHT, WIDTH, Axis, Bar, Series, bar_chart, line_chart

NAME = "{http://www.w3.org/2000/svg}"
numbers = st.floats(0, 1e15)
points = st.lists(st.tuples(numbers, numbers), max_size=30).map(sorted)


def read(chart):
    """The chart as a tree; and no number in it is out of its frame."""
    tree = ET.fromstring(chart)  # noqa: S314  # our own
    assert tree.tag == f"{NAME}svg"
    width, height = float(tree.get("width")), float(tree.get("height"))
    assert tree.get("viewBox") == f"0 0 {width:.0f} {height:.0f}"
    assert (width, height >= 40) == (WIDTH, True)
    for each in tree.iter():
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= float(each.get(name, 0)) <= width
        for name in ("y", "y1", "y2", "cy"):
            assert 0 <= float(each.get(name, 0)) <= height
    return tree


@given(st.lists(points, max_size=7), st.booleans(), st.booleans(), st.lists(numbers, max_size=3))
def test_lines_stay_in_their_frame(lines, across, up, marks):
    """Whatever the values, a chart of lines is well-formed and nothing of it lies outside."""
    series = [Series(f"line {at}", line) for at, line in enumerate(lines)]
    named = [(f"mark {at}", value) for at, value in enumerate(marks)]
    tree = read(line_chart("title", series, Axis("x", log=across), Axis("y", log=up), named))
    found = tree.findall(f"{NAME}polyline")
    assert len(found) == len(lines)
    for line in found:
        for point in line.get("points").split():
            left, top = map(float, point.split(","))
            assert 0 <= left <= WIDTH
            assert 0 <= top <= HEIGHT + 400


@given(st.lists(st.lists(numbers, max_size=5), max_size=8), st.lists(numbers, max_size=2))
def test_bars_stay_in_their_frame(rows, marks):
    """Whatever the values, a chart of bars is well-formed; each bar is as long as its parts together."""
    bars = [Bar(f"row {at}", [(f"part {n}", value) for n, value in enumerate(row)]) for at, row in enumerate(rows)]
    tree = read(bar_chart("title", bars, Axis("x"), [("mark", value) for value in marks]))
    found = tree.findall(f"{NAME}rect")[1:]
    assert len(found) == sum(map(len, rows))
    for each in found:
        assert float(each.get("x")) + float(each.get("width")) <= WIDTH


def test_lines_are_in_proportion():
    """Twice as much is twice as high; on a logarithmic axis a factor is a distance."""
    tree = read(line_chart("t", [Series("a", [(1, 0), (10, 5), (100, 10)])], Axis("x", log=True), Axis("y")))
    line = tree.find(f"{NAME}polyline").get("points").split()
    places = [tuple(map(float, point.split(","))) for point in line]
    assert places[1][0] - places[0][0] == pytest.approx(places[2][0] - places[1][0], abs=0.2)
    assert places[0][1] - places[1][1] == pytest.approx(places[1][1] - places[2][1], abs=0.2)


def test_words_are_escaped():
    """What is shown is text: names cannot add to the page."""
    bad = '<script>alert("&")</script>'
    for chart in (
        line_chart(bad, [Series(bad, [(1, 1)])] * 2, Axis(bad), Axis(bad), [(bad, 1)]),
        bar_chart(bad, [Bar(bad, [(bad, 1.0), ("b", 1.0)])], Axis(bad), [(bad, 1)]),
    ):
        assert "<script" not in chart
        assert bad in "".join(read(chart).itertext())


def test_colours_follow_the_reader():
    """A chart has colours for light and dark, and needs nothing from elsewhere."""
    chart = line_chart("t", [Series("a", [(0, 1)])], Axis("x"), Axis("y"))
    assert "prefers-color-scheme:dark" in chart
    assert "url(" not in chart
    assert "href" not in chart


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (figures.count, 0, "0"),
        (figures.count, 999, "999"),
        (figures.count, 32768, "32.8k"),
        (figures.nbytes, 262144, "262 kB"),
        (figures.nbytes, 65.53e9, "65.5 GB"),
        (figures.nbytes, 1.2e12, "1.2 TB"),
        (figures.seconds, 0, "0 s"),
        (figures.seconds, 4.5e-6, "4.5 us"),
        (figures.seconds, 0.0234, "23.4 ms"),
        (figures.seconds, 119, "119 s"),
        (figures.seconds, 600, "10 min"),
        (figures.seconds, 1e-9, "0.001 us"),
        (figures.share, 0.3736, "37.4 %"),
        (figures.percent, 0.3736, "37 %"),
        (figures.dollars, 0.0031, "$0.0031"),
        (figures.dollars, 2.95, "$2.95"),
        (figures.dollars, 4260, "$4,260"),
    ],
)
def test_figures(show, value, text):
    """Numbers are written as people read them."""
    assert show(value) == text
