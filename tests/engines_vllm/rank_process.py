"""One rank in a process of its own: saves its part of some blocks, then loads what the others' scheduler ordered.

    python rank_process.py SOCKET RANK RANKS BLOCKS

It says its layout, waits for orders line by line on stdin (as hex of msgpack), and answers with what it loaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import numpy as np

from tests.engines_vllm.mini import Rank, content
from thermocline.blocks.key import BlockKey
from thermocline.engines.vllm.orders import LoadOrder, Orders, SaveOrder
from thermocline.node.client import NodeClient
from thermocline.node.places import Places


def main() -> None:
    """See above."""
    socket, number, ranks, blocks = Path(sys.argv[1]), *map(int, sys.argv[2:5])
    client = NodeClient(socket, wait_seconds=30.0, save_wait_seconds=30.0)
    assert client.wait_up(30.0)
    rank = Rank(client, number, ranks, 1)
    layout = rank.pages[0].layout
    _say(msgspec.msgpack.encode(layout).hex())
    keys = bytes.fromhex(sys.stdin.readline())
    chain = [BlockKey(keys[at : at + 32]) for at in range(0, len(keys), 32)]
    for page, key in enumerate(chain[:blocks], 1):
        rank.write(0, page, content(layout, key))
    rank.worker.save(Orders(saves=(SaveOrder(1, "r", 0, keys, 0, (tuple(range(1, blocks + 1)),)),)))
    assert client.flush(30.0)
    _say("saved")
    places, offset = msgspec.msgpack.decode(bytes.fromhex(sys.stdin.readline()), type=tuple[list[Places], int])
    pages = tuple(range(offset, offset + len(places[0].offsets)))
    rank.worker.start_loads(Orders(loads=(LoadOrder("r", tuple((each,) for each in places), (pages,)),)))
    finished, failed = set(), set()
    while not finished:
        finished, failed = rank.worker.ended_loads(Orders(idle=True))
    own = all(np.array_equal(rank.read(0, page), content(layout, key)) for page, key in zip(pages, chain, strict=False))
    _say(f"{len(pages)} {len(failed)} {int(own)}")
    rank.worker.close()
    client.close()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
