"""Reports as a browser lays them out, on a desktop and on a phone: Chromium itself is asked where everything lies."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess

import pytest

from tests.costs.test_sizing import asked
from tests.gateway.fleet import Light, free_port
from tests.lens.test_profile import swept
from thermocline.costs.sizing import size
from thermocline.lens import profile
from thermocline.lens.size import report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (390, 1280)
"""A phone and a desktop, in CSS pixels."""
MEASURE = """
<script>onload=()=>{document.title=JSON.stringify([...document.querySelectorAll('iframe')].map(frame=>{
const page=frame.contentDocument,all=[...page.querySelectorAll('svg')]
const inside=(part,whole)=>part.left>=whole.left-1&&part.right<=whole.right+1
&&part.top>=whole.top-1&&part.bottom<=whole.bottom+1
return{width:frame.clientWidth,scrolled:page.documentElement.scrollWidth,charts:all.length,
small:all.filter(each=>each.getBoundingClientRect().width<280).length,
cut:all.flatMap(each=>[...each.querySelectorAll('text')].filter(text=>!inside(text.getBoundingClientRect(),
each.getBoundingClientRect())).map(text=>text.textContent))}}))}</script>
"""


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    """Of each page and width: how wide it became, and what of its charts is cut off."""
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    folder = tmp_path_factory.mktemp("pictures")
    with Light(folder, "a", f"tcp://127.0.0.1:{free_port()}", 4096) as light:
        found, _ = swept(light.url)
    pages = {"size": report([size(asked()), size(asked(tp=2))]), "profile": profile.page(found)}
    frames = [
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{html.escape(text)}"></iframe>'
        for text in pages.values()
        for width in WIDTHS
    ]
    (folder / "all.html").write_text(f"<!doctype html><meta charset=utf-8>{''.join(frames)}{MEASURE}")
    words = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder / 'user'}",
        "--dump-dom",
    ]
    done = subprocess.run(
        [*words, (folder / "all.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    told = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert told, done.stderr
    names = [(name, width) for name in pages for width in WIDTHS]
    return dict(zip(names, json.loads(html.unescape(told[1])), strict=True))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["size", "profile"])
def test_pages_fit(laid_out, name, width):
    """No page is wider than the screen, its charts are there and large enough to read, and no word of them is cut."""
    found = laid_out[name, width]
    assert found["width"] == width
    assert found["scrolled"] <= width
    assert found["charts"] >= 3
    assert found["small"] == 0
    assert found["cut"] == []
