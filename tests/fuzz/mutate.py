"""Bytes that are nearly right: seeds with a few changes, all of which follow from one number."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

TELLING = bytes((0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xC0, 0xC1, *range(0xC2, 0x100)))
"""What begins a value in msgpack, or ends a range."""
CHANGES_MAX, GROWN_MAX = 6, 64


def mutants(seeds: Sequence[bytes], number: int) -> Iterator[bytes]:
    """Without end; the same for the same number."""
    chance = random.Random(number)  # noqa: S311  # it is to be foreseen
    while True:
        changed = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, CHANGES_MAX)):
            chance.choice(CHANGES)(changed, chance, seeds)
        yield bytes(changed)


def _flip(changed: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    if changed:
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)


def _replace(changed: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    if changed:
        changed[chance.randrange(len(changed))] = chance.choice(TELLING)


def _insert(changed: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    at = chance.randint(0, len(changed))
    changed[at:at] = bytes([chance.choice(TELLING)]) * chance.choice((1, 1, 2, 4, GROWN_MAX))


def _cut(changed: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    at = chance.randint(0, len(changed))
    del changed[at : at + chance.randint(1, 8)]


def _end(changed: bytearray, chance: random.Random, _: Sequence[bytes]) -> None:
    del changed[chance.randint(0, len(changed)) :]


def _splice(changed: bytearray, chance: random.Random, seeds: Sequence[bytes]) -> None:
    other = chance.choice(seeds)
    start, at = chance.randint(0, len(other)), chance.randint(0, len(changed))
    changed[at:at] = other[start : start + chance.randint(1, GROWN_MAX)]


CHANGES: tuple[Callable[[bytearray, random.Random, Sequence[bytes]], None], ...] = (
    _flip,
    _replace,
    _replace,
    _insert,
    _cut,
    _end,
    _splice,
)
