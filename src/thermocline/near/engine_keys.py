"""The keys of an embedded server: values of several kinds in one Cache, each with the moment at which it ends.

Time stands still within a command, as in Redis: whoever runs one says first what time it is. One thread uses it.
"""

from __future__ import annotations

import heapq
import math
import re
from bisect import bisect_left
from functools import lru_cache
from typing import TypeVar, cast

from thermocline.clock import ManualClock
from thermocline.errors import CommandError
from thermocline.near.cache import Cache
from thermocline.near.engine_values import Container, Value, weight_of

V = TypeVar("V", bound=Value)
C = TypeVar("C", bound=Container)

WRONG_TYPE = "WRONGTYPE Operation against a key holding the wrong kind of value"
FULL = "OOM command not allowed when used memory > 'maxmemory'."
ENTRY_SHARE = 4
"""An entry takes at most this fraction of the memory. One larger would push out everything else."""
CHARGES_BYTES = 4096
"""More than a cache charges for an entry beside its weight."""
ENDS_SPARE = 1024
PATTERN_BYTES_MAX = 1024


class Keyspace:
    """Finds, keeps and drops. `changed` collects the keys whose values are others now, until somebody takes them."""

    def __init__(self, bytes_max: int) -> None:
        self.clock = ManualClock()
        self.value_bytes_max = bytes_max // ENTRY_SHARE
        self.cache = Cache(bytes_max, clock=self.clock, entry_bytes_max=self.value_bytes_max + CHARGES_BYTES)
        self.protocol = 2
        """RESP2 or RESP3: what the command that runs is answered in."""
        self.changed: list[bytes] = []
        self.cleared = False
        """Whether `clear` was called, so that every key may have changed; whoever takes `changed` sets it back."""
        self._ends: list[tuple[float, bytes]] = []
        self._ordered: list[tuple[int, bytes]] = []

    def __len__(self) -> int:
        return len(self.cache)

    def begin(self, now: float) -> None:
        """It is `now`, in seconds since 1970, until this is called again. What has ended is gone."""
        self.clock.seconds = now
        while self._ends and self._ends[0][0] <= now:
            _, key = heapq.heappop(self._ends)
            if self.deadline(key) <= now:
                self.drop(key)

    # -- reading -------------------------------------------------------------------------------------------------------

    def find(self, key: bytes, kind: type[V]) -> V | None:
        """The value, if there is one; raises CommandError for one of another kind."""
        value = self.cache.get(key)
        if value is None:
            return None
        if type(value) is not kind:
            raise CommandError(WRONG_TYPE)
        return value

    def any(self, key: bytes) -> Value | None:
        """The value, of whatever kind."""
        return self.cache.get(key)  # type: ignore[no-any-return]  # only values are put there

    def deadline(self, key: bytes) -> float:
        """When the key ends, in seconds since 1970; infinity for never, and for a key that is not there."""
        entry = self.cache.entries.get(key)
        return math.inf if entry is None else entry.deadline

    def names(self, pattern: bytes) -> list[bytes]:
        """The keys that look like this."""
        held = cast("list[bytes]", list(self.cache.entries))  # only bytes are put there
        return held if pattern == b"*" else list(filter(glob(pattern).fullmatch, held))

    def scan(self, cursor: int, count: int) -> tuple[int, list[bytes]]:
        """About `count` keys from a cursor on, and the next cursor, 0 at the end.

        Keys come in the order of their hashes, so that one that is there all the time is seen, whatever comes and goes.
        """
        if cursor == 0 or not self._ordered:
            self._ordered = sorted((hash(key) & (1 << 62) - 1, key) for key in self.cache.entries)  # type: ignore[misc]  # as in `names`
        start = bisect_left(self._ordered, (cursor, b""))
        next_at = start + count
        found = [key for _, key in self._ordered[start:next_at] if key in self.cache.entries]
        if next_at < len(self._ordered):
            return self._ordered[next_at][0], found
        self._ordered = []
        return 0, found

    # -- writing -------------------------------------------------------------------------------------------------------

    def keep(self, key: bytes, value: Value, deadline: float = math.inf) -> None:
        """Put a value in place of whatever is there. Raises CommandError where it is too large."""
        nbytes = len(value) if isinstance(value, bytes) else value.nbytes
        if nbytes + len(key) > self.value_bytes_max or not self.cache.put(key, value, weight_bytes=nbytes):
            raise CommandError(FULL, hint="one value may take a quarter of --memory-bytes")
        if deadline != math.inf:
            self._end_at(key, deadline)
        self.changed.append(key)

    def update(self, key: bytes, value: Value) -> None:
        """A value has changed: keep it until the moment that was set for the key. An empty container is gone."""
        if value or isinstance(value, bytes):
            self.keep(key, value, self.deadline(key))
        else:
            self.drop(key)

    def grow(self, key: bytes, kind: type[C], more: list[bytes]) -> C:
        """The container, or an empty one, with room for more. Raises CommandError where it would be too large."""
        value = self.find(key, kind) or kind()
        if value.nbytes + 2 * sum(map(weight_of, more)) + len(key) > self.value_bytes_max:
            raise CommandError(FULL, hint="one value may take a quarter of --memory-bytes")
        return value

    def expire(self, key: bytes, deadline: float) -> None:
        """Set when a key that is there ends; infinity for never. One whose time has passed is gone."""
        if deadline <= self.clock.seconds:
            self.drop(key)
        else:
            self._end_at(key, deadline)
            self.changed.append(key)

    def drop(self, key: bytes) -> bool:
        """Forget a key; True where it was there."""
        if not self.cache.drop((key,)):
            return False
        self.changed.append(key)
        return True

    def clear(self) -> None:
        """Forget everything."""
        self.cache.clear()
        self._ends.clear()
        self._ordered = []
        self.cleared = True

    def _end_at(self, key: bytes, deadline: float) -> None:
        self.cache.entries[key].deadline = deadline  # we are its only writer, and the moment stays exact
        if deadline == math.inf:
            return
        heapq.heappush(self._ends, (deadline, key))
        if len(self._ends) > 2 * len(self.cache) + ENDS_SPARE:  # mostly ends that were moved
            self._ends = [(self.deadline(key), key) for key in {key for _, key in self._ends}]
            self._ends = [end for end in self._ends if end[0] != math.inf]
            heapq.heapify(self._ends)


@lru_cache(maxsize=256)
def glob(pattern: bytes) -> re.Pattern[bytes]:
    """Redis' patterns: * ? [abc] [^a-z] and a backslash. Each star stops at its first fit, so that none takes long."""
    if len(pattern) > PATTERN_BYTES_MAX:
        raise CommandError(f"ERR a pattern has at most {PATTERN_BYTES_MAX} bytes")
    parts = [b""]
    for token in re.findall(rb"\\.|\[\^?(?:\\.|[^\]\\])*\]?|\*+|.", pattern, re.DOTALL):
        if token[:1] == b"*":
            parts.append(b"")
        else:
            parts[-1] += _one(token)
    first, *middle = parts
    try:
        if not middle:
            return re.compile(first, re.DOTALL)
        *middle, last = middle
        return re.compile(first + b"".join(b"(?>.*?%b)" % part for part in middle) + b".*" + last, re.DOTALL)
    except re.error:
        raise CommandError("ERR this pattern cannot be read") from None


def _one(token: bytes) -> bytes:
    """What stands for one byte. In brackets, all but a leading ^ and ranges stands for itself."""
    if token == b"?":
        return b"."
    if token[:1] != b"[":
        return re.escape(token[-1:])
    inside = re.sub(rb"\\(.)", rb"\1", token[1:].removesuffix(b"]"), flags=re.DOTALL)
    not_these = inside[:1] == b"^"
    these = re.sub(rb"(\w)\\-(\w)", rb"\1-\2", re.escape(inside.removeprefix(b"^")))
    return (b"[^%b]" if not_these else b"[%b]") % these if these else b"." if not_these else b"(?!)"
