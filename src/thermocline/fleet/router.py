"""Which instance a request goes to: the one whose first token is predicted to come soonest, and why.

    seconds = queue + interference + transfer + recompute

A cost with the load inside never switches between affinity and balance: a match is worth the seconds it saves, and a
queue costs the seconds it takes (Preble, arXiv 2407.00023, and Dynamo's router weigh the same two). Three more terms
enter the ranking, and not the prediction:

- work counts for more than the seconds it takes, because those who come next wait for it too;
- work that was sent lately counts a little, so that what is held everywhere takes turns;
- waiting for a prefix that many ask for is like rent. Once as much was waited as computing it elsewhere takes, it is
  computed elsewhere, and two instances have it: at most twice the cost of knowing beforehand (ski rental, Karlin et
  al., 1988).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import xxhash

from thermocline.errors import SettingsError
from thermocline.fleet.books import SESSION_SECONDS, Booking, Fleet
from thermocline.fleet.instance import Ask, Choice, Hint, Tier, Why

CHOICES_MAX = 3
"""More are not priced in parts: the gateway tries no more than these before it asks again."""
GUARD, GUARD_NEW = 0.01, 0.8
"""What a second of work that was sent lately counts, and what more, times s (1 - s)^3 where a share s of the prompt is
held somewhere: that is most where a conversation begins behind a system prompt. It will stay where it is sent now."""
TIE = 1e-6
"""The same for `least_loaded`: where nothing else tells instances apart."""
FETCHERS_MAX = 3
"""A fetch makes all instances equal but for their queues: those with the shortest ones are looked at."""
EXTERNAL, EXTERNAL_MAX = 4.0, 9.0
"""Work weighs 1 + EXTERNAL * u / (1 - u) at utilisation u. u / (1 - u) is what it costs those behind it in an M/G/1
queue; the rest stands for answers that stall and for what is pushed out of a cache, and was found in simulated fleets:
with half of it the mean first token of the Mooncake trace is 1 % sooner, and conversations wander."""
UTILISATION_MAX = 0.9
INFINITE = math.inf
PEER = 2
NO_RENT = (0.0, 0)


class Known(NamedTuple):
    """What the slots are believed to hold of a prompt, as `Overlaps` has it; host and disk may be empty."""

    device: Sequence[int]
    host: Sequence[int]
    disk: Sequence[int]


class Way(NamedTuple):
    """How an instance comes by what it does not hold itself: up to which token, from where, in how many seconds."""

    cached_tokens: int
    tier: Tier
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
    known = _known(ask, fleet, now)
    tokens, longest = ask.prompt_tokens, max(known.device, default=0)
    external = _external(fleet)
    common = longest / tokens if tokens else 0.0
    guard = (1.0 + external) * (GUARD + GUARD_NEW * common * (1.0 - common) ** 3) / fleet.unit
    scores = [
        wait * (ahead if (ahead := until - now) > floor else floor + late * (floor - ahead))
        + base
        + guard * recent
        + (share + external) * (fixed + (tokens - held) * (per_token + per_pair * (tokens + held)))
        for wait, share, until, floor, late, base, recent, fixed, per_token, per_pair, held in zip(
            fleet.wait,
            fleet.share,
            fleet.until,
            fleet.floor,
            fleet.late,
            fleet.base,
            fleet.recent,
            fleet.fixed,
            fleet.per_token,
            fleet.per_pair,
            known.device,
            strict=True,
        )
    ]
    for tier, (warm, cold) in enumerate(((known.device, known.host), (known.host or known.device, known.disk))):
        if cold and cold != warm:
            scores = _with_loads(fleet, scores, external, warm, cold, fleet.per_loaded[tier])
    owed = fleet.rents.get(ask.overlaps.name, NO_RENT)[0] if ask.overlaps.name is not None else 0.0
    if owed:
        scores = [score + owed if held == longest else score for score, held in zip(scores, known.device, strict=True)]
    for slot in ask.exclude:
        scores[slot] = INFINITE
    ways = _fetched(fleet, known, scores, external, now) if fleet.peers else {}
    choices = [
        _priced(ask, fleet, slot, known, ways.get(slot) or _loaded(fleet, slot, known), score, now)
        for slot, score in _best(scores)
    ]
    return _explained(ask, fleet, choices, known, longest)


def _known(ask: Ask, fleet: Fleet, now: float) -> Known:
    """What is held, as far as it can be believed, with what the session says."""
    slots, overlaps = len(fleet.instances), ask.overlaps
    device, host, disk = overlaps.device or fleet.no_tokens, overlaps.host, overlaps.disk
    if len(device) != slots or fleet.doubted:
        device, host, disk = (_believed(each, fleet) for each in (device, host, disk))
    most = max(ask.prompt_tokens - 1, 0)
    if max(disk or host or device, default=0) > most:  # lengths that are known by bytes are guesses
        device, host, disk = ([min(tokens, most) for tokens in each] for each in (device, host, disk))
    visit = fleet.sessions.get(ask.session) if ask.session is not None else None
    if visit is not None and now - visit[2] <= SESSION_SECONDS:
        slot, tokens = visit[0], min(visit[1], ask.prompt_tokens - 1)
        if slot < slots and device[slot] < tokens:
            device = [*device]
            device[slot] = tokens
    return Known(device, host, disk)


def _believed(lengths: Sequence[int], fleet: Fleet) -> Sequence[int]:
    """For each slot that there is now, no more than it has proven to have of what was said to be there."""
    if not lengths:
        return lengths
    more = fleet.no_tokens[len(lengths) :]
    return [int(tokens * trust) for tokens, trust in zip([*lengths, *more], fleet.trust, strict=False)]


def _external(fleet: Fleet) -> float:
    """What a second of work costs others, in seconds."""
    busy = min(fleet.utilisation(), UTILISATION_MAX)
    return min(EXTERNAL_MAX, EXTERNAL * busy / (1 - busy))


def _recompute(fleet: Fleet, slot: int, tokens: int, known: int) -> float:
    new = max(tokens - known, 1)
    return fleet.fixed[slot] + new * (fleet.per_token[slot] + fleet.per_pair[slot] * (tokens + known))


def _gain(fleet: Fleet, slot: int, warm: int, cold: int, per_loaded: float) -> float:
    """Seconds saved by loading what lies between two depths instead of computing it: the difference of the formula."""
    return (cold - warm) * (fleet.per_token[slot] + fleet.per_pair[slot] * (cold + warm) - per_loaded)


def _with_loads(
    fleet: Fleet,
    scores: Sequence[float],
    external: float,
    warm: Sequence[int],
    cold: Sequence[int],
    loads: Sequence[float],
) -> list[float]:
    """`_gain` for all, where there is one. Loading delays those behind it as computing does, so it is weighed alike."""
    return [
        score - (share + external) * gain
        if deep > shallow and (gain := (deep - shallow) * (per_token + per_pair * (deep + shallow) - per_loaded)) > 0
        else score
        for score, share, shallow, deep, per_token, per_pair, per_loaded in zip(
            scores, fleet.share, warm, cold, fleet.per_token, fleet.per_pair, loads, strict=True
        )
    ]


def _loaded(fleet: Fleet, slot: int, known: Known) -> Way:
    """What its own node's tiers are worth to an instance."""
    depth = known.device[slot]
    tier, seconds = Tier.DEVICE if depth else Tier.NONE, 0.0
    if not (known.host or known.disk):
        return Way(depth, tier, seconds)
    for at, (name, lengths) in enumerate(((Tier.HOST, known.host), (Tier.DISK, known.disk))):
        per_loaded = fleet.per_loaded[at][slot]
        if lengths and lengths[slot] > depth and _gain(fleet, slot, depth, lengths[slot], per_loaded) > 0:
            seconds += (lengths[slot] - depth) * per_loaded
            depth, tier = lengths[slot], name
    return Way(depth, tier, seconds)


def _fetched(fleet: Fleet, known: Known, scores: list[float], external: float, now: float) -> dict[int, Way]:
    """The same for what another node has, on the instances with the shortest queues; scores get better by it."""
    lengths = known.disk or known.host
    longest = max(lengths, default=0)
    source = fleet.instances[lengths.index(longest)] if longest else None
    ways: dict[int, Way] = {}
    if source is None or not source.node:
        return ways
    queues = [INFINITE if score == INFINITE else _load(fleet, slot, now) for slot, score in enumerate(scores)]
    for slot, _ in _best(queues, FETCHERS_MAX):
        own, per_loaded = _loaded(fleet, slot, known), fleet.per_loaded[PEER][slot]
        gain = _gain(fleet, slot, own.cached_tokens, longest, per_loaded)
        if longest > own.cached_tokens and gain > 0 and fleet.instances[slot].node != source.node:
            scores[slot] -= (fleet.share[slot] + external) * gain
            seconds = own.seconds + (longest - own.cached_tokens) * per_loaded
            ways[slot] = Way(longest, Tier.PEER, seconds)
    return ways


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


def _priced(ask: Ask, fleet: Fleet, slot: int, known: Known, way: Way, score: float, now: float) -> Choice:
    cached, interference = way.cached_tokens, fleet.base[slot]
    recompute = _recompute(fleet, slot, ask.prompt_tokens, cached)
    queue = fleet.queue_seconds(slot, now) + (fleet.share[slot] - 1.0) * (recompute + way.seconds)
    return Choice(
        instance=slot,
        seconds=queue + interference + way.seconds + recompute,
        queue_seconds=queue,
        transfer_seconds=way.seconds,
        recompute_seconds=recompute,
        interference_seconds=interference,
        cached_tokens=cached,
        loaded_tokens=cached - known.device[slot],
        tier=way.tier,
        reasons=(Why.RUNNER_UP,),
        score_seconds=score,
    )


def _explained(ask: Ask, fleet: Fleet, choices: list[Choice], known: Known, longest: int) -> list[Choice]:
    """Say why the first one is first, and tell it of a better copy than it has."""
    if not choices:
        return choices
    first = choices[0]
    slot, held = first.instance, known.device[first.instance]
    if not longest and not first.cached_tokens:
        reasons = [Why.NOTHING_HELD]
    elif held < longest:
        reasons = [Why.SPILLED]
    else:
        alone = longest and known.device.count(longest) == 1
        reasons = [Why.LONGEST_MATCH if alone else Why.SHARED_EQUALLY]
    if first.loaded_tokens:
        reasons.append(Why.FETCHED if first.tier is Tier.PEER else Why.LOADED)
    device = ask.overlaps.device
    if held and (slot >= len(device) or held > device[slot]):
        reasons.append(Why.SESSION)
    if fleet.trust[slot] < 1.0 and not fleet.regime().affinity:
        reasons.append(Why.LOAD_REGIME)
    choices[0] = msgspec.structs.replace(first, reasons=tuple(reasons), hint=_hint(fleet, first, known))
    return choices


def _hint(fleet: Fleet, first: Choice, known: Known) -> Hint | None:
    """The best copy anywhere else, where it is longer than what this instance's own tiers have."""
    slot = first.instance
    if not (known.host or known.disk) and known.device[slot] == max(known.device):
        return None
    own = max(each[slot] for each in known if each)
    best: tuple[Sequence[int], Tier] | None = None
    for tier, lengths in ((Tier.DEVICE, known.device), (Tier.HOST, known.host), (Tier.DISK, known.disk)):
        longest = max(lengths, default=0)
        if longest > own:
            own, best = longest, (lengths, tier)
    if best is None:
        return None
    source = fleet.instances[best[0].index(own)]
    return Hint(source.name, source.node, best[1], own)


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
    known = _known(ask, fleet, now)
    choices = [
        _priced(ask, fleet, slot, known, _loaded(fleet, slot, known), score, now) for slot, score in _best(scores)
    ]
    if choices:
        choices[0] = msgspec.structs.replace(choices[0], reasons=(Why.POLICY,))
    return choices


_POLICIES: dict[str, Callable[[Ask, Fleet, float], list[Choice]]] = {
    "predicted_ttft": _predicted_ttft,
    "least_loaded": _least_loaded,
    "session_hash": _session_hash,
    "round_robin": _round_robin,
}
POLICIES = tuple(_POLICIES)
"""Their names, the default first."""
