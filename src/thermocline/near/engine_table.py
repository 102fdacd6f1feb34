"""The table of commands: each function stands below its row (names, arity, where its keys are).

A reply is a plain value, which whoever speaks the protocol writes down:

    str a status   bytes a bulk string   int, float, None   list an array   dict a map   set a set
    tuple a push, which is an array for clients of RESP2; the empty one is the array that is not there
    CommandError an error: raised, or within a list
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from thermocline.errors import CommandError
from thermocline.near.engine_values import is_integer

if TYPE_CHECKING:
    from thermocline.near.engine_keys import Keyspace

Reply = object
"""One of these."""
F = TypeVar("F", bound=Callable[..., object])

OK = "OK"
NOT_AN_INTEGER = "ERR value is not an integer or out of range"
SYNTAX = "ERR syntax error"
NUMBER_BYTES_MAX = 255
FIRST, ALL, PAIRS, NO_KEYS = (1, 1, 1), (1, -1, 1), (1, -1, 2), (0, 0, 0)
"""Where the keys are: first, last (negative: from the end), step."""


@dataclass(frozen=True, slots=True)
class Command:
    """One row. `run` is given the keys and the words; a command about the session itself the engine and it instead."""

    name: str
    arity: int
    keys: tuple[int, int, int]
    run: Callable[..., object]
    reads: bool
    """Whether what it says of keys may be remembered by who asked."""
    of_session: bool

    def check(self, words: list[bytes]) -> None:
        """Raises CommandError for too few words, or too many."""
        arity = self.arity
        if len(words) != arity and (arity > 0 or len(words) < -arity):
            raise wrong_number(self.name)

    def keys_in(self, words: list[bytes]) -> list[bytes]:
        """The keys among the words of a request."""
        first, last, step = self.keys
        return words[first : last + 1 if last >= 0 else len(words) + last + 1 : step] if first else []


TABLE: dict[bytes, Command] = {}
"""By upper-case name, a subcommand's as CLIENT|ID."""


def command(
    names: str, arity: int, keys: tuple[int, int, int] = NO_KEYS, *, reads: bool = False, of_session: bool = False
) -> Callable[[F], F]:
    """Put the function below into the table, under each of these names."""

    def listed(run: F) -> F:
        for name in names.split():
            TABLE[name.upper().encode()] = Command(name, arity, keys, run, reads, of_session)
        return run

    return listed


def reading(rows: dict[str, tuple[int, Callable[[Keyspace, list[bytes]], Reply]]]) -> None:
    """Commands of one line that say something of a key, the first word: their arity, and what they say."""
    for names, (arity, run) in rows.items():
        command(names, arity, FIRST, reads=True)(run)


def wrong_number(name: str) -> CommandError:
    """An error that says so."""
    return CommandError(f"ERR wrong number of arguments for '{name}' command")


def integer(text: bytes, wrong: str = NOT_AN_INTEGER) -> int:
    """A whole number of 64 bits. Raises CommandError."""
    if not is_integer(text):
        raise CommandError(wrong)
    return int(text)


def number(text: bytes) -> float:
    """A number, which may be infinite. Raises CommandError."""
    try:
        value = float(text) if len(text) <= NUMBER_BYTES_MAX and not set(text) & set(b" _\t\r\n\v\f") else math.nan
    except ValueError:
        value = math.nan
    if math.isnan(value):
        raise CommandError("ERR value is not a valid float")
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
