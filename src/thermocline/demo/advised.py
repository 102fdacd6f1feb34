"""Chapter: a store's last requests, the memory that `advise` reads out of them, and what a store of that size hits."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from thermocline.blocks.key import block_keys, root_key
from thermocline.blocks.layout import Layout
from thermocline.clock import ManualClock
from thermocline.costs import trace
from thermocline.costs.advice import Advice, advise
from thermocline.costs.study import Machine, Study
from thermocline.demo.chapter import Chapter, Claim
from thermocline.demo.screen import Screen
from thermocline.lens.advise import Asked, machine_of, toml
from thermocline.lens.figures import nbytes, percent
from thermocline.lens.spread import spread
from thermocline.settings import DECLARED
from thermocline.store.store import Store
from thermocline.tiers.memory import MemoryTier

MODEL, GPU, ENGINE_TOKENS = "meta-llama/Meta-Llama-3.1-8B", "h100", 60_000
SESSIONS, TURNS, FIRST_TOKENS, TURN_TOKENS, PAUSE_SECONDS = 80, 5, 2000, 600, 90.0
TOKENS_PER_BLOCK, BLOCK_BYTES, PLENTY = 64, 4096, 16_384
OFF_MAX = 0.02
"""Of a hit rate: the store gives up several blocks at a time, which no formula follows."""
LAYOUT = Layout(
    model="demo", weights_digest=bytes(32), dtype="bfloat16", kv_dtype="bfloat16", layers=1, kv_heads=1, head_dim=16,
    tokens_per_block=TOKENS_PER_BLOCK, block_bytes=BLOCK_BYTES, engine="demo", engine_version="1", isa="any",
    order="layer",
)  # fmt: skip

Prompts = list[tuple[float, NDArray[np.uint32]]]


def play(screen: Screen, folder: Path) -> Chapter:  # noqa: ARG001  # nothing is written
    """Requests through a store with plenty of memory; what is advised; the same in stores of that size and less."""
    prompts = _prompts()
    screen.say(
        f"{SESSIONS} conversations of {TURNS} turns pass a store (pauses are told to its clock, not waited for). It "
        f"remembers when they came, how long they were, and which begin alike. `thermocline advise`, for {MODEL} on an "
        "H100, makes of that:"
    )
    _, lines = _replayed(prompts, PLENTY)
    found = trace.parse(io.BytesIO(lines), "the store")
    machine = machine_of(Asked(model=MODEL, gpu=GPU, kv_tokens=ENGINE_TOKENS, tiers=("host",)), FIRST_TOKENS)
    advice = advise(found, machine, spread)
    screen.quote(toml(advice).rstrip())
    return _concluded(screen, prompts, Study(found, machine), _advised_blocks(advice, machine))


def _advised_blocks(advice: Advice, machine: Machine) -> int:
    """The size of the memory tier, in blocks."""
    (value,) = (line.value for line in advice.lines if line.setting == "memory_bytes")
    return int(str(DECLARED["memory_bytes"].parse(value))) // (machine.token_bytes * TOKENS_PER_BLOCK)


def _concluded(screen: Screen, prompts: Prompts, study: Study, advised: int) -> Chapter:
    screen.say("Then the same requests through new stores, of the advised size and of parts of it:")
    rows, told = [], {}
    total = int(study.trace.input_tokens.sum())
    for name, blocks in (("advised", advised), ("half of it", advised // 2), ("a quarter", advised // 4)):
        promised, hit = float(study.held(blocks).sum()) / total, _replayed(prompts, blocks)[0] / total
        rows.append([name, nbytes(study.tier_bytes(blocks)), percent(promised), percent(hit)])
        told[name] = {"blocks": blocks, "promised": promised, "hit": hit}
    screen.table(["memory", "for this model", "promised", "hit by the store"], rows, right=(1, 2, 3))
    ok = all(abs(each["promised"] - each["hit"]) <= OFF_MAX for each in told.values())
    full, least = told["advised"]["hit"], told["a quarter"]["hit"]
    figure = f"{percent(full)} at the advised size, as promised; {percent(least)} at a quarter of it"
    verdict = figure if ok else f"promised and hit differ: {rows}"
    claim = Claim('"expect a hit rate of 80 %"', figure, "thermocline advise --url")
    return Chapter(ok and least < full, verdict, claim, {"sizes": told})


def _prompts() -> Prompts:
    """Turns of conversations in the order they come: each is the one before it, and more."""
    random = np.random.default_rng(5)
    length = FIRST_TOKENS + TURNS * TURN_TOKENS
    turns = []
    for _ in range(SESSIONS):
        text = random.integers(0, 50_000, length, dtype=np.uint32)
        begins = random.uniform(0, SESSIONS * PAUSE_SECONDS / TURNS)
        at = begins + np.cumsum(random.exponential(PAUSE_SECONDS, TURNS))
        turns += [(when, text[: FIRST_TOKENS + turn * TURN_TOKENS]) for turn, when in enumerate(at.tolist())]
    return sorted(turns, key=lambda turn: turn[0])


def _replayed(prompts: Prompts, blocks: int) -> tuple[int, bytes]:
    """Tokens that a new store with memory for so many blocks hits, and the requests that it remembers."""
    clock = ManualClock()
    memory = MemoryTier(blocks * BLOCK_BYTES, clock=clock)
    memory.wait_ready()
    store, payload, hit = Store(memory, clock=clock), np.zeros(BLOCK_BYTES, np.uint8), 0
    for number, (at, tokens) in enumerate(prompts):
        clock.sleep(at - clock.now())
        keys = block_keys(tokens.data, root=root_key(), tokens_per_block=TOKENS_PER_BLOCK)
        plan = store.match([LAYOUT], keys, prompt_tokens=len(tokens))
        store.release(plan.lease)
        hit += plan.blocks * TOKENS_PER_BLOCK
        store.receipts.record(str(number), tokens, plan, None, prefill_seconds=0.0)
        store.save(LAYOUT, keys, [[payload]] * (len(keys) - plan.blocks), start=plan.blocks).wait()
    lines = store.receipts.recent.lines()
    store.close()
    return hit, lines
