"""Whether what an instance says of its cache can be believed: a self-check, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

EVIDENCE = 16
"""Requests before a wiring is judged by what the engine told of them."""
MISSING_SHARE = 0.5


class Unplaced(StrEnum):
    """Why blocks of events could not be filed, or events not be used."""

    BLOCK_SIZE = "BLOCK_SIZE"  # no multiple of 16
    LENGTHS = "LENGTHS"  # hashes and tokens are not as many, as with windows that have moved on
    PARENT = "PARENT"  # follows a block that was never announced
    MEDIUM = "MEDIUM"  # unknown, or on another host
    GROUP = "GROUP"  # of a KV group that is not full attention
    UNKNOWN = "UNKNOWN"  # a removal of what is not held
    UNREADABLE = "UNREADABLE"


class State(StrEnum):
    """What the index knows an instance's cache from."""

    NEW = "NEW"  # too little has happened to say
    EXACT = "EXACT"
    NO_EVENTS = "NO_EVENTS"  # requests were served, and no event came
    UNUSABLE = "UNUSABLE"  # events come, and most of them cannot be filed
    OTHER_TEXT = (
        "OTHER_TEXT"  # the engine finds cached what the index does not have: its events do not match what is routed
    )
    STALE = "STALE"  # the index promises what the engine does not find


@dataclass(frozen=True, slots=True)
class Wiring:
    """How far an instance's events can be believed, and what to do about it.

    Counts are since its last start. Tokens are those of its last requests; older ones count less.
    """

    state: State
    advice: str
    batches: int
    stored_blocks: int
    unplaced: tuple[tuple[Unplaced, int], ...]
    lost_batches: int
    requests: int
    predicted_tokens: int
    cached_tokens: int


def judged(
    batches: int,
    stored: int,
    unplaced: Sequence[tuple[Unplaced, int]],
    lost: int,
    requests: int,
    predicted: int,
    cached: int,
) -> Wiring:
    """What the counts of an instance say. `unplaced` has the commonest reason first."""
    bad = [(why, blocks) for why, blocks in unplaced if why not in {Unplaced.UNKNOWN, Unplaced.GROUP}]
    if not batches:
        state = State.NO_EVENTS if requests >= EVIDENCE else State.NEW
    elif sum(blocks for _, blocks in bad) > stored:
        state = State.UNUSABLE
    elif requests >= EVIDENCE and predicted < MISSING_SHARE * cached:
        state = State.OTHER_TEXT
    elif requests >= EVIDENCE and cached < MISSING_SHARE * predicted:
        state = State.STALE
    else:
        state = State.EXACT
    advice = _ADVICE_UNPLACED[bad[0][0]] if state is State.UNUSABLE else _ADVICE[state]
    return Wiring(state, advice, batches, stored, tuple(unplaced), lost, requests, predicted, cached)


_ADVICE = {
    State.NEW: "nothing is known yet",
    State.EXACT: "its events come, and can be filed",
    State.NO_EVENTS: "no KV event has come from it: it is guessed from what was sent; turn on its KV events, and let"
    " them connect to this router",
    State.OTHER_TEXT: "it finds cached what its events do not explain: its tokenizer, chat template, salt or adapter"
    " names may differ from the router's, or events are lost",
    State.STALE: "it does not find what its events announced: removals may be lost; give it a replay endpoint",
}
_ADVICE_UNPLACED = {
    Unplaced.BLOCK_SIZE: "its blocks are no multiple of 16 tokens: start it with a block (page) size that is",
    Unplaced.LENGTHS: "its events have other numbers of tokens than of blocks",
    Unplaced.PARENT: "its blocks follow blocks that were never announced: give it a replay endpoint, or restart it",
    Unplaced.MEDIUM: "its blocks lie in media that the router does not know",
    Unplaced.UNREADABLE: "its events cannot be read: is its version supported?",
}
