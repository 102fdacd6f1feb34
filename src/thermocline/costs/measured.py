"""What was measured of one instance, as `thermocline profile --write` keeps it and others read it.

The file holds measurements, and no fit: whoever reads it fits them anew, so it does not age with our formulas.

    first token = a + b * n + c * n * (cached + n / 2) + load * cached

n new tokens are computed behind `cached` ones, and `load` is what a cached token takes from where it came. It is the
plane of `costs/model.py` with one more term for each source of cached tokens. `a` is all that a request takes whatever
its length is: HTTP and the engine's step.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from thermocline.costs import saved
from thermocline.costs.model import PREFILL_PRIOR, SECONDS_MAX, SECONDS_MIN, Fit, FitState, LearnedCosts
from thermocline.errors import SettingsError

VERSION = 1
FILE_BYTES_MAX, ROWS_MAX = 1 << 20, 4096
LOAD_PRIOR, DECODE_PRIOR = 1e-5, (1e-2, 1e-7)
SEEN = "measured"
UNTOLD = "unknown"
"""The source of cached tokens where the engine does not tell it."""
_HINT = "write one with `thermocline profile --write FILE`"

Tokens = Annotated[int, Meta(ge=0, le=1 << 32)]
Count = Annotated[int, Meta(ge=1, le=1 << 32)]
Seconds = Annotated[float, Meta(gt=SECONDS_MIN, lt=SECONDS_MAX)]
Words = Annotated[str, Meta(max_length=512)]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Requests of one kind: how long the prompt, how much of it is shared with one asked before, how many at once.

    `first_token_seconds` and `between_tokens_seconds` are medians over `requests`; `low_seconds` and `high_seconds`
    are the quickest and the slowest first token. `cached_tokens` is what the engine says it did not compute (the
    median; None where it says nothing), and `source` where that came from, in the engine's own word.
    """

    prompt_tokens: Count
    shared_tokens: Tokens
    cached_tokens: Tokens | None
    source: Words
    concurrency: Count
    requests: Count
    first_token_seconds: Seconds
    low_seconds: Seconds
    high_seconds: Seconds
    between_tokens_seconds: Seconds | None = None

    @property
    def told(self) -> bool:
        """True where it is known how many tokens were computed."""
        return not self.shared_tokens if self.cached_tokens is None else self.cached_tokens < self.prompt_tokens

    @property
    def alone(self) -> bool:
        """True where no other request ran beside it, and it is known what was computed: a fit learns from these."""
        return self.concurrency == 1 and self.told

    @property
    def cached(self) -> int:
        """Tokens that were not computed; none, where the engine does not tell."""
        return min(self.cached_tokens or 0, self.prompt_tokens)


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """KV memory in use while one request of this length ran, as the engine's metrics tell it. None: it tells nothing.

    `share` is of all KV memory of the instance. `kv_bytes` is there only where the engine tells bytes.
    """

    context_tokens: Count
    blocks: Tokens | None = None
    share: Annotated[float, Meta(ge=0, le=1)] | None = None
    kv_bytes: Annotated[int, Meta(ge=0)] | None = None


class Conditions(msgspec.Struct, frozen=True, kw_only=True):
    """Under what this was measured. `machine` is the one that asked, which need not be the one that answered."""

    date: Words
    url: Words
    model: Words
    engine: Words
    machine: Words
    context_tokens: Count | None = None
    block_tokens: Count | None = None
    kv_blocks: Count | None = None


class Measured(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """All measurements of one sweep. What it predicts holds for the range that was measured: see `tokens_max`."""

    version: int
    conditions: Conditions
    rows: Annotated[tuple[Row, ...], Meta(min_length=1, max_length=ROWS_MAX)]
    memory: Annotated[tuple[Memory, ...], Meta(max_length=ROWS_MAX)] = ()

    @property
    def tokens_max(self) -> int:
        """The longest prompt that was measured. Predictions beyond it are extrapolated."""
        return max(row.prompt_tokens for row in self.rows)

    def note(self, model: str) -> str:
        """Where these prefills are from, for an answer about `model`; it says where that is another one by its name."""
        told = self.conditions
        note = f"prefills: measured of {told.model} on {told.machine}, {told.date}, up to {self.tokens_max:,} tokens"
        if _last_name(told.model) == _last_name(model):
            return note
        return f"{note}; {told.model} is not {model} by its name, and of another model these seconds are wrong"

    @property
    def sources(self) -> tuple[str, ...]:
        """Where cached tokens came from, sorted."""
        return tuple(sorted({row.source for row in self._alone if row.cached}))

    @property
    def block_tokens(self) -> int:
        """Cached tokens come in multiples of this; 1 where the engine does not tell."""
        return self.conditions.block_tokens or 1

    def prefill_seconds(self, tokens: int, cached: int = 0) -> float:
        """Seconds to the first token of `tokens` new tokens behind `cached` ones, loading not counted.

        As `Costs.recompute`: for a prompt of n tokens of which c are cached, ask for (n - c, c).
        """
        return self._fit.predict(self._terms(tokens, cached, "")) if tokens > 0 else 0.0

    def load_seconds(self, tokens: int, source: str) -> float | None:
        """Seconds that cached tokens take from this source; None where none came from there."""
        at = self.sources.index(source) if source in self.sources else None
        return None if at is None else self._fit.weights[3 + at] * tokens

    def first_token_seconds(self, prompt_tokens: int, shared_tokens: int = 0, source: str | None = None) -> float:
        """What a request takes alone, of whose prompt so many leading tokens are held.

        Whole blocks are cached, and one token is always computed. `source` says where they are held; None: where the
        most came from in the sweep.
        """
        shared = min(shared_tokens, prompt_tokens - 1)
        cached = shared - shared % self.block_tokens
        return self._fit.predict(self._terms(prompt_tokens - cached, cached, self._usual if source is None else source))

    def expected_seconds(self, row: Row) -> float:
        """What a row that ran alone should have taken."""
        return self._fit.predict(self._terms(row.prompt_tokens - row.cached, row.cached, row.source))

    def decode_seconds(self, context_tokens: int, concurrency: int = 1) -> float | None:
        """Seconds per generated token of one stream while so many run; None where that many were not measured."""
        fit = Fit(DECODE_PRIOR, [(1.0, 64.0), (1.0, 16384.0)], forgetting=1.0)
        for row in self.rows:
            if row.concurrency == concurrency and row.between_tokens_seconds is not None:
                fit.observe((1.0, float(row.prompt_tokens)), row.between_tokens_seconds)
        return fit.predict((1.0, float(context_tokens))) if fit.observed else None

    def weights(self) -> Mapping[str, float]:
        """The fitted terms by name, in seconds per request, token, token and token of context, and cached token."""
        names = ("request", "token", "attended_token", *(f"load_{source}_token" for source in self.sources))
        return dict(zip(names, self._fit.weights, strict=True))

    def prefills(self) -> FitState:
        """The prefills as learned costs keep them: they can begin with these, as if they had seen them themselves."""
        costs = LearnedCosts()
        for row in self._alone:
            loading = self.load_seconds(row.cached, row.source) or 0.0
            costs.recomputed(row.prompt_tokens - row.cached, row.cached, row.first_token_seconds - loading, SEEN)
        return costs.state().prefills[SEEN]

    @functools.cached_property
    def _alone(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.alone)

    @functools.cached_property
    def _usual(self) -> str:
        cached = {source: sum(row.cached for row in self._alone if row.source == source) for source in self.sources}
        return max(cached, key=cached.__getitem__, default="")

    @functools.cached_property
    def _fit(self) -> Fit:
        typical = [self._terms(64, 0, ""), self._terms(2048, 0, ""), self._terms(16384, 16384, "")]
        typical += [self._terms(64, 8192, source) for source in self.sources]
        fit = Fit((*PREFILL_PRIOR, *(LOAD_PRIOR for _ in self.sources)), typical, forgetting=1.0)
        for row in self._alone:
            fit.observe(self._terms(row.prompt_tokens - row.cached, row.cached, row.source), row.first_token_seconds)
        return fit

    def _terms(self, tokens: int, cached: int, source: str) -> tuple[float, ...]:
        loaded = (float(cached) if each == source else 0.0 for each in self.sources)
        return (1.0, float(tokens), tokens * (cached + tokens / 2), *loaded)


def read(path: Path) -> Measured:
    """What a profile wrote. Raises SettingsError where there is no such file, or it cannot be used."""
    try:
        with path.open("rb") as file:
            body = file.read(FILE_BYTES_MAX + 1)
        if len(body) > FILE_BYTES_MAX:
            raise SettingsError(f"{path} is too large to be a profile", hint=_HINT)
        found = msgspec.json.decode(body, type=Measured)
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}", hint=_HINT) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SettingsError(f"{path} is not what a profile writes: {error}", hint=_HINT) from None
    if found.version != VERSION:
        raise SettingsError(f"{path} is of version {found.version}, and this one reads {VERSION}", hint=_HINT)
    if not any(row.alone for row in found.rows):
        raise SettingsError(f"{path} has no request that ran alone with its computed tokens known", hint=_HINT)
    return found


def write(path: Path, measured: Measured) -> None:
    """Replace the file in one step. Raises SettingsError where that cannot be done."""
    saved.put(path, msgspec.json.format(msgspec.json.encode(measured), indent=1) + b"\n")


def _last_name(model: str) -> str:
    """Of a folder, or behind an organisation: what servers and people call a model."""
    return model.rstrip("/").rsplit("/", 1)[-1].lower()
