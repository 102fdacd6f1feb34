"""What a key may hold besides bytes. Each kind knows what it weighs; a change costs what was changed, not the whole."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable
from typing import Self

ELEMENT_BYTES = 96
"""Charged for an element beside its bytes: a bytes object, its place in the container, half of it free."""


def weight_of(element: bytes) -> int:
    """What an element is charged."""
    return len(element) + ELEMENT_BYTES


class Hash(dict[bytes, bytes]):
    """Fields and their values."""

    __slots__ = ("nbytes",)
    name, encodings = "hash", ("listpack", "hashtable")

    def __init__(self, items: dict[bytes, bytes] | tuple[()] = (), nbytes: int = 0) -> None:
        super().__init__(items)
        self.nbytes = nbytes

    def assign(self, field: bytes, value: bytes) -> bool:
        """Set a field; True where it is new."""
        old = self.get(field)
        self[field] = value
        self.nbytes += len(value) - len(old) if old is not None else weight_of(field) + len(value)
        return old is None

    def discard(self, field: bytes) -> bool:
        """Remove a field; True where it was there."""
        old = self.pop(field, None)
        if old is None:
            return False
        self.nbytes -= weight_of(field) + len(old)
        return True

    def twin(self) -> Self:
        """A copy that changes by itself."""
        return type(self)(self, self.nbytes)


class Members(set[bytes]):
    """A set."""

    __slots__ = ("nbytes",)
    name, encodings = "set", ("intset", "hashtable")

    def __init__(self, items: Iterable[bytes] = (), nbytes: int = 0) -> None:
        super().__init__(items)
        self.nbytes = nbytes

    def include(self, member: bytes) -> bool:
        """Add; True where it is new."""
        if member in self:
            return False
        self.add(member)
        self.nbytes += weight_of(member)
        return True

    def exclude(self, member: bytes) -> bool:
        """Remove; True where it was there."""
        if member not in self:
            return False
        self.remove(member)
        self.nbytes -= weight_of(member)
        return True

    def take(self) -> bytes:
        """Remove one, whichever the table has first: bytes are hashed with a secret, so nobody can foresee it."""
        member = self.pop()
        self.nbytes -= weight_of(member)
        return member

    def twin(self) -> Self:
        """A copy that changes by itself."""
        return type(self)(self, self.nbytes)


class Items(deque[bytes]):
    """A list, quick at both ends."""

    __slots__ = ("nbytes",)
    name, encodings = "list", ("quicklist", "quicklist")

    def __init__(self, items: Iterable[bytes] = (), nbytes: int = 0) -> None:
        super().__init__(items)
        self.nbytes = nbytes

    def add(self, item: bytes, *, left: bool) -> None:
        """At one of its ends."""
        (self.appendleft if left else self.append)(item)
        self.nbytes += weight_of(item)

    def take(self, *, left: bool) -> bytes:
        """From one of its ends."""
        item = self.popleft() if left else self.pop()
        self.nbytes -= weight_of(item)
        return item

    def twin(self) -> Self:
        """A copy that changes by itself."""
        return type(self)(self, self.nbytes)


class Ranked:
    """A sorted set: members by score, those of one score by their bytes."""

    __slots__ = ("nbytes", "order", "scores")
    name, encodings = "zset", ("listpack", "skiplist")

    def __init__(self) -> None:
        self.scores: dict[bytes, float] = {}
        self.order: list[tuple[float, bytes]] = []
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self.order)

    def assign(self, member: bytes, score: float) -> None:
        """Give a member its score."""
        old = self.scores.get(member)
        if old is None:
            self.nbytes += 2 * weight_of(member)
        else:
            del self.order[bisect_left(self.order, (old, member))]
        self.scores[member] = score
        insort(self.order, (score, member))

    def discard(self, member: bytes) -> bool:
        """Remove a member; True where it was there."""
        score = self.scores.pop(member, None)
        if score is None:
            return False
        del self.order[bisect_left(self.order, (score, member))]
        self.nbytes -= 2 * weight_of(member)
        return True

    def take(self, *, last: bool) -> tuple[bytes, float]:
        """Remove the first member, or the last."""
        score, member = self.order[-1 if last else 0]
        self.discard(member)
        return member, score

    def rank(self, member: bytes) -> int | None:
        """How many come before it; None where it is not there."""
        score = self.scores.get(member)
        return None if score is None else bisect_left(self.order, (score, member))

    def between(self, low: float, high: float, *, low_open: bool, high_open: bool) -> slice:
        """Where in `order` the scores lie that are in this range."""
        start = bisect_left(self.order, (math.nextafter(low, math.inf) if low_open else low, b""))
        stop = bisect_left(self.order, (high if high_open else math.nextafter(high, math.inf), b""))
        return slice(start, len(self.order) if high == math.inf and not high_open else stop)

    def twin(self) -> Ranked:
        """A copy that changes by itself."""
        copied = Ranked()
        copied.scores, copied.order, copied.nbytes = dict(self.scores), list(self.order), self.nbytes
        return copied


Container = Hash | Members | Items | Ranked
Value = bytes | Container
EMBEDDED_BYTES_MAX, PACKED_MAX, PACKED_BYTES_MAX, INTEGERS_MAX = 44, 128, 64, 512
INTEGER_DIGITS_MAX = 20


def kind_of(value: Value) -> str:
    """As TYPE says it."""
    return "string" if isinstance(value, bytes) else value.name


def encoding_of(value: Value) -> str:
    """How Redis would keep it, had it been written at once: what clients ask for, not how it lies here."""
    if isinstance(value, bytes):
        if is_integer(value):
            return "int"
        return "embstr" if len(value) <= EMBEDDED_BYTES_MAX else "raw"
    packed, loose = value.encodings
    if isinstance(value, Members):
        return packed if len(value) <= INTEGERS_MAX and all(map(is_integer, value)) else loose
    words = (
        [*value, *value.values()] if isinstance(value, Hash) else value.scores if isinstance(value, Ranked) else value
    )
    small = len(value) <= (INTEGERS_MAX if isinstance(value, Hash) else PACKED_MAX)
    return packed if small and all(len(word) <= PACKED_BYTES_MAX for word in words) else loose


def is_integer(text: bytes) -> bool:
    """Whether these are the digits that Redis would write for a number of 64 bits."""
    if len(text) > INTEGER_DIGITS_MAX or not text.removeprefix(b"-").isdigit():
        return False
    number = int(text)
    return -(1 << 63) <= number < 1 << 63 and b"%d" % number == text
