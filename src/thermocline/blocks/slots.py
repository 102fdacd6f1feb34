"""Room for blocks of several sizes in equal units: a unit holds slots of one size and changes size only when empty.

Memory and disk both use it. Equal slots never need compaction; taking the longest free runs keeps the blocks of one
save side by side, so that loading them is a few large reads. (The idea of size classes is memcached's slab allocator.)
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

FIRST_GENERATION = 1
_FREE = 1


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
        run = count
        while run and len(taken) < count:
            run = min(run, count - len(taken))
            found = self._take_run(slot_bytes, run)
            taken += found
            if not found:
                run //= 2
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
            msg = f"slot {slot} is not in use"
            raise ValueError(msg)
        unit.free[slot.number] = _FREE
        unit.generations[slot.number] += 1
        unit.free_count += 1
        self.used_bytes -= unit.slot_bytes
        if unit.free_count == len(unit.free):
            self._retire(unit)
        else:
            self._open.setdefault(unit.slot_bytes, {})[unit.number] = unit

    def claim(self, unit_number: int, slot_bytes: int, indices: Sequence[int]) -> None:
        """Take particular slots of an empty unit, as recovery does. Raises ValueError if one cannot be taken."""
        if not 0 <= min(indices) <= max(indices) < self.unit_bytes // slot_bytes:
            msg = f"unit {unit_number} has no slots {min(indices)} to {max(indices)} of {slot_bytes} bytes"
            raise ValueError(msg)
        self._empty.remove(unit_number)
        unit = self._start(unit_number, slot_bytes)
        for index in indices:
            unit.free[index] = 0
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

    def _take_run(self, slot_bytes: int, run: int) -> list[Slot]:
        pattern = b"\x01" * run
        for unit in self._open.get(slot_bytes, {}).values():
            index = unit.free.find(pattern) if unit.free_count >= run else -1
            if index >= 0:
                return self._mark(unit, index, run)
        if self._empty and slot_bytes <= self.unit_bytes:
            unit = self._start(self._empty.pop(), slot_bytes)
            return self._mark(unit, 0, min(run, len(unit.free)))
        return []

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
