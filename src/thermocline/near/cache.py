"""The near cache: values in this process, each with its age, together within a bound of bytes.

A read takes no lock: one dict read, one look at the clock, and two marks in the entry, which is all that eviction ever
learns of it. Writers replace whole entries under one lock, and do all the work of making room.
"""

from __future__ import annotations

import heapq
import math
import random
import sys
import threading
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from thermocline.clock import Clock, SystemClock
from thermocline.errors import NearError, SettingsError
from thermocline.near.adaptive import Adaptive
from thermocline.near.eviction import FIXED, Rule

ENTRY_BYTES = 600
"""Charged per entry beside its value: entry, floats, dict slots, its place in the rule's queues."""
GENERATIONS = 1 << 14
"""Counters that keys share by hash: two keys on one counter cost a store now and then, never a stale value."""
ENTRY_SHARE_MAX = 4
"""Without `entry_bytes_max`, an entry weighs at most this fraction of the bound."""
RULES: dict[str, Callable[[int], Rule]] = {"adaptive": Adaptive, **FIXED}
WAIT_SECONDS = 30.0
REFRESHES_MAX = 8
"""Background loads at a time; beyond them the old value is served and the next reader tries again."""


class Entry:
    """One key's value. Writers replace it whole, or move its end nearer; readers write `touched` and `hits`.

    A mark that is lost between threads does no harm.
    """

    __slots__ = (
        "deadline",
        "gone_at",
        "hits",
        "load_seconds",
        "order",
        "seen",
        "told",
        "touched",
        "value",
        "weight_bytes",
    )

    def __init__(self, value: Any, deadline: float, gone_at: float, weight_bytes: int, touched: float) -> None:  # noqa: ANN401  # a cache keeps anything
        self.value = value
        self.deadline = deadline
        self.gone_at = gone_at
        self.weight_bytes = weight_bytes
        self.touched = touched
        self.hits = 0
        self.seen = self.order = self.told = 0
        self.load_seconds = 0.0


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts since the start. Threads that read at the same instant may lose a hit or a miss between them."""

    hits: int
    misses: int
    stored: int
    dropped: int
    evicted: int
    expired: int
    refused: int
    refreshes_failed: int
    entries: int
    nbytes: int


class _Flight:
    """One load that several threads wait for."""

    __slots__ = ("done", "error", "generation", "leader", "value")

    def __init__(self, generation: int) -> None:
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.generation = generation
        self.leader = threading.get_ident()
        self.value: Any = None


@dataclass(frozen=True, slots=True)
class _Keep:
    """For how long what is loaded is kept."""

    ttl_seconds: float | None
    negative_seconds: float | None
    stale_seconds: float


def _landed(flight: _Flight, wait_seconds: float) -> Any:  # noqa: ANN401  # a cache keeps anything
    if not flight.done.wait(wait_seconds):
        raise NearError(
            f"another thread's load takes longer than {wait_seconds:g} s",
            hint="give the loader a deadline of its own, or a larger wait_seconds",
        )
    if isinstance(flight.error, Exception):
        raise flight.error
    if flight.error is not None:
        raise NearError("another thread's load was interrupted", hint="ask again") from flight.error
    return flight.value


class Cache:
    """A TTL per key, a bound in bytes, adaptive eviction, reads without a lock. For any number of threads.

    `entries` may be read directly: an entry is good while its `deadline` lies after `now()`; who serves it marks it,
    `entry.touched = now; entry.hits += 1`. The dict itself stays the same object for as long as the cache lives.

    Values are returned as they are, never copied: keep what nobody changes. Raises SettingsError for bounds that
    make no sense and for a policy that does not exist.
    """

    def __init__(
        self,
        bytes_max: int,
        *,
        max_age_seconds: float = math.inf,
        policy: str = "adaptive",
        clock: Clock | None = None,
        entry_bytes_max: int | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        if bytes_max <= 0 or max_age_seconds <= 0:
            raise SettingsError("a near cache needs room and time", hint="give bytes_max and max_age_seconds above 0")
        if policy not in RULES:
            raise SettingsError(f"no eviction policy {policy!r}", hint=f"there are {', '.join(RULES)}")
        self.entries: dict[Hashable, Entry] = {}
        self.now = (clock or SystemClock()).now
        self.bytes_max = bytes_max
        self.entry_bytes_max = bytes_max // ENTRY_SHARE_MAX if entry_bytes_max is None else entry_bytes_max
        self._max_age_seconds = max_age_seconds
        self._policy = policy
        self._rule: Rule = RULES[policy](bytes_max)
        self._chance = chance
        self._lock = threading.Lock()
        self._nbytes = 0
        self._epoch = 0
        self._generations = [0] * GENERATIONS
        self._ends: list[tuple[float, int, Hashable]] = []
        self._end_serial = 0
        self._flights: dict[Hashable, _Flight] = {}
        self._refreshing = 0
        self._hits_gone = self._misses = self._stored = self._dropped = 0
        self._evicted = self._expired = self._refused = self._refreshes_failed = 0

    # -- reading -------------------------------------------------------------------------------------------------------

    def get(self, key: Hashable, default: Any = None) -> Any:  # noqa: ANN401  # a cache keeps anything
        """The value, where it is held and not too old, else `default`. A negative entry's value is None."""
        try:
            entry = self.entries[key]
        except KeyError:
            self._misses += 1
            return default
        now = self.now()
        if entry.deadline <= now:
            self._misses += 1
            return default
        entry.touched = now
        entry.hits += 1
        return entry.value

    def generation(self, key: Hashable) -> int:
        """A number that moves whenever `key` is dropped. Ask before fetching, and hand it to `put`."""
        return self._epoch + self._generations[hash(key) % GENERATIONS]

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def nbytes(self) -> int:
        """What all entries weigh. At most `bytes_max`, always."""
        return self._nbytes

    def stats(self) -> CacheStats:
        """Counts so far. Walks over all entries, whose hits are counted in them."""
        hits = self._hits_gone + sum(entry.hits for entry in list(self.entries.values()))
        return CacheStats(
            hits=hits,
            misses=self._misses,
            stored=self._stored,
            dropped=self._dropped,
            evicted=self._evicted,
            expired=self._expired,
            refused=self._refused,
            refreshes_failed=self._refreshes_failed,
            entries=len(self.entries),
            nbytes=self._nbytes,
        )

    # -- writing -------------------------------------------------------------------------------------------------------

    def put(
        self,
        key: Hashable,
        value: Any,  # noqa: ANN401  # a cache keeps anything
        *,
        ttl_seconds: float | None = None,
        weight_bytes: int | None = None,
        generation: int | None = None,
        stale_seconds: float = 0.0,
        load_seconds: float = 0.0,
    ) -> bool:
        """Keep a value, for `ttl_seconds` or the cache's own maximum age. Returns whether it is held now.

        `generation` is what `generation(key)` said before the value was fetched: where the key has been dropped since,
        nothing is stored. Without it, this is a write, and overtakes what is being fetched. What is refused for its
        age or size takes the older value of the key with it. Sizes of bytes, str and memoryview are known; anything
        else weighs `weight_bytes`.
        """
        weight = ENTRY_BYTES + (weigh(value) if weight_bytes is None else weight_bytes) + weigh(key)
        with self._lock:
            if generation is not None and generation != self.generation(key):
                self._refused += 1
                return False
            if generation is None:
                self._generations[hash(key) % GENERATIONS] += 1
            now = self.now()
            age = self._max_age_seconds if ttl_seconds is None else min(ttl_seconds, self._max_age_seconds)
            if age <= 0 or weight > min(self.entry_bytes_max, self.bytes_max):
                self._refused += 1
                self._remove(key)
                return False
            gone_at = now + min(age + stale_seconds, self._max_age_seconds)
            entry = Entry(value, now + age, gone_at, weight, now)
            entry.load_seconds = load_seconds
            self._make_room(key, weight, now)
            self._store(key, entry)
            return True

    def drop(self, keys: Iterable[Hashable]) -> int:
        """Forget these keys, and refuse what was being fetched for them. Returns how many were held."""
        count = 0
        with self._lock:
            for key in keys:
                self._generations[hash(key) % GENERATIONS] += 1
                count += self._remove(key)
            self._dropped += count
        return count

    def make_old(self, key: Hashable, grace_seconds: float) -> None:
        """As `drop`, but what is held stays, past its deadline, for `grace_seconds` since the first time at most."""
        with self._lock:
            self._generations[hash(key) % GENERATIONS] += 1
            entry, now = self.entries.get(key), self.now()
            if entry is None:
                return
            entry.deadline = min(entry.deadline, now)
            if now + grace_seconds < entry.gone_at:
                entry.gone_at = now + grace_seconds
                self._note_end(key, entry)
            self._dropped += 1

    def clear(self) -> None:
        """Forget everything, and refuse what was being fetched."""
        with self._lock:
            self._epoch += 1
            self._dropped += len(self.entries)
            self._hits_gone += sum(entry.hits for entry in self.entries.values())
            self.entries.clear()
            self._ends.clear()
            self._nbytes = 0
            self._rule = RULES[self._policy](self.bytes_max)

    # -- loading -------------------------------------------------------------------------------------------------------

    def get_or_load(
        self,
        key: Hashable,
        load: Callable[[], Any],
        *,
        ttl_seconds: float | None = None,
        negative_seconds: float | None = None,
        stale_seconds: float = 0.0,
        early: float = 0.0,
        wait_seconds: float = WAIT_SECONDS,
    ) -> Any:  # noqa: ANN401  # a cache keeps anything
        """The value held, else what `load()` returns, called once for all threads that miss at the same time.

        None from `load` is kept for `negative_seconds`, or not at all. For `stale_seconds` after its age a value is
        still returned while one load in the background replaces it. With `early` (1.0 is the paper's), a value is
        replaced in the background before its age, with a chance that grows with its load time and as its end nears:
        XFetch (Vattani, Chierichetti, Lowenstein, VLDB 2015), so that the readers of one key do not all miss at once.

        Raises what `load` raised, in every thread that waited for it; and NearError where another thread's load takes
        longer than `wait_seconds`.
        """
        keep = _Keep(ttl_seconds, negative_seconds, stale_seconds)
        entry = self.entries.get(key)
        now = self.now()
        if entry is not None and now < min(entry.gone_at, entry.deadline + stale_seconds):
            entry.touched = now
            entry.hits += 1
            if entry.deadline <= now or (early and self._is_early(entry, early, now)):
                self._refresh(key, load, keep)
            return entry.value
        self._misses += 1
        with self._lock:
            entry = self.entries.get(key)
            if entry is not None and entry.deadline > now:  # stored by another thread since this one looked
                return entry.value
            flight, leads = self._join(key)
        if leads:
            return self._lead(flight, key, load, keep)
        return load() if flight.leader == threading.get_ident() else _landed(flight, wait_seconds)

    def _join(self, key: Hashable) -> tuple[_Flight, bool]:
        """The flight of this key, and whether the caller leads it. What took off before a drop is not joined."""
        generation = self.generation(key)
        flight = self._flights.get(key)
        if flight is not None and flight.generation == generation:
            return flight, False
        flight = self._flights[key] = _Flight(generation)
        return flight, True

    def _lead(self, flight: _Flight, key: Hashable, load: Callable[[], Any], keep: _Keep) -> Any:  # noqa: ANN401  # a cache keeps anything
        flight.leader = threading.get_ident()
        try:
            started = self.now()
            value = flight.value = load()
            ttl = keep.negative_seconds if value is None else keep.ttl_seconds
            if value is not None or keep.negative_seconds is not None:
                stale = 0.0 if value is None else keep.stale_seconds
                took = self.now() - started
                seen = flight.generation
                self.put(key, value, ttl_seconds=ttl, generation=seen, stale_seconds=stale, load_seconds=took)
        except BaseException as error:  # a leader that is interrupted, too, must not leave others waiting
            flight.error = error
            raise
        finally:
            self._land(flight, key)
        return value

    def _land(self, flight: _Flight, key: Hashable) -> None:
        with self._lock:
            if self._flights.get(key) is flight:
                del self._flights[key]
        flight.done.set()

    def _is_early(self, entry: Entry, early: float, now: float) -> bool:
        return now - entry.load_seconds * early * math.log(1.0 - self._chance()) >= entry.deadline

    def _refresh(self, key: Hashable, load: Callable[[], Any], keep: _Keep) -> None:
        """Load in the background, unless that is under way, or enough else is."""
        with self._lock:
            if self._refreshing >= REFRESHES_MAX:
                return
            flight, leads = self._join(key)
            if not leads:
                return
            self._refreshing += 1

        def refresh() -> None:
            failed = 1
            try:
                self._lead(flight, key, load, keep)
                failed = 0
            except Exception:  # noqa: BLE001, S110  # counted; the value held serves to its end, then the error is seen
                pass
            finally:
                self._refreshed(failed)

        try:
            threading.Thread(target=refresh, name="thermocline-near-refresh", daemon=True).start()
        except RuntimeError as error:  # no more threads to be had
            flight.error = error
            self._land(flight, key)
            self._refreshed(1)

    def _refreshed(self, failed: int) -> None:
        with self._lock:
            self._refreshing -= 1
            self._refreshes_failed += failed

    # -- under the lock ------------------------------------------------------------------------------------------------

    def _store(self, key: Hashable, entry: Entry) -> None:
        old = self.entries.get(key)
        if old is None:
            self._rule.add(key, entry)
        else:
            entry.hits, entry.told, entry.order = old.hits, old.told, old.order
            entry.seen = old.seen - 1  # a write is a use
            self._rule.replace(key, entry)
            self._nbytes -= old.weight_bytes
        self._nbytes += entry.weight_bytes
        self.entries[key] = entry
        self._stored += 1
        if entry.gone_at < math.inf:
            self._note_end(key, entry)

    def _note_end(self, key: Hashable, entry: Entry) -> None:
        self._end_serial += 1
        heapq.heappush(self._ends, (entry.gone_at, self._end_serial, key))
        if len(self._ends) > 2 * len(self.entries) + 64:  # ends of entries that went before their time
            self._ends = [end for end in self._ends if self._is_end(end)]
            heapq.heapify(self._ends)

    def _is_end(self, end: tuple[float, int, Hashable]) -> bool:
        held = self.entries.get(end[2])
        return held is not None and held.gone_at == end[0]

    def _remove(self, key: Hashable) -> int:
        entry = self.entries.pop(key, None)
        if entry is None:
            return 0
        self._rule.remove(key)
        self._forget(entry)
        return 1

    def _forget(self, entry: Entry) -> None:
        self._nbytes -= entry.weight_bytes
        self._hits_gone += entry.hits

    def _make_room(self, key: Hashable, weight: int, now: float) -> None:
        while self._ends and self._ends[0][0] <= now:
            end = heapq.heappop(self._ends)
            if self._is_end(end):
                self._expired += self._remove(end[2])
        while True:
            held = self.entries.get(key)
            if self._nbytes - (0 if held is None else held.weight_bytes) + weight <= self.bytes_max:
                return
            self._forget(self.entries.pop(self._rule.evict()[0]))
            self._evicted += 1


def weigh(value: object) -> int:
    """The bytes that bytes, str and memoryview take; 0 for what has no size that is known."""
    if isinstance(value, bytes | str):
        return sys.getsizeof(value)
    return value.nbytes if isinstance(value, memoryview) else 0
