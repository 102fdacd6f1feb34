"""The prompts that all arms must answer alike: token ids, so that no tokenizer has a say, the same on every machine."""

from __future__ import annotations

import random

from tests.vllm.server import BLOCK_TOKENS

SHARED_TOKENS = 700
_ALONE = (1, 5, 31, 32, 33, 63, 64, 65, 127, 129, 255, 257, 500, 1025, 2049, 3000)
_SHARING = (701, 735, 736, 737, 900, 1111, 1500, 2500)


def prompt(seed: int, count: int) -> list[int]:
    """Token ids that follow from the seed."""
    rng = random.Random(seed)  # noqa: S311  # must replay
    return [rng.randrange(10, 4000) for _ in range(count)]


def all_prompts() -> list[list[int]]:
    """24 prompts of 1 to 3,000 tokens, 8 of which begin with the same 700: lengths on the block grid and off it."""
    shared = prompt(1, SHARED_TOKENS)
    alone = [prompt(100 + count, count) for count in _ALONE]
    return alone + [shared + prompt(200 + count, count - SHARED_TOKENS) for count in _SHARING]


def loadable(tokens: list[int], block: int = BLOCK_TOKENS) -> int:
    """How many tokens of a prompt a cache can give: whole blocks, and the last token must be computed."""
    return (len(tokens) - 1) // block * block
