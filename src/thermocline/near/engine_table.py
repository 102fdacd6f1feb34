"""The table of commands: each function stands below its row (name, arity, flags, where its keys are), as in Redis' own.

A reply is a plain value, which whoever speaks the protocol writes down:

    str a status   bytes a bulk string   int, float, None   list an array   dict a map   set a set
    tuple a push, which is an array for clients of RESP2; the empty one is the array that is not there
    CommandError an error: raised, or within a list
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from thermocline.errors import CommandError
from thermocline.near.engine_values import is_integer

Reply = object
"""One of these."""
F = TypeVar("F", bound=Callable[..., object])

OK = "OK"
NOT_AN_INTEGER = "ERR value is not an integer or out of range"
NOT_A_FLOAT = "ERR value is not a valid float"
SYNTAX = "ERR syntax error"
NUMBERS_FLOAT_BYTES_MAX = 255


@dataclass(frozen=True, slots=True)
class Command:
    """One row. `run` is given the keys and the words; a command about the session itself the engine and it instead."""

    name: str
    arity: int
    flags: tuple[str, ...]
    keys: tuple[int, int, int]
    run: Callable[..., object] | None
    of_session: bool

    @property
    def reads(self) -> bool:
        """Whether what it says of keys may be remembered by who asked."""
        return "readonly" in self.flags

    def check(self, words: list[bytes]) -> None:
        """Raises CommandError for too few words, or too many."""
        arity = self.arity
        if len(words) != arity and (arity > 0 or len(words) < -arity):
            raise CommandError(f"ERR wrong number of arguments for '{self.name}' command")

    def keys_in(self, words: list[bytes]) -> list[bytes]:
        """The keys among the words of a request."""
        first, last, step = self.keys
        return words[first : last + 1 if last >= 0 else len(words) + last + 1 : step] if first else []


TABLE: dict[bytes, Command] = {}
"""By upper-case name, a subcommand's as CLIENT|ID."""


def command(
    name: str, arity: int, flags: str = "", keys: tuple[int, int, int] | int = 0, *, of_session: bool = False
) -> Callable[[F], F]:
    """Put the function below into the table. `keys` is first, last, step; or one place."""
    spec = (keys, keys, 1 if keys else 0) if isinstance(keys, int) else keys

    def listed(run: F) -> F:
        TABLE[name.upper().encode()] = Command(name, arity, tuple(flags.split()), spec, run, of_session)
        return run

    return listed


def parents(*names: str) -> None:
    """Commands that are nothing without a subcommand."""
    for name in names:
        TABLE[name.upper().encode()] = Command(name, -2, (), (0, 0, 0), None, of_session=False)


# -- words to values ---------------------------------------------------------------------------------------------------


def integer(text: bytes, wrong: str = NOT_AN_INTEGER) -> int:
    """A whole number of 64 bits. Raises CommandError."""
    if not is_integer(text):
        raise CommandError(wrong)
    return int(text)


def number(text: bytes, wrong: str = NOT_A_FLOAT) -> float:
    """A number, which may be infinite. Raises CommandError."""
    try:
        value = (
            float(text) if len(text) <= NUMBERS_FLOAT_BYTES_MAX and not set(text) & set(b" _\t\r\n\v\f") else math.nan
        )
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise CommandError(wrong)
    return value


def options(words: list[bytes], known: dict[str, int]) -> dict[str, list[bytes]]:
    """Options by name, each with as many words behind it as `known` says. Raises CommandError."""
    found: dict[str, list[bytes]] = {}
    at = 0
    while at < len(words):
        name = words[at].upper().decode("latin-1")
        count = known.get(name)
        if count is None or (count and name in found) or at + count >= len(words):
            raise CommandError(SYNTAX)
        found[name] = words[at + 1 : at + 1 + count]
        at += 1 + count
    return found


def exclusive(found: dict[str, list[bytes]], *names: str) -> str | None:
    """The one of these options that was given. Raises CommandError for two of them."""
    given = [name for name in names if name in found]
    if len(given) > 1:
        raise CommandError(SYNTAX)
    return given[0] if given else None
