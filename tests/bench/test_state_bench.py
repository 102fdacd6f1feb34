"""`bench state` in a form too short to mean anything."""

from __future__ import annotations

import math

import pytest

from bench import state
from bench.harness import Progress
from thermocline.demo import local_redis


def test_state(monkeypatch):
    """`bench state` has all arms read the same values from a server of its own, and says each lookup of each arm."""
    if local_redis.installed() is None:
        pytest.skip("no redis-server on this machine (Debian: apt-get install redis-server)")
    monkeypatch.setattr(state, "SIZES", {"1 KB": (1024, 6)})
    report = state.run(Progress("test"))
    assert len(report.checks) == 4
    assert all(math.isfinite(each.value) for each in report.checks)
    assert all(row["low"] <= row["median"] <= row["high"] for row in report.details["arms"].values())
    lookups = report.details["lookups"]
    assert {*lookups["1 KB: ours, warm"]} == {*state.LOOKUPS, "total"}
    assert state.lookups(report.details).count("\n| ") == len(lookups)
