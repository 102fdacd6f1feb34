"""What any set of tiers would have saved of a trace on a machine, and what it would have cost.

The currency is seconds of an instance per hour of traffic. A prefix of k tokens is worth S(k) = prefill(k + tail) -
prefill(tail behind k); loading it takes bytes(k) / bandwidth. S is convex, so of a run it pays to load all or nothing,
as the store plans. A tier costs its price, and asking it costs what the budget allows: `Machine.overhead_*`. Where no
price is known, room counts as free.

A block is found in a tier of C blocks if fewer than C others were used since (Mattson et al., 1970); a tier also holds
what the warmer ones hold. Sessions take turns over the instances, and stay where they began.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise, product

import numpy as np
from numpy.typing import NDArray

from thermocline.costs.reuse import Runs, runs_of
from thermocline.costs.roofline import Prefill
from thermocline.costs.trace import Trace
from thermocline.costs.transfer import TAIL_TOKENS, Link

OVERHEAD_SECONDS, OVERHEAD_SHARE = 0.001, 0.01
"""What asking tiers may cost a request that finds nothing: at most so long, or this share of its prefill. A budget of
this project, held by `thermocline bench overhead`; not a figure measured on the machine that is advised for."""

GRID = 9
"""Sizes of a tier that are tried: where further ninths of the reuse come within reach."""
WORTH_POINTS, HELD_MAX = 512, 1 << 25
ORACLE_BLOCKS_MAX = 400_000
"""References to blocks, beyond which the oracle is not asked."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Offer:
    """A tier that could be had: `host`, `disk` or `redis`. Each instance has one of its own, or all share one.

    No `capacity_bytes`: as large as is useful.
    """

    tier: str
    link: Link
    capacity_bytes: int | None = None
    usd_per_gb_hour: float = 0.0
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """What the workload runs on: an instance's KV memory (`device_tokens`) and price, and a token's bytes in tiers."""

    prefill: Prefill
    token_bytes: int
    device_tokens: int
    offers: tuple[Offer, ...] = ()
    instances: int = 1
    usd_per_hour: float | None = None
    overhead_seconds: float = OVERHEAD_SECONDS
    overhead_share: float = OVERHEAD_SHARE
    assumptions: tuple[str, ...] = ()


Sized = tuple[Offer, int]
"""A tier and its blocks."""


@dataclass(frozen=True, slots=True)
class Used:
    """What comes of a set of tiers: seconds saved per hour, share of tokens not computed, and the longest load."""

    saved_seconds: float
    hit: float
    longest_load_seconds: float


def _joined(parts: Sequence[Runs]) -> Runs:
    columns = ("request", "start", "stop", "used", "distance")
    return Runs(*(np.concatenate([getattr(part, column) for part in parts]) for column in columns))


class Study:
    """A trace on a machine: what any set of tiers would have saved.

    All sums are per hour: of the trace, where `hours` do not say how long such a trace usually takes.
    """

    def __init__(self, trace: Trace, machine: Machine, hours: float | None = None) -> None:
        self.trace, self.machine = trace, machine
        ks = np.unique(np.linspace(0, int(trace.input_tokens.max()), WORTH_POINTS).astype(np.int64))
        self._ks = ks.astype(float)
        prefill = machine.prefill
        self._colds = np.array([prefill(max(1, k), 0) for k in ks.tolist()])
        self._worths = np.array([prefill(k + TAIL_TOKENS, 0) - prefill(TAIL_TOKENS, k) for k in ks.tolist()])
        self.cold = self.cold_seconds(trace.input_tokens)
        busy = float(self.cold.sum()) / machine.instances
        self.hours = hours or max(trace.seconds or busy, 1e-9) / 3600
        self.homes = self._homes()
        self._local = _joined([runs_of(trace, home) for home in self.homes])
        self._shared = self._local if len(self.homes) == 1 else None
        self._held: dict[tuple[float, bool], tuple[Ints, Floats]] = {}

    def _homes(self) -> list[list[int]]:
        homes: list[list[int]] = [[] for _ in range(self.machine.instances)]
        for request, session in enumerate(self.trace.sessions.tolist()):
            homes[(session if session >= 0 else request) % len(homes)].append(request)
        return homes

    # -- what is held, and worth ---------------------------------------------------------------------------------------

    def cold_seconds(self, tokens: Ints) -> Floats:
        """To compute whole prompts."""
        found: Floats = np.interp(tokens, self._ks, self._colds)
        return found

    def worth_seconds(self, tokens: Ints) -> Floats:
        """What prefixes of so many tokens save."""
        found: Floats = np.interp(tokens, self._ks, self._worths)
        return found

    def held(self, blocks: float, *, shared: bool = False) -> Ints:
        """Leading tokens of each request that a cache of so many blocks has."""
        return self._found(blocks, shared=shared)[0]

    def _found(self, blocks: float, *, shared: bool) -> tuple[Ints, Floats]:
        """What is held, and what that is worth."""
        known = self._held.get((blocks, shared))
        if known is None:
            runs = self._runs(shared=shared)
            found = np.zeros(len(self.trace), np.int64)
            within = np.minimum(runs.stop - runs.start, np.maximum(0.0, blocks - runs.distance)).astype(np.int64)
            some = within > 0
            np.maximum.at(found, runs.request[some], (runs.start + within)[some])
            found = np.minimum(found * self.trace.tokens_per_block, self.trace.input_tokens)
            known = found, self.worth_seconds(found)
            if len(self._held) * len(found) > HELD_MAX:
                self._held.clear()
            self._held[blocks, shared] = known
        return known

    def _runs(self, *, shared: bool) -> Runs:
        if shared and self._shared is None:
            self._shared = runs_of(self.trace)
        return self._shared if shared and self._shared is not None else self._local

    @property
    def device_blocks(self) -> int:
        """The KV memory of one instance."""
        return self.machine.device_tokens // self.trace.tokens_per_block

    def tier_bytes(self, blocks: float) -> float:
        """Room for so many blocks."""
        return blocks * self.trace.tokens_per_block * self.machine.token_bytes

    def sizes(self, offer: Offer) -> list[int]:
        """Sizes worth trying, in blocks: those at which more of the reuse comes within reach."""
        runs = self._runs(shared=offer.shared)
        ends = runs.distance + runs.stop - runs.start
        ends = ends[ends > self.device_blocks]
        found = np.unique(np.quantile(ends, np.linspace(0, 1, GRID + 1), method="higher")) if len(ends) else ends
        most = math.inf if offer.capacity_bytes is None else offer.capacity_bytes / self.tier_bytes(1)
        fitting = [int(size) for size in found if size <= most]
        return fitting if len(fitting) == len(found) or most < 1 else sorted({*fitting, int(most)})

    # -- what is gained, and costs -------------------------------------------------------------------------------------

    def per_hour(self, seconds: Floats) -> float:
        """The sum over all requests, per hour."""
        return float(seconds.sum()) / self.hours

    def saved(self, held: Ints) -> float:
        """What it saves that each request finds so many tokens for nothing."""
        return self.per_hour(self.worth_seconds(held))

    @functools.cached_property
    def overhead(self) -> float:
        """What asking tiers costs at most."""
        return self.per_hour(np.maximum(self.machine.overhead_seconds, self.machine.overhead_share * self.cold))

    def load_seconds(self, offer: Offer, tokens: Ints) -> Floats:
        """What loads of so many tokens take; nothing for none."""
        seconds = offer.link.latency_seconds + tokens * self.machine.token_bytes / offer.link.bytes_per_second
        return np.where(tokens > 0, seconds, 0.0)

    def use(self, tiers: Sequence[Sized]) -> Used:
        """What comes of these tiers. A longer prefix is worth no less, so the worth of the longer is the larger one."""
        held, worth = self._found(self.device_blocks, shared=False)
        best, tokens = worth, held
        loads = taken = np.zeros(len(held))
        for offer, blocks in sorted(tiers, key=lambda sized: -sized[0].link.bytes_per_second):
            there, worth_there = self._found(blocks, shared=offer.shared)
            more, worth = np.maximum(held, there), np.maximum(worth, worth_there)
            loads = loads + self.load_seconds(offer, more - held)
            better = worth - loads > best
            best = np.where(better, worth - loads, best)
            tokens, taken = np.where(better, more, tokens), np.where(better, loads, taken)
            held = more
        hit = float(tokens.sum() / max(1, self.trace.input_tokens.sum()))
        return Used(self.per_hour(best), hit, float(taken.max(initial=0)))

    def cost(self, tiers: Sequence[Sized]) -> float:
        """What these tiers cost, in seconds of an instance per hour."""
        room = math.fsum(offer.usd_per_gb_hour * self.dollar_seconds((offer, blocks)) for offer, blocks in tiers)
        return self.overhead + room if tiers else 0.0

    def room_usd_per_hour(self, tiers: Sequence[Sized], instances: int) -> float:
        """What the room of these tiers costs where there are so many instances."""
        return math.fsum(
            offer.usd_per_gb_hour * self.tier_bytes(blocks) / 1e9 * (1 if offer.shared else instances)
            for offer, blocks in tiers
        )

    def dollar_seconds(self, sized: Sized) -> float:
        """What a tier costs at a dollar per GB and hour."""
        (offer, blocks), price = sized, self.machine.usd_per_hour
        many = 1 if offer.shared else self.machine.instances
        return many * self.tier_bytes(blocks) / 1e9 / price * 3600 if price else 0.0

    def net(self, tiers: Sequence[Sized]) -> float:
        """Seconds saved, less seconds spent."""
        return self.use(tiers).saved_seconds - self.cost(tiers)

    def best(self, offers: Sequence[Offer]) -> tuple[Sized, ...]:
        """The tiers with the highest net: the fewest and smallest of those that are equal."""
        found: tuple[Sized, ...] = ()
        highest = self.net(found)
        for count in range(1, len(offers) + 1):
            for chosen in combinations(offers, count):
                for sizes in product(*(self.sizes(offer) for offer in chosen)):
                    tiers = tuple(zip(chosen, sizes, strict=True))
                    net = self.net(tiers) if _grow(tiers) else -math.inf
                    if net > highest + 1e-9 * abs(highest):
                        found, highest = tiers, net
        return found

    def gains(self, offer: Offer, others: Sequence[Sized]) -> dict[int, float]:
        """What this tier adds to the net of the others, by its size."""
        without = self.net(others)
        return {size: self.net([*others, (offer, size)]) - without for size in self.sizes(offer)}


def _grow(tiers: Sequence[Sized]) -> bool:
    """False where a slower tier has no more room than a quicker one: it would have nothing that this one lacks."""
    own = sorted((sized for sized in tiers if not sized[0].shared), key=lambda sized: -sized[0].link.bytes_per_second)
    return all(quick[1] < slow[1] for quick, slow in pairwise(own))


# -- other orders, other rules -----------------------------------------------------------------------------------------


def by_prefix(trace: Trace, instances: int = 1) -> Trace:
    """The same requests at the same times, those with like prompts behind each other; each instance has one stretch."""
    order = sorted(range(len(trace)), key=lambda request: trace.path(request).tolist())
    return replace(
        _picked(trace, order),
        arrival_seconds=trace.arrival_seconds,
        sessions=np.arange(len(order)) * instances // len(order),
        notes=(*trace.notes, "requests are sorted by their prompts"),
    )


def _picked(trace: Trace, requests: Sequence[int]) -> Trace:
    paths = [trace.path(request) for request in requests]
    return replace(
        trace,
        arrival_seconds=trace.arrival_seconds[requests],
        input_tokens=trace.input_tokens[requests],
        output_tokens=trace.output_tokens[requests],
        sessions=trace.sessions[requests],
        blocks=np.concatenate([trace.blocks[:0], *paths]),
        starts=np.concatenate([[0], np.cumsum([len(path) for path in paths])]),
    )


def oracle_hit(study: Study, blocks: int) -> float | None:
    """The share of tokens that caches of this size hit which know what comes; None where the trace is too long to say.

    It keeps the blocks whose next use is nearest, of equals the one nearer to the beginning (Belady, 1966, for paths).
    A parent is used whenever its child is, so what is kept is closed towards the beginning by itself.
    """
    trace = study.trace
    if len(trace.blocks) > ORACLE_BLOCKS_MAX:
        return None
    found = sum(_oracle_tokens(_picked(trace, home), blocks) for home in study.homes if home)
    return found / max(1, int(trace.input_tokens.sum()))


def _oracle_tokens(trace: Trace, blocks: int) -> int:
    uses, flat = _next_uses(trace), trace.blocks.tolist()
    held: dict[int, int] = {}
    latest: list[tuple[int, int, int]] = []
    tokens = 0
    for request, (start, stop) in enumerate(zip(trace.starts[:-1].tolist(), trace.starts[1:].tolist(), strict=True)):
        leading = next((at for at in range(start, stop) if flat[at] not in held), stop) - start
        tokens += min(leading * trace.tokens_per_block, int(trace.input_tokens[request]))
        for at in range(start, stop):
            if uses[at] < 0:
                held.pop(flat[at], None)
                continue
            held[flat[at]] = uses[at]
            heapq.heappush(latest, (-uses[at], start - at, flat[at]))
        while len(held) > blocks:
            following, _, block = heapq.heappop(latest)
            if held.get(block) == -following:
                del held[block]
    return tokens


def _next_uses(trace: Trace) -> list[int]:
    """For each reference, the request that uses its block next; -1 where none does."""
    requests = np.repeat(np.arange(len(trace)), np.diff(trace.starts))
    order = np.argsort(trace.blocks, kind="stable")
    same = trace.blocks[order][1:] == trace.blocks[order][:-1]
    found = np.full(len(order), -1)
    found[order[:-1][same]] = requests[order[1:][same]]
    uses: list[int] = found.tolist()
    return uses
