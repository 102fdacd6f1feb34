"""Slots that other processes write: lent, adopted or taken back, and in no case in two hands."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.engines.eager import EagerCosts
from tests.store.making import BLOCK_BYTES, LAYOUT, ask, chain, content, make_layout, save
from thermocline.blocks.frame import payload_sum
from thermocline.store.evict import LeastRecent
from thermocline.store.index import NO_NODE, Index
from thermocline.store.store import Store
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.tier import Outcome

PATHS = [chain("trunk", 3), chain("a", 6, behind=chain("trunk", 3)), chain("b", 6, behind=chain("trunk", 3))]
OTHER = make_layout("other", block_bytes=2 * BLOCK_BYTES)


def fill(store, layout, keys, slots):
    """Write blocks into lent slots, as a client does; what `adopt` takes."""
    lent = []
    for key, slot in zip(keys, slots, strict=True):
        view = store.lent(layout, slot)[1]
        view[:] = content(layout, key)
        lent.append((slot, payload_sum([view])))
    return lent


def test_adopted_blocks_are_saved(make_store):
    """What was written into lent slots is found like any save, without a copy."""
    store = make_store()
    slots = store.lend(LAYOUT, 3)
    job, unused = store.adopt(LAYOUT, PATHS[0], fill(store, LAYOUT, PATHS[0], slots))
    assert (job.outcomes, unused) == ([Outcome.HIT] * 3, [])
    assert ask(store, PATHS[0]).blocks == 3
    store.check_integrity()


def test_what_is_there_already_needs_no_slot(make_store):
    """Slots of blocks that another saved first stay lent; so do those behind a gap."""
    store = make_store()
    save(store, PATHS[0][:2])
    slots = store.lend(LAYOUT, 3)
    job, unused = store.adopt(LAYOUT, PATHS[0], fill(store, LAYOUT, PATHS[0], slots))
    assert (job.outcomes, unused) == ([Outcome.HIT] * 3, slots[:2])
    path = chain("gap", 4)
    more = store.lend(LAYOUT, 2)
    job, kept = store.adopt(LAYOUT, path, fill(store, LAYOUT, path[2:], more), start=2)
    assert (job.outcomes, kept) == ([Outcome.MISS] * 2, more)
    store.take_back([*unused, *kept])
    store.check_integrity()
    assert not store._warm._lent


def test_taken_back_once(make_store):
    """A slot that is taken back twice, or was adopted meanwhile, is not given to two."""
    store = make_store()
    one, two = store.lend(LAYOUT, 2)
    store.adopt(LAYOUT, PATHS[0][:1], fill(store, LAYOUT, PATHS[0][:1], [one]))
    store.take_back([two])
    store.take_back([one, two])
    store.check_integrity()
    assert ask(store, PATHS[0][:1]).blocks == 1


def test_blocks_that_lost_their_parent(make_store):
    """Blocks whose parent was evicted between two commits are not kept, and their slots are free or still lent."""
    store = make_store(blocks=8)
    save(store, PATHS[1][:4])
    slots = store.lend(LAYOUT, 4)
    lent = fill(store, LAYOUT, PATHS[1][4:8], slots)
    store._books.evict("memory", 8)
    job, unused = store.adopt(LAYOUT, PATHS[1][:8], lent, start=4)
    assert set(job.outcomes) == {Outcome.MISS}
    store.take_back(unused)
    store.check_integrity()
    assert store.usage()["memory"].used_bytes == 0


def test_half_is_lent_at_most(make_store):
    """Half of the memory holds blocks, however much is wanted; and blocks that can never fit push none out."""
    store = make_store(blocks=64)
    save(store, chain("held", 40))
    assert len(store.lend(LAYOUT, 64)) == 32
    assert store.lend(LAYOUT, 1) == []
    assert store.unsaved(LAYOUT, chain("held", 40)) == 32
    giant = make_layout("giant", block_bytes=65 * BLOCK_BYTES)
    assert store.lend(giant, 1) == []
    assert store.unsaved(LAYOUT, chain("held", 40)) == 32


@pytest.mark.parametrize(("keys", "start"), [(PATHS[1][1:3], 0), ([PATHS[1][0], PATHS[1][2]], 1)])
def test_paths_that_nobody_hashed(make_store, keys, start):
    """A commit of keys in an order that no chain has does not shake the books."""
    store = make_store()
    save(store, PATHS[1][:4])
    store._books.evict("memory", 1)
    slots = store.lend(LAYOUT, len(keys) - start)
    _, unused = store.adopt(LAYOUT, keys, fill(store, LAYOUT, keys[start:], slots), start=start)
    store.take_back(unused)
    store.check_integrity()


def test_the_index_takes_no_second_parent():
    """A block has one parent and one depth, in every tier."""
    index = Index(["warm", "cold"], LeastRecent())
    one, two, below = chain("one", 1)[0], chain("two", 1)[0], chain("below", 1)[0]
    index.add(LAYOUT.id, one, bytes(32), 1, "warm", 0.0)
    index.add(LAYOUT.id, two, bytes(32), 1, "cold", 0.0)
    assert index.add(LAYOUT.id, below, one, 2, "warm", 0.0) != NO_NODE
    assert index.add(LAYOUT.id, below, two, 2, "cold", 0.0) == NO_NODE
    assert index.add(LAYOUT.id, two, one, 3, "warm", 0.0) == NO_NODE
    index.check_integrity()


class LendingMachine(RuleBasedStateMachine):
    """Memory for 12 blocks, two sizes of them, lenders that commit, forget and give back in any order."""

    @initialize()
    def open(self):
        self.store = Store(MemoryTier(12 * BLOCK_BYTES), costs=EagerCosts())
        self.store._warm.wait_ready()
        self.lent = []

    def teardown(self):
        if hasattr(self, "store"):
            self.store.take_back([slot for _, slots in self.lent for slot in slots])
            self.store.check_integrity()
            self.store.close()

    @rule(layout=st.sampled_from([LAYOUT, OTHER]), count=st.integers(0, 9))
    def lend(self, layout, count):
        slots = self.store.lend(layout, count)
        assert len(slots) <= count
        for slot in slots:
            self.store.lent(layout, slot)[1][:] = 0xA5
        self.lent.append((layout, slots))

    @precondition(lambda self: self.lent)
    @rule(path=st.sampled_from(PATHS), start=st.integers(0, 8), which=st.integers(0, 99))
    def adopt(self, path, start, which):
        layout, slots = self.lent.pop(which % len(self.lent))
        stop = min(len(path), start + len(slots))
        used = slots[: max(0, stop - start)]
        lent = fill(self.store, layout, path[start:stop], used)
        job, unused = self.store.adopt(layout, path[: start + len(used)], lent, start=start)
        assert len(job.outcomes) == len(used)
        assert set(unused) <= set(used)
        self.lent.append((layout, [*slots[len(used) :], *unused]))

    @precondition(lambda self: self.lent)
    @rule(which=st.integers(0, 99))
    def take_back(self, which):
        self.store.take_back(self.lent.pop(which % len(self.lent))[1])

    @rule(layout=st.sampled_from([LAYOUT, OTHER]), path=st.sampled_from(PATHS), length=st.integers(0, 9))
    def save(self, layout, path, length):
        save(self.store, path[:length], layout)

    @rule(layout=st.sampled_from([LAYOUT, OTHER]), path=st.sampled_from(PATHS))
    def ask(self, layout, path):
        ask(self.store, path, layout)

    @rule(count=st.integers(1, 12))
    def evict(self, count):
        self.store._books.evict("memory", count)

    @invariant()
    def all_adds_up(self):
        if not hasattr(self, "store"):
            return
        self.store.check_integrity()
        mine = [slot for _, slots in self.lent for slot in slots]
        assert sorted(mine) == sorted(self.store._warm._lent)
        for layout, slots in self.lent:
            for slot in slots:
                view = self.store.lent(layout, slot)[1]
                view[-1] ^= np.uint8(0xFF)  # whoever was lent a slot may write there: it harms no block


TestLending = LendingMachine.TestCase
TestLending.settings = settings(max_examples=40, stateful_step_count=25)
TestLending.__doc__ = "Slots are lent, adopted, forgotten and taken back while others save, ask and evict."
TestLending.runTest.__doc__ = "No slot is in two hands, what is loaded is what was saved, and all adds up."
