"""The memory tier: blocks in slots of one slab."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

from thermocline.blocks.frame import copy_in, copy_out, padded
from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.blocks.slab import Slab
from thermocline.blocks.slots import Slot
from thermocline.clock import Clock, SystemClock
from thermocline.tiers.tier import Bitmap, Block, Found, Job, Medium, Outcome, Piece, Usage, block_length

LENT_SHARE = 2
"""Never more than one in so many bytes is lent: the others hold blocks."""


class _Entry(NamedTuple):
    slot: Slot
    offset: int
    length_bytes: int
    sum: bytes


class MemoryTier:
    """Holds what fits into `capacity_bytes`. What a frame's header says on disk, the entry says here."""

    medium = Medium.HOST

    def __init__(self, capacity_bytes: int, *, name: str = "memory", clock: Clock | None = None) -> None:
        self.name = name
        self._clock = clock or SystemClock()
        self._slab = Slab(capacity_bytes)
        self._entries: dict[LayoutId, dict[BlockKey, _Entry]] = {}
        self._lent: dict[Slot, int] = {}  # the bytes of each
        self._lock = threading.Lock()

    def holds(self, layout: LayoutId, keys: Sequence[BlockKey]) -> Bitmap:
        """See `Tier.holds`."""
        entries = self._entries.get(layout, {})
        return [key in entries for key in keys]

    def load(
        self, layout: LayoutId, keys: Sequence[BlockKey], into: Sequence[Sequence[Piece]], deadline: float
    ) -> list[Outcome]:
        """See `Tier.load`. A slot that was given to another block during the copy is a MISS, not damage."""
        entries = self._entries.get(layout, {})
        outcomes: list[Outcome] = []
        for key, pieces in zip(keys, into, strict=True):
            entry = entries.get(key)
            if entry is None:
                outcomes.append(Outcome.MISS)
            elif self._clock.now() > deadline:
                outcomes.append(Outcome.LATE)
            else:
                outcomes.append(self._load_one(layout, key, entry, pieces))
        return outcomes

    def save(self, layout: LayoutId, keys: Sequence[BlockKey], blocks: Sequence[Block]) -> Job:
        """See `Tier.save`. Copies before it returns: the job is done, as durable as memory can be."""
        length = block_length(blocks)
        slots = [block.slot for block in blocks if block.slot is not None]
        in_place = bool(slots)
        assert len(slots) in {0, len(blocks)}, "a save is of lent slots or of other memory, never of both"
        if not in_place and blocks:
            slots = self._slab.take(length, len(blocks))
        done = 0
        try:
            for slot, key, block in zip(slots, keys, blocks, strict=False):
                if not in_place:
                    copy_in(block.pieces, self._slab.view(slot, length))
                self._publish(layout, key, _Entry(slot, self._slab.offset(slot, length), length, block.sum))
                done += 1
        finally:
            if not in_place:  # pieces that are no plain memory: the caller's mistake must not cost room
                for slot in slots[done:]:
                    self._slab.give(slot)
        job = Job([Outcome.HIT] * len(slots) + [Outcome.FULL] * (len(blocks) - len(slots)))
        job.set_done()
        return job

    def remove(self, layout: LayoutId, keys: Sequence[BlockKey]) -> int:
        """See `Tier.remove`."""
        removed = 0
        with self._lock:
            entries = self._entries.get(layout, {})
            for key in keys:
                entry = entries.pop(key, None)
                if entry is not None:
                    self._slab.give(entry.slot)
                    removed += 1
        return removed

    def block(self, layout: LayoutId, key: BlockKey) -> tuple[Piece, bytes] | None:
        """A view of a block and its sum, for writing it to another tier. The caller keeps it from eviction."""
        entry = self._entries.get(layout, {}).get(key)
        return None if entry is None else (self._slab.view(entry.slot, entry.length_bytes), entry.sum)

    def places(self, layout: LayoutId, keys: Sequence[BlockKey]) -> tuple[list[int], bytes]:
        """See `LendingTier.places`."""
        found = list(map(self._entries.get(layout, {}).get, keys))
        here = [entry for entry in found[: found.index(None) if None in found else None] if entry]
        return [entry.offset for entry in here], b"".join([entry.sum for entry in here])

    def lendable(self, block_bytes: int) -> int:
        """See `LendingTier.lendable`."""
        size = padded(block_bytes)
        if size > self._slab.unit_bytes:
            return 0
        with self._lock:
            room = self._slab.capacity_bytes // LENT_SHARE - sum(self._lent.values())
            return max(room // size, 0 if self._lent else 1)

    def lend(self, block_bytes: int, count: int) -> list[Slot]:
        """See `LendingTier.lend`."""
        slots = self._slab.take(block_bytes, count)
        with self._lock:
            self._lent.update(dict.fromkeys(slots, padded(block_bytes)))
        return slots

    def lent(self, slot: Slot, block_bytes: int) -> tuple[int, Piece]:
        """See `LendingTier.lent`."""
        return self._slab.offset(slot, block_bytes), self._slab.view(slot, block_bytes)

    def take_back(self, slots: Sequence[Slot]) -> None:
        """See `LendingTier.take_back`."""
        with self._lock:
            for slot in slots:
                if self._lent.pop(slot, None) is not None:
                    self._slab.give(slot)

    @property
    def fd(self) -> int:
        """See `LendingTier.fd`."""
        return self._slab.fd

    def free_slots(self, block_bytes: int) -> int:
        """How many blocks of this size fit now."""
        return self._slab.free_slots(block_bytes)

    def usage(self) -> Usage:
        """See `Tier.usage`."""
        with self._lock:
            blocks = sum(map(len, self._entries.values()))
        return Usage(blocks, self._slab.used_bytes, self._slab.capacity_bytes)

    def found(self) -> Sequence[Found]:
        """See `Tier.found`: memory starts cold."""
        return ()

    def wait_ready(self, seconds: float | None = None) -> bool:
        """Wait until all memory is faulted in, as a bench does before it measures."""
        return self._slab.wait_ready(seconds)

    def check_integrity(self) -> None:
        """Every taken slot belongs to exactly one entry; call it while no save runs. Raises AssertionError."""
        self._slab.check_integrity()
        with self._lock:
            held = [entry for entries in self._entries.values() for entry in entries.values()]
            lent = dict(self._lent)
        slots = [*(entry.slot for entry in held), *lent]
        assert len(set(slots)) == len(slots), "two blocks in one slot"
        assert all(map(self._slab.is_current, slots)), "a block in a slot that was given back"
        known, used = sum(padded(entry.length_bytes) for entry in held) + sum(lent.values()), self._slab.used_bytes
        assert known == used, f"{used} bytes in use, {known} accounted for"

    def close(self) -> None:
        """See `Tier.close`."""
        self._slab.close()

    def _load_one(self, layout: LayoutId, key: BlockKey, entry: _Entry, pieces: Sequence[Piece]) -> Outcome:
        arrived = copy_out(self._slab.view(entry.slot, entry.length_bytes), pieces)
        if not self._slab.is_current(entry.slot):
            return Outcome.MISS
        if arrived == entry.sum:
            return Outcome.HIT
        self._drop(layout, key, entry)
        return Outcome.CORRUPT

    def _publish(self, layout: LayoutId, key: BlockKey, entry: _Entry) -> None:
        with self._lock:
            self._lent.pop(entry.slot, None)
            entries = self._entries.setdefault(layout, {})
            old = entries.get(key)
            entries[key] = entry
            if old is not None:
                self._slab.give(old.slot)

    def _drop(self, layout: LayoutId, key: BlockKey, entry: _Entry) -> None:
        with self._lock:
            entries = self._entries.get(layout, {})
            if entries.get(key) is entry:
                del entries[key]
                self._slab.give(entry.slot)
