"""What a log says, without what cannot be: of two records that contradict each other the later one is true."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.blocks.slots import FIRST_GENERATION, Slot
from thermocline.tiers.journal import ADD, Row, make
from thermocline.tiers.shelves import Places, Shelf, by_segment, place_of, position, recorded, shallowest, slot_at
from thermocline.tiers.tier import FIRST, GONE, Found

PAGE = 4096
SEGMENT = 16 * PAGE
A, B = b"a" * 32, b"b" * 32


def _key(number):
    return number.to_bytes(32, "little")


def _row(number, segment, slot, *, layout=A, pages=2, length=4000, depth=1, parent=0):
    return Row(_key(number), _key(parent), layout, ADD, depth, segment, slot, pages, length, 0.0)


def _places(parts):
    return {
        (part.layout, int.from_bytes(key, "little")): slot_at(place)[:2]
        for part in parts
        for key, place in part.shelf.entries.items()
    }


def _recorded(*rows, segments=(0, 1, 2)):
    parts = recorded(make(list(rows)), segments, SEGMENT)
    for part in parts:
        assert len(part.records) == len(part.shelf.entries)
        assert set(part.found().keys) == set(part.shelf.entries)
    return parts


@pytest.mark.parametrize("slot", [Slot(0, 0, 1), Slot(2**24 - 1, 2**16 - 1, 1), Slot(5, 7, 2**40)])
def test_places_and_slots(slot):
    """A place names one slot and one use of it; the next slot of a segment is one position further."""
    assert slot_at(place_of(slot)) == slot
    assert position(place_of(slot)) == position(place_of(slot._replace(generation=99)))
    if slot.number:
        assert position(place_of(slot)) == position(place_of(slot._replace(number=slot.number - 1))) + 1


def test_nothing():
    """A log without records holds nothing."""
    assert _recorded() == []
    assert list(by_segment([])) == []
    assert shallowest([], 5) == []


def test_layouts_apart():
    """Blocks are grouped by layout, keys of two layouts are two blocks, and all are in the first use of their slot."""
    parts = _recorded(_row(1, 0, 0), _row(1, 0, 1, layout=B), _row(2, 1, 0), _row(3, 0, 2, layout=B))
    assert _places(parts) == {(A, 1): (0, 0), (A, 2): (1, 0), (B, 1): (0, 1), (B, 3): (0, 2)}
    assert {slot_at(place).generation for part in parts for place in part.shelf.entries.values()} == {FIRST_GENERATION}


def test_a_key_in_two_places():
    """Of two places of a key the later one is true."""
    assert _places(_recorded(_row(1, 0, 0), _row(2, 0, 1), _row(1, 0, 5))) == {(A, 1): (0, 5), (A, 2): (0, 1)}


def test_two_sizes_in_a_segment():
    """A segment has slots of one size, that of its last record; records of another size are void."""
    parts = _recorded(_row(1, 0, 0), _row(2, 0, 1, layout=B, pages=3, length=8000), _row(3, 1, 0))
    assert _places(parts) == {(B, 2): (0, 1), (A, 3): (1, 0)}


def test_two_lengths_in_a_layout():
    """A layout has one length, that of its last record."""
    assert _places(_recorded(_row(1, 0, 0, length=4000), _row(2, 1, 0, length=4001))) == {(A, 2): (1, 0)}


@pytest.mark.parametrize(
    "row",
    [
        _row(1, 7, 0),
        _row(1, 4_000_000_000, 0),
        _row(1, 0, 8),
        _row(1, 0, 4_000_000_000),
        _row(1, 0, 0, pages=0, length=0),
        _row(1, 0, 0, pages=3),
        _row(1, 0, 0, pages=4_000_000_000, length=4_000_000_000),
    ],
)
def test_places_that_do_not_exist(row):
    """A record of a place or size that cannot be is void, and hurts no other."""
    assert _places(_recorded(row, _row(2, 1, 0))) == {(A, 2): (1, 0)}


def test_parents():
    """What is found names every block's parent, wherever in the log that lies, and says where there is none."""
    parents = {1: 0, 2: 1, 3: 7, 4: 3, 5: 1, 6: 5, 7: 0, 8: 99, 9: 8}
    order = [1, 2, 3, 4, 5, 6, 7, 9, 8]
    depths = {1: 1, 2: 2, 3: 2, 4: 3, 5: 2, 6: 3, 7: 1, 8: 2, 9: 3}
    rows = [
        _row(number, at // 8, at % 8, depth=depths[number], parent=parents[number]) for at, number in enumerate(order)
    ]
    (part,) = _recorded(*rows)
    found = part.found()
    assert [int.from_bytes(key, "little") for key in found.keys] == order
    names = {FIRST: 0, GONE: 99, **dict(enumerate(order))}
    assert {number: names[at] for number, at in zip(order, found.parents.tolist(), strict=True)} == parents
    assert found.depths.tolist() == [depths[number] for number in order]


@given(st.lists(st.tuples(st.integers(-2, 7), st.integers(1, 3)), max_size=8))
def test_what_hangs_together(rows):
    """Whatever is found, exactly the blocks with an unbroken path to a first block are rooted, and they stay whole."""
    parents = [parent if parent < len(rows) else GONE for parent, _ in rows]
    depths = [depth for _, depth in rows]

    def reaches(at):
        if parents[at] in {FIRST, GONE}:
            return parents[at] == FIRST and depths[at] == 1
        return depths[at] == depths[parents[at]] + 1 and reaches(parents[at])

    positions = {_key(at): at for at in range(len(rows))}
    found = Found(A, positions, np.array(parents, np.int64), np.array(depths, np.int64), np.arange(len(rows)) / 2)
    expected = [at for at in range(len(rows)) if reaches(at)]
    assert np.flatnonzero(found.rooted()).tolist() == expected
    part = found.only(found.rooted())
    assert part.keys == [_key(at) for at in expected]
    assert part.rooted().all()
    assert part.stored_wall_seconds.tolist() == [at / 2 for at in expected]
    for at, parent in zip(expected, part.parents.tolist(), strict=True):
        assert (part.keys[parent] if parent >= 0 else parent) == (_key(parents[at]) if parents[at] >= 0 else FIRST)


def test_by_segment():
    """Every segment's size and slots, over all layouts."""
    parts = _recorded(_row(1, 2, 4), _row(2, 0, 1), _row(3, 2, 0, layout=B), _row(4, 1, 3, layout=B), _row(5, 2, 7))
    claims = {segment: (slot_bytes, sorted(slots)) for segment, slot_bytes, slots in by_segment(parts)}
    assert claims == {0: (8192, [1]), 1: (8192, [3]), 2: (8192, [0, 4, 7])}


@pytest.mark.parametrize("count", range(7))
def test_shallowest(count):
    """Where not all may stay the deepest go, over all layouts, so that none stays without its parent."""
    rows = [_row(number, 0, number, layout=(A, B)[number % 2], depth=1 + number // 2) for number in range(6)]
    kept = shallowest(_recorded(*rows), count)
    depths = sorted(depth for part in kept for depth in part.records["depth"].tolist())
    assert depths == [1, 1, 2, 2, 3, 3][:count]
    assert all(len(part.records) for part in kept)


def test_runs():
    """Blocks that lie side by side, in the order asked for, are one run; each run has its bound."""
    entries = {_key(at): place_of(Slot(0, at, at % 3)) for at in range(6)} | {_key(9): place_of(Slot(1, 0, 1))}
    shelf = Shelf(4000, Places())
    shelf.entries.update(entries)

    def runs(*numbers, frames_max=4):
        found = shelf.runs([_key(number) for number in numbers], frames_max)
        return [(first, [slot_at(place)[:2] for place in places]) for first, places in found]

    assert runs(0, 1, 2) == [(0, [(0, 0), (0, 1), (0, 2)])]
    assert runs(0, 1, 2, 3, 4, 5) == [(0, [(0, 0), (0, 1), (0, 2), (0, 3)]), (4, [(0, 4), (0, 5)])]
    assert runs(2, 1) == [(0, [(0, 2)]), (1, [(0, 1)])]
    assert runs(0, 77, 1) == [(0, [(0, 0)]), (2, [(0, 1)])]
    assert runs(5, 9) == [(0, [(0, 5)]), (1, [(1, 0)])]
    assert runs(1, 1) == [(0, [(0, 1)]), (1, [(0, 1)])]
    assert runs(77) == []
    assert runs() == []


def test_places_are_a_dict():
    """Places take, replace and give up keys as a dict does, whatever numbers they begin with."""
    rng = np.random.default_rng(7)
    expected = {_key(number): 100 + number for number in range(20)}
    places = Places(dict(zip(expected, range(20), strict=True)), list(expected.values()))
    before = places.numbers()
    for step in range(2_000):
        key = _key(int(rng.integers(40)))
        if rng.random() < 0.5:
            places[key] = expected[key] = step
        else:
            assert places.pop(key, None) == expected.pop(key, None)
        assert places.get(key) == expected.get(key)
    assert dict(places.items()) == expected
    assert len(places) == len(expected)
    assert len(set(places.numbers().values())) == len(expected)
    assert before == {_key(number): number for number in range(20)}, "a copy"


def test_many_records():
    """A log of 30,000 places with many keys twice is taken apart into exactly what the later records say."""
    rng = np.random.default_rng(1)
    expected, rows = {}, []
    for place in rng.permutation(30_000).tolist():
        number, layout = int(rng.integers(20_000)), (A, B)[int(rng.integers(2))]
        rows.append(_row(number, place // 8, place % 8, layout=layout))
        expected[layout, number] = (place // 8, place % 8)
    assert len(expected) < 25_000
    assert _places(_recorded(*rows, segments=range(30_000 // 8))) == expected
