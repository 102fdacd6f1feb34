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
from itertools import pairwise
from pathlib import Path
from statistics import NormalDist
from types import MappingProxyType
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from thermocline.costs.trace import Trace
from thermocline.errors import SettingsError, TraceError

REQUESTS_MAX, BLOCKS_MAX = 200_000, 8_000_000
EXPONENT_MAX = 50.0
"""A pause is at most so many times e longer than usual: whoever describes nonsense gets numbers, not infinities."""
P90 = NormalDist().inv_cdf(0.9)

Tokens = Annotated[int, Meta(ge=0, le=1 << 24)]
Positive = Annotated[int, Meta(ge=1, le=1 << 24)]
Seconds = Annotated[float, Meta(ge=0, le=1e8)]


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a trace would tell, in numbers.

    `think_seconds` is from one request of a session to its next: the median, and with `think_seconds_p90` also the time
    that one in ten exceeds (log-normal). `reorderable` requests wait in a list and may be sent in any order.
    """

    name: str = "described"
    sessions: Positive = 300
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


def synthesise(told: Description) -> Trace:
    """A trace of what was told, the same one for the same description.

    Raises TraceError where it would be empty or too large.
    """
    lengths = _first_tokens(told) + told.growth_tokens * np.arange(told.turns)
    references = told.sessions * int((lengths // told.tokens_per_block).sum())
    if told.sessions * told.turns > REQUESTS_MAX or references > BLOCKS_MAX:
        raise TraceError(
            f"{told.sessions:,} sessions of {told.turns:,} turns are more than are synthesised",
            hint=f"ask for fewer sessions: at most {REQUESTS_MAX:,} requests and {BLOCKS_MAX:,} blocks in all",
        )
    if lengths[0] <= 0:
        raise TraceError("a workload of empty prompts", hint="give system_tokens, document_tokens or prompt_tokens")
    random = np.random.default_rng(told.seed)
    arrivals = _arrivals(told, random)
    documents = _documents(told, random)
    order = np.argsort(arrivals, axis=None, kind="stable")
    sessions, turns = np.divmod(order, told.turns)
    paths = [
        _path(told, session, documents[session], int(lengths[turn]))
        for session, turn in zip(sessions.tolist(), turns.tolist(), strict=True)
    ]
    flat = np.concatenate([np.zeros(0, np.int64), *paths])
    names, dense = np.unique(flat, return_inverse=True)
    came = arrivals.ravel()[order]
    return Trace(
        name=told.name,
        tokens_per_block=told.tokens_per_block,
        arrival_seconds=came - came[0],
        input_tokens=lengths[turns].astype(np.int64),
        output_tokens=np.full(len(order), told.output_tokens),
        sessions=sessions,
        blocks=dense.astype(np.int32),
        starts=np.concatenate([[0], np.cumsum([len(path) for path in paths])]),
        distinct_blocks=len(names),
        notes=(
            f"synthesised from a description with seed {told.seed}: {told.sessions:,} sessions, lengths do not vary",
        ),
    )


def _first_tokens(told: Description) -> int:
    return told.system_tokens + (told.document_tokens if told.documents else 0) + told.prompt_tokens


def _arrivals(told: Description, random: np.random.Generator) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """When each turn of each session comes."""
    begins = np.cumsum(random.exponential(3600 / told.sessions_per_hour, told.sessions))
    spread = 0.0
    if told.think_seconds_p90 is not None and told.think_seconds_p90 > told.think_seconds > 0:
        spread = math.log(told.think_seconds_p90 / told.think_seconds) / P90
    drawn = np.minimum(spread * random.standard_normal((told.sessions, told.turns)), EXPONENT_MAX)
    gaps = told.think_seconds * np.exp(drawn)
    gaps[:, 0] = begins
    return np.cumsum(gaps, axis=1)


def _documents(told: Description, random: np.random.Generator) -> list[int]:
    if not told.documents:
        return [0] * told.sessions
    weights = np.arange(1, told.documents + 1, dtype=float) ** -told.popularity
    drawn: list[int] = random.choice(told.documents, told.sessions, p=weights / weights.sum()).tolist()
    return drawn


def _path(told: Description, session: int, document: int, tokens: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Names of the whole blocks of a prompt. A block belongs to the last part that reaches into it."""
    size = told.tokens_per_block
    common = told.system_tokens // size
    shared = (told.system_tokens + told.document_tokens) // size if told.documents else common
    whole = tokens // size
    owners = (0, 1 + document, 1 + told.documents + session)
    edges = (0, min(common, whole), min(shared, whole), whole)
    parts = [
        (owner << 32) + np.arange(start, stop) for owner, (start, stop) in zip(owners, pairwise(edges), strict=True)
    ]
    return np.concatenate(parts)


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
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        fields = ", ".join(Description.__struct_fields__)
        raise SettingsError(f"{path} describes no workload: {error}", hint=f"what it may say: {fields}") from None
