"""A workload that nobody recorded: described in a dozen numbers, and synthesised as a trace of the same value.

A prompt is a common part (a system prompt, tools), then a shared text that its session works on (a document, a
repository), then what is the session's own, which grows with every turn:

    | system_tokens | document_tokens | prompt_tokens, then growth_tokens more with each turn |
       every prompt    one of documents    of one session

Sessions begin at random (Poisson). Which document a session takes follows Zipf's law with the exponent `popularity`,
where 0 makes all equally likely. Lengths do not vary: a trace knows more, and is better where there is one.

`use_cases` are such descriptions with what is usually advised for them: a place to begin, for numbers to confirm.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from types import MappingProxyType
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from thermocline.costs.trace import Trace
from thermocline.errors import SettingsError, TraceError

REQUESTS_MAX, BLOCKS_MAX = 200_000, 8_000_000
SESSIONS_MIN, SESSIONS_PER_ACTIVE = 300, 4
EXPONENT_MAX = 50.0
"""A pause is at most so many times e longer than usual: whoever describes nonsense gets numbers, not infinities."""
P90 = NormalDist().inv_cdf(0.9)

Tokens = Annotated[int, Meta(ge=0, le=1 << 24)]
Positive = Annotated[int, Meta(ge=1, le=1 << 24)]
Seconds = Annotated[float, Meta(ge=0, le=1e8)]
Ints = NDArray[np.int64]


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a trace would tell, in numbers.

    `think_seconds` is from one request of a session to its next: the median, and with `think_seconds_p90` also the time
    that one in ten exceeds (log-normal). `reorderable` requests wait in a list and may be sent in any order. Without
    `sessions` there are several times as many as are active at a time.
    """

    name: str = "described"
    sessions: Positive | None = None
    sessions_per_hour: Annotated[float, Meta(gt=0, le=1e9)] = 60.0
    turns: Positive = 1
    think_seconds: Seconds = 60.0
    think_seconds_p90: Seconds | None = None
    system_tokens: Tokens = 0
    documents: Tokens = 0
    document_tokens: Tokens = 0
    popularity: Annotated[float, Meta(ge=0, le=10)] = 0.0
    prompt_tokens: Tokens = 500
    growth_tokens: Tokens = 400
    output_tokens: Tokens = 300
    tokens_per_block: Annotated[int, Meta(ge=16, le=1024, multiple_of=16)] = 64
    reorderable: bool = False
    seed: int = 1

    @property
    def spread(self) -> float:
        """Of the logarithms of pauses: 0 where all are alike."""
        p90, median = self.think_seconds_p90, self.think_seconds
        return math.log(p90 / median) / P90 if p90 is not None and p90 > median > 0 else 0.0

    @property
    def active(self) -> float:
        """Sessions between their first and last turn at a time, in the long run (Little's law)."""
        pause = self.think_seconds * math.exp(min(self.spread**2 / 2, EXPONENT_MAX))
        return self.sessions_per_hour / 3600 * (self.turns - 1) * pause

    @property
    def lengths(self) -> Ints:
        """Tokens of the prompt of each turn."""
        first = self.system_tokens + (self.document_tokens if self.documents else 0) + self.prompt_tokens
        found: Ints = first + self.growth_tokens * np.arange(self.turns)
        return found


@dataclass(frozen=True, slots=True)
class Synthesised:
    """A trace, and the hours in which as many sessions begin: rates are over these, as its end trails off."""

    trace: Trace
    hours: float


def synthesise(told: Description) -> Synthesised:
    """A trace of what was told, the same one for the same description.

    Raises TraceError where it would be empty or too large.
    """
    lengths = told.lengths
    if lengths[0] <= 0:
        raise TraceError("a workload of empty prompts", hint="give system_tokens, document_tokens or prompt_tokens")
    blocks = int((lengths // told.tokens_per_block).sum())
    most = min(REQUESTS_MAX // told.turns, BLOCKS_MAX // max(1, blocks))
    count = told.sessions or min(most, math.ceil(max(SESSIONS_MIN, SESSIONS_PER_ACTIVE * told.active)))
    if not 1 <= count <= most:
        raise TraceError(
            f"{count:,} sessions of {told.turns:,} turns and {blocks:,} blocks are more than are synthesised",
            hint=f"ask for fewer sessions: at most {REQUESTS_MAX:,} requests and {BLOCKS_MAX:,} blocks in all",
        )
    return Synthesised(_trace(told, count), count / told.sessions_per_hour)


def _trace(told: Description, count: int) -> Trace:
    random = np.random.default_rng(told.seed)
    arrivals, documents, lengths = _arrivals(told, count, random), _documents(told, count, random), told.lengths
    order = np.argsort(arrivals, axis=None, kind="stable")
    sessions, turns = np.divmod(order, told.turns)
    paths = [
        _path(told, session, documents[session], int(lengths[turn]))
        for session, turn in zip(sessions.tolist(), turns.tolist(), strict=True)
    ]
    names, dense = np.unique(np.concatenate([np.zeros(0, np.int64), *paths]), return_inverse=True)
    came = arrivals.ravel()[order]
    few = ("fewer sessions than are active in the long run: less room seems to be enough",)
    return Trace(
        name=told.name,
        tokens_per_block=told.tokens_per_block,
        arrival_seconds=came - came[0],
        input_tokens=lengths[turns],
        output_tokens=np.full(len(order), told.output_tokens),
        sessions=sessions,
        blocks=dense.astype(np.int32),
        starts=np.concatenate([[0], np.cumsum([len(path) for path in paths])]),
        distinct_blocks=len(names),
        notes=(
            f"synthesised, seed {told.seed}: {count:,} sessions",
            *((f"{told.active:,.0f} of them are active at a time, in the long run",) if told.turns > 1 else ()),
            "all sessions have prompts of the same lengths; they differ by their pauses",
            *(few if count < told.active else ()),
        ),
    )


def _arrivals(told: Description, count: int, random: np.random.Generator) -> NDArray[np.float64]:
    """When each turn of each session comes."""
    begins = np.cumsum(random.exponential(3600 / told.sessions_per_hour, count))
    drawn = np.minimum(told.spread * random.standard_normal((count, told.turns)), EXPONENT_MAX)
    gaps = told.think_seconds * np.exp(drawn)
    gaps[:, 0] = begins
    return np.cumsum(gaps, axis=1)


def _documents(told: Description, count: int, random: np.random.Generator) -> list[int]:
    if not told.documents:
        return [0] * count
    weights = np.arange(1, told.documents + 1, dtype=float) ** -told.popularity
    drawn: list[int] = random.choice(told.documents, count, p=weights / weights.sum()).tolist()
    return drawn


def _path(told: Description, session: int, document: int, tokens: int) -> Ints:
    """Names of the whole blocks of a prompt. A block belongs to the last part that reaches into it."""
    size = told.tokens_per_block
    common = told.system_tokens // size
    shared = (told.system_tokens + told.document_tokens) // size if told.documents else common
    whole = tokens // size
    owners = (0, 1 + document, 1 + told.documents + session)
    edges = pairwise((0, min(common, whole), min(shared, whole), whole))
    parts = zip(owners, edges, strict=True)
    named: Ints = np.concatenate([(owner << 32) + np.arange(start, stop) for owner, (start, stop) in parts])
    return named


# -- use cases ---------------------------------------------------------------------------------------------------------


class UseCase(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is usually advised: `tiers` beside the engine's own memory, and why; `habit` is about writing prompts."""

    title: str
    tiers: tuple[str, ...]
    why: str
    habit: str
    like: Description


@functools.cache
def use_cases() -> Mapping[str, UseCase]:
    """All of them by name, from the table that is shipped: a place to begin."""
    text = Path(__file__).with_name("data").joinpath("use_cases.toml").read_text()
    return MappingProxyType(msgspec.convert(tomllib.loads(text), dict[str, UseCase]))


def read(path: Path) -> Description:
    """A description from a TOML file. Raises SettingsError where it cannot be read, or says what we do not know."""
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Description)
    except OSError as error:
        raise SettingsError(
            f"cannot read {path}: {error.strerror}", hint="name a TOML file that describes a workload"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError, RecursionError) as error:
        fields = ", ".join(Description.__struct_fields__)
        raise SettingsError(f"{path} describes no workload: {error}", hint=f"what it may say: {fields}") from None
