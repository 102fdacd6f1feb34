"""Leases: what keeps a plan's blocks in their tiers until it was carried out, or its time is up."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from thermocline.store.index import Index


@dataclass(frozen=True, slots=True)
class _Lease:
    deadline: float
    pins: Sequence[tuple[int, str]]


class Leases:
    """Every lease lasts equally long, so the oldest runs out first. Not thread-safe: the store holds its lock."""

    def __init__(self, index: Index, lease_seconds: float) -> None:
        self._index = index
        self._lease_seconds = lease_seconds
        self._leases: OrderedDict[int, _Lease] = OrderedDict()
        self._last = 0

    def __len__(self) -> int:
        return len(self._leases)

    def take(self, pins: Sequence[tuple[int, str]], now: float) -> int:
        """Pin these (node, tier) pairs until `release`, or for the time a lease lasts. 0 for no pins."""
        if not pins:
            return 0
        for node, tier in pins:
            self._index.pin(node, tier)
        self._last += 1
        self._leases[self._last] = _Lease(now + self._lease_seconds, pins)
        return self._last

    def release(self, lease: int) -> None:
        """End a lease; one that ran out, or 0, is no mistake."""
        ended = self._leases.pop(lease, None)
        for node, tier in ended.pins if ended else ():
            self._index.unpin(node, tier)

    def expire(self, now: float) -> int:
        """End what ran out, as the holder of a lease may be gone. Returns how many."""
        count = 0
        while self._leases and next(iter(self._leases.values())).deadline <= now:
            self.release(next(iter(self._leases)))
            count += 1
        return count
