"""The `thermocline` command. One verb is one function, and imports what it needs inside: `--help` loads no torch.

Rooms that may not know each other meet in a verb. Importing these modules is what makes their verbs known.
"""

from thermocline.cli import look, plan, proof, run
from thermocline.cli.app import EXIT_CODES, FAILED, INTERRUPTED, OK, USAGE, app, main

__all__ = ["EXIT_CODES", "FAILED", "INTERRUPTED", "OK", "USAGE", "app", "look", "main", "plan", "proof", "run"]
