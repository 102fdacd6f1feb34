"""The worker's half: carries out orders on one rank. It loads in a thread of its own, and saves in the model's.

Nothing here can fail a step. A load that goes wrong is reported as failed and computed; a save that does is dropped.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial

from thermocline.blocks.key import KEY_BYTES, BlockKey
from thermocline.blocks.layout import Layout
from thermocline.engines.vllm.layout import layout_in
from thermocline.engines.vllm.orders import LoadFailed, LoadOrder, Orders, Report, Saved, SaveOrder
from thermocline.engines.vllm.pages import GroupPages
from thermocline.store.receipt import Reason
from thermocline.store.receipts import NOTHING, Loaded
from thermocline.tiers.tier import Job, Outcome

LOG = logging.getLogger("thermocline.vllm")
LOAD_WAIT_SECONDS = 0.01
"""How long a step in which nothing is computed waits for a load: vLLM would sleep and come back meanwhile."""
CLOSE_SECONDS = 5.0
THREAD_SECONDS = 0.5
"""How often a step that waits for a load looks whether the thread that does it is still there."""
PART_BLOCKS = 8
_ON_THEIR_WAY = frozenset({Outcome.HIT, Outcome.PENDING})
"""PENDING: another engine is saving the very block."""


@dataclass(slots=True, eq=False)
class _Saving:
    """A save order whose parts end one by one."""

    number: int
    left: int
    good: int
    why: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ended(self, job: Job, first: int) -> bool:
        """A part that begins with block `first` of the order is done in one group. True with the last one."""
        at = _refused(job)
        with self.lock:
            if at is not None and first + at < self.good:
                self.good, self.why = first + at, str(job.outcomes[at])
            self.left -= 1
            return self.left == 0


class Worker:
    """One rank. The model's thread calls every verb."""

    def __init__(self) -> None:
        self.rank = 0
        self._pages: list[GroupPages] = []
        self._base: list[Layout] = []
        self._epoch = b""
        self._chains: dict[str, list[BlockKey]] = {}
        self._orders: queue.SimpleQueue[LoadOrder | None] = queue.SimpleQueue()
        self._under_way: set[str] = set()
        self._early: set[str] = set()
        self._early_done: dict[str, LoadFailed | None] = {}
        self._done = threading.Condition()
        self._finished: set[str] = set()
        self._short: set[str] = set()
        self._at_once: list[str] = []
        self._spoilt = False
        self._bad_pages: set[int] = set()
        self._failed: list[LoadFailed] = []
        self._saved: list[Saved] = []
        self._thread = threading.Thread(target=self._load_all, name="thermocline load", daemon=True)
        self._thread.start()

    def register(self, rank: int, pages: Sequence[GroupPages]) -> None:
        """The pages of every KV group, in their order. `rank` is this one's place in load orders."""
        self.rank, self._pages = rank, list(pages)
        self._base = [each.layout for each in pages]

    # -- a step --------------------------------------------------------------------------------------------------------

    def begin(self, orders: Orders) -> None:
        """A step begins: from here on what is saved is of its epoch. What it computes on may be loaded from now on."""
        if orders.epoch != self._epoch:
            self._epoch = orders.epoch
            for pages, layout in zip(self._pages, self._base, strict=True):
                pages.relabel(layout_in(orders.epoch, layout))
        at_once = {order.request: order for order in orders.loads if order.at_once}
        self._forget_early(at_once.keys())
        for order in at_once.values() if orders.early else ():
            self._load_early(order)

    def _load_early(self, order: LoadOrder) -> None:
        """Have the thread do it, behind whatever vLLM has told the device to do with these pages."""
        if order.request not in self._early:
            self._early.add(order.request)
            for pages in self._pages:
                pages.behind_engine()
            self._orders.put(order)

    def _forget_early(self, but: Collection[str]) -> None:
        """Of steps that vLLM began and gave up."""
        self._early.intersection_update(but)
        with self._done:
            for request in self._early_done.keys() - but:
                del self._early_done[request]

    def start_loads(self, orders: Orders) -> None:
        """Load what this step computes on; start what else is to be loaded: `ended_loads` tells when that is over."""
        self._spoilt = False
        for order in orders.loads:
            if order.at_once:
                self._load_at_once(order)
                continue
            with self._done:
                self._under_way.add(order.request)
            self._orders.put(order)

    def _load_at_once(self, order: LoadOrder) -> None:
        self._load_early(order)
        self._early.discard(order.request)
        with self._done:
            while order.request not in self._early_done and self._thread.is_alive():
                self._done.wait(THREAD_SECONDS)
            late = LoadFailed(order.request, self.rank, 0, 0, str(Reason.LATE), "the worker has ended")
            failed = self._early_done.pop(order.request, late)
            self._at_once.append(order.request)
            if failed is not None:
                self._failed.append(failed)
        if failed is not None:
            self._spoilt = True
            self._bad_pages.update(order.pages[0][failed.at :])

    def take_bad_pages(self) -> set[int]:
        """Pages that this step computed on, and that do not hold what they should. Each is told once."""
        bad, self._bad_pages = self._bad_pages, set()
        return bad

    def save(self, orders: Orders) -> None:
        """Copy what this step computed to where the node keeps it. Returns after the copies.

        Nothing of a step that computed on bad pages is kept: requests share pages in vLLM's own cache.
        """
        for order in orders.saves:
            try:
                if self._spoilt:
                    self._spoiled(order)
                else:
                    self._save(order)
            except Exception:  # whatever it is, the step has its result, and the blocks can be computed again
                LOG.exception("a save failed")
                self._saves_ended(Saved(order.number, 1, 0, str(Outcome.FAILED)))
        for chain in orders.over:
            self._chains.pop(chain, None)

    def ended_loads(self, orders: Orders) -> tuple[set[str], set[str]]:
        """Requests whose load is over, and those of them that did not get all of their blocks. Each is told once."""
        with self._done:
            if orders.idle and self._under_way and not self._finished:
                self._done.wait(LOAD_WAIT_SECONDS)
            finished, self._finished = self._finished, set()
            short, self._short = self._short, set()
            return finished, short

    def report(self) -> Report | None:
        """What is new since the last one."""
        with self._done:
            saved, self._saved = self._saved, []
            failed, self._failed = self._failed, []
            at_once, self._at_once = self._at_once, []
        return Report(tuple(saved), tuple(failed), tuple(at_once)) if saved or failed or at_once else None

    def close(self) -> None:
        """End the thread; what was ordered before is still loaded, within a bound. A second call does nothing."""
        self._orders.put(None)
        self._thread.join(CLOSE_SECONDS)
        for pages in self._pages:
            pages.close()

    # -- loads, in their thread ----------------------------------------------------------------------------------------

    def _load_all(self) -> None:
        while (order := self._orders.get()) is not None:
            failed = self._try_load(order)
            with self._done:
                if order.at_once:
                    self._early_done[order.request] = failed
                else:
                    self._under_way.discard(order.request)
                    self._finished.add(order.request)
                    if failed is not None:
                        self._short.add(order.request)
                        self._failed.append(failed)
                self._done.notify_all()

    def _try_load(self, order: LoadOrder) -> LoadFailed | None:
        try:
            return self._load(order)
        except Exception:  # vLLM waits for the end of this load, or computes on its pages next
            LOG.exception("a load failed")
            return LoadFailed(order.request, self.rank, 0, 0, str(Reason.LATE), "the worker failed")

    def _load(self, order: LoadOrder) -> LoadFailed | None:
        for group, ids in enumerate(order.pages):
            loaded = self._load_group(order, group)
            if loaded.blocks < len(ids):
                why = loaded.missing[0] if loaded.missing else None
                reason, detail = (str(why.reason), why.detail) if why else (str(Reason.LATE), "its lease had run out")
                return LoadFailed(order.request, self.rank, group, loaded.blocks, reason, detail)
        return None

    def _load_group(self, order: LoadOrder, group: int) -> Loaded:
        try:
            places, ids = order.places[self.rank][group], order.pages[group]
            return self._pages[group].load(places, ids) if len(places.offsets) == len(ids) else NOTHING
        except Exception:  # as for saves
            LOG.exception("a load failed")
            return NOTHING

    # -- saves ---------------------------------------------------------------------------------------------------------

    def _spoiled(self, order: SaveOrder) -> None:
        """Remember the chain, as if it were saved: what comes behind is told by its number."""
        self._told(order)
        self._saves_ended(Saved(order.number, 1, 0, str(Outcome.FAILED)))

    def _told(self, order: SaveOrder) -> list[BlockKey]:
        """The chain of an order, with the keys that come with it."""
        chain = self._chains.setdefault(order.chain, [])
        fresh = [BlockKey(order.keys[at : at + KEY_BYTES]) for at in range(0, len(order.keys), KEY_BYTES)]
        chain[order.known : order.known + len(fresh)] = fresh
        return chain

    def _save(self, order: SaveOrder) -> None:
        chain, blocks = self._told(order), len(order.pages[0])
        keys = chain[: order.start + blocks]
        if len(keys) < order.start + blocks:
            raise LookupError("an order names blocks of a chain that was not told")
        parts = self._save_parts(order, keys, blocks)
        saving = _Saving(order.number, len(parts), blocks)
        for first, job in parts:
            job.watch(visible=partial(self._part_saved, saving, first))

    def _save_parts(self, order: SaveOrder, keys: Sequence[BlockKey], blocks: int) -> list[tuple[int, Job]]:
        """Every group in turn, a few blocks at a time: what lacks in one group is of no use in the others."""
        size = blocks if len(self._pages) == 1 else PART_BLOCKS
        parts: list[tuple[int, Job]] = []
        for first in range(0, blocks, size):
            start, ends = order.start + first, order.start + min(blocks, first + size)
            for pages, ids in zip(self._pages, order.pages, strict=True):
                parts.append((first, pages.save(keys[:ends], ids[first : first + size], start)))
            if any(_refused(job) is not None for _, job in parts[-len(self._pages) :]):
                break
        return parts

    def _part_saved(self, saving: _Saving, first: int, job: Job) -> None:
        if saving.ended(job, first):
            self._saves_ended(Saved(saving.number, 1, saving.good, saving.why))

    def _saves_ended(self, saved: Saved) -> None:
        with self._done:
            self._saved.append(saved)


def _refused(job: Job) -> int | None:
    """The first block that is not kept, nor on its way."""
    return next((at for at, outcome in enumerate(job.outcomes) if outcome not in _ON_THEIR_WAY), None)
