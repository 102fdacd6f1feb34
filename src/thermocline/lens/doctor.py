"""What is wrong, from what was observed: each finding with the numbers it rests on and the one next action.

    diagnose(watched) -> Diagnosis       a pure function of values, whatever their order

A finding is claimed only where numbers speak for it; what cannot be known is said to be unknown, with what it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from thermocline.lens.diagnosis import NO_METRICS, Condition, Diagnosis, Finding, Hits, Number, Times, Unknown
from thermocline.lens.observe import VLLM, Kind, Watched, number
from thermocline.lens.summary import ReasonShare, Summary, summarise
from thermocline.store.receipt import Reason, Receipt

MATTERS = 0.05
"""A share of prompt tokens that is worth a change. All of it won back shortens prefills by less than one in twenty,
which is about what one run of the same requests differs from the next."""

ENOUGH = round(3 / MATTERS)
"""Observations after which something that was never seen happens in less than MATTERS of all cases, with 95 %
confidence: the rule of three (Hanley and Lippman-Hand, 1983)."""

FEW = 3
"""Once is an accident and twice a chance: what speaks of requests wants so many of them. Damage wants one."""

HALF = 0.5
"""More often than not, or most of it."""

_PREEMPTED = "vllm:num_preemptions_total"
_EXTERNAL = "vllm:external_prefix_cache_queries_total"


def diagnose(watched: Iterable[Watched]) -> Diagnosis:
    """What the observations say together."""
    seen = sorted(watched, key=lambda each: (each.kind, each.name))
    said = [word for each in seen for rule in RULES[each.kind] for word in rule(each, seen)]
    untold = [Unknown(each.name, _ASKED[what], f"its {what} ({why})") for each in seen for what, why in each.untold]
    findings = _without_consequences([word for word in said if isinstance(word, Finding)])
    return Diagnosis(
        tuple(sorted(findings, key=_gravest_first)),
        tuple(
            sorted(
                {*(word for word in said if isinstance(word, Unknown)), *untold},
                key=lambda each: (each.where, each.question),
            )
        ),
        tuple(hits for each in seen if (hits := _hits(each))),
        tuple(times for each in seen if (times := _times(each))),
    )


_ASKED = {"metrics": NO_METRICS, "receipts": "why blocks are missing"}


def _gravest_first(finding: Finding) -> tuple[int, float, int, str, str]:
    at = list(Condition).index(finding.condition)
    return (min(at, _SURE_HARM), -finding.weight, at, finding.where, finding.what)


_SURE_HARM = list(Condition).index(Condition.KV_MEMORY_BOUND)
"""Conditions before this one come first whatever they cost now; the others by what they cost."""

_CONSEQUENCES = {
    Condition.TIER_DOWN: {Condition.TIER_LATE, Condition.SAVES_DROPPED, Condition.TIER_TOO_SLOW},
    Condition.PREFIX_CACHE_OFF: {Condition.OVERLOAD, Condition.NO_OFFLOAD, Condition.NOT_WIRED},
    Condition.KV_MEMORY_BOUND: {Condition.OVERLOAD, Condition.IDLE_SESSIONS},
    Condition.SALTED: {Condition.NO_REUSE},
    Condition.SAVES_DROPPED: {Condition.CAPACITY},
    Condition.EVENTS_MISSING: {Condition.ROUTED_AWAY},
    Condition.EVENTS_LOST: {Condition.EVENTS_STALE, Condition.EVENTS_MISMATCH},
    Condition.INSTANCE_DOWN: {Condition.IMBALANCE},
    Condition.TTL_TOO_SHORT: {Condition.IDLE_SESSIONS},
    Condition.LEAK: {Condition.IDLE_SESSIONS, Condition.SAVES_DROPPED},
}
"""What follows from a condition at the same place is no finding of its own."""


def _without_consequences(findings: Sequence[Finding]) -> list[Finding]:
    follows = {(each.where, other) for each in findings for other in _CONSEQUENCES.get(each.condition, ())}
    return [each for each in findings if (each.where, each.condition) not in follows]


Said = Iterator[Finding | Unknown]
Rule = Callable[[Watched, Sequence[Watched]], Said]

# -- servers and nodes of ours -----------------------------------------------------------------------------------------


def _corruption(at: Watched, _: Sequence[Watched]) -> Said:
    for tier, blocks in at.last.by("corrupt_blocks_total", "tier").items():
        if blocks:
            loaded = at.last.value("load_blocks_total", tier=tier, outcome="hit") or 0.0
            numbers = (Number("blocks that did not verify", blocks), Number("blocks that did", loaded))
            yield Finding(Condition.CORRUPTION, at.name, f"tier {tier}", numbers, 1.0)
    broken = at.last.value("vllm:corrupted_requests_total")
    if broken:
        evidence = (Number("requests with NaN in their logits", broken),)
        yield Finding(Condition.CORRUPTION, at.name, "vLLM's own answers", evidence, 1.0)


def _tier_down(at: Watched, _: Sequence[Watched]) -> Said:
    for tier, is_open in at.last.by("breaker_open", "tier").items():
        if is_open:
            failures = at.last.value("tier_failures_total", tier=tier) or 0.0
            yield Finding(Condition.TIER_DOWN, at.name, f"tier {tier}", (Number("operations failed", failures),), 1.0)


def _silent(at: Watched, _: Sequence[Watched]) -> Said:
    """A node or gateway that was named, or whose socket is there, and that does not answer."""
    for what, why in at.untold:
        if what == "metrics" and not at.scrapes:
            yield Finding(Condition.INSTANCE_DOWN, at.name, why, (Number("answers", 0.0),), 1.0)


def _leak(at: Watched, _: Sequence[Watched]) -> Said:
    expired, matches = at.counted("leases_expired_total"), at.counted("matches_total")
    if expired >= FEW:
        held = at.gauge("leases") or 0.0
        numbers = (Number("leases that ran out", expired), Number("matches", matches), Number("leases held now", held))
        yield Finding(Condition.LEAK, at.name, "", numbers, min(1.0, expired / max(1.0, matches)))


def _idle(at: Watched, _: Sequence[Watched]) -> Said:
    """What would leave next is idle for longer than anything that came back, and the tier is full of such."""
    for tier, idle in at.idle_tiers.items() if at.returns >= ENOUGH else ():
        numbers = (
            Number("idle, what leaves next", idle, "s"),
            Number("longest gap after which any came back", at.gauge("reuse_gap_max_seconds") or 0.0, "s"),
            Number("prompts that found something", at.returns),
            Number("bytes used", at.gauge("tier_used_bytes", tier=tier) or 0.0, "B"),
        )
        yield Finding(Condition.IDLE_SESSIONS, at.name, f"tier {tier}", numbers, 0.0, counted=False)


def _saves(at: Watched, _: Sequence[Watched]) -> Said:
    """Blocks that a tier was offered and did not take, for want of room or time."""
    for tier in at.last.by("save_blocks_total", "tier"):
        offered = at.counted("save_blocks_total", tier=tier)
        dropped = math.fsum(at.counted("save_blocks_total", tier=tier, outcome=how) for how in _NOT_TAKEN)
        if dropped >= max(FEW, MATTERS * offered):
            numbers = (Number("blocks not taken", dropped), Number("blocks offered", offered))
            yield Finding(Condition.SAVES_DROPPED, at.name, f"tier {tier}", numbers, dropped / offered)


_NOT_TAKEN = ("full", "late", "failed")

_OF_REASON = {
    Reason.DIVERGED: Condition.FRONT_DIFFERS,
    Reason.EVICTED: Condition.CAPACITY,
    Reason.EXPIRED: Condition.TTL_TOO_SHORT,
    Reason.OTHER_LAYOUT: Condition.LAYOUT_CHANGED,
    Reason.ELSEWHERE: Condition.ELSEWHERE,
    Reason.PENDING: Condition.SAVED_TOO_LATE,
    Reason.DECLINED: Condition.TIER_TOO_SLOW,
    Reason.NOT_ADMITTED: Condition.SAVES_DROPPED,
    Reason.LATE: Condition.TIER_LATE,
    Reason.CORRUPT: Condition.CORRUPTION,
    Reason.TIER_DOWN: Condition.TIER_DOWN,
}
BY_COST = "would take"
"""What a detail says where a tier's predicted cost was the cause, and not its room or the engine."""


def _reasons(at: Watched, _: Sequence[Watched]) -> Said:
    """Why tokens were computed: each reason that costs enough of them is a condition."""
    if at.receipts is None:
        return
    summary = summarise(_recent(at))
    tiers = set(at.last.by("tier_capacity_bytes", "tier"))
    for share in summary.by_reason:
        condition = _condition(share, tiers)
        part = share.tokens / max(1, summary.prompt_tokens)
        if condition is None or share.requests < FEW or part < MATTERS:
            continue
        if condition in {Condition.CORRUPTION, Condition.TIER_DOWN} and at.scrapes:
            continue  # the tier's own counters say it, with the tier's name
        yield Finding(condition, at.name, _such_as(share), _numbers(share, summary), part)
    yield from _seen_once(at.name, summary)


def _recent(at: Watched) -> list[Receipt]:
    """Receipts of what came while we looked, at least the last ENOUGH: what was mended is not held against it."""
    ordered = sorted(at.receipts or (), key=lambda each: (each.wall_seconds, each.request))
    since = ordered[-1].wall_seconds - at.seconds if ordered else 0.0
    meanwhile = sum(1 for each in ordered if each.wall_seconds > since)
    return ordered[-max(ENOUGH, meanwhile) :]


def _condition(share: ReasonShare, tiers: set[str]) -> Condition | None:
    if share.reason is Reason.EVICTED and tiers and len(tiers) == 1:
        return Condition.NO_OFFLOAD
    if share.reason is Reason.NOT_ADMITTED and BY_COST in share.detail:
        return Condition.TIER_TOO_SLOW
    if share.reason is Reason.DECLINED and BY_COST not in share.detail:
        return None  # the engine had its own reasons
    return _OF_REASON.get(share.reason)


def _such_as(share: ReasonShare) -> str:
    return f"{share.reason.name}, such as: {share.detail}" if share.detail else share.reason.name


def _numbers(share: ReasonShare, summary: Summary) -> tuple[Number, ...]:
    return (
        Number(f"tokens {share.reason.name}", share.tokens),
        Number("prompt tokens", summary.prompt_tokens),
        Number("requests", share.requests),
        Number("hit rate", summary.hit_rate, "share"),
    )


def _seen_once(where: str, summary: Summary) -> Said:
    """What a low hit rate is where every block is new, too short, or older than anyone remembers."""
    tokens = {share.reason: share.tokens for share in summary.by_reason}
    prompt = max(1, summary.prompt_tokens)
    numbers = (Number("prompt tokens", summary.prompt_tokens), Number("requests", summary.requests))
    if tokens.get(Reason.UNKNOWN, 0) / prompt >= MATTERS:
        yield Unknown(
            where,
            f"why {tokens[Reason.UNKNOWN]:,} tokens are missing",
            "a file of receipts (receipts_path) from the start on: what left is remembered only so long",
        )
    all_new = tokens.get(Reason.NEVER_SEEN, 0) + tokens.get(Reason.TAIL, 0) > (1 - MATTERS) * prompt
    if tokens.get(Reason.TAIL, 0) > HALF * prompt and summary.requests >= ENOUGH:
        tail = Number("tokens behind the last whole block", tokens[Reason.TAIL])
        yield Finding(Condition.BLOCKS_TOO_LARGE, where, "", (tail, *numbers), tokens[Reason.TAIL] / prompt)
    elif all_new and summary.requests >= ENOUGH:
        new = Number("tokens never seen before", tokens[Reason.NEVER_SEEN])
        yield Finding(Condition.NO_REUSE, where, "", (new, *numbers), tokens[Reason.NEVER_SEEN] / prompt)
    elif all_new and summary.requests:
        yield Unknown(where, "whether anything is reused", f"{ENOUGH} requests; there are {summary.requests}")


def _load_slower(at: Watched, _: Sequence[Watched]) -> Said:
    """Loads that were measured to take longer than computing the same tokens was predicted to, by tier."""
    by_tier: dict[str, list[Receipt]] = {}
    for each in _recent(at):
        if len(each.by_tier) == 1 and each.loaded_tokens:
            by_tier.setdefault(next(iter(each.by_tier)), []).append(each)
    for tier, some in sorted(by_tier.items()):
        loading = math.fsum(each.load_seconds for each in some)
        saved = math.fsum(each.planned_cold_seconds - each.planned_recompute_seconds for each in some)
        if len(some) >= FEW and loading > max(0.0, saved):
            numbers = (
                Number("loading took", loading, "s"),
                Number("computing the same would take", saved, "s"),
                Number("loads", len(some)),
            )
            spent = math.fsum(each.load_seconds + each.prefill_seconds for each in some)
            yield Finding(Condition.LOAD_SLOWER, at.name, f"tier {tier}", numbers, (loading - saved) / spent)


def _overload(at: Watched, _: Sequence[Watched]) -> Said:
    """Requests wait for their turn longer than they are worked on."""
    found = _times(at)
    parts = dict(found.seconds) if found else {}
    requests = _answered(at)
    waiting, working = parts.get("waiting", 0.0), parts.get("computing", 0.0) + parts.get("loading", 0.0)
    if waiting > working > 0 and requests >= FEW:
        numbers = (
            Number("waiting", waiting, "s"),
            Number("computing and loading prompts", working, "s"),
            Number("requests", requests),
        )
        yield Finding(Condition.OVERLOAD, at.name, "", numbers, waiting / math.fsum(parts.values()))


# -- vLLM --------------------------------------------------------------------------------------------------------------


def _kv_memory(at: Watched, _: Sequence[Watched]) -> Said:
    """Requests were thrown out for want of blocks, or wait while there is no room for one more like those that run."""
    preempted = at.counted(_PREEMPTED)
    full = [each for each in at.scrapes if _is_full(each.value)]
    if preempted or (len(full) >= FEW and len(full) > HALF * len(at.scrapes)):
        usage = max((each.value("vllm:kv_cache_usage_perc") or 0.0 for each in at.scrapes), default=0.0)
        numbers = (
            Number("requests preempted", preempted),
            Number("largest KV usage seen", usage, "share"),
            Number("looks that found it full with requests waiting", len(full)),
            Number("looks", len(at.scrapes)),
        )
        yield Finding(Condition.KV_MEMORY_BOUND, at.name, "", numbers, 1.0)


def _is_full(value: Callable[..., float | None]) -> bool:
    running, waiting = value("vllm:num_requests_running") or 0.0, value("vllm:num_requests_waiting") or 0.0
    return bool(waiting and running) and (value("vllm:kv_cache_usage_perc") or 0.0) >= running / (running + 1)


def _prefix_cache_off(at: Watched, _: Sequence[Watched]) -> Said:
    if at.gauge("vllm:cache_config_info", enable_prefix_caching="False"):
        tokens = at.counted("vllm:prompt_tokens_total")
        yield Finding(Condition.PREFIX_CACHE_OFF, at.name, "", (Number("prompt tokens, all computed", tokens),), 1.0)


def _residency(at: Watched, _: Sequence[Watched]) -> Said:
    """Blocks of vLLM's own were idle for longer, when they left, than anything that came back had been."""
    gaps, idle = "vllm:kv_block_reuse_gap_seconds", "vllm:kv_block_idle_before_evict_seconds"
    returns, left = at.counted(f"{gaps}_count"), at.counted(f"{idle}_count")
    if returns >= ENOUGH and left >= ENOUGH:
        longest = min(
            (number(le) for le in at.last.by(f"{gaps}_bucket", "le") if at.counted(f"{gaps}_bucket", le=le) == returns),
            default=math.inf,
        )
        mean = at.counted(f"{idle}_sum") / left
        if mean > longest:
            numbers = (
                Number("idle when they leave, on average", mean, "s"),
                Number("no block came back after more than", longest, "s"),
                Number("returns", returns),
                Number("blocks that left", left),
            )
            yield Finding(Condition.IDLE_SESSIONS, at.name, "vLLM's own memory", numbers, 0.0, counted=False)


def _not_wired(at: Watched, seen: Sequence[Watched]) -> Said:
    """A node runs beside an engine, and neither knows the other."""
    tokens = at.counted("vllm:prompt_tokens_total")
    nodes = [each for each in seen if each.kind is Kind.NODE and each.scrapes]
    idle = [each for each in nodes if not each.last.value("asked_blocks_total")]
    if at.is_vllm and tokens and nodes and idle == nodes and not at.last.value(_EXTERNAL):
        numbers = (Number("prompt tokens", tokens), Number("blocks that a node was asked for", 0.0))
        yield Finding(Condition.NOT_WIRED, at.name, f"node {nodes[0].name}", numbers, 1.0)


def _never_asked(at: Watched, _: Sequence[Watched]) -> Said:
    """Nothing is wrong with what nobody has asked anything, and nothing is known of it."""
    if at.scrapes and not at.receipts and _hits(at) is None:
        yield Unknown(at.name, "whether anything is reused", "requests: none was answered so far")


def _vllm_misses(at: Watched, seen: Sequence[Watched]) -> Said:
    """An engine counts what it finds, and does not say why it does not find the rest."""
    asked, found = at.counted("vllm:prefix_cache_queries_total"), at.counted("vllm:prefix_cache_hits_total")
    heard = any(each.events for each in seen)
    explained = heard or at.counted(_EXTERNAL) or not asked
    if at.is_vllm and not explained and found < (1 - MATTERS) * asked:
        yield Unknown(
            at.name,
            f"why {asked - found:,.0f} of {asked:,.0f} prompt tokens were not in vLLM's own cache",
            "its KV events (--events ENDPOINT), or a node, whose receipts say it",
        )


# -- gateways ----------------------------------------------------------------------------------------------------------

_WIRING = {
    "NO_EVENTS": Condition.EVENTS_MISSING,
    "UNUSABLE": Condition.EVENTS_UNUSABLE,
    "OTHER_TEXT": Condition.EVENTS_MISMATCH,
    "STALE": Condition.EVENTS_STALE,
}
"""What a gateway says of the events of an instance: see `fleet/wiring.py`, which judges after 16 requests."""


def _instances(at: Watched, _: Sequence[Watched]) -> Said:
    for each in at.instances:
        routed = at.last.value("routed_total", instance=each.name) or 0.0
        numbers = (Number("requests routed there", routed), Number("blocks known to be there", each.blocks.device))
        if each.state in {"down", "open"}:
            yield Finding(Condition.INSTANCE_DOWN, at.name, f"instance {each.name} is {each.state}", numbers, 1.0)
        elif each.wiring in _WIRING:
            yield Finding(_WIRING[each.wiring], at.name, f"instance {each.name}", numbers, 1 / len(at.instances))


def _listening(at: Watched, _: Sequence[Watched]) -> Said:
    listening, lost = at.gauge("events_listening"), at.counted("events_heard_total", stage="index", outcome="lost")
    if not listening and len(at.instances) > 1:
        numbers = (Number("instances", len(at.instances)), Number("batches of events heard", 0.0))
        yield Finding(Condition.EVENTS_MISSING, at.name, "nobody listens for KV events", numbers, 1.0)
    heard = at.counted("events_heard_total", stage="index", outcome="batches")
    if lost:
        numbers = (Number("batches lost", lost), Number("batches heard", heard))
        yield Finding(Condition.EVENTS_LOST, at.name, "", numbers, lost / (lost + heard))


def _routed_away(at: Watched, _: Sequence[Watched]) -> Said:
    """Requests that a policy without costs sent away from where their prompt was, and would have been sooner."""
    tokens = missed = requests = 0
    for each in at.decisions:
        choices = each.tries[0].choices if each.tries else ()
        if choices and each.usage is not None:
            tokens += each.usage.prompt_tokens or 0
            if "POLICY" in choices[0].reasons:
                sooner = [other.cached_tokens for other in choices if other.seconds < choices[0].seconds]
                most = max(0, max(sooner, default=0) - choices[0].cached_tokens)
                missed, requests = missed + most, requests + (most > 0)
    if requests >= FEW and missed >= MATTERS * tokens:
        numbers = (
            Number("tokens that a sooner instance held", missed),
            Number("prompt tokens", tokens),
            Number("requests sent away from them", requests),
        )
        yield Finding(Condition.ROUTED_AWAY, at.name, "", numbers, missed / max(1, tokens))


def _imbalance(at: Watched, seen: Sequence[Watched]) -> Said:
    """Most of the time one instance has nothing to do while another has a queue, and the wait could be avoided.

    It could where waiting takes longer than computing elsewhere what was found cached. Else the wait is right.
    """
    urls = {each.name: each.url for each in at.instances if each.state == "up"}
    looks = [each.by("instance_in_flight", "instance") for each in at.scrapes]
    looks = [{name: count for name, count in look.items() if name in urls} for look in looks]
    uneven = [look for look in looks if look and min(look.values()) == 0 and max(look.values()) > 1]
    if len(looks) < FEW or len(uneven) <= HALF * len(looks):
        return
    busiest = max(sorted(urls), key=lambda name: math.fsum(look.get(name, 0.0) for look in looks))
    server = next((each for each in seen if each.kind is Kind.SERVER and each.name == urls[busiest]), None)
    spent = _spent(server) if server is not None else None
    if spent is None:
        yield Unknown(at.name, f"whether others would be sooner than {busiest}, which has a queue", "its metrics")
    elif spent[0] > spent[1]:
        routed = at.counted_by("routed_total", "instance")
        numbers = (
            Number("looks at which one had nothing to do and another a queue", len(uneven)),
            Number("looks", len(looks)),
            Number(f"requests that {busiest} answered", routed.get(busiest, 0.0)),
            Number("requests answered by all", math.fsum(routed.values())),
            Number("waiting there, per request", spent[0], "s"),
            Number("computing elsewhere what it had cached", spent[1], "s"),
        )
        yield Finding(Condition.IMBALANCE, at.name, f"instance {busiest}", numbers, len(uneven) / len(looks))


def _spent(at: Watched) -> tuple[float, float] | None:
    """Seconds that a server's requests wait, and that computing what they found cached would take, for each of them."""
    times, requests = _times(at), _answered(at)
    kind = VLLM if at.is_vllm else ""
    prompt = at.counted(f"{kind}prompt_tokens_total")
    cached = at.counted(f"{kind}prompt_tokens_cached_total" if kind else "cached_tokens_total")
    if times is None or not requests or prompt <= cached:
        return None
    parts = dict(times.seconds)
    return parts["waiting"] / requests, parts["computing"] / (prompt - cached) * cached / requests


def _answered(at: Watched) -> float:
    """How many requests for text were answered."""
    if at.is_vllm:
        return at.counted("vllm:request_queue_time_seconds_count")
    routes = at.last.by("requests_total", "route")
    return math.fsum(
        at.counted("requests_total", route=route, status="200") for route in routes if "completions" in route
    )


def _fleet_reuse(at: Watched, _: Sequence[Watched]) -> Said:
    used = [each.usage for each in at.decisions if each.usage and each.usage.cached_tokens is not None]
    tokens = sum(each.prompt_tokens or 0 for each in used)
    if len(used) >= ENOUGH and not any(each.cached_tokens for each in used):
        numbers = (Number("prompt tokens", tokens), Number("of them found cached", 0.0), Number("requests", len(used)))
        yield Finding(Condition.NO_REUSE, at.name, "", numbers, 1.0)
        yield Unknown(
            at.name, "why no prompt finds anything", "receipts: engines with thermocline say where prompts part"
        )


# -- KV events ---------------------------------------------------------------------------------------------------------


def _events(at: Watched, seen: Sequence[Watched]) -> Said:
    served = [each for each in seen if each.kind is Kind.SERVER and each.seconds]
    if not at.events and served:
        numbers = (Number("batches heard", 0.0), Number("servers that answered meanwhile", len(served)))
        yield Finding(Condition.EVENTS_MISSING, at.name, "no KV event came", numbers, 1.0)
    preempted = any(each.counted(_PREEMPTED) for each in seen)  # what these computed again is memory's matter
    tiered = any(each.last.value(name) for each in seen for name in ("tier_capacity_bytes", _EXTERNAL))
    for heard in at.events or ():
        where, stored, begun = f"{at.name} {heard.name}", heard.stored, heard.texts
        dropped = Condition.CAPACITY if tiered else Condition.NO_OFFLOAD
        for condition, count, name, of, least in (
            (
                dropped,
                0 if preempted else heard.again,
                "blocks dropped before, and computed again",
                stored,
                MATTERS * stored,
            ),
            (Condition.ELSEWHERE, heard.elsewhere, "blocks that another instance held", stored, MATTERS * stored),
            (Condition.SALTED, heard.salted, "texts with a salt of their own", begun, max(ENOUGH, HALF * begun)),
            (Condition.EVENTS_UNUSABLE, heard.unreadable, "events that cannot be read", heard.batches, 1),
            (Condition.EVENTS_LOST, heard.lost, "batches lost", heard.batches, 1),
        ):
            if count >= max(least, 1 if least == 1 else FEW):
                evidence = (Number(name, count), Number("blocks stored", stored), Number("batches", heard.batches))
                yield Finding(condition, where, "", evidence, min(1.0, count / max(1, of)))
        yield from _late(at, where, heard.batches, heard.late_seconds)


def _late(at: Watched, where: str, batches: int, late_seconds: float) -> Said:
    """An event that comes later than the next one is sent: what is decided in between is decided on old news."""
    seconds = at.seconds or (at.last.at_seconds - at.scrapes[0].at_seconds if at.scrapes else 0.0)
    if batches >= FEW and seconds and late_seconds > seconds / batches:
        numbers = (
            Number("from sending to hearing", late_seconds, "s"),
            Number("from one batch to the next", seconds / batches, "s"),
            Number("batches", batches),
        )
        yield Finding(Condition.EVENTS_LATE, where, "", numbers, 1.0, counted=False)


_OURS: tuple[Rule, ...] = (_corruption, _tier_down, _leak, _idle, _saves, _reasons, _load_slower)
RULES: dict[Kind, tuple[Rule, ...]] = {
    Kind.NODE: (_silent, *_OURS),
    Kind.SERVER: (*_OURS, _overload, _kv_memory, _prefix_cache_off, _residency, _not_wired, _vllm_misses, _never_asked),
    Kind.GATEWAY: (_silent, _instances, _listening, _routed_away, _imbalance, _fleet_reuse),
    Kind.EVENTS: (_events,),
}


# -- what is shown beside ----------------------------------------------------------------------------------------------


def _hits(at: Watched) -> Hits | None:
    if at.is_vllm:
        sources = at.counted_by("vllm:prompt_tokens_cached_by_source_total", "source")
        tokens = at.counted("vllm:prompt_tokens_total")
        return Hits(at.name, tokens, tuple(sources.items())) if tokens >= 1 else None
    if at.receipts:
        summary = summarise(_recent(at))
        if not summary.prompt_tokens:
            return None
        reasons = tuple((share.reason.name, float(share.tokens)) for share in summary.by_reason if share.tokens)
        sources = {tier: float(tokens) for tier, tokens in sorted(summary.by_tier.items())}
        return Hits(at.name, summary.prompt_tokens, tuple(sources.items()), reasons, summary.requests)
    tokens = at.counted("prompt_tokens_total")
    if tokens < 1:
        return None
    found = at.counted("routed_cached_tokens_total")
    sources = at.counted_by("cached_tokens_total", "tier")
    return Hits(at.name, tokens, tuple(sources.items()) or ((("instances", found),) if found else ()))


def _times(at: Watched) -> Times | None:
    if at.is_vllm:
        names = {"waiting": "queue", "computing": "prefill", "generating": "decode"}
        parts = {part: at.counted(f"vllm:request_{name}_time_seconds_sum") for part, name in names.items()}
        return Times(at.name, "requests", tuple(parts.items())) if any(parts.values()) else None
    whole = at.counted("first_token_seconds_total")
    if not whole or at.kind is not Kind.SERVER:
        return None
    parts = {"computing": at.counted("prefill_seconds_total"), "loading": at.counted("load_seconds_total")}
    parts["matching"] = at.counted("match_seconds_total")
    rest = max(0.0, whole - math.fsum(parts.values()))
    return Times(at.name, "first tokens", (("waiting", rest), *parts.items()))
