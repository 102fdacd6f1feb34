"""Chapter: 1,600 prefixes on eight instances, whose caches hold an eighth of them each. No bytes, the real router."""

from __future__ import annotations

import heapq
import itertools
import statistics
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from thermocline.demo.chapter import Chapter, Claim
from thermocline.demo.screen import Screen, milliseconds
from thermocline.fleet.books import Booking, Fleet
from thermocline.fleet.instance import Ask, Instance, Overlaps
from thermocline.fleet.router import choose

INSTANCES = 8
PREFIXES = 1_600
REQUESTS = 65_000
CACHE_PREFIXES = PREFIXES // INSTANCES
TOKENS = 2_048
COSTS = (0.006, 4.1e-5, 2.3e-10)
"""Seconds of n tokens are a + b n + c n^2: Llama 3.1 70B on 8 x H100, fitted to aiconfigurator's tables."""
BUSY = 0.5
"""How busy the fleet would be if nothing were cached."""
HIT_MIN, LOAD_MAX = 0.97, 1.1
SHOWN = {
    "round_robin": "round robin",
    "least_loaded": "least loaded",
    "session_hash": "hash of the prefix",
    "predicted_ttft": "ours",
}


@dataclass(slots=True)
class Told:
    """What one policy came to. A hit is a prompt whose prefix was in the instance's cache when it was computed.

    `same_instance` counts prompts that went where their prefix went last: what some load generators call a hit.
    """

    hits: int = 0
    same_instance: int = 0
    seconds: list[float] = field(default_factory=list)
    requests: list[int] = field(default_factory=lambda: [0] * INSTANCES)

    @property
    def hit_rate(self) -> float:
        """Cached over all: every prompt is as long as every other."""
        return self.hits / len(self.seconds)

    @property
    def same_rate(self) -> float:
        """The other definition."""
        return self.same_instance / len(self.seconds)

    @property
    def mean_seconds(self) -> float:
        """To the first token."""
        return statistics.fmean(self.seconds)

    def told(self) -> dict[str, float]:
        """The figures, by name."""
        return {
            "hit_rate": self.hit_rate,
            "same_instance_rate": self.same_rate,
            "load_max_over_mean": self.load_max_over_mean,
            "first_token_seconds": self.mean_seconds,
        }

    @property
    def load_max_over_mean(self) -> float:
        """Requests of the busiest instance over the mean."""
        return max(self.requests) * INSTANCES / sum(self.requests)


def prompts(seed: int) -> Iterator[tuple[float, int]]:
    """When each prompt comes, and which prefix it is: Poisson arrivals, all prefixes equally popular."""
    random = Random(seed)  # noqa: S311  # the same requests in every run
    rate = BUSY * INSTANCES / _seconds(0)
    times = itertools.accumulate(random.expovariate(rate) for _ in range(REQUESTS))
    return ((at, random.randrange(PREFIXES)) for at in times)


def simulate(policy: str, seed: int = 1) -> Told:
    """Play the workload against one policy. Each instance computes one prompt after the other; caches are LRU."""
    fleet, told = Fleet(), Told()
    for at in range(INSTANCES):
        fleet.join(Instance(f"i{at}", capacity_tokens=CACHE_PREFIXES * TOKENS))
    caches: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(INSTANCES)]
    free, last = [0.0] * INSTANCES, [-1] * PREFIXES
    ends: list[tuple[float, int, Booking, int]] = []
    for number, (now, prefix) in enumerate(prompts(seed)):
        while ends and ends[0][0] <= now:
            _ended(fleet, *heapq.heappop(ends))
        held = [TOKENS - 1 if prefix in cache else 0 for cache in caches]
        ask = Ask(TOKENS, Overlaps(held, name=prefix), f"p{prefix}")
        booking = choose(ask, fleet, policy, now)
        assert booking is not None
        slot = booking.choice.instance
        cached = held[slot]
        free[slot] = max(now, free[slot]) + _seconds(cached)
        _touch(caches[slot], prefix)
        heapq.heappush(ends, (free[slot], number, booking, cached))
        told.hits += cached > 0
        told.same_instance += last[prefix] == slot
        told.seconds.append(free[slot] - now)
        told.requests[slot] += 1
        last[prefix] = slot
    return told


def _ended(fleet: Fleet, now: float, _: int, booking: Booking, cached: int) -> None:
    fleet.first_token(booking, now)
    fleet.finished(booking, now, cached)


def _touch(cache: OrderedDict[int, None], prefix: int) -> None:
    cache[prefix] = None
    cache.move_to_end(prefix)
    if len(cache) > CACHE_PREFIXES:
        cache.popitem(last=False)


def _seconds(cached: int) -> float:
    fixed, linear, square = COSTS
    return fixed + linear * (TOKENS - cached) + square * (TOKENS**2 - cached**2)


def play(screen: Screen, folder: Path) -> Chapter:  # noqa: ARG001  # nothing is written
    """The same requests by turns, and by the router; the bench has least loaded and a hash beside them."""
    screen.say(
        f"{REQUESTS:,} prompts, each with one of {PREFIXES:,} prefixes, come to {INSTANCES} instances. The caches hold "
        "an eighth of the prefixes each. Time is simulated; the router is the one that `thermocline route` runs."
    )
    told = {}
    for policy in ("round_robin", "predicted_ttft"):
        screen.working(f"{REQUESTS:,} prompts, {SHOWN[policy]}")
        told[policy] = simulate(policy)
    screen.worked()
    headers = ["router", "hit rate", "same instance as last time", "load max/mean", "first token (mean)"]
    screen.table(headers, [_row(policy, each) for policy, each in told.items()], right=range(1, 5))
    screen.say("With caches twice as large, round robin would find twice as much: 12 % is what an eighth each gives.")
    return _concluded(told)


def _row(policy: str, told: Told) -> list[str]:
    shares = [f"{told.hit_rate:.1%}", f"{told.same_rate:.1%}", f"{told.load_max_over_mean:.2f}"]
    return [SHOWN[policy], *shares, milliseconds(told.mean_seconds)]


def _concluded(told: dict[str, Told]) -> Chapter:
    turns, ours = told["round_robin"], told["predicted_ttft"]
    ok = ours.hit_rate >= HIT_MIN and ours.load_max_over_mean <= LOAD_MAX and turns.hit_rate < 1.2 / INSTANCES
    figure = f"{turns.hit_rate:.1%} -> {ours.hit_rate:.1%} of all prefixes found"
    details: dict[str, Any] = {"requests": REQUESTS, "prefixes": PREFIXES, "instances": INSTANCES}
    verdict = f"{figure}, load max/mean {ours.load_max_over_mean:.2f}"
    claim = Claim('"12.5 % -> 97.5 % hit rate"', figure, "thermocline bench locality")
    return Chapter(ok, verdict, claim, details | {policy: each.told() for policy, each in told.items()})
