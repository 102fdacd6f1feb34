"""What is known of one key of a server, and what memory may answer from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from thermocline.near.commands import Args

if TYPE_CHECKING:
    from thermocline.near.coherence import View

FIELDS_MAX = 256
"""Fields of a hash that are known one by one; one more starts anew. A hash read whole has no such bound."""
ITEM_BYTES = 120
"""Charged per field of a hash and item of a list, beside its bytes."""
KEY_MISSING = -2
"""What TTL and PTTL say of a key that does not exist."""
Name = bytes | str
"""Under which a key is kept."""
Reply = Any
"""Whatever redis-py returns for a command."""
NOT_HERE = object()
"""Memory has no answer."""


class Held:
    """What is known of one key. Never changed once it is stored."""

    __slots__ = ("exists", "expires", "fields", "items", "text", "whole")

    def __init__(self, expires: float, *, exists: bool = True) -> None:
        self.exists = exists
        self.expires = expires
        self.text: Any = None  # a string's value as the client returns it; `get` looks no further
        self.fields: dict[Any, Any] | None = None  # of a hash; None for a field that does not exist
        self.whole = False  # all fields are known
        self.items: tuple[Any, ...] | None = None  # of a list

    def weight_bytes(self) -> int:
        """What it takes in memory, about."""
        pairs = self.fields.items() if self.fields else ()
        weight = _size(self.text) + sum(_size(name) + _size(value) + ITEM_BYTES for name, value in pairs)
        return weight + sum(_size(item) + ITEM_BYTES for item in self.items or ())

    def differs(self, other: Held) -> bool:
        """Whether the two cannot both be what the server holds."""
        if self.exists != other.exists:
            return True
        if any(a is not None and b is not None and a != b for a, b in _pairs(self, other)):
            return True
        kinds = {kind for held in (self, other) for kind, value in held.parts() if value is not None}
        mine, theirs = self.fields or {}, other.fields or {}
        return len(kinds) > 1 or any(mine[name] != theirs[name] for name in mine.keys() & theirs.keys())

    def parts(self) -> tuple[tuple[str, Any], ...]:
        """Its value by the kind of key that has one."""
        return ("text", self.text), ("fields", self.fields), ("items", self.items)

    def read_by(self, args: Args, name: Name) -> tuple[Any, ...]:
        """The command that reads all of it that is known. `args`: one that it has answered."""
        if self.text is not None:
            return "GET", name
        if self.items is not None:
            return "LRANGE", name, 0, -1
        if self.fields is not None:
            return ("HGETALL", name) if self.whole else ("HMGET", name, *self.fields)
        return tuple(args) if args[0] in {"GET", "HGET", "HMGET", "HGETALL"} else ("EXISTS", name)

    def with_what_was_known(self, old: Held) -> Held:
        """This, and what an entry that does not differ knew beside it."""
        if self.text is None:
            self.text = old.text
        if self.items is None:
            self.items = old.items
        if old.fields is not None and not self.whole:
            both = {**old.fields, **(self.fields or {})}
            if old.whole or len(both) <= FIELDS_MAX or self.fields is None:
                self.fields, self.whole = both, old.whole
        self.expires = min(self.expires, old.expires)
        return self


def _pairs(a: Held, b: Held) -> tuple[tuple[Any, Any], ...]:
    both_whole = a.whole and b.whole
    return (a.text, b.text), (a.items, b.items), (a.fields, b.fields) if both_whole else (None, None)


def _size(value: object) -> int:
    if isinstance(value, str):
        return len(value) if value.isascii() else 4 * len(value)
    return len(value) if isinstance(value, bytes) else 0


def _get(view: View, held: Held, args: Args) -> Reply:
    del view, args
    return held.text if held.text is not None or not held.exists else NOT_HERE


def _exists(view: View, held: Held, args: Args) -> Reply:
    del view, args
    return int(held.exists)


def _characters(view: View, held: Held) -> Reply:
    """A string whose places are those of its bytes."""
    if not held.exists:
        return "" if view.decodes else b""
    plain = isinstance(held.text, bytes) or (isinstance(held.text, str) and held.text.isascii())
    return held.text if plain and view.plain_text else NOT_HERE


def _strlen(view: View, held: Held, args: Args) -> Reply:
    del args
    text = _characters(view, held)
    return text if text is NOT_HERE else len(text)


def _getrange(view: View, held: Held, args: Args) -> Reply:
    text = _characters(view, held)
    return text if text is NOT_HERE else _cut(text, args[2], args[3])


def _hget(view: View, held: Held, args: Args) -> Reply:
    found = _hmget(view, held, args)
    return found if found is NOT_HERE else found[0]


def _hmget(view: View, held: Held, args: Args) -> Reply:
    fields = [view.field(field) for field in args[2:]]
    if not fields or None in fields or (held.exists and held.fields is None):
        return NOT_HERE
    known = held.fields or {}
    if held.exists and not held.whole and not all(field in known for field in fields):
        return NOT_HERE
    return [known.get(field) for field in fields]


def _hgetall(view: View, held: Held, args: Args) -> Reply:
    del view, args
    return dict(held.fields or {}) if held.whole or not held.exists else NOT_HERE


def _lrange(view: View, held: Held, args: Args) -> Reply:
    del view
    if held.exists and held.items is None:
        return NOT_HERE
    cut = _cut(held.items or (), args[2], args[3])
    return cut if cut is NOT_HERE else list(cut)


def _ttl(view: View, held: Held, args: Args) -> Reply:
    if not held.exists:
        return KEY_MISSING
    if held.expires == math.inf:
        return -1
    left_ms = max(0, round((held.expires - view.now()) * 1000))
    return left_ms if args[0] == "PTTL" else (left_ms + 500) // 1000


ANSWERS: dict[str, tuple[int, Callable[[View, Held, Args], Reply]]] = {
    "GET": (2, _get),
    "EXISTS": (2, _exists),
    "STRLEN": (2, _strlen),
    "GETRANGE": (4, _getrange),
    "HGET": (3, _hget),
    "HMGET": (0, _hmget),
    "HGETALL": (2, _hgetall),
    "LRANGE": (4, _lrange),
    "TTL": (2, _ttl),
    "PTTL": (2, _ttl),
}
"""How long a command is that memory may answer (0: any length), and how it does."""


def _cut(whole: Reply, start: object, end: object) -> Reply:
    """What GETRANGE and LRANGE give for two places, both counted from the end where negative."""
    if type(start) is not int or type(end) is not int:
        return NOT_HERE
    if start < 0 and end < 0 and start > end:
        return whole[:0]
    length, is_text = len(whole), isinstance(whole, bytes | str)
    start = max(0, start + length if start < 0 else start)
    end = end + length if end < 0 else end
    end = max(end, 0) if is_text else end  # GETRANGE's way: its end is never before the first byte
    return whole[start : end + 1] if end >= start else whole[:0]
