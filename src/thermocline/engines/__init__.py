"""Who computes: engines, and the HTTP API in front of them. The only room that imports torch."""

from __future__ import annotations

import os

# OpenMP's threads wait for each other dozens of times per token. By default they spin, and where anything else wants
# their core, every wait costs a time slice: a token took 240 ms instead of 25 beside one busy process on two cores.
# Sleeping at once costs 2 ms per token on an idle machine. It is read when torch is loaded, hence here.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
