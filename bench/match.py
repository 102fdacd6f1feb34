"""The longest match of a 131,072-token prompt among a million blocks: bisection alone, and all that a request pays."""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from bench.harness import Progress, Report, check, interleaved, percentile, spread, timed
from tests.store.making import make_layout
from thermocline.blocks.key import NO_PARENT, BlockKey, block_keys, root_key
from thermocline.store.ghosts import GHOSTS_KEPT, Ghost
from thermocline.store.receipt import Reason
from thermocline.store.store import Store
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier

PATH_BLOCKS = 8_192
PATHS = 123
"""Together 1,007,616 blocks."""
ROUNDS = 400
BISECTION = "bisection"
MIB = 1024 * 1024
LAYOUT = make_layout("bench", block_bytes=2 * MIB)


def run(progress: Progress) -> Report:
    """Fill the index, then ask for whole paths, half paths, and paths that nobody knows, each time another one."""
    paths = _paths(PATHS + PATHS // 4, progress)
    known, unknown = paths[:PATHS], paths[PATHS:]
    with tempfile.TemporaryDirectory(prefix="thermocline-bench-") as folder:
        store = Store(MemoryTier(32 * MIB), [DiskTier(Path(folder), 64 * MIB)])
        _fill(store, known, progress)
        arms = _arms(store, known, unknown)
        in_a_row = [timed(arms[BISECTION]) for _ in range(ROUNDS + PATHS)]
        seconds = {f"{BISECTION}, one after the other": in_a_row[PATHS:]}
        seconds |= interleaved(arms, rounds=ROUNDS, progress=progress)
        blocks = len(store._books.index)  # noqa: SLF001  # a bench may count what the store does not tell
        _empty(store)
        store.close()
    return _report(seconds, blocks)


def _paths(count: int, progress: Progress) -> list[list[BlockKey]]:
    random = np.random.default_rng(2)
    paths = []
    for at in range(count):
        progress(f"keys of path {at + 1} of {count}")
        tokens = random.integers(0, 150_000, 16 * PATH_BLOCKS, dtype=np.uint32)
        paths.append(block_keys(tokens, root=root_key(), tokens_per_block=16))
    return paths


def _fill(store: Store, paths: Sequence[Sequence[BlockKey]], progress: Progress) -> None:
    """Enter blocks as a save does, without their bytes: a match touches none. Disk holds all, memory every third path.

    The ghosts are full as well, as in a store that has evicted for a long time: explaining a miss then costs most.
    """
    books = store._books  # noqa: SLF001  # the index of a store with a million blocks, without a terabyte of blocks
    for at, path in enumerate(paths):
        progress(f"filling the index: path {at + 1} of {len(paths)}")
        for depth, (parent, key) in enumerate(itertools.pairwise([NO_PARENT, *path]), 1):
            books.index.add(LAYOUT.id, key, parent, depth, "disk", float(at))
            if at % 3 == 0:
                books.index.add(LAYOUT.id, key, parent, depth, "memory", float(at))
    ghost = Ghost(Reason.EVICTED, "left disk", "lru", 0.0)
    for number in range(GHOSTS_KEPT):
        books.ghosts.note(LAYOUT.id, BlockKey(number.to_bytes(32, "little")), ghost)


def _empty(store: Store) -> None:
    """What was entered has no bytes: forget it, so that closing the store has nothing to hand down."""
    index = store._books.index  # noqa: SLF001  # as in _fill
    for node in [*index.only_in("memory")]:
        index.remove(node, "memory")


def _arms(
    store: Store, known: Sequence[Sequence[BlockKey]], unknown: Sequence[Sequence[BlockKey]]
) -> dict[str, Callable[[], object]]:
    half = [
        [*path[: PATH_BLOCKS // 2], *other[PATH_BLOCKS // 2 :]] for path, other in zip(known, unknown, strict=False)
    ]
    index = store._books.index  # noqa: SLF001  # the bisection alone
    turns: dict[str, Iterator[Sequence[BlockKey]]] = {
        BISECTION: itertools.cycle(known),
        "all held": itertools.cycle(known),
        "half held": itertools.cycle(half),
        "none held": itertools.cycle(unknown),
    }

    def ask(name: str) -> None:
        plan = store.match([LAYOUT], next(turns[name]), prompt_tokens=16 * PATH_BLOCKS + 1)
        store.release(plan.lease)

    return {
        BISECTION: lambda: index.covered(LAYOUT.id, next(turns[BISECTION]), "disk"),
        "match, plan, lease, release: all held": lambda: ask("all held"),
        "match, plan, lease, release: half held": lambda: ask("half held"),
        "match, plan, lease, release: none held": lambda: ask("none held"),
    }


def _report(seconds: dict[str, list[float]], blocks: int) -> Report:
    bisection, _, *matches = seconds.values()
    slowest = max(matches, key=statistics.median)
    checks = [
        check("bisection, median", statistics.median(bisection), "s", 20e-6, "lower"),
        check("match + plan + lease, slowest case, median", statistics.median(slowest), "s", 2e-3, "lower"),
    ]
    details = {
        "arms": {name: spread(values) for name, values in seconds.items()},
        "p99_seconds": {name: percentile(values, 0.99) for name, values in seconds.items()},
        "index_blocks": blocks,
        "path_blocks": PATH_BLOCKS,
        "notes": [
            "Between other work the index is in none of the processor's caches: that is the second bisection.",
            *(f"p99: {name} {1e6 * percentile(values, 0.99):,.0f} us" for name, values in seconds.items()),
        ],
    }
    return Report(checks, details)
