"""What a start costs over the interpreter's own: fresh processes, taking turns."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from bench.harness import Progress, Report, check, interleaved, spread

ROUNDS = 41


def run(progress: Progress) -> Report:
    """`import thermocline` and `thermocline --help`, each minus a bare interpreter of the same round."""
    arms = {
        "bare python": _process("-c", "pass"),
        "import thermocline": _process("-c", "import thermocline"),
        "thermocline --help": _process("-m", "thermocline", "--help"),
    }
    seconds = interleaved(arms, rounds=ROUNDS, warmup=2, progress=progress)
    bare, imported, helped = seconds.values()
    over = {
        "import thermocline, over bare python": spread([a - b for a, b in zip(imported, bare, strict=True)]),
        "thermocline --help, over bare python": spread([a - b for a, b in zip(helped, bare, strict=True)]),
    }
    checks = [
        check(name, row["median"], "s", target, "lower")
        for (name, row), target in zip(over.items(), (0.050, 0.100), strict=True)
    ]
    return Report(checks, {"arms": {name: spread(values) for name, values in seconds.items()} | over})


def _process(*words: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
