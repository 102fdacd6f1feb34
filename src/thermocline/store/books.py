"""The store's books: who holds what, who keeps it there, what left and why.

Bookkeeping only: nothing here touches bytes (a tier's `remove` frees room, it does no I/O).
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Sequence
from typing import Literal, get_args

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
from thermocline.store.watch import Watch
from thermocline.tiers.tier import Block, Outcome, SharedTier, Tier

LOG = logging.getLogger("thermocline.store")
EVICT_BATCH = 16
"""Blocks evicted at a time, as leaves of one path lie side by side and so a batch frees room for a large write."""
EVICT_SHARE = 16
"""But no more than one in so many of a tier, beyond what is asked for."""
EXPIRE_BATCH = 512
"""Blocks that one match lets expire. After a long silence there may be more: the next matches go on."""

Verb = Literal["find", "load", "save"]


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
        shared: Sequence[SharedTier] = (),
    ) -> None:
        """`tiers` from warm to cold are in the index; `shared` ones are not, as they evict by themselves."""
        self.clock = clock
        self.metrics = metrics
        self.policy = policy
        self.ttl_seconds = ttl_seconds
        self.tiers: dict[str, Tier] = {tier.name: tier for tier in tiers}
        self.shared: dict[str, SharedTier] = {tier.name: tier for tier in shared}
        self.warm = tiers[0].name
        self.lock = threading.RLock()
        self.index = Index(list(self.tiers), policy)
        self.ghosts = Ghosts()
        self.leases = Leases(self.index, lease_seconds)
        self.watch: Watch | None = None
        self.saving: set[tuple[LayoutId, BlockKey]] = set()
        self.reuse_gap_max = 0.0
        """The longest time after which held blocks were used again, in seconds."""
        # One for each verb: a disk that still takes writes may hang in every read, and a full one may still be read.
        self._breakers: dict[tuple[str, Verb], Breaker] = {}
        for name in (*self.tiers, *self.shared):
            for verb in get_args(Verb):
                self._breakers[name, verb] = Breaker()

    # -- questions -----------------------------------------------------------------------------------------------------

    def covered(self, layouts: Sequence[Layout], keys: Sequence[BlockKey]) -> list[Covered]:
        """How many leading blocks each tier holds of every layout."""
        index = self.index
        return [Covered(name, min(index.covered(layout.id, keys, name) for layout in layouts)) for name in self.tiers]

    def tier(self, name: str) -> Tier:
        """A tier of either kind."""
        return self.shared[name] if name in self.shared else self.tiers[name]

    def well(self, name: str, verb: Verb) -> bool:
        """True while nothing speaks against the tier: what a request relies on. Trials are for the background."""
        return self._breakers[name, verb].closed

    def on_trial(self, name: str, verb: Verb) -> bool:
        """True where the tier was left alone for long enough: tried by the caller then, and left alone by others."""
        if self.well(name, verb) or not self.allows(name, verb):
            return False
        self.trying(name, verb)
        return True

    def allows(self, name: str, verb: Verb) -> bool:
        """False while the tier's breaker is open."""
        return self._breakers[name, verb].allows(self.clock.now())

    def explain(
        self, layouts: Sequence[Layout], keys: Sequence[BlockKey], start: int, held: Sequence[Covered], now: float
    ) -> tuple[Missing, ...]:
        """A reason for every block behind the longest match of the tiers that are up."""
        if start >= len(keys):
            return ()
        parts: list[Missing] = []

        def reaches(stop: int, reason: Reason, detail: str) -> None:
            nonlocal start
            parts.append(Missing(start, stop, reason, detail))
            start = max(start, stop)

        for tier in held:
            reaches(tier.blocks, Reason.TIER_DOWN, f"{tier.tier} is set aside after failures, or closed")
        layout = min(layouts, key=lambda layout: self._reach(layout.id, keys))
        reaches(self._reach(layout.id, keys), Reason.PENDING, "not all ranks have it in one tier yet")
        for name in self.tiers:
            hidden = self.index.covered_or_broken(layout.id, keys, name)
            reaches(hidden, Reason.CORRUPT, f"a block on {name} did not verify")
        being_saved = start
        while being_saved < len(keys) and (layout.id, keys[being_saved]) in self.saving:
            being_saved += 1
        reaches(being_saved, Reason.PENDING, "being saved by another request")
        others = self._covered_by_others(layouts, keys)
        return (*parts, *self.ghosts.explain(layout.id, keys, start, others, now))

    def pins_for(self, plan: Plan) -> list[tuple[int, str]]:
        """The deepest block of every run, in its tier: holding these holds the whole plan, but for shared tiers."""
        return [
            (self.index.node(layout.id, plan.keys[run.stop - 1]), run.tier)
            for run in plan.runs
            if run.tier in self.tiers
            for layout in plan.layouts
        ]

    # -- changes -------------------------------------------------------------------------------------------------------

    def touch(self, layouts: Sequence[Layout], keys: Sequence[BlockKey], held: Sequence[Covered], now: float) -> None:
        """The path was used, in every tier that holds a part of it."""
        for tier in held:
            for layout in layouts if tier.blocks else ():
                node = self.index.node(layout.id, keys[tier.blocks - 1])
                self.reuse_gap_max = max(self.reuse_gap_max, now - self.index.used(node))
                self.index.touch(node, now)

    def enter(self, layout: LayoutId, keys: Sequence[BlockKey], blocks: Sequence[Block], name: str, used: float) -> int:
        """Enter stored blocks, parents first. Returns how many; what lost its parent meanwhile is removed again."""
        with self.lock:
            count = len(keys)
            for at, (key, block) in enumerate(zip(keys, blocks, strict=True)):
                if self.index.add(layout, key, block.parent, block.depth, name, used) == NO_NODE:
                    self._forget(name, layout, keys[at:])
                    count = at
                    break
            if self.watch and count:
                self.watch.entered(name, layout, keys[:count], [block.parent for block in blocks[:count]])
            if count < len(keys):
                return count
            self.ghosts.forget(layout, keys)
            gone = [key for key, there in zip(keys, self.tiers[name].holds(layout, keys), strict=True) if not there]
            if gone:  # lost before it was entered: whoever found that could not tell us
                self.lost(layout, gone, [Outcome.MISS] * len(gone), name)
        return count

    def restore(self, tier: Tier) -> None:
        """Enter what a tier held when it was opened; a block that lacks an ancestor can never match, so it goes too."""
        now, wall = self.clock.now(), self.clock.wall()
        for found in tier.found():
            used = now - np.maximum(0.0, wall - found.stored_wall_seconds)
            self._forget(tier.name, found.layout, self.index.restore(found, tier.name, used))
        self._expire_blocks(now, len(self.index))

    def tell_held(self, watch: Watch, start: int, count: int, told: bytearray) -> int:
        """See `Store.tell_held`."""
        with self.lock:
            next_start, held = self.index.held(start, count, told)
            for (name, layout), (keys, parents) in held.items():
                watch.entered(name, layout, keys, parents)
            return next_start

    def evict(self, name: str, count: int) -> int:
        """Give up at least `count` leaves of a tier where there are so many. Returns how many left."""
        with self.lock:
            self._expire_leases(self.clock.now())
            count = max(count, min(EVICT_BATCH, self.index.blocks(name) // EVICT_SHARE))
            return self._leave_while(name, count, float("inf"), Reason.EVICTED, self.policy.name)

    def expire(self, now: float) -> None:
        """End leases whose time is up, and blocks that were not used for the time to live."""
        self._expire_leases(now)
        self._expire_blocks(now, EXPIRE_BATCH)

    def idle_seconds(self, name: str) -> float:
        """Since the last use of the block that would leave the tier next; 0 where none may leave."""
        with self.lock:
            node = self.index.victim(name)
            return 0.0 if node == NO_NODE else self.clock.now() - self.index.used(node)

    def lost(self, layout: LayoutId, keys: Sequence[BlockKey], outcomes: Sequence[Outcome], name: str) -> None:
        """Of these blocks a tier may not have all that the index promised: take out what it does not hold any more."""
        corrupt = outcomes.count(Outcome.CORRUPT)
        if corrupt:
            self.metrics.count("corrupt_blocks_total", corrupt, (("tier", name),))
            LOG.warning("tier %s: %d blocks did not verify and were dropped", name, corrupt)
        now = self.clock.now()
        damaged = Ghost(Reason.CORRUPT, f"left {name}", "it did not verify", now)
        vanished = Ghost(Reason.EVICTED, f"left {name}", "it was not there any more", now)
        if name in self.shared:
            for key, outcome in zip(keys, outcomes, strict=True):
                if outcome is Outcome.CORRUPT and self.index.node(layout, key) == NO_NODE:
                    self.ghosts.note(layout, key, damaged)
            return
        for key, outcome in zip(keys, outcomes, strict=True):
            node = self.index.node(layout, key) if outcome in _MAY_BE_GONE else NO_NODE
            # Another request may have saved it again since, or be about to enter what it saved.
            if self.index.holds(node, name) and not self.tiers[name].holds(layout, [key])[0]:
                self.ghosts.note(layout, key, damaged if outcome is Outcome.CORRUPT else vanished)
                self.index.lost(node, name)
                if self.watch:
                    self.watch.left(name, layout, [key])

    def not_admitted(self, layout: LayoutId, keys: Sequence[BlockKey]) -> None:
        """These blocks found no room."""
        ghost = Ghost(Reason.NOT_ADMITTED, f"{self.warm} had no room", "", self.clock.now())
        with self.lock:
            for key in keys:
                if self.index.node(layout, key) == NO_NODE:
                    self.ghosts.note(layout, key, ghost)

    def trying(self, name: str, verb: Verb) -> None:
        """A request is about to use the tier; where it failed before, others wait for what becomes of this one."""
        self._breakers[name, verb].trying(self.clock.now())

    def failed(self, name: str, verb: Verb, started: float = math.inf) -> None:
        """A tier failed as a whole, or was late, at what was `started` then."""
        self.metrics.count("tier_failures_total", 1, (("tier", name),))
        if self._breakers[name, verb].failed(self.clock.now(), started):
            self.metrics.count("breaker_opened_total", 1, (("tier", name),))
            LOG.warning("tier %s failed repeatedly to %s and is set aside for a while", name, verb)

    def succeeded(self, name: str, verb: Verb) -> None:
        """A tier answered in time."""
        self._breakers[name, verb].succeeded()

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
            for tier in self.shared.values():
                tier.check_integrity()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _reach(self, layout: LayoutId, keys: Sequence[BlockKey]) -> int:
        return max(self.index.covered(layout, keys, name) for name in self.tiers)

    def _covered_by_others(self, layouts: Sequence[Layout], keys: Sequence[BlockKey]) -> int:
        asked = {layout.id for layout in layouts}
        return max((self._reach(other, keys) for other in self.index.layouts() if other not in asked), default=0)

    def _expire_leases(self, now: float) -> None:
        if ended := self.leases.expire(now):
            self.metrics.count("leases_expired_total", ended)

    def _expire_blocks(self, now: float, count: int) -> None:
        if self.ttl_seconds is not None:
            for name in self.tiers:
                self._leave_while(name, count, now - self.ttl_seconds, Reason.EXPIRED, "time to live")

    def _leave_while(self, name: str, count: int, used_before: float, reason: Reason, by: str) -> int:
        gone: dict[LayoutId, list[BlockKey]] = {}
        left = 0
        with self.lock:
            ghost = Ghost(reason, f"left {name}", by, self.clock.now())
            while left < count and (node := self.index.victim(name, used_before=used_before)) != NO_NODE:
                place = self.index.place(node)
                gone.setdefault(place.layout, []).append(place.key)
                self.index.remove(node, name)
                left += 1
                if self.index.node(*place) == NO_NODE:
                    self.ghosts.note(*place, ghost)
            for layout, keys in gone.items():
                self._forget(name, layout, keys)
                if self.watch:
                    self.watch.left(name, layout, keys)
        if left:
            self.metrics.count("evicted_blocks_total", left, (("tier", name), ("reason", reason)))
        return left

    def _forget(self, name: str, layout: LayoutId, keys: Sequence[BlockKey]) -> None:
        """Have a tier forget blocks. One that raises keeps their room; the books go on."""
        try:
            self.tiers[name].remove(layout, keys)
        except Exception:  # a tier that breaks its promise must not break a request: logged, and the tier has failed
            LOG.exception("tier %s broke its promise while removing", name)
            self.failed(name, "save")


_MAY_BE_GONE = frozenset({Outcome.CORRUPT, Outcome.MISS, Outcome.FAILED})
