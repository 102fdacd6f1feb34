"""Tiers that break a promise. The suite must find every one of them out: one that lets a liar pass is worth nothing."""

from __future__ import annotations

import threading
from dataclasses import replace

from tests.conformance.samples import CLOCK
from thermocline.blocks.frame import payload_sum
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.redis import RedisTier
from thermocline.tiers.tier import Block, Job, Outcome


class _Liar:
    """Tells the truth."""

    def __init__(self, tier):
        self._tier = tier

    def __getattr__(self, name):
        return getattr(self._tier, name)

    def load(self, layout, keys, into, deadline):
        return self._tier.load(layout, keys, into, deadline)

    def save(self, layout, keys, blocks):
        return self._tier.save(layout, keys, blocks)


class FlipsABit(_Liar):
    """Says HIT, with one bit of the last block wrong."""

    def load(self, layout, keys, into, deadline):
        outcomes = super().load(layout, keys, into, deadline)
        for pieces, outcome in zip(into[-1:], outcomes[-1:], strict=True):
            if outcome is Outcome.HIT:
                pieces[-1][-1] ^= 0x80
        return outcomes


class ForgetsToVerify(_Liar):
    """Says HIT where the bytes do not match their sum."""

    def load(self, layout, keys, into, deadline):
        outcomes = super().load(layout, keys, into, deadline)
        return [Outcome.HIT if outcome is Outcome.CORRUPT else outcome for outcome in outcomes]


class KeepsDamage(_Liar):
    """Finds damage and goes on holding it."""

    def __init__(self, tier):
        super().__init__(tier)
        self._corrupt = set()

    def load(self, layout, keys, into, deadline):
        outcomes = super().load(layout, keys, into, deadline)
        self._corrupt |= {(layout, key) for key, out in zip(keys, outcomes, strict=True) if out is Outcome.CORRUPT}
        return outcomes

    def holds(self, layout, keys):
        return [
            held or (layout, key) in self._corrupt
            for held, key in zip(self._tier.holds(layout, keys), keys, strict=True)
        ]


class HitsWhatIsNotThere(_Liar):
    """Says HIT for blocks that were never saved."""

    def load(self, layout, keys, into, deadline):
        outcomes = super().load(layout, keys, into, deadline)
        return [Outcome.HIT if outcome is Outcome.MISS else outcome for outcome in outcomes]


class MixesLayouts(_Liar):
    """Takes a key for the whole name of a block."""

    def __init__(self, tier):
        super().__init__(tier)
        self._layout = None

    def load(self, layout, keys, into, deadline):
        return super().load(self._layout or layout, keys, into, deadline)

    def save(self, layout, keys, blocks):
        self._layout = self._layout or layout
        return super().save(self._layout, keys, blocks)


class SwapsBlocks(_Liar):
    """Gives two blocks of one load to each other."""

    def load(self, layout, keys, into, deadline):
        if len(into) > 1:
            into = [into[1], into[0], *into[2:]]
        return super().load(layout, keys, into, deadline)


class Raises(_Liar):
    """Raises where a miss would do."""

    def load(self, layout, keys, into, deadline):
        outcomes = super().load(layout, keys, into, deadline)
        if Outcome.MISS in outcomes:
            raise KeyError(keys[outcomes.index(Outcome.MISS)])
        return outcomes


class AnswersTooLittle(_Liar):
    """Stops answering at the first block that is not there."""

    def load(self, layout, keys, into, deadline):
        outcomes = super().load(layout, keys, into, deadline)
        return outcomes[: outcomes.index(Outcome.MISS)] if Outcome.MISS in outcomes else outcomes


class WritesLater(_Liar):
    """Answers LATE at once, and copies when it gets to it."""

    def load(self, layout, keys, into, deadline):
        thread = threading.Timer(0.02, super().load, (layout, keys, into, float("inf")))
        thread.daemon = True
        thread.start()
        return [Outcome.LATE] * len(keys)


class BorrowsBuffers(_Liar):
    """Says that a save is done, and reads the caller's pieces when somebody loads."""

    def __init__(self, tier):
        super().__init__(tier)
        self._borrowed = []

    def load(self, layout, keys, into, deadline):
        for save in self._borrowed:
            self._tier.save(*save).wait(10)
        self._borrowed.clear()
        return super().load(layout, keys, into, deadline)

    def save(self, layout, keys, blocks):
        self._borrowed.append((layout, keys, blocks))
        job = Job([Outcome.HIT] * len(keys))
        job.set_done()
        return job


class NeverEnds(_Liar):
    """Keeps what it is given and leaves the job open at closing."""

    def save(self, layout, keys, blocks):
        super().save(layout, keys, blocks).wait(10)
        return Job([Outcome.HIT] * len(keys))


class BlessesDamage(_Liar):
    """Computes a fresh sum over whatever arrives."""

    def save(self, layout, keys, blocks):
        return super().save(layout, keys, [replace(block, sum=payload_sum(block.pieces)) for block in blocks])


class KeepsTheOld(_Liar):
    """Drops a save of a key that it holds, and says that it took it."""

    def save(self, layout, keys, blocks):
        held = self._tier.holds(layout, keys)
        if not all(held) or not keys:
            return super().save(layout, keys, blocks)
        job = Job([Outcome.HIT] * len(keys))
        job.set_done()
        return job


class RemovesNothing(_Liar):
    """Counts what it should remove, and keeps it."""

    def remove(self, layout, keys):
        return sum(self._tier.holds(layout, keys))


class Leaks(_Liar):
    """Keeps a block nobody knows of for every one it removes."""

    def remove(self, layout, keys):
        removed = self._tier.remove(layout, keys)
        if removed and isinstance(self._tier, MemoryTier):
            self._tier._slab.take(4096, 40 * removed)
        elif removed and isinstance(self._tier, RedisTier):
            space = self._tier._space
            self._tier._space = replace(space, capacity_bytes=space.capacity_bytes * 19 // 20)
        elif removed:
            with self._tier._lock:
                self._tier._slots.take(8192, 40 * removed)
        return removed


class HoldsEverything(_Liar):
    """Says that it holds whatever it is asked for."""

    def holds(self, layout, keys):
        return [True] * len(keys)


class KnowsNoCap(_Liar):
    """Uses more than its capacity."""

    def usage(self):
        usage = self._tier.usage()
        return replace(usage, used_bytes=usage.used_bytes + usage.capacity_bytes // 10)


class NeverFull(_Liar):
    """Says LATE for ever where there is no room."""

    def save(self, layout, keys, blocks):
        job = super().save(layout, keys, blocks)
        job.outcomes[:] = [Outcome.LATE if outcome is Outcome.FULL else outcome for outcome in job.outcomes]
        return job


class DoneBeforeVisible(_Liar):
    """Tells of the end before the beginning."""

    def save(self, layout, keys, blocks):
        job = super().save(layout, keys, blocks)
        job.watch = lambda *, visible=None, done=None: [call(job) for call in (done, visible) if call]
        return job


class VisibleTooSoon(_Liar):
    """Calls a block visible that it does not hold."""

    def __init__(self, tier):
        super().__init__(tier)
        self._hidden = set()

    def save(self, layout, keys, blocks):
        self._hidden.update(keys[-1:])
        return super().save(layout, keys, blocks)

    def holds(self, layout, keys):
        held = self._tier.holds(layout, keys)
        return [here and key not in self._hidden for here, key in zip(held, keys, strict=True)]


class FailsOnClosing(_Liar):
    """Cannot be closed twice."""

    def __init__(self, tier):
        super().__init__(tier)
        self._closed = False

    def close(self):
        self._tier.close()
        if self._closed:
            self._closed = False
            raise OSError("closed already")
        self._closed = True


class FindsNothing(_Liar):
    """Holds what it kept, and tells nobody."""

    def found(self):
        return []


class ConfusesParents(_Liar):
    """Hands out what it kept under the parents of other blocks."""

    def found(self):
        return [replace(part, parents=part.parents[::-1]) for part in self._tier.found()]


class LosesParents(_Liar):
    """Stores blocks under the parent and depth of a first block."""

    def save(self, layout, keys, blocks):
        return super().save(layout, keys, [Block(bytes(32), 1, block.pieces, block.sum) for block in blocks])


class TearsConcurrentReads(_Liar):
    """Verifies first and copies afterwards, so a slot that is given away in between is handed out as a HIT."""

    def load(self, layout, keys, into, deadline):
        outcomes = super().load(layout, keys, into, deadline)
        for key, pieces, outcome in zip(keys, into, outcomes, strict=True):
            lent = (
                self._tier.block(layout, key) if outcome is Outcome.HIT and isinstance(self._tier, MemoryTier) else None
            )
            if lent and len(pieces) == 1:
                CLOCK.sleep(0.001)  # a machine with little to do would hardly ever give the slot away in between
                pieces[0][:] = lent[0][: pieces[0].nbytes]
        return outcomes


class DropsOnClosing(_Liar):
    """Says done, and forgets what it was given last when it is closed."""

    def __init__(self, tier):
        super().__init__(tier)
        self._last = None

    def save(self, layout, keys, blocks):
        self._last = (layout, keys)
        return super().save(layout, keys, blocks)

    def close(self):
        if self._last and isinstance(self._tier, DiskTier):
            self._tier.wait_idle(10)
            self._tier.remove(*self._last)
            self._last = None
        self._tier.close()


LIARS = [
    liar for liar in globals().values() if isinstance(liar, type) and issubclass(liar, _Liar) and liar is not _Liar
]
ONLY_PERSISTENT = {FindsNothing, ConfusesParents, LosesParents, DropsOnClosing}
ONLY_MEMORY = {TearsConcurrentReads}
NOT_IF_IT_EVICTS = {KeepsTheOld, NeverFull}
"""What such a tier may do: blocks do not change, and it is never full."""
