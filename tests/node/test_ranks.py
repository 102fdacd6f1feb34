"""Four rank processes on one node."""

from __future__ import annotations

from contextlib import ExitStack

from tests.node.making import process, until
from tests.store.making import chain, make_layout


def test_four_ranks(make_host):
    """Each rank's bytes are for that rank alone, and a match over all ranks counts only what all of them have."""
    host = make_host(blocks=1024)
    with ExitStack() as stack:
        ranks = [stack.enter_context(process("rank", host.socket, str(rank))) for rank in range(4)]
        for rank, (_, said) in enumerate(ranks):
            assert said()["saved"] == ["hit"] * (9 - rank)
        for child, _ in ranks:
            child.stdin.write(b"go\n")
            child.stdin.flush()
        for _, said in ranks:
            assert said() == {"planned": 6, "found": [6, 6, 6, 6], "wrong": 0}
        until(lambda: not host.server.clients, "all ranks to have left")
    held = [host.store.unsaved(make_layout(rank=rank), chain("ranks", 10)) for rank in range(4)]
    assert held == [9, 8, 7, 6]
    host.settle()
