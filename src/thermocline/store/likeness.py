"""Likeness: which recent prompt this one resembles, and the token where they part.

A timestamp at the top of a prompt changes every key behind it, so keys alone say "never seen". Prompts are compared by
a sample of their windows of eight tokens, chosen by content (winnowing by hash value: Schleimer, Wilkerson, Aiken,
2003), so that inserted tokens do not hide what follows them.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW_TOKENS = 8
SAMPLE_ONE_IN = 8
PROMPTS_KEPT = 64
TOKENS_KEPT_MAX = 4_000_000
SHARE_MIN = 0.5
KNOWN_SHARE_MIN = 0.4
"""Below SHARE_MIN, as here the sample begins a little before the token where prompts part."""
REST_SAMPLE_MAX = 256
BUCKET_BITS = 21
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, as in Fibonacci hashing


@dataclass(frozen=True, slots=True)
class Resemblance:
    """This prompt equals `request` up to token `at`, and `share` of the rest of it occurs there too."""

    request: str
    at: int
    share: float


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt, with the sample of its windows: their hashes, and where they begin."""

    tokens: NDArray[np.uint32]
    hashes: NDArray[np.uint64]
    positions: NDArray[np.int64]


def sampled(tokens: NDArray[np.uint32], *, group: int = 0) -> Prompt:
    """A prompt and its sample: some 20 us per thousand tokens, the most that comparing or keeping one takes.

    Only prompts of one `group` (a secret number per cache salt) resemble each other: it enters every hash.
    """
    if len(tokens) < WINDOW_TOKENS:
        return Prompt(tokens, np.zeros(0, np.uint64), np.zeros(0, np.int64))
    wide = tokens.astype(np.uint64)
    count = len(tokens) - WINDOW_TOKENS + 1
    hashes = np.full(count, group, np.uint64)
    for at in range(WINDOW_TOKENS):
        hashes ^= wide[at : at + count]
        hashes *= _MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    positions = np.flatnonzero(hashes & np.uint64(SAMPLE_ONE_IN - 1) == 0)
    return Prompt(tokens, hashes[positions], positions)


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    tokens: NDArray[np.uint32]
    sample: NDArray[np.uint64]  # sorted


class Likeness:
    """The last prompts, in memory only, bounded in number and tokens. Not thread-safe."""

    def __init__(self) -> None:
        self._prompts: OrderedDict[str, _Kept] = OrderedDict()
        self._tokens = 0
        # How many hashes of all samples fall into each bucket. Text that nobody sent lately falls beside them, and is
        # told at once: no need to compare it with every prompt. Modulo 256, which hides one bucket in a blue moon.
        self._buckets = np.zeros(1 << BUCKET_BITS, np.uint8)

    def closest(self, prompt: Prompt, start: int, stop: int) -> Resemblance | None:
        """The recent prompt that parts from this one at a token in [start, stop), and holds most of what follows.

        None where none holds half of it. A prompt that goes on where an earlier one ended does not part from it; one
        that asks another question behind the same text does, but has little in common with it from there on.
        """
        best: Resemblance | None = None
        first = prompt.hashes[np.searchsorted(prompt.positions, start) :]
        known = self._buckets[_bucket(first[:: 1 + len(first) // REST_SAMPLE_MAX])] > 0
        if np.count_nonzero(known) < KNOWN_SHARE_MIN * len(known):
            return None
        for request, kept in reversed(self._prompts.items()):
            at = _parting(prompt.tokens, kept.tokens, start, stop)
            if at is None:
                continue
            rest = prompt.hashes[np.searchsorted(prompt.positions, at) :]
            share = _share(rest[:: 1 + len(rest) // REST_SAMPLE_MAX], kept.sample)
            if share >= SHARE_MIN and (best is None or share > best.share):
                best = Resemblance(request, at, share)
        return best

    def note(self, request: str, prompt: Prompt) -> None:
        """Remember a prompt; a later one of the same request takes its place."""
        if len(prompt.tokens) > TOKENS_KEPT_MAX:
            return
        if request in self._prompts:
            self._forget(self._prompts.pop(request))
        kept = self._prompts[request] = _Kept(prompt.tokens.copy(), _distinct(prompt.hashes))
        self._tokens += len(kept.tokens)
        np.add.at(self._buckets, _bucket(kept.sample), 1)
        while len(self._prompts) > PROMPTS_KEPT or self._tokens > TOKENS_KEPT_MAX:
            self._forget(self._prompts.popitem(last=False)[1])

    def tokens(self, request: str) -> NDArray[np.uint32] | None:
        """The tokens of a prompt that is still remembered."""
        kept = self._prompts.get(request)
        return None if kept is None else kept.tokens

    def _forget(self, kept: _Kept) -> None:
        self._tokens -= len(kept.tokens)
        np.subtract.at(self._buckets, _bucket(kept.sample), 1)


def _distinct(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Sorted, each once. `np.unique` would import `numpy.ma` first, while a client waits."""
    found = np.sort(hashes)
    return found[np.insert(found[1:] != found[:-1], 0, True)] if len(found) else found


def _bucket(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (hashes >> np.uint64(64 - BUCKET_BITS)).astype(np.int64)


def _share(rest: NDArray[np.uint64], sample: NDArray[np.uint64]) -> float:
    """How much of `rest` occurs in a sorted sample."""
    if not len(rest) or not len(sample):
        return 0.0
    places = np.searchsorted(sample, rest)
    return float((sample[np.minimum(places, len(sample) - 1)] == rest).mean())


def _parting(one: NDArray[np.uint32], other: NDArray[np.uint32], start: int, stop: int) -> int | None:
    """The first token at which two prompts differ, if that is in [start, stop)."""
    stop = min(stop, len(one), len(other))
    if stop <= start or not np.array_equal(one[:start], other[:start]):
        return None
    different = np.flatnonzero(one[start:stop] != other[start:stop])
    return start + int(different[0]) if len(different) else None
