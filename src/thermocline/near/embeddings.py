"""Embeddings, results of vector searches, chunk texts and answers, kept by the text that they are of.

A text finds only what was kept for it, or for one that `normalised` makes the same. That a *similar* text finds an
answer is opt-in (`Similar`), and takes a verifier: no threshold tells "enable 2FA" from "disable 2FA".
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import msgspec
import xxhash

from thermocline.errors import NearError, SettingsError
from thermocline.near.question import (
    SHARED,
    UNREADABLE,
    Question,
    Replies,
    Space,
    Words,
    cooked,
    damaged,
    digest,
    encoded,
    milliseconds,
    normalised,
    raw,
    reads,
    values,
)
from thermocline.near.sessions import Turn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Vector = NDArray[Any]
    """What an embedding comes back as: float32, read-only, without a copy."""

HEADER = struct.Struct("<4sB3xIQ")
"""Magic, kind of number, dimension, XXH3-64 of the numbers. They follow, little-endian."""
MAGIC, FLOAT32 = b"tcem", 1
FLOAT32_BYTES = 4
DIMENSION_MAX = 65_536
FOUND_MAX = 1_000
CANDIDATES_MAX = 1_024
DAY_SECONDS = 86_400.0


def pack(vector: Sequence[float] | Vector) -> bytes:
    """An embedding as it is kept. Raises NearError for what is none: empty, not finite, of two dimensions."""
    import numpy as np

    with np.errstate(over="ignore"):  # what is too large for float32 is infinite then
        numbers = np.asarray(vector, dtype="<f4")
    if numbers.ndim != 1 or not 0 < len(numbers) <= DIMENSION_MAX or not np.isfinite(numbers).all():
        raise NearError("this is no embedding", hint=f"it takes 1 to {DIMENSION_MAX} finite numbers")
    said = numbers.tobytes()
    return HEADER.pack(MAGIC, FLOAT32, len(numbers), xxhash.xxh3_64_intdigest(said)) + said


def unpack(kept: bytes) -> Vector:
    """What `pack` was given. Raises NearError for bytes that are not what it made."""
    import numpy as np

    if len(kept) >= HEADER.size:
        magic, kind, dimension, checksum = HEADER.unpack_from(kept)
        good = magic == MAGIC and kind == FLOAT32 and 0 < dimension <= DIMENSION_MAX
        if good and len(kept) == HEADER.size + FLOAT32_BYTES * dimension:
            said = memoryview(kept)[HEADER.size :]
            if xxhash.xxh3_64_intdigest(said) == checksum:
                return np.frombuffer(said, dtype="<f4")
    raise damaged("an embedding")


@dataclass(frozen=True, slots=True)
class _ByText:
    """What these have in common: a model or an index, how texts are made the same, and an age."""

    name: str
    space: Space = SHARED
    ttl_seconds: float = DAY_SECONDS
    fold_case: bool = False
    keep_spaces: bool = False

    def __post_init__(self) -> None:
        milliseconds(self.ttl_seconds)

    def _same(self, text: str) -> str:
        """What texts that are the same here share, and those of a store that has them the same otherwise do not."""
        how = f"{self.fold_case:d}{self.keep_spaces:d}"
        return how + normalised(text, fold_case=self.fold_case, keep_spaces=self.keep_spaces)


def _set(key: str, value: bytes, ttl_seconds: float) -> Words:
    return "SET", key, value, "PX", milliseconds(ttl_seconds)


@dataclass(frozen=True, slots=True)
class Embeddings(_ByText):
    """Embeddings of texts. `name` is the model's, with its version where that changes what it says."""

    def get(self, *texts: str) -> Question[tuple[Vector | None, ...]]:
        """Of each text its embedding, or None."""
        return Question(reads([self._key(text) for text in texts]), _vectors, (None,) * len(texts))

    def put(self, text: str, vector: Sequence[float] | Vector) -> Question[None]:
        """Keep it. Raises NearError for what is no embedding."""
        return Question((_set(self._key(text), pack(vector), self.ttl_seconds),), _nothing, None, writes=True)

    def _key(self, text: str) -> str:
        return self.space.key("embedding", digest(self.name, self._same(text)))


def _vectors(replies: Replies) -> tuple[Vector | None, ...]:
    return tuple(None if kept is None else unpack(kept) for kept in values(replies))


def _nothing(replies: Replies) -> None:
    del replies


class Found(msgspec.Struct, frozen=True, array_like=True):
    """One result of a vector search."""

    id: str
    score: float


@dataclass(frozen=True, slots=True)
class Results(_ByText):
    """Results of vector searches. `name` is the index's, with its version: results of an older index are others."""

    def get(self, query: str, *, limit: int, where: str = "") -> Question[tuple[Found, ...] | None]:
        """What was found for this query, with this limit and this filter; None where that is not known."""
        return Question((("GET", self._key(query, limit, where)),), _found, None)

    def put(self, query: str, found: Sequence[Found], *, limit: int, where: str = "") -> Question[None]:
        """Keep what was found. Raises NearError for more than 1,000."""
        if len(found) > FOUND_MAX:
            raise NearError(f"{len(found)} results", hint=f"up to {FOUND_MAX} are kept")
        said = encoded(tuple(found))
        return Question((_set(self._key(query, limit, where), said, self.ttl_seconds),), _nothing, None, writes=True)

    def _key(self, query: str, limit: int, where: str) -> str:
        return self.space.key("results", digest(self.name, self._same(query), str(limit), where))


def _found(replies: Replies) -> tuple[Found, ...] | None:
    try:
        return None if replies[0] is None else msgspec.json.decode(replies[0], type=tuple[Found, ...])
    except msgspec.DecodeError as error:
        raise damaged("what was found") from error


@dataclass(frozen=True, slots=True)
class Chunks:
    """Texts by the id that an index gives them."""

    space: Space = SHARED
    ttl_seconds: float = DAY_SECONDS

    def get(self, *ids: str) -> Question[tuple[str | None, ...]]:
        """Of each id its text, or None."""
        return Question(reads([self._key(id_) for id_ in ids]), _texts, (None,) * len(ids))

    def put(self, texts: Mapping[str, str]) -> Question[None]:
        """Keep them, all in one round trip."""
        commands = (_set(self._key(id_), raw(text), self.ttl_seconds) for id_, text in texts.items())
        return Question(tuple(commands), _nothing, None, writes=True)

    def _key(self, id_: str) -> str:
        return self.space.named("chunk", id_)


def _texts(replies: Replies) -> tuple[str | None, ...]:
    try:
        return tuple(None if text is None else cooked(text) for text in values(replies))
    except UNREADABLE as error:
        raise damaged("a chunk") from error


# -- answers, and those of similar queries -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Scope:
    """All that an answer depends on beside its query; the tenant is the `Space`'s. Nothing of it is made the same."""

    model: str
    system_prompt: str = ""
    history: tuple[Turn, ...] = ()

    def digest(self) -> str:
        """64 digits that stand for it."""
        return digest(
            self.model, self.system_prompt, *(part for turn in self.history for part in (turn.role, turn.text))
        )


class Answer(msgspec.Struct, frozen=True):
    """An answer, and the query that it was given to. `similarity` is None where that is the one asked about."""

    query: str
    text: str
    similarity: float | None = None


class _Kept(msgspec.Struct, frozen=True, array_like=True):
    query: bytes
    text: bytes


class _Candidate(msgspec.Struct, frozen=True, array_like=True):
    key: str
    vector: bytes


@dataclass(frozen=True, slots=True)
class SimilarStats:
    """Counts since the start. `looked_up`: queries without an own answer; `similar`: one was within the threshold.

    `failed`: the verifier raised, or the answer was gone by then; nothing was returned.
    """

    looked_up: int = 0
    similar: int = 0
    verified: int = 0
    refuted: int = 0
    failed: int = 0

    @property
    def false_hit_rate(self) -> float | None:
        """Of the answers that the threshold alone would have returned: the share that was not for the query."""
        judged = self.verified + self.refuted
        return self.refuted / judged if judged else None


class Similar:
    """Opt-in: a query whose embedding is similar to that of a kept one may find its answer.

    `threshold` is the least cosine similarity, from 0 to 1: `>=` it is similar; at 1.0 only the very same embedding is.
    `verify(query, answer)` says whether the answer is for this query. There is no way without one: negations are
    closer than paraphrases, so a threshold alone returns wrong answers, and nobody would know how many.
    Up to `candidates_max` latest queries of a scope are compared; `stats` counts over all scopes.
    """

    def __init__(self, threshold: float, verify: Callable[[str, Answer], bool], *, candidates_max: int = 64) -> None:
        if isinstance(threshold, bool) or not 0.0 <= threshold <= 1.0:
            raise SettingsError(f"a similarity of {threshold}", hint="the threshold is a cosine, from 0.0 to 1.0")
        if not callable(verify):
            raise SettingsError("similar answers without a verifier", hint="give verify=, or leave similar answers out")
        if not 0 < candidates_max <= CANDIDATES_MAX:
            raise SettingsError(f"{candidates_max} candidates", hint=f"compare 1 to {CANDIDATES_MAX}")
        self.threshold, self.verify, self.candidates_max = threshold, verify, candidates_max
        self.stats = SimilarStats()
        self._lock = threading.Lock()

    def count(self, what: str) -> None:
        """One more."""
        with self._lock:
            self.stats = replace(self.stats, **{what: getattr(self.stats, what) + 1})

    def best(self, vector: Vector, kept: Sequence[bytes]) -> tuple[str, float] | None:
        """The key of the most similar candidate within the threshold, the latest of equals, and its similarity."""
        import numpy as np

        try:
            candidates = [msgspec.msgpack.decode(item, type=_Candidate) for item in kept[: self.candidates_max]]
        except msgspec.DecodeError as error:
            raise damaged("a similar query") from error
        pairs = [(candidate.key, unpack(candidate.vector)) for candidate in candidates]
        pairs = [(key, other) for key, other in pairs if len(other) == len(vector) and other.any()]
        if not pairs or not vector.any():
            return None
        others = np.stack([other for _, other in pairs])
        same = (others == vector).all(axis=1)
        wide, asked = others.astype(np.float64), vector.astype(np.float64)
        cosines = np.minimum(wide @ asked / (np.linalg.norm(wide, axis=1) * np.linalg.norm(asked)), 1.0)
        cosines[same] = 1.0
        cosines[~same & (self.threshold == 1.0)] = -1.0
        at = int(np.argmax(cosines))
        return (pairs[at][0], float(cosines[at])) if cosines[at] >= self.threshold else None

    def judged(self, query: str, answer: Answer | None) -> Answer | None:
        """The answer, where the verifier says that it is for this query."""
        if answer is None:
            self.count("failed")
            return None
        try:
            good = self.verify(query, answer)
        except Exception:  # noqa: BLE001  # counted; a verifier that fails has verified nothing
            self.count("failed")
            return None
        self.count("verified" if good else "refuted")
        return answer if good else None


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers by query within a scope: exactly, and with `similar` also those of similar queries."""

    space: Space = SHARED
    ttl_seconds: float = DAY_SECONDS
    similar: Similar | None = None
    fold_case: bool = False

    def __post_init__(self) -> None:
        milliseconds(self.ttl_seconds)

    def get(self, scope: Scope, query: str, vector: Sequence[float] | Vector | None = None) -> Question[Answer | None]:
        """The answer to this query; else, with `similar` and the query's embedding, a verified one to a similar query.

        Both are looked for in one round trip; the similar answer itself takes one more.
        """
        exact: Words = ("GET", self._key(scope, query))
        similar = self.similar
        if similar is None or vector is None:
            return Question((exact,), lambda replies: _answer(replies[0]), None)
        asked = unpack(pack(vector))

        def read(replies: Replies) -> Answer | Question[Answer | None] | None:
            found = _answer(replies[0])
            return found if found is not None else self._similar(similar, query, similar.best(asked, replies[1]))

        return Question((exact, ("LRANGE", self._list(scope), 0, -1)), read, None)

    def put(
        self, scope: Scope, query: str, text: str, vector: Sequence[float] | Vector | None = None
    ) -> Question[None]:
        """Keep an answer; with `similar` and the query's embedding, also for similar queries."""
        key = self._key(scope, query)
        said = msgspec.msgpack.encode(_Kept(raw(query), raw(text)))
        commands: tuple[Words, ...] = (_set(key, said, self.ttl_seconds),)
        if self.similar is not None and vector is not None:
            item = msgspec.msgpack.encode(_Candidate(key, pack(vector)))
            kept, names = self.similar.candidates_max, self._list(scope)
            commands += (("LPUSH", names, item), ("LTRIM", names, 0, kept - 1))
            commands += (("PEXPIRE", names, milliseconds(self.ttl_seconds)),)
        return Question(commands, _nothing, None, writes=True)

    def _key(self, scope: Scope, query: str) -> str:
        same = normalised(query, fold_case=self.fold_case)
        return self.space.key("answer", digest(scope.digest(), f"{self.fold_case:d}", same))

    def _list(self, scope: Scope) -> str:
        return self.space.key("similar", scope.digest())

    def _similar(
        self, similar: Similar, query: str, best: tuple[str, float] | None
    ) -> Answer | Question[Answer | None] | None:
        similar.count("looked_up")
        if best is None:
            return None
        similar.count("similar")
        key, cosine = best

        def read(replies: Replies) -> Answer | None:
            answer = _answer(replies[0])
            return similar.judged(query, answer and msgspec.structs.replace(answer, similarity=cosine))

        return Question((("GET", key),), read, None, slow=True)


def _answer(said: bytes | None) -> Answer | None:
    if said is None:
        return None
    try:
        kept = msgspec.msgpack.decode(said, type=_Kept)
        return Answer(cooked(kept.query), cooked(kept.text))
    except UNREADABLE as error:
        raise damaged("an answer") from error
