"""Where requests of a trace would go: the very router that a gateway has, over instances that exist as numbers only.

An instance computes one prompt after another and has a cache of blocks that forgets the least recently used; the router
knows all caches and learns what prompts take. Decoding and batching are left out: policies are compared, no seconds are
forecast.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Sequence

import numpy as np

from thermocline.costs.advice import Routed
from thermocline.costs.study import Study
from thermocline.fleet.books import Booking, Fleet
from thermocline.fleet.instance import Ask, Instance, Overlaps
from thermocline.fleet.router import choose

REQUESTS_MAX, BLOCKS_MAX = 2_000, 150_000
"""Of a longer trace its beginning is replayed."""


class _Cache:
    def __init__(self, blocks_max: int) -> None:
        self.held: OrderedDict[int, None] = OrderedDict()
        self.blocks_max = blocks_max

    def leading(self, path: Sequence[int]) -> int:
        """Blocks of the path that are held: a prefix of it, as ancestors are never older than descendants."""
        return bisect_left(path, 1, key=lambda block: block not in self.held)

    def use(self, path: Sequence[int]) -> None:
        for block in reversed(path):
            self.held[block] = None
            self.held.move_to_end(block)
        while len(self.held) > self.blocks_max:
            self.held.popitem(last=False)


class _World:
    """One replay. Each instance's queue holds requests that wait, the first of which is being computed."""

    def __init__(self, study: Study, blocks: int, policy: str, rate: float) -> None:
        self.trace, self.policy, self.rate = study.trace, policy, rate
        longest = int(np.diff(self.trace.starts).max(initial=0))
        self.worths = study.worth_seconds(np.arange(longest + 1) * self.trace.tokens_per_block).tolist()
        self.colds = study.cold.tolist()
        self.count = min(REQUESTS_MAX, max(1, int(np.searchsorted(self.trace.starts, BLOCKS_MAX, side="right")) - 1))
        self.count = min(self.count, len(self.trace))
        self.fleet = Fleet()
        capacity = blocks * self.trace.tokens_per_block
        for slot in range(study.machine.instances):
            self.fleet.join(Instance(str(slot), capacity_tokens=capacity))
        self.caches = [_Cache(blocks) for _ in range(study.machine.instances)]
        self.queues: list[deque[tuple[int, Booking]]] = [deque() for _ in self.caches]
        self.ends: list[tuple[float, int]] = []
        self.busy = [0.0] * len(self.caches)
        self.seconds, self.hits = np.zeros(self.count), 0

    def run(self) -> Routed:
        for request in range(self.count):
            now = float(self.trace.arrival_seconds[request]) / self.rate
            while self.ends and self.ends[0][0] <= now:
                self._end()
            self._arrive(request, now)
        while self.ends:
            self._end()
        asked, mean = int(self.trace.input_tokens[: self.count].sum()), sum(self.busy) / len(self.busy)
        imbalance = max(self.busy) / mean if mean else 1.0
        return Routed(self.policy, self.seconds, self.hits / max(1, asked), imbalance)

    def _tokens(self, slot: int, request: int, path: Sequence[int]) -> int:
        held = self.caches[slot].leading(path) * self.trace.tokens_per_block
        return min(held, max(0, int(self.trace.input_tokens[request]) - 1))

    def _arrive(self, request: int, now: float) -> None:
        path = self.trace.path(request).tolist()
        held = [self._tokens(slot, request, path) for slot in range(len(self.caches))]
        last = max(held) // self.trace.tokens_per_block
        session = int(self.trace.sessions[request])
        ask = Ask(
            int(self.trace.input_tokens[request]),
            Overlaps(held, name=path[last - 1] if last else None),
            str(session) if session >= 0 else None,
        )
        booking = choose(ask, self.fleet, self.policy, now)
        assert booking is not None, "every instance may be asked"
        queue = self.queues[booking.choice.instance]
        queue.append((request, booking))
        if len(queue) == 1:
            self._begin(booking.choice.instance, now)

    def _begin(self, slot: int, now: float) -> None:
        request = self.queues[slot][0][0]
        held = self.caches[slot].leading(self.trace.path(request).tolist())
        service = max(1e-6, self.colds[request] - self.worths[held])
        self.busy[slot] += service
        heapq.heappush(self.ends, (now + service, slot))

    def _end(self) -> None:
        now, slot = heapq.heappop(self.ends)
        request, booking = self.queues[slot].popleft()
        path = self.trace.path(request).tolist()
        tokens = self._tokens(slot, request, path)
        self.hits += tokens
        self.seconds[request] = now - booking.arrived
        self.caches[slot].use(path)
        self.fleet.first_token(booking, now)
        self.fleet.finished(booking, now, tokens)
        if self.queues[slot]:
            self._begin(slot, now)


def spread(study: Study, blocks: int, policy: str, rate: float = 1.0) -> Routed:
    """What comes of a policy where each instance has `blocks`, at `rate` times the pace of the trace."""
    return _World(study, blocks, policy, rate).run()
