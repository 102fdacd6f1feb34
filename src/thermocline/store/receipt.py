"""Receipts: what one request matched, loaded and computed, with one reason for every block that was not loaded."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec


class Reason(enum.StrEnum):
    """Why a block was not loaded: the closed set."""

    NEVER_SEEN = "never_seen"
    UNKNOWN = "unknown"
    DIVERGED = "diverged"
    EVICTED = "evicted"
    EXPIRED = "expired"
    OTHER_LAYOUT = "other_layout"
    ELSEWHERE = "elsewhere"
    PENDING = "pending"
    DECLINED = "declined"
    NOT_ADMITTED = "not_admitted"
    LATE = "late"
    CORRUPT = "corrupt"
    TIER_DOWN = "tier_down"
    TAIL = "tail"


class Missing(msgspec.Struct, frozen=True):
    """Blocks [start, stop) were not loaded. `detail` says more, in words, without a key or a token."""

    start: int
    stop: int
    reason: Reason
    detail: str = ""


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """The account of one request.

    `missing` covers every block from the first that was computed to the last; TAIL is the partial block at the end, or
    the block of the one token that must be computed. `wall_seconds` is when it was made, since 1970.
    """

    request: str
    prompt_tokens: int
    tokens_per_block: int
    loaded_tokens: int
    computed_tokens: int
    by_tier: dict[str, int]
    missing: tuple[Missing, ...]
    match_seconds: float
    load_seconds: float
    prefill_seconds: float
    planned_load_seconds: float
    planned_recompute_seconds: float
    planned_cold_seconds: float
    wall_seconds: float = 0.0


class Excerpt(msgspec.Struct, frozen=True):
    """The text around the `token` where two prompts part: what both have `before` it, then `this` one and the `other`.

    Never kept, logged or counted: made when the operator asks on the server's own machine.
    """

    token: int
    other_request: str
    before: str
    this: str
    other: str


class ExcerptedReceipt(Receipt, frozen=True, kw_only=True):
    """A receipt as it is shown to the operator."""

    excerpt: Excerpt | None = None


def merged(parts: Sequence[Missing]) -> tuple[Missing, ...]:
    """Adjacent stretches with the same reason and detail become one; empty ones vanish."""
    out: list[Missing] = []
    for part in parts:
        if part.start >= part.stop:
            continue
        if out and (out[-1].stop, out[-1].reason, out[-1].detail) == (part.start, part.reason, part.detail):
            out[-1] = Missing(out[-1].start, part.stop, part.reason, part.detail)
        else:
            out.append(part)
    return tuple(out)
