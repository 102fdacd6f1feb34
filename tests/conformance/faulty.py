"""A tier that fails on a schedule: what a store must live with, replayed exactly by its seed.

It wraps any tier and never breaks the seam's promises: it only does what a medium may do to it. Give it to a store, or
run the conformance suite on it.
"""

from __future__ import annotations

import enum
import os
import random
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from thermocline.blocks.frame import PAGE_BYTES, read_header
from thermocline.clock import SystemClock
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.redis import RedisTier
from thermocline.tiers.shelves import slot_at
from thermocline.tiers.tier import Job, Outcome
from thermocline.wire.resp import connect, encode

CLOCK = SystemClock()


class Fault(enum.StrEnum):
    """What goes wrong in one operation."""

    CORRUPT = "corrupt"  # a bit of one stored block changes before a load
    LOSE = "lose"  # one block is gone before a load
    LATE = "late"  # a load answers LATE, having written anything into the caller's pieces
    FAIL = "fail"  # a load answers FAILED, likewise
    DROP = "drop"  # a save is not taken: LATE or FAILED
    FULL = "full"  # a save finds no room
    SILENT = "silent"  # a shared tier does not say what it holds


LOAD_FAULTS = (Fault.CORRUPT, Fault.LOSE, Fault.LATE, Fault.FAIL)
SAVE_FAULTS = (Fault.DROP, Fault.FULL)
FIND_FAULTS = (Fault.SILENT,)


@dataclass
class Schedule:
    """Which operation fails how: `chances[fault]` of all operations of its kind, decided by the seed and the count."""

    seed: int = 0
    chances: dict[Fault, float] = field(default_factory=lambda: dict.fromkeys(Fault, 0.05))
    happened: Counter[Fault] = field(default_factory=Counter)

    def __post_init__(self):
        self._random = random.Random(self.seed)  # noqa: S311  # a seed must replay

    def next(self, faults):
        """The fault of the next operation, or None. Draws the same number of times whatever the chances are."""
        draws = [(fault, self._random.random()) for fault in faults]
        for fault, draw in draws:
            if draw < self.chances.get(fault, 0.0):
                self.happened[fault] += 1
                return fault
        return None

    def pick(self, count):
        """A number below `count`."""
        return self._random.randrange(count)


class FaultyTier:
    """Passes everything on to `tier`, except for what the schedule says."""

    def __init__(self, tier, schedule=None):
        self._tier = tier
        self.schedule = schedule or Schedule()

    def __getattr__(self, name):
        return getattr(self._tier, name)

    def load(self, layout, keys, into, deadline):
        """See `Tier.load`."""
        fault = self.schedule.next(LOAD_FAULTS) if keys else None
        if fault in {Fault.LATE, Fault.FAIL}:
            for pieces in into:
                for piece in pieces:
                    piece[:] = self.schedule.pick(256)
            return [Outcome.LATE if fault is Fault.LATE else Outcome.FAILED] * len(keys)
        if fault is not None:
            key = keys[self.schedule.pick(len(keys))]
            if fault is Fault.LOSE:
                self._tier.remove(layout, [key])
            elif self._tier.holds(layout, [key])[0]:
                damage(self._tier, layout, key, self.schedule.pick)
        return self._tier.load(layout, keys, into, deadline)

    def find(self, layout, keys, deadline):
        """See `SharedTier.find`."""
        if keys and self.schedule.next(FIND_FAULTS) is not None:
            return [(Outcome.LATE, Outcome.FAILED)[self.schedule.pick(2)]] * len(keys)
        return self._tier.find(layout, keys, deadline)

    def save(self, layout, keys, blocks):
        """See `Tier.save`."""
        fault = self.schedule.next(SAVE_FAULTS) if keys else None
        if fault is None:
            return self._tier.save(layout, keys, blocks)
        refusal = Outcome.FULL if fault is Fault.FULL else (Outcome.LATE, Outcome.FAILED)[self.schedule.pick(2)]
        job = Job([refusal] * len(keys))
        job.set_done()
        return job


def damage(tier, layout, key, pick):
    """Flip one bit of a stored block, anywhere in its payload; of a frame also in its header page."""
    if isinstance(tier, MemoryTier):
        view, _ = tier.block(layout, key)
        view[pick(view.nbytes)] ^= 1 << pick(8)
    elif isinstance(tier, DiskTier):
        segment, offset, length = where(tier, layout, key)
        flip(segment, offset + pick(PAGE_BYTES + length), pick(8))
    elif isinstance(tier, RedisTier):
        flip_value(tier, layout, key, pick)
    else:
        raise TypeError(tier)


def flip_value(tier, layout, key, pick):
    """Flip one bit of a value in Redis, header page or payload; nothing if it is gone or damaged already."""
    name = tier._space.value(layout, key)
    deadline = CLOCK.now() + 10.0
    with closing(connect(tier._address, now=CLOCK.now, deadline=deadline)) as link:

        def ask(*words):
            link.send([encode(*words)], deadline)
            return link.reply(deadline)

        header = read_header(np.frombuffer(ask(b"GETRANGE", name, b"0", b"%d" % (PAGE_BYTES - 1)), np.uint8))
        if header is not None:
            at = b"%d" % pick(8 * (PAGE_BYTES + header.length_bytes))
            ask(b"SETBIT", name, at, b"%d" % (1 - ask(b"GETBIT", name, at)))


def where(tier, layout, key):
    """The segment file of a block on disk, the offset of its frame there, and the length of its payload."""
    shelf = tier._shelves[layout]
    slot = slot_at(shelf.entries[key])
    return tier._segments.file(slot.unit), slot.number * shelf.frame_bytes, shelf.length_bytes


def flip(path, offset, bit=0):
    """Flip one bit of a file, on the medium."""
    with path.open("r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, offset)
        os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << bit]), offset)
        os.fdatasync(file.fileno())


def overwrite(path, offset, data):
    """Put bytes at an offset of a file, on the medium."""
    with path.open("r+b", buffering=0) as file:
        os.pwrite(
            file.fileno(), memoryview(np.ascontiguousarray(data)) if isinstance(data, np.ndarray) else data, offset
        )
        os.fdatasync(file.fileno())
