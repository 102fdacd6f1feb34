"""Slots: no place is ever used twice at once, and nothing is lost."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from thermocline.blocks.slots import UNITS_SEARCHED, Slot, SlotMap

UNIT = 16
SIZES = (1, 2, 3, 5, 16)


class SlotMachine(RuleBasedStateMachine):
    """Take, give, give twice, and claim as recovery does, against a plain set of byte ranges in use."""

    taken = Bundle("taken")
    given = Bundle("given")

    @initialize(units=st.integers(1, 4))
    def start(self, units):
        self.map = SlotMap(UNIT)
        self.units = 0
        self.used: dict[Slot, int] = {}
        self.ever: set[Slot] = set()
        for _ in range(units):
            self.grow()

    @rule()
    def grow(self):
        if self.units < 6:
            self.map.add_unit(self.units)
            self.units += 1

    @rule(target=taken, size=st.sampled_from(SIZES), count=st.integers(0, 20))
    def take(self, size, count):
        free = self.map.free_slots(size)
        slots = self.map.take(size, count)
        assert len(slots) == min(count, free), "as many as fit, and no more"
        assert len(set(slots)) == len(slots)
        assert not set(slots) & self.ever, "a use of a place is told from every earlier one"
        self.ever.update(slots)
        self.used.update(dict.fromkeys(slots, size))
        return multiple(*slots)

    @rule(target=given, slot=consumes(taken))
    def give(self, slot):
        assert self.map.is_current(slot)
        assert self.map.at(slot.unit, slot.number) == slot
        self.map.give(slot)
        del self.used[slot]
        return slot

    @rule(slot=given)
    def give_twice(self, slot):
        before = self.map.used_bytes
        with pytest.raises(ValueError, match="not in use"):
            self.map.give(slot)
        assert self.map.used_bytes == before

    @rule(size=st.sampled_from(SIZES), picked=st.sets(st.integers(0, 15)))
    def claim(self, size, picked):
        if self.units == 6:
            return
        number, self.units = self.units, self.units + 1
        self.map.add_unit(number)
        picked = {index for index in picked if index < UNIT // size}
        if picked:
            self.map.claim(number, size, np.array(sorted(picked)))
            slots = [self.map.at(number, index) for index in picked]
            assert not set(slots) & self.ever
            self.ever.update(slots)
            self.used.update(dict.fromkeys(slots, size))
            for slot in slots:
                assert self.map.is_current(slot)

    @invariant()
    def nothing_overlaps(self):
        places = sorted((slot.unit, slot.number * size, (slot.number + 1) * size) for slot, size in self.used.items())
        for one, two in pairwise(places):
            assert one[0] != two[0] or one[2] <= two[1], "two slots share bytes"
        assert all(stop <= UNIT for _, _, stop in places)

    @invariant()
    def one_size_per_unit(self):
        sizes: dict[int, set[int]] = {}
        for slot, size in self.used.items():
            sizes.setdefault(slot.unit, set()).add(size)
        assert all(len(found) == 1 for found in sizes.values()), "a unit changes size only when it is empty"

    @invariant()
    def nothing_is_lost(self):
        self.map.check_integrity()
        assert self.map.used_bytes == sum(self.used.values())
        assert self.map.units == self.units
        for size in SIZES:
            other = {slot.unit for slot, used in self.used.items() if used != size}
            mine = sum(used == size for used in self.used.values())
            assert self.map.free_slots(size) == (UNIT // size) * (self.units - len(other)) - mine

    @invariant()
    def stale_slots_are_told(self):
        assert all(self.map.is_current(slot) == (slot in self.used) for slot in self.ever)


TestSlotMap = SlotMachine.TestCase
TestSlotMap.settings = settings(max_examples=150, stateful_step_count=40)


def _fresh(units=1):
    slots = SlotMap(UNIT)
    for number in range(units):
        slots.add_unit(number)
    return slots


def test_side_by_side():
    """Slots taken together lie side by side as long as there is a stretch, so that they load in one read."""
    slots = _fresh()
    first = slots.take(1, 12)
    assert [slot.number for slot in first] == list(range(12))
    for slot in (first[0], first[4], first[5], first[6]):
        slots.give(slot)
    assert [slot.number for slot in slots.take(1, 3)] == [4, 5, 6]
    assert sorted(slot.number for slot in slots.take(1, 9)) == [0, 12, 13, 14, 15], "and then whatever is left"


def test_room_in_many_units():
    """As many slots as are free are found, also where they are scattered over more units than one look searches."""
    slots = _fresh(UNITS_SEARCHED * 3)
    for slot in slots.take(1, UNIT * UNITS_SEARCHED * 3):
        if slot.number == 3:
            slots.give(slot)
    assert slots.free_slots(1) == UNITS_SEARCHED * 3
    assert len(slots.take(1, 10_000)) == UNITS_SEARCHED * 3
    assert slots.take(1, 1) == []
    slots.check_integrity()


def test_larger_than_a_unit():
    """A block that no unit can hold finds no room, instead of an error."""
    slots = _fresh()
    assert slots.take(UNIT + 1, 3) == []
    assert slots.free_slots(UNIT + 1) == 0
    slots.check_integrity()


def test_a_forged_slot_is_refused():
    """Giving back a place that was never taken, or another use of one, is an error and changes nothing."""
    slots = _fresh()
    (slot,) = slots.take(4, 1)
    for forged in (Slot(7, 0, 1), slot._replace(number=1), slot._replace(generation=slot.generation + 1)):
        with pytest.raises(ValueError, match="not in use"):
            slots.give(forged)
    slots.check_integrity()
    slots.give(slot)


def test_claims_that_cannot_be():
    """Recovery cannot claim a unit in use, an unknown one, or slots behind its end, and a refusal changes nothing."""
    slots = _fresh(2)
    (slot,) = slots.take(4, 1)
    other = 1 - slot.unit
    for unit, indices in ((slot.unit, [1]), (9, [0]), (other, [4]), (other, [0, -1])):
        with pytest.raises(ValueError):  # noqa: PT011  # the words are Python's own
            slots.claim(unit, 4, np.array(indices))
        slots.check_integrity()
    assert slots.free_slots(16) == 1
    slots.claim(other, 4, np.array([0, 3]))
    assert sorted((found.unit == other, found.number) for found in slots.take(4, 9)) == [
        (False, 1),
        (False, 2),
        (False, 3),
        (True, 1),
        (True, 2),
    ]
    slots.check_integrity()
