"""Callers with different salts never meet in a tier, though they send the same tokens."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from tests.conformance import openings
from tests.conformance.samples import CLOCK, PATIENCE_SECONDS, layout_of, load, save
from tests.faults.redis_server import RedisServer
from thermocline.blocks.key import block_keys, root_key
from thermocline.tiers.tier import Outcome

LAYOUT = layout_of("a")
SALTS = [b"", *(b"tenant %d" % at for at in range(8))]
TOKENS = np.random.default_rng(9).integers(0, 2**32, 16 * 12, np.uint32)


KINDS = [pytest.param(kind, marks=pytest.mark.matrix("other salt", kind)) for kind in ("memory", "disk", "redis")]


@pytest.fixture(params=KINDS)
def tier(request, tmp_path):
    """An empty tier of each kind."""
    with contextlib.ExitStack() as stack:
        kinds = {
            "memory": openings.memory,
            "disk": lambda: openings.disk(tmp_path),
            "redis": lambda: openings.redis(stack.enter_context(RedisServer(tmp_path))),
        }
        opening = kinds[request.param]()
        stack.callback(opening.close)
        yield opening.open()


def test_salts_never_meet(tier, cases):
    """What was saved under one salt is not held, found or loaded under any other one, for the very same tokens."""
    paths = {salt: block_keys(TOKENS, root=root_key(salt), tokens_per_block=16) for salt in SALTS}
    count = 0
    for saved, keys in paths.items():
        assert set(save(tier, LAYOUT, keys).outcomes) == {Outcome.HIT}
        for salt, others in paths.items():
            if salt != saved:
                assert not any(tier.holds(LAYOUT, others))
                assert set(load(tier, LAYOUT, others)) == {Outcome.MISS}
                count += len(others)
        if hasattr(tier, "find"):
            assert set(tier.find(LAYOUT, keys, CLOCK.now() + PATIENCE_SECONDS)) == {Outcome.HIT}
        assert tier.remove(LAYOUT, keys) == len(keys)
    cases(count)
