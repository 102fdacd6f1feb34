"""Costs in seconds, learned from what was measured: a transfer is a line in bytes, a prefill a plane in tokens.

    transfer(n)          = latency + n / bandwidth                           per tier
    recompute(n, cached) = a + b * n + c * n * (cached + n / 2)              n new tokens behind `cached` known ones

The last factor is the mean context of the new tokens, so `c` is the price of attention and `b` that of everything else.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

OBSERVATIONS_KEPT = 64
PRIOR_WEIGHT = 0.05
"""How much one line of the prior counts beside one observation: it decides only what no observation speaks about."""

TRANSFER_PRIORS = {"memory": (20e-6, 1 / 5e9), "disk": (1e-3, 1 / 0.5e9)}
TRANSFER_PRIOR = (2e-3, 1 / 0.2e9)
PREFILL_PRIOR = (5e-3, 2e-4, 1e-8)


class Costs(Protocol):
    """What the plan asks. Pure between two observations: the same question has the same answer."""

    def recompute(self, tokens: int, cached: int) -> float:
        """Seconds to compute `tokens` more tokens behind `cached` ones; 0 for no tokens."""

    def transfer(self, nbytes: int, tier: str) -> float:
        """Seconds to load `nbytes` from a tier."""


class Fit:
    """Least squares over the last observations, relative to their size, with weights that cannot be negative.

    Negative weights are set to zero and the rest is fitted again (the first steps of Lawson and Hanson's NNLS, 1974,
    which for two or three terms is all of it in practice).
    """

    def __init__(self, prior: Sequence[float], typical: Sequence[Sequence[float]]) -> None:
        self._prior = np.array(prior)
        rows = np.array(typical, float)
        self._prior_rows = PRIOR_WEIGHT * rows / (rows @ self._prior)[:, None]
        self._rows: deque[tuple[Sequence[float], float]] = deque(maxlen=OBSERVATIONS_KEPT)
        self._weights: NDArray[np.float64] | None = self._prior
        self._lock = threading.Lock()

    def observe(self, terms: Sequence[float], seconds: float) -> None:
        """One measurement. Non-positive seconds say nothing and are passed over."""
        if seconds > 0:
            with self._lock:
                self._rows.append((terms, seconds))
                self._weights = None

    def predict(self, terms: Sequence[float]) -> float:
        """Seconds for these terms."""
        weights = self._weights
        if weights is None:
            weights = self._solve()
        return float(sum(weight * term for weight, term in zip(weights.tolist(), terms, strict=True)))

    @property
    def observations(self) -> int:
        """How many measurements are in the fit."""
        return len(self._rows)

    def _solve(self) -> NDArray[np.float64]:
        with self._lock:
            measured = np.array([np.divide(terms, seconds) for terms, seconds in self._rows])
            left = np.vstack([measured, self._prior_rows])
            right = np.concatenate([np.ones(len(measured)), np.full(len(self._prior_rows), PRIOR_WEIGHT)])
            self._weights = _non_negative(left, right)
            return self._weights


def _non_negative(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    scale = np.abs(left).max(axis=0)
    active = np.arange(left.shape[1])
    while len(active):
        solved = np.linalg.lstsq(left[:, active] / scale[active], right, rcond=None)[0] / scale[active]
        if (solved >= 0).all():
            weights = np.zeros(left.shape[1])
            weights[active] = solved
            return weights
        active = active[solved > 0]
    return np.zeros(left.shape[1])


class LearnedCosts:
    """`Costs` that start from rough priors and follow what the engine and the tiers report."""

    def __init__(self) -> None:
        self._prefill = Fit(PREFILL_PRIOR, [_prefill_terms(64, 0), _prefill_terms(2048, 0), _prefill_terms(16384, 16384)])
        self._transfers: dict[str, Fit] = {}

    def recompute(self, tokens: int, cached: int) -> float:
        """See `Costs.recompute`."""
        return self._prefill.predict(_prefill_terms(tokens, cached)) if tokens > 0 else 0.0

    def transfer(self, nbytes: int, tier: str) -> float:
        """See `Costs.transfer`."""
        return self._transfer(tier).predict((1.0, float(nbytes))) if nbytes > 0 else 0.0

    def recomputed(self, tokens: int, cached: int, seconds: float) -> None:
        """The engine took `seconds` to compute `tokens` behind `cached` ones."""
        self._prefill.observe(_prefill_terms(tokens, cached), seconds)

    def transferred(self, tier: str, nbytes: int, seconds: float) -> None:
        """A tier took `seconds` to load `nbytes`."""
        self._transfer(tier).observe((1.0, float(nbytes)), seconds)

    def _transfer(self, tier: str) -> Fit:
        fit = self._transfers.get(tier)
        if fit is None:
            prior = TRANSFER_PRIORS.get(tier, TRANSFER_PRIOR)
            fit = self._transfers[tier] = Fit(prior, [(1.0, 1e5), (1.0, 1e8)])
        return fit


def _prefill_terms(tokens: int, cached: int) -> tuple[float, float, float]:
    return 1.0, float(tokens), tokens * (cached + tokens / 2)
