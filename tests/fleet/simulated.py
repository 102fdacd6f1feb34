"""A fleet without bytes: instances with a queue and an LRU cache of block names, in simulated time.

Each instance computes one prompt after the other; what a decision knows of caches is what lies in them at that moment.
"""

import heapq
import itertools
import statistics
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest

from thermocline.costs.trace import read
from thermocline.fleet.books import Fleet
from thermocline.fleet.instance import Ask, Instance, Overlaps
from thermocline.fleet.router import choose

A100 = (0.028, 9.7e-5, 8.8e-10)
"""Llama 3.1 70B on 8 x A100: seconds of n tokens are a + b n + c n^2, fitted to aiconfigurator's tables."""

ANSWER_TOKENS = 13


@dataclass(frozen=True)
class Request:
    at: float
    tokens: int
    blocks: Sequence[int]
    session: str | None = None
    output_seconds: float = 0.0


@dataclass
class Served:
    request: Request
    slot: int
    predicted_seconds: float
    seconds: float
    cached_tokens: int
    reasons: tuple[str, ...]
    regret_seconds: float | None


class Cache:
    """An LRU cache of blocks; a request touches its blocks tail first, so that parents outlive children."""

    def __init__(self, blocks_max: int):
        self.blocks_max = blocks_max
        self.blocks: OrderedDict[int, None] = OrderedDict()

    def leading(self, blocks: Sequence[int]) -> int:
        held = self.blocks
        for at, block in enumerate(blocks):
            if block not in held:
                return at
        return len(blocks)

    def touch(self, blocks: Sequence[int]) -> None:
        held = self.blocks
        for block in reversed(blocks):
            held[block] = None
            held.move_to_end(block)
        while len(held) > self.blocks_max:
            held.popitem(last=False)


@dataclass
class World:
    """`costs` are the instances' true ones; the fleet has to learn them."""

    slots: int
    cache_blocks: int
    block_tokens: int
    policy: str
    costs: tuple[float, float, float] = A100
    decode_seconds: float = 0.0
    slowness: Sequence[float] = ()
    fleet: Fleet = field(default_factory=Fleet)
    served: list[Served] = field(default_factory=list)

    def __post_init__(self):
        self.caches = [Cache(self.cache_blocks) for _ in range(self.slots)]
        self.queues = [[] for _ in range(self.slots)]
        self.events: list[tuple[float, int, object, tuple]] = []
        self.number = itertools.count()
        self.after = None
        self.now = 0.0
        for slot in range(self.slots):
            self.fleet.join(Instance(f"i{slot}", capacity_tokens=self.cache_blocks * self.block_tokens))

    def at(self, seconds, call, *arguments):
        heapq.heappush(self.events, (seconds, next(self.number), call, arguments))

    def run(self, requests: Iterator[Request] | Sequence[Request] = ()) -> "World":
        for request in requests:
            self.at(request.at, self.arrive, request)
        while self.events:
            self.now, _, call, arguments = heapq.heappop(self.events)
            call(*arguments)
        self.fleet.check_integrity()
        return self

    def cached(self, slot: int, request: Request) -> int:
        return min(self.caches[slot].leading(request.blocks) * self.block_tokens, request.tokens - 1)

    def choose(self, request: Request):
        held = [self.cached(slot, request) for slot in range(self.slots)]
        longest = max(cache.leading(request.blocks) for cache in self.caches)
        name = request.blocks[longest - 1] if longest else None
        ask = Ask(request.tokens, Overlaps(held, name=name), request.session)
        return choose(ask, self.fleet, self.policy, self.now)

    def arrive(self, request: Request) -> None:
        booking = self.choose(request)
        queue = self.queues[booking.choice.instance]
        queue.append((request, booking))
        if len(queue) == 1:
            self.begin(booking.choice.instance)

    def begin(self, slot: int) -> None:
        request, _ = self.queues[slot][0]
        cached = self.cached(slot, request)
        fixed, linear, square = self.costs
        seconds = fixed + linear * (request.tokens - cached) + square * (request.tokens**2 - cached**2)
        slower = self.slowness[slot] if self.slowness else 1.0
        self.at(self.now + seconds * slower, self.first_token, slot, cached)

    def first_token(self, slot: int, cached: int) -> None:
        request, booking = self.queues[slot].pop(0)
        self.caches[slot].touch(request.blocks)
        self.fleet.first_token(booking, self.now)
        self.at(self.now + request.output_seconds, self.finish, request, booking, self.now, cached)
        if self.queues[slot]:
            self.begin(slot)

    def finish(self, request: Request, booking, first_at: float, cached: int) -> None:
        outcome = self.fleet.finished(booking, self.now, cached)
        choice = booking.choice
        seconds = first_at - booking.arrived
        served = Served(
            request, choice.instance, choice.seconds, seconds, cached, choice.reasons, outcome.regret_seconds
        )
        self.served.append(served)
        if self.after is not None:
            self.after(request)

    # -- what it came to

    @property
    def hit_rate(self) -> float:
        return sum(each.cached_tokens for each in self.served) / sum(each.request.tokens for each in self.served)

    @property
    def mean_seconds(self) -> float:
        return statistics.fmean(each.seconds for each in self.served)

    def share(self, slot: int) -> float:
        return sum(each.slot == slot for each in self.served) / len(self.served)

    @property
    def shares(self) -> list[float]:
        return [self.share(slot) for slot in range(self.slots)]

    def imbalance(self) -> float:
        return max(self.shares) * self.slots


class Batched(World):
    """Instances that batch as vLLM does: a step computes up to `budget` prompt tokens, and a token of every answer."""

    budget, answer_tokens, step_seconds, stream_seconds, front_seconds = 2_048, 8, 0.02, 0.004, 0.02

    def __post_init__(self):
        super().__post_init__()
        self.stepping = [False] * self.slots
        self.writing: list[list] = [[] for _ in range(self.slots)]
        self.random = seeded(5)

    def arrive(self, request: Request) -> None:
        self.at(self.now + self.front_seconds, self.enter, request, self.choose(request))

    def enter(self, request: Request, booking) -> None:
        slot = booking.choice.instance
        self.queues[slot].append([request, booking, None, 0])
        if not self.stepping[slot]:
            self.begin(slot)

    def begin(self, slot: int) -> None:
        writing = self.writing[slot]
        self.stepping[slot] = bool(self.queues[slot] or writing)
        if not self.stepping[slot]:
            return
        left, seconds, done = self.budget - len(writing), self.step_seconds + self.stream_seconds * len(writing), []
        for row in self.queues[slot]:
            request = row[0]
            if row[2] is None:
                row[2] = row[3] = self.cached(slot, request)
            new = min(left, request.tokens - row[3])
            left -= new
            seconds += self.costs[1] * new + self.costs[2] * ((row[3] + new) ** 2 - row[3] ** 2)
            row[3] += new
            self.caches[slot].touch(request.blocks[: row[3] // self.block_tokens])
            if row[3] == request.tokens:
                done.append(row)
        self.at(self.now + seconds * self.random.uniform(0.9, 1.15), self.stepped, slot, done)

    def stepped(self, slot: int, done: list) -> None:
        writing = self.writing[slot]
        for row in writing:
            row[0] -= 1
        over = [row for row in writing if not row[0]]
        writing[:] = [row for row in writing if row[0]]
        for _, request, booking, first_at, cached in over:
            self.finish(request, booking, first_at, cached)
        for row in done:
            request, booking, cached, _ = row
            self.queues[slot].remove(row)
            self.fleet.first_token(booking, self.now)
            writing.append([self.answer_tokens - 1, request, booking, self.now, cached])
        self.begin(slot)


class Noisy(Batched):
    """Batching instances that share a machine: each slows the others down, and a step in twenty takes three times."""

    contention, odd_share, odd = 0.8, 0.05, 3.0

    def at(self, seconds, call, *arguments):
        if call == self.stepped:
            others = (sum(self.stepping) - 1) / (self.slots - 1)
            slower = (1 + self.contention * others) * self.random.uniform(0.7, 1.5)
            slower *= self.odd if self.random.random() < self.odd_share else 1.0
            seconds = self.now + (seconds - self.now) * slower
        super().at(seconds, call, *arguments)


def seeded(seed: int) -> Random:
    return Random(seed)  # noqa: S311  # the same requests in every run


def mooncake(name: str, count: int | None = None) -> list[Request]:
    trace = read(traces() / f"mooncake_{name}.jsonl.xz")
    return [
        Request(
            float(trace.arrival_seconds[at]),
            int(trace.input_tokens[at]),
            trace.path(at).tolist(),
            str(trace.sessions[at]),
        )
        for at in range(min(len(trace), count or len(trace)))
    ]


def traces() -> Path:
    path = Path(__file__).resolve().parents[3] / "shared" / "traces"
    if not path.is_dir():
        pytest.skip("the public traces are not beside this checkout")
    return path


class MultiTurn:
    """Conversations that share a system prompt, `concurrency` turns at a time, first come first served.

    routers.md, section 9: the sizes are those of its tokenizer. Answers take a while that nobody knows beforehand, so
    turns come in another order every round.
    """

    def __init__(self, world: World, seed: int, *, conversations=24, turns=4, concurrency=8, system=311):
        self.world, self.turns, self.system = world, turns, system
        self.random = seeded(seed)
        self.queue = [(conversation, 1, system) for conversation in range(conversations)]
        self.running: dict[int, tuple[int, int]] = {}
        self.ideal_tokens = 0
        world.after = self.done
        for _ in range(min(concurrency, conversations)):
            self.next()

    def next(self) -> None:
        if not self.queue:
            return
        conversation, number, before = self.queue.pop(0)
        size = self.world.block_tokens
        tokens = before + self.random.randint(340, 374)
        shared = self.system // size
        blocks = [*range(shared), *(1_000 * (conversation + 1) + at for at in range(tokens // size - shared))]
        seconds = self.random.uniform(0.2, 2.0) * self.world.costs[1] * 357
        request = Request(self.world.now, tokens, blocks, None, seconds)
        self.ideal_tokens += (before - ANSWER_TOKENS * (number > 1)) // size * size if number > 1 or self.running else 0
        self.running[id(request)] = conversation, number
        self.world.at(request.at, self.world.arrive, request)

    def done(self, request: Request) -> None:
        conversation, number = self.running[id(request)]
        if number < self.turns:
            self.queue.append((conversation, number + 1, request.tokens + ANSWER_TOKENS))
        self.next()

    @property
    def of_ideal(self) -> float:
        """Cached tokens over those that a single endless cache would have had."""
        return sum(each.cached_tokens for each in self.world.served) / self.ideal_tokens
