"""The tiers that the suite runs on, and how a test opens each of them again and again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from tests.conformance.faulty import FaultyTier, Schedule
from tests.conformance.samples import FREED
from thermocline.blocks.slab import Slab
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.segments import Read
from thermocline.tiers.tier import Tier

MIB = 1 << 20
MEMORY_BYTES = 32 * MIB
DISK_BYTES = 48 * MIB


@dataclass
class Opening:
    """How to open one kind of tier. `exact` says that nothing goes wrong by itself, so what was saved must be a HIT."""

    kind: str
    open_plain: Callable[[], Tier]
    exact: bool = True
    persistent: bool = False
    wrap: Callable[[Tier], Tier] = lambda tier: tier
    _opened: list[Tier] = field(default_factory=list)

    def open(self):
        """The tier, opened; what an earlier opening of this test kept is found again if the tier is persistent."""
        tier = self.wrap(self.open_plain())
        self._opened.append(tier)
        return tier

    def close(self):
        """Close whatever the test left open."""
        for tier in self._opened:
            tier.close()


def memory():
    """The memory tier."""
    return Opening("memory", lambda: MemoryTier(MEMORY_BYTES))


def disk(path):
    """The disk tier, with a queue that holds less than the whole disk."""
    return Opening("disk", lambda: DiskTier(path / "tier", DISK_BYTES, queue_bytes_max=12 * MIB), persistent=True)


def faulty(opening, seed=0):
    """The same tier, failing on a schedule; every opening goes on with another seed."""
    seeds = count(seed)
    wrap = lambda tier: FaultyTier(tier, Schedule(next(seeds)))  # noqa: E731  # one line says it
    return Opening(f"{opening.kind}-faulty", opening.open_plain, exact=False, persistent=opening.persistent, wrap=wrap)


def poison_freed_memory(monkeypatch):
    """Fill every slot and buffer with 0xA5 at the moment it is given back, so that a late reader finds that."""
    give_back = Read._give_back

    def poisoned_give(slab, slot):
        with slab._lock:  # nobody takes it before the poison is in
            view = slab.view(slot, slab._slots._units[slot.unit].slot_bytes)
            slab._slots.give(slot)
            view[:] = FREED

    def poisoned_give_back(read, buffer):
        buffer[:] = FREED
        give_back(read, buffer)

    monkeypatch.setattr(Slab, "give", poisoned_give)
    monkeypatch.setattr(Read, "_give_back", poisoned_give_back)
