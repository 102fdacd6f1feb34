"""The scheduler's half: which blocks vLLM loads instead of computing them, and which are saved.

It runs in the thread that schedules every request, so nothing here waits for the node, but for some milliseconds where
nothing else is to run. Loads are asynchronous, or come at the beginning of the step that computes on them where that
keeps nobody waiting. What was loaded is verified before vLLM computes on it, and what was not intact is computed.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from thermocline.blocks.frame import SUM_BYTES
from thermocline.blocks.layout import Layout
from thermocline.clock import Clock, SystemClock
from thermocline.engines.vllm.guard import guarded
from thermocline.engines.vllm.layout import layout_in
from thermocline.engines.vllm.orders import NULL_PAGE, LoadFailed, LoadOrder, Orders, Report, SaveOrder
from thermocline.engines.vllm.prompts import prompt_of, token_array
from thermocline.engines.vllm.saves import Saves
from thermocline.engines.vllm.tracked import Hints, Tracked, read_hints
from thermocline.errors import LayoutError
from thermocline.node.client import NodeClient
from thermocline.node.places import NOWHERE, Places
from thermocline.node.staging import nothing
from thermocline.store.plan import Plan
from thermocline.store.receipt import Missing, Reason, Receipt
from thermocline.store.receipts import NOTHING, Loaded, account, make_receipt

LOG = logging.getLogger("thermocline.vllm")
IDLE_WAIT_SECONDS = 0.005
"""How long an engine with nothing to run waits for an answer: an empty step and vLLM's pause behind it take 3 ms."""
LEASE_LEFT_SECONDS = 0.25
"""A plan whose lease runs out sooner than this is asked for again."""
STAGINGS_MAX = 4
STAGED_AHEAD_MAX = 64
"""Of requests that wait in vLLM's queue only so many have their blocks held in memory ahead of time."""
DEVICE = "device"
_UNANSWERED = frozenset({Reason.TIER_DOWN, Reason.LATE})

PagesOf = Callable[[str], Sequence[Sequence[int]] | None]


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that is being computed. `chunk` is (tokens, cached) where it computes one prefill and nothing else."""

    started: float
    chunk: tuple[int, int] | None
    prefilled: Sequence[Tracked]


class Scheduler:
    """One engine's decisions. All calls come from one thread, in the order of vLLM's steps."""

    def __init__(
        self,
        client: NodeClient,
        *,
        tokens_per_block: int,
        save_blocks_max: int,
        may_load_at_once: bool = False,
        clock: Clock | None = None,
    ) -> None:
        """At most `save_blocks_max` blocks are saved in one step: copying them is all that a step waits for.

        `may_load_at_once`: vLLM recomputes single pages that turn out bad in the step that computes on them. It is used
        with one rank and one KV group only: of several ranks, those whose load was good would save what others spoilt.
        """
        self._may_load_at_once = may_load_at_once
        self._client, self._clock = client, clock or SystemClock()
        self._tokens_per_block, self._save_blocks_max = tokens_per_block, save_blocks_max
        self._base: list[list[Layout]] = []
        self._layouts: list[list[Layout]] = []
        self._tracked: dict[str, Tracked] = {}
        self._loading: dict[str, Tracked] = {}
        self._sources: dict[str, dict[str, int]] = {}
        self._running: set[str] = set()
        self._saves = Saves(1, self._clock)
        self._loads: list[LoadOrder] = []
        self._over: list[str] = []
        self._steps: deque[_Step] = deque(maxlen=64)
        self._epoch = b""
        self._wait_left = IDLE_WAIT_SECONDS
        self._later: list[Callable[[], object]] = []
        self.counts: Counter[tuple[str, str]] = Counter()

    def attach(self, layouts: Sequence[Sequence[Layout]]) -> None:
        """The layouts of all ranks, one per KV group each. Until then nothing is found, and nothing kept.

        Raises LayoutError where a rank is missing or out of turn: it would be given the blocks of another.
        """
        for at, rank in enumerate(layouts):
            for layout in rank:
                place = layout.pp_rank * layout.tp_size + layout.tp_rank
                if place != at or len(layouts) != layout.tp_size * layout.pp_size:
                    raise LayoutError(
                        f"rank {place} told its layout as number {at} of {len(layouts)}",
                        hint="run vLLM 0.32 with tensor or pipeline parallelism alone",
                    )
        self._base = self._layouts = [list(each) for each in layouts]
        self._saves = Saves(len(layouts), self._clock)
        if layouts:
            self._client.costs.computes(layouts[0][0].computed_by)

    @property
    def attached(self) -> bool:
        """True once there are layouts."""
        return bool(self._layouts)

    # -- a request comes -----------------------------------------------------------------------------------------------

    def arrived(self, request: Any) -> None:  # noqa: ANN401  # vLLM's Request
        """A request is new: ask the node for its beginning now, while it waits for its turn."""
        prompt = prompt_of(request, self._tokens_per_block) if self.attached else None
        if prompt is None:
            return
        hints = read_hints(request.kv_transfer_params)
        if hints is None:
            LOG.warning("a request's kv_transfer_params were malformed, and are ignored")
            self.counts["hints_refused", ""] += 1
        hints = hints or Hints()
        may_load = hints.load and not request.skip_reading_prefix_cache
        tracked = Tracked(request, prompt, hints, self._clock.now(), may_load, hints.save)
        self._tracked[tracked.id] = tracked
        if may_load and len(self._tracked) - len(self._running) <= STAGED_AHEAD_MAX:
            self._stage(tracked)

    def matched(self, request_id: str, computed: int) -> int | None:
        """How many tokens behind the `computed` ones can be loaded. None: not known yet, ask again.

        Asked again and again, it gives the same answer for as long as a lease lasts, and then asks the node anew.
        """
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return 0
        if tracked.running:  # it was preempted: its blocks are gone, and its text may be longer now
            self._stopped(tracked)
            self._unstage(tracked)
        if not tracked.may_load:
            return 0
        tracked.local = computed // self._tokens_per_block
        if tracked.local >= tracked.loadable:  # vLLM has all of it: there is nothing to wait for
            return 0
        plan = self._plan(tracked)
        if plan is None:
            return None
        alone = len(self._layouts) == 1 and len(self._layouts[0]) == 1 and len(self._tracked) == 1 and not self._loading
        tracked.at_once = self._may_load_at_once and alone
        return max(0, plan.tokens - computed)

    def loads_at_once(self, request_id: str) -> bool:
        """Whether what `matched` told of is loaded in the step that computes on it.

        That keeps nobody waiting, and no other request can find these pages in vLLM's own cache before they are right.
        """
        tracked = self._tracked.get(request_id)
        return tracked is not None and tracked.at_once

    def _plan(self, tracked: Tracked) -> Plan | None:
        if tracked.staging is None:
            self._stage(tracked)
        staging = tracked.staging
        assert staging is not None
        if not staging.done and not self._running and self._wait_left > 0:
            started = self._clock.now()
            staging.wait(self._wait_left)
            self._wait_left -= self._clock.now() - started
        plan = staging.plan()
        if plan is None or not plan.blocks:
            return self._noted(tracked, plan)
        if not tracked.deadline:
            tracked.deadline = self._client.places(plan, 0).deadline
        if self._clock.now() < tracked.deadline - LEASE_LEFT_SECONDS:
            return self._noted(tracked, plan)
        self._unstage(tracked)
        if tracked.stagings < STAGINGS_MAX:
            self._stage(tracked)
            return None
        tracked.may_load = False
        return replace(plan, runs=(), lease=0)

    def _noted(self, tracked: Tracked, plan: Plan | None) -> Plan | None:
        if plan is not None and tracked.asked is not None:
            for part in plan.missing:
                if part.reason not in _UNANSWERED:
                    self._saves.absent(plan.keys[part.start : part.stop], tracked.asked)
            self._saves.present(plan.keys[: plan.blocks], tracked.asked)
            tracked.asked = None
            if tracked.first is None:
                tracked.first = plan
                tracked.saving.ordered = max(tracked.saving.ordered, plan.blocks)  # they are in memory
        return plan

    @guarded(lambda: None)
    def _note_unasked(self, tracked: Tracked) -> None:
        """What vLLM has itself needs no answer, but a receipt; and an answer that is there is read all the same."""
        plan = tracked.staging.plan() if tracked.staging is not None else None
        if plan is not None:
            self._noted(tracked, plan)
        elif tracked.first is None and tracked.local:
            keys = tracked.prompt.grow(tracked.request.all_token_ids, tracked.local)[: tracked.local]
            tracked.first = nothing(self._layouts[0], keys, tracked.request.num_tokens, None)

    def _stage(self, tracked: Tracked) -> None:
        blocks = tracked.loadable
        keys = tracked.prompt.grow(tracked.request.all_token_ids, blocks)[:blocks]
        layouts = [layout for rank in self._layouts for layout in rank]
        tracked.stagings += 1
        tracked.deadline, tracked.asked = 0.0, self._clock.now()
        tracked.staging = self._client.stage(layouts, keys, prompt_tokens=tracked.request.num_tokens)
        self.counts["asked_blocks", ""] += blocks

    def _unstage(self, tracked: Tracked) -> None:
        staging, tracked.staging = tracked.staging, None
        if staging is not None:
            self._later.append(staging.cancel)

    def _tell_what_waits(self) -> None:
        """Tell the node what no request waits for. A step comes after the last request's end, too."""
        later, self._later = self._later, []
        for tell in later:
            _tried(tell)

    # -- it is loaded --------------------------------------------------------------------------------------------------

    def allocated(self, request_id: str, pages: Sequence[Sequence[int]], tokens: int) -> None:
        """VLLM has pages for a request: `tokens` are to be loaded into those behind what it had itself."""
        tracked = self._tracked.get(request_id)
        if tokens:  # from now on vLLM waits for the end of a load, so there must be one
            self._loads.append(self._load_order(request_id, tracked, tokens, pages))
        elif tracked is not None and not tracked.loading:
            self._note_unasked(tracked)
            self._unstage(tracked)

    def _load_order(
        self, request_id: str, tracked: Tracked | None, tokens: int, pages: Sequence[Sequence[int]]
    ) -> LoadOrder:
        """The order for a load; where none can be made, one that every worker fails at."""
        try:
            plan = tracked.staging.plan() if tracked is not None and tracked.staging is not None else None
            if tracked is not None and plan is not None:
                return self._load_planned(tracked, plan, tokens, pages)
        except Exception:  # vLLM would wait for ever
            LOG.exception("a load could not be ordered")
        if tracked is None or not tracked.at_once:
            return LoadOrder(request_id, (), ((NULL_PAGE,),))
        lost = tuple(pages[0][tracked.local : tracked.local + tokens // self._tokens_per_block])
        return LoadOrder(request_id, (), (lost,), at_once=True)

    def _load_planned(self, tracked: Tracked, plan: Plan, tokens: int, pages: Sequence[Sequence[int]]) -> LoadOrder:
        """What vLLM has no page for is not needed: it has left a sliding window."""
        start = tracked.local
        stop = start + tokens // self._tokens_per_block
        tracked.is_first = tracked.started is None
        tracked.loading, tracked.under_way = True, _by_tier(plan, start, stop)
        self._loading[tracked.id] = tracked
        self._sources[tracked.id] = self._tokens(tracked.under_way)
        tracked.wanted = wanted = [[at for at in range(start, stop) if each[at] != NULL_PAGE] for each in pages]
        groups = len(pages)
        places = tuple(
            tuple(_picked(self._client.places(plan, rank * groups + group), wanted[group]) for group in range(groups))
            for rank in range(len(self._layouts))
        )
        ids = tuple(tuple(each[at] for at in some) for each, some in zip(pages, wanted, strict=True))
        return LoadOrder(tracked.id, places, ids, tracked.at_once)

    def sources(self, request_id: str) -> Mapping[str, int]:
        """From which tiers the tokens of the load that was just ordered come."""
        return self._sources.pop(request_id, {})

    def loads_over(self, finished: Iterable[str], failed: Iterable[str]) -> None:
        """All ranks are done with these loads; the `failed` ones are computed, and never loaded again."""
        failed = set(failed)
        for request_id in finished:
            tracked = self._loading.pop(request_id, None)
            if tracked is None:
                continue
            tracked.loading = False
            if request_id in failed:
                self._give_up(tracked)
            for tier, tokens in self._tokens(tracked.under_way).items():
                self.counts["loaded_tokens", tier] += tokens
            if tracked.is_first:  # a receipt tells of the first load, not of one after a preemption
                tracked.loaded = tracked.under_way
            self._unstage(tracked)
            if request_id not in self._tracked and not tracked.at_once:
                self._tell_what_waits()  # its client has gone: there may be no next step

    def _give_up(self, tracked: Tracked) -> None:
        """A load failed. What it was to bring is computed and saved anew: the node may have lost it."""
        tracked.may_load = False
        if tracked.under_way.blocks:
            tracked.under_way = _nothing(tracked.under_way, Reason.LATE, "a worker did not say why")
        self.counts["failed_loads", tracked.under_way.missing[0].reason] += 1
        self._saves.again(tracked)

    def _tokens(self, loaded: Loaded) -> dict[str, int]:
        """Tokens by tier, without what vLLM had itself."""
        size = self._tokens_per_block
        return {tier: blocks * size for tier, blocks in loaded.by_tier.items() if tier != DEVICE}

    def reported(self, report: Report) -> None:
        """What workers did in a step. Comes before `loads_over` of the same step."""
        for saved in report.saved:
            self._saves.report(saved)
        for failed in report.failed:
            self._load_failed(failed)
        self.loads_over(report.at_once, {failed.request for failed in report.failed})

    def _load_failed(self, failed: LoadFailed) -> None:
        tracked = self._loading.get(failed.request)
        if tracked is None:
            return
        reason = Reason(failed.reason)
        plan = tracked.staging.plan() if tracked.staging else None
        if reason is Reason.CORRUPT and plan is not None:
            layout = self._layouts[failed.rank][failed.group]
            at = tracked.wanted[failed.group][failed.at]
            self._client.damaged(layout, plan.keys[at : at + 1])
        tracked.under_way = _nothing(tracked.under_way, reason, failed.detail)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def orders(self, scheduled: Mapping[str, int], pages_of: PagesOf, *, early: bool = False) -> Orders:
        """Everything for the workers in this step, in which so many tokens of each scheduled request are computed.

        See `Orders.early`.
        """
        now, room = self._clock.now(), self._save_blocks_max
        saves: list[SaveOrder] = []
        prefilled: list[Tracked] = []
        for request_id, count in scheduled.items():
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            self._runs(tracked, now)
            request = tracked.request
            computed = min(request.num_computed_tokens + count, request.num_tokens)
            if not tracked.prefill_seconds and computed >= request.num_prompt_tokens:
                prefilled.append(tracked)
            for order in self._save_orders(tracked, computed, room, pages_of):
                saves.append(order)
                room -= len(order.pages[0])
        chunk = None if any(load.at_once for load in self._loads) else self._chunk(scheduled)
        self._steps.append(_Step(now, chunk, prefilled))
        self._wait_left = IDLE_WAIT_SECONDS
        made = Orders(tuple(self._loads), tuple(saves), tuple(self._over), self._epoch, not scheduled, early)
        self._loads, self._over = [], []
        self._tell_what_waits()
        return made

    def _save_orders(self, tracked: Tracked, computed: int, room: int, pages_of: PagesOf) -> Sequence[SaveOrder]:
        """What is to be saved of a request in this step: one order, or none."""
        if not tracked.may_save:
            return ()
        blocks = computed // self._tokens_per_block
        try:
            order = self._saves.order(tracked, blocks, room, lambda: pages_of(tracked.id))
        except Exception:  # the loads of this step must go out all the same
            LOG.exception("a save could not be ordered; the request is not saved")
            tracked.may_save = False
            return ()
        return () if order is None else (order,)

    def _runs(self, tracked: Tracked, now: float) -> None:
        tracked.running = True
        self._running.add(tracked.id)
        if tracked.started is None:
            tracked.started = now
            alone = tracked.local and not tracked.loading  # vLLM had its beginning, and we had no more
            if alone and not tracked.loaded.blocks:
                tracked.loaded = Loaded(tracked.local, {DEVICE: tracked.local}, tracked.loaded.missing, 0.0)

    def _stopped(self, tracked: Tracked) -> None:
        tracked.running = False
        self._running.discard(tracked.id)

    def _chunk(self, scheduled: Mapping[str, int]) -> tuple[int, int] | None:
        """The one prefill of a step that has nothing else, with no other step under way."""
        if len(scheduled) != 1 or self._steps:
            return None
        ((request_id, count),) = scheduled.items()
        tracked = self._tracked.get(request_id)
        if tracked is None or count < self._tokens_per_block:
            return None
        return count, tracked.request.num_computed_tokens

    def step_over(self) -> None:
        """The oldest step was computed."""
        if not self._steps:
            return
        step, now = self._steps.popleft(), self._clock.now()
        if step.chunk is not None:
            self._client.costs.recomputed(*step.chunk, now - step.started)
        for tracked in step.prefilled:
            if tracked.started is not None:
                tracked.prefill_seconds = now - tracked.started

    # -- the end -------------------------------------------------------------------------------------------------------

    def finished(self, request_id: str) -> dict[str, object] | None:
        """A request is over. What it loaded and computed, for its answer; None where the node was not asked."""
        tracked = self._tracked.pop(request_id, None)
        if tracked is None:
            return None
        if tracked.loading and tracked.at_once:  # had it failed, vLLM would not have ended the request in its step
            self.loads_over([request_id], ())
        self._stopped(tracked)
        self._sources.pop(request_id, None)
        if tracked.saving.told:
            self._over.append(request_id)
        if not tracked.loading:  # else its lease lasts until the load is over
            self._unstage(tracked)
        return None if tracked.first is None else self._receipt(tracked, tracked.first)

    def _receipt(self, tracked: Tracked, plan: Plan) -> dict[str, object]:
        loaded = tracked.loaded
        missing = account(plan, loaded)
        receipt = make_receipt(tracked.id, plan, loaded, tracked.prefill_seconds, missing, self._clock.wall())
        self._later.append(partial(self._record, receipt, tracked))
        told: dict[str, object] = {
            "prompt_tokens": receipt.prompt_tokens,
            "loaded_tokens": sum(self._tokens(loaded).values()),
            "computed_tokens": receipt.computed_tokens,
            "by_tier": receipt.by_tier,
            "missing": [
                {"start": part.start, "stop": part.stop, "reason": str(part.reason), "detail": part.detail}
                for part in receipt.missing
            ],
        }
        if tracked.hints.session:
            told["session"] = tracked.hints.session
        return told

    def _record(self, receipt: Receipt, tracked: Tracked) -> None:
        ids, prompt = tracked.request.all_token_ids, tracked.request.num_prompt_tokens
        self._client.record(
            receipt,
            token_array(ids[:prompt]),
            tracked.prompt.family,
            age_seconds=self._clock.now() - tracked.came,
            output_tokens=len(ids) - prompt,
        )

    def reset(self) -> None:
        """Nothing that was saved before is loaded by this engine any more: its weights may be others from now on.

        What the node has stays there, for engines with the weights it was computed with.
        """
        self._epoch = os.urandom(16)
        self._layouts = [[layout_in(self._epoch, layout) for layout in rank] for rank in self._base]
        self._saves.forget(self._epoch)
        for tracked in self._tracked.values():
            tracked.may_load = tracked.may_save = False
            if not tracked.loading:
                self._unstage(tracked)
        self._tell_what_waits()

    def close(self) -> None:
        """No step comes any more: tell what waits for one."""
        self._tell_what_waits()

    def take_counts(self) -> dict[tuple[str, str], int]:
        """What was counted since this was last asked, by name and label."""
        self.counts["saved_blocks", ""] += self._saves.saved
        for why, count in self._saves.dropped.items():
            self.counts["dropped_blocks", why] += count
        self._saves.saved = 0
        self._saves.dropped.clear()
        taken = {name: count for name, count in self.counts.items() if count}
        self.counts.clear()
        return taken

    def check_idle(self) -> None:
        """Nothing is left of requests that are over. Raises AssertionError."""
        assert not self._loading, "a load is under way"
        assert not self._loads, "a load was not ordered"
        assert not self._saves.flying, "a key is on its way"
        assert not self._running, "a request runs"


@guarded(lambda: None)
def _tried(tell: Callable[[], object]) -> None:
    tell()


def _picked(places: Places, wanted: Sequence[int]) -> Places:
    """The places of some blocks; nowhere, where the lease has ended meanwhile."""
    if not wanted or wanted[-1] >= len(places.offsets):
        return NOWHERE
    if len(wanted) == wanted[-1] + 1 - wanted[0]:
        return places.part(wanted[0], wanted[-1] + 1)
    sums = b"".join(places.sums[at * SUM_BYTES : (at + 1) * SUM_BYTES] for at in wanted)
    return replace(places, offsets=tuple(places.offsets[at] for at in wanted), sums=sums)


def _by_tier(plan: Plan, start: int, stop: int) -> Loaded:
    """What a load brings if it goes well: blocks before `start` are vLLM's own."""
    counts = {run.tier: max(0, min(run.stop, stop) - max(run.start, start)) for run in plan.runs}
    found = {DEVICE: start, **counts}
    return Loaded(stop, {tier: count for tier, count in found.items() if count}, (), 0.0)


def _nothing(planned: Loaded, reason: Reason, detail: str) -> Loaded:
    return replace(NOTHING, missing=(Missing(0, planned.blocks, reason, detail),)) if planned.blocks else planned
