"""The 24 prompts on which every way of computing must agree."""

from __future__ import annotations

import random

LENGTHS = (
    1,
    2,
    5,
    31,
    32,
    33,
    63,
    64,
    65,
    100,
    127,
    128,
    200,
    257,
    300,
    511,
    513,
    700,
    1000,
    1025,
    2047,
    2049,
    3000,
    6000,
)
SHARED_TOKENS = 450
NEW_TOKENS = 12


def prompts() -> list[list[int]]:
    """Of 1 to 6,000 tokens. Every third begins with the same text, and every fourth extends an earlier prompt."""
    numbers = random.Random(20)  # noqa: S311  # the same prompts every time
    shared = [numbers.randrange(10, 4000) for _ in range(SHARED_TOKENS)]
    found: list[list[int]] = []
    for at, length in enumerate(LENGTHS):
        own = [numbers.randrange(10, 4000) for _ in range(length)]
        start = shared if at % 3 == 0 else found[at // 2] if at % 4 == 1 and found else []
        found.append((start + own)[:length])
    return found
