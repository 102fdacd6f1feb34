"""Hit ratios of the near cache's adaptive eviction beside the four rules it chooses from, FIFO, and Belady's bound.

The rules are written here a second time, as their papers have them: every hit moves what it moves, nothing is sampled,
nothing is deferred. The cache itself is replayed whole, `get` and `put` after a miss. Every entry weighs the same.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import accumulate
from random import Random
from typing import Any

import numpy as np

from bench.harness import ROOT, Progress, Report, check, kept
from thermocline.clock import ManualClock
from thermocline.costs.trace import read
from thermocline.near import Cache
from thermocline.near.cache import ENTRY_BYTES

TRACES = ROOT.parent / "shared" / "traces"
REQUESTS = 300_000
CAPACITIES = (500, 2_500, 10_000)
SHARES = (0.01, 0.05, 0.2)
"""Of the distinct blocks of a public trace."""
SHORT_POINTS = 2.0
Trace = list[int]


# -- traces ------------------------------------------------------------------------------------------------------------


def zipf(seed: int = 1, keys: int = 50_000, exponent: float = 0.9) -> Trace:
    """Independent requests, the n-th key with a weight of n to the minus 0.9."""
    weights = np.arange(1, keys + 1, dtype=float) ** -exponent
    found: Trace = np.random.default_rng(seed).choice(keys, REQUESTS, p=weights / weights.sum()).tolist()
    return found


def scans(seed: int = 2) -> Trace:
    """As `zipf`, with every third request, drawn by chance, for a key that never comes again."""
    once = np.random.default_rng(seed + 1000).random(REQUESTS) < 1 / 3
    return [1_000_000 + at if alone else key for at, (key, alone) in enumerate(zip(zipf(seed), once, strict=True))]


def chat(seed: int = 3, turns: float = 4.0, active: float = 1_000.0) -> Trace:
    """Sessions with a geometric number of turns and exponential think times; one request in six is for a system prompt.

    `active` is how many sessions are between their first and last turn at a time.
    """
    random = Random(seed)  # noqa: S311  # a trace, no secret
    trace: Trace = []
    pending: list[tuple[float, int]] = []
    arrivals = accumulate(random.expovariate(active / (turns - 1)) for _ in range(REQUESTS))
    for number, start in enumerate(arrivals):
        heapq.heappush(pending, (start, number))
        while pending and pending[0][0] <= start and len(trace) < REQUESTS:
            at, session = heapq.heappop(pending)
            trace.append(1_000 + session)
            if random.random() < 0.2:
                trace.append(int(50 * random.random() ** 2))
            if random.random() > 1 / turns:
                heapq.heappush(pending, (at + random.expovariate(1.0), session))
        if len(trace) >= REQUESTS:
            break
    return trace


def public(file: str) -> Trace:
    """Blocks of the prompts, each prompt's last block first: then ancestors are never older than descendants."""
    trace = read(TRACES / file)
    return [block for request in range(len(trace)) for block in reversed(trace.path(request).tolist())]


# -- rules, as their papers have them ----------------------------------------------------------------------------------


def belady(trace: Trace, capacity: int) -> int:
    """Hits of a cache that knows the future (Belady, 1966): what is used again last goes, or does not come in."""
    never = len(trace)
    following, upcoming = [never] * never, {}
    for at in range(never - 1, -1, -1):
        following[at] = upcoming.get(trace[at], never)
        upcoming[trace[at]] = at
    held: dict[int, int] = {}
    heap: list[tuple[int, int]] = []
    hits = 0
    for at, key in enumerate(trace):
        hits += key in held
        if following[at] == never:
            held.pop(key, None)
            continue
        held[key] = following[at]
        heapq.heappush(heap, (-following[at], key))
        while len(held) > capacity:
            next_use, old = heapq.heappop(heap)
            if held.get(old) == -next_use:
                del held[old]
    return hits


def lru(trace: Trace, capacity: int) -> int:
    """Hits of least recently used."""
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for key in trace:
        if key in held:
            hits += 1
            held.move_to_end(key)
        else:
            held[key] = None
            if len(held) > capacity:
                held.popitem(last=False)
    return hits


def fifo(trace: Trace, capacity: int) -> int:
    """Hits of first in, first out."""
    held: set[int] = set()
    order: deque[int] = deque()
    hits = 0
    for key in trace:
        if key in held:
            hits += 1
            continue
        held.add(key)
        order.append(key)
        if len(order) > capacity:
            held.discard(order.popleft())
    return hits


def sieve(trace: Trace, capacity: int) -> int:
    """Hits of SIEVE: a linked list from old to new, in which nothing moves but the hand."""
    visited: dict[int, bool] = {}
    newer: dict[int, int] = {}
    older: dict[int, int] = {}
    end = -1  # stands before the oldest and behind the newest
    newer[end] = older[end] = hand = end
    hits = 0
    for key in trace:
        if key in visited:
            hits += 1
            visited[key] = True
            continue
        if len(visited) >= capacity:
            hand = newer[end] if hand == end else hand
            while visited[hand]:
                visited[hand] = False
                hand = newer[hand] if newer[hand] != end else newer[end]
            before, after = older.pop(hand), newer.pop(hand)
            newer[before], older[after] = after, before
            del visited[hand]
            hand = after
        visited[key] = False
        newer[older[end]], older[key] = key, older[end]
        newer[key], older[end] = end, key
    return hits


def s3_fifo(trace: Trace, capacity: int) -> int:  # noqa: C901  # one rule, in one place, to be compared with its paper
    """Hits of S3-FIFO: a tenth for the small queue, counts to 3, a ghost list as long as the main queue."""
    small_max = max(1, capacity // 10)
    counts: dict[int, int] = {}
    small: deque[int] = deque()
    main: deque[int] = deque()
    ghosts: OrderedDict[int, None] = OrderedDict()
    hits = 0

    def evict() -> None:
        while True:
            if len(small) >= small_max or not main:
                old = small.popleft()
                if counts[old] > 1:
                    counts[old] = 0
                    main.append(old)
                    continue
                ghosts[old] = None
                if len(ghosts) > capacity - small_max:
                    ghosts.popitem(last=False)
            else:
                old = main.popleft()
                if counts[old]:
                    counts[old] -= 1
                    main.append(old)
                    continue
            del counts[old]
            return

    for key in trace:
        if key in counts:
            hits += 1
            counts[key] = min(3, counts[key] + 1)
            continue
        if len(counts) >= capacity:
            evict()
        counts[key] = 0
        if key in ghosts:
            del ghosts[key]
            main.append(key)
        else:
            small.append(key)
    return hits


def w_tiny_lfu(trace: Trace, capacity: int) -> int:
    """Hits of W-TinyLFU: window of 1 %, main segmented 80 to 20, exact counts to 15, halved every 10 capacities."""
    window_max = max(1, capacity // 100)
    protected_max = int(0.8 * (capacity - window_max))
    window: OrderedDict[int, None] = OrderedDict()
    probation: OrderedDict[int, None] = OrderedDict()
    protected: OrderedDict[int, None] = OrderedDict()
    counts: dict[int, int] = {}
    hits = 0
    for at, key in enumerate(trace, 1):
        counts[key] = min(15, counts.get(key, 0) + 1)
        if at % (10 * capacity) == 0:
            counts = {old: count // 2 for old, count in counts.items() if count > 1}
        if key in window:
            hits += 1
            window.move_to_end(key)
        elif key in protected:
            hits += 1
            protected.move_to_end(key)
        elif key in probation:
            hits += 1
            del probation[key]
            protected[key] = None
            if len(protected) > protected_max:
                probation[protected.popitem(last=False)[0]] = None
        else:
            window[key] = None
            if len(window) <= window_max:
                continue
            candidate = window.popitem(last=False)[0]
            if len(probation) + len(protected) < capacity - window_max:
                probation[candidate] = None
                continue
            from_queue = probation or protected
            victim = next(iter(from_queue))
            if counts.get(candidate, 0) > counts.get(victim, 0):
                del from_queue[victim]
                probation[candidate] = None
    return hits


def ours(trace: Trace, capacity: int, policy: str = "adaptive") -> int:
    """Hits of the cache itself, under a clock that ticks once a request."""
    clock = ManualClock()
    cache = Cache(capacity * ENTRY_BYTES, clock=clock, policy=policy)
    for key in trace:
        clock.seconds += 1.0
        if cache.get(key) is None:
            cache.put(key, True, weight_bytes=0)  # noqa: FBT003  # a value
    return cache.stats().hits


CHOSEN_FROM: dict[str, Callable[[Trace, int], int]] = {
    "LRU": lru,
    "S3-FIFO": s3_fifo,
    "SIEVE": sieve,
    "W-TinyLFU": w_tiny_lfu,
}
ALL = {"Belady": belady, "FIFO": fifo, **CHOSEN_FROM, "ours": ours}
SYNTHETIC: dict[str, Callable[[], Trace]] = {"Zipf 0.9": zipf, "Zipf with scans": scans, "chat sessions": chat}
PUBLIC: dict[str, Callable[[], Trace]] = {
    "Mooncake conversation": lambda: public("mooncake_conversation.jsonl.xz"),
    "Mooncake synthetic": lambda: public("mooncake_synthetic.jsonl.xz"),
    "kvct_dev": lambda: public("kvct_001_369.jsonl.xz"),
}


# -- the bench ---------------------------------------------------------------------------------------------------------


def run(progress: Progress) -> Report:
    """Every rule on every trace at every capacity; the check is the worst distance to the best fixed rule."""
    table: list[dict[str, Any]] = []
    notes = ["Percent of requests; every entry weighs the same. `short` is by how many points ours misses the best of"]
    notes += [
        f"{', '.join(CHOSEN_FROM)}: below 0 where it beats them all.",
        "",
        _line(["trace", "capacity", *ALL, "short"]),
    ]
    for name, make in (SYNTHETIC | PUBLIC).items():
        if name in PUBLIC and not TRACES.is_dir():
            notes.append(f"{name}: left out, the traces are not beside this checkout ({TRACES.name}/)")
            continue
        trace = make()
        distinct = len(set(trace))
        for capacity in CAPACITIES if name in SYNTHETIC else [int(share * distinct) for share in SHARES]:
            progress(f"{name}, {capacity} entries")
            row = {rule: 100 * hits(trace, capacity) / len(trace) for rule, hits in ALL.items()}
            short = max(row[rule] for rule in CHOSEN_FROM) - row["ours"]
            table.append({"trace": name, "capacity": capacity, **row, "short": short})
            figures = [f"{row[rule]:.1f}" for rule in ALL]
            notes.append(_line([name, f"{capacity:,}", *figures, f"{short:+.1f}"]))
    worst = max(row["short"] for row in table)
    checks = [check("points below the best of four rules, worst", worst, "points", SHORT_POINTS, "lower")]
    return Report(checks, {"table": table, "notes": notes})


def _line(words: list[str]) -> str:
    return f"{words[0]:22}" + "".join(f"{word:>10}" for word in words[1:])


def near_hits() -> str:
    """The kept table, for the documents."""
    found = kept("hit-ratio")
    if found is None:
        return ""
    rows = found["details"]["table"]
    head = ["trace", "entries", *ALL, "ours to best"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        best = max(row[rule] for rule in CHOSEN_FROM)
        figures = [f"**{row[rule]:.1f}**" if row[rule] == best else f"{row[rule]:.1f}" for rule in ALL]
        lines.append(f"| {row['trace']} | {row['capacity']:,} | {' | '.join(figures)} | {-row['short']:+.1f} |")
    return "\n".join(
        [*lines, "", "Percent of requests; bold is the best of the four. `thermocline bench hit-ratio`.", ""]
    )
