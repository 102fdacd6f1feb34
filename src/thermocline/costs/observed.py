"""The same questions asked of counters: what a running server tells of its workload, and what that answers.

Counters know how much was hit, and ours also why the rest was not. They know no distances: so which tier pays per use
is answered, and of its size only how much came to be, beyond which no room was of use so far. What they cannot say is
"unknown".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from thermocline.costs.advice import (
    DISK_PATH,
    PASSED_THROUGH,
    REDIS_URL,
    SO,
    Advice,
    Leaf,
    Line,
    Number,
    flip,
    gigabytes,
    size_line,
)
from thermocline.costs.study import Machine, Offer
from thermocline.costs.transfer import TAIL_TOKENS
from thermocline.settings import DECLARED

RECORD = "ask a node of ours beside it (--node), or give a trace (--trace) or a description (--describe)"


@dataclass(frozen=True, slots=True)
class Observed:
    """Tokens counted so far. `lost` were known once and not used, by reason; None where the server does not tell.

    `engine_tokens` were hit in the engine's own memory, `tier_tokens` in tiers. `fresh_tokens` are all that came into
    the former since the server began, computed or loaded, of prompts and answers; None where it is not told. They fit
    it where `never_full`: then nothing was pushed out. `unsure_tokens` may have been known.
    """

    source: str
    requests: float
    prompt_tokens: float
    engine_tokens: float
    tier_tokens: Mapping[str, float]
    lost: Mapping[str, float] | None
    never_full: bool
    fresh_tokens: float | None
    unsure_tokens: float = 0.0

    @property
    def hit_tokens(self) -> float:
        """Tokens that were not computed."""
        return self.engine_tokens + sum(self.tier_tokens.values())

    @property
    def ideal(self) -> float | None:
        """The share of tokens that an endless cache would have hit, if that can be told; what was hit is less."""
        if self.never_full or self.lost is not None:
            return (self.hit_tokens + sum((self.lost or {}).values())) / self.prompt_tokens
        return None


def judge(observed: Observed, machine: Machine) -> Advice:
    """Answer what counters can answer, of the mean request. Pure."""
    mean = observed.prompt_tokens / observed.requests

    def worth(tokens: float) -> float:
        return machine.prefill(int(tokens) + TAIL_TOKENS, 0) - machine.prefill(TAIL_TOKENS, int(tokens))

    asking = max(machine.overhead_seconds, machine.overhead_share * machine.prefill(max(1, int(mean)), 0))
    least, most = observed.hit_tokens / observed.prompt_tokens, observed.ideal
    reuse = _reused(worth(least * mean) > asking, None if most is None else worth(most * mean) > asking)
    unsure = worth(observed.unsure_tokens / observed.requests) > asking
    reuse = "unknown" if reuse == "no" and unsure else reuse
    flips = flip(1e-6, 1.0, lambda share: worth(share * mean) > asking)
    shares = (
        Number("hit rate now", 100 * least, "%", flips and 100 * flips, "no" if reuse == "yes" else "yes"),
        Number("hit rate of an endless cache", None if most is None else 100 * most, "%"),
    )
    why = (
        f"Of {observed.prompt_tokens:,.0f} prompt tokens {100 * least:.1f} % were not computed; asking tiers may "
        f"cost a request {1000 * asking:.1f} ms."
    )
    test = "thermocline doctor" if observed.lost is None else "thermocline why --summary"  # that one needs receipts
    leaves = [Leaf("Is there reuse?", reuse, why, shares, test)]
    verdict = {"no": "no cache", "unknown": "unknown", "yes": "tiers"}[reuse]
    paying: tuple[Offer, ...] = ()
    if reuse == "yes":
        gap = None if most is None else worth(most * mean) - worth(observed.engine_tokens / observed.requests)
        verdict, leaf = _lost(observed, None if gap is not None and gap <= asking and unsure else gap, asking)
        leaves.append(leaf)
    if verdict == "tiers" and most is not None:
        each = [_per_use(offer, machine, most * mean, worth(most * mean)) for offer in machine.offers]
        leaves += each
        paying = tuple(offer for offer, leaf in zip(machine.offers, each, strict=True) if leaf.answer != "no")
        verdict = "tiers" if paying else "engine"
    lines = () if verdict == "unknown" else tuple(_lines(observed, machine, verdict, paying))
    notes = (f"read from {observed.source}", *machine.assumptions)
    return Advice(verdict, _SO[verdict], tuple(each.tier for each in paying), tuple(leaves), lines, notes=notes)


_SO = SO | {
    "engine": "The engine's own prefix cache suffices, as far as counters tell.",
    "tiers": f"Tiers pay for each use. How large is best, counters do not tell: {RECORD}.",
    "unknown": f"Counters do not tell: {RECORD}.",
}


def _reused(least: bool, most: bool | None) -> str:  # noqa: FBT001  # one answer with what is known, and with all of it
    if least or most:
        return "yes"
    return "unknown" if most is None else "no"


def _lost(observed: Observed, gap: float | None, asking: float) -> tuple[str, Leaf]:
    verdict = "unknown" if gap is None else "tiers" if gap > asking else "engine"
    lost = sorted((observed.lost or {}).items(), key=lambda each: -each[1])
    told = ", ".join(f"{reason} {100 * tokens / observed.prompt_tokens:.1f} %" for reason, tokens in lost if tokens)
    silent = "it does not say" if observed.ideal is None else "nothing"
    answer = {"tiers": "no", "engine": "yes", "unknown": "unknown"}[verdict]
    flips_to = "yes" if verdict == "tiers" else "no"
    return verdict, Leaf(
        "Does the engine's own memory give it?",
        answer,
        f"Known once and computed again: {told or silent}.",
        (Number("seconds that tiers could save per request", gap, "s", asking, flips_to),),
        "thermocline doctor",
    )


def _per_use(offer: Offer, machine: Machine, tokens: float, gain: float) -> Leaf:
    nbytes, latency = tokens * machine.token_bytes, offer.link.latency_seconds
    loading = latency + nbytes / offer.link.bytes_per_second
    needed = nbytes / (gain - latency) if gain > latency else None
    yes = loading < gain
    return Leaf(
        f"Does {offer.tier} pay?",
        "yes, for each use; its size is unknown" if yes else "no",
        f"The mean prefix that could be hit has {tokens:,.0f} tokens: {loading:.3f} s to load over {offer.link.name} "
        f"({offer.link.evidence}: {offer.link.source}), {gain:.3f} s to compute.",
        (Number("bandwidth for one instance", offer.link.bytes_per_second, "B/s", needed, "no" if yes else "yes"),),
        "thermocline bench tiers",
    )


# -- settings ----------------------------------------------------------------------------------------------------------


def _lines(observed: Observed, machine: Machine, verdict: str, paying: Sequence[Offer]) -> Iterator[Line]:
    """What was offered, as far as it can be of use; where nothing was, the default."""
    room = {offer.tier: offer for offer in paying}
    if "host" in room:
        yield _room_line("memory_bytes", room["host"], observed, machine)
    elif paying:
        yield PASSED_THROUGH
    else:
        yield _own_line(observed, machine, verdict)
    if "disk" in room:
        yield DISK_PATH
        yield _room_line("disk_bytes", room["disk"], observed, machine)
    if "redis" in room:
        yield REDIS_URL
        yield _room_line("redis_bytes", room["redis"], observed, machine)
    if paying:
        yield Line("ttl_seconds", "none", "room is bounded anyway, and when sessions come back counters do not tell")
    if machine.instances > 1:
        policy = str(DECLARED["policy"].default)
        yield Line("policy", policy, "the default of `thermocline route`: counters do not tell which is soonest")


def _own_line(observed: Observed, machine: Machine, verdict: str) -> Line:
    """Where no tier pays: what the engine's memory is to our own engine, which has no other cache."""
    if verdict == "no cache":
        return size_line("memory_bytes", 0.0, "the least there is; vLLM needs no connector, as no tier pays")
    tokens = min(machine.device_tokens, math.inf if observed.fresh_tokens is None else observed.fresh_tokens)
    why = "the engine's memory, or all that came to be, for our own engine; vLLM needs no connector, as no tier pays"
    return size_line("memory_bytes", tokens * machine.token_bytes, why)


def _room_line(setting: str, offer: Offer, observed: Observed, machine: Machine) -> Line:
    """The size offered, or the default where none was; no more than all takes that ever came into the engine's memory.

    Of a tier that several instances share, one of them does not tell what is of use.
    """
    given = offer.capacity_bytes
    why = f"as large as was offered with --tier {offer.tier}" if given is not None else "the default"
    more = "" if given is not None else f"; --tier {offer.tier}=SIZE says what there is"
    if observed.fresh_tokens is None or (offer.shared and machine.instances > 1):
        return size_line(setting, given, f"{why}: how much would be of use is not told{more}")
    useful = observed.fresh_tokens * machine.token_bytes
    bound = f"all that was computed or loaded since it started takes {gigabytes(useful)}"
    if useful <= (float(str(DECLARED[setting].default)) if given is None else given):
        return size_line(setting, useful, f"{bound}: more was of no use")
    return size_line(setting, given, f"{why}: {bound}, and how much of it comes back is not told{more}")
