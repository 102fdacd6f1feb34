"""What one instance holds: per tier, a bit for each block of a run. And what its events were like."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Sequence

from thermocline.blocks.key import TOKENS_PER_KEY
from thermocline.fleet.chains import RUN_BLOCKS, Place, Run
from thermocline.fleet.instance import Overlaps
from thermocline.fleet.links import WAITING_MAX, Ended, Ends
from thermocline.fleet.wiring import Unplaced
from thermocline.wire.events import BlockStored

DEVICE, HOST, DISK, BYTES, LATELY, BEFORE = range(6)
"""Tiers as the index numbers them. The last three are guesses: what was sent counts as held on the device."""
GUESSES = (BYTES, LATELY, BEFORE)
MASKS_MAX = 4096
_FULL_ATTENTION = ("full", "mla")
MEDIA = {"GPU": DEVICE, "CPU": HOST, "CPU_PINNED": HOST, "STORAGE": DISK, "DISK": DISK}
BITS = [(1 << count) - 1 for count in range(RUN_BLOCKS + 1)]


class Stream:
    """One stream of batches: an engine's rank, or the node behind an instance."""

    __slots__ = ("expected", "other_groups", "seconds", "tiers")

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """As before its first batch."""
        self.expected, self.seconds = 0, 0.0
        self.tiers: set[int] = set()
        self.other_groups: set[int | None] = set()


class Held:
    """All of one slot."""

    __slots__ = (
        "asked",
        "batches",
        "bit",
        "block_tokens",
        "cached",
        "ends",
        "learned",
        "lost",
        "predicted",
        "sources",
        "stored",
        "tiers",
        "unplaced",
        "waiting",
    )

    def __init__(self, bit: int) -> None:
        self.bit = bit
        self.tiers: list[dict[Run, int]] = [{} for _ in range(BEFORE + 1)]
        self.sources: dict[tuple[str, int], Stream] = {}
        self.begin()

    def begin(self) -> None:
        """As before its first batch, but for what it holds."""
        self.batches = self.stored = self.lost = self.learned = self.asked = self.predicted = self.cached = 0
        self.block_tokens = TOKENS_PER_KEY  # of its engine's blocks; until events say so, as small as can be
        self.unplaced: dict[Unplaced, int] = {}
        self.ends = Ends()
        self.waiting: deque[Ended] = deque(maxlen=WAITING_MAX)

    def warm(self) -> list[dict[Run, int]]:
        """Where blocks on the device, or sent there, may stand."""
        return [held for tier, held in enumerate(self.tiers) if held and tier not in {HOST, DISK}]


@functools.lru_cache(MASKS_MAX)
def slots_of(mask: int) -> tuple[int, ...]:
    """The slots whose bits are set."""
    return tuple(slot for slot, bit in enumerate(reversed(f"{mask:b}")) if bit == "1")


def depth_in(path: Sequence[Place], tiers: Sequence[dict[Run, int]]) -> int:
    """How many leading blocks of the path are held in any of the tiers."""
    blocks = 0
    for run, through in path:
        bits = 0
        for held in tiers:
            bits |= held.get(run, 0)
        missing = ~bits & BITS[through]
        if missing:
            return blocks + (missing & -missing).bit_length() - 1
        blocks += through
    return blocks


def in_blocks(found: Overlaps, slots: Sequence[Held]) -> Overlaps:
    """An engine uses whole blocks of its own: a part of one, that it is guessed to hold, counts for nothing."""
    device, host, disk = (
        [tokens // held.block_tokens * held.block_tokens for tokens, held in zip(lengths, slots, strict=False)]
        for lengths in (found.device, found.host, found.disk)
    )
    return Overlaps(device, host, disk, found.name)


def unusable(event: BlockStored) -> Unplaced | None:
    """Why these blocks cannot be filed, whatever was announced before."""
    blocks = len(event.hashes)
    if not (event.kind.startswith(_FULL_ATTENTION) if event.kind else not event.group):
        return Unplaced.GROUP
    if event.medium not in MEDIA or event.locality == "REMOTE":
        return Unplaced.MEDIUM
    if event.block_tokens % TOKENS_PER_KEY:
        return Unplaced.BLOCK_SIZE
    wrong = event.tokens and len(event.tokens) != blocks * event.block_tokens
    if not blocks or wrong or (event.extra_keys and len(event.extra_keys) != blocks):
        return Unplaced.LENGTHS
    return None
