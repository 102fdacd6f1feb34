"""What the disk tier holds, in memory: blocks of one layout on one shelf, each with the place where its frame lies."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from thermocline.blocks.frame import PAGE_BYTES, frame_bytes
from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.blocks.slots import FIRST_GENERATION, Slot
from thermocline.tiers import journal
from thermocline.tiers.journal import Records
from thermocline.tiers.tier import Found

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


@dataclass(slots=True)
class Shelf:
    """Blocks of one layout, which all have one length."""

    length_bytes: int
    entries: dict[BlockKey, int] = field(default_factory=dict)

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
            if position(place) == expected and len(runs[-1][1]) < frames_max:
                runs[-1][1].append(place)
            else:
                runs.append((at, [place]))
            expected = position(place) + 1
        return runs


@dataclass(frozen=True, slots=True)
class Recorded:
    """The blocks of one layout that a log names and that can be there: one record per key, in the order written."""

    layout: LayoutId
    length_bytes: int
    keys: list[BlockKey]
    records: Records

    @property
    def places(self) -> NDArray[np.int64]:
        """Where they are, each in the first use of its slot since the tier was opened."""
        segments, slots = self.records["segment"].astype(np.int64), self.records["slot"].astype(np.int64)
        return FIRST_GENERATION << SLOT_BITS + SEGMENT_BITS | segments << SLOT_BITS | slots

    def found(self) -> Found:
        """For the store: parents first."""
        order = np.argsort(self.records["depth"], kind="stable")
        part = self.records[order]
        keys = [self.keys[at] for at in order.tolist()]
        return Found(self.layout, keys, _keys(part, "parent"), part["depth"].tolist(), part["stored"].tolist())


def recorded(live: Records, segments: Collection[int], segment_bytes: int) -> list[Recorded]:
    """What a log's live records say, by layout, without what cannot be true.

    That is a place that does not exist, two sizes in a segment, two lengths in a layout, a key in two places; of such
    two the later record wins.
    """
    return [_one_per_key(layout, part) for layout, part in _by_layout(_possible(live, segments, segment_bytes))]


def shallowest(parts: Sequence[Recorded], count: int) -> list[Recorded]:
    """At most `count` of the blocks, and no block before its parent."""
    depths = np.concatenate([part.records["depth"] for part in parts]) if parts else np.empty(0, np.uint32)
    if len(depths) <= count:
        return list(parts)
    kept = np.zeros(len(depths), bool)
    kept[np.argsort(depths, kind="stable")[:count]] = True
    edges = np.cumsum([len(part.keys) for part in parts])[:-1]
    return [_only(part, np.flatnonzero(mask)) for part, mask in zip(parts, np.split(kept, edges), strict=True)]


def by_segment(parts: Sequence[Recorded]) -> Iterator[tuple[int, int, list[int]]]:
    """(segment, bytes of a slot there, slots in use) for every segment that holds a block."""
    if not parts:
        return
    every = np.concatenate([part.records for part in parts])
    every = every[np.argsort(every["segment"], kind="stable")]
    numbers, starts = np.unique(every["segment"], return_index=True)
    for number, rows in zip(numbers.tolist(), np.split(every, starts[1:]), strict=True):
        yield number, int(rows["slot_pages"][0]) * PAGE_BYTES, rows["slot"].tolist()


def _possible(live: Records, segments: Collection[int], segment_bytes: int) -> Records:
    numbers = np.array(sorted(segments), np.uint32)
    live = live[np.isin(live["segment"], numbers) & (live["slot_pages"] > 0)]
    size = np.zeros(max(segments, default=-1) + 1, np.uint32)
    size[live["segment"]] = live["slot_pages"]
    slot_bytes = live["slot_pages"].astype(np.int64) * PAGE_BYTES
    inside = (live["slot"].astype(np.int64) + 1) * slot_bytes <= segment_bytes
    whole = (-(-live["length"].astype(np.int64) // PAGE_BYTES) + 1) * PAGE_BYTES == slot_bytes
    possible: Records = live[inside & whole & (size[live["segment"]] == live["slot_pages"])]
    return possible


def _by_layout(live: Records) -> list[tuple[LayoutId, Records]]:
    names = dict.fromkeys(journal.split(live, "layout"))
    if len(names) <= 1:
        return [(LayoutId(name), live) for name in names]
    column = np.array(list(journal.split(live, "layout")), object)
    return [(LayoutId(name), live[column == name]) for name in names]


def _one_per_key(layout: LayoutId, part: Records) -> Recorded:
    length = int(part["length"][-1])
    part = part[part["length"] == length]
    keys = _keys(part, "key")
    last = dict(zip(keys, range(len(keys)), strict=True))
    everything = Recorded(layout, length, keys, part)
    return everything if len(last) == len(keys) else _only(everything, np.array(sorted(last.values()), np.int64))


def _only(part: Recorded, rows: NDArray[np.int64]) -> Recorded:
    return Recorded(part.layout, part.length_bytes, [part.keys[at] for at in rows.tolist()], part.records[rows])


def _keys(part: Records, field_name: str) -> list[BlockKey]:
    return [BlockKey(key) for key in journal.split(part, field_name)]
