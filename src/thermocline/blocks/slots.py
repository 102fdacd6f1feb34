"""Room for blocks of several sizes in equal units: a unit holds slots of one size and changes size only when empty.

Memory and disk both use it. Equal slots never need compaction; taking the longest free runs keeps the blocks of one
save side by side, so that loading them is a few large reads. (The idea of size classes is memcached's slab allocator.)
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from heapq import nlargest
from operator import attrgetter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FIRST_GENERATION = 1
_FREE = 1
_RUN = re.compile(b"\x01+")
UNITS_SEARCHED = 64
"""A take looks at no more units than this, so that its price does not grow with the tier."""


class Slot(NamedTuple):
    """A place. `generation` tells this use of the place from every earlier and later one."""

    unit: int
    number: int
    generation: int


@dataclass(slots=True)
class _Unit:
    number: int
    slot_bytes: int
    free: bytearray
    free_count: int
    generations: array[int] = field(repr=False)


class SlotMap:
    """Which slots of which units are free. Not thread-safe: its tier holds a lock."""

    def __init__(self, unit_bytes: int) -> None:
        self.unit_bytes = unit_bytes
        self._units: dict[int, _Unit] = {}
        self._empty: list[int] = []
        self._open: dict[int, dict[int, _Unit]] = {}
        self._generation_next: dict[int, int] = {}
        self.used_bytes = 0

    @property
    def units(self) -> int:
        """How many units there are, empty ones included."""
        return len(self._units) + len(self._empty)

    def add_unit(self, number: int) -> None:
        """A new empty unit is ready for use."""
        self._empty.append(number)
        self._generation_next.setdefault(number, FIRST_GENERATION)

    def take(self, slot_bytes: int, count: int) -> list[Slot]:
        """Up to `count` slots, side by side where possible; fewer, or none, if there is no more room."""
        taken: list[Slot] = []
        runs = self._free_runs(slot_bytes) if count > 0 else []
        while len(taken) < count:
            wanted = count - len(taken)
            at = min(bisect_left(runs, (wanted,)), len(runs) - 1)
            longest_possible = min(wanted, self.unit_bytes // slot_bytes)
            if self._empty and longest_possible and (at < 0 or runs[at][0] < longest_possible):
                unit = self._start(self._empty.pop(), slot_bytes)
                insort(runs, (len(unit.free), unit.number, 0))
            elif at < 0:
                runs = self._free_runs(slot_bytes)  # those of the units that were not searched yet
                if not runs:
                    break
            else:
                length, number, index = runs.pop(at)
                taken += self._mark(self._units[number], index, min(length, wanted))
        return taken

    def free_slots(self, slot_bytes: int) -> int:
        """How many slots of this size could be taken now."""
        per_unit = self.unit_bytes // slot_bytes
        partly = sum(unit.free_count for unit in self._open.get(slot_bytes, {}).values())
        return partly + per_unit * len(self._empty)

    def give(self, slot: Slot) -> None:
        """Take a slot back. Raises ValueError for one that is not in use: a double free is a defect."""
        unit = self._unit_of(slot)
        if unit is None or unit.free[slot.number] == _FREE:
            raise ValueError(f"slot {slot} is not in use")
        unit.free[slot.number] = _FREE
        unit.generations[slot.number] += 1
        unit.free_count += 1
        self.used_bytes -= unit.slot_bytes
        if unit.free_count == len(unit.free):
            self._retire(unit)
        else:
            self._open.setdefault(unit.slot_bytes, {})[unit.number] = unit

    def claim(self, unit_number: int, slot_bytes: int, indices: NDArray[np.int64]) -> None:
        """Take particular slots of an empty unit, as recovery does. Raises ValueError if one cannot be taken."""
        if not 0 <= indices.min() <= indices.max() < self.unit_bytes // slot_bytes:
            msg = f"unit {unit_number} has no slots {indices.min()} to {indices.max()} of {slot_bytes} bytes"
            raise ValueError(msg)
        self._empty.remove(unit_number)
        unit = self._start(unit_number, slot_bytes)
        np.frombuffer(unit.free, np.uint8)[indices] = 0
        unit.free_count = unit.free.count(_FREE)
        self.used_bytes += (len(unit.free) - unit.free_count) * slot_bytes
        if unit.free_count == 0:
            del self._open[slot_bytes][unit_number]

    def at(self, unit_number: int, index: int) -> Slot:
        """The present use of a taken place."""
        return Slot(unit_number, index, self._units[unit_number].generations[index])

    def is_current(self, slot: Slot) -> bool:
        """True while the slot has not been given back since it was taken."""
        return self._unit_of(slot) is not None

    def check_integrity(self) -> None:
        """Free and used slots add up in every unit. Raises AssertionError."""
        for unit in self._units.values():
            assert unit.free.count(_FREE) == unit.free_count, f"unit {unit.number}: free count is wrong"
        used = sum((len(unit.free) - unit.free_count) * unit.slot_bytes for unit in self._units.values())
        assert used == self.used_bytes, f"{used} bytes in use, {self.used_bytes} accounted"

    def _unit_of(self, slot: Slot) -> _Unit | None:
        """The unit in which this use of a place is the present or the next one; a changed unit may have fewer slots."""
        unit = self._units.get(slot.unit)
        if unit is None or not slot.number < len(unit.free) or unit.generations[slot.number] != slot.generation:
            return None
        return unit

    def _free_runs(self, slot_bytes: int) -> list[tuple[int, int, int]]:
        """(length, unit, first slot) of the free runs in the emptiest units, ascending.

        Whole runs are taken, the smallest that is large enough or else the largest: every cut leaves a shorter rest.
        """
        emptiest = nlargest(UNITS_SEARCHED, self._open.get(slot_bytes, {}).values(), key=attrgetter("free_count"))
        runs = [(unit.number, run) for unit in emptiest for run in _RUN.finditer(unit.free)]
        return sorted((run.end() - run.start(), number, run.start()) for number, run in runs)

    def _start(self, number: int, slot_bytes: int) -> _Unit:
        count = self.unit_bytes // slot_bytes
        generations = array("Q", [self._generation_next[number]]) * count
        unit = _Unit(number, slot_bytes, bytearray(b"\x01" * count), count, generations)
        self._units[number] = unit
        self._open.setdefault(slot_bytes, {})[number] = unit
        return unit

    def _mark(self, unit: _Unit, index: int, run: int) -> list[Slot]:
        unit.free[index : index + run] = bytes(run)
        unit.free_count -= run
        self.used_bytes += run * unit.slot_bytes
        if unit.free_count == 0:
            del self._open[unit.slot_bytes][unit.number]
        return [Slot(unit.number, at, unit.generations[at]) for at in range(index, index + run)]

    def _retire(self, unit: _Unit) -> None:
        self._generation_next[unit.number] = max(unit.generations) + 1
        self._open.get(unit.slot_bytes, {}).pop(unit.number, None)
        del self._units[unit.number]
        self._empty.append(unit.number)
