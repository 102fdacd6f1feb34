"""aiconfigurator as a peer of the planner, in a process of its own environment: a row per line in, a line out.

`make bench-planner-env` installs it there. It is asked with its own defaults: the latest version of the engine that it
has measurements of, and its "silicon" mode. What it cannot do is its own message.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Answer each line with what its tool estimates, in seconds, or with why it does not."""
    logging.disable(logging.CRITICAL)
    out, sys.stdout = sys.stdout, sys.stderr  # what the package prints is no answer
    from aiconfigurator.cli.api import cli_estimate

    for line in sys.stdin:
        out.write(json.dumps(answer(cli_estimate, **json.loads(line))) + "\n")
        out.flush()


def answer(
    estimate: Callable[..., Any], model_path: str, system_name: str, modes: dict[str, str], **asked: object
) -> dict[str, Any]:
    """Its estimate with the modes of the row, else with fp8 in blocks, else with those that it finds in the model."""
    blocks = {name: "fp8_block" if mode == "fp8" else mode for name, mode in modes.items()}
    refused = ""
    for tried in (modes, blocks, {}):
        try:
            found = estimate(model_path, system_name, mode="agg", **asked, **tried)
        except Exception as error:  # noqa: BLE001  # whatever it raises is its answer
            words = str(error).strip().partition("\n")[0].partition(" at /")[0].partition(" for MoeKey")[0]
            refused = refused or f"{type(error).__name__}: {words[:100]}"
        else:
            return {"first_seconds": float(found.ttft) / 1e3, "between_seconds": float(found.tpot) / 1e3}
    return {"refused": refused}


if __name__ == "__main__":
    main()
