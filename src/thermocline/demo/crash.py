"""Chapter: a process killed in the middle of writing. `python -m thermocline.demo.crash` is that process."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from thermocline.blocks.frame import payload_sum
from thermocline.blocks.key import NO_PARENT, BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.clock import SystemClock
from thermocline.demo.chapter import Chapter, Claim
from thermocline.demo.screen import Screen
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.tier import Block, Outcome, Piece

MIB = 1024 * 1024
BLOCK_BYTES = 64 * 1024
CAPACITY_BYTES = 256 * MIB
KILLS = 6
BLOCKS_PER_SAVE = 8
SAVES_IN_FLIGHT = 4
ALIVE_SECONDS_MAX = 0.25
LAYOUT = LayoutId(b"demo".ljust(32, b"\0"))


def play(screen: Screen, folder: Path) -> Chapter:
    """Kill a writer six times, each time reopen what it left, and look for every block it had called durable."""
    screen.say(f"A child process writes blocks and prints how many of them are durable. SIGKILL, {KILLS} times:")
    random = np.random.default_rng(5)
    rows, lost, wrong = [], 0, 0
    for at in range(KILLS):
        place = folder / str(at)
        screen.working(f"kill {at + 1} of {KILLS}")
        durable = _killed(place, at, float(random.uniform(0, ALIVE_SECONDS_MAX)))
        found = _reopened(place, at, durable)
        screen.worked()
        rows.append([str(at + 1), f"{durable:,}", f"{found.held:,}", str(found.wrong), str(found.lost)])
        lost, wrong = lost + found.lost, wrong + found.wrong
    screen.table(["kill", "called durable", "found after reopening", "wrong", "lost"], rows, right=range(1, 5))
    verdict = f"{wrong} wrong blocks, {lost} durable blocks lost in {KILLS} kills"
    figure = f"{KILLS} SIGKILLs: {wrong} wrong, {lost} lost"
    claim = Claim("taken for granted: a cache on disk survives a crash", figure, "make test")
    details = {"kills": KILLS, "wrong": wrong, "lost": lost}
    return Chapter(lost == 0 and wrong == 0, verdict, claim, details)


class _Found(NamedTuple):
    """What a reopened tier gave."""

    held: int
    wrong: int
    lost: int


def _killed(folder: Path, seed: int, alive_seconds: float) -> int:
    """Let a writer live for a while after its first durable blocks, kill it; how many blocks it called durable."""
    words = [sys.executable, "-m", "thermocline.demo.crash", str(folder), str(seed)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        first = child.stdout.readline()
        SystemClock().sleep(alive_seconds)
        child.kill()
        said = first + child.stdout.read()
    whole = said[: said.rfind("\n") + 1]  # the last line may have been cut off by the kill
    return max((int(line) for line in whole.splitlines()), default=0)


def _reopened(folder: Path, seed: int, durable: int) -> _Found:
    """Load every block that there may be, and compare it with what was written."""
    tier = DiskTier(folder, CAPACITY_BYTES)
    numbers = range(CAPACITY_BYTES // BLOCK_BYTES)
    keys = [_key(seed, number) for number in numbers]
    held = [number for number, there in zip(numbers, tier.holds(LAYOUT, keys), strict=True) if there]
    into = np.zeros((len(held), BLOCK_BYTES), np.uint8)
    outcomes = tier.load(LAYOUT, [keys[number] for number in held], [[row] for row in into], math.inf)
    tier.check_integrity()
    tier.close()
    hits = [(number, row) for number, row, outcome in zip(held, into, outcomes, strict=True) if outcome is Outcome.HIT]
    wrong = sum(not np.array_equal(row, _payload(seed, number)) for number, row in hits)
    lost = len(set(range(durable)) - {number for number, _ in hits})
    return _Found(len(hits), wrong, lost)


def _key(seed: int, number: int) -> BlockKey:
    return BlockKey(hashlib.sha256(b"%d/%d" % (seed, number)).digest())


def _payload(seed: int, number: int) -> Piece:
    return np.frombuffer(np.random.default_rng([seed, number]).bytes(BLOCK_BYTES), np.uint8)


def write_until_killed(folder: Path, seed: int) -> None:
    """The child: save, and print how many blocks are durable so far. Ends when the tier is full."""
    tier = DiskTier(folder, CAPACITY_BYTES)
    jobs = []
    for first in count(0, BLOCKS_PER_SAVE):
        numbers = range(first, first + BLOCKS_PER_SAVE)
        payloads = [_payload(seed, number) for number in numbers]
        blocks = [Block(NO_PARENT, 1, [payload], payload_sum([payload])) for payload in payloads]
        jobs.append((first, tier.save(LAYOUT, [_key(seed, number) for number in numbers], blocks)))
        if len(jobs) == SAVES_IN_FLIGHT:
            start, job = jobs.pop(0)
            job.wait()
            if set(job.outcomes) != {Outcome.HIT}:
                break
            print(start + BLOCKS_PER_SAVE, flush=True)
    SystemClock().sleep(60)


if __name__ == "__main__":
    write_until_killed(Path(sys.argv[1]), int(sys.argv[2]))
