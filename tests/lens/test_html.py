"""A page that needs nothing else."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

from thermocline.lens.chart import Axis, Series, line_chart
from thermocline.lens.figures import Table
from thermocline.lens.html import Section, page

BAD = '<script>alert("&")</script>'


def test_words_are_text():
    """Whatever is shown is text: no name of a model or file can add to the page."""
    table = Table(BAD, (BAD, BAD), [(BAD, BAD)], BAD)
    found = page(BAD, [BAD], [Section(BAD, [BAD], (), [table], [BAD])], BAD)
    assert "<script" not in found
    assert found.count("&lt;script&gt;") == 13


def test_nothing_comes_from_elsewhere():
    """The page has no script, no link and nothing that is fetched; it is well-formed, and fits a phone."""
    chart = line_chart("t", [Series("a", [(0, 1), (1, 2)])], Axis("x"), Axis("y"))
    found = page("t", ["so"], [Section("h", ["p"], [chart], [Table("t", ("a", "b"), [("c", "1")])])])
    assert not re.search(r"<(?:script|link|img|iframe)|https?://(?!www\.w3\.org/2000/svg)|url\(|@import", found)
    assert "width=device-width" in found
    body = found[found.index("<body>") : found.index("</html>")]
    assert ET.fromstring(body).find(".//{http://www.w3.org/2000/svg}polyline") is not None  # noqa: S314  # our own


def test_a_table_as_text():
    """A table as text is aligned: words to the left, numbers to the right, the note below."""
    table = Table("sizes", ("model", "bytes"), [("a", "12"), ("long name", "3")], "of one token")
    assert table.text() == "sizes\n  model      bytes\n  a             12\n  long name      3\n  of one token"
