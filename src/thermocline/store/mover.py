"""The mover: blocks go down to colder tiers as they are saved, and come up again when somebody will ask for them."""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from thermocline.blocks.key import NO_PARENT, BlockKey
from thermocline.blocks.layout import Layout, LayoutId
from thermocline.costs.model import Costs
from thermocline.store.admit import refusal
from thermocline.store.books import Books
from thermocline.store.index import NEVER_USED, NO_NODE, Place
from thermocline.store.shared import SharedTiers, save_guarded
from thermocline.tiers.segments import aligned_memory
from thermocline.tiers.tier import (
    Block,
    BoundedTier,
    Job,
    LendingTier,
    Outcome,
    Piece,
    Tier,
    block_length,
    leading_hits,
)

LOG = logging.getLogger("thermocline.store")
DOWN_ROUNDS_MAX = 4
WINDOW_BYTES = 16 * 1024 * 1024
PROBE_BLOCKS = 16
PREFETCHES_MAX = 64
PROBE_SECONDS, PROBE_LOAD_SECONDS_MAX = 10.0, 1.0
DRAIN_WAIT_SECONDS = 0.05
DRAIN_WAITS_MAX = 100

Save = Callable[[Layout, Sequence[BlockKey], Sequence[Sequence[Piece]], int], object]
Load = Callable[[str, Layout, Sequence[BlockKey], Sequence[Sequence[Piece]], float], list[Outcome]]


@dataclass(frozen=True, slots=True)
class _Write:
    """What one colder tier lacks of a path, top down. The pins keep the path warm, and there what was written of it."""

    tier: Tier
    layout: LayoutId
    nodes: Sequence[int]
    keys: Sequence[BlockKey]
    blocks: Sequence[Block]
    pins: Sequence[tuple[int, str]]
    started: float


class Mover:
    """Demotes and promotes for one store. Only `prefetch` uses a thread of its own; tiers write in theirs."""

    def __init__(
        self,
        books: Books,
        warm: LendingTier,
        cold: Sequence[Tier],
        shared: SharedTiers,
        load: Load,
        save: Save,
        costs: Callable[[], Costs],
    ) -> None:
        self._books = books
        self._costs = costs
        self._layouts: dict[LayoutId, Layout] = {}  # those of what was saved: a handful, as each is an engine's
        self._refused: Counter[str] = Counter()
        self._probed_seconds: dict[str, float] = {}
        self._warm = warm
        self._cold = list(cold)
        self._shared = shared
        self._offered = 0  # jobs of shared tiers under way
        self._load = load
        self._save = save
        self._window: Piece | None = None
        self._writing: dict[str, set[int]] = {tier.name: set() for tier in cold}
        self._idle = threading.Condition(books.lock)
        self._prefetches: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = False

    # -- down ----------------------------------------------------------------------------------------------------------

    def write_down(self, layout: Layout, path: Sequence[BlockKey], saved: Sequence[BlockKey], job: Job) -> Job:
        """Start writing a path, of which blocks were just saved, to the other tiers; `job` is done when they are."""
        self._layouts[layout.id] = layout
        jobs = [self._write_path(tier, layout.id, saved[-1]) for tier in self._cold] if saved else []
        waiting = [started for started in jobs if started is not None]
        waiting += self._offer(layout, path) if saved and self._shared else ()
        job.set_visible()
        _when_all_done(waiting, job.set_done)
        return job

    def _offer(self, layout: Layout, path: Sequence[BlockKey]) -> list[Job]:
        jobs = self._shared.offer(layout, path)

        def ended(_: object) -> None:
            with self._books.lock:
                self._offered -= 1
                self._idle.notify_all()

        with self._books.lock:
            self._offered += len(jobs)
        for job in jobs:
            job.watch(done=ended)
        return jobs

    def hand_down(self, count: int) -> None:
        """Start writing `count` leaves that the warm tier would lose next and no other has, before their time comes."""
        with self._books.lock:
            index = self._books.index
            places = [index.place(node) for node in index.leaves_only_in(self._warm.name, count)] if self._cold else []
        for place in places:
            for tier in self._cold:
                self._write_path(tier, *place)

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until nothing is on its way down; False if `seconds` passed first."""
        with self._idle:
            return self._idle.wait_for(lambda: not (self._offered or any(self._writing.values())), seconds)

    def close(self, seconds: float) -> None:
        """Stop promoting; hand down what only the warm tier holds, as long as tiers take it and time lasts.

        What was used last is written last, so that a tier that is too small for all of it keeps that.
        """
        deadline = self._books.clock.now() + seconds
        with self._books.lock:
            self._closing = True
        if self._thread is not None:
            self._prefetches.put(None)
            self._thread.join(seconds)
        for place in self._ends_only_here() if self._cold else ():
            for tier in self._cold:
                self._drain(tier, place, deadline)
        self.flush(max(0.0, deadline - self._books.clock.now()))

    def _ends_only_here(self) -> list[Place]:
        """The ends of all paths of which the warm tier has the only copy, least recently used first."""
        with self._books.lock:
            index = self._books.index
            nodes = list(index.only_in(self._warm.name))
            inside = {index.parent(node) for node in nodes}
            ends = sorted((node for node in nodes if node not in inside), key=index.used)
            return [index.place(node) for node in ends]

    def _drain(self, tier: Tier, place: Place, deadline: float) -> None:
        """Write one path down, waiting where the tier has too much to write already."""
        waits = DRAIN_WAITS_MAX
        while waits and self._books.clock.now() < deadline:
            job = self._write_path(tier, *place)
            if job is None or Outcome.LATE not in job.outcomes:
                return
            if not self.flush(max(0.0, deadline - self._books.clock.now())):
                return
            if job.outcomes[0] is Outcome.LATE:  # nothing was taken, as room is still being made
                waits -= 1
                threading.Event().wait(DRAIN_WAIT_SECONDS)

    def _write_path(self, tier: Tier, layout: LayoutId, key: BlockKey) -> Job | None:
        """Save to `tier` what it lacks of the path that ends here, top down. None if there was nothing to do."""
        write = self._begin(tier, layout, key)
        return self._follow(write, self._save_down(write)) if write else None

    def _begin(self, tier: Tier, layout: LayoutId, key: BlockKey) -> _Write | None:
        books, index = self._books, self._books.index
        with books.lock:
            if not books.allows(tier.name, "save") or not self._admits(tier.name, layout, index.node(layout, key)):
                return None
            nodes = self._lacking(tier.name, index.node(layout, key))
            lent = [self._lend(layout, node) for node in nodes]
            blocks = [block for block in lent if block is not None]
            if not nodes or len(blocks) < len(nodes):
                return None
            above = {index.parent(node) for node in nodes} - {NO_NODE, *nodes}
            pins = [*((node, tier.name) for node in (*above, *nodes)), (nodes[-1], self._warm.name)]
            for pin in pins:
                index.pin(*pin)
            self._writing[tier.name].update(nodes)
            books.trying(tier.name, "save")
            return _Write(
                tier, layout, nodes, [index.place(node).key for node in nodes], blocks, pins, books.clock.now()
            )

    def _admits(self, name: str, layout: LayoutId, node: int) -> bool:
        """Whether a tier is to be given the path that ends here. What is refused has that as its reason later on."""
        index = self._books.index
        described = self._layouts.get(layout)
        if described is None or node == NO_NODE or index.holds(node, name):
            return True
        why = refusal(self._costs(), described, name, index.depth(node), refused=self._refused[name])
        if why is None:
            self._refused[name] = 0
            return True
        self._refused[name] += 1
        books = self._books
        books.ghosts.refused(layout, self._above(node, name), name, why.words, books.clock.now())
        return False

    def _above(self, node: int, name: str) -> Iterator[BlockKey]:
        """The keys of a path from its end up to where a tier holds it."""
        index = self._books.index
        while node != NO_NODE and not index.holds(node, name):
            yield index.place(node).key
            node = index.parent(node)

    def _lacking(self, name: str, node: int) -> list[int]:
        """The path's nodes that a tier neither holds nor is being given, top down; empty if the warm tier lost one.

        Above a block that is held nothing is lacking, unless the tier has broken blocks, which are to be mended.
        """
        index, writing = self._books.index, self._writing[name]
        nodes: list[int] = []
        while node != NO_NODE:
            if index.holds(node, name) or node in writing:
                if not index.broken(name):
                    break
            elif index.holds(node, self._warm.name):
                nodes.append(node)
            else:
                return []
            node = index.parent(node)
        return nodes[::-1]

    def _lend(self, layout: LayoutId, node: int) -> Block | None:
        index = self._books.index
        lent = self._warm.block(layout, index.place(node).key)
        parent = index.parent(node)
        above = NO_PARENT if parent == NO_NODE else index.place(parent).key
        return None if lent is None else Block(above, index.depth(node), [lent[0]], lent[1])

    def _save_down(self, write: _Write) -> list[tuple[int, Job]]:
        """Hand blocks to a tier, evicting there before, or while it is full. Its jobs, and where each begins."""
        jobs: list[tuple[int, Job]] = []
        at = 0
        if isinstance(write.tier, BoundedTier):
            short = write.tier.shortfall(block_length(write.blocks), len(write.keys))
            if short:
                self._books.evict(write.tier.name, short)
        for _ in range(DOWN_ROUNDS_MAX):
            job = save_guarded(write.tier, write.layout, write.keys[at:], write.blocks[at:])
            taken = next((i for i, outcome in enumerate(job.outcomes) if outcome in _REFUSED), len(job.outcomes))
            full = taken < len(job.outcomes) and job.outcomes[taken] is Outcome.FULL
            jobs.append((at, job))
            at += taken
            if not full or not self._books.evict(write.tier.name, len(write.keys) - at):
                break
        return jobs

    def _follow(self, write: _Write, jobs: Sequence[tuple[int, Job]]) -> Job:
        """Enter blocks as they become visible; when all jobs are done, let go of the path and end the job returned."""
        at, last = jobs[-1]
        whole = Job([Outcome.PENDING] * at + last.outcomes)
        for at, job in jobs:
            job.watch(visible=partial(self._visible, write, at), done=partial(self._settled, write, at))

        def let_go() -> None:
            with self._books.lock:
                for pin in write.pins:
                    self._books.index.unpin(*pin)
                self._writing[write.tier.name].difference_update(write.nodes)
                self._idle.notify_all()
            whole.set_done()

        _when_all_done([job for _, job in jobs], let_go)
        return whole

    def _visible(self, write: _Write, at: int, job: Job) -> None:
        # Being copied is no use: the path keeps the recency that it has, in every tier.
        hits = leading_hits(job.outcomes)
        part = slice(at, at + hits)
        name = write.tier.name
        entered = self._books.enter(write.layout, write.keys[part], write.blocks[part], name, NEVER_USED)
        self._books.metrics.count("demoted_blocks_total", entered, (("tier", name),))

    def _settled(self, write: _Write, at: int, job: Job) -> None:
        books, name = self._books, write.tier.name
        for outcome in set(job.outcomes):
            label = (("tier", name), ("outcome", outcome))
            books.metrics.count("save_blocks_total", job.outcomes.count(outcome), label)
        with books.lock:
            if Outcome.FAILED in job.outcomes:
                books.failed(name, "save", write.started)
                books.lost(write.layout, write.keys[at : at + len(job.outcomes)], job.outcomes, name)
            elif Outcome.HIT in job.outcomes:
                books.succeeded(name, "save")

    # -- up ------------------------------------------------------------------------------------------------------------

    def prefetch(self, layouts: Sequence[Layout], keys: Sequence[BlockKey], deadline: float) -> Job:
        """See `Store.prefetch`. With too many waiting, or after `close`, the job ends at once with nothing done."""
        job = Job([Outcome.PENDING] * len(keys))
        with self._books.lock:
            refused = self._closing or self._prefetches.qsize() >= PREFETCHES_MAX
            if not refused:
                self._prefetches.put(partial(self._promote, tuple(layouts), tuple(keys), deadline, job))
                self._start()
        if refused:
            job.outcomes[:] = [Outcome.LATE] * len(keys)
            job.set_done()
        return job

    def probe(self, name: str, layout: Layout, keys: Sequence[BlockKey], *, at_once: bool = False) -> None:
        """Load the last of these blocks in the background, to learn if the tier is still slow, or still fails.

        At most one now and then for each tier, if not `at_once`. What no plan loads is not measured, and would be
        declined, or left alone, for ever after one bad day.
        """
        now = self._books.clock.now()
        with self._books.lock:
            waited = now - self._probed_seconds.get(name, -math.inf)
            if (
                (waited < PROBE_SECONDS and not at_once)
                or self._closing
                or self._prefetches.qsize() >= PREFETCHES_MAX
                or not keys
            ):
                return
            self._probed_seconds[name] = now
            self._prefetches.put(partial(self._probe, name, layout, tuple(keys[-PROBE_BLOCKS:])))
            self._start()

    def _probe(self, name: str, layout: Layout, keys: Sequence[BlockKey]) -> None:
        rows = self._rows(layout)
        part = keys[-len(rows) :]
        try:
            pieces = [[row] for row in rows[: len(part)]]
            self._load(name, layout, part, pieces, self._books.clock.now() + PROBE_LOAD_SECONDS_MAX)
        except Exception:  # the next prefetch wants this thread
            LOG.exception("a probe failed")

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="mover", daemon=True)
            self._thread.start()

    def _serve(self) -> None:
        while (task := self._prefetches.get()) is not None:
            task()

    def _promote(self, layouts: Sequence[Layout], keys: Sequence[BlockKey], deadline: float, job: Job) -> None:
        count = 0
        try:
            for layout in layouts:
                self._promote_one(layout, keys, deadline)
            # Only now, as the blocks of one layout may have had to go for those of the next.
            count = min((self._warm_blocks(layout, keys) for layout in layouts), default=0)
        except Exception:  # whoever waits for this job must not wait for ever, and the next one wants this thread
            LOG.exception("a prefetch failed")
        job.outcomes[:] = [Outcome.HIT] * count + [Outcome.MISS] * (len(keys) - count)
        job.set_done()

    def _promote_one(self, layout: Layout, keys: Sequence[BlockKey], deadline: float) -> None:
        """Copy up window by window while that makes progress. Room is made for what has arrived, not before."""
        start, before = self._warm_blocks(layout, keys), -1
        while before < start < len(keys) and not self._closing and self._books.clock.now() <= deadline:
            source, stop = self._source(layout, keys, start)
            if source is None:
                break
            pieces = [[row] for row in self._rows(layout)[: stop - start]]
            stop = start + len(pieces)
            outcomes = self._load(source, layout, keys[start:stop], pieces, deadline)
            hits = leading_hits(outcomes)
            self._save(layout, keys, pieces[:hits], start)
            before, start = start, self._warm_blocks(layout, keys)
            label = (("tier", self._warm.name),)
            self._books.metrics.count("promoted_blocks_total", max(0, start - before), label)

    def _rows(self, layout: Layout) -> Piece:
        """Memory for a window of blocks, a row each. Kept: fresh memory costs as much as reading into it."""
        window = max(1, WINDOW_BYTES // layout.block_bytes)
        if self._window is None or self._window.nbytes < window * layout.block_bytes:
            self._window = aligned_memory(window * layout.block_bytes)
        return self._window[: window * layout.block_bytes].reshape(window, -1)

    def _warm_blocks(self, layout: Layout, keys: Sequence[BlockKey]) -> int:
        with self._books.lock:
            return self._books.index.covered(layout.id, keys, self._warm.name)

    def _source(self, layout: Layout, keys: Sequence[BlockKey], start: int) -> tuple[str | None, int]:
        """The first tier but the warm one that is up and holds more than `start` blocks, and how many."""
        with self._books.lock:
            for tier in self._cold:
                stop = self._books.index.covered(layout.id, keys, tier.name)
                if stop > start and self._books.allows(tier.name, "load"):
                    return tier.name, stop
        tokens = len(keys) * layout.tokens_per_block
        answers = self._shared.ask([layout], keys, tokens) if self._shared else []
        return next(((answer.tier, answer.held) for answer in answers if answer.held > start), (None, 0))


def _when_all_done(jobs: Sequence[Job], then: Callable[[], None]) -> None:
    """Call `then` once, in the thread in which the last of the jobs ends; at once if there is none left."""
    lock = threading.Lock()
    left = len(jobs) + 1

    def one_ended(_: object) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = not left
        if last:
            then()

    for job in jobs:
        job.watch(done=one_ended)
    one_ended(None)


_REFUSED = frozenset({Outcome.FULL, Outcome.MISS, Outcome.LATE, Outcome.FAILED})
