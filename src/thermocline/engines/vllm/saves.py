"""Which blocks are saved, and when: each key once at a time, in the order of its chain, until it is kept or refused."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from thermocline.blocks.key import BlockKey
from thermocline.clock import Clock
from thermocline.engines.vllm.orders import NULL_PAGE, Saved, SaveOrder
from thermocline.engines.vllm.tracked import Saving, Tracked
from thermocline.tiers.tier import Outcome

REFUSALS_MAX = 8
HELD_KEPT = 1 << 14
"""So many keys are remembered as kept by the node. It may have lost them since: its next answer tells, or a child that
is a MISS, and then all of the chain is offered again."""


@dataclass(slots=True)
class _Order:
    chain: str
    start: int
    keys: Sequence[BlockKey]
    epoch: bytes
    saving: Saving
    ranks: int = 0
    good: int = 1 << 30
    why: str = ""


class Saves:
    """The books of everything that is being saved. One thread."""

    def __init__(self, ranks: int, clock: Clock) -> None:
        self._ranks, self._clock = ranks, clock
        self._epoch = b""
        self._orders: dict[int, _Order] = {}
        self._last = 0
        self._flying: set[BlockKey] = set()
        self._held: OrderedDict[BlockKey, float] = OrderedDict()
        self.dropped: Counter[str] = Counter()
        self.saved = 0

    @property
    def flying(self) -> int:
        """How many keys are on their way."""
        return len(self._flying)

    def order(
        self, tracked: Tracked, stop: int, room: int, pages_of: Callable[[], Sequence[Sequence[int]] | None]
    ) -> SaveOrder | None:
        """The next order for a request whose first `stop` blocks are computed by the end of this step, if there is one.

        It has at most `room` blocks. `pages_of` gives the pages of the whole chain, per group.
        """
        saving = tracked.saving
        if stop <= saving.ordered or saving.refusals >= REFUSALS_MAX or room <= 0:
            return None
        keys = tracked.prompt.grow(tracked.request.all_token_ids, stop)
        start = saving.ordered
        while start < stop and keys[start] in self._held:
            start += 1
        saving.ordered = start
        end = start
        while end < min(stop, start + room) and keys[end] not in self._flying:
            end += 1
        pages = pages_of() if end > start else None
        if not pages:
            return None
        end = start + _all_there(pages, start, end)
        if end == start:  # it has left a sliding window, and what lies behind it is never found without it
            self._give_up(saving, "out_of_window")
            return None
        return self._make(tracked, keys, start, end, pages)

    def report(self, saved: Saved) -> None:
        """Workers have done this, or gave up."""
        order = self._orders.get(saved.number)
        if order is None:
            return
        order.ranks += saved.ranks
        if saved.good < order.good:
            order.good, order.why = saved.good, saved.why
        if order.ranks < self._ranks:
            return
        del self._orders[saved.number]
        self._flying.difference_update(order.keys)
        good = min(order.good, len(order.keys))
        self.saved += good
        if order.epoch == self._epoch:
            self.present(order.keys[:good], self._clock.now())
        if good < len(order.keys):
            self._refused(order, good)

    def present(self, keys: Sequence[BlockKey], seen: float) -> None:
        """The node had these at that time."""
        for key in keys:
            self._held[key] = seen
            self._held.move_to_end(key)
        while len(self._held) > HELD_KEPT:
            self._held.popitem(last=False)

    def absent(self, keys: Sequence[BlockKey], asked: float) -> None:
        """The node, asked at that time, did not have these, whatever is remembered from before."""
        for key in keys:
            if self._held.get(key, asked) < asked:
                del self._held[key]

    def again(self, tracked: Tracked) -> None:
        """What a request's chain begins with is not sure to be kept: offer it all again, once it is computed."""
        tracked.saving.ordered = 0
        for key in tracked.prompt.keys:
            self._held.pop(key, None)

    def forget(self, epoch: bytes) -> None:
        """Nothing that was saved until now counts any more."""
        self._epoch = epoch
        self._held.clear()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _make(
        self, tracked: Tracked, keys: Sequence[BlockKey], start: int, end: int, pages: Sequence[Sequence[int]]
    ) -> SaveOrder:
        saving = tracked.saving
        known = min(saving.told, end)
        saving.told, saving.ordered = max(saving.told, end), end
        self._last += 1
        self._orders[self._last] = _Order(tracked.id, start, keys[start:end], self._epoch, saving)
        self._flying.update(keys[start:end])
        ids = tuple(tuple(each[start:end]) for each in pages)
        return SaveOrder(self._last, tracked.id, known, b"".join(keys[known:end]), start, ids)

    def _refused(self, order: _Order, good: int) -> None:
        """What was not kept is offered again; where a block before it is missing, all of the chain."""
        saving = order.saving
        self.dropped[order.why] += len(order.keys) - good
        saving.refusals = 0 if good else saving.refusals + 1  # as long as some are taken, others may be in a moment
        first = order.start + good
        if order.why == Outcome.MISS:
            self._held.clear()  # whatever else was taken for granted may be gone as well
            first = 0
        saving.ordered = min(saving.ordered, first)

    def _give_up(self, saving: Saving, why: str) -> None:
        self.dropped[why] += 1
        saving.refusals = REFUSALS_MAX


def _all_there(pages: Sequence[Sequence[int]], start: int, end: int) -> int:
    """How many blocks from `start` on have a page in every group."""
    count = end - start
    for each in pages:
        ids = each[start:end]
        count = min(count, next((at for at, page in enumerate(ids) if page == NULL_PAGE), len(ids)))
    return count
