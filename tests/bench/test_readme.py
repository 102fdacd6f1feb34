from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOORS = re.compile(r"^\| `(?:src/thermocline/)?([\w/]+\.py)` \| (`[\w.]+`) \| (.*) \|$", re.MULTILINE)


def _python() -> str:
    found = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    assert len(found) == 1
    return found[0]


@pytest.mark.slow
def test_python_of_the_readme_runs(tmp_path):
    """The Python of README runs word for word, in a folder where nothing is: same answer, loaded from memory."""
    pytest.importorskip("torch", reason="the example needs torch, which is not installed")
    paths = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", _python()], cwd=tmp_path, env=paths, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"same answer: True - loaded: \{'memory': \d+\}\n", done.stdout)
    assert (tmp_path / "cache").is_dir()


def test_python_of_the_readme_is_eight_lines():
    """It stays eight lines."""
    assert len(_python().strip().splitlines()) == 8


def test_first_screen():
    """One sentence, the chart and the first command stand before anything else, and there are no badges."""
    head = README.partition("## ")[0]
    assert head.index("docs/assets/ttft.svg") < head.index("$ make demo")
    assert "shields.io" not in README
    assert README.count("![") == 1


def test_doors_are_those_of_the_documentation():
    """Reading the source names the same seventeen doors in README and in the documentation."""
    page = (ROOT / "docs" / "internals" / "reading-the-source.md").read_text()
    assert len(DOORS.findall(README)) == 17
    assert DOORS.findall(README) == DOORS.findall(page)
