"""What starting must not load. The milliseconds are measured by `thermocline bench start`."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "tokenizers", "redis", "zmq", "numpy", "msgspec", "rich", "asyncio", "httptools"}
RUN = """
import sys
from contextlib import suppress
{statement}
print(*sorted(set(m.partition(".")[0] for m in sys.modules)), file=sys.stderr)
"""
HELP = "from thermocline.cli import main\nwith suppress(SystemExit): main({arguments})"


def _loaded(statement: str) -> set[str]:
    run = [sys.executable, "-c", RUN.format(statement=statement)]
    return set(subprocess.run(run, capture_output=True, text=True, check=True).stderr.split())


def test_import_loads_nothing():
    """`import thermocline` loads no package but itself, and of itself only the list of names."""
    assert _loaded("import thermocline") - _loaded("import __future__") == {"thermocline"}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["config"], ["--version"], ["srve"]], ids=" ".join
)
def test_light_verbs_load_nothing_heavy(arguments):
    """Help, version, a mistyped verb and `config` answer without loading torch, numpy or asyncio."""
    assert not _loaded(HELP.format(arguments=arguments)) & HEAVY
