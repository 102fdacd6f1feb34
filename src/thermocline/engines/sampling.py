"""From logits to the next token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

GREEDY = 0.0
SEED_BITS = 64


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose. Temperature 0 takes the likeliest token, the lowest id among equals."""

    temperature: float = GREEDY
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, the natural logarithm of its probability, and the likeliest tokens with theirs."""

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class NotFiniteError(ArithmeticError):
    """The model computed a NaN or an infinity: no token follows from that."""


class Sampler:
    """Chooses the tokens of one request. The same seed and logits give the same tokens, whatever runs beside it."""

    def __init__(self, sampling: Sampling, *, logprobs: int | None = None) -> None:
        self._sampling = sampling
        self._logprobs = logprobs
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed % (1 << SEED_BITS))

    def choose(self, logits: Tensor) -> Choice:
        """The next token after logits [vocabulary]. Raises NotFiniteError."""
        wide = logits.float()
        best = int(wide.argmax())
        if not math.isfinite(float(wide[best])):  # argmax finds a NaN or +inf wherever there is one
            raise NotFiniteError
        token = best if self._sampling.temperature == GREEDY else self._draw(wide)
        if self._logprobs is None:
            return Choice(token)
        logs = wide.log_softmax(0)
        values, ids = logs.topk(min(self._logprobs, len(logs)))
        return Choice(token, float(logs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))

    def _draw(self, logits: Tensor) -> int:
        chances = (logits / self._sampling.temperature).softmax(0)
        if self._sampling.top_p < 1:
            ordered, ids = chances.sort(descending=True, stable=True)
            before = ordered.cumsum(0) - ordered
            ordered[before >= self._sampling.top_p] = 0  # keeps the first one always: nothing is before it
            return int(ids[torch.multinomial(ordered, 1, generator=self._random)])
        return int(torch.multinomial(chances, 1, generator=self._random))
