"""What should be true of a system in production, each item checked against what runs: pass, fail, or unknown.

A pure function of what was observed, and of the file that `thermocline profile` wrote.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from thermocline.costs.measured import Measured
from thermocline.costs.model import SURE_OBSERVATIONS
from thermocline.lens.doctor import ENOUGH
from thermocline.lens.observe import Kind, Watched
from thermocline.store.receipt import Reason

LENGTHS_MIN = 3
"""Two lengths fit any line: the third is the first that can contradict it."""
WARM_SHARE = 0.5
"""A prompt is warm when most of it was loaded."""
SCRAPE_SECONDS = 120.0
"""Prometheus reads once a minute unless told otherwise: twice that, and it cannot have been missed."""
EXTERNAL = "vllm:external_prefix_cache_queries_total"
PROFILE = "a file of `thermocline profile --write FILE`, named with --measured FILE"


class State(StrEnum):
    """What became of an item."""

    PASS = "pass"  # noqa: S105  # no password
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Checked:
    """One item. `why` has the numbers where they are known, or what is missing."""

    item: str
    state: State
    why: str


@dataclass(frozen=True, slots=True)
class Seen:
    """What the items are checked against."""

    watched: tuple[Watched, ...]
    measured: Measured | None = None

    @property
    def engines(self) -> tuple[Watched, ...]:
        """What answers requests, or keeps blocks, and tells its metrics."""
        return tuple(each for each in self.watched if each.kind in {Kind.SERVER, Kind.NODE} and each.scrapes)

    @property
    def ours(self) -> tuple[Watched, ...]:
        """Those with tiers of ours."""
        return tuple(each for each in self.engines if each.last.value("tier_capacity_bytes"))


def check(watched: Iterable[Watched], measured: Measured | None = None) -> tuple[Checked, ...]:
    """Every item, in the order in which they are worked through."""
    seen = Seen(tuple(sorted(watched, key=lambda each: (each.kind, each.name))), measured)
    return tuple(Checked(item, *ask(seen)) for item, ask in ITEMS.items())


Answer = tuple[State, str]


def _unknown(needs: str) -> Answer:
    return State.UNKNOWN, f"needs {needs}"


def _memory_profiled(seen: Seen) -> Answer:
    if seen.measured is None:
        return _unknown(PROFILE)
    told = (each for each in seen.measured.memory if (each.blocks, each.share, each.kv_bytes) != (None, None, None))
    lengths = sorted({each.context_tokens for each in told})
    if not lengths:
        return _unknown("a profile of an engine whose metrics tell KV memory, as vLLM's do: this one tells none")
    found = f"KV memory was measured at {', '.join(f'{each:,}' for each in lengths)} tokens"
    return (
        (State.PASS, found)
        if len(lengths) >= LENGTHS_MIN
        else (State.FAIL, f"{found}; {LENGTHS_MIN} lengths are needed")
    )


def _tiers(seen: Seen) -> Answer:
    if not seen.engines:
        return _unknown("a server or node that tells its metrics")
    names = sorted({tier for each in seen.ours for tier in each.last.by("tier_capacity_bytes", "tier")})
    used = _asked_elsewhere(seen)
    if names:
        return State.PASS, f"blocks are kept in {', '.join(names)}"
    return (State.PASS, f"vLLM asked its tiers for {used:,.0f} tokens") if used else (State.FAIL, "no tier was found")


def _asked_elsewhere(seen: Seen) -> float:
    """Tokens that vLLM asked some tier for, whosever it is."""
    return math.fsum(each.last.value(EXTERNAL) or 0.0 for each in seen.engines)


def _thresholds(seen: Seen) -> Answer:
    """What a tier is worth is decided from measured costs, and from how long sessions pause."""
    if not seen.ours:
        if seen.engines and not _asked_elsewhere(seen):
            return State.FAIL, "no tier, so no threshold"
        return _unknown("a node or server with tiers of ours: of others no metric tells what they take")
    missing = [tier for tier, loads in _loads(seen).items() if loads < SURE_OBSERVATIONS]
    gap = max((each.gauge("reuse_gap_max_seconds") or 0.0 for each in seen.ours), default=0.0)
    if missing:
        return _unknown(f"{SURE_OBSERVATIONS} loads from {', '.join(missing)}: until then every save is taken")
    if not gap:
        return _unknown("a prompt that comes back: no pause was seen yet")
    return State.PASS, f"by predicted cost, from measured loads and prefills; pauses of up to {gap:,.1f} s were seen"


def _loads(seen: Seen) -> dict[str, int]:
    """Requests that loaded from each tier of ours."""
    tiers = {tier for each in seen.ours for tier in each.last.by("tier_capacity_bytes", "tier")}
    used = [tier for each in seen.ours for receipt in each.receipts or () for tier in receipt.by_tier]
    return {tier: used.count(tier) for tier in sorted(tiers)}


def _monitored(seen: Seen) -> Answer:
    """Somebody else than us reads the metrics meanwhile. Who reads vLLM's or a node's, nobody counts."""
    reads = [[each.value("requests_total", route="/metrics") for each in some.scrapes] for some in seen.engines]
    counted = [
        (some, values) for some, values in zip(seen.engines, reads, strict=True) if values and None not in values
    ]
    if not counted:
        return _unknown("a server of ours, which counts who reads /metrics; or look at `up` in Prometheus")
    others = sum((values[-1] or 0.0) - (values[0] or 0.0) - (len(values) - 1) for _, values in counted)
    if others > 0:
        return State.PASS, f"others read /metrics {others:,.0f} times meanwhile"
    seconds = max(some.scrapes[-1].at_seconds - some.scrapes[0].at_seconds for some, _ in counted)
    if seconds < SCRAPE_SECONDS:
        return _unknown(f"--seconds {SCRAPE_SECONDS:.0f}: who reads /metrics once a minute was not to be seen")
    return State.FAIL, f"nobody else has read /metrics in {seconds:.0f} s: let Prometheus do it"


def _benchmarked(seen: Seen) -> Answer:
    """Measured loads beside measured prefills, per thousand tokens."""
    receipts = [each for some in seen.engines for each in some.receipts or ()]
    loads = [each for each in receipts if each.loaded_tokens and each.load_seconds]
    cold = [each for each in receipts if not each.loaded_tokens and each.prompt_tokens]
    if len(loads) < SURE_OBSERVATIONS or not cold:
        if seen.measured is not None and any(row.cached for row in seen.measured.rows):
            return State.PASS, f"a profile measured both up to {seen.measured.tokens_max:,} tokens"
        wanted = f"{SURE_OBSERVATIONS} receipts with a timed load (vLLM's have none) and one that computes all"
        return _unknown(f"{wanted}; or {PROFILE}")
    loading = 1e3 * math.fsum(each.load_seconds for each in loads) / sum(each.loaded_tokens for each in loads)
    computing = 1e3 * math.fsum(each.prefill_seconds for each in cold) / sum(each.prompt_tokens for each in cold)
    return State.PASS, f"1,000 tokens load in {1e3 * loading:,.2f} ms and are computed in {1e3 * computing:,.2f} ms"


def _eviction(seen: Seen) -> Answer:
    """Room is bounded, and what was used longest ago leaves it: an age limit is asked for where idle sessions fill it.

    As `doctor` finds them, and as `advise` has it: where sessions come back later than that, a limit only loses hits.
    """
    if not seen.ours:
        return _unknown("a node or server with tiers: vLLM's own cache drops what was used longest ago")
    ttls = [ttl for each in seen.ours if (ttl := each.gauge("ttl_seconds")) is not None]
    if len(ttls) == len(seen.ours):
        return State.PASS, f"sessions expire {', '.join(f'{ttl:,.0f} s' for ttl in ttls)} after their last use"
    unlimited = [each for each in seen.ours if each.gauge("ttl_seconds") is None]
    full = [each for each in unlimited if each.last.value("evicted_blocks_total", reason=Reason.EVICTED)]
    for each in full:
        for tier, idle in each.idle_tiers.items() if each.returns >= ENOUGH else ():
            gap = each.gauge("reuse_gap_max_seconds") or 0.0
            return (
                State.FAIL,
                f"{tier} is full of what is idle for {idle:,.0f} s, and none came back after {gap:,.0f} s",
            )
    stays = "nothing had to leave for it yet"
    if full:
        stays = "it was idle for no longer than sessions have paused"
    if any(each.returns < ENOUGH or each.gauge("reuse_gap_max_seconds") is None for each in full):
        stays = f"whether that is soon enough, {ENOUGH} receipts of prompts that found something would tell"
    return State.PASS, f"room is bounded, and what was used longest ago leaves first; {stays}"


def _first_tokens(seen: Seen) -> Answer:
    """Warm and cold requests of like length, as they were answered."""
    receipts = [each for some in seen.engines for each in some.receipts or ()]
    warm = [each for each in receipts if each.loaded_tokens > WARM_SHARE * each.prompt_tokens]
    cold = [each for each in receipts if not each.loaded_tokens]
    shortest = min((each.prompt_tokens for each in warm), default=0)
    longest = max((each.prompt_tokens for each in warm), default=0)
    cold = [each for each in cold if shortest <= each.prompt_tokens <= longest]
    if warm and cold:
        times = [statistics.median(each.load_seconds + each.prefill_seconds for each in some) for some in (warm, cold)]
        figures = f"{1e3 * times[0]:,.1f} ms with reuse, {1e3 * times[1]:,.1f} ms without"
        return (
            State.PASS,
            f"{figures} (medians of {len(warm)} and {len(cold)} requests, {shortest:,} to {longest:,} tokens)",
        )
    if seen.measured is not None and any(row.cached for row in seen.measured.rows):
        return State.PASS, f"a profile measured both up to {seen.measured.tokens_max:,} tokens"
    return _unknown(f"receipts of like prompts with and without reuse; or {PROFILE}")


ITEMS: dict[str, Callable[[Seen], Answer]] = {
    "KV memory profiled at several context lengths": _memory_profiled,
    "tiers implemented": _tiers,
    "offload thresholds defined from access patterns": _thresholds,
    "hit rates monitored": _monitored,
    "transfer benchmarked against recompute": _benchmarked,
    "session eviction configured": _eviction,
    "first tokens tested with and without reuse": _first_tokens,
}


def render(checked: Sequence[Checked]) -> str:
    """A line for each."""
    width = max(len(each.item) for each in checked)
    lines = [f"  {each.state:7}  {each.item:{width}}  {each.why}" for each in checked]
    counts = ", ".join(f"{sum(each.state is state for each in checked)} {state}" for state in State)
    return "\n".join(["checklist", *lines, f"  {counts}"])
