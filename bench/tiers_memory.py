"""A verified load from the memory tier, over `np.copyto` of the same blocks between the same faulted-in buffers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bench.harness import Progress, interleaved
from thermocline.blocks.frame import payload_sum
from thermocline.blocks.key import NO_PARENT, BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.segments import aligned_memory
from thermocline.tiers.tier import Block, Outcome, Piece

MIB = 1024 * 1024
SET_BYTES = 256 * MIB
"""Eight times the last cache of the machines we know: a load that stays in a cache would flatter both sides."""
PIECES = 64
ROUNDS = 41
LAYOUT = LayoutId(bytes(32))
CONTIGUOUS_MIN, SCATTERED_MIN = 0.65, 0.45


class Rounds(NamedTuple):
    """Seconds per round of our arm and of the raw one, and how much of the raw speed is promised."""

    name: str
    target: float
    ours: Sequence[float]
    raw: Sequence[float]


def run(progress: Progress) -> Iterator[Rounds]:
    """Blocks of 1 and 2 MiB, into one piece each and into 64."""
    for block_bytes in (MIB, 2 * MIB):
        tier = MemoryTier(SET_BYTES)
        tier.wait_ready()
        keys = _fill(tier, block_bytes)
        target = aligned_memory(SET_BYTES)
        whole = [[target[at * block_bytes : (at + 1) * block_bytes]] for at in range(len(keys))]
        scattered = _scattered(target, len(keys), block_bytes)
        sources = [lent[0] for key in keys if (lent := tier.block(LAYOUT, key)) is not None]
        arms = {
            "copy": _copies(sources, whole),
            "contiguous": _loads(tier, keys, whole),
            "scattered": _loads(tier, keys, scattered),
        }
        seconds = interleaved(arms, rounds=ROUNDS, warmup=2, progress=progress)
        tier.close()
        label = f"memory / memcpy, {block_bytes // MIB} MiB blocks"
        yield Rounds(f"{label}, contiguous", CONTIGUOUS_MIN, seconds["contiguous"], seconds["copy"])
        yield Rounds(f"{label}, {PIECES} pieces", SCATTERED_MIN, seconds["scattered"], seconds["copy"])


def _fill(tier: MemoryTier, block_bytes: int) -> list[BlockKey]:
    random = np.random.default_rng(3)
    keys = [BlockKey(random.bytes(32)) for _ in range(SET_BYTES // block_bytes)]
    for key in keys:
        pieces = [np.frombuffer(random.bytes(block_bytes), np.uint8)]
        outcomes = tier.save(LAYOUT, [key], [Block(NO_PARENT, 1, pieces, payload_sum(pieces))]).outcomes
        assert outcomes == [Outcome.HIT]
    return keys


def _scattered(target: Piece, blocks: int, block_bytes: int) -> list[list[Piece]]:
    """Pieces as an engine has them: one buffer per layer, in which a block is one stretch."""
    layers = target.reshape(PIECES, blocks, block_bytes // PIECES)
    return [[layers[layer, at] for layer in range(PIECES)] for at in range(blocks)]


def _copies(sources: Sequence[Piece], into: Sequence[Sequence[Piece]]) -> Callable[[], None]:
    def copy() -> None:
        for source, pieces in zip(sources, into, strict=True):
            np.copyto(pieces[0], source)

    return copy


def _loads(tier: MemoryTier, keys: Sequence[BlockKey], into: Sequence[Sequence[Piece]]) -> Callable[[], None]:
    def load() -> None:
        outcomes = tier.load(LAYOUT, keys, into, math.inf)
        assert outcomes.count(Outcome.HIT) == len(keys), "a block was not loaded"

    return load
