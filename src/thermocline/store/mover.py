"""The mover: blocks go down to colder tiers as they are saved, and come up again when somebody will ask for them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from functools import partial

from thermocline.blocks.key import NO_PARENT, BlockKey
from thermocline.blocks.layout import Layout, LayoutId
from thermocline.store.books import Books
from thermocline.store.index import NO_NODE
from thermocline.tiers.segments import aligned_memory
from thermocline.tiers.tier import Block, Job, LendingTier, Outcome, Piece, Tier

DOWN_ROUNDS_MAX = 4
PROMOTE_BLOCKS = 16
PREFETCHES_MAX = 64
DRAIN_WAIT_SECONDS = 0.05

Save = Callable[[Layout, Sequence[BlockKey], Sequence[Sequence[Piece]], int], object]


class Mover:
    """Demotes and promotes for one store. Only `prefetch` uses a thread of its own; tiers write in theirs."""

    def __init__(self, books: Books, warm: LendingTier, cold: Sequence[Tier], save: Save) -> None:
        self._books = books
        self._warm = warm
        self._cold = list(cold)
        self._save = save
        self._writing: dict[str, set[int]] = {tier.name: set() for tier in cold}
        self._idle = threading.Condition(books.lock)
        self._prefetches: queue.Queue[Callable[[], None] | None] = queue.Queue(PREFETCHES_MAX)
        self._thread: threading.Thread | None = None

    # -- down ----------------------------------------------------------------------------------------------------------

    def write_down(self, layout: LayoutId, keys: Sequence[BlockKey], job: Job) -> Job:
        """Start writing the path that ends with the last of `keys` to the colder tiers; `job` is done when they are."""
        jobs = [self._write_path(tier, layout, keys[-1]) for tier in self._cold] if keys else []
        waiting = [started for started in jobs if started is not None]
        job.set_visible()
        if not waiting:
            job.set_done()
            return job
        left = set(map(id, waiting))

        def finished(part: Job) -> None:
            with self._books.lock:
                left.discard(id(part))
                last = not left
            if last:
                job.set_done()

        for part in waiting:
            part.watch(done=finished)
        return job

    def hand_down(self, name: str, count: int) -> None:
        """Before `count` leaves of the warm tier go: start writing those that no colder tier has."""
        if name == self._warm.name:
            for node in self._books.index.leaves_only_in(name, count):
                place = self._books.index.place(node)
                for tier in self._cold:
                    self._write_path(tier, *place)

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until nothing is on its way down; False if `seconds` passed first."""
        with self._idle:
            return self._idle.wait_for(lambda: not any(self._writing.values()), seconds)

    def close(self, seconds: float) -> None:
        """Stop promoting; hand down what only the warm tier holds, as long as tiers take it and time lasts."""
        if self._thread is not None:
            self._prefetches.put(None)
            self._thread.join(seconds)
        deadline = self._books.clock.now() + seconds
        before = -1
        while self._cold and self._books.clock.now() < deadline:
            with self._books.lock:
                left = [self._books.index.place(node) for node in self._books.index.only_in(self._warm.name)]
            if not left or len(left) == before:
                break
            before = len(left)
            for place in left:
                for tier in self._cold:
                    self._write_path(tier, *place)
            self.flush(max(0.0, deadline - self._books.clock.now()))
        self.flush(max(0.0, deadline - self._books.clock.now()))

    def _write_path(self, tier: Tier, layout: LayoutId, key: BlockKey) -> Job | None:
        """Save to `tier` what it lacks of the path that ends here, top down. None if there was nothing to do."""
        books = self._books
        with books.lock:
            if not books.allows(tier.name):
                return None
            nodes = self._lacking(tier.name, books.index.node(layout, key))
            blocks = [self._lend(layout, node) for node in nodes]
            if not nodes or None in blocks:
                return None
            whole = [block for block in blocks if block is not None]
            keys = [books.index.place(node).key for node in nodes]
            books.index.pin(nodes[-1], self._warm.name)
            self._writing[tier.name].update(nodes)
        jobs = self._save_down(tier, layout, keys, whole)
        return self._follow(tier, layout, nodes, keys, whole, jobs)

    def _lacking(self, name: str, node: int) -> list[int]:
        """The path's nodes that a tier neither holds nor is being given, top down; empty if the warm tier lost one."""
        index = self._books.index
        nodes: list[int] = []
        while node != NO_NODE and not index.holds(node, name) and node not in self._writing[name]:
            if not index.holds(node, self._warm.name):
                return []
            nodes.append(node)
            node = index.parent(node)
        return nodes[::-1]

    def _lend(self, layout: LayoutId, node: int) -> Block | None:
        index = self._books.index
        lent = self._warm.block(layout, index.place(node).key)
        parent = index.parent(node)
        above = NO_PARENT if parent == NO_NODE else index.place(parent).key
        return None if lent is None else Block(above, index.depth(node), [lent[0]], lent[1])

    def _save_down(
        self, tier: Tier, layout: LayoutId, keys: Sequence[BlockKey], blocks: Sequence[Block]
    ) -> list[tuple[int, Job]]:
        """Hand blocks to a tier, evicting there while it is full. Returns its jobs and where in `keys` each begins."""
        jobs: list[tuple[int, Job]] = []
        at = 0
        for _ in range(DOWN_ROUNDS_MAX):
            job = tier.save(layout, keys[at:], blocks[at:])
            taken = next((i for i, outcome in enumerate(job.outcomes) if outcome in _REFUSED), len(job.outcomes))
            full = taken < len(job.outcomes) and job.outcomes[taken] is Outcome.FULL
            jobs.append((at, job))
            at += taken
            if not full or not self._books.evict(tier.name, len(keys) - at):
                break
        return jobs

    def _follow(
        self,
        tier: Tier,
        layout: LayoutId,
        nodes: Sequence[int],
        keys: Sequence[BlockKey],
        blocks: Sequence[Block],
        jobs: Sequence[tuple[int, Job]],
    ) -> Job:
        """Enter blocks as they become visible, let go of the path when all jobs are done."""
        whole = Job([])
        left = {id(job) for _, job in jobs}

        def visible(at: int, job: Job) -> None:
            hits = next((i for i, outcome in enumerate(job.outcomes) if outcome is not Outcome.HIT), len(job.outcomes))
            entered = self._books.enter(layout, keys[at : at + hits], blocks[at : at + hits], tier.name)
            self._books.metrics.count("demoted_blocks_total", entered, (("tier", tier.name),))

        def done(job: Job) -> None:
            self._settled(tier, job)
            with self._books.lock:
                left.discard(id(job))
                last = not left
                if last:
                    self._let_go(tier.name, nodes)
            if last:
                whole.set_done()

        for at, job in jobs:
            job.watch(visible=partial(visible, at), done=done)
        return whole

    def _settled(self, tier: Tier, job: Job) -> None:
        outcomes = set(job.outcomes)
        for outcome in outcomes:
            label = (("tier", tier.name), ("outcome", outcome))
            self._books.metrics.count("save_blocks_total", job.outcomes.count(outcome), label)
        with self._books.lock:
            if Outcome.FAILED in outcomes:
                self._books.failed(tier.name)
            elif Outcome.HIT in outcomes:
                self._books.succeeded(tier.name)

    def _let_go(self, name: str, nodes: Sequence[int]) -> None:
        self._books.index.unpin(nodes[-1], self._warm.name)
        self._writing[name].difference_update(nodes)
        self._idle.notify_all()

    # -- up ------------------------------------------------------------------------------------------------------------

    def prefetch(self, layouts: Sequence[Layout], keys: Sequence[BlockKey], deadline: float) -> Job:
        """See `Store.prefetch`. With too many waiting already, the job ends at once with nothing done."""
        job = Job([Outcome.PENDING] * len(keys))
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="mover", daemon=True)
            self._thread.start()
        try:
            self._prefetches.put_nowait(lambda: self._promote(layouts, keys, deadline, job))
        except queue.Full:
            job.outcomes[:] = [Outcome.LATE] * len(keys)
            job.set_done()
        return job

    def _serve(self) -> None:
        while (task := self._prefetches.get()) is not None:
            task()

    def _promote(self, layouts: Sequence[Layout], keys: Sequence[BlockKey], deadline: float, job: Job) -> None:
        held = [self._promote_one(layout, keys, deadline) for layout in layouts]
        count = min(held, default=0)
        job.outcomes[:] = [Outcome.HIT] * count + [Outcome.MISS] * (len(keys) - count)
        job.set_done()

    def _promote_one(self, layout: Layout, keys: Sequence[BlockKey], deadline: float) -> int:
        """Copy up window by window while that makes progress. Returns how many leading blocks are warm now."""
        index, warm = self._books.index, self._warm.name
        buffer = aligned_memory(PROMOTE_BLOCKS * layout.block_bytes).reshape(PROMOTE_BLOCKS, -1)
        while True:
            with self._books.lock:
                start = index.covered(layout.id, keys, warm)
                ends = {tier.name: index.covered(layout.id, keys, tier.name) for tier in self._cold}
            source = next((tier for tier in self._cold if ends[tier.name] > start), None)
            if source is None or self._books.clock.now() > deadline:
                return start
            stop = min(start + PROMOTE_BLOCKS, ends[source.name])
            pieces = [[row] for row in buffer[: stop - start]]
            outcomes = source.load(layout.id, keys[start:stop], pieces, deadline)
            hits = next((i for i, outcome in enumerate(outcomes) if outcome is not Outcome.HIT), len(outcomes))
            with self._books.lock:
                for key, outcome in zip(keys[start:stop], outcomes, strict=True):
                    if outcome in {Outcome.CORRUPT, Outcome.MISS}:
                        self._books.lost(layout.id, key, source.name, outcome)
            self._save(layout, keys, pieces[:hits], start)
            self._books.metrics.count("promoted_blocks_total", hits, (("tier", warm),))
            with self._books.lock:
                if index.covered(layout.id, keys, warm) <= start:
                    return start


_REFUSED = frozenset({Outcome.FULL, Outcome.LATE, Outcome.FAILED})
