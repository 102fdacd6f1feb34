"""What is worth copying to where: replicas of hot prefixes, and a cold instance made warm.

A copy is worth the seconds that it saves those who ask for the prefix on an instance that lacks it; it costs the
seconds that the transfer takes. Both are expectations over the same stretch of time. Pure: the same values give the
same copies, and nothing is moved here.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

GAIN_MIN = 2.0
"""A copy should save so many times what it costs: rates change, and room that it takes is worth something."""
COPIES_MAX = 64


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prefix that many ask for. `name` is whatever the caller files it under; `holders` are slots.

    `asked_per_second` counts requests of the whole fleet. `recompute_seconds` is what computing it takes there.
    """

    name: str
    tokens: int
    asked_per_second: float
    recompute_seconds: float
    holders: frozenset[int]


@dataclass(frozen=True, slots=True)
class Place:
    """An instance that could take copies. `share` is the part of the fleet's requests that it gets.

    `room_tokens` is what it can take without giving up something of more worth. `transfer_seconds` is per token.
    """

    slot: int
    share: float
    room_tokens: int
    transfer_seconds: float
    budget_seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy to make, and why: seconds that it is expected to save, and to take."""

    name: str
    source: int
    target: int
    tokens: int
    saved_seconds: float
    transfer_seconds: float


def place(prefixes: Sequence[Prefix], places: Sequence[Place], horizon_seconds: float) -> tuple[Copy, ...]:
    """The copies that pay within `horizon_seconds`, best first: most seconds saved per second of transfer.

    A prefix without a holder is left out: there is nothing to copy. No place takes more than its room and its budget of
    seconds. What a copy saves does not depend on other copies, as each serves the requests of its own instance only.
    """
    room = {each.slot: each.room_tokens for each in places}
    budget = {each.slot: each.budget_seconds for each in places}
    worth = heapq.nlargest(
        COPIES_MAX,
        (
            (found.saved_seconds / max(found.transfer_seconds, 1e-9), -at, found)
            for at, found in enumerate(_candidates(prefixes, places, horizon_seconds))
        ),
    )
    copies: list[Copy] = []
    for gain, _, copy in worth:
        if gain < GAIN_MIN:
            break
        if copy.tokens <= room[copy.target] and copy.transfer_seconds <= budget[copy.target]:
            room[copy.target] -= copy.tokens
            budget[copy.target] -= copy.transfer_seconds
            copies.append(copy)
    return tuple(copies)


def _candidates(prefixes: Sequence[Prefix], places: Sequence[Place], horizon_seconds: float) -> list[Copy]:
    """Every copy that could be made. The first one who asks without it would make the copy by computing: that counts.

    With n requests expected there, n = 0 saves nothing, and from the first one on only the first recompute is saved,
    as it leaves a copy. So a copy saves one recompute with the probability that anybody asks, which is 1 - exp(-n).
    """
    found = []
    for prefix in prefixes:
        if not prefix.holders:
            continue
        source = min(prefix.holders)
        for each in places:
            if each.slot not in prefix.holders:
                asked = prefix.asked_per_second * each.share * horizon_seconds
                saved = prefix.recompute_seconds * -math.expm1(-asked)
                seconds = prefix.tokens * each.transfer_seconds
                found.append(Copy(prefix.name, source, each.slot, prefix.tokens, saved, seconds))
    return found
