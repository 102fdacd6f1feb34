"""A client in a process of its own. Says on stdout where it is, and does what it reads from stdin."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from tests.node.making import GUARD_SECONDS, LAYOUT, PATIENT, keep, tokens
from tests.store.making import BLOCK_BYTES, chain, content, make_layout
from thermocline.node.client import NodeClient


def tell(**said: object) -> None:
    """One line of JSON."""
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def hold(client: NodeClient) -> None:
    """Hold leases and slots, and copy into those until somebody ends this."""
    path = chain("held", 4)
    keep(client, path)
    client.ready(LAYOUT, 8)
    client.match([LAYOUT], path, prompt_tokens=tokens(path))
    lent = client.lend(LAYOUT, 2)
    while not lent:
        lent = client.lend(LAYOUT, 2)
    tell(holds=len(lent))
    while True:
        for slot in lent:
            slot.view[:] = 0xA5


def stopped(client: NodeClient) -> None:
    """Stop with a plan and slots in hand; after that copy, in both directions, as if nothing had been."""
    path = chain("held", 4)
    keep(client, path)
    plan = client.match([LAYOUT], path, prompt_tokens=tokens(path))
    places = client.places(plan, 0)
    lent = client.lend(LAYOUT, 1)
    while not lent:
        lent = client.lend(LAYOUT, 1)
    tell(holds=len(lent))
    os.kill(os.getpid(), signal.SIGSTOP)
    lent[0].view[:] = 0xA5
    into = [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in path]
    told = client.load(plan, 0, into)
    blind = client.fetch(replace(places, deadline=1e300), into)
    right = all(np.array_equal(into[at][0], content(LAYOUT, path[at])) for at in range(blind.blocks))
    again = client.match([LAYOUT], path, prompt_tokens=tokens(path))
    tell(
        loaded=told.blocks,
        reasons=[str(part.reason) for part in told.missing],
        right=right,
        blind=blind.blocks,
        again=again.blocks,
    )
    client.give_back(lent)


def rank(client: NodeClient) -> None:
    """One of four ranks: save this rank's part, wait for the others, load what all ranks have."""
    mine, layouts = int(sys.argv[3]), [make_layout(rank=each) for each in range(4)]
    path = chain("ranks", 10)
    outcomes = keep(client, path[: 9 - mine], layouts[mine]).outcomes
    tell(saved=[str(outcome) for outcome in outcomes])
    sys.stdin.readline()
    plan = client.match(layouts, path, prompt_tokens=tokens(path))
    found = []
    for at, layout in enumerate(layouts):  # a rank that had others' places would read others' bytes, and only theirs
        into = [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in range(plan.blocks)]
        loaded = client.load(plan, at, into)
        found.append(loaded.blocks)
        assert all(np.array_equal(into[i][0], content(layout, path[i])) for i in range(loaded.blocks))
    wrong = client.fetch(replace(client.places(plan, mine), sums=client.places(plan, (mine + 1) % 4).sums), into)
    client.release(plan.lease)
    tell(planned=plan.blocks, found=found, wrong=wrong.blocks)


def main() -> None:
    """Attach, and do as told."""
    client = NodeClient(Path(sys.argv[2]), **PATIENT)
    assert client.wait_up(GUARD_SECONDS)
    {"hold": hold, "stopped": stopped, "rank": rank}[sys.argv[1]](client)
    client.close()


if __name__ == "__main__":
    main()
