"""A medium without room: blocks are dropped and counted, nothing else is lost, and the quota is never exceeded."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.conformance.samples import CLOCK, PATIENCE_SECONDS, chain, fill, hits, layout_of, load, save
from tests.faults.shelter import Shelter, disk_bytes
from thermocline.tiers import disk, journal
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.tier import Outcome

MIB = 1 << 20
LENGTH = 60_000
LAYOUT = layout_of("a", LENGTH)


@contextlib.contextmanager
def _small_file_system(path, size):
    """A file system of this many bytes; needs root."""
    path.mkdir()
    mount, umount = shutil.which("mount"), shutil.which("umount")
    options = ["-t", "tmpfs", "-o", f"size={size}", "thermocline-test", str(path)]
    if not mount or not umount or subprocess.run([mount, *options], capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system; the limit on file sizes stands in for it")
    try:
        yield path
    finally:
        subprocess.run([umount, "-l", str(path)], check=True)


def _fill_up(file):
    """Take the last byte of a file system."""
    with file.open("wb", buffering=0) as out:
        for size in (MIB, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    out.write(bytes(size))


def _pour(tier, chains):
    """Save chains; returns the keys that went in, and every outcome seen."""
    held, seen = [], []
    for keys in chains:
        job = save(tier, LAYOUT, keys, LENGTH)
        seen += job.outcomes
        held += [key for key, outcome in zip(keys, job.outcomes, strict=True) if outcome is Outcome.HIT]
    return held, seen


@pytest.mark.matrix("full", "disk")
def test_a_file_system_that_is_smaller_than_the_quota(tmp_path):
    """On 24 MiB with a quota of 64 MiB, saves are dropped, what went in is exact, and a restart finds all of it."""
    with _small_file_system(tmp_path / "small", 24 * MIB) as path:
        tier = DiskTier(path / "tier", 64 * MIB, queue_bytes_max=4 * MIB)
        held, seen = _pour(tier, (chain(seed, 16) for seed in range(40)))
        assert set(seen) <= {Outcome.HIT, Outcome.FULL, Outcome.LATE, Outcome.FAILED}
        assert {Outcome.FULL, Outcome.LATE} & set(seen)
        assert hits(load(tier, LAYOUT, held, LENGTH)) == len(held) > 50
        tier.check_integrity()
        assert tier.remove(LAYOUT, held[:10]) == 10
        assert hits(save(tier, LAYOUT, chain(99, 10), LENGTH).outcomes) == 10, "room that was given back is used"
        assert hits(load(tier, LAYOUT, held[10:], LENGTH)) == len(held) - 10
        tier.close()
        again = DiskTier(path / "tier", 64 * MIB, queue_bytes_max=4 * MIB)
        assert hits(load(again, LAYOUT, held[10:], LENGTH)) == len(held) - 10
        assert not any(again.holds(LAYOUT, held[:10]))
        again.check_integrity()
        again.close()


@pytest.mark.matrix("full", "disk")
def test_a_file_system_that_somebody_else_fills(tmp_path, monkeypatch):
    """When the last byte is gone even the log cannot grow: saves are dropped, loads go on; with room, saves too."""
    monkeypatch.setattr(disk, "GROW_RETRY_SECONDS", 0.0)
    monkeypatch.setattr(journal, "AHEAD_BYTES", 0)
    with _small_file_system(tmp_path / "small", 48 * MIB) as path:
        tier = DiskTier(path / "tier", 24 * MIB, queue_bytes_max=4 * MIB)
        held, _ = _pour(tier, (chain(seed, 4) for seed in range(10)))
        assert len(held) == 40
        filler = path / "filler"
        _fill_up(filler)
        dropped, seen = _pour(tier, (chain(100 + seed, 4) for seed in range(10)))
        assert Outcome.FAILED in seen or Outcome.FULL in seen
        assert hits(load(tier, LAYOUT, held + dropped, LENGTH)) == len(held) + len(dropped)
        tier.check_integrity()
        filler.unlink()
        deadline = CLOCK.now() + PATIENCE_SECONDS
        while hits(save(tier, LAYOUT, chain(200, 4), LENGTH).outcomes) < 4:
            assert CLOCK.now() < deadline, "room came back, and the tier does not use it"
        held += dropped + chain(200, 4)
        tier.close()
        again = DiskTier(path / "tier", 24 * MIB)
        assert hits(load(again, LAYOUT, held, LENGTH)) == len(held)
        again.close()


@pytest.mark.matrix("full", "disk")
def test_opening_without_any_room(tmp_path):
    """A full file system under a tier that was closed in order loses nothing at the next opening."""
    with _small_file_system(tmp_path / "small", 32 * MIB) as path:
        tier = DiskTier(path / "tier", 24 * MIB, queue_bytes_max=4 * MIB)
        held, _ = _pour(tier, (chain(seed, 4) for seed in range(10)))
        tier.close()
        _fill_up(path / "filler")
        for _ in range(2):
            again = DiskTier(path / "tier", 24 * MIB)
            assert hits(load(again, LAYOUT, held, LENGTH)) == len(held) == 40
            again.check_integrity()
            again.close()


LIMITED = """
import json, resource, sys
from pathlib import Path
from tests.conformance.samples import chain, hits, layout_of, load, save
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.tier import Outcome

path, limit, length = Path(sys.argv[1]), int(sys.argv[2]), 60_000
layout = layout_of("a", length)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
tier = DiskTier(path, 64 << 20, queue_bytes_max=4 << 20)
held, seen = [], set()
for seed in range(80):
    keys = chain(seed, 4)
    job = save(tier, layout, keys, length)
    seen.update(job.outcomes)
    held += [seed] if hits(job.outcomes) == 4 else []
loaded = sum(hits(load(tier, layout, chain(seed, 4), length)) for seed in held)
tier.check_integrity()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
tier.close()
print(json.dumps({"held": held, "loaded": loaded, "seen": sorted(seen)}))
"""


@pytest.mark.matrix("full", "disk")
@pytest.mark.parametrize("limit", [100_000, 4 * MIB], ids=["hardly a frame", "no further segment"])
def test_a_limit_on_file_sizes(tmp_path, limit):
    """Files that the system does not let grow are like a full disk: blocks are dropped, what is held is exact."""
    shelter = Shelter(tmp_path / "tier", 64 * MIB)
    shelter.fill(LAYOUT, [chain(1000 + seed, 1) for seed in range(20)], LENGTH)
    child = subprocess.run(
        [sys.executable, "-c", LIMITED, str(shelter.path), str(limit)],
        env={**os.environ, "PYTHONPATH": ":".join([".", *sys.path])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    told = json.loads(child.stdout)
    assert told["loaded"] == 4 * len(told["held"])
    assert set(told["seen"]) & {"full", "failed"}
    assert set(told["seen"]) <= {"hit", "full", "failed", "late"}
    tier = shelter.open()
    shelter.survives(tier, [])
    for seed in told["held"]:
        assert hits(load(tier, LAYOUT, chain(seed, 4), LENGTH)) == 4
    tier.close()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("memory", marks=[pytest.mark.matrix(fault, "memory") for fault in ("full", "quota")]),
        pytest.param("disk", marks=pytest.mark.matrix("quota", "disk")),
    ],
)
def test_a_full_quota(tmp_path, kind, cases):
    """At the quota a tier says FULL, holds what it has, never exceeds it, and takes as much as is removed."""
    tier = MemoryTier(16 * MIB) if kind == "memory" else DiskTier(tmp_path / "tier", 16 * MIB, queue_bytes_max=2 * MIB)

    def within():
        usage = tier.usage()
        assert usage.used_bytes <= usage.capacity_bytes == 16 * MIB
        if kind == "disk":
            assert disk_bytes(tmp_path / "tier") <= 16 * MIB

    held = fill(tier, LAYOUT, LENGTH, observe=within)
    assert len(held) * LENGTH > 12 * MIB
    for turn in range(5):
        gone, held = held[:20], held[20:]
        assert tier.remove(LAYOUT, gone) == 20
        taken = 0
        deadline = CLOCK.now() + PATIENCE_SECONDS
        while taken < 20:
            keys = chain((turn, taken), 20 - taken)
            job = save(tier, LAYOUT, keys, LENGTH)
            held += [key for key, outcome in zip(keys, job.outcomes, strict=True) if outcome is Outcome.HIT]
            taken += hits(job.outcomes)
            assert CLOCK.now() < deadline
        within()
    assert hits(load(tier, LAYOUT, held, LENGTH)) == len(held)
    tier.check_integrity()
    tier.close()
    cases(len(held))
