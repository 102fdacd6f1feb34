"""Which entry goes when room is needed. Readers only leave marks (`hits`, `touched`); these rules look at them later.

Every rule is fed and asked by the one writer that holds the cache's lock. A rule that would move an entry at each hit
moves it here when its turn to go has come: a hit since the last look keeps it.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Protocol


class Marks(Protocol):
    """What a rule knows of an entry. Readers write `hits` and `touched`, the rule in charge `seen` and `order`."""

    weight_bytes: int
    touched: float
    hits: int
    seen: int
    order: int


class Rule(Protocol):
    """Decides what goes. Holds every key that was added, until it is removed or evicted."""

    def add(self, key: Hashable, entry: Marks) -> None:
        """A key that is not held."""

    def replace(self, key: Hashable, entry: Marks) -> None:
        """Another entry for a key that is held; its marks carry those of the old one."""

    def remove(self, key: Hashable) -> None:
        """A held key is gone for another reason than room."""

    def evict(self) -> Hashable:
        """The key that goes next, forgotten here. Asked only while keys are held."""

    def __len__(self) -> int:
        """Keys held."""


class Lru:
    """Least recently used. A heap of last touches as they were known; what was touched since goes back in."""

    def __init__(self, bytes_max: int) -> None:
        del bytes_max  # recency needs no shares
        self._held: dict[Hashable, Marks] = {}
        self._heap: list[tuple[float, int, Hashable]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._held)

    def add(self, key: Hashable, entry: Marks) -> None:
        """See Rule."""
        self._held[key] = entry
        self._push(key, entry)
        if len(self._heap) > 2 * len(self._held) + 64:  # places of removed keys
            self._heap = [place for place in self._heap if self._is_current(place)]
            heapq.heapify(self._heap)

    def replace(self, key: Hashable, entry: Marks) -> None:
        """See Rule."""
        self._held[key] = entry

    def remove(self, key: Hashable) -> None:
        """See Rule."""
        del self._held[key]

    def evict(self) -> Hashable:
        """See Rule."""
        while True:
            place = heapq.heappop(self._heap)
            if not self._is_current(place):
                continue
            touched, _, key = place
            entry = self._held[key]
            if entry.touched == touched:
                del self._held[key]
                return key
            self._push(key, entry)

    def _push(self, key: Hashable, entry: Marks) -> None:
        self._serial = entry.order = self._serial + 1
        heapq.heappush(self._heap, (entry.touched, self._serial, key))

    def _is_current(self, place: tuple[float, int, Hashable]) -> bool:
        entry = self._held.get(place[2])
        return entry is not None and entry.order == place[1]


class Queue:
    """Keys in order, the oldest first, and what they weigh together."""

    __slots__ = ("_entries", "nbytes")

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, Marks] = OrderedDict()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._entries)

    def push(self, key: Hashable, entry: Marks) -> None:
        """Put at the end."""
        self._entries[key] = entry
        self.nbytes += entry.weight_bytes

    def pop(self) -> tuple[Hashable, Marks]:
        """Take the oldest."""
        key, entry = self._entries.popitem(last=False)
        self.nbytes -= entry.weight_bytes
        return key, entry

    def oldest(self) -> tuple[Hashable, Marks]:
        """Look at the oldest."""
        key = next(iter(self._entries))
        return key, self._entries[key]

    def replace(self, key: Hashable, entry: Marks) -> None:
        """Another entry in the same place."""
        self.nbytes += entry.weight_bytes - self._entries[key].weight_bytes
        self._entries[key] = entry

    def take(self, key: Hashable) -> Marks:
        """Take one from anywhere."""
        entry = self._entries.pop(key)
        self.nbytes -= entry.weight_bytes
        return entry


class _Queues:
    """What rules over queues have in common."""

    def __init__(self, *queues: Queue) -> None:
        self._queues = queues

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def replace(self, key: Hashable, entry: Marks) -> None:
        """See Rule."""
        self._queue(key).replace(key, entry)

    def remove(self, key: Hashable) -> None:
        """See Rule."""
        self._queue(key).take(key)

    def _queue(self, key: Hashable) -> Queue:
        return next(queue for queue in self._queues if key in queue)


class Sieve(_Queues):
    """SIEVE (Zhang et al., NSDI 2024): a hand goes from old to new; what was hit since it last came by may stay.

    `_ahead` is what lies between the hand and the newest, `_behind` what the hand has passed and kept.
    """

    def __init__(self, bytes_max: int) -> None:
        del bytes_max  # one queue, no shares
        self._ahead, self._behind = Queue(), Queue()
        super().__init__(self._ahead, self._behind)

    def add(self, key: Hashable, entry: Marks) -> None:
        """See Rule."""
        entry.seen = entry.hits
        self._ahead.push(key, entry)

    def evict(self) -> Hashable:
        """See Rule."""
        while True:
            if not self._ahead:  # the hand is at the newest, and goes on from the oldest
                self._ahead, self._behind = self._behind, self._ahead
            key, entry = self._ahead.pop()
            if entry.hits == entry.seen:
                return key
            entry.seen = entry.hits
            self._behind.push(key, entry)


class S3Fifo(_Queues):
    """S3-FIFO (Yang et al., SOSP 2023): a small queue that most new keys leave soon, a main one, and a ghost list."""

    SMALL_SHARE = 0.1
    HITS_MAX = 3

    def __init__(self, bytes_max: int) -> None:
        self._small, self._main = Queue(), Queue()
        super().__init__(self._small, self._main)
        self._small_bytes_max = int(self.SMALL_SHARE * bytes_max)
        self._ghosts: OrderedDict[int, None] = OrderedDict()

    def add(self, key: Hashable, entry: Marks) -> None:
        """See Rule."""
        entry.seen = entry.hits
        ghost = hash(key)
        if ghost in self._ghosts:
            del self._ghosts[ghost]
            self._main.push(key, entry)
        else:
            self._small.push(key, entry)

    def evict(self) -> Hashable:
        """See Rule."""
        while True:
            if self._small and (self._small.nbytes >= self._small_bytes_max or not self._main):
                key, entry = self._small.pop()
                if entry.hits - entry.seen <= 1:
                    self._remember(hash(key))
                    return key
                entry.seen = entry.hits
                self._main.push(key, entry)
            else:
                key, entry = self._main.pop()
                if entry.hits == entry.seen:
                    return key
                entry.seen = entry.hits - min(entry.hits - entry.seen, self.HITS_MAX) + 1
                self._main.push(key, entry)

    def _remember(self, ghost: int) -> None:
        self._ghosts[ghost] = None
        while len(self._ghosts) > len(self):
            self._ghosts.popitem(last=False)


RULES: dict[str, type[Lru | Sieve | S3Fifo]] = {"lru": Lru, "sieve": Sieve, "s3-fifo": S3Fifo}


def rule(policy: str, bytes_max: int) -> Rule:
    """The rule of this name. Raises KeyError for a name that is none."""
    return RULES[policy](bytes_max)
