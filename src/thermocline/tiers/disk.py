"""The disk tier: frames in the slots of preallocated segments, an index log, direct I/O, a hard quota.

One writer thread groups what is saved: frames first, then their records in the log (visible, and safe from the death
of the process), then one sync for all (durable). Whatever a crash leaves behind, a load compares the frame with what it
asked for, so the worst outcome is a miss.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np

from thermocline.blocks.frame import PAGE_BYTES, copy_out, frame_bytes, read_header
from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.blocks.slots import SlotMap
from thermocline.clock import Clock, SystemClock
from thermocline.tiers import directory, journal
from thermocline.tiers.journal import Journal, Records
from thermocline.tiers.segments import READ_BYTES_MAX, Read, Readers, Segments
from thermocline.tiers.tier import Bitmap, Block, Found, Job, Medium, Outcome, Piece, Usage, block_length
from thermocline.tiers.writer import FrameWriter

MIB = 1024 * 1024
GROUP_BYTES_MAX = 32 * MIB
GROW_RETRY_SECONDS = 30.0
READER_THREADS = 2


@dataclass(slots=True)
class _Shelf:
    """Blocks of one layout: all have one length, so a location is just (segment << 32 | slot)."""

    length_bytes: int
    entries: dict[BlockKey, int] = field(default_factory=dict)

    @property
    def frame_bytes(self) -> int:
        return frame_bytes(self.length_bytes)


@dataclass(frozen=True, slots=True)
class _Write:
    layout: LayoutId
    keys: Sequence[BlockKey]
    blocks: Sequence[Block]
    places: Sequence[int]
    length_bytes: int
    job: Job


class DiskTier:
    """Holds blocks below `path`, never more than `capacity_bytes` in all. One process at a time may open a path."""

    medium = Medium.DISK

    def __init__(
        self,
        path: Path,
        capacity_bytes: int,
        *,
        name: str = "disk",
        clock: Clock | None = None,
        queue_bytes_max: int = 64 * MIB,
    ) -> None:
        """Open or create. Raises DiskInUseError, DiskFormatError, or TierError where the path cannot be written."""
        self.name = name
        self._clock = clock or SystemClock()
        self._path = path
        self.capacity_bytes = capacity_bytes
        self._queue_bytes_max = queue_bytes_max
        self._lock = threading.Condition()
        self._lock_fd = directory.claim(path)
        log_bytes = directory.log_bytes(capacity_bytes)
        room_bytes = capacity_bytes - 2 * log_bytes  # the log, and its successor while it is being written
        self._segments = Segments(path, directory.segment_bytes(path, room_bytes))
        self._segments_max = room_bytes // self._segments.segment_bytes
        self._slots = SlotMap(self._segments.segment_bytes)
        self._shelves: dict[LayoutId, _Shelf] = {}
        self._writes: deque[_Write] = deque()
        self._forgotten: list[tuple[LayoutId, BlockKey, int]] = []
        self._queued_bytes = 0
        self._grow_at = 0.0
        self._closing = False
        self._busy = False
        self._journal = Journal(path / "index.log", bytes_max=log_bytes)
        self._found = self._recover(self._journal.recovered.live)
        self._readers = Readers(READER_THREADS)
        self._writer = FrameWriter(self._segments, self._journal.epoch)
        self._grow()
        self._thread = threading.Thread(target=self._write_loop, name="disk-writer", daemon=True)
        self._thread.start()

    # -- the seam ------------------------------------------------------------------------------------------------------

    def holds(self, layout: LayoutId, keys: Sequence[BlockKey]) -> Bitmap:
        """See `Tier.holds`."""
        shelf = self._shelves.get(layout)
        return [shelf is not None and key in shelf.entries for key in keys]

    def load(
        self, layout: LayoutId, keys: Sequence[BlockKey], into: Sequence[Sequence[Piece]], deadline: float
    ) -> list[Outcome]:
        """See `Tier.load`. Adjacent frames are one read; a frame is checked while the next read runs."""
        outcomes = [Outcome.MISS] * len(keys)
        shelf = self._shelves.get(layout)
        if shelf is None:
            return outcomes
        runs = self._runs(shelf, keys)
        size = shelf.frame_bytes
        reads = [self._read(places, size) for _, places in runs]
        try:
            for (first, places), read in zip(runs, reads, strict=True):
                if not read.wait(deadline - self._clock.now()):
                    outcomes[first : first + len(places)] = [Outcome.LATE] * len(places)
                    continue
                for at, place in enumerate(places):
                    index = first + at
                    outcomes[index] = self._accept(layout, shelf, keys[index], place, read, at * size, into[index])
                read.release()  # at once: the readers have only a few buffers
        finally:
            for read in reads:
                read.release()
        return outcomes

    def save(self, layout: LayoutId, keys: Sequence[BlockKey], blocks: Sequence[Block]) -> Job:
        """See `Tier.save`. Never waits for the device: over `queue_bytes_max` in flight, blocks are LATE."""
        length = block_length(blocks)
        size = frame_bytes(length)
        job = Job([Outcome.PENDING] * len(keys))
        with self._lock:
            room = max(0, self._queue_bytes_max - self._queued_bytes) // size
            taken = [] if self._closing else self._slots.take(size, min(len(blocks), room))
            job.outcomes[len(taken) :] = [self._refusal(queue_full=len(taken) == room)] * (len(blocks) - len(taken))
            if taken:
                places = [slot.unit << 32 | slot.number for slot in taken]
                self._shelves.setdefault(layout, _Shelf(length))
                self._writes.append(_Write(layout, keys[: len(taken)], blocks[: len(taken)], places, length, job))
                self._queued_bytes += size * len(taken)
            self._lock.notify_all()
        if not taken:
            job.set_done()
        return job

    def remove(self, layout: LayoutId, keys: Sequence[BlockKey]) -> int:
        """See `Tier.remove`. The log hears of it before the room is written again."""
        with self._lock:
            shelf = self._shelves.get(layout)
            gone = [(key, shelf.entries.pop(key)) for key in keys if key in shelf.entries] if shelf else []
            for key, place in gone:
                self._forget(layout, key, place)
            self._lock.notify_all()
        return len(gone)

    def usage(self) -> Usage:
        """See `Tier.usage`. Counts whole segments and the log, as the file system does."""
        with self._lock:
            blocks = sum(len(shelf.entries) for shelf in self._shelves.values())
            used = self._slots.units * self._slots.unit_bytes + self._journal.size_bytes
        return Usage(blocks, used, self.capacity_bytes)

    def found(self) -> Sequence[Found]:
        """See `Tier.found`. Handed out once: a second call finds nothing."""
        found, self._found = self._found, []
        return found

    def free_slots(self, block_bytes: int) -> int:
        """How many blocks of this size fit now."""
        with self._lock:
            return self._slots.free_slots(frame_bytes(block_bytes))

    def wait_idle(self, seconds: float | None = None) -> bool:
        """Wait until nothing is queued or being written; False if `seconds` passed first."""
        with self._lock:
            return self._lock.wait_for(lambda: not (self._queued_bytes or self._forgotten or self._busy), seconds)

    def check_integrity(self) -> None:
        """Every taken slot belongs to one block or one write in flight. Raises AssertionError."""
        with self._lock:
            self._slots.check_integrity()
            held = [place for shelf in self._shelves.values() for place in shelf.entries.values()]
            assert len(set(held)) == len(held), "two blocks in one slot"

    def close(self) -> None:
        """See `Tier.close`. Waits for what is queued; a device that hangs is given up on after a few seconds."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._lock.notify_all()
        self._thread.join(10.0)
        self._readers.close(1.0)
        if not self._thread.is_alive():
            self._journal.close()
            self._segments.close()
            os.close(self._lock_fd)

    def _refusal(self, *, queue_full: bool) -> Outcome:
        """Why a block was not taken: what waits to be written, or a segment that is still to come, makes it LATE."""
        if self._closing:
            return Outcome.FAILED
        return Outcome.LATE if queue_full or self._may_grow() else Outcome.FULL

    # -- loading -------------------------------------------------------------------------------------------------------

    @staticmethod
    def _runs(shelf: _Shelf, keys: Sequence[BlockKey]) -> list[tuple[int, list[int]]]:
        """(first index, places) of stretches that lie side by side on disk and fit into one read."""
        frames_max = max(1, READ_BYTES_MAX // shelf.frame_bytes)
        runs: list[tuple[int, list[int]]] = []
        expected = -1
        for index, key in enumerate(keys):
            place = shelf.entries.get(key, -1)
            if place < 0:
                expected = -1
            elif place == expected and len(runs[-1][1]) < frames_max:
                runs[-1][1].append(place)
                expected = place + 1
            else:
                runs.append((index, [place]))
                expected = place + 1
        return runs

    def _read(self, places: Sequence[int], size: int) -> Read:
        segment, slot = divmod(places[0], 1 << 32)
        return self._readers.submit(self._segments.fd(segment), slot * size, size * len(places))

    def _accept(
        self, layout: LayoutId, shelf: _Shelf, key: BlockKey, place: int, read: Read, at: int, pieces: Sequence[Piece]
    ) -> Outcome:
        """Check one frame against what was asked for, in this order: header sum, key, layout, length, payload sum."""
        if read.error is not None:
            return Outcome.FAILED
        header = read_header(read.bytes[at : at + PAGE_BYTES])
        if header and (header.key, header.layout, header.length_bytes) == (key, layout, shelf.length_bytes):
            payload = read.bytes[at + PAGE_BYTES : at + PAGE_BYTES + shelf.length_bytes]
            if copy_out(payload, pieces) == header.payload_sum:
                return Outcome.HIT
        return self._refuse(layout, shelf, key, place)

    def _refuse(self, layout: LayoutId, shelf: _Shelf, key: BlockKey, place: int) -> Outcome:
        """Damage, unless the block moved away while it was read. A damaged place is not used again before a restart."""
        with self._lock:
            if shelf.entries.get(key) != place:
                return Outcome.MISS
            del shelf.entries[key]
            self._forgotten.append((layout, key, place))
            self._lock.notify_all()
        return Outcome.CORRUPT

    # -- saving --------------------------------------------------------------------------------------------------------

    def _write_loop(self) -> None:
        unsynced: list[_Write] = []
        while True:
            with self._lock:
                if not unsynced:
                    self._lock.wait_for(lambda: self._writes or self._forgotten or self._closing)
                batch = self._next_group()
                forgotten, self._forgotten = self._forgotten, []
                finished = self._closing and not batch and not forgotten
                self._busy = True
            self._grow()
            self._log(self._removals(forgotten))
            unsynced += self._write(batch)
            if finished or not self._writes or sum(map(self._size, unsynced)) >= GROUP_BYTES_MAX:
                self._settle(unsynced)
                unsynced = []
            with self._lock:
                self._busy = False
                self._lock.notify_all()
            if finished:
                return

    def _next_group(self) -> list[_Write]:
        group: list[_Write] = []
        size = 0
        while self._writes and size < GROUP_BYTES_MAX:
            group.append(self._writes.popleft())
            size += self._size(group[-1])
        return group

    @staticmethod
    def _size(write: _Write) -> int:
        return len(write.places) * frame_bytes(write.length_bytes)

    def _write(self, batch: Sequence[_Write]) -> list[_Write]:
        """Write frames, then their records; what was written is visible. Returns what still has to be synced."""
        written = [write for write in batch if self._write_frames(write)]
        if written and not self._log(self._additions(written)):
            for write in written:
                self._fail(write)
            written = []
        with self._lock:
            for write in written:
                self._publish(write)
        for write in written:
            write.job.outcomes[: len(write.places)] = [Outcome.HIT] * len(write.places)
            write.job.set_visible()
        return written

    def _write_frames(self, write: _Write) -> bool:
        size = frame_bytes(write.length_bytes)
        try:
            for _, run in groupby(enumerate(write.places), key=lambda pair: pair[1] - pair[0]):
                first, places = zip(*run, strict=True)
                segment, slot = divmod(places[0], 1 << 32)
                part = slice(first[0], first[-1] + 1)
                self._writer.write(segment, slot * size, write.layout, write.keys[part], write.blocks[part])
        except OSError:
            self._fail(write)
            return False
        return True

    def _publish(self, write: _Write) -> None:
        entries = self._shelves[write.layout].entries
        for key, place in zip(write.keys, write.places, strict=True):
            old = entries.get(key)
            entries[key] = place
            if old is not None:
                self._forget(write.layout, key, old)

    def _settle(self, unsynced: Sequence[_Write]) -> None:
        """One sync for a group of writes: durable, or taken back."""
        try:
            self._segments.sync(sorted({place >> 32 for write in unsynced for place in write.places}))
            if unsynced:
                self._journal.sync()
        except OSError:
            for write in unsynced:
                self.remove(write.layout, write.keys)
                write.job.outcomes[: len(write.places)] = [Outcome.FAILED] * len(write.places)
        with self._lock:
            self._queued_bytes -= sum(map(self._size, unsynced))
        for write in unsynced:
            write.job.set_done()

    def _fail(self, write: _Write) -> None:
        with self._lock:
            for place in write.places:
                self._slots.give(self._slots.at(*divmod(place, 1 << 32)))
            self._queued_bytes -= self._size(write)
        write.job.outcomes[: len(write.places)] = [Outcome.FAILED] * len(write.places)
        write.job.set_done()

    # -- the log and the room ------------------------------------------------------------------------------------------

    def _forget(self, layout: LayoutId, key: BlockKey, place: int) -> None:
        self._slots.give(self._slots.at(*divmod(place, 1 << 32)))
        self._forgotten.append((layout, key, place))

    def _log(self, records: Records) -> bool:
        """Append to the log, compacting it when it is mostly history; False if it could not be written."""
        if not len(records):
            return True
        try:
            with self._lock:
                live = sum(len(shelf.entries) for shelf in self._shelves.values())
            if self._journal.wants_compaction(live):
                self._journal.compact()
            if self._journal.full(len(records)):
                return False
            self._journal.append(records)
        except OSError:
            return False
        return True

    def _additions(self, writes: Sequence[_Write]) -> Records:
        wall = self._clock.wall()
        return journal.make(
            [
                journal.Row(
                    key,
                    block.parent,
                    write.layout,
                    journal.ADD,
                    block.depth,
                    place >> 32,
                    place & 0xFFFFFFFF,
                    frame_bytes(write.length_bytes) // PAGE_BYTES,
                    write.length_bytes,
                    wall,
                )
                for write in writes
                for key, block, place in zip(write.keys, write.blocks, write.places, strict=True)
            ]
        )

    def _removals(self, forgotten: Sequence[tuple[LayoutId, BlockKey, int]]) -> Records:
        nothing = bytes(32)
        return journal.make(
            [
                journal.Row(key, nothing, layout, journal.REMOVE, 0, place >> 32, place & 0xFFFFFFFF, 0, 0, 0.0)
                for layout, key, place in forgotten
            ]
        )

    def _may_grow(self) -> bool:
        return self._slots.units < self._segments_max and self._clock.now() >= self._grow_at

    def _grow(self) -> None:
        """Keep room ahead of the saves while the quota allows; a full disk is asked again later."""
        while self._may_grow():
            with self._lock:
                number = self._slots.units
                ahead = number * self._slots.unit_bytes - self._slots.used_bytes
            if ahead >= self._queue_bytes_max:
                return
            try:
                self._segments.open(number)
            except OSError:
                self._grow_at = self._clock.now() + GROW_RETRY_SECONDS
                return
            with self._lock:
                self._slots.add_unit(number)

    # -- opening -------------------------------------------------------------------------------------------------------

    def _recover(self, live: Records) -> list[Found]:
        """Open the segments that are there, claim the slots that the log names, and group the blocks by layout."""
        for number in self._segments.existing():
            if number < self._segments_max and number == self._slots.units:
                self._segments.open(number)
                self._slots.add_unit(number)
            else:
                self._segments.remove(number)
        live = self._credible(live)
        found = [self._shelve(LayoutId(layout), part) for layout, part in _by_layout(live)]
        taken = np.array([place for shelf in self._shelves.values() for place in shelf.entries.values()], np.int64)
        for segment in np.unique(taken >> 32).tolist():
            pages = live["slot_pages"][live["segment"] == segment][0]
            slots = taken[taken >> 32 == segment] & 0xFFFFFFFF
            self._slots.claim(segment, int(pages) * PAGE_BYTES, slots.tolist())
        return found

    def _credible(self, live: Records) -> Records:
        """Records of slots that exist, in segments whose slots all have the size that the last record says."""
        live = live[(live["segment"] < self._slots.units) & (live["slot_pages"] > 0)]
        size = np.zeros(self._slots.units, np.uint32)
        size[live["segment"]] = live["slot_pages"]
        inside = (live["slot"].astype(np.uint64) + 1) * live["slot_pages"] * PAGE_BYTES <= self._slots.unit_bytes
        whole = -(-live["length"].astype(np.int64) // PAGE_BYTES) + 1 == live["slot_pages"]
        credible: Records = live[inside & whole & (size[live["segment"]] == live["slot_pages"])]
        return credible

    def _shelve(self, layout: LayoutId, part: Records) -> Found:
        part = part[part["length"] == part["length"][-1]]
        places = (part["segment"].astype(np.int64) << 32 | part["slot"]).tolist()
        shelf = _Shelf(int(part["length"][-1]), dict(zip(_keys(part, "key"), places, strict=True)))
        self._shelves[layout] = shelf
        part = part[np.argsort(part["depth"], kind="stable")]
        return Found(layout, _keys(part, "key"), _keys(part, "parent"), part["depth"].tolist(), part["stored"].tolist())


def _keys(part: Records, field_name: str) -> list[BlockKey]:
    return [BlockKey(key) for key in journal.split(part, field_name)]


def _by_layout(live: Records) -> list[tuple[bytes, Records]]:
    """The records of each layout, in order."""
    layouts = dict.fromkeys(journal.split(live, "layout"))
    if len(layouts) <= 1:
        return [(layout, live) for layout in layouts]
    names = np.array(list(journal.split(live, "layout")), object)
    return [(layout, live[names == layout]) for layout in layouts]
