"""Which instance a request goes to: the one whose first token is predicted to come soonest, and why.

    seconds = queue + interference + transfer + recompute

A cost with the load inside never switches between affinity and balance: a match is worth the seconds it saves, and a
queue costs the seconds it takes. Two more terms enter the ranking, not the prediction. Work counts for more than the
seconds it takes, because those who come next wait for it too. And work that was sent lately counts a little, so that
what is held everywhere takes turns, and what one instance alone holds and everybody asks for is copied to others
before that one has done all the work. (Preble, arXiv 2407.00023, trades a match against load; Dynamo's router adds the
two with fixed weights; here all are seconds, learned per instance.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import xxhash

from thermocline.errors import SettingsError
from thermocline.fleet.books import SESSION_SECONDS, Booking, Fleet
from thermocline.fleet.instance import Ask, Choice, Hint, Overlaps, Tier, Why

CHOICES_MAX = 3
"""More are not priced in parts: the gateway tries no more than these before it asks again."""
GUARD = 0.02
"""What a second of work, sent lately, counts when instances are compared."""
TIE = 1e-6
"""The same where nothing else tells them apart."""
FETCHERS_MAX = 3
"""A fetch makes all instances equal but for their queues: those with the shortest ones are looked at."""
GUARD_NEW = 0.2
EXTERNAL_MAX = 9.0
UTILISATION_MAX = 0.9
INFINITE = math.inf


class Way(NamedTuple):
    """How an instance would come by what it lacks: from which tier, how many tokens, in how many seconds."""

    tier: Tier
    loaded_tokens: int
    cached_tokens: int
    seconds: float


def route(ask: Ask, fleet: Fleet, policy: str, now: float) -> list[Choice]:
    """The best instances, best first, at most three; empty where none may take the request.

    Pure: the same books, request and time give the same answer. Raises SettingsError for an unknown policy.
    """
    ranking = _POLICIES.get(policy)
    if ranking is None:
        raise SettingsError(f"no policy {policy}", hint=f"one of {', '.join(_POLICIES)}")
    return ranking(ask, fleet, now)


def choose(ask: Ask, fleet: Fleet, policy: str, now: float) -> Booking | None:
    """Decide and book in one step, so that nothing is decided on books without this request. None: no instance."""
    choices = route(ask, fleet, policy, now)
    return fleet.book(ask, choices, now) if choices else None


# -- the default -------------------------------------------------------------------------------------------------------


def _predicted_ttft(ask: Ask, fleet: Fleet, now: float) -> list[Choice]:
    held = _held(ask, fleet, now)
    longest = max(held, default=0)
    tokens = ask.prompt_tokens
    work = 1.0 + _external(fleet)
    guard = work * (GUARD + GUARD_NEW * (1.0 - longest / max(tokens, 1)) if longest else TIE) / fleet.unit
    scores = [
        (ahead if (ahead := until - now) > floor else floor + late * (floor - ahead))
        + base
        + guard * recent
        + work * (fixed + (tokens - known) * (per_token + per_pair * (tokens + known)))
        for until, floor, late, base, recent, fixed, per_token, per_pair, known in zip(
            fleet.until,
            fleet.floor,
            fleet.late,
            fleet.base,
            fleet.recent,
            fleet.fixed,
            fleet.per_token,
            fleet.per_pair,
            held,
            strict=True,
        )
    ]
    for slot in ask.exclude:
        scores[slot] = INFINITE
    ways = _colder(ask.overlaps, fleet, tokens, held, scores, work) if ask.overlaps.host or ask.overlaps.disk else {}
    if fleet.peers:
        _fetched(ask.overlaps, fleet, tokens, held, scores, ways, work, now)
    choices = [_priced(ask, fleet, slot, held[slot], score, ways.get(slot), now) for slot, score in _best(scores)]
    return _explained(ask, fleet, choices, held, longest)


def _held(ask: Ask, fleet: Fleet, now: float) -> Sequence[int]:
    """Tokens in each instance's own cache, as far as they can be believed, with what the session says."""
    slots = len(fleet.instances)
    device = ask.overlaps.device or fleet.no_tokens
    held = device if len(device) == slots else [*device[:slots], *fleet.no_tokens[len(device) :]]
    if min(fleet.trust, default=1.0) < 1.0:
        held = [int(tokens * trust) for tokens, trust in zip(held, fleet.trust, strict=True)]
    visit = fleet.sessions.get(ask.session) if ask.session is not None else None
    if visit is not None and now - visit[2] <= SESSION_SECONDS:
        slot, tokens, _ = visit
        if held[slot] < min(tokens, ask.prompt_tokens - 1):
            held = [*held]
            held[slot] = min(tokens, ask.prompt_tokens - 1)
    return held


def _external(fleet: Fleet) -> float:
    """What a second of work costs those behind it. In an M/G/1 queue that is about utilisation / (1 - utilisation)."""
    busy = min(fleet.utilisation(), UTILISATION_MAX)
    return min(EXTERNAL_MAX, busy / (1 - busy))


def _recompute(fleet: Fleet, slot: int, tokens: int, known: int) -> float:
    new = max(tokens - known, 1)
    return fleet.fixed[slot] + new * (fleet.per_token[slot] + fleet.per_pair[slot] * (tokens + known))


def _colder(
    overlaps: Overlaps, fleet: Fleet, tokens: int, held: Sequence[int], scores: list[float], work: float
) -> dict[int, Way]:
    """Where loading from host memory or disk is quicker than computing: the way, and the better score."""
    ways: dict[int, Way] = {}
    for tier, at, lengths in ((Tier.HOST, 0, overlaps.host), (Tier.DISK, 1, overlaps.disk)):
        for slot, (length, known) in enumerate(zip(lengths, held, strict=False)):
            if length > known:
                seconds = (length - known) * fleet.per_loaded[slot][at]
                _offer(fleet, tokens, slot, known, Way(tier, length - known, length, seconds), scores, ways, work)
    return ways


def _fetched(
    overlaps: Overlaps,
    fleet: Fleet,
    tokens: int,
    held: Sequence[int],
    scores: list[float],
    ways: dict[int, Way],
    work: float,
    now: float,
) -> None:
    """The same for what another node has, on the instances with the shortest queues."""
    lengths = overlaps.disk or overlaps.host
    longest = max(lengths, default=0)
    if not longest:
        return
    source = lengths.index(longest)
    queues = [fleet.queue_seconds(slot, now) + base for slot, base in enumerate(fleet.base)]
    for slot, queue in _best(queues, FETCHERS_MAX):
        known = held[slot]
        elsewhere = fleet.instances[slot].node != fleet.instances[source].node
        if longest > known and elsewhere and queue + scores[slot] < INFINITE:
            seconds = (longest - known) * fleet.per_loaded[slot][2]
            _offer(fleet, tokens, slot, known, Way(Tier.PEER, longest - known, longest, seconds), scores, ways, work)


def _offer(
    fleet: Fleet,
    tokens: int,
    slot: int,
    known: int,
    way: Way,
    scores: list[float],
    ways: dict[int, Way],
    work: float,
) -> None:
    """Take this way where it is quicker than the best one so far. Loading delays those behind it as computing does."""
    before = ways.get(slot)
    now_cached, now_seconds = (before.cached_tokens, before.seconds) if before else (known, 0.0)
    saved = _recompute(fleet, slot, tokens, now_cached) + now_seconds
    saved -= _recompute(fleet, slot, tokens, way.cached_tokens) + way.seconds
    if saved > 0:
        scores[slot] -= work * saved
        ways[slot] = way


def _best(scores: Sequence[float], count: int = CHOICES_MAX) -> list[tuple[int, float]]:
    """The slots with the smallest scores, smallest first; those with an infinite one never."""
    left = list(scores)
    found: list[tuple[int, float]] = []
    while left and len(found) < count:
        score = min(left)
        if score == INFINITE:
            break
        slot = left.index(score)
        found.append((slot, score))
        left[slot] = INFINITE
    return found


def _priced(ask: Ask, fleet: Fleet, slot: int, known: int, score: float, way: Way | None, now: float) -> Choice:
    queue = fleet.queue_seconds(slot, now)
    interference = fleet.base[slot]
    cached = way.cached_tokens if way else known
    transfer = way.seconds if way else 0.0
    recompute = _recompute(fleet, slot, ask.prompt_tokens, cached)
    tier = way.tier if way else Tier.DEVICE if known else Tier.NONE
    return Choice(
        instance=slot,
        seconds=queue + interference + transfer + recompute,
        queue_seconds=queue,
        transfer_seconds=transfer,
        recompute_seconds=recompute,
        interference_seconds=interference,
        cached_tokens=cached,
        loaded_tokens=way.loaded_tokens if way else 0,
        tier=tier,
        reasons=(Why.RUNNER_UP,),
        score_seconds=score,
    )


def _explained(ask: Ask, fleet: Fleet, choices: list[Choice], held: Sequence[int], longest: int) -> list[Choice]:
    """Say why the first one is first, and tell it of a better copy than it has."""
    if not choices:
        return choices
    first = choices[0]
    slot = first.instance
    known = held[slot]
    if not longest and first.tier is Tier.NONE:
        reasons = [Why.NOTHING_HELD]
    elif known < longest:
        reasons = [Why.SPILLED]
    elif list(held).count(longest) > 1:
        reasons = [Why.SHARED_EQUALLY]
    else:
        reasons = [Why.LONGEST_MATCH]
    if first.loaded_tokens:
        reasons.append(Why.FETCHED if first.tier is Tier.PEER else Why.LOADED)
    device = ask.overlaps.device
    if known and (not device or slot >= len(device) or known > device[slot]):
        reasons.append(Why.SESSION)
    if fleet.trust[slot] < 1.0 and not fleet.regime().affinity:
        reasons.append(Why.LOAD_REGIME)
    hint = _hint(ask.overlaps, fleet, slot, first, held)
    choices[0] = dataclasses.replace(first, reasons=tuple(reasons), hint=hint)
    return choices


def _hint(overlaps: Overlaps, fleet: Fleet, slot: int, first: Choice, held: Sequence[int]) -> Hint | None:
    """The best copy anywhere else, where it is longer than what this instance has by itself."""
    own = first.cached_tokens if first.tier is not Tier.PEER else held[slot]
    best: tuple[int, int, Tier] | None = None
    for tier, lengths in ((Tier.DEVICE, held), (Tier.HOST, overlaps.host), (Tier.DISK, overlaps.disk)):
        longest = max(lengths, default=0)
        if longest > own:
            own = longest
            best = lengths.index(longest), longest, tier
    if best is None:
        return None
    source = fleet.instances[best[0]]
    return Hint(source.name, source.node, best[2], best[1])


# -- the others --------------------------------------------------------------------------------------------------------


def _least_loaded(ask: Ask, fleet: Fleet, now: float) -> list[Choice]:
    """Fewest booked seconds; of equals, the one that was sent the least lately."""
    tie = TIE / fleet.unit
    return _by(ask, fleet, [_load(fleet, slot, now) + tie * recent for slot, recent in enumerate(fleet.recent)], now)


def _session_hash(ask: Ask, fleet: Fleet, now: float) -> list[Choice]:
    """Rendezvous hashing (Thaler and Ravishankar, 1998) of the session. One without a session goes by load."""
    if ask.session is None:
        return _least_loaded(ask, fleet, now)
    return _by(
        ask,
        fleet,
        [
            float(-xxhash.xxh3_64_intdigest(f"{ask.session}\n{instance.name}".encode())) if available else INFINITE
            for instance, available in zip(fleet.instances, fleet.available, strict=True)
        ],
        now,
    )


def _round_robin(ask: Ask, fleet: Fleet, now: float) -> list[Choice]:
    """The one whose last turn is longest ago."""
    turns = zip(fleet.turns, fleet.available, strict=True)
    return _by(ask, fleet, [float(turn) if available else INFINITE for turn, available in turns], now)


def _load(fleet: Fleet, slot: int, now: float) -> float:
    return fleet.queue_seconds(slot, now) + fleet.base[slot]


def _by(ask: Ask, fleet: Fleet, scores: list[float], now: float) -> list[Choice]:
    for slot in ask.exclude:
        scores[slot] = INFINITE
    held = _held(ask, fleet, now)
    choices = [_priced(ask, fleet, slot, held[slot], score, None, now) for slot, score in _best(scores)]
    if choices:
        choices[0] = dataclasses.replace(choices[0], reasons=(Why.POLICY,))
    return choices


_POLICIES: dict[str, Callable[[Ask, Fleet, float], list[Choice]]] = {
    "predicted_ttft": _predicted_ttft,
    "least_loaded": _least_loaded,
    "session_hash": _session_hash,
    "round_robin": _round_robin,
}
POLICIES = tuple(_POLICIES)
"""Their names, the default first."""
