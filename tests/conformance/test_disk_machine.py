"""A disk tier against a plain dictionary, with bits flipped, logs cut and processes killed in between."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.conformance.faulty import flip, where
from tests.conformance.samples import PATIENCE_SECONDS, chain, layout_of, load, save
from thermocline.tiers.check import Repairs
from thermocline.tiers.directory import LOG_FILE
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.repair import repair_path
from thermocline.tiers.tier import Outcome

CAPACITY = 2 << 20
LENGTHS = {layout_of("a", 5000): 5000, layout_of("b", 5000): 5000, layout_of("c", 9000): 9000}
LAYOUTS = list(LENGTHS)
NOTHING = Repairs(corrupt=0, orphans=0, void=0, restored=0, log_pages=0, files=0)
PATHS = [chain(seed, 12) for seed in range(4)]
names = st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(0, 11), st.integers(1, 12))
"""Layout, path, first block, number of blocks."""


def _named(name):
    layout, path, start, count = name
    return LAYOUTS[layout], PATHS[path][start : start + count], PATHS[path][:start]


def _path_to(layout, key):
    [path] = (path for path in PATHS if key in path)
    return {(layout, above) for above in path[: path.index(key)]}


class DiskMachine(RuleBasedStateMachine):
    """`held` must be a HIT, except for `suspect`: a bit of it was flipped, or the log lost where it lies now.

    With `ghosts`, damage to the log may have brought back what was removed; then it must be right.
    """

    @initialize()
    def start(self):
        self.folder = Path(tempfile.mkdtemp(prefix="thermocline-test-"))
        self.number = 0
        self.held: set[tuple[bytes, bytes]] = set()
        self.suspect: set[tuple[bytes, bytes]] = set()
        self.log_damaged = False
        self.ghosts = False
        self.tier = DiskTier(self.path, CAPACITY)

    @property
    def path(self):
        return self.folder / str(self.number)

    def teardown(self):
        if hasattr(self, "tier"):
            self.tier.close()
            shutil.rmtree(self.folder)

    @rule(name=names)
    def save(self, name):
        layout, keys, before = _named(name)
        job = save(self.tier, layout, keys, LENGTHS[layout], before=before)
        assert set(job.outcomes) <= {Outcome.HIT, Outcome.FULL, Outcome.LATE}
        for key, outcome in zip(keys, job.outcomes, strict=True):
            if outcome is Outcome.HIT:
                self.held.add((layout, key))
                self.suspect.discard((layout, key))

    @rule(name=names)
    def remove(self, name):
        layout, keys, _ = _named(name)
        expected = {(layout, key) for key in keys} & self.held
        removed = self.tier.remove(layout, keys)
        assert removed == len(expected) or (self.ghosts and removed > len(expected))
        self.held -= expected
        self.suspect -= expected

    @rule(name=names)
    def load(self, name):
        layout, keys, _ = _named(name)
        self._load(layout, keys)

    @rule()
    def load_everything(self):
        for layout in LAYOUTS:
            for path in PATHS:
                self._load(layout, path)

    def _load(self, layout, keys):
        for key, outcome in zip(keys, load(self.tier, layout, keys, LENGTHS[layout]), strict=True):
            name = (layout, key)
            if outcome is Outcome.HIT:
                assert name in self.held or self.ghosts, "a block that was never saved, or removed"
                self.held.add(name)
                self.suspect.discard(name)
                continue
            assert name not in self.held or name in self.suspect, f"lost a block: {outcome}"
            assert outcome is (Outcome.CORRUPT if name in self.held else Outcome.MISS) or self.ghosts
            self.held.discard(name)
            self.suspect.discard(name)

    @rule()
    def reopen(self):
        self.tier.close()
        self._open()

    @rule()
    def kill(self):
        """A process that dies leaves the files as they are; what was durable is there for the next one."""
        assert self.tier.wait_idle(PATIENCE_SECONDS)
        before = self.path
        self.number += 1
        shutil.copytree(before, self.path)
        self.tier.close()
        shutil.rmtree(before)
        self._open()

    @rule()
    def repair(self):
        """What was whole and hangs together is kept; all that is there afterwards is right, and nothing is left to do.

        What a damaged log forgot of removals may come back.
        """
        self.tier.close()
        sound = self.held - self.suspect
        sound = {name for name in sound if sound >= _path_to(*name)}
        assert repair_path(self.path).ok
        assert repair_path(self.path).repaired == NOTHING
        self.tier = DiskTier(self.path, CAPACITY)
        found = {(part.layout, key) for part in self.tier.found() for key in part.keys}
        for layout, key in found:
            assert set(load(self.tier, layout, [key], LENGTHS[layout])) == {Outcome.HIT}
        assert sound <= found or self.log_damaged
        self.ghosts = self.ghosts or not found <= self.held
        self.held, self.suspect, self.log_damaged = found, set(), False

    def _open(self):
        self.tier = DiskTier(self.path, CAPACITY)
        found = {(part.layout, key) for part in self.tier.found() for key in part.keys}
        assert all(self.tier.holds(layout, [key])[0] for layout, key in found)
        if self.log_damaged:  # records were lost: blocks with them, and removals
            self.held &= found
            self.suspect |= self.held
            self.ghosts = True
        assert self.held <= found
        assert found == self.held or self.ghosts
        self.suspect &= self.held
        self.log_damaged = False

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def flip_a_block(self, data):
        layout, key = data.draw(st.sampled_from(sorted(self.held)))
        if not self.tier.holds(layout, [key])[0]:
            return
        segment, offset, length = where(self.tier, layout, key)
        flip(segment, offset + data.draw(st.integers(0, 4096 + length - 1)), data.draw(st.integers(0, 7)))
        self.suspect.add((layout, key))

    @rule(at=st.integers(0, CAPACITY), bit=st.integers(0, 7), number=st.integers(0, 3))
    def flip_anything(self, at, bit, number):
        """Any bit of any segment, in use or not."""
        segment = self.path / f"{number:06d}.segment"
        if not segment.exists():
            return
        at %= segment.stat().st_size
        for name in self.held:
            place, offset, length = where(self.tier, *name)
            if place == segment and offset <= at < offset + 4096 + length:
                self.suspect.add(name)
        flip(segment, at, bit)

    @rule(at=st.integers(0, 1 << 20), bit=st.integers(0, 7))
    def flip_the_log(self, at, bit):
        log = self.path / LOG_FILE
        assert self.tier.wait_idle(PATIENCE_SECONDS)
        if log.stat().st_size:
            flip(log, at % log.stat().st_size, bit)
            self.log_damaged = True

    @rule(at=st.integers(0, 1 << 20))
    def cut_the_log(self, at):
        self.tier.close()
        log = self.path / LOG_FILE
        if log.stat().st_size:
            os.truncate(log, at % log.stat().st_size)
            self.log_damaged = True
        self._open()

    @invariant()
    def conserved(self):
        if hasattr(self, "tier"):
            self.tier.check_integrity()
            usage = self.tier.usage()
            assert usage.used_bytes <= usage.capacity_bytes


class TestShort(DiskMachine.TestCase):
    settings = settings(max_examples=25, stateful_step_count=40)


@pytest.mark.faults_long
class TestLong(DiskMachine.TestCase):
    settings = settings(max_examples=1000, stateful_step_count=60)
