"""Everything that may happen to a store, in any order: what it loads is what was saved, and its books add up."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.conformance.faulty import Fault, FaultyTier, Schedule, damage
from tests.engines.eager import EagerCosts
from tests.faults.redis_server import RedisError, RedisServer, program
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
    save,
)
from thermocline.blocks.layout import Layout
from thermocline.clock import SystemClock
from thermocline.store.plan import Plan
from thermocline.store.store import Store
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.redis import RedisTier
from thermocline.tiers.redis_scripts import Space
from thermocline.tiers.tier import GONE, Found, Outcome
from thermocline.wire.resp import Address

MEMORY_BLOCKS = 24
DISK_BYTES = 1_700_000  # one segment, of 128 frames
REDIS_BYTES = 64 * 2 * BLOCK_BYTES
SETTLE_SECONDS = 2.0
LAYOUTS = [make_layout("one"), make_layout("two")]
TRUNKS = {salt: chain(f"{salt} system", 6) for salt in ("salt", "pepper")}
PATHS = [chain(f"{salt} {number}", 30, behind=TRUNKS[salt]) for salt in TRUNKS for number in range(2)]

layouts = st.integers(0, 1).map(LAYOUTS.__getitem__)
paths = st.integers(0, 3).map(PATHS.__getitem__)
lengths = st.integers(0, 36)


class JumpingClock(SystemClock):
    """The machine's clock, but sleeping takes no time."""

    __slots__ = ("jumped",)

    def __init__(self):
        self.jumped = 0.0

    def now(self):
        """See `Clock.now`."""
        return SystemClock.now() + self.jumped

    def wall(self):
        """See `Clock.wall`."""
        return SystemClock.wall() + self.jumped

    def sleep(self, seconds):
        """Move forward without waiting."""
        self.jumped += seconds


class StoreMachine(RuleBasedStateMachine):
    """Memory for 24 blocks, disk for 128, Redis for 64, and prompts of some 250; each tier may fail as it likes."""

    server: RedisServer | None = None

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="thermocline-test-"))
        self.clock = JumpingClock()
        self.plans: list[Plan] = []
        self.redis = None

    @initialize(
        ttl=st.sampled_from([None, 300.0]),
        queue_blocks=st.sampled_from([1, 8, 1000]),
        faults=st.sampled_from([0.0, 0.0, 0.05, 0.3]),
        seed=st.integers(0, 2**32),
        cold=st.sampled_from(["disk", "redis", "disk and redis"]),
    )
    def open_first(self, ttl, queue_blocks, faults, seed, cold):
        self.ttl, self.queue_bytes = ttl, queue_blocks * 2 * BLOCK_BYTES
        self.schedule = Schedule(seed, dict.fromkeys(Fault, faults))
        self.cold = cold
        if self.server is not None:
            self.server.call("CONFIG", "SET", "maxmemory", "0")
            self.server.call("FLUSHALL")
        self.open()

    def open(self) -> None:
        warm = MemoryTier(MEMORY_BLOCKS * BLOCK_BYTES, clock=self.clock)
        cold = []
        if "disk" in self.cold:
            disk = DiskTier(self.folder, DISK_BYTES, clock=self.clock, queue_bytes_max=self.queue_bytes)
            cold.append(FaultyTier(disk, self.schedule))
        if "redis" in self.cold and self.server is not None:
            space = Space(b"machine", REDIS_BYTES, 200.0, gain_min=0.0)
            self.redis = RedisTier(Address.parse(self.server.url), space, clock=self.clock)
            cold.append(FaultyTier(self.redis, self.schedule))
        # With these costs nothing is declined, and late is only what a fault makes late: the index learns from a load
        # what a tier has lost, but not from one that never came to it.
        options = {"ttl_seconds": self.ttl, "lease_seconds": 60.0, "costs": EagerCosts()}
        self.store = Store(FaultyTier(warm, self.schedule), cold, clock=self.clock, **options)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
        shutil.rmtree(self.folder)

    @rule(layout=layouts, path=paths, length=lengths, start=lengths)
    def save(self, layout, path, length, start):
        keys = path[:length]
        unsaved = self.store.unsaved(layout, keys)
        hidden = self.store._books.index.covered_or_broken(layout.id, keys, "memory") > unsaved
        start = min(start, length, unsaved)
        job = self.store.save(layout, keys, contents(layout, keys[start:]), start=start)
        assert job.visible
        assert job.wait(GUARD_SECONDS)
        taken = next((at for at, outcome in enumerate(job.outcomes) if outcome is not Outcome.HIT), length - start)
        # What lies behind a damaged block may have to go for what mends it.
        assert hidden or self.store.unsaved(layout, keys) >= start + taken, "what a save called HIT is not there"

    @rule(asked=st.lists(layouts, min_size=1, max_size=2, unique=True), path=paths, length=lengths)
    def ask(self, asked, path, length):
        ask(self.store, path[:length], *asked)

    @rule(asked=st.lists(layouts, min_size=1, max_size=2, unique=True), path=paths, length=lengths)
    def request(self, asked, path, length):
        """What an engine does: load what there is, compute the rest, save it."""
        ask(self.store, path[:length], *asked)
        for layout in asked:
            start = self.store.unsaved(layout, path[:length])
            self.store.save(layout, path[:length], contents(layout, path[start:length]), start=start)

    @rule(layout=layouts, path=paths, length=lengths)
    def ask_again(self, layout, path, length):
        """What was in a tier a moment ago is asked for by two requests in a row."""
        self.request([layout], path, length)
        self.request([layout], path, length)

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
        job = self.store.prefetch(asked, path[:length], self.clock.now() + GUARD_SECONDS)
        assert job.wait(GUARD_SECONDS)
        count = job.outcomes.count(Outcome.HIT)
        if len(asked) == 1:  # the second layout's blocks may have pushed out the first one's
            assert self.store.unsaved(asked[0], path[:length]) >= count

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

    @precondition(lambda self: self.redis is not None)
    @rule(layout=layouts, path=paths, at=st.integers(0, 35))
    def damage_redis(self, layout, path, at):
        if self.server.call("EXISTS", self.redis._space.value(layout.id, path[at])):
            damage(self.redis, layout.id, path[at], self.schedule.pick)

    @precondition(lambda self: self.redis is not None)
    @rule(layout=layouts, path=paths, at=st.integers(0, 34))
    def swap_in_redis(self, layout, path, at):
        """One block's value lies under another's key."""
        space = self.redis._space
        with suppress(RedisError):  # there is no such value
            self.server.call("COPY", space.value(layout.id, path[at]), space.value(layout.id, path[at + 1]), "REPLACE")

    @precondition(lambda self: self.redis is not None)
    @rule(how=st.sampled_from(["lose all", "lose the books", "cut links", "restart", "full", "room", "room"]))
    def trouble_redis(self, how):
        """The server loses what it held, its connections or its room."""
        if how == "restart":
            self.server.restart()
        words = {
            "lose all": ("FLUSHALL",),
            "lose the books": ("DEL", "machine:index", "machine:used"),
            "cut links": ("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"),
            "full": ("CONFIG", "SET", "maxmemory", "1"),
            "room": ("CONFIG", "SET", "maxmemory", "0"),
        }.get(how, ("PING",))
        self.server.call(*words)

    @rule()
    def reopen(self):
        """What is on disk before and was not damaged is there afterwards, and nothing else."""
        self.store.close()
        self.plans.clear()  # leases are of the process
        self.open()

    def check_integrity(self) -> None:
        """All adds up, at the latest when a tier's thread has told the last watcher of a job that is done."""
        deadline = SystemClock.now() + SETTLE_SECONDS
        while SystemClock.now() < deadline:
            with suppress(AssertionError):
                return self.store.check_integrity()
            SystemClock.sleep(0.005)
        return self.store.check_integrity()

    @invariant()
    def books_add_up(self):
        if not hasattr(self, "store"):
            return
        assert self.store.flush(GUARD_SECONDS)
        self.check_integrity()
        for usage in self.store.usage().values():
            assert usage.used_bytes <= usage.capacity_bytes
        assert self.store.usage()["memory"].blocks <= MEMORY_BLOCKS
        if not self.plans:
            assert len(self.store._books.leases) == 0


def test_damage_of_one_layout_does_not_reach_another(make_store):
    """While a damaged block of one layout hides others, a layout of which nothing is held is asked for in vain."""
    store = make_store()
    save(store, PATHS[0], LAYOUTS[0])
    flip_in_memory(store, PATHS[0][3], LAYOUTS[0])
    assert ask(store, PATHS[0], LAYOUTS[0]).blocks == 3
    assert ask(store, PATHS[0], LAYOUTS[1]).blocks == 0


def test_an_orphan_alone_is_left_out():
    """A disk that holds nothing but one block without its parent can be opened, and that block is no use."""
    one = np.array([1.0])
    found = Found(LAYOUTS[0].id, {PATHS[0][1]: 0}, np.array([GONE]), 2 * one.astype(np.int64), one)
    assert not found.rooted().any()


def test_what_had_to_go_for_a_save_is_no_hit(make_store):
    """What lies hidden behind a damaged block and goes to make room for it is not called HIT by that save."""
    path = PATHS[0][:4]
    store = make_store(blocks=4)
    save(store, path, LAYOUTS[0])
    flip_in_memory(store, path[1], LAYOUTS[0])
    assert ask(store, path, LAYOUTS[0]).blocks == 1
    save(store, PATHS[2][:1], LAYOUTS[0])  # takes the room of the damaged block
    outcomes = save(store, path, LAYOUTS[0]).outcomes
    assert outcomes.count(Outcome.HIT) == store.unsaved(LAYOUTS[0], path)


@pytest.fixture(scope="module", autouse=True)
def _server(tmp_path_factory):
    """A real server for the machine; where there is none, it runs without that tier."""
    if program() is None:
        yield
        return
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        StoreMachine.server = server
        yield
        StoreMachine.server = None


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=40, stateful_step_count=30)
TestStoreMachine.__doc__ = "Saves, loads, leases, prefetches, faults, damage, time and restarts in any order."
TestStoreMachine.runTest.__doc__ = "Whatever happens, loaded bytes are what was saved, books add up, room is kept."


@pytest.mark.faults_long
class TestStoreMachineLong(StoreMachine.TestCase):
    """The same, 10,000 times."""

    settings = settings(max_examples=10_000, stateful_step_count=30)
