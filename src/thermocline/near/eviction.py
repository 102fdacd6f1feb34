"""Which entry goes when room is needed. Readers only leave marks (`hits`, `touched`); these rules look at them later.

Every rule is fed and asked by the one writer that holds the cache's lock. A rule that would move an entry at each hit
moves it here when its turn to go has come: a hit since the last look keeps it.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Hashable
from typing import Protocol


class Marks(Protocol):
    """What a rule knows of an entry. Readers write `hits` and `touched`, the rule `seen`, `order` and `told`."""

    weight_bytes: int
    touched: float
    hits: int
    seen: int
    order: int
    told: int


class Rule(Protocol):
    """Decides what goes. Holds every key that was added, until it is removed or evicted."""

    def add(self, key: Hashable, entry: Marks) -> None:
        """A key that is not held."""

    def replace(self, key: Hashable, entry: Marks) -> None:
        """Another entry for a key that is held; its marks carry those of the old one."""

    def remove(self, key: Hashable) -> None:
        """A held key is gone for another reason than room."""

    def evict(self) -> tuple[Hashable, Marks]:
        """The key that goes next, forgotten here. Asked only while keys are held."""

    def __contains__(self, key: Hashable) -> bool:
        """Whether the key is held."""

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

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

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

    def evict(self) -> tuple[Hashable, Marks]:
        """See Rule."""
        while True:
            place = heapq.heappop(self._heap)
            if not self._is_current(place):
                continue
            touched, _, key = place
            entry = self._held[key]
            if entry.touched == touched:
                del self._held[key]
                return key, entry
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

    def push(self, key: Hashable, entry: Marks) -> None:
        """Put at the end."""
        self._entries[key] = entry
        self.nbytes += entry.weight_bytes

    def push_front(self, key: Hashable, entry: Marks) -> None:
        """Put where the oldest is."""
        self.push(key, entry)
        self._entries.move_to_end(key, last=False)

    def pop(self) -> tuple[Hashable, Marks]:
        """Take the oldest."""
        key, entry = self._entries.popitem(last=False)
        self.nbytes -= entry.weight_bytes
        return key, entry

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

    def __contains__(self, key: Hashable) -> bool:
        return any(key in queue for queue in self._queues)

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

    def evict(self) -> tuple[Hashable, Marks]:
        """See Rule."""
        while True:
            if not self._ahead:  # the hand is at the newest, and goes on from the oldest
                self._ahead, self._behind = self._behind, self._ahead
            key, entry = self._ahead.pop()
            if entry.hits == entry.seen:
                return key, entry
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

    def evict(self) -> tuple[Hashable, Marks]:
        """See Rule."""
        while True:
            if self._small and (self._small.nbytes >= self._small_bytes_max or not self._main):
                key, entry = self._small.pop()
                if entry.hits - entry.seen <= 1:
                    self._remember(hash(key))
                    return key, entry
                entry.seen = entry.hits
                self._main.push(key, entry)
            else:
                key, entry = self._main.pop()
                if entry.hits == entry.seen:
                    return key, entry
                entry.seen = entry.hits - min(entry.hits - entry.seen, self.HITS_MAX) + 1
                self._main.push(key, entry)

    def _remember(self, ghost: int) -> None:
        self._ghosts[ghost] = None
        while len(self._ghosts) > len(self):
            self._ghosts.popitem(last=False)


class Sketch:
    """About how often each key was used lately: two rows of counters to 15, halved now and then (count-min, aged)."""

    HALVED_EVERY = 10
    """Times the number of keys held."""

    def __init__(self) -> None:
        self._rows = bytearray(2048), bytearray(2048)
        self._counted = 0

    def estimate(self, key: Hashable) -> int:
        """Uses counted, or a little more where keys share counters."""
        first, second = self._places(key)
        return min(self._rows[0][first], self._rows[1][second])

    def count(self, key: Hashable, times: int, held: int) -> None:
        """`key` was used so often, while so many keys are held."""
        while 16 * held > len(self._rows[0]):
            self._rows = self._rows[0] * 2, self._rows[1] * 2  # a key's place in the doubled row holds what it held
        for row, place in zip(self._rows, self._places(key), strict=True):
            row[place] = min(15, row[place] + times)
        self._counted += times
        if self._counted > self.HALVED_EVERY * max(held, 64):
            self._counted //= 2
            self._rows = self._rows[0].translate(_HALVES), self._rows[1].translate(_HALVES)

    def _places(self, key: Hashable) -> tuple[int, int]:
        mixed = mix(key)
        mask = len(self._rows[0]) - 1
        return mixed & mask, (mixed >> 32) & mask


_HALVES = bytes(value // 2 for value in range(256))


def mix(key: Hashable) -> int:
    """64 bits of a key's hash, every bit depending on all others (Fibonacci hashing, folded)."""
    mixed = (hash(key) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    return ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF) ^ (mixed >> 32)


class WTinyLfu(_Queues):
    """W-TinyLFU (Einziger, Friedman, Manes, TOS 2017): a window, and a main part that only what is used more may enter.

    Hits are counted in the sketch when their entry is next looked at.
    """

    WINDOW_SHARE = 0.01
    PROTECTED_SHARE = 0.8

    def __init__(self, bytes_max: int) -> None:
        self._window, self._probation, self._protected = Queue(), Queue(), Queue()
        super().__init__(self._window, self._probation, self._protected)
        self._window_bytes_max = int(self.WINDOW_SHARE * bytes_max)
        self._protected_bytes_max = int(self.PROTECTED_SHARE * (bytes_max - self._window_bytes_max))
        self.sketch = Sketch()
        self._has_room = True  # while nothing has to go, keys leave the window without a contest

    def add(self, key: Hashable, entry: Marks) -> None:
        """See Rule."""
        entry.seen = entry.hits
        self.sketch.count(key, 1, len(self))
        self._window.push(key, entry)
        while self._has_room and self._window.nbytes > self._window_bytes_max:
            self._probation.push(*self._window.pop())
        self._has_room = True

    def evict(self) -> tuple[Hashable, Marks]:
        """See Rule."""
        self._has_room = False
        while self._window.nbytes > self._window_bytes_max or not (self._probation or self._protected):
            key, entry = self._window.pop()
            if self._was_hit(key, entry):
                self._window.push(key, entry)
            elif self._probation or self._protected:
                return self._contest(key, entry)
            else:
                return key, entry
        return self._weakest()

    def _contest(self, key: Hashable, entry: Marks) -> tuple[Hashable, Marks]:
        victim, weak = self._weakest()
        if self.sketch.estimate(key) > self.sketch.estimate(victim):
            self._probation.push(key, entry)
            return victim, weak
        self._probation.push_front(victim, weak)
        return key, entry

    def _weakest(self) -> tuple[Hashable, Marks]:
        """The next to go of the main part. What was hit on probation is protected instead, as far as there is room."""
        while True:
            key, entry = (self._probation or self._protected).pop()
            if not self._was_hit(key, entry):
                return key, entry
            self._protected.push(key, entry)
            while self._protected.nbytes > self._protected_bytes_max:
                old, old_entry = self._protected.pop()
                (self._protected if self._was_hit(old, old_entry) else self._probation).push(old, old_entry)

    def _was_hit(self, key: Hashable, entry: Marks) -> bool:
        hits = entry.hits - entry.seen
        if hits:
            self.sketch.count(key, hits, len(self))
            entry.seen = entry.hits
        return hits > 0


FIXED: dict[str, type[Lru | S3Fifo | Sieve | WTinyLfu]] = {
    "lru": Lru,
    "s3-fifo": S3Fifo,
    "sieve": Sieve,
    "w-tinylfu": WTinyLfu,
}
