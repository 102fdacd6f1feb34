"""The rows of docs/claims.md: a claim, the command that tests it, our figure, and what has to be said about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.harness import quantity
from bench.tiers_memory import SET_BYTES

Kept = Mapping[str, Any]
"""A kept result, as JSON."""


@dataclass(frozen=True, slots=True)
class Row:
    """`figure` reads our figure from the kept result named `result`; "" where it has none, and the row is left out."""

    result: str
    claim: str
    command: str
    figure: Callable[[Kept], str]
    correction: str


def _times(found: Kept, name: str) -> str:
    row = found["details"]["ratios"][name]
    return f"{row['median']:.0f}x ({row['low']:.0f} to {row['high']:.0f})"


def _first_token(found: Kept) -> str:
    memory, disk = _times(found, "no cache / memory"), _times(found, "no cache / disk, new process")
    return f"{memory} from memory, {disk} from disk in a new process"


def _hydration(found: Kept) -> str:
    name = "memory / memcpy, 1 MiB blocks, contiguous"
    seconds = found["details"]["arms"][f"{name}: ours"]["median"] * 8e6 / SET_BYTES
    share = found["details"]["ratios"][name]["median"]
    return f"8 MB verified from memory in {quantity(seconds, 's')}, {share:.2f}x the speed of memcpy"


def _look_up(found: Kept) -> str:
    row = found["details"]["arms"]["match, plan, lease, release: all held"]
    return f"{quantity(row['median'], 's')} for 8,192 blocks among {found['details']['index_blocks']:,}"


def _nothing_reused(found: Kept) -> str:
    row = found["details"]["ratios"]["CPU time with / without the store"]
    median, low, high = (100 * (row[name] - 1) for name in ("median", "low", "high"))
    return f"{median:+.2f} % CPU time ({low:+.2f} to {high:+.2f})"


def _predicted(found: Kept) -> str:
    median, worst = (
        [check["value"] for check in found["checks"] if word in check["name"]] for word in ("median", "worst")
    )
    return f"predicted {min(median):.0f} % to {max(median):.0f} % off at the median, {max(worst):.0f} % at worst"


def _from_redis(found: Kept) -> str:
    shares = (
        found["details"]["ratios"][f"{name}: two keys per block / ours"] for name in ("64 x 256 KiB", "24 x 2048 KiB")
    )
    small, large = (f"{row['median']:.1f}x" for row in shares)
    return f"{small} the speed of two keys per block at 256 KiB, {large} at 2 MiB, and verified"


def _recovered(found: Kept) -> str:
    (name, *_) = found["details"]["arms"]
    return f"{quantity(found['details']['arms'][name]['median'], 's')} until a million blocks can be matched again"


def _after_a_restart(found: Kept) -> str:
    shown = [name for name in found["details"]["ratios"] if name.startswith("no cache / disk, new processes")]
    (over_own,) = (
        each["value"] for each in found["checks"] if each["name"].startswith("disk") and "6145" in each["name"]
    )
    return f"{_times(found, shown[-1])} from disk at 6,145 tokens, {over_own:.2f}x of vLLM's own prefix hit"


def _beside_a_peer(found: Kept) -> str:
    rows = [row for row in found["details"]["faults"] if row["fault"].startswith("stored")]
    wrong = {
        who: sum("WRONG TOKENS" in row["answers"] for row in rows if row["who"] == who)
        for who in ("thermocline", "LMCache")
    }
    ours, theirs = wrong.values()
    return f"{len(rows) // 2} kinds of damage: {ours} gave wrong tokens here, {theirs} with LMCache"


def _two_servers(found: Kept) -> str:
    rate = found["details"]["ratios"]["requests per second: predicted_ttft / round robin"]
    ours, robin = (found["details"]["policies"][name]["hit_rate"] for name in ("predicted_ttft", "round_robin"))
    ideal = found["details"]["policies"]["predicted_ttft"]["ideal_hit_rate"]
    return (
        f"{ours:.0%} of prompt tokens found cached where {ideal:.0%} could be, round robin {robin:.0%}; "
        f"{rate['median']:.2f}x round robin's requests per second ({rate['low']:.2f} to {rate['high']:.2f})"
    )


def _of_demo(chapter: str) -> Callable[[Kept], str]:
    def figure(found: Kept) -> str:
        shown = {each["name"]: each for each in found["chapters"] if each["details"].get("shown", True)}
        text: str = shown[chapter]["claim"]["figure"] if chapter in shown else ""
        return text

    return figure


CLAIMS = (
    Row(
        "ttft",
        '"14x faster time to first token"',
        "thermocline bench ttft",
        _first_token,
        "A ratio means nothing without model, length and hardware. Ours: a small model with random weights on a CPU, "
        "2,048 tokens known, 16 new. It grows with the share of the prompt that is known, and is 1 for a new prompt.",
    ),
    Row(
        "tiers",
        '"hydration drops from 40 ms to 1.5 us"',
        "thermocline bench tiers",
        _hydration,
        "8 MB in 1.5 us would be 5.3 TB/s. That figure is a key look-up; the bytes still have to be moved.",
    ),
    Row(
        "match",
        '"a look-up takes 1 to 5 ms"',
        "thermocline bench match",
        _look_up,
        "Finding the blocks is the small part, also for 131,072 tokens. Moving them is what costs.",
    ),
    Row(
        "redis-tier",
        '"Redis as a shared tier"',
        "thermocline bench redis-tier",
        _from_redis,
        "Bytes cost what the server's one core takes to move them. Where computing is quicker, nothing is sent.",
    ),
    Row(
        "recovery",
        "taken for granted: a restart is a cold start",
        "thermocline bench recovery",
        _recovered,
        "With the log in the page cache, as after a restart of the server alone. Blocks are checked when loaded.",
    ),
    Row(
        "overhead",
        '"5 to 20x faster with a cache"',
        "thermocline bench overhead",
        _nothing_reused,
        "Without reuse there is nothing to win: a cache can only cost. This is what ours costs, disk included.",
    ),
    Row(
        "ttft-vllm",
        "taken for granted: a vLLM that was restarted computes every prompt again",
        "thermocline bench ttft-vllm",
        _after_a_restart,
        "Engine and node were both ended. On a CPU computing is slow, so a ratio to no cache is larger than "
        "on a GPU; the ratio to vLLM's own hit is the harder test.",
    ),
    Row(
        "vs-lmcache",
        "taken for granted: what a KV cache loads is what was stored",
        "thermocline bench vs-lmcache",
        _beside_a_peer,
        "LMCache 0.5.6 on a CPU, as it comes: it has no checksum by default. Each prompt was asked three times.",
    ),
    Row(
        "fleet-vllm",
        "taken for granted: a router needs a session header to keep conversations where they are",
        "thermocline bench fleet-vllm",
        _two_servers,
        "Two real vLLM servers that share two cores, 24 conversations, no header. Times are predicted worse than we "
        "want with both servers busy: see the budgets.",
    ),
    Row(
        "profile",
        "taken for granted: what a prompt takes on your machine can be read off a table",
        "thermocline bench profile",
        _predicted,
        "It can be measured in a minute. First tokens of lengths and shares not asked before, on our engine, vLLM, and "
        "vLLM with a node. Our own engine computes in stretches of 512 tokens, which the formula does not follow.",
    ),
    Row(
        "demo",
        '"12.1 % -> 97.5 % hit rate"',
        "thermocline bench locality",
        _of_demo("locality"),
        "True where each instance's cache holds just its share of the prefixes. With room to spare round robin warms "
        "every instance, and finds 80 % of them.",
    ),
    Row(
        "demo",
        "taken for granted: an instance that dies takes its requests and its conversations' context with it",
        "thermocline demo",
        _of_demo("fleet"),
        "A request is tried elsewhere as long as nothing of its answer was sent. What the instance held is computed "
        "again.",
    ),
    Row(
        "demo",
        '"100 agent steps without a cache recompute 60,000 tokens"',
        "thermocline demo",
        _of_demo("agent"),
        "Every engine caches within a request. What is lost is what lies between two requests, and only that is saved.",
    ),
    Row(
        "demo",
        '"95 % hit rate"',
        "thermocline demo",
        _of_demo("planted"),
        "A hit rate belongs to a traffic, not to a cache: one timestamp at the top of a prompt makes it zero.",
    ),
    Row(
        "demo",
        '"expect a hit rate of 80 %"',
        "thermocline demo",
        _of_demo("advised"),
        "A hit rate belongs to a size and a traffic. Both are read off what runs; a real store hits what was told.",
    ),
    Row(
        "demo",
        '"why is my hit rate 30 %?"',
        "thermocline why --summary",
        _of_demo("summary"),
        "No peer says why a block was missing. Here every token that was computed has one reason, and they add up.",
    ),
    Row(
        "demo",
        '"state in 1.5 us instead of 40 ms"',
        "thermocline bench near",
        _of_demo("near"),
        "1.5 us is no feat: a dict takes 0.04. A small GET takes 0.04 ms, not 40; what memory saves of it is latency "
        "of a request. The GPU computes others meanwhile: no throughput or cost follows.",
    ),
    Row(
        "demo",
        "taken for granted: when the shared cache hangs, so do requests",
        "thermocline demo",
        _of_demo("frozen"),
        "The first request that finds it silent waits for its bound; the others do not ask until it is back.",
    ),
    Row(
        "demo",
        "taken for granted: when the cache daemon dies, so does the engine",
        "make vllm demo",
        _of_demo("vllm"),
        "Without the node, prompts are computed. What it held in memory only is gone; what was on its disk is not.",
    ),
    Row(
        "demo",
        "taken for granted: a hit returns what was saved",
        "thermocline demo",
        _of_demo("damage"),
        "Peers check a length, or nothing, by default. Every block is verified here, on the copy that is used.",
    ),
    Row(
        "demo",
        "taken for granted: a cache on disk survives a crash",
        "thermocline demo",
        _of_demo("crash"),
        "The process was killed, not the power cut. What was not yet called durable may be gone, and is then a miss.",
    ),
)
