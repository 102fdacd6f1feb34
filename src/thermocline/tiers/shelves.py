"""What the disk tier holds, in memory: blocks of one layout on one shelf, each with the place where its frame lies."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from thermocline.blocks.frame import PAGE_BYTES, frame_bytes
from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.blocks.slots import FIRST_GENERATION, Slot
from thermocline.tiers import journal
from thermocline.tiers.journal import Records, rows
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
            here = place & _POSITION_MASK
            if here == expected and len(runs[-1][1]) < frames_max:
                runs[-1][1].append(place)
            else:
                runs.append((at, [place]))
            expected = here + 1
        return runs


@dataclass(frozen=True, slots=True)
class Recorded:
    """The blocks of one layout that a log names and that can be there: one record per key, in the order written."""

    layout: LayoutId
    records: Records
    shelf: Shelf

    def found(self) -> Found:
        """For the store: parents first."""
        part = self.records
        order = np.argsort(part["depth"], kind="stable")
        keys, parents = (_keys(part[name][order]) for name in ("key", "parent"))
        return Found(self.layout, keys, parents, part["depth"][order].tolist(), part["stored"][order].tolist())


def recorded(live: Records, segments: Collection[int], segment_bytes: int) -> list[Recorded]:
    """What a log's live records say, by layout, without what cannot be true.

    That is a place that does not exist, two sizes in a segment, two lengths in a layout, a key in two places; of such
    two the later record wins.
    """
    return [_on_a_shelf(layout, part) for layout, part in _by_layout(_possible(live, segments, segment_bytes))]


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


def by_segment(parts: Sequence[Recorded]) -> Iterator[tuple[int, int, list[int]]]:
    """(segment, bytes of a slot there, slots in use) for every segment that holds a block."""
    if not parts:
        return
    segments, slots, pages = (
        np.concatenate([part.records[name] for part in parts]) for name in ("segment", "slot", "slot_pages")
    )
    order = np.argsort(segments, kind="stable")
    numbers, starts = np.unique(segments[order], return_index=True)
    for number, some in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        yield number, int(pages[some[0]]) * PAGE_BYTES, slots[some].tolist()


def _possible(live: Records, segments: Collection[int], segment_bytes: int) -> Records:
    there = np.isin(live["segment"], np.array(sorted(segments), np.uint32)) & (live["slot_pages"] > 0)
    live = rows(live, np.flatnonzero(there))
    size = np.zeros(max(segments, default=-1) + 1, np.uint32)
    size[live["segment"]] = live["slot_pages"]
    slot_bytes = live["slot_pages"].astype(np.int64) * PAGE_BYTES
    inside = (live["slot"].astype(np.int64) + 1) * slot_bytes <= segment_bytes
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
    segments, slots = part["segment"].astype(np.int64), part["slot"].astype(np.int64)
    places = (FIRST_GENERATION << SLOT_BITS + SEGMENT_BITS | segments << SLOT_BITS | slots).tolist()
    entries = dict(zip(keys, places, strict=True))  # the later place of a key wins
    if len(entries) < len(keys):
        last = [entries[key] == place for key, place in zip(keys, places, strict=True)]
        part = rows(part, np.flatnonzero(last))
    return Recorded(layout, part, Shelf(length, entries))


def _keys(column: Records) -> list[BlockKey]:
    return cast("list[BlockKey]", list(journal.split(column)))
