"""Blocks to try a tier with. Their bytes follow from layout and key, so any reader can tell right from wrong."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise

import numpy as np

from thermocline.blocks.frame import payload_sum
from thermocline.blocks.key import NO_PARENT, block_keys, root_key
from thermocline.blocks.layout import Layout
from thermocline.clock import SystemClock
from thermocline.tiers.tier import Block, Outcome

CLOCK = SystemClock()
LENGTH = 10_000
"""Not a multiple of a page, so that padding matters."""
PATIENCE_SECONDS = 60.0
"""How long a test waits for what must happen; nothing is slower on purpose."""
FREED = 0xA5


def layout_of(name="a", length=LENGTH, **changes):
    """The fingerprint of a layout of that block length."""
    fields = {
        "model": name,
        "weights_digest": b"w" * 32,
        "dtype": "float32",
        "kv_dtype": "float32",
        "layers": 2,
        "kv_heads": 2,
        "head_dim": 16,
        "tokens_per_block": 16,
        "block_bytes": length,
        "engine": "none",
        "engine_version": "1",
        "isa": "any",
        "order": "kv",
    }
    return Layout(**{**fields, **changes}).id


def chain(seed, length):
    """The keys of a path of `length` blocks, another one for every seed."""
    tokens = np.random.default_rng(seed).integers(0, 2**32, 16 * length, np.uint32)
    return block_keys(tokens, root=root_key(), tokens_per_block=16)


def content(layout, key, length=LENGTH, version=0):
    """The bytes of a block."""
    return np.frombuffer(hashlib.shake_128(layout + key + bytes([version])).digest(length), np.uint8)


def cut(data, number):
    """A copy of `data` as `number` pieces that lie apart in memory."""
    edges = [len(data) * at // number for at in range(number + 1)]
    return [data[start:stop].copy() for start, stop in pairwise(edges)]


def blocks_of(layout, keys, length=LENGTH, *, cuts=1, version=0, before=()):
    """The blocks of a chain, or of its end where `before` holds the keys in front of it."""
    path = [NO_PARENT, *before, *keys]
    first = len(before)
    blocks = []
    for at, key in enumerate(keys):
        data = content(layout, key, length, version)
        blocks.append(Block(path[first + at], first + at + 1, cut(data, cuts), payload_sum([data])))
    return blocks


def save(tier, layout, keys, length=LENGTH, *, cuts=1, version=0, before=()):
    """Save a chain's blocks, wait until the job is done, and return it."""
    job = tier.save(layout, keys, blocks_of(layout, keys, length, cuts=cuts, version=version, before=before))
    assert job.wait(PATIENCE_SECONDS), "a save never ends"
    assert job.visible
    assert len(job.outcomes) == len(keys)
    assert Outcome.PENDING not in job.outcomes
    return job


def room_for(number, length=LENGTH, *, cuts=1):
    """Pieces to load into, full of what freed memory holds."""
    return [[piece.copy() for piece in cut(np.full(length, FREED, np.uint8), cuts)] for _ in range(number)]


def load(tier, layout, keys, length=LENGTH, *, cuts=1, versions=(0,), seconds=PATIENCE_SECONDS):
    """Load, hold the tier to its first promise (a HIT is exactly what was saved), and return the outcomes."""
    into = room_for(len(keys), length, cuts=cuts)
    outcomes = tier.load(layout, keys, into, CLOCK.now() + seconds)
    assert len(outcomes) == len(keys), "one outcome per key"
    for key, pieces, outcome in zip(keys, into, outcomes, strict=True):
        assert outcome in LOAD_OUTCOMES, f"{outcome} is no outcome of a load"
        if outcome is Outcome.HIT:
            arrived = np.concatenate(pieces)
            right = any(np.array_equal(arrived, content(layout, key, length, version)) for version in versions)
            assert right, "a HIT with wrong bytes"
    return outcomes


LOAD_OUTCOMES = {Outcome.HIT, Outcome.MISS, Outcome.PENDING, Outcome.CORRUPT, Outcome.LATE, Outcome.FAILED}


def hits(outcomes):
    """How many of them are hits."""
    return Counter(outcomes)[Outcome.HIT]


def fill(tier, layout, length=LENGTH, *, seed=1, batch=16, evicts=False, observe=lambda: None):
    """Save until the tier says FULL three times in a row; returns the keys that it took. `observe` is called often.

    A tier that evicts by itself is given a half more than it has room for, and those that it still holds are returned.
    """
    held, full = [], 0
    deadline = CLOCK.now() + PATIENCE_SECONDS
    turn = 0
    while full < 3:
        turn += 1
        keys = chain((seed, turn), batch)
        job = save(tier, layout, keys, length)
        observe()
        held += [key for key, outcome in zip(keys, job.outcomes, strict=True) if outcome is Outcome.HIT]
        full = 0 if Outcome.HIT in job.outcomes else full + (Outcome.FULL in job.outcomes)
        if evicts and len(held) * length > 1.5 * tier.usage().capacity_bytes:
            return [key for key, there in zip(held, tier.holds(layout, held), strict=True) if there]
        if Outcome.LATE in job.outcomes:
            CLOCK.sleep(0.01)
        assert CLOCK.now() < deadline, "the tier takes nothing and is not FULL either"
    return held
