"""Shared tiers: other processes use them too. They are asked at a match, and offered what was saved.

Nothing of them is in the index: they evict by themselves, so what they held a moment ago says little. What they answer
is a bitmap, and counts as far as it has no hole.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from thermocline.blocks.key import NO_PARENT, BlockKey
from thermocline.blocks.layout import Layout, LayoutId
from thermocline.costs.model import Costs
from thermocline.store.admit import refusal
from thermocline.store.books import Books
from thermocline.store.receipt import Missing, Reason
from thermocline.tiers.tier import Block, Job, LendingTier, Outcome, SharedTier, Tier, leading_hits

LOG = logging.getLogger("thermocline.store")
ASK_SECONDS_MAX = 10.0
"""The last bound on a question. A tier's own is much tighter: 50 ms for Redis, unless settings say otherwise."""
FREE_SECONDS = 0.005
"""A refusal that took less than this cost the request nothing, and the tier may be asked again by the next one."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a shared tier said of blocks [start, stop): it holds those before `held`.

    `why` is set where it said nothing, and is then the reason for all of them that nothing better is known of; those
    before `sure` it held lately, so there it is the reason whatever else is known.
    """

    tier: str
    start: int
    stop: int
    held: int
    sure: int = 0
    why: tuple[Reason, str] | None = None
    probed: int = 0
    """Blocks before this one may be loaded in the background to see how the tier does; 0 for none."""

    def blamed(self, missing: Sequence[Missing]) -> tuple[Missing, ...]:
        """These reasons, with the tier's silence as the reason where it is one."""
        if self.why is None:
            return tuple(missing)
        parts: list[Missing] = []
        for part in missing:
            first = max(part.start, self.start)
            last = min(part.stop, self.stop if part.reason in _UNSURE else self.sure)
            if first >= last:
                parts.append(part)
                continue
            parts.append(Missing(part.start, first, part.reason, part.detail))
            parts.append(Missing(first, last, *self.why))
            parts.append(Missing(last, part.stop, part.reason, part.detail))
        return tuple(parts)


class SharedTiers:
    """All shared tiers of one store."""

    def __init__(
        self, books: Books, warm: LendingTier, tiers: Sequence[SharedTier], costs: Callable[[], Costs]
    ) -> None:
        """`costs` gives those that the store plans with: the same question has the same answer there and here."""
        self._books = books
        self._warm = warm
        self._tiers = list(tiers)
        self._costs = costs
        self._refused: Counter[str] = Counter()

    def __bool__(self) -> bool:
        return bool(self._tiers)

    # -- ask -----------------------------------------------------------------------------------------------------------

    def ask(self, layouts: Sequence[Layout], keys: Sequence[BlockKey], prompt_tokens: int) -> list[Answer]:
        """Ask for what the store's own tiers lack of this path, where having it would pay: one round trip a tier."""
        with self._books.lock:
            own = self._books.covered(layouts, keys)
            reach = max((held.blocks for held in own if self._books.well(held.tier, "load")), default=0)
        answers: list[Answer] = []
        for tier in self._tiers:
            stop = _beginning(tier, keys)
            if reach < stop:
                answers.append(self._ask_one(tier, layouts, keys, (reach, stop), prompt_tokens))
                reach = answers[-1].held
        return answers

    def _ask_one(
        self,
        tier: SharedTier,
        layouts: Sequence[Layout],
        keys: Sequence[BlockKey],
        part: tuple[int, int],
        prompt_tokens: int,
    ) -> Answer:
        start, stop = part
        why = self._why_not_ask(tier.name, layouts, part, prompt_tokens)
        if why is None:
            started = self._books.clock.now()
            found = [_find(tier, layout, keys[start:stop], started + ASK_SECONDS_MAX) for layout in layouts]
            why = self._judged(tier.name, found, started)
            held = start if why else start + min(map(leading_hits, found))
            if why is None and (held == start or self._books.well(tier.name, "load")):
                return Answer(tier.name, start, stop, held)
            if why is None:  # it answers again, and what it delivers is to be seen yet
                return Answer(tier.name, start, stop, start, held, (Reason.TIER_DOWN, _set_aside(tier.name)), held)
        known = [tier.known(layout.id, keys[start:stop]) for layout in layouts]
        all_know = [all(each) for each in zip(*known, strict=True)]
        sure = start + (all_know.index(False) if False in all_know else len(all_know))
        return Answer(tier.name, start, stop, start, sure, why, start + 1 if why[0] is Reason.DECLINED else 0)

    def _judged(self, name: str, found: Sequence[Sequence[Outcome]], started: float) -> tuple[Reason, str] | None:
        """What its silence is called, or None where it answered. Only silence that cost time is held against a tier.

        That it answers a question does not say that it can be loaded from: the two are judged apart.
        """
        books = self._books
        silent = {outcome for outcomes in found for outcome in outcomes} & _SILENT.keys()
        with books.lock:
            if not silent:
                books.succeeded(name, "find")
                return None
            if silent != {Outcome.PENDING}:
                if books.clock.now() - started > FREE_SECONDS:
                    books.failed(name, "find", started)
                else:
                    books.metrics.count("tier_failures_total", 1, (("tier", name),))
        reason, words = _SILENT[min(silent)]
        return reason, f"{name} {words}, and may hold them"

    def _why_not_ask(
        self, name: str, layouts: Sequence[Layout], part: tuple[int, int], prompt_tokens: int
    ) -> tuple[Reason, str] | None:
        """Not while it is set aside, and not where even all of it would take longer to load than to compute."""
        start, stop = part
        size = layouts[0].tokens_per_block
        costs = self._costs()
        loading = costs.transfer((stop - start) * sum(layout.block_bytes for layout in layouts), name)
        before, behind = start * size, stop * size
        model = layouts[0].computed_by
        computing = costs.recompute(prompt_tokens - before, before, model)
        computing -= costs.recompute(prompt_tokens - behind, behind, model)
        if loading >= computing:
            words = f"loading from {name} would take {loading:.4f} s, computing {computing:.4f} s: not asked"
            return Reason.DECLINED, words
        books = self._books
        with books.lock:
            if books.allows(name, "find") and books.allows(name, "load"):
                books.trying(name, "find")
                return None
        return Reason.TIER_DOWN, _set_aside(name)

    # -- offer ---------------------------------------------------------------------------------------------------------

    def offer(self, layout: Layout, keys: Sequence[BlockKey]) -> list[Job]:
        """Have each tier write what it lacks of the beginning of a path that is in the warm tier, where that pays."""
        jobs = [self._offer_one(tier, layout, keys[: _beginning(tier, keys)]) for tier in self._tiers]
        return [job for job in jobs if job is not None]

    def _offer_one(self, tier: SharedTier, layout: Layout, keys: Sequence[BlockKey]) -> Job | None:
        books, index = self._books, self._books.index
        with books.lock:
            if not books.allows(tier.name, "save") or not self._pays(tier, layout, keys):
                return None
            known = tier.known(layout.id, keys)
            lent = self._lend(layout, keys)
            wanted = [at for at in range(len(lent)) if not known[at]]
            if not wanted:
                return None
            node = index.node(layout.id, keys[wanted[-1]])
            index.pin(node, self._warm.name)
            books.trying(tier.name, "save")
        job = save_guarded(tier, layout.id, [keys[at] for at in wanted], [lent[at] for at in wanted])
        job.watch(done=partial(self._offered, tier.name, node, books.clock.now()))
        return job

    def _pays(self, tier: SharedTier, layout: Layout, keys: Sequence[BlockKey]) -> bool:
        """The value of a byte there: seconds saved against seconds of transfer. Where memory is all else, it is why."""
        name = tier.name
        refused, gain_min = self._refused[name], tier.gain_min
        why = refusal(self._costs(), layout, name, len(keys), refused=refused, gain_min=gain_min)
        self._refused[name] = 0 if why is None else self._refused[name] + 1
        if why is not None and len(self._books.tiers) == 1:
            self._books.ghosts.refused(layout.id, reversed(keys), name, why.words, self._books.clock.now())
        return why is None

    def _lend(self, layout: Layout, keys: Sequence[BlockKey]) -> list[Block]:
        """The blocks of a path as far as the warm tier holds them, without a copy."""
        blocks: list[Block] = []
        for at, key in enumerate(keys):
            held = self._books.index.holds(self._books.index.node(layout.id, key), self._warm.name)
            lent = self._warm.block(layout.id, key) if held else None
            if lent is None:
                break
            blocks.append(Block(keys[at - 1] if at else NO_PARENT, at + 1, [lent[0]], lent[1]))
        return blocks

    def _offered(self, name: str, node: int, started: float, job: Job) -> None:
        books = self._books
        for outcome in set(job.outcomes):
            label = (("tier", name), ("outcome", outcome))
            books.metrics.count("save_blocks_total", job.outcomes.count(outcome), label)
        with books.lock:
            books.index.unpin(node, self._warm.name)
            if (
                Outcome.FAILED in job.outcomes or Outcome.FULL in job.outcomes
            ):  # all of it would be sent again and again
                books.failed(name, "save", started)
            elif Outcome.HIT in job.outcomes:
                books.succeeded(name, "save")


def _find(tier: SharedTier, layout: Layout, keys: Sequence[BlockKey], deadline: float) -> list[Outcome]:
    try:
        found = tier.find(layout.id, keys, deadline)
        if len(found) == len(keys):
            return found
        LOG.error("tier %s gave %d answers to %d questions", tier.name, len(found), len(keys))
    except Exception:  # a tier that breaks its promise must not break a request: counted, logged, not asked further
        LOG.exception("tier %s raised when it was asked", tier.name)
    return [Outcome.FAILED] * len(keys)


def save_guarded(tier: Tier, layout: LayoutId, keys: Sequence[BlockKey], blocks: Sequence[Block]) -> Job:
    """The tier's own save; where it raises, a job of which nothing was taken."""
    try:
        return tier.save(layout, keys, blocks)
    except Exception:  # a tier that breaks its promise must not break a request: counted, logged, not written
        LOG.exception("tier %s raised while saving", tier.name)
    job = Job([Outcome.FAILED] * len(keys))
    job.set_done()
    return job


def _set_aside(name: str) -> str:
    return f"{name} is set aside after failures, and may hold them"


def _beginning(tier: SharedTier, keys: Sequence[BlockKey]) -> int:
    return len(keys) if tier.depth_max is None else min(len(keys), tier.depth_max)


_UNSURE = frozenset({Reason.NEVER_SEEN, Reason.UNKNOWN})
_SILENT = {
    Outcome.FAILED: (Reason.TIER_DOWN, "failed"),
    Outcome.LATE: (Reason.LATE, "did not answer in time"),
    Outcome.PENDING: (Reason.LATE, "was busy with other requests"),
}
