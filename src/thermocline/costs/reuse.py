"""How much of a trace a cache could have known: the exact hit rate of every cache size, in one pass.

A request is a path in a tree of prefixes. It hits its leading run of blocks that are present; then all its blocks are
used, last block first, so that an ancestor is never older than its descendants. Under least recently used, a block is
present in a cache of C blocks if fewer than C others were used since (Mattson et al., 1970, "Evaluation techniques for
storage hierarchies"): its stack distance. What was last used in one request is the end of that request's path, and the
path of the next one meets such ends in the order of their age. So the distances of a whole run of blocks follow from
one sum over requests, kept in a Fenwick tree: the cost is by request, not by block.

Output tokens are not cached, as in the published tables. Time and costs play no part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from thermocline.costs.trace import Trace

WINDOWS_SECONDS = (60.0, 300.0, 1800.0, 3600.0)
PROGRESS_REQUESTS = 4096
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Runs:
    """Stretches [start, stop) of requests' paths whose blocks were last used together, by `used`: one row for each.

    Block start + i is in a cache that holds more than `distance` + i blocks, under least recently used. A request's
    rows are in the order of its path, without gaps from its first block on; what is behind them was never used.
    """

    request: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]
    used: NDArray[np.int64]
    distance: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class WorkingSet:
    """Distinct blocks used within a time window that ends at a request: the mean over requests, and the most."""

    seconds: float
    mean_blocks: float
    max_blocks: int


@dataclass(frozen=True, slots=True)
class Reuse:
    """What was found. Shares are of all input tokens.

    `ideal` is the share that an endless cache has; of it, `within` was used before in the same session, and `across` in
    others only. `gained_tokens[c]` are the tokens that block c + 1 of capacity adds. `waits_seconds` and `waits_tokens`
    are the times since each hit's last use, ascending, and the tokens hit so. `live_blocks` is the largest number of
    blocks that are at one time between their first and last use: with so many, some policy reaches the ideal.
    """

    tokens_per_block: int
    input_tokens: int
    distinct_blocks: int
    within: float
    across: float
    live_blocks: int
    gained_tokens: NDArray[np.int64]
    waits_seconds: NDArray[np.float64]
    waits_tokens: NDArray[np.int64]
    working_sets: tuple[WorkingSet, ...]
    _summed: NDArray[np.int64]

    @property
    def ideal(self) -> float:
        """The share of tokens that an endless cache has."""
        return self.within + self.across

    def hit(self, blocks: float) -> float:
        """The share of tokens that a cache of so many blocks has, under least recently used."""
        held = int(min(blocks, len(self._summed)))
        return float(self._summed[held - 1]) / self.input_tokens if held > 0 else 0.0

    def blocks_for(self, share: float) -> int:
        """The smallest cache that has this share of the ideal (0 to 1)."""
        if not self.ideal or share <= 0:
            return 0
        wanted = share * float(self._summed[-1]) * (1 - 1e-12)
        return int(np.searchsorted(self._summed, wanted)) + 1

    def hit_within(self, seconds: float) -> float:
        """The share of tokens that an endless cache has which forgets what was not used for so long."""
        known = int(np.searchsorted(self.waits_seconds, seconds, side="right"))
        return float(self.waits_tokens[:known].sum()) / self.input_tokens if self.input_tokens else 0.0

    def wait(self, share: float) -> float:
        """The time since last use that this share of the hits does not exceed. 0 where nothing is hit."""
        summed = np.cumsum(self.waits_tokens)
        if not len(summed):
            return 0.0
        return float(self.waits_seconds[np.searchsorted(summed, share * float(summed[-1]) * (1 - 1e-12))])


class _Fenwick:
    """Sums of prefixes of a row of numbers that change (Fenwick, 1994)."""

    def __init__(self, size: int) -> None:
        self._tree = [0] * (size + 1)
        self.total = 0

    def add(self, at: int, change: int) -> None:
        """Change one number."""
        tree, size = self._tree, len(self._tree)
        self.total += change
        at += 1
        while at < size:
            tree[at] += change
            at += at & -at

    def sum_from(self, start: int) -> int:
        """The sum of all numbers but the first `start`."""
        tree, found = self._tree, self.total
        while start:
            found -= tree[start]
            start &= start - 1
        return found


def runs_of(trace: Trace, requests: Sequence[int] | None = None, progress: Progress = lambda _done, _of: None) -> Runs:
    """What a cache meets that sees these requests (None: all), in order. `progress` is called now and then."""
    chosen = range(len(trace)) if requests is None else requests
    last = np.full(trace.distinct_blocks, -1, np.int64)
    ends, found = _Fenwick(len(chosen)), []
    for at, request in enumerate(chosen):
        path = trace.path(request)
        met = list(_runs(last[path]))
        found += [(request, start, stop, chosen[used], ends.sum_from(used + 1)) for start, stop, used in met]
        for start, stop, used in met:  # only now: distances are those before the request
            ends.add(used, start - stop)
        ends.add(at, len(path))
        last[path] = at
        if at % PROGRESS_REQUESTS == 0:
            progress(at, len(chosen))
    return Runs(*np.array(found, np.int64).reshape(-1, 5).T)


def analyse(
    trace: Trace, windows_seconds: Sequence[float] = WINDOWS_SECONDS, progress: Progress = lambda _done, _of: None
) -> Reuse:
    """Measure a trace. It must tell of prefixes: see `Trace.has_blocks`. `progress` is called now and then."""
    runs, size = runs_of(trace, None, progress), trace.tokens_per_block
    beyond = np.diff(trace.starts) * size - trace.input_tokens
    last = runs.stop == np.diff(trace.starts)[runs.request]
    lacking = np.where(last, np.maximum(0, beyond[runs.request]), 0)
    gained = _gained(runs, lacking, size, trace.distinct_blocks)
    summed, inputs = np.cumsum(gained), int(trace.input_tokens.sum())
    within = _within_tokens(trace) / max(1, inputs)
    waits = trace.arrival_seconds[runs.request] - trace.arrival_seconds[runs.used]
    order = np.argsort(waits, kind="stable")
    return Reuse(
        tokens_per_block=size,
        input_tokens=inputs,
        distinct_blocks=trace.distinct_blocks,
        within=within,
        across=float(summed[-1]) / max(1, inputs) - within if len(summed) else 0.0,
        live_blocks=_live_blocks(trace),
        gained_tokens=gained,
        waits_seconds=waits[order],
        waits_tokens=((runs.stop - runs.start) * size - lacking)[order],
        working_sets=tuple(_working_set(trace, runs, seconds) for seconds in windows_seconds),
        _summed=summed,
    )


def _runs(used: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """Stretches [start, stop) of a path by the request that used them last. What was never used ends it."""
    cuts = np.flatnonzero(np.diff(used)) + 1
    edges = [0, *cuts.tolist(), len(used)]
    for start, stop in pairwise(edges):
        if start < stop and used[start] >= 0:
            yield start, stop, int(used[start])


def _gained(runs: Runs, lacking: NDArray[np.int64], size: int, blocks: int) -> NDArray[np.int64]:
    """Tokens that each further block of capacity adds: a run adds a block's worth at each distance that it spans."""
    stop = runs.distance + runs.stop - runs.start
    steps = np.zeros(blocks + 1, np.int64)
    np.add.at(steps, runs.distance, size)
    np.add.at(steps, stop, -size)
    gained: NDArray[np.int64] = np.cumsum(steps)[:blocks]
    np.subtract.at(gained, stop - 1, lacking)
    return gained


def _working_set(trace: Trace, runs: Runs, seconds: float) -> WorkingSet:
    """A window slides over the requests. `own` are the blocks that each request in it used last."""
    arrivals, lengths = trace.arrival_seconds.tolist(), np.diff(trace.starts).tolist()
    rows = zip(runs.request.tolist(), runs.used.tolist(), (runs.stop - runs.start).tolist(), strict=True)
    row = next(rows, None)
    own = [0] * len(trace)
    first = inside = most = summed = 0
    for request, now in enumerate(arrivals):
        own[request] = lengths[request]
        inside += lengths[request]
        while row is not None and row[0] == request:
            own[row[1]] -= row[2]
            inside -= row[2] if row[1] >= first else 0
            row = next(rows, None)
        while arrivals[first] <= now - seconds:
            inside -= own[first]
            first += 1
        most, summed = max(most, inside), summed + inside
    return WorkingSet(seconds, summed / max(1, len(trace)), most)


def _within_tokens(trace: Trace) -> int:
    """Tokens of leading runs that the same session used before. Each request without a session is one of its own."""
    owner = np.full(trace.distinct_blocks, -1, np.int64)
    found = 0
    for request in np.argsort(trace.sessions, kind="stable").tolist():
        session = int(trace.sessions[request])
        if session < 0:
            continue
        path = trace.path(request)
        held = int((owner[path] == session).sum())  # a prefix: who used a block has used what is before it
        found += min(held * trace.tokens_per_block, int(trace.input_tokens[request]))
        owner[path] = session
    return found


def _live_blocks(trace: Trace) -> int:
    first = np.full(trace.distinct_blocks, len(trace), np.int64)
    final = np.full(trace.distinct_blocks, -1, np.int64)
    requests = np.repeat(np.arange(len(trace)), np.diff(trace.starts))
    np.minimum.at(first, trace.blocks, requests)
    np.maximum.at(final, trace.blocks, requests)
    again = final > first
    steps = np.zeros(len(trace) + 1, np.int64)
    np.add.at(steps, first[again], 1)
    np.add.at(steps, final[again], -1)
    return int(np.cumsum(steps).max(initial=0))
