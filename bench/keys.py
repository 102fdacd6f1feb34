"""Keys of a long prompt over the bare hash loop, which does nothing but the hashing that any chained key needs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from bench.harness import Progress, Report, check, interleaved, ratios, spread
from thermocline.blocks.key import BlockKey, block_keys, root_key

TOKENS = 131_072
NEW_TOKENS = 2_048
TOKENS_PER_BLOCK = 16
STEP_BYTES = 4 * TOKENS_PER_BLOCK
ROUNDS = 101
NEXT_TURNS = 20
"""Next turns per round: one takes well below a millisecond."""


def run(progress: Progress) -> Report:
    """All keys of 131,072 tokens, then those of the next turn."""
    tokens = np.random.default_rng(1).integers(0, 150_000, TOKENS + NEW_TOKENS, dtype=np.uint32)
    root = root_key(b"a salt")
    first = block_keys(tokens[:TOKENS], root=root, tokens_per_block=TOKENS_PER_BLOCK)
    resume, new = first[-1], tokens[TOKENS:]
    _same_keys(tokens, root, first, resume, new)
    arms = {
        "keys of 131,072 tokens": lambda: block_keys(tokens[:TOKENS], root=root, tokens_per_block=TOKENS_PER_BLOCK),
        "bare loop over 131,072 tokens": _bare_loop(tokens[:TOKENS].tobytes(), root, 1),
        "keys of the next turn, 20 times": lambda: _next_turns(new, resume),
        "bare loop over its 2,048 tokens, 20 times": _bare_loop(new.tobytes(), resume, NEXT_TURNS),
    }
    seconds = interleaved(arms, rounds=ROUNDS, warmup=3, progress=progress)
    all_keys, bare, next_turn, bare_turn = seconds.values()
    whole = spread(ratios(all_keys, bare))
    turn = spread(ratios(next_turn, bare_turn))
    checks = [
        check("keys / bare hash loop", whole["median"], "x", 1.3, "lower"),
        check("next turn / bare loop over its new tokens", turn["median"], "x", 1.5, "lower"),
    ]
    details = {
        "ratios": {checks[0].name: whole, checks[1].name: turn},
        "arms": {name: spread(values) for name, values in seconds.items()},
        "notes": [
            "The next turn is 2,048 tokens behind 131,072 known ones; its keys equal those of hashing everything."
        ],
    }
    return Report(checks, details)


def _bare_loop(raw: bytes, root: bytes, times: int) -> Callable[[], bytes]:
    """SHA-256 chained over 64-byte steps, and nothing else: no list, no slicing of blocks, no checks."""

    def loop() -> bytes:
        sha256 = hashlib.sha256
        key = root
        for _ in range(times):
            key = root
            for start in range(0, len(raw), STEP_BYTES):
                key = sha256(key + raw[start : start + STEP_BYTES]).digest()
        return key

    return loop


def _next_turns(new: np.ndarray, resume: BlockKey) -> None:
    for _ in range(NEXT_TURNS):
        block_keys(new, root=resume, tokens_per_block=TOKENS_PER_BLOCK)


def _same_keys(tokens: np.ndarray, root: BlockKey, first: list[BlockKey], resume: BlockKey, new: np.ndarray) -> None:
    whole = block_keys(tokens, root=root, tokens_per_block=TOKENS_PER_BLOCK)
    resumed = block_keys(new, root=resume, tokens_per_block=TOKENS_PER_BLOCK)
    assert whole == first + resumed, "resuming from a key gives other keys than hashing everything"
    assert first[-1] == _bare_loop(tokens[:TOKENS].tobytes(), root, 1)(), "the bare loop hashes something else"
