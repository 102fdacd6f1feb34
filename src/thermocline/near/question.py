"""What the typed stores hand to a state: questions, as values. Nothing here does I/O.

Space      whose keys these are: a prefix and a tenant
Question   commands that go in one round trip, and how their replies are read
Change     one key that is read and written with nobody else's write in between
"""

from __future__ import annotations

import enum
import hashlib
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import msgspec

from thermocline.errors import NearError, SettingsError

T = TypeVar("T")
Words = tuple[Any, ...]
"""A command as redis-py sends it."""
Replies = Sequence[Any]
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError)
"""What reading bytes raises that nobody of us wrote."""


class Failing(enum.Enum):
    """What becomes of a question whose server does not answer, or whose bytes cannot be read."""

    RAISES = "the caller is told: it is state, and to go on without it would be wrong"


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """Commands of one round trip, and what reads their replies: the answer, or the question that follows.

    `otherwise` is the answer where the server fails or bytes are damaged; a state counts it. `slow`: reading calls what
    is not ours, and AsyncState does it in a thread. A question is a value: it may be asked again, by any state.
    """

    commands: tuple[Words, ...]
    read: Callable[[Replies], T | Question[T]]
    otherwise: T | Failing = Failing.RAISES
    writes: bool = False
    slow: bool = False


@dataclass(frozen=True, slots=True)
class Change(Generic[T]):
    """A key that is looked at and written unless another writes it meanwhile. `decide` is given its bytes, or None.

    It returns the commands to send (none: nothing is written) and the answer; where somebody else wrote meanwhile
    nothing is sent and the answer is `lost`.
    """

    key: str
    decide: Callable[[bytes | None], tuple[tuple[Words, ...], T]]
    lost: T


@dataclass(frozen=True, slots=True)
class Space:
    """Where keys lie, `prefix:tenant:kind:name`. No tenant can name a key of another one, whatever it is called."""

    tenant: str = ""
    prefix: str = "state"

    def key(self, kind: str, name: str) -> str:
        """The key of a thing."""
        return f"{self.prefix}:{quote(self.tenant, safe='', errors='surrogatepass')}:{kind}:{name}"

    def named(self, kind: str, name: str) -> str:
        """The key of a thing by a name that others choose, such as a session's."""
        return self.key(kind, quote(name, safe="", errors="surrogatepass"))


SHARED = Space()
"""Of nobody in particular."""


def digest(*parts: str) -> str:
    """64 hexadecimal digits that stand for these texts in this order: SHA-256, each behind its length."""
    return hashlib.sha256(b"".join(len(said).to_bytes(8, "little") + said for said in map(raw, parts))).hexdigest()


def raw(text: str) -> bytes:
    """UTF-8, also of half a surrogate pair: what comes out of JSON may have one, and is text to `cooked` again."""
    return text.encode(errors="surrogatepass")


def cooked(said: bytes) -> str:
    """The text. Raises UnicodeDecodeError."""
    return said.decode(errors="surrogatepass")


def encoded(value: object) -> bytes:
    """JSON. Raises NearError for text that has half of a surrogate pair."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError as error:
        raise NearError("a name that is no Unicode text", hint="it has half of a surrogate pair") from error


def normalised(text: str, *, fold_case: bool = False, keep_spaces: bool = False) -> str:
    """The text that two spellings share: Unicode NFC, runs of white space as one space, none at the ends.

    Case is kept unless `fold_case`; with `keep_spaces`, as code wants it, white space stays as it is.
    """
    found = text if text.isascii() else unicodedata.normalize("NFC", text)
    if fold_case:
        found = unicodedata.normalize("NFC", found.casefold())
    return found if keep_spaces else " ".join(found.split())


def reads(keys: Sequence[str]) -> tuple[Words, ...]:
    """The commands for the values of these keys, in their order. GET is served soonest."""
    return (("MGET", *keys),) if len(keys) > 1 else tuple(("GET", key) for key in keys)


def values(replies: Replies) -> Sequence[bytes | None]:
    """What `reads` brought."""
    found: Sequence[bytes | None] = replies[0] if replies and isinstance(replies[0], list) else replies
    return found


def milliseconds(seconds: float) -> int:
    """A time to live, as the server takes it. Raises SettingsError for none."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise SettingsError(f"a time to live of {seconds} seconds", hint="give seconds above 0")
    return max(1, round(seconds * 1000))


def damaged(what: str) -> NearError:
    """What reads raise for bytes that are not what was written."""
    return NearError(f"{what} cannot be read", hint="another program may write under this prefix; drop the key")
