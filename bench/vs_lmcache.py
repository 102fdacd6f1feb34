"""thermocline and LMCache 0.5.6 beside each other: the same vLLM, the same prompts, the same faults, in one run.

Three servers are asked in turns, strictly one request at a time: vLLM alone, with thermocline's node, with LMCache's
server. Both caches have memory and files on the same disk.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import lmcache
from bench.damage import Fault, Stored, files_of, frames_of, hurt
from bench.harness import CLOCK, Progress, Report, check, ratios, spread
from bench.lmcache import Lmcache
from bench.ttft_vllm import COLD, OWN, PAIR_NEW_TOKENS, PAIR_TOKENS, REST_SECONDS, asks_until_held
from bench.vllm_server import BLOCK_TOKENS, Answer, Server, connector, process_cpu_seconds, prompt, vllm_python
from tests.vllm.node import Node
from thermocline.engines import tiny
from thermocline.errors import BenchError

MIB = 1 << 20
OURS, PEER, ALONE = "thermocline", "LMCache", "vLLM alone"
CACHES = (OURS, PEER)
LENGTHS = {4 * BLOCK_TOKENS + 1: 6, 16 * BLOCK_TOKENS + 1: 4, 48 * BLOCK_TOKENS + 1: 2}
"""Tokens, all multiples of both caches' units and one more, and how many prompts of each."""
ROUNDS = 6
TRIPLES = 40
NEW_TOKENS = 16
FAULT_TOKENS = 4 * BLOCK_TOKENS + 1
SAVED_SECONDS = 2.0
"""LMCache writes its files after the answer."""
WAIT_SECONDS = 30.0
"""No client waits longer for its first token."""
ATTACHED_SECONDS = 30.0
ASKS = 3


@dataclass(slots=True)
class Seen:
    """All that is measured."""

    seconds: dict[tuple[str, str, int], list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    cache_cpu: dict[str, list[float]] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)
    partly_saved: dict[str, int] = field(default_factory=dict)
    not_held: list[str] = field(default_factory=list)

    def add(self, phase: str, who: str, length: int, answer: Answer) -> None:
        """One answer's first token. An answer that was not cached as it should be is kept under another name."""
        wanted = 0 if phase == COLD else length - 1
        name = phase if answer.cached_tokens == wanted else f"{phase}, not held"
        if name != phase:
            self.not_held.append(f"{name}: {who}, {length} tokens, {answer.cached_tokens} cached: {answer.why}")
        self.seconds.setdefault((name, who, length), []).append(answer.seconds)


@dataclass(slots=True)
class Rig:
    """What runs: both caches and three servers."""

    folder: Path
    model: Path
    node: Node
    peer: Lmcache
    servers: dict[str, Server]

    def cache(self, who: str) -> Node | Lmcache:
        """The process behind a server's connector."""
        return self.node if who == OURS else self.peer

    def start(self, who: str) -> None:
        """Start a server; `wait` for it later."""
        options: dict[str, Any] = {}
        python = vllm_python()
        if who == OURS:
            options = {"transfer": connector(self.node.socket)}
        if who == PEER:
            python = lmcache.python()
            options = {"transfer": self.peer.transfer, "environment": lmcache.ENVIRONMENT}
        self.servers[who] = Server(python, self.model, self.folder, **options)

    def ask(self, who: str, tokens: Sequence[int], count: int = 1, *, forget: bool = False) -> Answer:
        """Ask a server, after its own prefix cache was emptied if that is wanted."""
        if forget:
            self.servers[who].forget()
        CLOCK.sleep(REST_SECONDS)
        return self.servers[who].ask(tokens, count, wait_seconds=WAIT_SECONDS)

    def close(self) -> None:
        """End the servers."""
        for server in self.servers.values():
            server.close()


def run(progress: Progress) -> Report:
    """Everything once for both: misses, hits after a reset, hits after a restart of all, damaged files, dead caches."""
    seen = Seen()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tcl-bench-")))
        disk = {"disk_path": folder / "disk", "disk_bytes": 2048 * MIB}
        node = stack.enter_context(Node(folder, memory_bytes=1024 * MIB, **disk))
        peer = stack.enter_context(Lmcache(folder, folder / "lmcache"))
        rig = Rig(folder, tiny.ensure(), node, peer, {})
        stack.callback(rig.close)
        _start(rig, (ALONE, *CACHES), progress)
        expected = _first_time(rig, seen, progress)
        _after_reset(rig, seen, progress)
        _nothing_reused(rig, seen, progress)
        broken = _restart_damaged(rig, progress)
        _after_restart(rig, seen, progress)
        _damaged(rig, seen, broken, progress)
        for who in CACHES:
            _troubled(rig, who, seen, progress)
    return _report(seen, expected)


def _start(rig: Rig, names: Sequence[str], progress: Progress) -> None:
    progress(f"starting {len(names)} servers")
    for who in names:
        rig.start(who)
    for who in names:
        rig.servers[who].wait()
        for at in range(3):
            rig.ask(who, prompt(FAULT_TOKENS, 900 + at), 4)


# -- first tokens ------------------------------------------------------------------------------------------------------


def _prompts() -> list[tuple[int, list[int]]]:
    return [(length, prompt(length, 50 + number)) for length, count in LENGTHS.items() for number in range(count)]


def _first_time(rig: Rig, seen: Seen, progress: Progress) -> int:
    """Every prompt for the first time. Returns how many of them went on alike in all three."""
    same = 0
    for length, tokens in _prompts():
        progress(f"a prompt of {length} tokens for the first time")
        answers = {who: rig.ask(who, tokens, NEW_TOKENS) for who in (ALONE, *CACHES)}
        for who, answer in answers.items():
            seen.add(COLD, who, length, answer)
        same += len({answer.tokens for answer in answers.values()}) == 1
    CLOCK.sleep(SAVED_SECONDS)
    for _, tokens in _prompts():
        for who in CACHES:
            seen.partly_saved[who] = seen.partly_saved.get(who, 0) + (asks_until_held(rig.servers[who], tokens) > 1)
    return same


def _after_reset(rig: Rig, seen: Seen, progress: Progress) -> None:
    """Hits in vLLM itself, and from each cache after vLLM's own was emptied."""
    for at in range(ROUNDS):
        progress(f"after a reset: round {at + 1} of {ROUNDS}")
        for length, tokens in _prompts():
            seen.add("hit", ALONE, length, rig.ask(ALONE, tokens))
            for who in CACHES[:: 1 if at % 2 else -1]:
                seen.add("hit", who, length, rig.ask(who, tokens, forget=True))


def _after_restart(rig: Rig, seen: Seen, progress: Progress) -> None:
    """Every prompt once more: engine and cache are new, only files are left."""
    for length, tokens in _prompts():
        progress(f"after a restart: a prompt of {length} tokens")
        seen.add("restart", ALONE, length, rig.ask(ALONE, tokens))
        for who in CACHES:
            seen.add("restart", who, length, rig.ask(who, tokens))


def _nothing_reused(rig: Rig, seen: Seen, progress: Progress) -> None:
    """Three prompts that share nothing, one to each server, the first place moving on: processor time of each."""
    names = (ALONE, *CACHES)
    for at in range(TRIPLES):
        progress(f"nothing reused: {at + 1} of {TRIPLES}")
        for turn in range(len(names)):
            who = names[(at + turn) % len(names)]
            server = rig.servers[who]
            CLOCK.sleep(REST_SECONDS)
            before, cache = server.cpu_seconds(), _cache_cpu(rig, who)
            server.ask(prompt(PAIR_TOKENS, 300 + at, len(who)), PAIR_NEW_TOKENS)
            CLOCK.sleep(REST_SECONDS)
            seen.cpu.setdefault(who, []).append(server.cpu_seconds() - before)
            seen.cache_cpu.setdefault(who, []).append(_cache_cpu(rig, who) - cache)


def _cache_cpu(rig: Rig, who: str) -> float:
    return 0.0 if who == ALONE else process_cpu_seconds(rig.cache(who).pid)


# -- faults ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Broken:
    """A prompt that both caches hold, what has been done to it on disk, and what is right."""

    fault: Fault
    tokens: list[int]
    right: tuple[int, ...]
    files: list[Path] = field(default_factory=list)


def _restart_damaged(rig: Rig, progress: Progress) -> list[Broken]:
    """Save a prompt for each fault, end engines and caches, damage what lies on disk, and start all again."""
    broken = []
    for at, fault in enumerate(Fault):
        progress(f"a prompt to be damaged: {fault}")
        tokens, right = _clear_prompt(rig, 500 + 10 * at)
        before = set(rig.peer.disk.rglob("*.data"))
        for who in CACHES:
            rig.ask(who, tokens, NEW_TOKENS)
        CLOCK.sleep(SAVED_SECONDS)
        broken.append(Broken(fault, tokens, right, sorted(set(rig.peer.disk.rglob("*.data")) - before)))
    for who in CACHES:
        rig.servers.pop(who).close()
        rig.cache(who).stop()
    disk = Path(str(rig.node.settings["disk_path"]))
    _hurt_all(broken, frames_of(disk, [each.tokens for each in broken]))
    _hurt_all(broken, [files_of(each.files) for each in broken])
    for who in CACHES:
        rig.cache(who).start()
    _start(rig, CACHES, progress)
    return broken


def _clear_prompt(rig: Rig, first: int) -> tuple[list[int], tuple[int, ...]]:
    """A prompt that vLLM alone answers alike with and without its own prefix cache, and that answer.

    In bf16 a prompt that is computed in other portions may go another way where two tokens are almost equally likely.
    """
    for number in range(first, first + 10):
        tokens = prompt(FAULT_TOKENS, number)
        cold, warm = (rig.ask(ALONE, tokens, NEW_TOKENS).tokens for _ in range(2))
        if cold == warm:
            return tokens, cold
    raise BenchError("no prompt has a clear answer", hint="the model may be another one")


def _hurt_all(broken: Sequence[Broken], stored: Sequence[Sequence[Stored]]) -> None:
    """Damage the first part of each prompt. Raises BenchError where a cache has stored nothing for one."""
    if not all(stored):
        raise BenchError("a prompt was not stored on disk", hint="is the disk full?")
    for at, each in enumerate(broken):
        hurt(each.fault, stored[at][0], stored[at - 1][-1])


def _damaged(rig: Rig, seen: Seen, broken: Sequence[Broken], progress: Progress) -> None:
    """Ask for each damaged prompt, then again out of vLLM's own cache, then again out of the cache behind it."""
    for each in broken:
        for who in CACHES:
            progress(f"{each.fault}: {who}")
            answers = [rig.ask(who, each.tokens, NEW_TOKENS, forget=at != 1) for at in range(ASKS)]
            seen.faults.append(_row(f"stored: {each.fault}", who, answers, each.right))


def _troubled(rig: Rig, who: str, seen: Seen, progress: Progress) -> None:
    """The cache's process is frozen, thawed, killed and started again under a running engine."""
    tokens, right = _clear_prompt(rig, 700 + 10 * CACHES.index(who))
    rig.ask(who, tokens, NEW_TOKENS)
    CLOCK.sleep(SAVED_SECONDS)
    cache = rig.cache(who)
    for name, trouble in (
        ("frozen", cache.freeze),
        ("thawed", cache.thaw),
        ("killed", cache.kill),
        ("started again", cache.start),
    ):
        progress(f"{who} {name}")
        trouble()
        answers = []
        for _ in range(ASKS):
            answers.append(rig.ask(who, tokens, NEW_TOKENS, forget=not answers or not answers[-1].trouble))
            if answers[-1].trouble:
                break
        row = _row(f"process {name}", who, answers, right)
        if name in ("thawed", "started again"):
            row["hits_again_after_seconds"] = _hits_again(rig, who, tokens)
        seen.faults.append(row)
        if answers[-1].trouble:
            break


def _hits_again(rig: Rig, who: str, tokens: Sequence[int]) -> float | None:
    """Seconds until a hit; None where there was none for a while."""
    started = CLOCK.now()
    while CLOCK.now() < started + ATTACHED_SECONDS:
        answer = rig.ask(who, tokens, forget=True)
        if answer.trouble:
            return None
        if answer.cached_tokens:
            return CLOCK.now() - started
        CLOCK.sleep(0.2)
    return None


def _row(fault: str, who: str, answers: Sequence[Answer], right: tuple[int, ...]) -> dict[str, Any]:
    return {
        "fault": fault,
        "who": who,
        "answers": ["right" if answer.tokens == right else answer.trouble or "WRONG TOKENS" for answer in answers],
        "cached_tokens": [answer.cached_tokens for answer in answers],
        "first_token_seconds": [answer.seconds for answer in answers],
    }


# -- the report --------------------------------------------------------------------------------------------------------


def _report(seen: Seen, same: int) -> Report:
    prompts = sum(LENGTHS.values())
    wrong = [row for row in seen.faults if row["who"] == OURS and set(row["answers"]) != {"right"}]
    checks = [
        check("faults that a request of thermocline's felt", float(len(wrong)), "of all", 0.0, "lower"),
        check("same tokens in all three", float(same), f"of {prompts}", float(prompts), "higher"),
    ]
    quotients = {
        f"{phase}: {who} / {OWN}, {length} tokens": spread(ratios(taken, own))
        for phase in ("hit", "restart")
        for length in LENGTHS
        for who in CACHES
        if len(taken := seen.seconds.get((phase, who, length), []))
        == len(own := seen.seconds.get((phase, ALONE, length), []))
    }
    cpu = {who: spread(ratios(seen.cpu[who], seen.cpu[ALONE])) for who in CACHES}
    details = {
        "arms": {
            f"{phase}: {who}, {length} tokens": spread(taken) for (phase, who, length), taken in seen.seconds.items()
        },
        "ratios": quotients | {f"CPU time of a miss: {who} / {ALONE}": row for who, row in cpu.items()},
        "cache_cpu_seconds": {who: statistics.median(taken) for who, taken in seen.cache_cpu.items()},
        "partly_saved": seen.partly_saved,
        "not_held": seen.not_held,
        "faults": seen.faults,
        "new_tokens": NEW_TOKENS,
        "notes": [*_fault_lines(seen), "", *_cpu_lines(seen, cpu), *seen.not_held],
    }
    return Report(checks, details)


def _fault_lines(seen: Seen) -> list[str]:
    lines = [f"{'fault':34} {'who':12} first token of each request, and what came"]
    for row in seen.faults:
        told = zip(row["first_token_seconds"], row["answers"], row["cached_tokens"], strict=True)
        answers = "; ".join(f"{1e3 * seconds:,.0f} ms {what}, {cached} cached" for seconds, what, cached in told)
        again = row.get("hits_again_after_seconds", "")
        lines.append(
            f"{row['fault']:34} {row['who']:12} {answers}" + (f"; hits again after {again} s" if again else "")
        )
    return lines


def _cpu_lines(seen: Seen, cpu: dict[str, dict[str, float]]) -> list[str]:
    return [
        f"A miss of {PAIR_TOKENS} tokens with {who}: {100 * (row['median'] - 1):+.2f} % CPU time in the engine"
        f" ({100 * (row['low'] - 1):+.2f} to {100 * (row['high'] - 1):+.2f}), and"
        f" {1e3 * statistics.median(seen.cache_cpu[who]):.1f} ms in the cache's own process."
        for who, row in cpu.items()
    ]
