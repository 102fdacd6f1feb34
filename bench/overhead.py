"""What the store costs where it cannot help: prompts that share nothing, CPU time with and without it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from bench.harness import CLOCK, Progress, Report, check, ratios, spread, timed
from bench.ttft import MODEL, THREADS
from thermocline.build import store_from
from thermocline.engines.models import Model, load_model
from thermocline.engines.transformers import Engine
from thermocline.settings import Settings
from thermocline.store.store import Store

PAIRS = 240
WARM_UPS = 8
PROMPT_TOKENS = 1024
"""About the mean prompt of a public trace of conversations (1,155 tokens in Azure's of 2023)."""
NEW_TOKENS = 2
"""With the second token the prompt has been saved. Fewer tokens could not show less of a cost, more would hide it."""
MIB = 1024 * 1024
TARGET_PERCENT = 1.0
MEMORY_BYTES = 256 * MIB
"""Fills up half way through the run, so that making room is part of the cost."""
NAME = "CPU time with / without the store"
ADDED = "CPU time added by the store, no reuse"


def run(progress: Progress) -> Report:
    """Pairs of prompts, with and without the store in turns; CPU time of the whole process until all is durable."""
    model = load_model(MODEL, threads=THREADS)
    random = np.random.default_rng(7)

    def prompt() -> np.ndarray:
        return random.integers(2, model.vocabulary, PROMPT_TOKENS, dtype=np.uint32)

    with _engine(model) as (engine, store):
        arms: dict[str, Callable[[], None]] = {
            "with memory and disk": lambda: _answer(engine, store, prompt()),
            "without a store": lambda: _answer(engine, None, prompt()),
        }
        for arm in list(arms.values()) * WARM_UPS:
            arm()
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for at in range(PAIRS):
            progress(f"pair {at + 1} of {PAIRS}")
            for name in list(arms)[:: 1 if at % 2 else -1]:
                seconds[name].append(timed(arms[name], CLOCK.cpu))
        saved = store.usage()["disk"].blocks
    return _report(seconds, saved)


@contextlib.contextmanager
def _engine(model: Model) -> Iterator[tuple[Engine, Store]]:
    """One engine for both arms: two differ by more than the store costs, in where their memory happens to lie."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="thermocline-bench-"))
        settings = Settings(memory_bytes=MEMORY_BYTES, disk_path=Path(folder), disk_bytes=1024 * MIB)
        store = stack.enter_context(contextlib.closing(store_from(settings)))
        yield stack.enter_context(contextlib.closing(Engine(model, store))), store


def _answer(engine: Engine, store: Store | None, prompt: np.ndarray) -> None:
    """Answer with this store or none, until all that it saved is durable."""
    engine.store = store
    assert engine.generate(prompt, NEW_TOKENS).cached_tokens == 0
    if store is not None:
        store.flush()


def _report(seconds: dict[str, list[float]], saved: int) -> Report:
    row = spread(ratios(*seconds.values()))
    added = {name: 100 * (row[name] - 1) for name in ("median", "low", "high")}
    checks = [check(ADDED, added["median"], "%", TARGET_PERCENT, "lower")]
    details = {
        "arms": {f"CPU seconds {name}": spread(values) for name, values in seconds.items()},
        "ratios": {NAME: row},
        "percent": {ADDED: added},
        "pairs": PAIRS,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "blocks_on_disk": saved,
        "notes": [f"Added: {added['median']:+.2f} %, 95 % interval {added['low']:+.2f} % to {added['high']:+.2f} %."],
    }
    return Report(checks, details)
