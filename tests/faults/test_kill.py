"""SIGKILL in the middle of writing: 0 wrong bytes, 0 durable blocks lost, 0 files left over, the quota kept."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading

import pytest

from tests.conformance.samples import chain, hits, load
from tests.faults.shelter import Shelter
from tests.faults.writing import CAPACITY, LAYOUT, LENGTH
from thermocline.tiers import journal
from thermocline.tiers.directory import LOG_FILE
from thermocline.tiers.tier import Outcome

DELAY_SECONDS_MAX = 0.08
HELD_BEFORE_ROOM_MAX = 60


def _run_and_kill(path, first, delay_seconds):
    """Start a writer, kill it some time after its first word, and return its words."""
    command = [sys.executable, "-m", "tests.faults.writing", str(path), str(first)]
    environment = {**os.environ, "PYTHONPATH": ":".join([".", *sys.path])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as child:
        words = child.stdout.readline()
        timer = threading.Timer(delay_seconds, child.kill)
        timer.start()
        words += child.stdout.read()
        timer.join()
    assert child.returncode == -signal.SIGKILL, "it ended by itself"
    lines = words.split(b"\n")[:-1]  # the last one may be half a word
    return [(word.decode(), int(seed), int(count)) for word, seed, count in map(bytes.split, lines)]


@pytest.mark.matrix("killed while writing", "disk")
@pytest.mark.parametrize("kills", [50, pytest.param(1_000, marks=pytest.mark.faults_long)])
def test_kills_while_writing(tmp_path, kills, cases):
    """After each kill the next opening has every durable block, exact, and of the others exact ones or none."""
    shelter = Shelter(tmp_path / "tier", CAPACITY)
    rng = random.Random(kills)  # noqa: S311  # when to kill
    durable: dict[int, int] = {}
    acknowledged = compacted = 0
    size_before = 0
    for kill in range(kills):
        doubtful: dict[int, int] = {}
        for word, seed, count in _run_and_kill(shelter.path, 1_000_000 * kill, rng.uniform(0, DELAY_SECONDS_MAX)):
            if word == "durable":
                durable[seed] = count
                acknowledged += count
            else:
                doubtful[seed] = durable.pop(seed)
        tier = shelter.open()
        shelter.is_tidy(tier)
        for seed, count in durable.items():
            assert hits(load(tier, LAYOUT, chain(seed, count), LENGTH)) == count, "a durable block is lost"
        for part in tier.found():
            assert set(load(tier, part.layout, part.keys, LENGTH)) == {Outcome.HIT}, "what is found is whole"
        for seed, count in doubtful.items():
            assert set(load(tier, LAYOUT, chain(seed, count), LENGTH)) <= {Outcome.HIT, Outcome.MISS}
        _make_room(tier, durable)
        shelter.goes_on(tier)
        tier.close()
        size = (shelter.path / LOG_FILE).stat().st_size
        compacted += size < size_before
        size_before = size
        assert journal.read(shelter.path / LOG_FILE).bad_inside == 0
    assert acknowledged > 10 * kills, "hardly anything was written"
    assert compacted, "the log was never compacted in between"
    cases(kills)


def _make_room(tier, durable):
    """Keep some of the durable blocks for the next rounds, and give up all that nobody promised."""
    while len(durable) > HELD_BEFORE_ROOM_MAX:
        seed = next(iter(durable))
        tier.remove(LAYOUT, chain(seed, durable.pop(seed)))
    kept = {key for seed, count in durable.items() for key in chain(seed, count)}
    shelf = tier._shelves.get(LAYOUT)
    tier.remove(LAYOUT, [key for key in (shelf.entries if shelf else ()) if key not in kept])
