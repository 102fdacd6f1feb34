"""Time to first token on real vLLM: no cache, vLLM's own prefix hit, and through a node from memory and from disk.

Two servers, one plain and one with the connector, are asked strictly one request at a time and in turns. What the
connector costs where nothing is ever reused is counted as processor time of all the processes of a server. The device
is asked for as many bytes as a hit on disk needs, in the same rounds: no disk tier can be faster than that.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.harness import CLOCK, Progress, Report, check, ratios, spread
from bench.vllm_server import (
    BLOCK_TOKENS,
    Answer,
    Server,
    connector,
    process_cpu_seconds,
    prompt,
    vllm_python,
)
from tests.vllm.node import Node
from thermocline.engines import tiny
from thermocline.errors import BenchError
from thermocline.node import ask
from thermocline.tiers.disk import READER_THREADS
from thermocline.tiers.segments import READ_BYTES_MAX, aligned_memory

MIB = 1 << 20
LENGTHS = (4 * BLOCK_TOKENS + 1, 16 * BLOCK_TOKENS + 1, 48 * BLOCK_TOKENS + 1)
"""Multiples of the block and one token: a cache can give whole blocks, and the last token must be computed."""
PROMPTS = 2
"""Of each length. What is asked of one prompt is asked of each."""
MEMORY_ROUNDS, DISK_ROUNDS = 12, 8
WARM_UPS = 4
PAIRS = 300
PAIR_TOKENS, PAIR_NEW_TOKENS = 8 * BLOCK_TOKENS + 1, 2
SAME_TOKENS = 16
REST_SECONDS = 0.03
SAVED_SECONDS = 0.3
SAVES_MAX = 8
ATTACHED_SECONDS = 30.0
COLD, MISS, OWN, MEMORY = "no cache", "miss, saved", "vLLM's own prefix hit", "memory"
DISK, DROPPED = "disk, new processes", "disk, page cache dropped"
RAW = "raw read of the same bytes"
ADDED = "CPU time added by the connector, no reuse"
CPU = "CPU time with / without the connector"
SHARES = {MEMORY: 1.1, DISK: 1.3}


@dataclass(slots=True)
class Seconds:
    """Seconds of each arm for each length, in rounds; the hits to which those of an arm are compared, and raw reads."""

    arms: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    own: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    raw: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    partly_saved: list[list[int]] = field(default_factory=list)

    def add(self, arm: str, length: int, answer: Answer, own: Answer | None = None) -> None:
        """One answer, with vLLM's own hit of the same round."""
        self.arms.setdefault((arm, length), []).append(answer.seconds)
        if own is not None:
            self.own.setdefault((arm, length), []).append(own.seconds)

    def read(self, arm: str, length: int, seconds: float) -> None:
        """What the device took for as many bytes as that answer needed."""
        self.raw.setdefault((arm, length), []).append(seconds)
        self.arms.setdefault((RAW, length), []).append(seconds)


@dataclass(slots=True)
class Pairs:
    """Processor time of one request without the connector, with it, and of its node meanwhile."""

    plain: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    node: list[float] = field(default_factory=list)


def run(progress: Progress) -> Report:
    """Ask both servers for everything; then end the engine and the node, and ask new ones for what lies on disk."""
    python, model = vllm_python(), tiny.ensure()
    seconds, pairs = Seconds(), Pairs()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tcl-bench-")))
        disk = folder / "disk"
        node = stack.enter_context(Node(folder, memory_bytes=768 * MIB, disk_path=disk, disk_bytes=2048 * MIB))
        plain = stack.enter_context(Server(python, model, folder))
        with Server(python, model, folder, transfer=connector(node.socket)) as ours:
            progress("starting two servers")
            plain.wait(), ours.wait()
            _warm(plain, ours)
            _cold(plain, ours, seconds, progress)
            _from_memory(plain, ours, seconds, progress)
            _nothing_reused(plain, ours, node, pairs, 0, progress)
            same = _same_tokens(plain, ours, seconds)
        device = stack.enter_context(contextlib.closing(Device(disk, _token_bytes(node))))
        node.restart()
        with Server(python, model, folder, transfer=connector(node.socket)) as ours:
            progress("starting a new engine")
            ours.wait()
            _warm(plain, ours)
            _from_disk(plain, ours, node, device, seconds, progress)
            _nothing_reused(plain, ours, node, pairs, PAIRS // 2, progress)
            same &= _same_tokens(plain, ours, seconds)
    return _report(seconds, pairs, same)


# -- arms --------------------------------------------------------------------------------------------------------------


def _prompts() -> Iterator[tuple[int, list[int]]]:
    for length in LENGTHS:
        for number in range(PROMPTS):
            yield length, prompt(length, number)


def answered(answer: Answer, cached_tokens: int) -> Answer:
    """The answer. Raises BenchError where there was none, or where it was not cached as far as it should be."""
    if answer.trouble or answer.cached_tokens != cached_tokens:
        held = f"{answer.cached_tokens} tokens were cached instead of {cached_tokens}"
        what = answer.trouble or f"{held} ({answer.why})"
        raise BenchError(f"an arm is not what it says: {what}", hint="the servers' logs may say why")
    return answer


def _ask(server: Server, tokens: list[int], *, cached: bool) -> Answer:
    CLOCK.sleep(REST_SECONDS)
    return answered(server.ask(tokens), len(tokens) - 1 if cached else 0)


def asks_until_held(server: Server, tokens: list[int]) -> int:
    """How often a prompt that was answered once must be asked again until all of it comes from the cache.

    More than once where saving was dropped: no engine waits for room. Raises BenchError where it never comes.
    """
    for at in range(1, SAVES_MAX + 1):
        CLOCK.sleep(SAVED_SECONDS)
        server.forget()
        if server.ask(tokens).cached_tokens == len(tokens) - 1:
            return at
    raise BenchError("a prompt is never saved whole", hint="the node's memory may be too small")


def _hit(server: Server, tokens: list[int], seconds: Seconds) -> Answer:
    """A hit after the server's own cache was emptied. A few may be missed: a node that is late is not waited for."""
    deadline = CLOCK.now() + ATTACHED_SECONDS
    while True:
        server.forget()
        CLOCK.sleep(REST_SECONDS)
        answer = server.ask(tokens)
        if answer.trouble or answer.cached_tokens == len(tokens) - 1 or CLOCK.now() > deadline:
            return answered(answer, len(tokens) - 1)
        seconds.missed.append(answer.why)
        CLOCK.sleep(SAVED_SECONDS)


def _warm(*servers: Server) -> None:
    """Short prompts that nothing else shares: the first requests of a process are slow."""
    for at in range(WARM_UPS):
        for server in servers:
            server.ask(prompt(LENGTHS[0], 1000 + at, os.getpid()), 4)


def _cold(plain: Server, ours: Server, seconds: Seconds, progress: Progress) -> None:
    """Every prompt for the first time."""
    for length, tokens in _prompts():
        progress(f"a prompt of {length} tokens for the first time")
        seconds.add(COLD, length, _ask(plain, tokens, cached=False))
        seconds.add(MISS, length, _ask(ours, tokens, cached=False))
    for _, tokens in _prompts():
        if asks_until_held(ours, tokens) > 1:
            seconds.partly_saved.append(tokens)


def _from_memory(plain: Server, ours: Server, seconds: Seconds, progress: Progress) -> None:
    """A hit in vLLM itself, and one from the node after vLLM's own cache was emptied."""
    for at in range(MEMORY_ROUNDS):
        progress(f"memory: round {at + 1} of {MEMORY_ROUNDS}")
        for length, tokens in _prompts():
            own = _ask(plain, tokens, cached=True)
            seconds.add(MEMORY, length, _hit(ours, tokens, seconds), own)
            seconds.add(OWN, length, own)


def _token_bytes(node: Node) -> int:
    """What the node keeps for each token."""
    memory = next(tier for tier in ask.status(node.socket).tiers if tier.name == "memory")
    return memory.used_bytes // memory.blocks // BLOCK_TOKENS


class Device:
    """Direct reads of a file beside the disk tier, as large as the tier's, by as many threads."""

    def __init__(self, folder: Path, token_bytes: int) -> None:
        self._token_bytes = token_bytes
        self._nbytes = max(LENGTHS) * token_bytes
        path = folder / "raw"
        path.write_bytes(np.random.default_rng(9).bytes(self._nbytes))
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        os.fsync(self._fd)
        path.unlink()
        self._threads = ThreadPoolExecutor(READER_THREADS)
        self._into = aligned_memory(self._nbytes)

    def seconds(self, tokens: int) -> float:
        """What it takes to read the blocks of so many tokens."""
        stop = tokens * self._token_bytes
        parts = [(at, min(READ_BYTES_MAX, stop - at)) for at in range(0, stop, READ_BYTES_MAX)]
        started = CLOCK.now()
        assert sum(self._threads.map(self._read, parts)) == stop
        return CLOCK.now() - started

    def close(self) -> None:
        """Let go of file and threads."""
        self._threads.shutdown()
        os.close(self._fd)

    def _read(self, part: tuple[int, int]) -> int:
        offset, nbytes = part
        return os.preadv(self._fd, [self._into[offset : offset + nbytes].data], offset)


def _from_disk(plain: Server, ours: Server, node: Node, device: Device, seconds: Seconds, progress: Progress) -> None:
    """As from memory, with a new node in each round: one warm-up, then every prompt once."""
    for at in range(DISK_ROUNDS):
        progress(f"disk: round {at + 1} of {DISK_ROUNDS}")
        if at:
            node.restart()
        arm = DROPPED if at % 2 else DISK
        if arm == DROPPED:
            drop_page_cache(Path(str(node.settings["disk_path"])))
        _attach(ours)
        for length, tokens in _prompts():
            own = _ask(plain, tokens, cached=True)
            seconds.add(arm, length, _hit(ours, tokens, seconds), own)

            seconds.read(arm, length, device.seconds(length - 1))


def _attach(server: Server) -> None:
    """The warm-up: a prompt that was saved before everything else, asked until it comes from the node."""
    deadline = CLOCK.now() + ATTACHED_SECONDS
    tokens = prompt(LENGTHS[0], 1000, os.getpid())
    while True:
        server.forget()
        if server.ask(tokens).cached_tokens:
            return
        if CLOCK.now() > deadline:
            raise BenchError("the engine does not find its new node", hint="`thermocline ps` says what listens where")
        CLOCK.sleep(0.1)


def drop_page_cache(folder: Path) -> None:
    """What lies in files below a folder is read from the device the next time."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _nothing_reused(plain: Server, ours: Server, node: Node, pairs: Pairs, first: int, progress: Progress) -> None:
    """Pairs of prompts that share nothing, one to each server, the first place changing."""
    for at in range(first, first + PAIRS // 2):
        progress(f"pair {at + 1} of {PAIRS}")
        before = process_cpu_seconds(node.pid)
        arms = [(plain, pairs.plain), (ours, pairs.ours)]
        for server, spent in arms[:: 1 if at % 2 else -1]:
            spent.append(_cpu_of(server, prompt(PAIR_TOKENS, at, id(server))))
        pairs.node.append(process_cpu_seconds(node.pid) - before)


def _cpu_of(server: Server, tokens: list[int]) -> float:
    """Processor seconds of one request, saving included."""
    CLOCK.sleep(REST_SECONDS)
    before = server.cpu_seconds()
    answered(server.ask(tokens, PAIR_NEW_TOKENS), 0)
    CLOCK.sleep(REST_SECONDS)
    return server.cpu_seconds() - before


def _same_tokens(plain: Server, ours: Server, seconds: Seconds) -> bool:
    """Whether all prompts go on alike, out of vLLM's own cache and out of the node.

    Only prompts are compared that both computed in the same portions: whole, and saved whole. In bf16 others may go
    another way where two tokens are almost equally likely.
    """
    compared = [tokens for _, tokens in _prompts() if tokens not in seconds.partly_saved]
    same = (_held_tokens(plain, tokens, forget=False) == _held_tokens(ours, tokens) for tokens in compared)
    return bool(compared) and all(same)


def _held_tokens(server: Server, tokens: list[int], *, forget: bool = True) -> tuple[int, ...]:
    """The continuation of a prompt all of which was cached. Raises BenchError where it never is."""
    deadline = CLOCK.now() + ATTACHED_SECONDS
    while True:
        if forget:
            server.forget()
        answer = server.ask(tokens, SAME_TOKENS)
        if answer.cached_tokens == len(tokens) - 1 or CLOCK.now() > deadline:
            return answered(answer, len(tokens) - 1).tokens
        CLOCK.sleep(SAVED_SECONDS)


# -- the report --------------------------------------------------------------------------------------------------------


def _report(seconds: Seconds, pairs: Pairs, same: bool) -> Report:  # noqa: FBT001  # the only answer of that kind
    quotients = {
        f"{arm} / {OWN}, {length} tokens": spread(ratios(seconds.arms[arm, length], seconds.own[arm, length]))
        for arm in (MEMORY, DISK, DROPPED)
        for length in LENGTHS
    }
    cpu = spread(ratios(pairs.ours, pairs.plain))
    added = {name: 100 * (cpu[name] - 1) for name in ("median", "low", "high")}
    checks = [
        check(name, quotients[name]["median"], "x", target, "lower")
        for arm, target in SHARES.items()
        for name in (f"{arm} / {OWN}, {length} tokens" for length in LENGTHS)
    ]
    checks += [
        check(ADDED, added["median"], "%", 1.0, "lower"),
        check("same tokens from the node", float(same), "of 1", 1.0, "higher"),
    ]
    node = 100 * statistics.median(ratios(pairs.node, pairs.plain))
    details = {
        "arms": {f"{arm}, {length} tokens": spread(taken) for (arm, length), taken in seconds.arms.items()},
        "ratios": quotients | _limits(seconds) | {CPU: cpu} | _speedups(seconds),
        "percent": {ADDED: added},
        "block_tokens": BLOCK_TOKENS,
        "prompts_of_each_length": PROMPTS,
        "pairs": PAIRS,
        "asked_again": seconds.missed,
        "partly_saved": len(seconds.partly_saved),
        "notes": [
            f"Added: {added['median']:+.2f} %, 95 % interval {added['low']:+.2f} % to {added['high']:+.2f} %, over",
            f"{PAIRS} pairs of {PAIR_TOKENS} tokens; the node used {node:.2f} % beside that, to save them.",
            "The new engine was asked once from its new node before its disk was timed; every second round drops the",
            "page cache first.",
            f"{len(seconds.missed)} times the node was late, and a prompt was asked again; {len(seconds.partly_saved)}",
            f"of {PROMPTS * len(LENGTHS)} prompts were not saved whole the first time.",
        ],
    }
    return Report(checks, details)


def _limits(seconds: Seconds) -> dict[str, dict[str, float]]:
    """A hit on disk over vLLM's own hit and a raw read of the same bytes, one after the other."""
    found = {}
    for (arm, length), raw in seconds.raw.items():
        least = [own + read for own, read in zip(seconds.own[arm, length], raw, strict=True)]
        found[f"{arm} / ({OWN} + {RAW}), {length} tokens"] = spread(ratios(seconds.arms[arm, length], least))
    return found


def _speedups(seconds: Seconds) -> dict[str, dict[str, float]]:
    """What a hit is worth: the median of no cache over each answer of an arm."""
    found = {}
    for length in LENGTHS:
        cold = statistics.median(seconds.arms[COLD, length])
        for arm in (OWN, MEMORY, DISK):
            taken = seconds.arms[arm, length]
            found[f"{COLD} / {arm}, {length} tokens"] = spread(ratios([cold] * len(taken), taken))
    return found
