"""Which tiers, how large, kept how long, routed how: five questions, and every answer follows from a trace's numbers.

    1 reuse     would an endless cache that costs nothing to read save more than asking it costs?     no: no KV cache
    2 engine    does the engine's own memory save that already, or in another order?                  yes: no tiers
    3 tiers     which tiers, at which sizes, gain most: seconds saved, less what they cost
    4 routing   with several instances, which policy has the soonest first tokens?
    5 keeping   eviction beside an oracle's, how long a block stays, and when sessions come back

How sure an answer is, is said with it: the numbers that decide, and the value of each at which it would be another one.
There is no threshold but costs: `study.py` says what is added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from thermocline.costs.reuse import Reuse, analyse
from thermocline.costs.study import Floats, Machine, Offer, Sized, Study, by_prefix, oracle_hit
from thermocline.costs.trace import Trace
from thermocline.settings import DECLARED

POLICIES = ("predicted_ttft", "session_hash", "least_loaded", "round_robin")
"""Of the setting `policy`, the default first."""
RATES = (0.5, 2.0)
"""Other paces of arrivals, at which it is seen whether another policy is sooner."""
BISECTIONS = 32


@dataclass(frozen=True, slots=True)
class Routed:
    """What came of a policy: seconds to each first token, share of tokens hit, busiest over mean instance."""

    policy: str
    seconds: Floats
    hit: float
    imbalance: float

    @property
    def mean_seconds(self) -> float:
        """The mean time to a first token."""
        return float(self.seconds.mean())

    def beaten_by(self, other: Routed) -> bool:
        """True where the other one is sooner, by twice the standard error of the differences of like requests."""
        sooner = self.seconds - other.seconds
        return float(sooner.mean()) > 2 * float(sooner.std()) / math.sqrt(len(sooner))


Spread = Callable[[Study, int, str, float], Routed]
"""Replays a study's trace: blocks of each instance, policy, pace of arrivals. See `lens/spread.py`."""


class Number(msgspec.Struct, frozen=True):
    """A number that decides. At `flips_at` the answer would be `flips_to`; None: no value of it changes the answer."""

    name: str
    value: float | None
    unit: str = ""
    flips_at: float | None = None
    flips_to: str = ""


class Leaf(msgspec.Struct, frozen=True):
    """One question's answer. `test` is a command that shows on the user's machine whether it holds."""

    question: str
    answer: str
    why: str
    numbers: tuple[Number, ...]
    test: str


class Line(msgspec.Struct, frozen=True):
    """A setting, its value as TOML has it, and the reason."""

    setting: str
    value: str | float
    reason: str


class Advice(msgspec.Struct, frozen=True):
    """`verdict` is "no cache", "engine", "sort", "tiers" or "unknown"; `tiers` are those to have, warm to cold."""

    verdict: str
    so: str
    tiers: tuple[str, ...]
    leaves: tuple[Leaf, ...]
    lines: tuple[Line, ...] = ()
    inputs: tuple[Number, ...] = ()
    notes: tuple[str, ...] = ()


# -- the tree ----------------------------------------------------------------------------------------------------------

SO = {
    "no cache": "No KV cache for this workload: what repeats is worth less than asking for it.",
    "engine": "The engine's own prefix cache suffices: no further tier pays.",
    "sort": "Sort the requests by prefix, and the engine's own prefix cache suffices: no further tier pays.",
    "tiers": "Keep KV in {tiers}.",
}
_NOTES = (
    "answers are cached when their session's next turn sends them again, and not before",
    "the engine waits while it loads; where loads overlap with other work, tiers are worth more than said",
    "a saved second is worth its price where other work fills it",
    "links carry nothing else; a tier also holds what the warmer ones hold",
)

_MANY = "tiers are judged with sessions where they began; routing by overlap finds more itself, and leaves them less"


def advise(
    trace: Trace, machine: Machine, spread: Spread, *, hours: float | None = None, reorderable: bool = False
) -> Advice:
    """Answer all questions for a trace with blocks (`Trace.has_blocks`) on a machine. Pure.

    `hours` is how long it takes, where its arrivals do not tell. `reorderable` requests wait in a list, and may be sent
    in any order. `spread` is asked where there are several instances.
    """
    study, reuse = Study(trace, machine, hours), analyse(trace, ())
    tiers: tuple[Sized, ...] = ()
    policy: str | None = None
    pays, leaf = _reuse(study, reuse)
    verdict, needed, leaves = "tiers" if pays else "no cache", 0, [leaf]
    if verdict == "tiers":
        ordered = Study(by_prefix(trace, machine.instances), machine, hours) if reorderable else None
        verdict, needed, leaf = _engine(study, ordered)
        study = ordered if ordered and verdict != "engine" else study
        leaves.append(leaf)
    if verdict == "tiers":
        tiers = study.best(machine.offers)
        verdict = "tiers" if tiers else "engine"
        leaves += [_tier(study, offer, tiers) for offer in machine.offers]
    holding = max((blocks for _, blocks in tiers), default=study.device_blocks)
    if machine.instances > 1:
        policy, leaf = _routing(study, holding, spread)
        leaves.append(leaf)
    if verdict != "no cache":
        leaves.append(_keeping(study, reuse, tiers, holding))
    named = tuple(offer.tier for offer, _ in tiers)
    return Advice(
        verdict,
        SO[verdict].format(tiers=" and ".join(named)),
        named,
        tuple(leaves),
        tuple(_lines(study, reuse, tiers, policy, min(needed, study.device_blocks))),
        _inputs(study, reuse),
        (*study.trace.notes, *machine.assumptions, *_NOTES, *([_MANY] if machine.instances > 1 else [])),
    )


def flip(low: float, high: float, holds: Callable[[float], bool]) -> float | None:
    """Where between `low` and `high` an answer turns into the other one; None where it does not. By bisection."""
    first = holds(low)
    if holds(high) == first:
        return None
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) == first else (low, middle)
    return high


def _least(most: int, holds: Callable[[int], bool]) -> int | None:
    """The smallest number from 0 to `most` from which on this holds; None where it does not hold for `most`."""
    low, high = -1, most
    while holds(most) and high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high if holds(most) else None


def gigabytes(nbytes: float) -> str:
    """1,919.3 GB, 0.0229 GB; 10^9 bytes are a GB."""
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e9:.3g} GB"  # noqa: PLR2004  # a GB


def _inputs(study: Study, reuse: Reuse) -> tuple[Number, ...]:
    trace, machine = study.trace, study.machine
    return (
        Number("requests", len(trace)),
        Number("requests per second", len(trace) / study.hours / 3600),
        Number("prompt tokens per request", float(trace.input_tokens.mean()), "tokens"),
        Number("reused in the same session", 100 * reuse.within, "%"),
        Number("reused from other sessions", 100 * reuse.across, "%"),
        Number("distinct prefixes", reuse.distinct_blocks * reuse.tokens_per_block, "tokens"),
        Number("instances", machine.instances),
        Number("KV memory of an instance", machine.device_tokens, "tokens"),
        Number("KV of a token", machine.token_bytes, "B"),
        Number("price of an instance", machine.usd_per_hour, "USD/h"),
    )


def _reuse(study: Study, reuse: Reuse) -> tuple[bool, Leaf]:
    everything, overhead = study.per_hour(study.cold), study.overhead
    saved = study.saved(study.held(math.inf, shared=True))
    pays = saved > overhead
    why = (
        f"An endless cache would know {100 * reuse.ideal:.1f} % of the prompt tokens, and save {saved:,.1f} of "
        f"{everything:,.1f} s of prefill per hour; asking tiers may cost {overhead:,.1f} s."
    )
    share, least = 100 * saved / everything, 100 * overhead / everything
    flips_at = least if least <= 100 else None  # noqa: PLR2004  # per cent: no share is above all
    number = Number("prefill that reuse could save", share, "%", flips_at, "no" if pays else "yes")
    return pays, Leaf("Is there reuse?", "yes" if pays else "no", why, (number,), "thermocline why --summary")


def _engine(study: Study, ordered: Study | None) -> tuple[str, int, Leaf]:
    """The verdict so far, the blocks with which the engine's memory would suffice, and the leaf."""
    shared = any(offer.shared for offer in study.machine.offers)
    possible = study.saved(study.held(math.inf, shared=shared))

    def suffices(one: Study, blocks: float) -> bool:
        return possible - one.saved(one.held(blocks)) <= one.overhead

    used, verdict, how = study, "engine", "in the order that they come"
    if not suffices(study, study.device_blocks):
        used, verdict, how = (ordered, "sort", "sorted by prefix") if ordered else (study, "tiers", how)
        verdict = verdict if suffices(used, used.device_blocks) else "tiers"
    all_blocks = used.trace.distinct_blocks
    least = _least(all_blocks, lambda blocks: suffices(used, blocks))
    why = (
        f"Of {possible:,.1f} s per hour it saves {used.saved(used.held(used.device_blocks)):,.1f} s, {how}; "
        f"asking tiers for the rest may cost {used.overhead:,.1f} s."
    )
    number = Number(
        "KV memory of an instance",
        study.machine.device_tokens,
        "tokens",
        None if least is None else least * used.trace.tokens_per_block,
        "yes" if verdict == "tiers" else "no",
    )
    answer = {"engine": "yes", "sort": "yes, sorted by prefix", "tiers": "no"}[verdict]
    leaf = Leaf("Does the engine's own memory give it?", answer, why, (number,), "thermocline doctor")
    return verdict, all_blocks if least is None else least, leaf


def _tier(study: Study, offer: Offer, tiers: Sequence[Sized]) -> Leaf:
    others = [sized for sized in tiers if sized[0] is not offer]
    size = next((blocks for chosen, blocks in tiers if chosen is offer), 0)
    flips_to = "no" if size else "yes"

    def gain(speed: float) -> float:
        changed = replace(offer, link=replace(offer.link, bytes_per_second=speed))
        return max(study.gains(changed, others).values(), default=0.0)

    gains = study.gains(offer, others)
    tried = size or max(gains, default=0)
    most = next((blocks for blocks, gained in gains.items() if gained >= 0.9 * gains[tried] > 0), 0)
    with_it, without = study.use([*others, (offer, tried)]).hit, study.use(others).hit
    shortest, longest = _pays_from(study, offer), int(study.trace.input_tokens.max())
    never = "" if shortest else f" No prefix of up to {longest:,} tokens is loaded sooner than computed."
    best = max(gains.values(), default=0.0)
    enough, quick = study.tier_bytes(most) / 1e9, flip(1e5, 1e14, lambda speed: gain(speed) > 0)
    numbers = [
        Number("seconds saved per hour, less what it costs", best, "s", *((0.0, flips_to) if best else ())),
        Number("bandwidth for one instance", offer.link.bytes_per_second, "B/s", quick, flips_to),
        *([Number("prefix from which a load is quicker", shortest, "tokens")] if shortest else []),
        *([Number("room for nine tenths of those seconds", enough, "GB")] if size else []),
    ]
    if study.machine.usd_per_hour is not None:
        unit = {blocks: study.dollar_seconds((offer, blocks)) for blocks in gains}
        free = {blocks: gained + offer.usd_per_gb_hour * unit[blocks] for blocks, gained in gains.items()}
        dear = max((free[blocks] / unit[blocks] for blocks in gains if free[blocks] > 0 < unit[blocks]), default=None)
        numbers.append(Number("price of room", offer.usd_per_gb_hour, "USD/GB/h", dear, flips_to))
    return Leaf(
        f"Does {offer.tier} pay?",
        f"yes: {gigabytes(study.tier_bytes(size))}" if size else "no",
        f"With it {100 * with_it:.1f} % of the prompt tokens are not computed, without it {100 * without:.1f} %; over "
        f"{offer.link.name} ({offer.link.evidence}: {offer.link.source}).{never}",
        tuple(numbers),
        "thermocline why --summary" if size else "thermocline bench tiers",
    )


def _pays_from(study: Study, offer: Offer) -> float | None:
    """The shortest prefix of whole blocks that is loaded sooner than computed; None up to the longest prompt."""
    size = study.trace.tokens_per_block
    tokens = np.arange(size, int(study.trace.input_tokens.max()) + 1, size)
    quicker = np.flatnonzero(study.worth_seconds(tokens) > study.load_seconds(offer, tokens))
    return float(tokens[quicker[0]]) if len(quicker) else None


def _routing(study: Study, holding: int, spread: Spread) -> tuple[str, Leaf]:
    now = [spread(study, holding, policy, 1.0) for policy in POLICIES]
    best = _soonest(now)
    after = min((each for each in now if each is not best), key=lambda each: each.mean_seconds)
    flips: tuple[float | None, str] = None, ""
    for rate in RATES:
        found = _soonest([spread(study, holding, each.policy, rate) for each in (best, after)])
        if found.policy != best.policy:
            flips = rate, found.policy
            break
    elsewhere = study.saved(study.held(holding * study.machine.instances, shared=True)) - study.saved(
        study.held(holding)
    )
    told = "; ".join(f"{each.policy} hits {100 * each.hit:.0f} %, imbalance {each.imbalance:.2f}" for each in now)
    numbers = [Number(f"mean first token, {each.policy}", each.mean_seconds, "s") for each in now]
    return best.policy, Leaf(
        "Which routing?",
        best.policy,
        f"{len(now[0].seconds):,} requests through our router, over {study.machine.instances} instances that exist as "
        f"queues and caches: {told}.",
        (
            *numbers,
            Number("pace of arrivals", 1.0, "x", *flips),
            Number("seconds per hour that blocks of other instances would save, at most", max(0.0, elsewhere), "s"),
        ),
        f"thermocline route --policy {best.policy}",
    )


def _soonest(came: Sequence[Routed]) -> Routed:
    """The one with the soonest first tokens; the first of those that chance cannot tell from it."""
    best = min(came, key=lambda each: each.mean_seconds)
    return next(each for each in came if not each.beaten_by(best))


def _keeping(study: Study, reuse: Reuse, tiers: Sequence[Sized], holding: int) -> Leaf:
    size, oracle, room = study.trace.tokens_per_block, oracle_hit(study, holding), None
    if oracle is not None:
        room = _least(reuse.distinct_blocks, lambda blocks: _hit(study, blocks) >= oracle - 1e-9)
    half, most = reuse.wait(0.5), reuse.wait(0.99)
    places = [("the engine", study.device_blocks, False)]
    places += [(offer.tier, blocks, offer.shared) for offer, blocks in tiers]
    return Leaf(
        "What is kept, and how long?",
        "least recently used goes first; nothing expires",
        "The store has this one policy. Room is bounded, and paid for whether it is used or not, so an age limit can "
        f"only lose hits: half of them come {half:,.0f} s after the last use, 99 % within {most:,.0f} s.",
        (
            Number("hit rate, least recently used", 100 * _hit(study, holding), "%"),
            Number("hit rate of an oracle in the same room", None if oracle is None else 100 * oracle, "%"),
            Number("room of an instance", holding * size, "tokens"),
            Number("room in which there are as many hits as an oracle has", room and room * size, "tokens"),
            *(
                Number(f"an idle session stays in {name}", _stays(study, many, shared), "s")
                for name, many, shared in places
            ),
            Number("shortest age limit that loses no hit", reuse.wait(1.0), "s"),
        ),
        "thermocline why --summary",
    )


def _stays(study: Study, blocks: int, shared: bool) -> float | None:  # noqa: FBT001  # as `Offer` has it
    """Seconds until as many blocks have come in as there is room for; None: not within the trace."""
    trace, many = study.trace, 1 if shared else study.machine.instances
    new = len(trace.blocks) - float(study.held(blocks, shared=shared).sum()) / trace.tokens_per_block
    seconds = blocks * 3600 * study.hours * many / new if new > 0 else math.inf
    return seconds if seconds < trace.seconds else None


def _hit(study: Study, blocks: int) -> float:
    return float(study.held(blocks).sum() / study.trace.input_tokens.sum())


# -- settings ----------------------------------------------------------------------------------------------------------


def _lines(study: Study, reuse: Reuse, tiers: Sequence[Sized], policy: str | None, needed: int) -> Iterator[Line]:
    room = {offer.tier: study.tier_bytes(blocks) for offer, blocks in tiers}
    each = f", for each of {study.machine.instances} instances" if study.machine.instances > 1 else ""
    yield _memory_line(room, each, study.tier_bytes(needed))
    if "disk" in room:
        yield DISK_PATH
        yield size_line("disk_bytes", room["disk"], f"the size at which disk gained most{each}")
    if "redis" in room:
        longest = max(16, int(study.held(math.inf, shared=True).max(initial=0)))
        yield REDIS_URL
        yield size_line("redis_bytes", room["redis"], "the size at which a shared tier gained most")
        yield Line("redis_ttl_seconds", math.ceil(max(1.0, reuse.wait(1.0))), "no prompt came back later than this")
        yield Line("redis_prefix_tokens", longest, "the longest prefix that comes back")
        yield Line("redis_gain_min", 1, "takes all that is loaded sooner than computed, as was assumed here")
    if room:
        yield Line("ttl_seconds", "none", f"room is bounded anyway, and hits come up to {reuse.wait(1.0):,.0f} s later")
        longest_seconds = 2 * study.use(tiers).longest_load_seconds
        if longest_seconds > float(str(DECLARED["load_seconds_max"].default)):
            yield Line("load_seconds_max", math.ceil(longest_seconds), "twice the longest load that pays")
    if policy is not None:
        yield Line("policy", policy, f"for `thermocline route` before {study.machine.instances} instances")


def _memory_line(room: dict[str, float], each: str, needed_bytes: float) -> Line:
    """Our own engine has no cache but this one: where no tier pays, it keeps what the engine's memory is needed for."""
    name = "memory_bytes"
    if not room:
        why = "what is reused, for our own engine" if needed_bytes else "the least there is"
        return size_line(name, needed_bytes, f"{why}; vLLM needs no connector, as no tier pays{each}")
    if "host" in room:
        return size_line(name, room["host"], f"the size at which host memory gained most{each}")
    return PASSED_THROUGH


def size_line(setting: str, nbytes: float | None, reason: str) -> Line:
    """A setting that is a size, in whole MiB and no less than the setting takes; None is its default."""
    declared = DECLARED[setting]
    if nbytes is None:
        return Line(setting, declared.show(declared.default), reason)
    return Line(setting, f"{math.ceil(max(declared.least, nbytes) / (1 << 20))}MiB", reason)


DISK_PATH = Line("disk_path", "~/.cache/thermocline/disk", "a folder on the disk whose bandwidth was assumed")
REDIS_URL = Line("redis_url", "redis://127.0.0.1:6379/0", "name yours")
PASSED_THROUGH = size_line("memory_bytes", None, "host memory does not pay; loads and saves pass through it")
"""Lines that are the same whatever tells the workload."""
