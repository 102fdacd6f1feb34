"""`bench gateway` in a form too short to mean anything, and without the peers."""

from __future__ import annotations

import math
import shutil

import pytest

from bench import gateway
from bench.harness import Progress


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc on this machine, which compiles the load")
def test_gateway(monkeypatch):
    """`bench gateway` asks real gateways before instances of its own, and counts what they use."""
    for name, value in (("ROUNDS", 1), ("LOAD_SECONDS", 0.1), ("WARM_SECONDS", 0.05), ("IDLE_SECONDS", 0.1)):
        monkeypatch.setattr(gateway, name, value)
    monkeypatch.setattr(gateway, "FIRST_ROUNDS", 5)
    cases = [gateway.Case(size, stream, 4) for size, stream in ((120, False), (32_000, True))]
    monkeypatch.setattr(gateway, "CASES", cases)
    monkeypatch.setattr(gateway, "_starts", lambda: [gateway.ours])
    report = gateway.run(Progress("test"))
    assert math.isfinite(report.checks[0].value)
    assert len(report.details["cpu_seconds"]) == 2
    assert all(value > 0 for arms in report.details["cpu_seconds"].values() for value in arms.values())
