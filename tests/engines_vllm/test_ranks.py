"""Four ranks in processes of their own on one node: each loads what it saved itself, and only what all of them have."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest

from tests.engines_vllm.mini import BLOCK, engine, layer
from tests.store.making import GUARD_SECONDS, chain
from thermocline.blocks.layout import Layout
from thermocline.engines.vllm.layout import make_layout
from thermocline.engines.vllm.scheduler import Scheduler
from thermocline.errors import LayoutError

ROOT = Path(__file__).parents[2]
RANKS = 4


class RankProcess:
    """A rank, by what it says."""

    def __init__(self, socket, rank, blocks):
        words = [sys.executable, "-m", "tests.engines_vllm.rank_process", socket, rank, RANKS, blocks]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
        self._process = subprocess.Popen(
            list(map(str, words)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.communicate(timeout=GUARD_SECONDS)

    def hears(self):
        return self._process.stdout.readline().strip()

    def told(self, data):
        self._process.stdin.write(data.hex() + "\n")
        self._process.stdin.flush()


@pytest.mark.slow
def test_ranks_do_not_mix(host):
    """A match counts the blocks that all four ranks have, and each of them loads its own bytes, never another's."""
    keys = chain("ranks", 6)
    client = host.client()
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(RankProcess(host.socket, rank, blocks)) for rank, blocks in enumerate((6, 5, 6, 4))
        ]
        layouts = [msgspec.msgpack.decode(bytes.fromhex(rank.hears()), type=Layout) for rank in ranks]
        assert len({layout.id for layout in layouts}) == RANKS
        for rank in ranks:
            rank.told(b"".join(keys))
        assert [rank.hears() for rank in ranks] == ["saved"] * RANKS
        plan = client.match(layouts, keys, prompt_tokens=6 * BLOCK + 1)
        assert plan.blocks == 4, "the least of all ranks"
        places = [client.places(plan, rank) for rank in range(RANKS)]
        for rank in ranks:
            rank.told(msgspec.msgpack.encode((places, 20)))
        assert [rank.hears() for rank in ranks] == ["4 0 1"] * RANKS
        client.release(plan.lease)


@pytest.mark.parametrize("told", [[1, 0], [0], [0, 0], [0, 1, 1]])
def test_a_rank_that_is_missing_is_noticed(host, told):
    """A scheduler that does not know every rank in its turn refuses to begin: no rank is given another's blocks."""
    ranks = [layout_of(at) for at in told]
    scheduler = Scheduler(host.client(), tokens_per_block=BLOCK, save_blocks_max=1)
    with pytest.raises(LayoutError) as refused:
        scheduler.attach([[layout] for layout in ranks])
    assert refused.value.hint
    scheduler.attach([[layout_of(0)], [layout_of(1)]])


def layout_of(rank):
    """The layout of one of two ranks."""
    return make_layout(engine(rank, 2), [layer("a")], group=0, tokens_per_block=BLOCK, kv_heads=1, head_dim=8)
