"""A state's prefetch and a node's, together: what a request needs, and the blocks of its session."""

from __future__ import annotations

from tests.node.making import CLOCK, Host, keep
from tests.store.making import GUARD_SECONDS, LAYOUT, chain
from thermocline.near import LocalState, Sessions, Turn
from thermocline.tiers.tier import Outcome


def test_a_sessions_blocks_are_brought_nearer(tmp_path):
    """The callable that the guide shows has a real node bring a session's blocks from disk into memory."""
    keys = {"s": chain("s", 6), "t": chain("t", 6)}
    sessions = Sessions()
    with Host(tmp_path, disk=True) as host:
        keep(host.client(), keys["s"])
        host.restart()
        node = host.client()
        state = LocalState(
            1 << 20,
            reads=lambda session: (sessions.turns(session),),
            blocks=lambda session: node.prefetch([LAYOUT], keys[session], CLOCK.now() + GUARD_SECONDS),
        )
        state.ask(sessions.append("s", Turn("user", "hi")))
        done = state.prefetch("s")
        assert done.blocks.wait(GUARD_SECONDS)
        assert done.blocks.outcomes == [Outcome.HIT] * 6
        assert node.unsaved(LAYOUT, keys["s"]) == 6
        assert state.prefetch("t").blocks.wait(GUARD_SECONDS)
        assert state.prefetch("unheard of").blocks is None
        assert state.stats().blocks_failed == 1
