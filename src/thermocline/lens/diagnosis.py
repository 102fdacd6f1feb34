"""What a diagnosis is made of: the closed set of conditions with what to do about each, findings, and how they read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Condition(StrEnum):
    """Everything that can be found: a closed set. The gravest come first."""

    CORRUPTION = "corruption"
    INSTANCE_DOWN = "instance down"
    TIER_DOWN = "tier down"
    LEAK = "leak"
    PREFIX_CACHE_OFF = "prefix cache off"
    NOT_WIRED = "not wired"
    KV_MEMORY_BOUND = "KV memory bound"
    TTL_TOO_SHORT = "TTL too short"
    FRONT_DIFFERS = "front differs"
    SALTED = "salted"
    LAYOUT_CHANGED = "layout changed"
    NO_OFFLOAD = "no offload"
    CAPACITY = "capacity"
    LOAD_SLOWER = "load slower than recompute"
    TIER_TOO_SLOW = "tier too slow"
    TIER_LATE = "tier late"
    SAVES_DROPPED = "saves dropped"
    SAVED_TOO_LATE = "saved too late"
    BLOCKS_TOO_LARGE = "blocks too large"
    EVENTS_MISSING = "events missing"
    EVENTS_UNUSABLE = "events unusable"
    EVENTS_MISMATCH = "events mismatch"
    EVENTS_STALE = "events stale"
    EVENTS_LOST = "events lost"
    EVENTS_LATE = "events late"
    ELSEWHERE = "recomputed elsewhere"
    ROUTED_AWAY = "routed away"
    IMBALANCE = "imbalance"
    OVERLOAD = "overload"
    IDLE_SESSIONS = "idle sessions"
    NO_REUSE = "no reuse"


ADVICE: dict[Condition, tuple[str, str, str]] = {
    Condition.CORRUPTION: (
        "bytes came back other than they were saved; they were refused and computed again",
        "stop what uses it, run `thermocline check PATH --repair`, and look after the medium (memory test, SMART)",
        "nothing: a sum that differs is proof; only where the damage arose is open",
    ),
    Condition.INSTANCE_DOWN: (
        "an instance, node or gateway does not answer, so nobody gets anything from it",
        "read its log and start it again; engines and gateways take it back by themselves",
        "it answers others: `thermocline ps` on its machine, or GET /health from the gateway's",
    ),
    Condition.TIER_DOWN: (
        "a tier failed repeatedly and is set aside; what it holds is computed again",
        "look at the tier's medium or server (mounted? full? reachable?); it is tried again by itself",
        "the breaker closes by itself within a minute or two",
    ),
    Condition.LEAK: (
        "plans are never released, so their blocks cannot leave until their time is up",
        "find the client that asks and does not release (`thermocline ps` shows leases by client), and report it",
        "loads that last longer than lease_seconds: then raise that",
    ),
    Condition.PREFIX_CACHE_OFF: (
        "vLLM computes every prompt from its first token",
        "start vLLM without --no-enable-prefix-caching",
        "prompts never share a beginning",
    ),
    Condition.NOT_WIRED: (
        "a node runs here, and the engine beside it never asks it",
        'start vLLM with --kv-transfer-config "$(thermocline vllm-config)"',
        "the node serves engines that were not looked at",
    ),
    Condition.KV_MEMORY_BOUND: (
        "there are not enough KV blocks for the requests that run: batches collapse",
        "give KV more room: fp8 KV, a shorter --max-model-len, more GPUs; tiers do not shrink what runs",
        "preemptions stop while as many requests run",
    ),
    Condition.TTL_TOO_SHORT: (
        "blocks expire before their prompts come back",
        "raise ttl_seconds above the pauses of your sessions, or leave it out: what needs room leaves anyway",
        "the same prompts are evicted for room without a time to live",
    ),
    Condition.FRONT_DIFFERS: (
        "prompts that are alike differ near their beginning, and all behind the difference is computed again",
        "move what changes (time, id, user's name) to the end of the prompt; keep tools and documents in one order",
        "the prompts are meant to be different texts",
    ),
    Condition.SALTED: (
        "every text has a salt of its own, so no request can find what another one computed",
        "send one cache_salt per tenant, not one per request",
        "each request is a tenant's only one",
    ),
    Condition.LAYOUT_CHANGED: (
        "blocks are there, but for another model, engine version or block size",
        "nothing, after a change of model or engine; else give all engines that share a node the same settings",
        "several models are asked the same on purpose, or the share falls as new blocks are made",
    ),
    Condition.NO_OFFLOAD: (
        "blocks are dropped for room, asked for again, and nothing colder keeps them",
        "add a tier: disk_path for thermocline; for vLLM a node and --kv-transfer-config (`thermocline vllm-config`)",
        "loading from the tier would be slower than computing: `thermocline advise` weighs it",
    ),
    Condition.CAPACITY: (
        "what is used again and again is larger than what the tiers hold",
        "enlarge the tier that it left (memory_bytes, disk_bytes, redis_bytes); `thermocline size` says by how much",
        "the curve of hits over capacity is flat from here on",
    ),
    Condition.LOAD_SLOWER: (
        "loading took longer than computing the same tokens would have",
        "take the tier out for this model, or make it faster; with costs_path set, what was learned outlives a restart",
        "a moment of other load on the medium: look again",
    ),
    Condition.TIER_TOO_SLOW: (
        "a tier is slower than computing, so it is passed over: it costs its room and brings nothing",
        "give the tier a faster medium or link, or take it out for this model",
        "`thermocline bench` shows the medium to be quicker than the predicted load",
    ),
    Condition.TIER_LATE: (
        "a tier does not answer by the deadline",
        "look at what else uses its medium or link; raise load_seconds_max only where computing takes longer still",
        "deadlines are kept when the machine is quiet",
    ),
    Condition.SAVES_DROPPED: (
        "blocks are not kept, as there is no room for them at the moment they are offered",
        "raise write_queue_bytes or memory_bytes, or use a quicker disk",
        "the same blocks are refused by a tier's cost, which their detail would say",
    ),
    Condition.SAVED_TOO_LATE: (
        "the same prompt comes again while its blocks are being saved",
        "send requests that begin alike one after the other once, to warm up; then at once",
        "the saves end before the next request arrives",
    ),
    Condition.BLOCKS_TOO_LARGE: (
        "most of the prompts' tokens lie behind their last whole block, which is always computed",
        "lower tokens_per_block (16 is the least), or vLLM's --block-size",
        "prompts get longer",
    ),
    Condition.EVENTS_MISSING: (
        "no KV events come, so the router guesses from what it sent",
        "set events_listen at the gateway, and the engines' KV events to it (`thermocline route --help`)",
        "the engine was restarted less than 16 requests ago",
    ),
    Condition.EVENTS_UNUSABLE: (
        "KV events come, and most of them cannot be filed",
        "start the engine with a block size that is a multiple of 16; the gateway's log says more",
        "`thermocline ps` shows its blocks growing",
    ),
    Condition.EVENTS_MISMATCH: (
        "an instance finds cached what its events do not explain",
        "give the gateway the engine's own tokenizer (tokenizer_path), chat template and salts",
        "prompts are routed by bytes on purpose",
    ),
    Condition.EVENTS_STALE: (
        "an instance does not find what its events announced",
        "give the instance a replay endpoint (replay=ENDPOINT in route_to), so that lost removals come again",
        "its cache was reset a moment ago",
    ),
    Condition.EVENTS_LOST: (
        "batches of KV events were lost on the way",
        "give the sender a replay endpoint (replay=ENDPOINT in route_to; --kv-events-config for vLLM)",
        "the sender was restarted while we listened",
    ),
    Condition.EVENTS_LATE: (
        "KV events come later than the next requests",
        "look at the sender's load and its queue of events, and at the clocks of the two machines",
        "the clocks of the two machines differ",
    ),
    Condition.ELSEWHERE: (
        "what one instance computes, another one has",
        "route by what instances hold: `thermocline route` in front of them, with its default policy",
        "the copies are wanted, as one instance could not serve all that ask for them",
    ),
    Condition.ROUTED_AWAY: (
        "the gateway's policy sends requests away from the instance that holds their prompt",
        "leave out --policy, so that the gateway chooses by predicted time to the first token",
        "the instances that hold the prompts are the busiest",
    ),
    Condition.IMBALANCE: (
        "one instance has a queue while another one has nothing to do",
        "choose by predicted time to the first token (leave out --policy): affinity that has a price spreads",
        "the queue is shorter than the instance's batch, and nobody waits in it",
    ),
    Condition.OVERLOAD: (
        "requests wait for their turn longer than they are computed, and memory is not the reason",
        "win reuse first (hit rate above), then add instances; a cache does not shorten a queue of new text",
        "a burst: look again with a longer --seconds",
    ),
    Condition.IDLE_SESSIONS: (
        "memory is full of sessions that nobody comes back to",
        "keep less: a smaller tier (ask `thermocline advise`), or a ttl_seconds; vLLM's own idle blocks give way",
        "sessions come back after longer pauses than were seen so far",
    ),
    Condition.NO_REUSE: (
        "no prompt begins like an earlier one",
        "compare two prompts that should: salt, time, id or order of tools; if none should, run without a cache",
        "traffic that was not looked at repeats itself",
    ),
}
"""Of each condition: what it is, the one next action, and what would show that it is something else."""


@dataclass(frozen=True, slots=True)
class Number:
    """One figure that a finding rests on."""

    name: str
    value: float
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Finding:
    """A condition at one place. `weight` is the share of what happens there that it costs, to put the worst first.

    `counted` is True where the numbers are the condition itself, False where they make it likely. What it means, what
    to do and what would speak against it follow from the condition: see ADVICE.
    """

    condition: Condition
    where: str
    what: str
    evidence: tuple[Number, ...]
    weight: float
    counted: bool = True
    meaning: str = field(init=False)
    action: str = field(init=False)
    refuted_by: str = field(init=False)

    def __post_init__(self) -> None:
        """What the condition means, the one next thing to do, and what would show that it is something else."""
        for name, words in zip(("meaning", "action", "refuted_by"), ADVICE[self.condition], strict=True):
            object.__setattr__(self, name, words)


@dataclass(frozen=True, slots=True)
class Unknown:
    """A question that was asked and not answered, and what the answer needs."""

    where: str
    question: str
    needs: str


@dataclass(frozen=True, slots=True)
class Times:
    """What the time of all requests went into, in seconds, by part. `of` is what the parts add up to."""

    where: str
    of: str
    seconds: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Hits:
    """Where prompt tokens came from, and why the others were computed (empty where nobody tells).

    `requests` is how many receipts say so; 0 where counters do.
    """

    where: str
    prompt_tokens: float
    by_source: tuple[tuple[str, float], ...]
    by_reason: tuple[tuple[str, float], ...] = ()
    requests: int = 0


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Findings, the gravest first; what is not known; how many tokens were reused; where the time goes.

    `so` is the one next action, or that there is none.
    """

    findings: tuple[Finding, ...]
    unknown: tuple[Unknown, ...]
    hits: tuple[Hits, ...]
    times: tuple[Times, ...]
    so: str = field(init=False)

    def __post_init__(self) -> None:
        """The action of the gravest finding."""
        object.__setattr__(self, "so", _concluded(self.findings, self.unknown))


# -- in words ----------------------------------------------------------------------------------------------------------

HEALTHY = "healthy: nothing found"
PARTLY = "nothing found in what answered; see above for what did not"
NO_METRICS = "what it counts"
"""The question of an Unknown where a source told no metrics at all."""


def render(found: Diagnosis) -> str:
    """What is reused and where the time goes; what is wrong; what is not known; the one next action."""
    lines = [line for hits in found.hits for line in _hit_lines(hits)]
    lines += [f"{each.where}: {_parts(each.seconds)} of the time of its {each.of}" for each in found.times]
    for number, finding in enumerate(found.findings, 1):
        lines += [*_blank(lines), *_finding_lines(number, finding)]
    if found.unknown:
        lines += [*_blank(lines), "unknown"]
        lines += [f"  {each.where}: {each.question}: needs {each.needs}" for each in found.unknown]
    return "\n".join([*lines, *_blank(lines), f"so: {found.so}"])


def _concluded(findings: Sequence[Finding], unknown: Iterable[Unknown]) -> str:
    if findings:
        return findings[0].action
    return PARTLY if any(each.question == NO_METRICS for each in unknown) else HEALTHY


def _blank(lines: Sequence[str]) -> list[str]:
    return [""] if lines else []


def _finding_lines(number: int, finding: Finding) -> list[str]:
    sure = "" if finding.counted else " (likely)"
    width = max(len(each.name) for each in finding.evidence)
    return [
        f"{number}. {finding.condition.upper()}{sure} at {finding.where}",
        f"   {finding.meaning}",
        *([f"   {finding.what}"] if finding.what else []),
        *(f"     {each.name:{width}}  {shown(each)}" for each in finding.evidence),
        f"   do: {finding.action}",
        f"   not so, if: {finding.refuted_by}",
    ]


def _hit_lines(hits: Hits) -> list[str]:
    found = math.fsum(tokens for _, tokens in hits.by_source)
    of = f"{hits.prompt_tokens:,.0f} prompt tokens"
    of += f" of the last {hits.requests:,} requests" if hits.requests else ""
    lines = [f"{hits.where}: {found / hits.prompt_tokens:.0%} of {of} were reused"]
    if found:
        lines[0] += f": {_parts(hits.by_source)}"
    if hits.by_reason:
        lines.append(f"  of the others: {_parts(hits.by_reason)}")
    return lines


def _parts(parts: Sequence[tuple[str, float]]) -> str:
    whole = math.fsum(value for _, value in parts)
    return ", ".join(f"{value / whole:.0%} {name}" for name, value in parts if value and whole) or "none"


def shown(number: Number) -> str:
    """A figure with its unit, as people read it."""
    if number.unit == "s":
        return f"{number.value:,.1f} s" if number.value >= 1 else f"{1e3 * number.value:.2f} ms"
    if number.unit == "share":
        return f"{number.value:.0%}"
    return f"{number.value:,.{0 if number.value == int(number.value) else 1}f}{' bytes' if number.unit else ''}"
