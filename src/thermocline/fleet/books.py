"""The books of a fleet: what was sent where and is not done yet, and what each instance has shown it takes.

One owner writes them, the gateway; `router.route` only reads. Everything that a decision reads lies in flat lists by
slot, because a decision over 64 instances should take some 30 us. No clock is read: whoever calls says what time it is.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from thermocline.costs.measured import Measured
from thermocline.fleet.costs import InstanceCosts, Stretch, new_fit, terms_of
from thermocline.fleet.instance import Ask, Choice, Instance, InstanceState, Outcome, Regime, Why

SESSIONS_MAX = 65_536
RENTS_MAX = 4_096
HOT_ROUNDS = 2
RENT_SHARE = 0.1
"""What is owed for a prefix also grows by this share of the work done for it: so a copy is made where nobody waits."""
SESSION_SECONDS = 5.0
"""A session is evidence for so long after a request of it began: then events, or their absence, know better."""
RECENT_BOOKINGS = 32
"""The load guard remembers about so many requests per instance."""
RATE_SECONDS = 30.0
SPAN_PRIOR_SECONDS = 1.0
TRUST_FADING = 0.97
TRUST_PRIOR_TOKENS = 4096.0
TRUST_MIN, TRUST_FULL = 0.02, 0.9
REGIME_TRUST = 0.5
STREAM_SECONDS_PRIOR = 1.0
UNIT_MAX = 1e100
FADING = 0.9
FORGOTTEN_TURNS = 64
"""What an instance has shown is forgotten when it had no request among so many per instance."""
NEVER = 1 << 30


@dataclass(slots=True)
class Booking:
    """A request that was sent to the first of `choices`. The gateway hands it back; only the books change it."""

    ask: Ask
    choices: Sequence[Choice]
    work_seconds: float
    arrived: float
    streams: int
    trust: float
    booked_seconds: float
    incarnation: int
    first_at: float | None = None
    stretch: Stretch | None = None
    open: bool = True

    @property
    def choice(self) -> Choice:
        """Where it went."""
        return self.choices[0]


class Fleet:
    """The instances, their queues as booked, their learned costs. `offset` is another number in each gateway process.

    Where instances are equal, gateways with different offsets begin with different ones. `peers` says that nodes fetch
    blocks from each other; else another node's copy is only told of.
    """

    def __init__(self, *, offset: int = 0, peers: bool = False, known: Measured | None = None) -> None:
        """`known` is what a profile measured of an instance like these: where their costs begin."""
        self.peers = peers
        self._offset = offset
        self.instances: list[Instance] = []
        self.available: list[bool] = []
        # when what is booked is done; what is booked without its head; 1.0 where a late head says that more is late
        self.until: list[float] = []
        self.floor: list[float] = []
        self.late: list[float] = []
        self.base: list[float] = []  # what streams and missing seats add; infinite where nothing may be sent
        self.wait: list[float] = []  # what a second of the queue counts, and one of the next request: see `Steps`
        self.share: list[float] = []
        self.fixed: list[float] = []
        self.per_token: list[float] = []
        self.per_pair: list[float] = []  # half of the formula's c: of (N - k) * (N + k)
        self.per_loaded: tuple[list[float], ...] = ([], [], [])  # from host memory, disk and another node
        self.recent: list[float] = []  # seconds of work sent lately, in `unit`s
        self.trust: list[float] = []
        self.doubted = False  # whether any of them is below 1
        self.turns: list[int] = []
        self.unit = 1.0
        self.no_tokens: list[int] = []
        self.sessions: OrderedDict[str, tuple[int, int, float]] = OrderedDict()
        self.rents: OrderedDict[int, tuple[float, int]] = OrderedDict()  # seconds waited for a prefix, and when last
        self._common = new_fit(known)
        self._costs: list[InstanceCosts] = []
        self._weights: list[tuple[float, ...]] = []
        self._per_stream: list[float] = []
        self._waiting: list[dict[int, Booking]] = []
        self._work: list[float] = []
        self._head_since: list[float] = []
        self._first_at: list[float] = []
        self._streams: list[int] = []
        self._incarnation: list[int] = []
        self._stream_seconds: list[float] = []
        self._found: list[list[float]] = []  # tokens found cached, predicted to be, and of prompts
        self._turn = 0
        self._rated_at: float | None = None
        self._span_seconds = SPAN_PRIOR_SECONDS
        self._new_tokens = self._busy_seconds = 0.0
        self._return_seconds = 0.0

    # -- who is there --------------------------------------------------------------------------------------------------

    def join(self, instance: Instance, slot: int | None = None, now: float = 0.0) -> int:
        """A new instance, and its slot: the next one, or one that somebody has left. Books of an old one are closed.

        Its costs begin as what the fleet has shown.
        """
        assert slot is None or slot <= len(self.instances), "slots are given out in order"
        if slot is not None and slot < len(self.instances):
            self._clear(slot, now)
            if self.instances[slot].url != instance.url:
                self._costs[slot] = InstanceCosts(self._common)
                self._weigh(slot)
            self.instances[slot] = instance
            self.allow(slot, available=True)
            return slot
        costs, slot = InstanceCosts(self._common), len(self.instances)
        self.instances.append(instance)
        self.available.append(True)
        for zeros in (self.until, self.floor, self.late, self.base, self.fixed, self.per_token, self._per_stream):
            zeros.append(0.0)
        for zeros in (self.per_pair, self._work, self._head_since, self._first_at, *self.per_loaded):
            zeros.append(0.0)
        for ones in (self.wait, self.share):
            ones.append(1.0)
        mean = sum(self.recent) / slot if slot else 0.0  # one that is new has nothing to catch up with
        self.recent.append(mean + 1e-9 * self.unit * ((slot + self._offset) * 0.618_034 % 1))
        self.trust.append(1.0)
        self.turns.append(-1)
        self.no_tokens.append(0)
        self._costs.append(costs)
        self._weights.append(())
        self._waiting.append({})
        self._streams.append(0)
        self._incarnation.append(0)
        self._stream_seconds.append(STREAM_SECONDS_PRIOR)
        self._found.append([0.0, 0.0, 0.0])
        self._weigh(slot)
        return slot

    def leave(self, slot: int, now: float) -> None:
        """The instance is gone. Nothing is sent to its slot until another one joins there."""
        self._clear(slot, now)
        self.allow(slot, available=False)

    def allow(self, slot: int, *, available: bool) -> None:
        """Whether new requests may go there. Those in flight are not touched: a drain is that and waiting."""
        self.available[slot] = available
        self._settle(slot)

    # -- what is in flight ---------------------------------------------------------------------------------------------

    def book(self, ask: Ask, choices: Sequence[Choice], now: float) -> Booking:
        """Send `ask` to the first of `choices`. It counts at once, so that the next decision sees it.

        Call it in the same step as `route`, without a pause in between. `first_token` and `finished`, or `failed`, take
        the booking back.
        """
        choice = choices[0]
        slot = choice.instance
        self._sweep(slot, now)
        waiting = self._waiting[slot]
        own = choice.recompute_seconds + choice.transfer_seconds
        booked = self.booked_seconds(slot, now)
        streams, trust, incarnation = self._streams[slot], self.trust[slot], self._incarnation[slot]
        booking = Booking(ask, choices, own, now, streams, trust, booked, incarnation)
        if not waiting:
            self._head_since[slot] = now
            self._work[slot] = 0.0
        waiting[id(booking)] = booking
        self._work[slot] += booking.work_seconds
        self._settle(slot)
        self._turn += 1
        self.turns[slot] = self._turn
        if not self._turn % FORGOTTEN_TURNS:
            self._forget()
        self._remember(slot, own, now, ask.prompt_tokens - choice.cached_tokens)
        if ask.overlaps.name is not None:
            self._rent(ask.overlaps.name, choices)
        if ask.session is not None:
            self._visit(ask.session, slot, ask.prompt_tokens, now)
        return booking

    def first_token(self, booking: Booking, now: float) -> None:
        """Its first token is out: it waits no more, and is a stream that the others feel. Of streamed requests only."""
        slot = booking.choice.instance
        if not booking.ask.streamed or not self._leave(slot, booking, now):
            return
        booking.first_at = now
        self._streams[slot] += 1
        self._busy_seconds += max(0.0, now - max(booking.arrived, self._first_at[slot]))
        self._first_at[slot] = now
        booking.stretch = self._costs[slot].first_token(booking.arrived, now)
        self._settle(slot)

    def finished(self, booking: Booking, now: float, cached_tokens: int | None = None) -> Outcome:
        """It is over. `cached_tokens` as the engine reported them, where it did. What it took is learned."""
        slot, choice = booking.choice.instance, booking.choice
        if self._end(booking, now):
            if booking.first_at is not None:
                known = choice.cached_tokens if cached_tokens is None else cached_tokens
                if booking.stretch is not None:
                    terms = terms_of(booking.ask, choice, booking.streams, known)
                    costs, seconds = self._costs[slot], booking.first_at - booking.arrived
                    costs.waited(terms, booking.booked_seconds, seconds - choice.interference_seconds)
                    costs.finished(booking.stretch, terms, idle=not self._waiting[slot])
                    self._learned(slot)
                seconds = self._stream_seconds[slot]
                self._stream_seconds[slot] = FADING * seconds + (1 - FADING) * (now - booking.first_at)
            if cached_tokens is not None:
                self._found_cached(slot, booking, cached_tokens)
            self._settle(slot)
        return _outcome(booking, cached_tokens)

    def failed(self, booking: Booking, now: float) -> None:
        """It did not come to a first token, or broke off: its place is free, and nothing is learned."""
        if self._end(booking, now):
            if booking.stretch is not None:
                booking.stretch.unfinished = NEVER  # what it was made of is not known, so what the others took is not
            self._settle(booking.choice.instance)

    # -- what is read --------------------------------------------------------------------------------------------------

    def booked_seconds(self, slot: int, now: float) -> float:
        """Seconds of work that is booked there and not done, as it looks at `now`.

        A head that is late by x is expected to take as long again, as nothing else is known of it: an instance that
        hangs looks worse the longer it does.
        """
        ahead, floor = self.until[slot] - now, self.floor[slot]
        return ahead if ahead > floor else floor + self.late[slot] * (floor - ahead)

    def queue_seconds(self, slot: int, now: float) -> float:
        """How long that makes another request wait."""
        return self.wait[slot] * self.booked_seconds(slot, now)

    def utilisation(self) -> float:
        """The share of time in which a first token was waited for, per instance, over the last half a minute or so."""
        return self._busy_seconds / self._span_seconds / max(1, sum(self.available))

    def regime(self) -> Regime:
        """Whether affinity can pay now; see `Regime`."""
        found, predicted, prompt = (
            (sum(column) for column in zip(*self._found, strict=True)) if self._found else (0,) * 3
        )
        trust = min(1.0, (found + TRUST_PRIOR_TOKENS) / (predicted + TRUST_PRIOR_TOKENS))
        working_set = self._new_tokens / self._span_seconds * self._return_seconds
        capacity = float(sum(instance.capacity_tokens for instance in self.instances))
        fits = not capacity or working_set <= capacity
        reuse = found / prompt if prompt else 0.0
        return Regime(trust >= REGIME_TRUST and fits, trust, reuse, working_set, capacity)

    def snapshot(self, now: float) -> tuple[InstanceState, ...]:
        """The books at `now`, one state for each slot."""
        return tuple(
            InstanceState(
                instance=instance,
                available=self.available[slot],
                queue_seconds=self.queue_seconds(slot, now),
                waiting=len(self._waiting[slot]),
                decoding=self._streams[slot],
                requests=len(self._waiting[slot]) + self._streams[slot],
                recent_seconds=self.recent[slot] / self.unit,
                token_seconds=self.per_token[slot],
                trust=self.trust[slot],
            )
            for slot, instance in enumerate(self.instances)
        )

    def in_flight(self, slot: int) -> int:
        """Requests that were sent there and are not over."""
        return len(self._waiting[slot]) + self._streams[slot]

    def check_integrity(self) -> None:
        """What is booked is the sum of the bookings, and nothing is negative."""
        for slot, waiting in enumerate(self._waiting):
            booked = sum(booking.work_seconds for booking in waiting.values())
            assert math.isclose(self._work[slot], booked, abs_tol=1e-6), (slot, self._work[slot], booked)
            assert self._streams[slot] >= 0
            assert all(booking.open and booking.first_at is None for booking in waiting.values())
            assert self.floor[slot] >= 0

    # -- bookkeeping ---------------------------------------------------------------------------------------------------

    def _clear(self, slot: int, now: float) -> None:
        for booking in [*self._waiting[slot].values()]:
            self.failed(booking, now)
        self._incarnation[slot] += 1
        self._streams[slot] = 0
        self._found[slot] = [0.0, 0.0, 0.0]
        self.trust[slot] = 1.0
        self.doubted = min(self.trust) < 1.0
        self.recent[slot] = sum(self.recent) / len(self.recent)
        for session in [each for each, (where, _, _) in self.sessions.items() if where == slot]:
            del self.sessions[session]

    def _end(self, booking: Booking, now: float) -> bool:
        """Close a booking: False where it was closed before, or its instance is not the same any more."""
        slot, was_open = booking.choice.instance, booking.open
        booking.open = False
        if not was_open or booking.incarnation != self._incarnation[slot]:
            return False
        if booking.first_at is None:
            self._leave(slot, booking, now)
        else:
            self._streams[slot] -= 1
        return True

    def _leave(self, slot: int, booking: Booking, now: float) -> bool:
        waiting = self._waiting[slot]
        if waiting.pop(id(booking), None) is None:
            return False
        self._work[slot] = self._work[slot] - booking.work_seconds if waiting else 0.0
        self._head_since[slot] = now
        return True

    def _sweep(self, slot: int, now: float) -> None:
        """Requests whose first token nobody will tell of are taken to write when they were predicted to."""
        waiting = self._waiting[slot]
        while waiting:
            head = next(iter(waiting.values()))
            due = self._head_since[slot] + head.work_seconds
            if head.ask.streamed or now < due:
                return
            self._leave(slot, head, due)
            head.first_at = due
            self._streams[slot] += 1

    def _settle(self, slot: int) -> None:
        """Write what a decision reads of this slot."""
        waiting, streams = self._waiting[slot], self._streams[slot]
        head = next(iter(waiting.values()), None)
        work = self._work[slot]
        self.until[slot] = self._head_since[slot] + work if head else 0.0
        self.floor[slot] = max(0.0, work - head.work_seconds) if head else 0.0
        self.late[slot] = 1.0 if head and head.ask.streamed else 0.0
        seats = self.instances[slot].seats
        standing = max(0, len(waiting) + streams + 1 - seats)
        wait = standing * self._stream_seconds[slot] / seats
        extra = self._per_stream[slot] * streams + wait
        self.base[slot] = extra if self.available[slot] else math.inf
        steps = self._costs[slot].steps
        self.wait[slot], self.share[slot] = steps.wait, steps.behind if head else 1.0

    def _forget(self) -> None:
        """One that was dear once gets nothing, so nobody would notice that it is not any more: give it another try."""
        for slot, turn in enumerate(self.turns):
            if self._turn - turn > FORGOTTEN_TURNS * len(self.turns) and self._costs[slot].observations:
                self._costs[slot] = InstanceCosts(self._common)
                self._weigh(slot)
                self._settle(slot)

    def _learned(self, slot: int) -> None:
        """What one instance has shown is news of those that have not shown enough themselves, too."""
        if self._costs[slot].weights is not self._weights[slot]:
            for each in range(len(self.instances)):
                self._weigh(each)

    def _weigh(self, slot: int) -> None:
        weights = self._costs[slot].weights
        if weights is self._weights[slot]:
            return
        self._weights[slot] = weights
        fixed, per_token, per_pair, self._per_stream[slot], *loads = weights
        self.fixed[slot], self.per_token[slot], self.per_pair[slot] = fixed, per_token, per_pair / 2
        for lengths, seconds in zip(self.per_loaded, loads, strict=True):
            lengths[slot] = seconds

    def _remember(self, slot: int, own_seconds: float, now: float, new_tokens: int) -> None:
        """What was sent lately, counted in requests for the guard and in seconds for rates; older ones fade."""
        self.unit *= 1 + 1 / (RECENT_BOOKINGS * len(self.instances))
        if self.unit > UNIT_MAX:
            self.recent = [seconds / self.unit for seconds in self.recent]
            self.unit = 1.0
        self.recent[slot] += own_seconds * self.unit
        passed = 0.0 if self._rated_at is None else max(0.0, now - self._rated_at)
        kept = math.exp(-passed / RATE_SECONDS)
        self._rated_at = now
        self._new_tokens = self._new_tokens * kept + new_tokens
        self._busy_seconds *= kept
        self._span_seconds = self._span_seconds * kept + passed

    def _rent(self, name: int, choices: Sequence[Choice]) -> None:
        """Waiting where a prefix lies is rent, a copy of it elsewhere is bought by computing: see `router`.

        Only a prefix that comes at least every other round of the fleet owes any: others do not make the queue.
        """
        owed, turn = self.rents.pop(name, (0.0, -HOT_ROUNDS * len(self.instances)))
        if Why.SPILLED in choices[0].reasons:
            owed = 0.0
        elif self._turn - turn <= HOT_ROUNDS * len(self.instances):
            waited = choices[0].queue_seconds - min([choice.queue_seconds for choice in choices[1:]], default=math.inf)
            owed += max(0.0, waited) + RENT_SHARE * choices[0].recompute_seconds
        self.rents[name] = owed, self._turn
        if len(self.rents) > RENTS_MAX:
            self.rents.popitem(last=False)

    def _visit(self, session: str, slot: int, tokens: int, now: float) -> None:
        before = self.sessions.pop(session, None)
        if before is not None:
            gap = now - before[2]
            self._return_seconds = FADING * self._return_seconds + (1 - FADING) * gap if self._return_seconds else gap
        elif len(self.sessions) >= SESSIONS_MAX:
            self.sessions.popitem(last=False)
        self.sessions[session] = (slot, tokens, now)

    def _found_cached(self, slot: int, booking: Booking, cached_tokens: int) -> None:
        """Compare with what was said to be held: whoever remembers instead of hearing events is wrong in time."""
        said = booking.choice.cached_tokens / booking.trust
        sums = self._found[slot]
        for at, tokens in enumerate((min(float(cached_tokens), said), said, float(booking.ask.prompt_tokens))):
            sums[at] = sums[at] * TRUST_FADING + tokens
        trust = (sums[0] + TRUST_PRIOR_TOKENS) / (sums[1] + TRUST_PRIOR_TOKENS)
        self.trust[slot] = 1.0 if trust >= TRUST_FULL else max(trust, TRUST_MIN)
        self.doubted = min(self.trust) < 1.0


def _outcome(booking: Booking, cached_tokens: int | None) -> Outcome:
    choice = booking.choice
    actual = None if booking.first_at is None or not booking.ask.streamed else booking.first_at - booking.arrived
    others = [other.seconds for other in booking.choices[1:]]
    regret = max(0.0, actual - min(others)) if actual is not None and others else None
    return Outcome(choice.instance, choice.seconds, actual, choice.cached_tokens, cached_tokens, regret)
