"""What one instance takes, learned from the first tokens that it gave.

    seconds = a + b * n + c * n * (cached + n / 2) + streams * d + host * e + disk * f + peer * g

n tokens are computed behind `cached` known ones while `streams` answers are being written; host, disk and peer tokens
are loaded first. It is the fit of `costs/model.py`, which the tiers use, with more terms. What that makes of a first
token is learned apart: see `Steps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from thermocline.costs.measured import Measured
from thermocline.costs.model import PREFILL_PRIOR, Fit
from thermocline.fleet.instance import Ask, Choice, Tier

Terms = tuple[float, float, float, float, float, float, float]
STREAM_PRIOR, HOST_PRIOR, DISK_PRIOR, PEER_PRIOR = 1e-3, 1e-5, 5e-5, 5e-5
PRIOR: Terms = (*PREFILL_PRIOR, STREAM_PRIOR, HOST_PRIOR, DISK_PRIOR, PEER_PRIOR)
LOADED_FROM = {Tier.HOST: 4, Tier.DISK: 5, Tier.PEER: 6}
_SOURCES = {"host": Tier.HOST, "memory": Tier.HOST, "disk": Tier.DISK, "p2p": Tier.PEER, "redis": Tier.PEER}
"""The words of engines for where cached tokens came from; all others are of the device."""
OWN_OBSERVATIONS = 32
"""An instance is believed to take what the fleet takes, until it has shown so much of its own: then half of each is
believed (shrinkage, James and Stein, 1961). A few slow steps of one of two equal servers would else send conversations
to the other one, where they stay: in simulated pairs with noisy steps one had over 60 % in one run of eight."""
OPEN_OBSERVATIONS = 8
"""Before so many, nothing is odd, and what waiting means is not learned."""
FORGETTING = 0.95
"""First tokens are noisier than loads and prefills that were measured apart, so more of them count."""
ODD = 2.0
"""After the first few, what is further off its prediction than this factor counts only if the one before was so too."""
EVERY_SECONDS = 1.0
EAGER_OBSERVATIONS = 32
"""A fit costs some 0.2 ms: later ones are made once a second at most."""
TOGETHER = 0.1
"""First tokens that come within so much of a stretch's length after it are of the same step."""
STEP_FADING = 0.98
STEP_PRIOR = 0.01
STEP_MAX, WAIT_MIN, OFF_MAX = 8.0, 0.1, 4.0
"""No share is learned to be more than the first, and waiting never to be nothing: one that hangs must look worse the
longer it does. What was predicted at more than the last times what it took is news, but does not decide alone."""


@dataclass(slots=True)
class Steps:
    """What it means that requests wait: seconds = behind * own + wait * booked, learned by least squares.

    One that computes requests in turn has 1 and 1. Engines that batch compute in one step what came while they were
    busy, and all of it has its first token at the step's end: then `behind` counts those that come later and get into
    the same step, which nobody can know when a request is booked. Errors are relative to what it took.
    """

    behind: float = 1.0
    wait: float = 1.0
    _sums: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0, 0.0)

    def observe(self, own_seconds: float, booked_seconds: float, seconds: float) -> None:
        """A first token took so long behind what was booked."""
        per_second = 1 / max(seconds, (own_seconds + booked_seconds) / OFF_MAX)
        own, booked = own_seconds * per_second, booked_seconds * per_second
        new = (own * own, own * booked, booked * booked, own, booked)
        self._sums = tuple(STEP_FADING * total + more for total, more in zip(self._sums, new, strict=True))
        xx, xy, yy, x, y = self._sums
        behind, wait = _two(xx + STEP_PRIOR, xy, yy + STEP_PRIOR, x + STEP_PRIOR, y + STEP_PRIOR)
        self.behind, self.wait = min(max(behind, 1.0), STEP_MAX), min(max(wait, WAIT_MIN), STEP_MAX)


def _two(xx: float, xy: float, yy: float, x: float, y: float) -> tuple[float, float]:
    """The least squares of a * x + b * y = 1 with a and b not negative, from sums of products."""
    apart = xx * yy - xy * xy
    if apart > 1e-9 * xx * yy:
        a, b = (x * yy - y * xy) / apart, (y * xx - x * xy) / apart
        if a >= 0 and b >= 0:
            return a, b
    only_a, only_b = x / xx, y / yy
    return (only_a, 0.0) if x * only_a > y * only_b else (0.0, only_b)


@dataclass(slots=True)
class Stretch:
    """A stretch of an instance's time that went into the prefills of one step: what a fit can learn from.

    First tokens that come together were computed together. The time since the ones before is what they took, all at
    once; each request's own time to first token would count the others' as well.
    """

    started: float
    ended: float
    sums: list[float] = field(default_factory=lambda: [0.0] * len(PRIOR))
    unfinished: int = 0
    closed: bool = False


class _Mixed(NamedTuple):
    """Weights, and what they were made of."""

    own: tuple[float, ...]
    common: tuple[float, ...]
    weights: tuple[float, ...]


class InstanceCosts:
    """Learned costs of one instance, mixed with those of `common`, to which all of a fleet add."""

    def __init__(self, common: Fit | None = None) -> None:
        self._common, self._fit = common or new_fit(), new_fit()
        self._mixed = _Mixed((), (), ())
        self._learned_at = -EVERY_SECONDS
        self._open: Stretch | None = None
        self._odd = 0
        self.steps = Steps()

    @property
    def weights(self) -> tuple[float, ...]:
        """From a to g of the formula above. The same object until something was learned."""
        own, common = self._fit.weights, self._common.weights
        if self._mixed.own is not own or self._mixed.common is not common:
            share = self.observations / (self.observations + OWN_OBSERVATIONS)
            both = zip(own, common, strict=True)
            self._mixed = _Mixed(own, common, tuple(share * mine + (1 - share) * all_ for mine, all_ in both))
        return self._mixed.weights

    @property
    def observations(self) -> int:
        """How many stretches were learned from."""
        return self._fit.observations

    def first_token(self, arrived: float, now: float) -> Stretch:
        """The stretch that a first token at `now` belongs to. `finished` wants it back."""
        stretch = self._open
        if stretch is None or stretch.closed or arrived >= stretch.ended or _apart(stretch, now):
            if stretch is not None and not stretch.closed:
                self._close(stretch)
            started = arrived if stretch is None else max(arrived, stretch.ended)
            stretch = self._open = Stretch(started, now)
        stretch.ended = max(now, stretch.ended)
        stretch.unfinished += 1
        return stretch

    def finished(self, stretch: Stretch, terms: Sequence[float], *, idle: bool) -> None:
        """A request of this stretch is over, and this is what it was made of. `idle`: nothing else waits there."""
        stretch.sums = [total + term for total, term in zip(stretch.sums, terms, strict=True)]
        stretch.unfinished -= 1
        if stretch.closed:
            self._learn(stretch)
        elif idle and not stretch.unfinished:
            self._close(stretch)

    def waited(self, terms: Sequence[float], booked_seconds: float, seconds: float) -> None:
        """Its first token took `seconds`, and so much was booked before it. While little is known that says nothing."""
        if booked_seconds > 0 and seconds > 0 and self._common.observations >= OPEN_OBSERVATIONS:
            alone = zip(self.weights, (*terms[:3], 0.0, *terms[4:]), strict=True)
            self.steps.observe(sum(weight * term for weight, term in alone), booked_seconds, seconds)

    def _close(self, stretch: Stretch) -> None:
        stretch.closed = True
        self._learn(stretch)

    def _learn(self, stretch: Stretch) -> None:
        observations = self._fit.observations
        soon = observations >= EAGER_OBSERVATIONS and stretch.ended - self._learned_at < EVERY_SECONDS
        if stretch.unfinished or stretch.sums[1] <= 0 or soon:
            return
        seconds = stretch.ended - stretch.started
        if observations >= OPEN_OBSERVATIONS:
            ratio = seconds / self._fit.predict(stretch.sums)
            before, self._odd = self._odd, (ratio > ODD) - (ratio < 1 / ODD)
            if self._odd not in {0, before}:
                return
        for fit in (self._fit, self._common):
            fit.observe(stretch.sums, seconds)
        self._learned_at = stretch.ended


def new_fit(measured: Measured | None = None) -> Fit:
    """What is believed of instances of which nothing is known, but what a profile `measured` of one like them."""
    fit = Fit(PRIOR, _TYPICAL, FORGETTING)
    for row in measured.rows if measured is not None else ():
        if row.alone:
            new, loaded = row.prompt_tokens - row.cached, [0.0, 0.0, 0.0]
            if row.source in _SOURCES:
                loaded[LOADED_FROM[_SOURCES[row.source]] - 4] = float(row.cached)
            fit.observe((1.0, float(new), new * (row.cached + new / 2), 0.0, *loaded), row.first_token_seconds)
    return fit


def _apart(stretch: Stretch, now: float) -> bool:
    return now - stretch.ended > TOGETHER * (stretch.ended - stretch.started)


def terms_of(ask: Ask, choice: Choice, streams: int, cached_tokens: int) -> Terms:
    """What a request was made of, with `cached_tokens` of its prompt not computed."""
    new = max(ask.prompt_tokens - cached_tokens, 1)
    loaded = [0.0, 0.0, 0.0]
    at = LOADED_FROM.get(Tier(choice.tier))
    if at is not None:
        loaded[at - 4] = float(min(choice.loaded_tokens, cached_tokens))
    return (1.0, float(new), new * (cached_tokens + new / 2), float(streams), loaded[0], loaded[1], loaded[2])


_TYPICAL: tuple[Terms, ...] = (
    (1.0, 64.0, 64 * 32.0, 0.0, 0.0, 0.0, 0.0),
    (1.0, 2048.0, 2048 * 1024.0, 0.0, 0.0, 0.0, 0.0),
    (1.0, 16384.0, 16384 * 24576.0, 0.0, 0.0, 0.0, 0.0),
    (1.0, 256.0, 256 * 128.0, 64.0, 0.0, 0.0, 0.0),
    (1.0, 64.0, 64 * 8192.0, 0.0, 8192.0, 0.0, 0.0),
    (1.0, 64.0, 64 * 8192.0, 0.0, 0.0, 8192.0, 0.0),
    (1.0, 64.0, 64 * 8192.0, 0.0, 0.0, 0.0, 8192.0),
)
"""Where the prior speaks: prefills of three sizes, many streams, and a load from each tier."""
