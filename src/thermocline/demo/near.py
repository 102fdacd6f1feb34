"""Chapter: small hot values read from the process's own memory, beside a GET from Redis, and changes that are seen."""

from __future__ import annotations

import importlib.util
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from thermocline.clock import SystemClock, until
from thermocline.demo import local_redis
from thermocline.demo.chapter import Chapter, Claim
from thermocline.demo.screen import Screen
from thermocline.lens.figures import nbytes, seconds

SIZES = {"flag": 100, "chunk": 4_096, "blob": 8_000_000}
ROUNDS, HITS, GETS, GETS_LARGE, CHANGES = 20, 5_000, 400, 40, 50
LARGE_BYTES = 1_000_000
SEEN_SECONDS_MAX = 1.0
"""What a change elsewhere may take at most: the bound that the client states."""
CLAIM = '"state in 1.5 us instead of 40 ms"'


class Read(NamedTuple):
    """One size: seconds per read."""

    size: int
    redis: float
    memory: float


def play(screen: Screen, folder: Path) -> Chapter:
    """The same reads with redis-py and with the near client; then another client changes what was read."""
    missing = _missing()
    if missing:
        claim = Claim(CLAIM, f"not shown: {missing}", "make demo")
        return Chapter(ok=True, verdict=claim.figure, claim=claim, details={"shown": False})
    from thermocline.near.redis import PlainRedis, Redis

    screen.working("reading three sizes")
    with (
        local_redis.running(folder) as server,
        Redis.from_url(server.url) as near,
        PlainRedis.from_url(server.url) as plain,
    ):
        near.near.wait()
        reads = [_read(near, plain, name, size) for name, size in SIZES.items()]
        screen.working("changing a value elsewhere")
        seen = sorted(_seen(near, plain, turn) for turn in range(CHANGES))
    screen.worked()
    rows = [
        [nbytes(r.size), seconds(r.redis), f"{r.memory * 1e9:,.0f} ns", f"{r.redis / r.memory:,.0f}x"] for r in reads
    ]
    screen.table(["value", "GET from Redis", "GET from memory", "sooner by"], rows, right=range(1, 4))
    screen.say(
        "A value is handed over as it is, not copied, so its size does not matter. It is right for as long as the"
    )
    screen.say(
        f"server says nothing else: a change by another client was seen after {seconds(statistics.median(seen))}."
    )
    return _concluded(reads, seen)


def _missing() -> str:
    if importlib.util.find_spec("redis") is None:
        return "redis-py is not installed: pip install 'thermocline[near]'"
    return "" if local_redis.installed() else "no redis-server on this machine"


def _read(near: Any, plain: Any, name: str, size: int) -> Read:  # noqa: ANN401  # redis-py's clients
    """Of reads that memory has, the mean of the best round; of those that the server answers, the best one."""
    now, key, value = SystemClock.now, f"{name}:1", b"v" * size
    plain.set(key, value)
    near.near.link.ask("PING").result(SEEN_SECONDS_MAX)
    assert near.get(key) == value
    rounds, taken = [], []
    for _ in range(ROUNDS):
        began = now()
        for _ in range(HITS):
            near.get(key)
        rounds.append((now() - began) / HITS)
    for _ in range(GETS_LARGE if size > LARGE_BYTES else GETS):
        began = now()
        plain.get(key)
        taken.append(now() - began)
    return Read(size, min(taken), min(rounds))


def _seen(near: Any, plain: Any, turn: int) -> float:  # noqa: ANN401  # redis-py's clients
    """Seconds from before a change until a read shows it; infinity where none does in time."""
    near.get("flag:1")
    began = SystemClock.now()
    plain.set("flag:1", turn)
    shown = until(lambda: near.get("flag:1") == b"%d" % turn, SEEN_SECONDS_MAX, pause_seconds=0.0)
    return SystemClock.now() - began if shown else math.inf


def _concluded(reads: list[Read], seen: list[float]) -> Chapter:
    small, large = reads[0], reads[-1]
    ok = all(read.memory < read.redis for read in reads) and seen[-1] <= SEEN_SECONDS_MAX
    memory = " and ".join(f"{read.memory * 1e9:,.0f} ns for {nbytes(read.size)}" for read in (small, large))
    figure = f"{memory}; GET from Redis {seconds(small.redis)} and {seconds(large.redis)}"
    changes = f"the slowest of {len(seen)} changes elsewhere was seen after {seconds(seen[-1])}"
    details = {
        "memory_seconds": {read.size: read.memory for read in reads},
        "redis_seconds": {read.size: read.redis for read in reads},
        "changes_seen_seconds": {"p50": statistics.median(seen), "most": seen[-1]},
    }
    return Chapter(ok, f"{figure}; {changes}", Claim(CLAIM, figure, "thermocline bench near"), details)
