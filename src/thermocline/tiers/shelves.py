"""What the disk tier holds, in memory: blocks of one layout on one shelf, each with the place where its frame lies."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
from numpy.typing import NDArray

from thermocline.blocks.frame import PAGE_BYTES, frame_bytes
from thermocline.blocks.key import NO_PARENT, BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.blocks.slots import FIRST_GENERATION, Slot
from thermocline.tiers import journal
from thermocline.tiers.journal import Records, rows
from thermocline.tiers.tier import FIRST, GONE, Found

SLOT_BITS = 16  # a segment of 256 MiB has 65,536 pages, and a frame is a page at least
SEGMENT_BITS = 24
_POSITION_MASK = (1 << SLOT_BITS + SEGMENT_BITS) - 1


def place_of(slot: Slot) -> int:
    """A slot as one number."""
    return slot.generation << SLOT_BITS + SEGMENT_BITS | slot.unit << SLOT_BITS | slot.number


def slot_at(place: int) -> Slot:
    """The slot that a place names, this use of it and no other."""
    at = position(place)
    return Slot(at >> SLOT_BITS, at & (1 << SLOT_BITS) - 1, place >> SLOT_BITS + SEGMENT_BITS)


def position(place: int) -> int:
    """A place without its generation: that of the next slot of a segment is one more."""
    return place & _POSITION_MASK


class Places(MutableMapping[BlockKey, int]):
    """Where each block lies, by its key.

    A key has a number, and a number a place. The store's index starts with the same keys and the same numbers, and to
    copy the dict of a million keys is several times faster than to make another.
    """

    __slots__ = ("_free", "_numbers", "_places")

    def __init__(self, numbers: dict[BlockKey, int] | None = None, places: list[int] | None = None) -> None:
        """Takes over both: `places` are those of the keys with the numbers 0 and up."""
        self._numbers = numbers if numbers is not None else {}
        self._places = places if places is not None else []
        self._free: list[int] = []

    def numbers(self) -> dict[BlockKey, int]:
        """A copy of every key's number."""
        return self._numbers.copy()

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[BlockKey]:
        return iter(self._numbers)

    def __contains__(self, key: object) -> bool:
        return key in self._numbers

    def __getitem__(self, key: BlockKey) -> int:
        return self._places[self._numbers[key]]

    def __setitem__(self, key: BlockKey, place: int) -> None:
        number = self._numbers.get(key)
        if number is not None:
            self._places[number] = place
        elif self._free:
            number = self._numbers[key] = self._free.pop()
            self._places[number] = place
        else:
            self._numbers[key] = len(self._places)
            self._places.append(place)

    def __delitem__(self, key: BlockKey) -> None:
        self._free.append(self._numbers.pop(key))


@dataclass(slots=True)
class Shelf:
    """Blocks of one layout, which all have one length."""

    length_bytes: int
    entries: Places = field(default_factory=Places)

    @property
    def frame_bytes(self) -> int:
        """What each of its blocks takes on disk."""
        return frame_bytes(self.length_bytes)

    def runs(self, keys: Sequence[BlockKey], frames_max: int) -> list[tuple[int, list[int]]]:
        """(first position, places) of stretches that lie side by side on disk; what is not here is in none."""
        runs: list[tuple[int, list[int]]] = []
        expected = -1
        for at, key in enumerate(keys):
            place = self.entries.get(key, -1)
            if place < 0:
                expected = -1
                continue
            here = place & _POSITION_MASK
            if here == expected and len(runs[-1][1]) < frames_max:
                runs[-1][1].append(place)
            else:
                runs.append((at, [place]))
            expected = here + 1
        return runs


def records(
    kind: int, layout: LayoutId, keys: Sequence[BlockKey], places: Sequence[int], length_bytes: int = 0
) -> Records:
    """One record for each key: what lies where, and how long it is. All else is zero."""
    some = np.zeros(len(keys), journal.RECORD)
    some["key"] = np.frombuffer(b"".join(keys), some["key"].dtype)
    some["layout"] = np.frombuffer(layout, some["layout"].dtype)
    some["kind"], some["length"] = kind, length_bytes
    some["slot_pages"] = frame_bytes(length_bytes) // PAGE_BYTES if length_bytes else 0
    positions = np.array([position(place) for place in places], np.int64)
    some["segment"], some["slot"] = positions >> SLOT_BITS, positions & (1 << SLOT_BITS) - 1
    return some


@dataclass(frozen=True, slots=True)
class Recorded:
    """The blocks of one layout that a log names and that can be there: one record per key, in the order written.

    The shelf is new: its keys have the numbers of their records.
    """

    layout: LayoutId
    records: Records
    shelf: Shelf

    def found(self) -> Found:
        """For the store. Before anything is put on the shelf or taken from it."""
        part, numbers = self.records, self.shelf.entries.numbers()
        depths, stored = part["depth"].astype(np.int64), part["stored"].copy()
        return Found(self.layout, numbers, _parents(part, numbers), depths, stored)


def _parents(part: Records, numbers: Mapping[BlockKey, int]) -> NDArray[np.int64]:
    """The number of each record's parent, FIRST or GONE."""
    words = part.view(np.uint64).reshape(len(part), -1)
    above = np.arange(-1, len(part) - 1)
    mostly = (words[1:, 4:8] == words[:-1, :4]).all(axis=1)  # the parent's record is the one before
    others = np.flatnonzero(~np.concatenate([[False], mostly]))[: len(part)]
    keys = _keys(part["parent"][others])
    above[others] = [FIRST if key == NO_PARENT else numbers.get(key, GONE) for key in keys]
    return above


def recorded(
    live: Records, segments: Collection[int], segment_bytes: int, cut: Mapping[int, int] | None = None
) -> list[Recorded]:
    """What a log's live records say, by layout, without what cannot be true. `cut` has the lengths of short segments.

    Not true are a place that does not exist, two sizes in a segment, two lengths in a layout, a key in two places; of
    two that contradict each other the later record wins.
    """
    return [
        _on_a_shelf(layout, part) for layout, part in _by_layout(_possible(live, segments, segment_bytes, cut or {}))
    ]


def shallowest(parts: Sequence[Recorded], count: int) -> list[Recorded]:
    """At most `count` of the blocks, and no block before its parent."""
    depths = np.concatenate([part.records["depth"] for part in parts]) if parts else np.empty(0, np.uint32)
    if len(depths) <= count:
        return list(parts)
    kept = np.zeros(len(depths), bool)
    kept[np.argsort(depths, kind="stable")[:count]] = True
    edges = np.cumsum([len(part.records) for part in parts])[:-1]
    some = zip(parts, np.split(kept, edges), strict=True)
    return [_on_a_shelf(part.layout, rows(part.records, np.flatnonzero(mask))) for part, mask in some if mask.any()]


def by_segment(parts: Sequence[Recorded]) -> Iterator[tuple[int, int, NDArray[np.int64]]]:
    """(segment, bytes of a slot there, slots in use) for every segment that holds a block."""
    if not parts:
        return
    segments, slots, pages = (
        np.concatenate([part.records[name] for part in parts]) for name in ("segment", "slot", "slot_pages")
    )
    order = np.argsort(segments, kind="stable")
    numbers, starts = np.unique(segments[order], return_index=True)
    for number, some in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        yield number, int(pages[some[0]]) * PAGE_BYTES, slots[some].astype(np.int64)


def _possible(live: Records, segments: Collection[int], segment_bytes: int, cut: Mapping[int, int]) -> Records:
    there = np.isin(live["segment"], np.array(sorted(segments), np.uint32)) & (live["slot_pages"] > 0)
    live = rows(live, np.flatnonzero(there))
    size = np.zeros(max(segments, default=-1) + 1, np.uint32)
    size[live["segment"]] = live["slot_pages"]
    slot_bytes = live["slot_pages"].astype(np.int64) * PAGE_BYTES
    end = np.full(len(size), segment_bytes)
    end[list(cut)] = list(cut.values())
    inside = (live["slot"].astype(np.int64) + 1) * slot_bytes <= end[live["segment"]]
    whole = (-(-live["length"].astype(np.int64) // PAGE_BYTES) + 1) * PAGE_BYTES == slot_bytes
    return rows(live, np.flatnonzero(inside & whole & (size[live["segment"]] == live["slot_pages"])))


def _by_layout(live: Records) -> list[tuple[LayoutId, Records]]:
    words = np.ascontiguousarray(live["layout"]).view(np.uint64).reshape(-1, 4)
    parts = []
    while len(live):
        same = (words == words[0]).all(axis=1)
        parts.append((LayoutId(live["layout"][0].tobytes()), rows(live, np.flatnonzero(same))))
        live, words = rows(live, np.flatnonzero(~same)), words[~same]
    return parts


def _on_a_shelf(layout: LayoutId, part: Records) -> Recorded:
    length = int(part["length"][-1])
    part = rows(part, np.flatnonzero(part["length"] == length))
    keys = _keys(part["key"])
    numbers = dict(zip(keys, range(len(keys)), strict=True))
    if len(numbers) < len(keys):  # the later place of a key wins
        return _on_a_shelf(layout, rows(part, np.sort(np.fromiter(numbers.values(), np.int64))))
    segments, slots = part["segment"].astype(np.int64), part["slot"].astype(np.int64)
    places = FIRST_GENERATION << SLOT_BITS + SEGMENT_BITS | segments << SLOT_BITS | slots
    return Recorded(layout, part, Shelf(length, Places(numbers, places.tolist())))


def _keys(column: Records) -> list[BlockKey]:
    return cast("list[BlockKey]", column.tolist())
