"""Likeness: which recent prompt this one resembles, and the token where they part.

A timestamp at the top of a prompt changes every key behind it, so keys alone say "never seen". Prompts are compared by
a sample of their windows of eight tokens, chosen by content (winnowing by hash value: Schleimer, Wilkerson, Aiken,
2003), so that inserted tokens do not hide what follows them.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW_TOKENS = 8
SAMPLE_ONE_IN = 8
PROMPTS_KEPT = 64
TOKENS_KEPT_MAX = 4_000_000
SHARE_MIN = 0.5
REST_SAMPLE_MAX = 256
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, as in Fibonacci hashing


@dataclass(frozen=True, slots=True)
class Resemblance:
    """This prompt equals `request` up to token `at`, and `share` of the rest of it occurs there too."""

    request: str
    at: int
    share: float


@dataclass(frozen=True, slots=True)
class _Prompt:
    tokens: NDArray[np.uint32]
    sample: NDArray[np.uint64]


class Likeness:
    """The last prompts, in memory only, bounded in number and tokens. Not thread-safe.

    Only prompts of one `group` (a secret number per cache salt) resemble each other: it enters every hash.
    """

    def __init__(self) -> None:
        self._prompts: OrderedDict[str, _Prompt] = OrderedDict()
        self._holders: Counter[int] = Counter()
        self._tokens = 0

    def closest(self, tokens: NDArray[np.uint32], start: int, stop: int, *, group: int = 0) -> Resemblance | None:
        """The recent prompt that parts from this one at a token in [start, stop), and holds most of what follows.

        None where none holds half of it. A prompt that goes on where an earlier one ended does not part from it; one
        that asks another question behind the same text does, but has little in common with it from there on.
        """
        hashes, positions = _sample(tokens, group)
        if self._holders.keys().isdisjoint(hashes.tolist()):
            return None  # text that nobody sent lately: no need to compare it with every prompt
        best: Resemblance | None = None
        for request, prompt in reversed(self._prompts.items()):
            at = _parting(tokens, prompt.tokens, start, stop)
            if at is None:
                continue
            rest = hashes[positions >= at]
            share = _share(rest[:: 1 + len(rest) // REST_SAMPLE_MAX], prompt.sample)
            if share >= SHARE_MIN and (best is None or share > best.share):
                best = Resemblance(request, at, share)
        return best

    def note(self, request: str, tokens: NDArray[np.uint32], *, group: int = 0) -> None:
        """Remember a prompt; a later one of the same request takes its place."""
        if len(tokens) > TOKENS_KEPT_MAX:
            return
        if request in self._prompts:
            self._forget(self._prompts.pop(request))
        prompt = self._prompts[request] = _Prompt(tokens.copy(), np.unique(_sample(tokens, group)[0]))
        self._tokens += len(tokens)
        self._holders.update(prompt.sample.tolist())
        while len(self._prompts) > PROMPTS_KEPT or self._tokens > TOKENS_KEPT_MAX:
            self._forget(self._prompts.popitem(last=False)[1])

    def _forget(self, prompt: _Prompt) -> None:
        self._tokens -= len(prompt.tokens)
        for value in prompt.sample.tolist():
            self._holders[value] -= 1
            if not self._holders[value]:
                del self._holders[value]


def _share(rest: NDArray[np.uint64], sample: NDArray[np.uint64]) -> float:
    """How much of `rest` occurs in a sorted sample."""
    if not len(rest) or not len(sample):
        return 0.0
    places = np.searchsorted(sample, rest)
    return float((sample[np.minimum(places, len(sample) - 1)] == rest).mean())


def _sample(tokens: NDArray[np.uint32], group: int) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Hashes of about one window in `SAMPLE_ONE_IN`, and where the windows begin."""
    if len(tokens) < WINDOW_TOKENS:
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    wide = tokens.astype(np.uint64)
    count = len(tokens) - WINDOW_TOKENS + 1
    hashes = np.full(count, group, np.uint64)
    for at in range(WINDOW_TOKENS):
        hashes = (hashes ^ wide[at : at + count]) * _MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    positions = np.flatnonzero(hashes % np.uint64(SAMPLE_ONE_IN) == 0)
    return hashes[positions], positions


def _parting(one: NDArray[np.uint32], other: NDArray[np.uint32], start: int, stop: int) -> int | None:
    """The first token at which two prompts differ, if that is in [start, stop)."""
    stop = min(stop, len(one), len(other))
    if stop <= start or not np.array_equal(one[:start], other[:start]):
        return None
    different = np.flatnonzero(one[start:stop] != other[start:stop])
    return start + int(different[0]) if len(different) else None
