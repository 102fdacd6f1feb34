"""aiconfigurator as a peer of the planner, in a process of its own environment: a row per line in, a line out.

`make bench-planner-env` installs it there. It is asked with its own defaults: the latest version of the engine that it
has measurements of, and its "silicon" mode. What it cannot do is its own message.
"""

from __future__ import annotations

import json
import logging
import sys


def main() -> None:
    """Answer each line with what its tool estimates, in seconds, or with why it does not."""
    logging.disable(logging.CRITICAL)
    out, sys.stdout = sys.stdout, sys.stderr  # what the package prints is no answer
    from aiconfigurator.cli.api import cli_estimate

    for line in sys.stdin:
        asked = json.loads(line)
        try:
            found = cli_estimate(asked.pop("model_path"), asked.pop("system_name"), mode="agg", **asked)
            answer = {"first_seconds": float(found.ttft) / 1e3, "between_seconds": float(found.tpot) / 1e3}
        except Exception as error:  # noqa: BLE001  # whatever it raises is its answer
            words = str(error).strip().split("\n")[0]
            answer = {"refused": f"{type(error).__name__}: {words[:160]}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main()
