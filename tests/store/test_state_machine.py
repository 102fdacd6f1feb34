"""Everything that may happen to a store, in any order: what it loads is what was saved, and its books add up."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.store.making import (
    BLOCK_BYTES,
    GUARD_SECONDS,
    TOKENS_PER_BLOCK,
    ask,
    chain,
    content,
    contents,
    flip_in_memory,
    flip_on_disk,
    make_layout,
)
from thermocline.blocks.layout import Layout
from thermocline.clock import ManualClock
from thermocline.store.plan import Plan
from thermocline.store.store import Store
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.tier import Outcome

MEMORY_BLOCKS = 48
DISK_BYTES = 1_700_000  # one segment, of 128 frames
LAYOUTS = [make_layout("one"), make_layout("two")]
TRUNKS = {salt: chain(f"{salt} system", 6) for salt in ("salt", "pepper")}
PATHS = [chain(f"{salt} {number}", 30, behind=TRUNKS[salt]) for salt in TRUNKS for number in range(4)]

layouts = st.sampled_from(LAYOUTS)
paths = st.sampled_from(PATHS)
lengths = st.integers(0, 36)


class StoreMachine(RuleBasedStateMachine):
    """Memory for 48 blocks, disk for 128, and prompts of some 500."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="thermocline-test-"))
        self.clock = ManualClock(1e6)
        self.plans: list[Plan] = []

    @initialize(ttl=st.sampled_from([None, 300.0]), queue_blocks=st.sampled_from([1, 8, 1000]))
    def open_first(self, ttl, queue_blocks):
        self.ttl, self.queue_bytes = ttl, queue_blocks * 2 * BLOCK_BYTES
        self.open()

    def open(self) -> None:
        warm = MemoryTier(MEMORY_BLOCKS * BLOCK_BYTES, clock=self.clock)
        disk = DiskTier(self.folder, DISK_BYTES, clock=self.clock, queue_bytes_max=self.queue_bytes)
        self.store = Store(warm, [disk], clock=self.clock, ttl_seconds=self.ttl, lease_seconds=60.0)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(layout=layouts, path=paths, length=lengths, start=lengths)
    def save(self, layout, path, length, start):
        keys = path[:length]
        start = min(start, length, self.store.unsaved(layout, keys))
        job = self.store.save(layout, keys, contents(layout, keys[start:]), start=start)
        assert job.visible
        assert job.wait(GUARD_SECONDS)
        taken = next((at for at, outcome in enumerate(job.outcomes) if outcome is not Outcome.HIT), length - start)
        assert self.store.unsaved(layout, keys) >= start + taken, "what a save called HIT is not there"

    @rule(asked=st.lists(layouts, min_size=1, max_size=2, unique=True), path=paths, length=lengths)
    def ask(self, asked, path, length):
        ask(self.store, path[:length], *asked)

    @rule(layout=layouts, path=paths, length=lengths)
    def match(self, layout, path, length):
        self.plans.append(self.store.match([layout], path[:length], prompt_tokens=length * TOKENS_PER_BLOCK + 1))

    @precondition(lambda self: self.plans)
    @rule(which=st.integers(0, 99))
    def load(self, which):
        """Carry out a plan, however old; the lease may have run out, and the store may be another one."""
        plan = self.plans[which % len(self.plans)]
        layout: Layout = plan.layouts[0]
        into = [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in range(plan.blocks)]
        loaded = self.store.load(plan, 0, into)
        for at in range(loaded.blocks):
            assert np.array_equal(into[at][0], content(layout, plan.keys[at]))

    @precondition(lambda self: self.plans)
    @rule(which=st.integers(0, 99))
    def release(self, which):
        self.store.release(self.plans.pop(which % len(self.plans)).lease)

    @rule(asked=st.lists(layouts, min_size=1, max_size=2, unique=True), path=paths, length=lengths)
    def prefetch(self, asked, path, length):
        job = self.store.prefetch(asked, path[:length], self.clock.now() + 1)
        assert job.wait(GUARD_SECONDS)
        count = job.outcomes.count(Outcome.HIT)
        assert all(self.store.unsaved(layout, path[:length]) >= count for layout in asked)

    @rule(seconds=st.sampled_from([0.5, 10.0, 61.0, 301.0]))
    def wait(self, seconds):
        self.clock.sleep(seconds)

    @rule(layout=layouts, path=paths, at=st.integers(0, 35))
    def damage_memory(self, layout, path, at):
        self.store.flush(GUARD_SECONDS)
        flip_in_memory(self.store, path[at], layout)

    @rule(layout=layouts, path=paths, at=st.integers(0, 35))
    def damage_disk(self, layout, path, at):
        self.store.flush(GUARD_SECONDS)
        flip_on_disk(self.folder, path[at], layout)

    @rule()
    def reopen(self):
        """What is on disk before and was not damaged is there afterwards, and nothing else."""
        self.store.close()
        self.plans.clear()  # leases are of the process
        self.open()

    @invariant()
    def books_add_up(self):
        if not hasattr(self, "store"):
            return
        assert self.store.flush(GUARD_SECONDS)
        self.store.check_integrity()
        for usage in self.store.usage().values():
            assert usage.used_bytes <= usage.capacity_bytes
        assert self.store.usage()["memory"].blocks <= MEMORY_BLOCKS
        if not self.plans:
            assert len(self.store._books.leases) == 0


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=40, stateful_step_count=30)
TestStoreMachine.__doc__ = "Saves, loads, leases, prefetches, damage, time and restarts in any order."
TestStoreMachine.runTest.__doc__ = "Whatever happens, loaded bytes are what was saved, books add up, room is kept."
