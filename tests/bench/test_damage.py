from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from bench import damage
from bench.damage import Fault
from bench.vllm_server import BLOCK_TOKENS, prompt
from tests.conformance.samples import CLOCK, content, layout_of
from thermocline.blocks.frame import payload_sum
from thermocline.blocks.key import NO_PARENT
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.tier import Block, Outcome

LENGTH = 16_384
LAYOUT = layout_of("a", LENGTH)
MIB = 1 << 20


def _block(parent, key, depth):
    data = content(LAYOUT, key, LENGTH)
    return Block(parent, depth, [data], payload_sum([data]))


@pytest.fixture
def disk(tmp_path):
    """A closed disk tier that holds two prompts of three blocks, and the prompts."""
    prompts = [prompt(3 * BLOCK_TOKENS + 1, number) for number in range(2)]
    tier = DiskTier(tmp_path, 64 * MIB)
    tier.found()
    for tokens in prompts:
        keys = damage.keys_of(tokens)
        path = enumerate(pairwise([NO_PARENT, *keys]), 1)
        job = tier.save(LAYOUT, keys, [_block(parent, key, depth) for depth, (parent, key) in path])
        job.wait(30)
        assert set(job.outcomes) == {Outcome.HIT}
    tier.close()
    return tmp_path, prompts


@pytest.mark.parametrize("fault", Fault)
def test_damage_is_done_and_noticed(disk, fault):
    """Every fault changes the first block of one prompt on disk, and the tier does not give that block any more."""
    folder, prompts = disk
    first, other = damage.frames_of(folder, prompts)
    assert [len(first), len(other)] == [3, 3]
    before = first[0].read()
    damage.hurt(fault, first[0], other[-1])
    assert first[0].read() != before
    tier = DiskTier(folder, 64 * MIB)
    tier.found()
    into = np.zeros(LENGTH, np.uint8)
    (outcome,) = tier.load(LAYOUT, damage.keys_of(prompts[0])[:1], [[into]], deadline=CLOCK.now() + 30)
    assert outcome is not Outcome.HIT
    tier.close()
