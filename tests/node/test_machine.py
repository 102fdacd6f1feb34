"""Everything that may happen to a node and its clients, in any order: what is loaded is what was saved."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.node.making import GUARD_SECONDS, Host, fetch, keep, tokens, until
from tests.store.making import BLOCK_BYTES, chain, content, make_layout
from thermocline.clock import ManualClock
from thermocline.tiers.memory import LENT_SHARE

MEMORY_BLOCKS = 24
RANKS = [make_layout(rank=0), make_layout(rank=1), make_layout("large", block_bytes=2 * BLOCK_BYTES)]
PATHS = [chain(name, 8, behind=chain(f"trunk {name[0]}", 3)) for name in ("a1", "a2", "b1", "b2")]

which = st.integers(0, 99)
asked = st.lists(st.sampled_from(RANKS), min_size=1, max_size=2, unique=True)
layouts, paths, lengths = st.sampled_from(RANKS), st.sampled_from(PATHS), st.integers(1, 11)


class NodeMachine(RuleBasedStateMachine):
    """Memory for 24 blocks and a disk, three layouts, up to three clients, and a clock that stands still."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="thermocline-test-"))
        self.plans, self.lent = [], []

    @initialize()
    def open(self):
        self.host = Host(self.folder, blocks=MEMORY_BLOCKS, disk=True, clock=ManualClock(1_000_000.0))
        self.join()

    def teardown(self):
        if hasattr(self, "host"):
            for client, _, _, lent in self.lent:
                client.give_back(lent)
            for client in self.host.clients:
                client.close()
            self.host.settle()
            self.host.stop()
        shutil.rmtree(self.folder)

    def one(self, number):
        """One of the clients."""
        return self.host.clients[number % len(self.host.clients)]

    @precondition(lambda self: len(self.host.clients) < 3)
    @rule()
    def join(self):
        self.host.client(clock=self.host.clock, save_wait_seconds=0.05)

    @rule(number=which, layout=layouts, path=paths, length=lengths)
    def save(self, number, layout, path, length):
        client = self.one(number)
        start = client.unsaved(layout, path[:length])
        keep(client, path[:length], layout, start=start)

    @rule(number=which, some=asked, path=paths)
    def ask(self, number, some, path):
        fetch(self.one(number), path, *some)

    @rule(number=which, some=asked, path=paths, length=lengths)
    def match(self, number, some, path, length):
        client = self.one(number)
        self.plans.append((client, client.match(some, path[:length], prompt_tokens=tokens(path[:length]))))

    @precondition(lambda self: self.plans)
    @rule(at=which, rank=st.integers(0, 1))
    def load(self, at, rank):
        """Carry out a plan, however old: of a client that left, under a lease that ran out, in another life."""
        client, plan = self.plans[at % len(self.plans)]
        layout = plan.layouts[rank % len(plan.layouts)]
        into = [[np.zeros(layout.block_bytes, np.uint8)] for _ in range(plan.blocks)]
        loaded = client.load(plan, rank % len(plan.layouts), into)
        assert loaded.blocks == plan.blocks or loaded.missing
        for key, pieces in zip(plan.keys[: loaded.blocks], into, strict=False):
            assert np.array_equal(pieces[0], content(layout, key))

    @precondition(lambda self: self.plans)
    @rule(at=which)
    def release(self, at):
        client, plan = self.plans.pop(at % len(self.plans))
        client.release(plan.lease)

    @rule(number=which, layout=layouts, path=paths)
    def begin_copy(self, number, layout, path):
        """Slots in hand, which are written from now on at any time."""
        client = self.one(number)
        client.ready(layout, 2)
        client.unsaved(layout, path)  # answered after the slots
        self.lent.append((client, layout, path, client.lend(layout, 2)))

    @precondition(lambda self: self.lent)
    @rule(at=which, kept=st.booleans())
    def end_copy(self, at, kept):
        client, layout, path, lent = self.lent.pop(at % len(self.lent))
        if not kept:
            return client.give_back(lent)
        for key, slot in zip(path, lent, strict=False):
            slot.view[:] = content(layout, key)
        assert client.commit(layout, path[: len(lent)], lent).wait(GUARD_SECONDS)
        return None

    @precondition(lambda self: len(self.host.clients) > 1)
    @rule(number=which)
    def leave(self, number):
        client = self.one(number)
        self.host.clients.remove(client)
        client.close(0.0)

    @rule(seconds=st.sampled_from([1.0, 61.0]))
    def wait(self, seconds):
        self.host.clock.sleep(seconds)

    @rule()
    def restart(self):
        self.host.restart()
        for client in self.host.clients:
            until(lambda client=client: client.up, "a client to attach again")

    @rule(path=paths, layout=layouts, at=st.integers(0, 10))
    def damage(self, path, layout, at):
        lent = self.host.store._warm.block(layout.id, path[at])
        if lent is not None:
            lent[0][100] ^= 1

    @invariant()
    def all_adds_up(self):
        if not hasattr(self, "host"):
            return
        for _, _, _, lent in self.lent:
            for slot in lent:
                slot.view[:] = 0xA5  # whoever has a slot in hand may write there: it harms no block
        self.host.check()
        usage = self.host.store.usage()["memory"]
        assert usage.used_bytes <= usage.capacity_bytes
        assert sum(self.host.store._warm._lent.values()) <= usage.capacity_bytes // LENT_SHARE


TestNode = NodeMachine.TestCase
TestNode.settings = settings(max_examples=8, stateful_step_count=20)
TestNode.__doc__ = "Clients save, load, lend, leave; leases run out; the node is restarted; memory is damaged."
TestNode.runTest.__doc__ = "Whatever happens, loaded bytes are what was saved, books add up, and slots are bounded."


@pytest.mark.faults_long
class TestNodeLong(NodeMachine.TestCase):
    """The same, 1,000 times."""

    settings = settings(max_examples=1_000, stateful_step_count=40)
