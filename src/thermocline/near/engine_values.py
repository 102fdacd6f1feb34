"""What a key may hold besides bytes. Each kind knows what it weighs; a change costs what was changed, not the whole."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from typing import ClassVar

ELEMENT_BYTES = 96
"""Charged for an element beside its bytes: a bytes object, its place in the container, half of it free."""
INTEGER_DIGITS_MAX = 20


def weight_of(element: bytes) -> int:
    """What an element is charged."""
    return len(element) + ELEMENT_BYTES


class Hash(dict[bytes, bytes | float]):
    """Elements by name, each with a value: the fields of a hash."""

    __slots__ = ("nbytes",)
    name: ClassVar[str] = "hash"

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def assign(self, element: bytes, value: bytes | float) -> bool:
        """Set an element; True where it is new."""
        old = self.get(element)
        self[element] = value
        self.nbytes += _of_value(value) + (weight_of(element) if old is None else -_of_value(old))
        return old is None

    def discard(self, element: bytes) -> bool:
        """Remove an element; True where it was there."""
        old = self.pop(element, None)
        if old is None:
            return False
        self.nbytes -= weight_of(element) + _of_value(old)
        return True


def _of_value(value: bytes | float) -> int:
    """A score is charged for its place in the order."""
    return len(value) if isinstance(value, bytes) else ELEMENT_BYTES


class Members(Hash):
    """A set: elements whose values say nothing."""

    __slots__ = ()
    name = "set"


class Ranked(Hash):
    """A sorted set: members by score, those of one score by their bytes."""

    __slots__ = ("order",)
    name = "zset"

    def __init__(self) -> None:
        super().__init__()
        self.order: list[tuple[bytes | float, bytes]] = []

    def assign(self, element: bytes, value: bytes | float) -> bool:
        """Give a member its score."""
        self._unplace(element)
        insort(self.order, (value, element))
        return super().assign(element, value)

    def discard(self, element: bytes) -> bool:
        """Remove a member; True where it was there."""
        self._unplace(element)
        return super().discard(element)

    def _unplace(self, element: bytes) -> None:
        score = self.get(element)
        if score is not None:
            del self.order[bisect_left(self.order, (score, element))]


class Items(deque[bytes]):
    """A list, quick at both ends."""

    __slots__ = ("nbytes",)
    name = "list"

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def add(self, item: bytes, *, left: bool) -> None:
        """At one of its ends."""
        (self.appendleft if left else self.append)(item)
        self.nbytes += weight_of(item)

    def take(self, *, left: bool) -> bytes:
        """From one of its ends."""
        item = self.popleft() if left else self.pop()
        self.nbytes -= weight_of(item)
        return item


Container = Hash | Items
Value = bytes | Container


def is_integer(text: bytes) -> bool:
    """Whether these are the digits that Redis would write for a number of 64 bits."""
    if len(text) > INTEGER_DIGITS_MAX or not text.removeprefix(b"-").isdigit():
        return False
    number = int(text)
    return -(1 << 63) <= number < 1 << 63 and b"%d" % number == text
