"""The store: match, load, save. It decides with pure functions (plan, evict), and has the tiers move the bytes."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from thermocline.blocks.frame import payload_sum
from thermocline.blocks.key import NO_PARENT, BlockKey
from thermocline.blocks.layout import Layout, LayoutId
from thermocline.blocks.slots import Slot
from thermocline.clock import Clock, SystemClock
from thermocline.costs.model import LearnedCosts
from thermocline.metrics import Metrics
from thermocline.store.books import Books
from thermocline.store.evict import Eviction, LeastRecent
from thermocline.store.index import NO_NODE
from thermocline.store.mover import Mover
from thermocline.store.plan import Covered, Plan, make_plan
from thermocline.store.receipt import Missing, Reason, merged
from thermocline.store.receipts import RECEIPTS_KEPT, Loaded, Receipts
from thermocline.store.shared import SharedTiers
from thermocline.store.watch import Watch
from thermocline.tiers.tier import (
    Block,
    Job,
    LendingTier,
    Medium,
    Outcome,
    Piece,
    SharedTier,
    Tier,
    Usage,
    leading_hits,
)

LOG = logging.getLogger("thermocline.store")
LEASE_SECONDS = 30.0
LOAD_SECONDS_MAX = 10.0
EVICT_ROUNDS_MAX = 4
FAIR_SECONDS = 0.02
"""A tier that was given less time than this, as others had used it up, is not blamed for being late."""


class Store:
    """Keeps blocks in tiers from warm to cold, each prefix-closed. Any thread may call any verb.

    The warm tier is memory of this process and takes every save; what it holds is written on to the colder ones behind
    the caller's back. Shared tiers among those belong to other processes too: they are asked at a match, and offered
    what is saved. The store owns its tiers and closes them.
    """

    def __init__(  # noqa: PLR0913  # each has a default, and a value that bundles them would only repeat them
        self,
        warm: LendingTier,
        cold: Sequence[Tier] = (),
        *,
        clock: Clock | None = None,
        policy: Eviction | None = None,
        ttl_seconds: float | None = None,
        lease_seconds: float = LEASE_SECONDS,
        load_seconds_max: float = LOAD_SECONDS_MAX,
        receipts_kept: int = RECEIPTS_KEPT,
        costs: LearnedCosts | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._load_seconds_max = load_seconds_max
        self._warm = warm
        self._closed = False
        self.costs = costs or LearnedCosts()
        self.receipts = Receipts(receipts_kept, clock=self._clock)
        self.metrics = Metrics()
        shared = [tier for tier in cold if isinstance(tier, SharedTier)]
        cold = [tier for tier in cold if not isinstance(tier, SharedTier)]
        self._books = Books(
            [warm, *cold],
            clock=self._clock,
            policy=policy or LeastRecent(),
            metrics=self.metrics,
            ttl_seconds=ttl_seconds,
            lease_seconds=lease_seconds,
            shared=shared,
        )
        self._shared = SharedTiers(self._books, warm, shared, lambda: self.costs)
        self._mover = Mover(self._books, warm, cold, self._shared, self._load_from, self._save_at, lambda: self.costs)
        for tier in cold:
            self._books.restore(tier)

    # -- match ---------------------------------------------------------------------------------------------------------

    def match(self, layouts: Sequence[Layout], keys: Sequence[BlockKey], *, prompt_tokens: int) -> Plan:
        """The plan for a prompt whose full blocks have these keys; takes a lease if it loads.

        Touches no medium, but asks a shared tier for what the store's own lack: one round trip, within a bound. With
        several layouts (ranks, groups) only blocks that all of them have count. Release the plan's lease when the load
        is over, whatever became of it.
        """
        books, now = self._books, self._clock.now()
        answers = self._shared.ask(layouts, keys, prompt_tokens) if self._shared and not self._closed else []
        with books.lock:
            books.expire(now)
            held = books.covered(layouts, keys)
            up = [tier for tier in held if self._relies_on(tier.tier) and not self._closed]
            up += [Covered(answer.tier, answer.held) for answer in answers if answer.held > answer.start]
            plan = make_plan(layouts, keys, prompt_tokens, up, self.costs)
            matched = max((tier.blocks for tier in up), default=0)
            missing = books.explain(layouts, keys, matched, held, now)
            for answer in answers:
                missing = answer.blamed(missing)
            books.touch(layouts, keys, held, now)
            lease = books.leases.take(books.pins_for(plan), now)
        self._probe(layouts[0], keys, plan.blocks, (*held, *(Covered(each.tier, each.probed) for each in answers)))
        seconds = self._clock.now() - now
        self.metrics.count("matches_total")
        self.metrics.count("match_seconds_total", seconds)
        return replace(
            plan,
            missing=merged((*plan.missing, *missing)),
            lease=lease,
            load_seconds_max=min(plan.load_seconds_max, self._load_seconds_max),
            match_seconds=seconds,
        )

    def missing(self, layouts: Sequence[Layout], keys: Sequence[BlockKey]) -> Sequence[Missing]:
        """Why the store's own tiers lack what they lack of a path, now. Asks no shared tier."""
        with self._books.lock:
            held = self._books.covered(layouts, keys)
            matched = max((tier.blocks for tier in held), default=0)
            return self._books.explain(layouts, keys, matched, held, self._clock.now())

    def _probe(self, layout: Layout, keys: Sequence[BlockKey], planned: int, held: Sequence[Covered]) -> None:
        """Have tiers tried in the background that were declined, or set aside for long enough: no request waits."""
        for tier in held:
            if tier.blocks > planned and tier.tier != self._warm.name:
                with self._books.lock:
                    set_aside = not self._books.well(tier.tier, "load")
                    wanted = self._books.on_trial(tier.tier, "load") if set_aside else True
                if wanted:
                    self._mover.probe(tier.tier, layout, keys[planned : tier.blocks], at_once=set_aside)

    def _relies_on(self, name: str) -> bool:
        """Memory of this process is tried by requests; any other tier in trouble in the background."""
        return self._books.well(name, "load") or (name == self._warm.name and self._books.on_trial(name, "load"))

    def release(self, lease: int) -> None:
        """The blocks of a plan may go. A second call does nothing."""
        with self._books.lock:
            self._books.leases.release(lease)

    def unsaved(self, layout: Layout, keys: Sequence[BlockKey]) -> int:
        """How many leading blocks a save could leave out, as they are in the warm tier."""
        with self._books.lock:
            return self._books.index.covered(layout.id, keys, self._warm.name)

    # -- load ----------------------------------------------------------------------------------------------------------

    def load(self, plan: Plan, rank: int, into: Sequence[Sequence[Piece]]) -> Loaded:
        """Carry out a plan for one of its layouts: copy into the caller's pieces, and verify there.

        Stops at the first block that no tier has intact and in time. Returns within the plan's time; after that nothing
        writes into `into`. Raises ValueError if `into` has fewer blocks than the plan.
        """
        if len(into) < plan.blocks:
            raise ValueError(f"a plan of {plan.blocks} blocks cannot be loaded into {len(into)}")
        started = self._clock.now()
        layout = plan.layouts[rank]
        deadline = started + plan.load_seconds_max
        by_tier: Counter[str] = Counter()
        missing: tuple[Missing, ...] = ()
        at = 0
        for run in plan.runs:
            part = slice(at, run.stop)
            hits, why = self._load_run(run.tier, layout, plan.keys[part], into[part], deadline)
            by_tier += hits
            at += hits.total()
            if at < run.stop:
                missing = (Missing(at, plan.blocks, *why),)
                break
        return Loaded(at, dict(by_tier), missing, self._clock.now() - started)

    def _load_run(
        self, first: str, layout: Layout, keys: Sequence[BlockKey], into: Sequence[Sequence[Piece]], deadline: float
    ) -> tuple[Counter[str], tuple[Reason, str]]:
        """Load from the planned tier, and what it does not have from others. How many from which, and why no more."""
        hits: Counter[str] = Counter()
        if self._closed:
            return hits, (Reason.TIER_DOWN, "the store is closed")
        why = (Reason.LATE, "no time was left")
        for name in (first, *(name for name in self._books.tiers if name != first)):
            at = hits.total()
            if at == len(keys) or self._clock.now() >= deadline:
                break
            if name != first and not self._relies_on(name):
                continue
            outcomes = self._load_from(name, layout, keys[at:], into[at:], deadline)
            hits[name] = leading_hits(outcomes)
            refused = outcomes[hits[name]] if hits[name] < len(outcomes) else Outcome.HIT
            if name == first or refused is not Outcome.MISS:
                why = _why_not(refused, name)
        return +hits, why

    def _load_from(
        self, name: str, layout: Layout, keys: Sequence[BlockKey], into: Sequence[Sequence[Piece]], deadline: float
    ) -> list[Outcome]:
        """Ask one tier, and learn from its answer: its speed, its failures, which blocks it does not have after all."""
        tier, started = self._books.tier(name), self._clock.now()
        try:
            outcomes = _load_all(tier, layout, keys, into, deadline)
        except Exception:  # a tier that breaks its promise must not break a request: counted, logged, not loaded
            LOG.exception("tier %s broke its promise while loading", name)
            outcomes = [Outcome.FAILED] * len(keys)
        seconds = self._clock.now() - started
        hits = outcomes.count(Outcome.HIT)
        for outcome in set(outcomes):
            self.metrics.count("load_blocks_total", outcomes.count(outcome), (("tier", name), ("outcome", outcome)))
        self.metrics.count("load_bytes_total", hits * layout.block_bytes, (("tier", name),))
        self.metrics.count("load_seconds_total", seconds, (("tier", name),))
        with self._books.lock:
            if hits == len(outcomes):
                self.costs.transferred(name, hits * layout.block_bytes, seconds)
            elif Outcome.LATE in outcomes:
                self.costs.not_transferred(name, len(outcomes) * layout.block_bytes, seconds)
            if Outcome.FAILED in outcomes or (Outcome.LATE in outcomes and deadline - started > FAIR_SECONDS):
                self._books.failed(name, "load", started)
            elif Outcome.LATE not in outcomes and Outcome.PENDING not in outcomes:
                self._books.succeeded(name, "load")
            self._books.lost(layout.id, keys, outcomes, name)
        return outcomes

    # -- save ----------------------------------------------------------------------------------------------------------

    def save(
        self, layout: Layout, keys: Sequence[BlockKey], blocks: Sequence[Sequence[Piece]], *, start: int = 0
    ) -> Job:
        """Take in blocks[i], whose key is keys[start + i]; `keys` is the whole chain from the first block on.

        The bytes are copied before this returns. The job is visible at once, and done when the colder tiers are; its
        outcomes say what is in memory now: HIT, also for what was held already; PENDING for what another thread is
        saving; MISS for what lies behind a block that is not here; FULL where there was no room, FAILED after `close`.
        """
        blocks_at = partial(_summed, keys, start, blocks)
        return self._enter(layout, keys, start, start + len(blocks), blocks_at)[0]

    def _enter(
        self, layout: Layout, keys: Sequence[BlockKey], start: int, stop: int, block_at: Callable[[int], Block]
    ) -> tuple[Job, list[int]]:
        """See `save`. Also which positions were handed to the warm tier: for lent slots, those that are used up."""
        books = self._books
        with books.lock:
            wanted, outcomes = self._sort_out(layout, keys, start, stop)
            names = {(layout.id, keys[at]) for at in wanted}
            books.saving |= names
            guard = self._hold(layout.id, keys, wanted[0] - 1, NO_NODE) if wanted else NO_NODE
        try:
            taken, handed = self._take_in(layout, [keys[at] for at in wanted], map(block_at, wanted), guard)
        finally:
            with books.lock:
                books.saving -= names
        for at in wanted[taken:]:
            outcomes[at - start] = Outcome.FULL
        with books.lock:  # what was held at first may have had to go for the rest
            for at, outcome in enumerate(outcomes, start):
                if outcome is Outcome.HIT and not books.index.holds(
                    books.index.node(layout.id, keys[at]), self._warm.name
                ):
                    outcomes[at - start] = Outcome.FULL
        books.not_admitted(layout.id, [keys[at] for at in wanted[taken:]])
        self._count_saved(layout, taken, len(wanted) - taken)
        job = self._mover.write_down(layout, keys, [keys[at] for at in wanted[:taken]], Job(outcomes))
        return job, wanted[:handed]

    def _save_at(self, layout: Layout, keys: Sequence[BlockKey], blocks: Sequence[Sequence[Piece]], start: int) -> Job:
        return self.save(layout, keys, blocks, start=start)

    def _sort_out(
        self, layout: Layout, keys: Sequence[BlockKey], start: int, stop: int
    ) -> tuple[list[int], list[Outcome]]:
        """Positions to take in: not held, not being saved by another thread, and with a parent that will be there."""
        if self._closed:
            return [], [Outcome.FAILED] * (stop - start)
        index, warm = self._books.index, self._warm.name
        covered = index.covered(layout.id, keys[:stop], warm)
        behind = covered < start
        wanted: list[int] = []
        outcomes = [Outcome.HIT] * (stop - start)
        for at in range(max(covered, start), stop):
            saving = (layout.id, keys[at]) in self._books.saving
            behind = behind or saving
            if index.holds(index.node(layout.id, keys[at]), warm):
                continue
            if not behind:
                wanted.append(at)
            else:
                outcomes[at - start] = Outcome.PENDING if saving else Outcome.MISS
        return wanted, outcomes

    def _hold(self, layout: LayoutId, keys: Sequence[BlockKey], at: int, held: int) -> int:
        """Move a pin along a path to block `at`, so that making room for its end does not take its beginning."""
        index, warm = self._books.index, self._warm.name
        node = index.node(layout, keys[at]) if at >= 0 else NO_NODE
        if node != NO_NODE:
            index.pin(node, warm)
        if held != NO_NODE:
            index.unpin(held, warm)
        return node

    def _take_in(self, layout: Layout, names: Sequence[BlockKey], made: Iterable[Block], guard: int) -> tuple[int, int]:
        """Give blocks to the warm tier, evicting as needed; returns how many are in now, and how many it was given.

        Ends the guard's pin, whatever making the blocks raises.
        """
        books, warm = self._books, self._warm.name
        done = handed = 0
        try:
            blocks = list(made)
            for _ in range(EVICT_ROUNDS_MAX if names else 0):
                hits = leading_hits(self._warm.save(layout.id, names[done:], blocks[done:]).outcomes)
                part = slice(done, done + hits)
                handed = done + hits
                with books.lock:
                    entered = books.enter(layout.id, names[part], blocks[part], warm, self._clock.now())
                    done += entered
                    guard = self._hold(layout.id, names, done - 1, guard) if entered else guard
                if entered < hits or done == len(names) or not books.evict(warm, len(names) - done):
                    break
                self._mover.hand_down(len(names) - done)
        finally:
            with books.lock:
                self._hold(layout.id, names, -1, guard)
        return done, handed

    def _count_saved(self, layout: Layout, taken: int, refused: int) -> None:
        tier = ("tier", self._warm.name)
        self.metrics.count("save_blocks_total", taken, (tier, ("outcome", Outcome.HIT)))
        self.metrics.count("save_blocks_total", refused, (tier, ("outcome", Outcome.FULL)))
        self.metrics.count("save_bytes_total", taken * layout.block_bytes, (tier,))

    # -- for other processes, which read and write the memory themselves -----------------------------------------------

    @property
    def memory_fd(self) -> int:
        """The descriptor of the memory in which `places` and `lend` name offsets. Valid until `close`."""
        return self._warm.fd

    @property
    def memory_bytes(self) -> int:
        """The size of that memory."""
        return self._warm.usage().capacity_bytes

    def lease_in_memory(self, layouts: Sequence[Layout], keys: Sequence[BlockKey]) -> tuple[int, int]:
        """How many leading blocks of every layout lie in memory now, and a lease that keeps them there (0: none)."""
        with self._books.lock:
            now, warm, index = self._clock.now(), self._warm.name, self._books.index
            held = min(index.covered(layout.id, keys, warm) for layout in layouts) if not self._closed else 0
            nodes = [index.node(layout.id, keys[held - 1]) for layout in layouts] if held else []
            return held, self._books.leases.take([(node, warm) for node in nodes], now)

    def in_memory(self, plan: Plan) -> bool:
        """True for a plan that loads from memory alone, or nothing."""
        return all(run.tier == self._warm.name for run in plan.runs)

    def places(self, layout: Layout, keys: Sequence[BlockKey]) -> tuple[list[int], bytes]:
        """The offset of each leading block that lies in memory, and their sums one behind the other.

        Lease them before, and for as long as it matters. The reader copies, and compares the sum of its copy.
        """
        return self._warm.places(layout.id, keys)

    def found_damaged(self, layout: Layout, keys: Sequence[BlockKey]) -> None:
        """Somebody's copy of these blocks did not verify: look at them again, and drop what is damaged."""
        if layout.block_bytes > self.memory_bytes:
            return  # whoever says so has declared a layout of which nothing can lie in memory
        buffer = np.empty(layout.block_bytes, np.uint8)
        for key in keys:
            self._load_from(self._warm.name, layout, [key], [[buffer]], self._clock.now() + self._load_seconds_max)

    def lend(self, layout: Layout, count: int) -> list[Slot]:
        """Up to `count` slots of memory to write blocks into, evicting for them; until `adopt` or `take_back`."""
        slots: list[Slot] = []
        count = min(count, self._warm.lendable(layout.block_bytes))
        for _ in range(EVICT_ROUNDS_MAX if count > 0 and not self._closed else 0):
            slots += self._warm.lend(layout.block_bytes, count - len(slots))
            if len(slots) >= count or not self._books.evict(self._warm.name, count - len(slots)):
                break
            self._mover.hand_down(count - len(slots))
        return slots

    def lent(self, layout: Layout, slot: Slot) -> tuple[int, Piece]:
        """Where a lent slot lies in memory, and its bytes."""
        return self._warm.lent(slot, layout.block_bytes)

    def take_back(self, slots: Sequence[Slot]) -> None:
        """Lent slots are free again; nobody writes there any more."""
        self._warm.take_back(slots)

    def adopt(
        self, layout: Layout, keys: Sequence[BlockKey], lent: Sequence[tuple[Slot, bytes]], *, start: int = 0
    ) -> tuple[Job, list[Slot]]:
        """Save blocks that lie in lent slots: (slot, sum) of keys[start], keys[start + 1], ... See `save`.

        Returns also the slots that were not needed, as another has these blocks already: they stay lent.
        """
        job, handed = self._enter(
            layout, keys, start, start + len(lent), partial(self._adopted, layout, keys, start, lent)
        )
        used = set(handed)
        return job, [slot for at, (slot, _) in enumerate(lent, start) if at not in used]

    def _adopted(
        self, layout: Layout, keys: Sequence[BlockKey], start: int, lent: Sequence[tuple[Slot, bytes]], at: int
    ) -> Block:
        slot, its_sum = lent[at - start]
        return Block(_parent(keys, at), at + 1, [self._warm.lent(slot, layout.block_bytes)[1]], its_sum, slot)

    # -- the rest ------------------------------------------------------------------------------------------------------

    def prefetch(self, layouts: Sequence[Layout], keys: Sequence[BlockKey], deadline: float) -> Job:
        """Promote what colder tiers hold of this path into the warm one, in the background, until `deadline`.

        The job is done when it was promoted, or when that failed or time was up; outcomes say which, per key.
        """
        return self._mover.prefetch(layouts, keys, deadline)

    def usage(self) -> dict[str, Usage]:
        """What every tier holds."""
        return {name: tier.usage() for name, tier in (*self._books.tiers.items(), *self._books.shared.items())}

    def watch(self, watch: Watch) -> None:
        """Tell this one of what the own tiers hold from now on; `tell_held` tells what they held before."""
        self._books.watch = watch

    def tell_held(self, watch: Watch, start: int, count: int, told: bytearray) -> int:
        """Tell of what is held now as if it entered, parents first: some `count` blocks. Where to go on, 0 at the end.

        `told` is empty at first, and remembers from part to part. What enters or leaves between the parts is told as it
        happens.
        """
        return self._books.tell_held(watch, start, count, told)

    def medium(self, name: str) -> Medium:
        """What a tier is made of."""
        return self._books.tier(name).medium

    def is_well(self, name: str) -> bool:
        """False while a tier is set aside after failed loads."""
        return self._books.well(name, "load")

    def measure(self) -> None:
        """Bring the gauges up to date; a scrape calls this first."""
        for name, usage in self.usage().items():
            label = (("tier", name),)
            self.metrics.gauge("tier_blocks", usage.blocks, label)
            self.metrics.gauge("tier_used_bytes", usage.used_bytes, label)
            self.metrics.gauge("tier_capacity_bytes", usage.capacity_bytes, label)
            self.metrics.gauge("breaker_open", not self._books.allows(name, "load"), label)
            if name in self._books.tiers:
                self.metrics.gauge("tier_idle_seconds", self._books.idle_seconds(name), label)
        self.metrics.gauge("leases", len(self._books.leases))
        self.metrics.gauge("reuse_gap_max_seconds", self._books.reuse_gap_max)
        if self._books.ttl_seconds is not None:
            self.metrics.gauge("ttl_seconds", self._books.ttl_seconds)

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until everything that was saved is durable or dropped; False if `seconds` passed first."""
        return self._mover.flush(seconds)

    def check_integrity(self) -> None:
        """Closure, counts and room add up, and index and tiers agree. Call it when nothing is under way.

        Raises AssertionError.
        """
        self._books.check_integrity()

    def close(self, seconds: float = 30.0) -> None:
        """Hand down what only memory holds, wait until it is durable, close the tiers. A second call does nothing."""
        with self._books.lock:
            if self._closed:
                return
            self._closed = True
        self._mover.close(seconds)
        for name, tier in (*self._books.tiers.items(), *self._books.shared.items()):
            try:
                tier.close()
            except Exception:  # the others are to be closed all the same
                LOG.exception("tier %s could not be closed", name)
        self.receipts.close()
        self.costs.close()


def _parent(keys: Sequence[BlockKey], at: int) -> BlockKey:
    return keys[at - 1] if at else NO_PARENT


def _summed(keys: Sequence[BlockKey], start: int, blocks: Sequence[Sequence[Piece]], at: int) -> Block:
    """The block of keys[at], with the sum of the caller's own bytes."""
    pieces = blocks[at - start]
    return Block(_parent(keys, at), at + 1, pieces, payload_sum(pieces))


def _load_all(
    tier: Tier, layout: Layout, keys: Sequence[BlockKey], into: Sequence[Sequence[Piece]], deadline: float
) -> list[Outcome]:
    outcomes = tier.load(layout.id, keys, into, deadline)
    if len(outcomes) != len(keys):
        raise ValueError(f"{len(outcomes)} outcomes for {len(keys)} blocks")
    return outcomes


def _why_not(outcome: Outcome, tier: str) -> tuple[Reason, str]:
    if outcome is Outcome.CORRUPT:
        return Reason.CORRUPT, f"a block on {tier} did not verify"
    if outcome is Outcome.LATE:
        return Reason.LATE, f"{tier} did not answer in time"
    if outcome is Outcome.PENDING:
        return Reason.LATE, f"{tier} was busy with other requests"
    if outcome is Outcome.FAILED:
        return Reason.TIER_DOWN, f"{tier} failed"
    return Reason.EVICTED, f"left {tier} between match and load"
