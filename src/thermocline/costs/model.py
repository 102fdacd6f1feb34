"""Costs in seconds, learned from what was measured: a transfer is a line in bytes, a prefill a plane in tokens.

    transfer(n)          = latency + n / bandwidth                           per tier
    recompute(n, cached) = a + b * n + c * n * (cached + n / 2)              n new tokens behind `cached` known ones

The last factor is the mean context of the new tokens, so `c` is the price of attention and `b` that of everything else.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

FORGETTING = 0.8
"""An observation counts half after three more of its size: machines change their speed, and the plan should follow."""

SLOWED_FORGETTING = 0.7
"""The same after one that took more than twice as long as predicted. Errors are relative to what was measured, so a
single such observation hardly counts itself; but when a machine has become slow, what it did before must go soon."""

PRIOR_WEIGHT = 1e-3
"""How much the prior counts beside one observation: it decides only what no observation speaks about."""

SECONDS_MIN, SECONDS_MAX = 1e-9, 1e9
SIZES_MAX = 64
SUM_MAX = 1e200
WEIGHT_MAX = 1 / (1 - FORGETTING) + 1
"""No class weighs more than a sum of ever older observations."""

TRANSFER_PRIORS = {"memory": (20e-6, 1 / 5e9), "disk": (1e-3, 1 / 0.5e9)}
TRANSFER_PRIOR = (2e-3, 1 / 0.2e9)
PREFILL_PRIOR = (5e-3, 2e-4, 1e-8)
MODELS_KEPT = 16
SURE_OBSERVATIONS = 16
"""More than are made at the start: one busy moment there should not decide what is kept."""


class Costs(Protocol):
    """What the plan asks. Pure between two observations: the same question has the same answer."""

    def recompute(self, tokens: int, cached: int, model: str = "") -> float:
        """Seconds to compute `tokens` more tokens behind `cached` ones; 0 for no tokens.

        `model` names what computes (see `Layout.computed_by`), where one store serves several.
        """

    def transfer(self, nbytes: int, tier: str) -> float:
        """Seconds to load `nbytes` from a tier."""

    def sure(self, tier: str, model: str = "") -> bool:
        """True once prefills and loads from this tier were measured often: before that, nothing should be refused."""


@dataclass(slots=True)
class _Observed:
    """What was measured of one class of sizes; older measurements have faded."""

    sums: NDArray[np.float64]
    slowness: float = 0.0  # the sum of the logarithms of seconds / prior, as heavy as the observations
    weight: float = 0.0

    def fade(self, kept: float) -> None:
        self.sums *= kept
        self.slowness *= kept
        self.weight *= kept


class SizeState(msgspec.Struct, frozen=True):
    """What was measured of one class of sizes, as it is saved."""

    size: int
    sums: tuple[tuple[float, ...], ...]
    slowness: float
    weight: float


class FitState(msgspec.Struct, frozen=True):
    """All that a fit has learned. It means something only beside the `prior` that it was learned with."""

    prior: tuple[float, ...]
    sizes: tuple[SizeState, ...]
    observations: int = 0


class Fit:
    """Least squares with forgetting, relative to the size of what was measured, with weights that cannot be negative.

    Every observation asks that weights . terms / seconds = 1, so small and large transfers count alike; only the sums
    of products are kept, per class of sizes. Each class speaks with one voice: a hundred short tails do not outvote the
    one long prompt that says what long prompts cost. The prior joins in with a few typical rows, scaled to how fast
    this machine has proven to be: it says how the terms compare with each other, not how long they take. A negative
    weight is set to zero and the rest is fitted again (the first steps of Lawson and Hanson's NNLS, 1974, which for two
    or three terms is all of it).
    """

    def __init__(
        self, prior: Sequence[float], typical: Sequence[Sequence[float]], forgetting: float = FORGETTING
    ) -> None:
        """`forgetting` is what is left of an observation's weight with each later one of its size."""
        rows = np.array(typical, float)
        rows /= (rows @ np.array(prior))[:, None]
        self._scale = 1 / np.abs(rows).max(axis=0)
        self._prior, self._forgetting = tuple(prior), forgetting
        self._prior_sums = PRIOR_WEIGHT * _products(rows * self._scale)
        self._classes: dict[int, _Observed] = {}
        self.observations = 0
        self._weights: tuple[float, ...] | None = self._prior
        self._lock = threading.Lock()

    @property
    def observed(self) -> bool:
        """True once there was a measurement."""
        return bool(self._classes)

    def state(self) -> FitState:
        """What was learned; `restore` takes it."""
        with self._lock:
            sizes = (
                SizeState(size, tuple(map(tuple, seen.sums.tolist())), seen.slowness, seen.weight)
                for size, seen in self._classes.items()  # in this order: sums of floats depend on it
            )
            return FitState(self._prior, tuple(sizes), self.observations)

    def restore(self, state: FitState) -> bool:
        """Go on from what was learned before. False, and nothing changed, where it does not fit or cannot be true."""
        shape = self._prior_sums.shape
        if state.prior != self._prior or len(state.sizes) > SIZES_MAX or state.observations < 0:
            return False
        classes: dict[int, _Observed] = {}
        for seen in state.sizes:
            rows = {len(row) for row in seen.sums}
            if (len(seen.sums), rows) != (shape[0], {shape[1]}) or not 0 <= seen.size <= SIZES_MAX:
                return False
            classes[seen.size] = _Observed(np.array(seen.sums), seen.slowness, seen.weight)
        true = (_can_be_true(seen) for seen in classes.values())
        if not all(true):
            return False
        with self._lock:
            self._classes = classes
            self.observations = state.observations
            self._weights = None if classes else self._prior
        return True

    def observe(self, terms: Sequence[float], seconds: float) -> None:
        """One measurement. What took no time that a clock can tell says nothing, and is passed over."""
        if not SECONDS_MIN < seconds < SECONDS_MAX:
            return
        row = np.array(terms)[None] * self._scale / seconds
        with self._lock:
            if seconds > 2 * _dot(self._fitted(), terms):
                for observed in self._classes.values():
                    observed.fade(SLOWED_FORGETTING)
            size = int(terms[1]).bit_length() // 2
            observed = self._classes.setdefault(size, _Observed(np.zeros_like(self._prior_sums)))
            observed.fade(self._forgetting)
            observed.sums += _products(row)
            observed.slowness += math.log(seconds / _dot(self._prior, terms))
            observed.weight += 1
            self.observations += 1
            self._weights = None

    def predict(self, terms: Sequence[float]) -> float:
        """Seconds for these terms."""
        return _dot(self.weights, terms)

    @property
    def weights(self) -> tuple[float, ...]:
        """Seconds per unit of each term. Valid until the next observation."""
        weights = self._weights
        if weights is None:
            with self._lock:
                weights = self._fitted()
        return weights

    def _fitted(self) -> tuple[float, ...]:
        if self._weights is None:
            classes = self._classes.values()
            voices = [1 / max(1.0, observed.weight) for observed in classes]
            slowness = sum(voice * observed.slowness for voice, observed in zip(voices, classes, strict=True))
            slowness /= sum(voice * observed.weight for voice, observed in zip(voices, classes, strict=True))
            sums = self._prior_at(slowness)
            for voice, observed in zip(voices, classes, strict=True):
                sums += voice * observed.sums
            self._weights = tuple((_non_negative(sums) * self._scale).tolist())
        return self._weights

    def _prior_at(self, slowness: float) -> NDArray[np.float64]:
        prior = self._prior_sums / math.exp(slowness)
        prior[:-1] /= math.exp(slowness)
        return prior


def _can_be_true(seen: _Observed) -> bool:
    """Sums of squares of numbers that fit with each other; not those of somebody who wrote them by hand."""
    numbers = np.append(seen.sums.ravel(), [seen.slowness, seen.weight])
    if not np.isfinite(numbers).all() or not 0 < seen.weight <= WEIGHT_MAX or (seen.sums < 0).any():
        return False
    return abs(seen.slowness) <= seen.weight * math.log(SECONDS_MAX / SECONDS_MIN) and bool((seen.sums < SUM_MAX).all())


def _dot(weights: Sequence[float], terms: Sequence[float]) -> float:
    return math.fsum(weight * term for weight, term in zip(weights, terms, strict=True))


def _products(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sums that least squares needs of rows whose right side is 1: products of columns, then the columns."""
    return np.vstack([rows.T @ rows, rows.sum(axis=0)])


def _non_negative(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    products, right = sums[:-1], sums[-1]
    weights = np.zeros(len(right))
    active = np.arange(len(right))
    while len(active):
        solved = np.linalg.lstsq(products[np.ix_(active, active)], right[active])[0]  # also where they contradict
        if (solved >= 0).all():
            weights[active] = solved
            break
        active = active[solved > 0]
    return weights


class CostsState(msgspec.Struct, frozen=True):
    """All that was learned on one machine: prefills by model, named by whoever computes them, and transfers by tier."""

    prefills: dict[str, FitState] = {}
    transfers: dict[str, FitState] = {}


class LearnedCosts:
    """`Costs` that start from rough priors, or from what was learned before, and follow what engine and tiers report.

    There is one such object per store, and whoever asks for seconds asks it: so all of them hear the same.
    """

    def __init__(self, before: CostsState | None = None, measured: FitState | None = None) -> None:
        """`before` is what was learned here. Models of which that says nothing begin with what was `measured`."""
        self._before, self._measured = before or CostsState(), measured
        self._model = ""
        self._prefill = self._begun("")
        self._prefills: dict[str, Fit] = {}
        self._transfers: dict[str, Fit] = {}
        for tier, state in self._before.transfers.items():
            self._transfer(tier).restore(state)

    def recompute(self, tokens: int, cached: int, model: str = "") -> float:
        """See `Costs.recompute`. A model that nothing is known of is taken for the one that computes now."""
        return self._prefill_of(model).predict(_prefill_terms(tokens, cached)) if tokens > 0 else 0.0

    def transfer(self, nbytes: int, tier: str) -> float:
        """See `Costs.transfer`."""
        return self._transfer(tier).predict((1.0, float(nbytes))) if nbytes > 0 else 0.0

    # -- learning ------------------------------------------------------------------------------------------------------

    def computes(self, model: str) -> bool:
        """Prefills that name no model are of this one from now on. True if what they take is known from before."""
        self._model, self._prefill = model, self._learned(model)
        return self._prefill.observed

    def knows(self, tier: str) -> bool:
        """True if a load from this tier was ever measured."""
        fit = self._transfers.get(tier)
        return fit is not None and fit.observed

    def sure(self, tier: str, model: str = "") -> bool:
        """See `Costs.sure`."""
        loads = self._transfers.get(tier)
        return loads is not None and min(loads.observations, self._prefill_of(model).observations) >= SURE_OBSERVATIONS

    def recomputed(self, tokens: int, cached: int, seconds: float, model: str = "") -> None:
        """The engine took `seconds` to compute `tokens` behind `cached` ones."""
        fit = self._learned(model) if model else self._prefill
        fit.observe(_prefill_terms(tokens, cached), seconds)

    def transferred(self, tier: str, nbytes: int, seconds: float) -> None:
        """A tier took `seconds` to load `nbytes`."""
        self._transfer(tier).observe((1.0, float(nbytes)), seconds)

    def not_transferred(self, tier: str, nbytes: int, seconds: float) -> None:
        """A tier was given up after `seconds`: `nbytes` take at least so long. News only where less was predicted."""
        if self.transfer(nbytes, tier) < seconds:
            self.transferred(tier, nbytes, seconds)

    def state(self) -> CostsState:
        """What was learned, with what was known before of models that are not computed now."""
        prefills = dict(self._before.prefills)
        for model, fit in list(self._prefills.items()):
            if model and fit.observed:
                prefills.pop(model, None)  # the last one in is the last one dropped
                prefills[model] = fit.state()
        kept = list(prefills.items())[-MODELS_KEPT:]
        transfers = {tier: fit.state() for tier, fit in list(self._transfers.items()) if fit.observed}
        return CostsState(dict(kept), transfers)

    def close(self) -> None:
        """Nothing more will be learned. What was is kept by those that save it."""

    def _prefill_of(self, model: str) -> Fit:
        return self._prefills.get(model, self._prefill)

    def _learned(self, model: str) -> Fit:
        """The fit of a model, from what was known before at first."""
        fit = self._prefills.pop(model, None)
        if fit is None:
            fit = self._begun(model)
        self._prefills[model] = fit  # the last one used is the last one dropped
        while len(self._prefills) > MODELS_KEPT:
            del self._prefills[next(iter(self._prefills))]
        return fit

    def _begun(self, model: str) -> Fit:
        """A fit as it was left, or as it was measured of some model."""
        fit = _new_prefill()
        state = self._before.prefills.get(model) or self._measured
        if state is not None:
            fit.restore(state)
        return fit

    def _transfer(self, tier: str) -> Fit:
        fit = self._transfers.get(tier)
        if fit is None:
            prior = TRANSFER_PRIORS.get(tier, TRANSFER_PRIOR)
            fit = self._transfers.setdefault(tier, Fit(prior, [(1.0, 1e5), (1.0, 1e8)]))
        return fit


def _new_prefill() -> Fit:
    return Fit(PREFILL_PRIOR, [_prefill_terms(64, 0), _prefill_terms(2048, 0), _prefill_terms(16384, 16384)])


def _prefill_terms(tokens: int, cached: int) -> tuple[float, float, float]:
    return 1.0, float(tokens), tokens * (cached + tokens / 2)
