"""The tiers that the suite runs on, and how a test opens each of them again and again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count

from tests.conformance.faulty import FaultyTier, Schedule
from tests.conformance.samples import FREED, PATIENCE_SECONDS
from thermocline.blocks.slab import Slab
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.redis import RedisTier
from thermocline.tiers.redis_scripts import Space
from thermocline.tiers.segments import Read
from thermocline.tiers.tier import Tier
from thermocline.wire.resp import Address

MIB = 1 << 20
MEMORY_BYTES = 32 * MIB
DISK_BYTES = 48 * MIB
REDIS_BYTES = 32 * MIB
CAPACITY_BYTES_MAX = max(MEMORY_BYTES, DISK_BYTES, REDIS_BYTES)


@dataclass
class Opening:
    """How to open one kind of tier. `exact` says that nothing goes wrong by itself, so what was saved must be a HIT.

    `evicts`: it makes room by itself, so that it is never FULL, and what was saved first goes first. `keeps_the_first`:
    blocks do not change, so a save of what it has already writes nothing. `settle` waits until a tier that gave up on a
    slow medium has taken it up again.
    """

    kind: str
    open_plain: Callable[[], Tier]
    exact: bool = True
    persistent: bool = False
    evicts: bool = False
    keeps_the_first: bool = False
    settle: Callable[[Tier], object] = lambda tier: None
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


def redis(server, **options):
    """The Redis tier on a real server, which is emptied first, with more patience than it has in service."""
    server.call("FLUSHALL")
    address, space = Address.parse(server.url), Space(b"conformance", REDIS_BYTES, 3600.0)

    def open_up():
        tier = RedisTier(address, space, **{"wait_seconds": PATIENCE_SECONDS, "queue_bytes_max": 12 * MIB, **options})
        assert tier.wait_up(PATIENCE_SECONDS)
        return tier

    settle = lambda tier: tier.wait_up(PATIENCE_SECONDS)  # noqa: E731  # one line says it
    return Opening("redis", open_up, evicts=True, keeps_the_first=True, settle=settle)


def faulty(opening, seed=0):
    """The same tier, failing on a schedule; every opening goes on with another seed."""
    seeds = count(seed)
    wrap = lambda tier: FaultyTier(tier, Schedule(next(seeds)))  # noqa: E731  # one line says it
    return replace(opening, kind=f"{opening.kind}-faulty", exact=False, wrap=wrap, _opened=[])


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
