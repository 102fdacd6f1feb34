"""The benches in a form too short to mean anything, so that a change of what they reach into is seen at once."""

from __future__ import annotations

import math

import pytest

from bench import harness, keys, match, node, recovery, redis_tier, start, tiers_disk, tiers_memory
from bench.harness import Progress
from thermocline.demo import local_redis

MIB = 1024 * 1024


@pytest.fixture
def progress():
    """One that says nothing this early."""
    return Progress("test")


def _is_sound(report):
    assert report.checks
    assert all(math.isfinite(each.value) for each in report.checks)
    rows = [*report.details["arms"].values(), *report.details.get("ratios", {}).values()]
    assert all(row["low"] <= row["median"] <= row["high"] for row in rows)


def test_keys(monkeypatch, progress):
    """`bench keys` compares keys that are right: resumed ones, and those of the bare loop."""
    monkeypatch.setattr(keys, "ROUNDS", 3)
    _is_sound(keys.run(progress))


def test_match(monkeypatch, progress):
    """`bench match` asks a real store for paths that are held, half held and unknown."""
    for name, value in (("ROUNDS", 3), ("PATHS", 4), ("PATH_BLOCKS", 64)):
        monkeypatch.setattr(match, name, value)
    report = match.run(progress)
    _is_sound(report)
    assert report.details["index_blocks"] == 4 * 64


def test_start(monkeypatch, progress):
    """`bench start` starts what it says it starts."""
    monkeypatch.setattr(start, "ROUNDS", 1)
    monkeypatch.setenv("PYTHONPATH", str(harness.ROOT / "src"))
    _is_sound(start.run(progress))


def test_recovery(monkeypatch, progress):
    """`bench recovery` finds every block of the log that it wrote, in a process of its own."""
    monkeypatch.setattr(recovery, "ROUNDS", 1)
    monkeypatch.setattr(recovery, "BLOCKS", 5_000)
    monkeypatch.setenv("PYTHONPATH", str(harness.ROOT / "src"))
    _is_sound(recovery.run(progress))


def test_redis_tier(monkeypatch, progress):
    """`bench redis-tier` has all arms bring the same bytes from a server of its own."""
    if local_redis.installed() is None:
        pytest.skip("no redis-server on this machine (Debian: apt-get install redis-server)")
    monkeypatch.setattr(redis_tier, "ROUNDS", 1)
    monkeypatch.setattr(redis_tier, "SIZES", ((4, 64 * 1024, 4.0),))
    _is_sound(redis_tier.run(progress))


def test_memory(monkeypatch, progress):
    """`bench tiers` loads every block from memory, contiguous and scattered."""
    monkeypatch.setattr(tiers_memory, "ROUNDS", 1)
    monkeypatch.setattr(tiers_memory, "SET_BYTES", 16 * MIB)
    assert len(list(tiers_memory.run(progress))) == 4


def test_disk(monkeypatch, progress):
    """`bench tiers` fills a disk tier, turns it over, and loads from what is left, without losing a block."""
    for name, value in (("CAPACITY_BYTES", 64 * MIB), ("REQUEST_BYTES", 4 * MIB), ("SAVE_BYTES_MIN", MIB)):
        monkeypatch.setattr(tiers_disk, name, value)
    for name, value in (("FRESH_ROUNDS", 2), ("READ_ROUNDS", 2)):
        monkeypatch.setattr(tiers_disk, name, value)
    notes: list[str] = []
    assert len(list(tiers_disk.run(progress, notes))) == 8
    assert all(note.split("% full")[0] for note in notes)


def test_node(monkeypatch, progress):
    """`bench node` has a real node answer for all blocks of every path, alone and beside another engine."""
    for name, value in (("IDLE_ROUNDS", 20), ("LOADED_ROUNDS", 20), ("PATHS", 2), ("LOAD_PATHS", 3)):
        monkeypatch.setattr(node, name, value)
    _is_sound(node.run(progress))
