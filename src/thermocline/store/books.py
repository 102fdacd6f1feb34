"""The store's books: who holds what, who keeps it there, what left and why.

Bookkeeping only: nothing here touches bytes (a tier's `remove` frees room, it does no I/O).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import numpy as np

from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import Layout, LayoutId
from thermocline.clock import Clock
from thermocline.metrics import Metrics
from thermocline.store.breaker import Breaker
from thermocline.store.evict import Eviction
from thermocline.store.ghosts import Ghost, Ghosts
from thermocline.store.index import NO_NODE, Index
from thermocline.store.leases import Leases
from thermocline.store.plan import Covered, Plan
from thermocline.store.receipt import Missing, Reason
from thermocline.tiers.tier import Block, Outcome, Tier

LOG = logging.getLogger("thermocline.store")
EVICT_BATCH_MIN = 16
"""Blocks evicted at a time: leaves of one path lie side by side, so a batch frees room for a large write."""


class Books:
    """Shared by the store and its mover. `lock` guards everything here; the public verbs take it themselves."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        clock: Clock,
        policy: Eviction,
        metrics: Metrics,
        ttl_seconds: float | None,
        lease_seconds: float,
    ) -> None:
        self.clock = clock
        self.metrics = metrics
        self.policy = policy
        self.ttl_seconds = ttl_seconds
        self.tiers: dict[str, Tier] = {tier.name: tier for tier in tiers}
        self.warm = tiers[0].name
        self.lock = threading.RLock()
        self.index = Index(list(self.tiers), policy)
        self.ghosts = Ghosts()
        self.leases = Leases(self.index, lease_seconds)
        self.saving: set[tuple[LayoutId, BlockKey]] = set()
        self._breakers = {name: Breaker() for name in self.tiers}

    # -- questions -----------------------------------------------------------------------------------------------------

    def covered(self, layouts: Sequence[Layout], keys: Sequence[BlockKey]) -> list[Covered]:
        """How many leading blocks each tier holds of every layout."""
        index = self.index
        return [Covered(name, min(index.covered(layout.id, keys, name) for layout in layouts)) for name in self.tiers]

    def allows(self, name: str) -> bool:
        """False while the tier's breaker is open."""
        return self._breakers[name].allows(self.clock.now())

    def explain(
        self, layout: Layout, keys: Sequence[BlockKey], start: int, held: Sequence[Covered], now: float
    ) -> tuple[Missing, ...]:
        """A reason for every block behind the longest match of the tiers that are up."""
        parts: list[Missing] = []
        for tier in held:
            if tier.blocks > start:
                parts.append(Missing(start, tier.blocks, Reason.TIER_DOWN, f"{tier.tier} is set aside after failures"))
                start = tier.blocks
        for name in self.tiers:
            hidden = self.index.covered_or_broken(layout.id, keys, name)
            if hidden > start:
                parts.append(Missing(start, hidden, Reason.CORRUPT, f"a block on {name} did not verify"))
                start = hidden
        pending = start
        while pending < len(keys) and (layout.id, keys[pending]) in self.saving:
            pending += 1
        parts.append(Missing(start, pending, Reason.PENDING, "being saved by another request"))
        other = self._covered_by_others(layout.id, keys, pending)
        parts.append(Missing(pending, other, Reason.OTHER_LAYOUT, "held for another layout"))
        return (*parts, *self.ghosts.explain(keys, other, layout.id, now))

    def pins_for(self, plan: Plan) -> list[tuple[int, str]]:
        """The deepest block of every run, in its tier: holding these holds the whole plan."""
        return [
            (self.index.node(layout.id, plan.keys[run.stop - 1]), run.tier)
            for run in plan.runs
            for layout in plan.layouts
        ]

    # -- changes -------------------------------------------------------------------------------------------------------

    def touch(self, layouts: Sequence[Layout], keys: Sequence[BlockKey], held: Sequence[Covered], now: float) -> None:
        """The path was used, in every tier that holds a part of it."""
        for tier in held:
            for layout in layouts if tier.blocks else ():
                self.index.touch(self.index.node(layout.id, keys[tier.blocks - 1]), now)

    def enter(self, layout: LayoutId, keys: Sequence[BlockKey], blocks: Sequence[Block], name: str) -> int:
        """Enter stored blocks, parents first. Returns how many; what lost its parent meanwhile is removed again."""
        now = self.clock.now()
        with self.lock:
            for at, (key, block) in enumerate(zip(keys, blocks, strict=True)):
                if self.index.add(layout, key, block.parent, block.depth, name, now) == NO_NODE:
                    self.tiers[name].remove(layout, keys[at:])
                    return at
            self.ghosts.forget(keys)
        return len(keys)

    def restore(self, tier: Tier) -> None:
        """Enter what a tier held when it was opened; a block whose parent is gone can never match, so it goes too."""
        now, wall = self.clock.now(), self.clock.wall()
        for found in tier.found():
            used = (now - np.maximum(0.0, wall - np.array(found.stored_wall_seconds))).tolist()
            tier.remove(found.layout, self.index.restore(found, tier.name, used))

    def evict(self, name: str, count: int) -> int:
        """Give up at least `count` leaves of a tier where there are so many. Returns how many left."""
        return self._leave_while(name, max(count, EVICT_BATCH_MIN), float("inf"), Reason.EVICTED, self.policy.name)

    def expire(self, now: float) -> None:
        """End leases whose time is up, and blocks that were not used for the time to live."""
        self.leases.expire(now)
        if self.ttl_seconds is not None:
            for name in self.tiers:
                self._leave_while(name, len(self.index), now - self.ttl_seconds, Reason.EXPIRED, "time to live")

    def lost(self, layout: LayoutId, key: BlockKey, name: str, outcome: Outcome) -> None:
        """A tier does not have a block that the index promised."""
        if outcome is Outcome.CORRUPT:
            self.metrics.count("corrupt_blocks_total", 1, (("tier", name),))
            LOG.warning("tier %s: a block did not verify and was dropped", name)
        node = self.index.node(layout, key)
        if node != NO_NODE and self.index.holds(node, name):
            self.index.lost(node, name)
            if self.index.node(layout, key) == NO_NODE:
                reason = Reason.CORRUPT if outcome is Outcome.CORRUPT else Reason.EVICTED
                self.ghosts.note(key, Ghost(layout, reason, name, "did not verify", self.clock.now()))

    def not_admitted(self, layout: LayoutId, keys: Sequence[BlockKey]) -> None:
        """These blocks found no room."""
        now = self.clock.now()
        with self.lock:
            for key in keys:
                self.ghosts.note(key, Ghost(layout, Reason.NOT_ADMITTED, self.warm, "no room", now))

    def failed(self, name: str) -> None:
        """A tier failed as a whole, or was late."""
        self.metrics.count("tier_failures_total", 1, (("tier", name),))
        if self._breakers[name].failed(self.clock.now()):
            self.metrics.count("breaker_opened_total", 1, (("tier", name),))
            LOG.warning("tier %s failed repeatedly and is set aside for a while", name)

    def succeeded(self, name: str) -> None:
        """A tier did all it was asked."""
        self._breakers[name].succeeded()

    def check_integrity(self) -> None:
        """Closure, counts and room add up, and index and tiers agree. Raises AssertionError."""
        with self.lock:
            self.index.check_integrity()
            for name, tier in self.tiers.items():
                tier.check_integrity()
                entered, held = self.index.blocks(name) - self.index.broken(name), tier.usage().blocks
                assert entered == held, f"{name}: {entered} blocks in the index, {held} in the tier"
                if not self.leases:
                    assert self.index.pins(name) == 0, f"{name}: pins are left over"

    # -- inside --------------------------------------------------------------------------------------------------------

    def _leave_while(self, name: str, count: int, used_before: float, reason: Reason, by: str) -> int:
        gone: dict[LayoutId, list[BlockKey]] = {}
        left = 0
        with self.lock:
            while left < count and (node := self.index.victim(name, used_before=used_before)) != NO_NODE:
                place = self.index.place(node)
                gone.setdefault(place.layout, []).append(place.key)
                self.index.remove(node, name)
                left += 1
                if self.index.node(*place) == NO_NODE:
                    self.ghosts.note(place.key, Ghost(place.layout, reason, name, by, self.clock.now()))
            for layout, keys in gone.items():
                self.tiers[name].remove(layout, keys)
        if left:
            self.metrics.count("evicted_blocks_total", left, (("tier", name), ("reason", reason)))
        return left

    def _covered_by_others(self, layout: LayoutId, keys: Sequence[BlockKey], start: int) -> int:
        others = [other for other in self.index.layouts() if other != layout]
        held = [self.index.covered(other, keys, name) for other in others for name in self.tiers]
        return max([start, *held])
