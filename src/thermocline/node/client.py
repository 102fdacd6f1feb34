"""The client of a node: the store's verbs for a process that does not own the tiers.

Questions are answered by the node, bytes are copied by the client itself, to and from the node's memory. Nothing here
raises because of the node, and nothing waits for it longer than a deadline. When it was late, or is gone, verbs answer
at once until a thread in the background has found it well again.
"""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from thermocline.blocks.frame import SUM_BYTES, copy_in, copy_out
from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import Layout, LayoutId
from thermocline.clock import Clock, SystemClock
from thermocline.metrics import Metrics
from thermocline.node.committer import Committer, Lent, Part, Save
from thermocline.node.keeper import Keeper
from thermocline.node.link import Link
from thermocline.node.places import NOWHERE, Places
from thermocline.node.staging import Staging, nothing
from thermocline.store.plan import Plan
from thermocline.store.receipt import Missing, Reason, Receipt
from thermocline.store.receipts import RECEIPTS_KEPT, Loaded, Receipts
from thermocline.tiers.tier import Job, Outcome, Piece, Usage
from thermocline.wire import messages as say

LOG = logging.getLogger("thermocline.node")
WAIT_SECONDS = 0.05
WAIT_SHARE, WAIT_SECONDS_MAX = 0.05, 1.0
"""For a long prompt the node's answer is waited for longer: this share of what computing the prompt would take, as far
as the node has told that."""
NODE_LABEL = (("tier", "node"),)
LIFE_SECONDS = 1.0
"""The memory of a node that went stays mapped for so long, for loads under way. Longer, and where the node is started
again the machine would have to hold it twice."""
LEND_AHEAD = 16
LOOK_SECONDS = 0.005


@dataclass(slots=True)
class _Held:
    """A plan's lease, and where its blocks lie, per layout."""

    link: Link
    lease: int
    keys: Sequence[BlockKey]
    places: tuple[Places, ...]


class NodeCosts:
    """Teaches the node what computing costs here."""

    def __init__(self, tell: Callable[[say.Order], object]) -> None:
        self._tell = tell
        self._model = ""

    def computes(self, model: str) -> bool:
        """See `LearnedCosts.computes`. What the node knows is not asked: False, so it is measured, and told."""
        self._model = model
        return False

    def recomputed(self, tokens: int, cached: int, seconds: float, model: str = "") -> None:
        """See `LearnedCosts.recomputed`."""
        self._tell(say.Computed(tokens, cached, seconds, model or self._model))


class NodeClient:
    """Attaches to the node at `socket` in the background, and again whenever it was away. Any thread may call any verb.

    `wait_seconds` bounds every answer but those for prompts that take long to compute, `save_wait_seconds` how long a
    save may wait for room to be lent (0: not at all). `role` is what `thermocline ps` calls this client.
    """

    def __init__(
        self,
        socket: Path,
        *,
        role: str = "engine",
        clock: Clock | None = None,
        wait_seconds: float = WAIT_SECONDS,
        save_wait_seconds: float = WAIT_SECONDS,
        receipts_kept: int = RECEIPTS_KEPT,
    ) -> None:
        self._clock = clock or SystemClock()
        self._wait_seconds, self._save_wait_seconds = wait_seconds, save_wait_seconds
        self.metrics = Metrics()
        self.receipts = Receipts(receipts_kept, clock=self._clock)
        self.costs = NodeCosts(self._tell)
        self._computing = (1, 0.0)  # so many tokens take so many seconds to compute, as the node last said
        self._held: dict[int, _Held] = {}
        self._lease_last = 0
        self._memories: dict[int, Piece] = {}
        self._life = 0
        self._lock = threading.Lock()
        self._committer = Committer(self._save_ended)
        self._wanted: dict[LayoutId, tuple[Layout, int]] = {}
        self._room: dict[LayoutId, deque[Lent]] = {}
        self._asked_room: dict[LayoutId, int] = {}
        self._parts_ended = 0
        self._room_came = threading.Condition(self._lock)
        self._keeper = Keeper(socket, f"{role} {os.getpid()}", self._clock, wait_seconds, self._attached, self._parted)

    @property
    def up(self) -> bool:
        """True while the node is attached and answers in time."""
        return self._keeper.link is not None

    def wait_up(self, seconds: float) -> bool:
        """Wait until the node is attached; False if `seconds` passed first. For starts and tests, not for requests."""
        return self._keeper.wait_up(seconds)

    # -- match ---------------------------------------------------------------------------------------------------------

    def stage(self, layouts: Sequence[Layout], keys: Sequence[BlockKey], *, prompt_tokens: int) -> Staging:
        """Ask for a plan whose blocks all lie in memory, leased. Does not wait: see `Staging`."""
        now = self._clock.now()
        staging = Staging(layouts, keys, prompt_tokens, self._clock, now + self._patience(prompt_tokens), self)
        link = self._keeper.link
        if not keys:
            staging.settle(nothing(layouts, keys, prompt_tokens, None))
        elif link is None:
            staging.settle(nothing(layouts, keys, prompt_tokens, (Reason.TIER_DOWN, "the node does not answer")))
        else:
            numbers = tuple(link.number(layout) for layout in layouts)
            joined = b"".join(keys)
            link.ask(
                lambda number: say.Stage(number, numbers, joined, prompt_tokens),
                lambda answer: self._staged(link, staging, answer),
            )
        return staging

    def _patience(self, prompt_tokens: int) -> float:
        """How long an answer is waited for."""
        tokens, seconds = self._computing
        return max(self._wait_seconds, min(WAIT_SHARE * seconds * min(1.0, prompt_tokens / tokens), WAIT_SECONDS_MAX))

    def match(self, layouts: Sequence[Layout], keys: Sequence[BlockKey], *, prompt_tokens: int) -> Plan:
        """See `Store.match`. Waits for what has to be promoted first, as long as that pays."""
        staging = self.stage(layouts, keys, prompt_tokens=prompt_tokens)
        while True:
            plan = staging.plan()
            if plan is not None:
                return plan
            staging.wait(self._wait_seconds)

    def release(self, lease: int) -> None:
        """See `Store.release`."""
        with self._lock:
            held = self._held.pop(lease, None)
        if held is not None and not held.link.ended:
            held.link.tell(say.Release((held.lease,)))

    def late(self, started: float) -> None:
        """For a staging that ran out of time: the node is left alone until it has proven to be well."""
        self.metrics.count("tier_failures_total", labels=NODE_LABEL)
        self._keeper.suspect(started)

    def _staged(self, link: Link, staging: Staging, answer: say.Answer | None) -> None:
        if isinstance(answer, say.Promoting):
            staging.extend(answer.deadline + self._wait_seconds)
            return
        if not isinstance(answer, say.Staged):
            staging.settle(staging.nothing(Reason.TIER_DOWN, "the node failed, or went away"))
            return
        self._keeper.answered()
        plan = staging.read(answer)
        if plan.prompt_tokens and 0 < plan.cold_seconds < math.inf:
            self._computing = (plan.prompt_tokens, plan.cold_seconds)
        if not plan.blocks and staging.is_overdue(self._wait_seconds):
            self._keeper.suspect(staging.started)  # to wait so long pays only where it brings something
        if plan.blocks:
            places = tuple(
                Places(link.incarnation, answer.deadline, offsets[: plan.blocks], sums[: plan.blocks * SUM_BYTES])
                for offsets, sums in zip(answer.offsets, answer.sums, strict=True)
            )
            with self._lock:
                self._strike_out(self._clock.now())
                self._lease_last += 1
                plan = replace(plan, lease=self._lease_last)
                self._held[plan.lease] = _Held(link, answer.lease, plan.keys, places)
        elif answer.lease:
            link.tell(say.Release((answer.lease,)))
        if not staging.settle(plan):
            self.release(plan.lease)

    def _strike_out(self, now: float) -> None:
        """Forget plans that nobody released, and whose leases ran out."""
        while self._held and next(iter(self._held.values())).places[0].deadline < now:
            del self._held[next(iter(self._held))]

    # -- load ----------------------------------------------------------------------------------------------------------

    def places(self, plan: Plan, rank: int) -> Places:
        """Where the plan's blocks of one of its layouts lie, for a process that has no plan. Valid like its lease."""
        with self._lock:
            held = self._held.get(plan.lease)
        if held is None or not plan.blocks:
            return NOWHERE
        first = held.keys.index(plan.keys[0])  # a part of a plan keeps its lease, and begins somewhere in it
        return held.places[rank].part(first, first + plan.blocks)

    def load(self, plan: Plan, rank: int, into: Sequence[Sequence[Piece]]) -> Loaded:
        """See `Store.load`. All blocks of the plan lie in memory."""
        if len(into) < plan.blocks:
            raise ValueError(f"a plan of {plan.blocks} blocks cannot be loaded into {len(into)}")
        places = self.places(plan, rank)
        if plan.blocks and not places.offsets:
            return Loaded(0, {}, (Missing(0, plan.blocks, Reason.LATE, "the plan's lease is over"),), 0.0)
        loaded = self.fetch(places, into[: plan.blocks])
        if any(part.reason is Reason.CORRUPT for part in loaded.missing):
            self.damaged(plan.layouts[rank], plan.keys[loaded.blocks : loaded.blocks + 1])
        by_tier = {run.tier: 0 for run in plan.runs}
        for run in plan.runs:
            by_tier[run.tier] += max(0, min(run.stop, loaded.blocks) - run.start)
        return replace(loaded, by_tier={tier: count for tier, count in by_tier.items() if count})

    def fetch(self, places: Places, into: Sequence[Sequence[Piece]]) -> Loaded:
        """Copy blocks out of the node's memory and verify the copies. Asks nobody, and needs no node any more.

        Only the first `Loaded.blocks` of `into` hold their block; later ones hold anything at all.
        """
        started, count = self._clock.now(), len(places.offsets)
        memory = self.memory_of(places.incarnation)
        why = None
        done = 0
        if memory is None:
            why = (Reason.TIER_DOWN, "the node's memory is not mapped here")
        while why is None and memory is not None and done < count:
            if self._clock.now() > places.deadline:
                why = (Reason.LATE, "the lease ran out before the copy")
            elif _copied(memory, places, done, into[done]):
                done += 1
            else:
                why = (Reason.CORRUPT, "what lay in memory did not verify")
        label = (*NODE_LABEL, ("outcome", Outcome.HIT))
        self.metrics.count("load_blocks_total", done, label)
        if why is not None:
            self.metrics.count("load_blocks_total", count - done, (*NODE_LABEL, ("outcome", Outcome.FAILED)))
        missing = (Missing(done, count, *why),) if why else ()
        return Loaded(done, {"memory": done} if done else {}, missing, self._clock.now() - started)

    def damaged(self, layout: Layout, keys: Sequence[BlockKey]) -> None:
        """A copy of these blocks did not verify: the node looks at them, and drops what is damaged."""
        link = self._keeper.link
        if link is not None and keys:
            link.tell(say.Damaged(link.number(layout), b"".join(keys)))

    def memory_of(self, incarnation: int) -> Piece | None:
        """All of the memory of one life of the node, as it is mapped here; None for a life that is not known."""
        with self._lock:
            return self._memories.get(incarnation)

    # -- save ----------------------------------------------------------------------------------------------------------

    def save(
        self, layout: Layout, keys: Sequence[BlockKey], blocks: Sequence[Sequence[Piece]], *, start: int = 0
    ) -> Job:
        """See `Store.save`. The bytes are copied before this returns, into slots that the node lent beforehand.

        Sums are made and the node is told in a thread: the job is visible and done when the node answers, and its
        outcomes are PENDING until then. LATE: there was no room lent; FAILED: the node is away.
        """
        save = Save(layout, keys, start, Job([Outcome.PENDING] * len(blocks)))
        at, deadline = 0, self._clock.now() + self._save_wait_seconds
        while at < len(blocks):
            lent = self.lend(layout, len(blocks) - at) or self._wait_lent(layout, len(blocks) - at, deadline)
            if not lent:
                break
            try:
                for slot, pieces in zip(lent, blocks[at:], strict=False):
                    copy_in(pieces, slot.view)
            except BaseException:  # pieces that are no such block: the caller's mistake must not cost slots
                self.give_back(lent)
                raise
            self.commit_part(save.part(at, lent))
            at += len(lent)
        save.refuse(at, Outcome.LATE if self.up else Outcome.FAILED)
        save.sealed()
        return save.job

    def lend(self, layout: Layout, count: int) -> list[Lent]:
        """Up to `count` of the slots lent for blocks of this layout, to be written and committed. Does not wait."""
        with self._lock:
            room = self._room.get(layout.id)
            lent = [room.popleft() for _ in range(min(count, len(room)))] if room else []
            for slot in lent:
                slot.link.hold(1)
        self._top_up(layout, count)
        return lent

    def commit(self, layout: Layout, keys: Sequence[BlockKey], lent: Sequence[Lent], *, start: int = 0) -> Job:
        """The blocks of keys[start], keys[start + 1], ... were written into these slots. See `save`."""
        save = Save(layout, keys, start, Job([Outcome.PENDING] * len(lent)))
        if lent:
            self.commit_part(save.part(0, lent))
        save.sealed()
        return save.job

    def commit_part(self, part: Part) -> None:
        """As `commit`, for a part of a save whose copies ended one after the other."""
        self._committer.put(part)
        for slot in part.lent:
            slot.link.let_go(1)

    def give_back(self, lent: Sequence[Lent]) -> None:
        """These slots are not needed, or hold nothing worth keeping. Nothing is written into them any more."""
        self._keep(lent)
        for slot in lent:
            slot.link.let_go(1)

    def _keep(self, lent: Sequence[Lent]) -> None:
        """Have these slots for saves to come, as long as their link lasts."""
        with self._lock:
            for slot in lent:
                if not slot.link.ended:
                    self._room.setdefault(slot.layout, deque()).append(slot)

    def ready(self, layout: Layout, count: int) -> None:
        """From now on have up to `count` slots lent ahead for saves of this layout."""
        with self._lock:
            self._wanted[layout.id] = (layout, count)
        self._top_up(layout, 0)

    def unready(self, layout: Layout) -> int:
        """No saves of this layout will come: give its slots back. How many were to be ready until now."""
        with self._lock:
            _, count = self._wanted.pop(layout.id, (layout, 0))
            lent = self._room.pop(layout.id, ())
        for link in {slot.link for slot in lent}:
            link.tell(say.GiveBack(tuple(slot.slot for slot in lent if slot.link is link)))
        return count

    def unsaved(self, layout: Layout, keys: Sequence[BlockKey]) -> int:
        """See `Store.unsaved`: 0 when the node does not answer."""
        return self._count(lambda link, number: say.Unsaved(number, link.number(layout), b"".join(keys)))

    def _top_up(self, layout: Layout, needed: int, link: Link | None = None) -> None:
        """Ask for slots if there are fewer than half of those wanted, or than are needed now. Does not wait."""
        link = link or self._keeper.link
        if link is None:
            return
        with self._lock:
            wanted = max(self._wanted.setdefault(layout.id, (layout, LEND_AHEAD))[1], needed)
            there = len(self._room.get(layout.id, ())) + self._asked_room.get(layout.id, 0)
            count = wanted - there if 2 * there < wanted else 0
            if count > 0:
                self._asked_room[layout.id] = self._asked_room.get(layout.id, 0) + count
        if count > 0:
            number = link.number(layout)
            link.ask(
                lambda asked: say.Lend(asked, number, count), lambda answer: self._lent(link, layout, count, answer)
            )

    def _lent(self, link: Link, layout: Layout, asked: int, answer: say.Answer | None) -> None:
        memory = link.memory if isinstance(answer, say.Lent) else None
        with self._room_came:
            self._asked_room[layout.id] = max(0, self._asked_room.get(layout.id, 0) - asked)
            if isinstance(answer, say.Lent) and memory is not None and not link.ended:
                room = self._room.setdefault(layout.id, deque())
                for slot, offset in zip(answer.slots, answer.offsets, strict=True):
                    room.append(Lent(link, layout.id, slot, memory[offset : offset + layout.block_bytes]))
            self._room_came.notify_all()

    def _wait_lent(self, layout: Layout, count: int, deadline: float) -> list[Lent]:
        """Wait for slots that were asked for, until `deadline`. Where all are lent that may be, commits make room."""
        room, asked = self._room, self._asked_room
        while self.up and (left := deadline - self._clock.now()) > 0:
            with self._room_came:
                ended = self._parts_ended
                self._room_came.wait_for(lambda: room.get(layout.id) or not asked.get(layout.id), left)
                if not room.get(layout.id) and ended == self._parts_ended:
                    if self._committer.idle:
                        break
                    self._room_came.wait(min(left, LOOK_SECONDS))
            lent = self.lend(layout, count)
            if lent:
                return lent
        return []

    def _save_ended(self, layout: Layout, unused: Sequence[Lent], outcomes: Sequence[Outcome]) -> None:
        self._keep(unused)
        with self._room_came:
            self._parts_ended += 1
            self._room_came.notify_all()
        if layout.id in self._wanted:
            self._top_up(layout, 0)  # what was committed does not count any more, where as much was lent as may be
        for outcome in set(outcomes):
            self.metrics.count("save_blocks_total", outcomes.count(outcome), (*NODE_LABEL, ("outcome", outcome)))
        saved = sum(outcome is Outcome.HIT for outcome in outcomes) * layout.block_bytes
        self.metrics.count("save_bytes_total", saved, NODE_LABEL)

    # -- the rest ------------------------------------------------------------------------------------------------------

    def prefetch(self, layouts: Sequence[Layout], keys: Sequence[BlockKey], deadline: float) -> Job:
        """See `Store.prefetch`. LATE for all where the node does not answer."""
        job = Job([Outcome.PENDING] * len(keys))

        def arrived(answer: say.Answer | None) -> None:
            there = answer.count if isinstance(answer, say.Count) else 0
            behind = Outcome.MISS if isinstance(answer, say.Count) else Outcome.LATE
            job.outcomes[:] = [Outcome.HIT] * there + [behind] * (len(keys) - there)
            job.set_done()

        link = self._keeper.link
        if link is None:
            arrived(None)
        else:
            numbers, seconds = tuple(link.number(layout) for layout in layouts), deadline - self._clock.now()
            link.ask(lambda number: say.Prefetch(number, numbers, b"".join(keys), seconds), arrived)
        return job

    def record(
        self,
        receipt: Receipt,
        tokens: NDArray[np.uint32],
        root: BlockKey,
        *,
        age_seconds: float = 0.0,
        output_tokens: int = 0,
    ) -> None:
        """Have the node keep a receipt, for `thermocline why --socket`, and the request for `thermocline advise`."""
        told = msgspec.msgpack.encode(receipt), tokens.tobytes(), root
        self._tell(say.Record(*told, age_seconds, output_tokens))

    def usage(self) -> dict[str, Usage]:
        """Nothing: the tiers are the node's, and `thermocline ps` shows them."""
        return {}

    def measure(self) -> None:
        """Bring the gauges up to date."""
        self.metrics.gauge("breaker_open", not self.up, NODE_LABEL)
        self.metrics.gauge("leases", len(self._held))

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until the node has answered for every save; False if `seconds` passed first."""
        return self._committer.flush(seconds)

    def close(self, seconds: float = 5.0) -> None:
        """Wait for saves under way, then leave. A second call does nothing."""
        self.flush(seconds)
        self._committer.close()
        self._keeper.close()
        self.receipts.close()
        with self._lock:
            self._memories.clear()
            self._held.clear()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _tell(self, order: say.Order) -> None:
        link = self._keeper.link
        if link is not None:
            link.tell(order)

    def _count(self, make: Callable[[Link, int], say.Question]) -> int:
        """Ask for a number, and wait for it; 0 where it does not come in time."""
        link = self._keeper.link
        if link is None:
            return 0
        came, counted, started = threading.Event(), [0], self._clock.now()

        def take(answer: say.Answer | None) -> None:
            counted[0] = answer.count if isinstance(answer, say.Count) else 0
            came.set()

        link.ask(lambda number: make(link, number), take)
        if not came.wait(self._wait_seconds):
            self.late(started)
            return 0
        return counted[0]

    def _attached(self, link: Link) -> None:
        """A link stands. Its memory is mapped here, in the background, not by the first request."""
        memory = link.memory
        with self._lock:
            self._memories = {link.incarnation: memory}
            self._life = 0 if link.ended else link.incarnation
            self._room.clear()
            self._asked_room.clear()
            wanted = [layout for layout, _ in self._wanted.values()]
        for layout in wanted:
            self._top_up(layout, 0, link)

    def _parted(self, link: Link) -> None:
        """A link ended: what was lent over it is the node's again, and its leases are over."""
        forget = threading.Timer(LIFE_SECONDS, self._forget, (link.incarnation,))
        forget.daemon = True
        forget.start()
        with self._room_came:
            self._life = 0
            self._room.clear()
            self._asked_room.clear()
            self._room_came.notify_all()

    def _forget(self, incarnation: int) -> None:
        """Unmap the memory of a node that went, unless it is back."""
        with self._lock:
            if incarnation != self._life:
                self._memories.pop(incarnation, None)


def _copied(memory: Piece, places: Places, at: int, into: Sequence[Piece]) -> bool:
    offset, nbytes = places.offsets[at], sum(piece.nbytes for piece in into)
    if offset < 0 or offset + nbytes > memory.nbytes:
        return False
    return copy_out(memory[offset : offset + nbytes], into) == places.sums[at * SUM_BYTES : (at + 1) * SUM_BYTES]
