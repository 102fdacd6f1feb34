"""What a load takes, measured when a store is opened: the first plan should not have to guess."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Sequence

import numpy as np

from thermocline.blocks.frame import payload_sum
from thermocline.blocks.key import NO_PARENT, BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.clock import Clock
from thermocline.costs.model import LearnedCosts
from thermocline.tiers.tier import Block, Outcome, Tier

LOG = logging.getLogger("thermocline.store")
SCRATCH = LayoutId(hashlib.sha256(b"thermocline scratch").digest())
"""A layout that no engine has: nothing of it can ever match."""
BLOCK_BYTES, BLOCKS = 128 << 10, 16
LOADS = (1, 1, 4, BLOCKS, BLOCKS)
SECONDS_MAX = 0.1
ROOM_MIN = 8
"""Only tiers that hold so many times what is written are measured; smaller ones would have to give up blocks."""


def calibrate(tiers: Sequence[Tier], costs: LearnedCosts, clock: Clock) -> None:
    """Save a few blocks to each tier that was never measured, load them, and remove them: 0.1 s each at most.

    What a tier could not do in that time is not learned, and no error.
    """
    for tier in tiers:
        room = tier.usage()
        if costs.knows(tier.name):
            continue
        if room.capacity_bytes - room.used_bytes >= ROOM_MIN * BLOCK_BYTES * BLOCKS:
            try:
                _measure(tier, costs, clock)
            except Exception:  # a tier in trouble is the breaker's business, not the start's
                LOG.exception("tier %s could not be measured", tier.name)


def _measure(tier: Tier, costs: LearnedCosts, clock: Clock) -> None:
    deadline = clock.now() + SECONDS_MAX
    keys = [BlockKey(secrets.token_bytes(32)) for _ in range(BLOCKS)]  # others may measure the same tier just now
    written = np.random.default_rng(0).integers(0, 256, (BLOCKS, BLOCK_BYTES), dtype=np.uint8)
    blocks = [
        Block(keys[at - 1] if at else NO_PARENT, at + 1, [row], payload_sum([row])) for at, row in enumerate(written)
    ]
    job = tier.save(SCRATCH, keys, blocks)
    into = np.zeros_like(written)
    if job.wait(SECONDS_MAX):
        for count in LOADS:
            started = clock.now()
            outcomes = tier.load(SCRATCH, keys[:count], [[row] for row in into[:count]], deadline)
            if outcomes.count(Outcome.HIT) < count:
                break
            costs.transferred(tier.name, count * BLOCK_BYTES, clock.now() - started)
    job.watch(done=lambda _: tier.remove(SCRATCH, keys))
