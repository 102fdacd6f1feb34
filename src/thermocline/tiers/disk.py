"""The disk tier: frames in the slots of preallocated segments, an index log, direct I/O, a hard quota.

One writer thread groups what is saved: frames first, then their records in the log (visible, and safe from the death
of the process), then one sync for all (durable). Whatever a crash leaves behind, a load compares the frame with what it
asked for, so the worst outcome is a miss.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from thermocline.blocks.frame import PAGE_BYTES, copy_out, frame_bytes, read_header
from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.blocks.slots import SlotMap
from thermocline.clock import Clock, SystemClock
from thermocline.errors import DiskFormatError, TierError
from thermocline.tiers import directory, journal, shelves
from thermocline.tiers.crew import Crew
from thermocline.tiers.doubts import UNREADABLE, Doubts
from thermocline.tiers.journal import Journal, Records
from thermocline.tiers.recall import recall
from thermocline.tiers.segments import READ_BYTES_MAX, Read, Readers, Segments
from thermocline.tiers.shelves import Recorded, Shelf, place_of, slot_at
from thermocline.tiers.tier import Bitmap, Block, Found, Job, Medium, Outcome, Piece, Usage, block_length
from thermocline.tiers.writer import FrameWriter, Write, removals

LOG = logging.getLogger("thermocline.tiers")
MIB = 1024 * 1024
GROUP_BYTES_MAX = 32 * MIB
GROW_RETRY_SECONDS = 30.0
CLOSE_SECONDS_MAX = 10.0
READERS_CLOSE_SECONDS_MAX = 1.0
READER_THREADS = 2
WRITER_THREADS = 4


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
        """Open or create. Raises DiskInUseError, DiskFormatError, or TierError where the path cannot be used."""
        self.name = name
        self._clock = clock or SystemClock()
        self.capacity_bytes = capacity_bytes
        self._queue_bytes_max = queue_bytes_max
        self._lock = threading.Condition()
        self._shelves: dict[LayoutId, Shelf] = {}
        self._writes: deque[Write] = deque()
        self._forgotten: list[tuple[LayoutId, BlockKey, int]] = []
        self._queued_bytes = 0  # from save to durable
        self._unpublished = 0  # blocks from save to visible
        self._unpublished_bytes = 0
        self._quarantined_bytes = 0
        self._doubts = Doubts()
        self._replaced: list[tuple[LayoutId, BlockKey, int]] = []  # older places, given back after the next sync
        self._unsynced: list[Write] = []  # this and the next: the writer's own
        self._unlogged: list[tuple[LayoutId, BlockKey, int]] = []
        self._starved = self._told_of_size = False
        self._grow_at = float("-inf")
        self._closing = self._stopped = self._busy = self._let_go_once = False
        self._files = ExitStack()
        self._files.callback(os.close, directory.claim(path))
        try:
            self._found = self._open(path)
        except BaseException as error:
            self._files.close()
            if not isinstance(error, OSError):
                raise
            hint = "see whether this user may read and write all of it, and whether the medium is well"
            raise TierError(f"cannot open the disk tier in {path}: {error}", hint=hint) from error
        self._readers = Readers(READER_THREADS)
        self._crew = Crew(WRITER_THREADS - 1, name="disk-crew")
        self._writer = FrameWriter(self._segments, self._journal.epoch, self._crew)
        self._look_ahead()
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
        """See `Tier.load`. Adjacent frames are one read; a frame is checked while the next read runs.

        Where such a read fails, each of its frames is read alone: a bad sector costs one block.
        """
        outcomes = [Outcome.MISS] * len(keys)
        shelf = self._shelves.get(layout)
        if shelf is None:
            return outcomes
        size = shelf.frame_bytes
        waiting = deque((run, self._read(run[1], size)) for run in shelf.runs(keys, max(1, READ_BYTES_MAX // size)))
        reads = [read for _, read in waiting]
        try:
            while waiting:
                (first, places), read = waiting.popleft()
                if not read.wait(deadline - self._clock.now()):
                    outcomes[first:] = [Outcome.LATE] * (len(keys) - first)
                    break
                if len(places) > 1 and read.error is not None and read.error.errno in UNREADABLE:
                    read.release()
                    self._doubts.could_not_read(places)
                    each = [((first + at, [place]), self._read([place], size)) for at, place in enumerate(places)]
                    reads += [alone for _, alone in each]
                    waiting.extendleft(reversed(each))
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
        job = Job([Outcome.PENDING] * len(keys))
        with self._lock:
            places, refusal = self._take(layout, length, len(blocks))
            taken = len(places)
            job.outcomes[taken:] = [refusal] * (len(blocks) - taken)
            if places:
                self._shelves.setdefault(layout, Shelf(length))
                write = Write(layout, keys[:taken], blocks[:taken], places, length, job)
                self._writes.append(write)
                self._queued_bytes += write.nbytes
                self._unpublished += taken
                self._unpublished_bytes += write.nbytes
            self._lock.notify_all()
        if not places:
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
            blocks = self._held()
            used = self._slots.units * self._slots.unit_bytes + self._journal.size_bytes + directory.SMALL_FILES_BYTES
        return Usage(blocks, used, self.capacity_bytes)

    def found(self) -> Sequence[Found]:
        """See `Tier.found`. Handed out once: a second call finds nothing."""
        found, self._found = self._found, []
        return found

    def free_slots(self, block_bytes: int) -> int:
        """How many blocks of this size fit now."""
        with self._lock:
            return self._slots.free_slots(frame_bytes(block_bytes))

    def shortfall(self, block_bytes: int, count: int) -> int:
        """See `BoundedTier.shortfall`. What more the queue would refuse is no reason to evict."""
        size = frame_bytes(block_bytes)
        with self._lock:
            if self._may_grow() or size > self._slots.unit_bytes:
                return 0
            queue_room, log_room = self._queue_room(size), self._log_room()
            return max(0, min(count, queue_room) - min(self._slots.free_slots(size), log_room))

    def wait_idle(self, seconds: float | None = None) -> bool:
        """Wait until nothing is queued or being written; False if `seconds` passed first."""
        with self._lock:
            return self._lock.wait_for(lambda: not (self._queued_bytes or self._forgotten or self._busy), seconds)

    def check_integrity(self) -> None:
        """Every taken slot belongs to one block, to one write in flight, or is set aside. Raises AssertionError."""
        with self._lock:
            self._slots.check_integrity()
            held = [place for shelf in self._shelves.values() for place in shelf.entries.values()]
            assert len(set(held)) == len(held), "two blocks in one slot"
            assert all(self._slots.is_current(slot_at(place)) for place in held), (
                "a block in a slot that was given back"
            )
            known = sum(len(shelf.entries) * shelf.frame_bytes for shelf in self._shelves.values())
            known += self._unpublished_bytes + self._quarantined_bytes
            known += sum(self._shelves[layout].frame_bytes for layout, _, _ in self._replaced)
            assert known == self._slots.used_bytes, f"{self._slots.used_bytes} bytes in use, {known} accounted for"

    def close(self) -> None:
        """See `Tier.close`. Waits for what is queued; a device that hangs is given up on after a few seconds.

        Then what still waits is FAILED, and the path stays locked until the device answers: it may yet write.
        """
        with self._lock:
            if self._closing:
                return
            self._closing = True
            self._lock.notify_all()
        self._thread.join(CLOSE_SECONDS_MAX)
        if self._thread.is_alive():
            LOG.warning("disk tier: the device did not finish writing within %s seconds", CLOSE_SECONDS_MAX)
            with self._lock:
                waiting, self._writes = list(self._writes), deque()
            for write in waiting:
                self._fail(write)
        self._readers.close(READERS_CLOSE_SECONDS_MAX)
        self._let_go()

    def _let_go(self) -> None:
        """Close all files: called by the writer at its end and by `close`, and done by the later of the two."""
        with self._lock:
            self._let_go_once, last = True, self._let_go_once
        if last:
            self._crew.close()
            self._files.close()

    # -- loading -------------------------------------------------------------------------------------------------------

    def _read(self, places: Sequence[int], size: int) -> Read:
        slot = slot_at(places[0])
        return self._readers.submit(self._segments.fd(slot.unit), slot.number * size, size * len(places))

    def _accept(
        self, layout: LayoutId, shelf: Shelf, key: BlockKey, place: int, read: Read, at: int, pieces: Sequence[Piece]
    ) -> Outcome:
        """Check one frame against what was asked for, in this order: header sum, key, layout, length, payload sum."""
        if read.error is not None:
            return self._unread(layout, shelf, key, place, read.error)
        self._doubts.could_read(place)
        header = read_header(read.bytes[at : at + PAGE_BYTES])
        if header and (header.key, header.layout, header.length_bytes) == (key, layout, shelf.length_bytes):
            payload = read.bytes[at + PAGE_BYTES : at + PAGE_BYTES + shelf.length_bytes]
            if copy_out(payload, pieces) == header.payload_sum:
                return Outcome.HIT
        return self._refuse(layout, shelf, key, place)

    def _refuse(self, layout: LayoutId, shelf: Shelf, key: BlockKey, place: int) -> Outcome:
        """Damage, unless the block moved away while it was read. A damaged place is not used again before a restart."""
        with self._lock:
            if shelf.entries.get(key) != place:
                return Outcome.MISS
            del shelf.entries[key]
            self._quarantined_bytes += shelf.frame_bytes
            self._forgotten.append((layout, key, place))
            self._lock.notify_all()
        return Outcome.CORRUPT

    def _unread(self, layout: LayoutId, shelf: Shelf, key: BlockKey, place: int, error: OSError) -> Outcome:
        """FAILED, and the block stays held, unless it is the place that cannot be read and not the device."""
        if error.errno in UNREADABLE and self._doubts.is_damaged(place):
            return self._refuse(layout, shelf, key, place)
        return Outcome.FAILED

    # -- saving --------------------------------------------------------------------------------------------------------

    def _take(self, layout: LayoutId, length_bytes: int, count: int) -> tuple[list[int], Outcome]:
        """Places for up to `count` blocks, and the reason why there are no more of them."""
        size = frame_bytes(length_bytes)
        shelf = self._shelves.get(layout)
        if self._closing or (shelf and shelf.length_bytes != length_bytes):
            return [], Outcome.FAILED
        if size > self._slots.unit_bytes:
            if not self._told_of_size:
                self._told_of_size = True
                LOG.warning("disk tier: a frame of %d bytes exceeds a segment of %d", size, self._slots.unit_bytes)
            return [], Outcome.MISS
        queue_room, log_room = self._queue_room(size), self._log_room()
        wanted = min(count, queue_room, log_room)
        places = [place_of(slot) for slot in self._slots.take(size, wanted)]
        if len(places) < wanted:
            self._starved = True
            return places, Outcome.LATE if self._may_grow() else Outcome.FULL
        return places, Outcome.FULL if log_room <= queue_room else Outcome.LATE

    def _queue_room(self, size: int) -> int:
        return max((self._queue_bytes_max - self._queued_bytes) // size, not self._queued_bytes)

    def _log_room(self) -> int:
        return self._journal.records_max - self._held() - self._unpublished - len(self._replaced)

    def _write_loop(self) -> None:
        try:
            while not self._stopped:
                batch = self._next_round()
                try:
                    self._write_round(batch)
                except Exception:  # a defect must not end this thread: jobs would never be done, and `close` would wait
                    LOG.exception("disk tier: a round of writing failed")
                    self._take_back([*self._unsynced, *batch])
                    self._unsynced = []
                with self._lock:
                    self._busy = False
                    self._lock.notify_all()
        finally:
            self._let_go()

    def _next_round(self) -> list[Write]:
        """Wait for something to do; the writes of the next round."""
        with self._lock:
            if not self._unsynced:
                self._lock.wait_for(self._has_work)
            batch = self._next_group()
            self._stopped = self._closing and not (batch or self._forgotten or self._replaced)
            self._unlogged += self._forgotten
            self._forgotten = []
            self._busy = True
        return batch

    def _write_round(self, batch: Sequence[Write]) -> None:
        """Log what was forgotten, write, log what was written; sync when nothing more waits or the group is full."""
        if self._starved and not self._closing:
            self._grow()
        if self._log(removals(self._unlogged)):
            self._unlogged = []
            self._unsynced += self._write(batch)
        else:  # nothing may be written over what the log still names
            for write in batch:
                self._fail(write)
        if self._stopped or not self._writes or sum(write.nbytes for write in self._unsynced) >= GROUP_BYTES_MAX:
            self._settle(self._unsynced)
            self._unsynced = []
            if not self._closing:
                self._look_ahead()  # after the sync: nobody waits for it now

    def _take_back(self, writes: Sequence[Write]) -> None:
        """Undo writes in whatever state a defect left them."""
        for write in writes:
            if not write.job.done:
                if self.remove(write.layout, write.keys):
                    self._queued_bytes -= write.nbytes
                    write.job.outcomes[: len(write.places)] = [Outcome.FAILED] * len(write.places)
                    write.job.set_done()
                else:
                    self._fail(write)

    def _has_work(self) -> bool:
        return bool(self._writes or self._forgotten or self._closing or (self._starved and self._may_grow()))

    def _next_group(self) -> list[Write]:
        group: list[Write] = []
        size = 0
        while self._writes and size < GROUP_BYTES_MAX:
            group.append(self._writes.popleft())
            size += group[-1].nbytes
        return group

    def _write(self, batch: Sequence[Write]) -> list[Write]:
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

    def _write_frames(self, write: Write) -> bool:
        try:
            self._writer.write(write.layout, write.keys, write.blocks, write.places)
            if any(self.holds(write.layout, write.keys)):  # the log names the older frame until this one is durable
                self._crew.run([partial(self._segments.sync, number) for number in _segments_of([write])])
        except OSError as error:
            LOG.warning("disk tier: a write failed: %s", error)
        except Exception:  # pieces that are no plain memory: the caller's mistake must not end this thread
            LOG.exception("disk tier: blocks that cannot be written")
        else:
            return True
        self._fail(write)
        return False

    def _publish(self, write: Write) -> None:
        entries = self._shelves[write.layout].entries
        for key, place in zip(write.keys, write.places, strict=True):
            old = entries.get(key)
            entries[key] = place
            if old is not None:
                self._replaced.append((write.layout, key, old))
        self._unpublished -= len(write.places)
        self._unpublished_bytes -= write.nbytes

    def _settle(self, unsynced: Sequence[Write]) -> None:
        """One sync for a group of writes: durable, or taken back."""
        try:
            tasks = [self._journal.sync] if unsynced else []
            tasks += [self._segments.sync_names] if unsynced and self._segments.names_unsynced else []
            self._crew.run([*tasks, *(partial(self._segments.sync, number) for number in _segments_of(unsynced))])
        except OSError as error:
            LOG.warning("disk tier: a sync failed: %s", error)
            for write in unsynced:
                self.remove(write.layout, write.keys)
                write.job.outcomes[: len(write.places)] = [Outcome.FAILED] * len(write.places)
        with self._lock:
            self._queued_bytes -= sum(write.nbytes for write in unsynced)
            replaced, self._replaced = self._replaced, []
            for layout, key, place in replaced:
                self._forget(layout, key, place)
        for write in unsynced:
            write.job.set_done()

    def _fail(self, write: Write) -> None:
        """Give up a write that is not visible yet."""
        with self._lock:
            for place in write.places:
                self._slots.give(slot_at(place))
            self._queued_bytes -= write.nbytes
            self._unpublished -= len(write.places)
            self._unpublished_bytes -= write.nbytes
        write.job.outcomes[: len(write.places)] = [Outcome.FAILED] * len(write.places)
        write.job.set_done()

    # -- the log and the room ------------------------------------------------------------------------------------------

    def _held(self) -> int:
        return sum(len(shelf.entries) for shelf in self._shelves.values())

    def _forget(self, layout: LayoutId, key: BlockKey, place: int) -> None:
        self._slots.give(slot_at(place))
        if not self._stopped:
            self._forgotten.append((layout, key, place))

    def _log(self, records: Records) -> bool:
        """Append to the log; False if it could not be written."""
        if not len(records):
            return True
        with self._lock:
            live = self._held()
        try:
            self._journal.append(records, live)
        except OSError as error:
            LOG.warning("disk tier: the index log could not be written: %s", error)
            return False
        return True

    def _additions(self, writes: Sequence[Write]) -> Records:
        parts = []
        for write in writes:
            part = shelves.records(journal.ADD, write.layout, write.keys, write.places, write.length_bytes)
            part["parent"] = np.frombuffer(b"".join(block.parent for block in write.blocks), part["parent"].dtype)
            part["depth"] = [block.depth for block in write.blocks]
            part["stored"] = self._clock.wall()
            parts.append(part)
        return np.concatenate(parts)

    def _recall(self, live: Records) -> Records:
        """What of the blocks held is not among a log's records."""
        with self._lock:
            held = [
                shelves.records(journal.ADD, layout, list(entries), list(entries.values()), shelf.length_bytes)
                for layout, shelf in self._shelves.items()
                for entries in [shelf.entries]
            ]
        return recall(live, np.concatenate([live[:0], *held]), self._segments, self._clock.wall())

    def _may_grow(self) -> bool:
        return self._slots.units < self._segments_max and self._clock.now() >= self._grow_at

    def _look_ahead(self) -> None:
        """Make room for the saves to come, and for their records."""
        self._grow()
        self._journal.write_ahead()

    def _grow(self) -> None:
        """Keep room ahead of the saves while the quota allows; a full disk is asked again later."""
        while self._may_grow():
            with self._lock:
                ahead = self._slots.units * self._slots.unit_bytes - self._slots.used_bytes
                if ahead >= self._queue_bytes_max and not self._starved:
                    return
            number = self._segments.next_number()
            try:
                self._segments.open(number)
            except OSError as error:
                LOG.warning("disk tier: no room for another segment: %s", error)
                self._grow_at = self._clock.now() + GROW_RETRY_SECONDS
                return
            with self._lock:
                self._slots.add_unit(number)
                self._starved = False

    # -- opening -------------------------------------------------------------------------------------------------------

    def _open(self, path: Path) -> list[Found]:
        """Open files, claim the slots that the log names, and group the blocks by layout. Raises OSError, TierError."""
        log_bytes = directory.log_bytes(self.capacity_bytes)
        room_bytes = self.capacity_bytes - 2 * log_bytes - directory.SMALL_FILES_BYTES  # a log has a successor at times
        self._segments = Segments(path, directory.segment_bytes(path, room_bytes))
        self._files.callback(self._segments.close)
        self._segments_max = room_bytes // self._segments.segment_bytes
        self._slots = SlotMap(self._segments.segment_bytes)
        log = path / directory.LOG_FILE
        history = journal.read(log)
        if history.unknown_version:
            hint = "move the directory away, or run the release that wrote it"
            raise DiskFormatError(f"{log} has pages of a version that is not known here", hint=hint)
        self._journal = Journal(log, bytes_max=log_bytes, epoch=history.epoch + 1, recall=self._recall)
        self._files.callback(self._journal.close)
        cut = self._open_segments()
        parts = shelves.recorded(history.live, self._segments.numbers, self._segments.segment_bytes, cut)
        parts = shelves.shallowest(parts, self._journal.records_max)
        self._claim(parts, cut)
        held = sum(len(part.records) for part in parts)
        if history.bad_pages or held < len(history.live) or self._journal.size_bytes > log_bytes:
            lost = len(history.live) - held
            LOG.warning("disk tier: %d damaged pages and %d void records in the log", history.bad_pages, lost)
            self._mend(parts)
        return [part.found() for part in parts]

    def _open_segments(self) -> dict[int, int]:
        """Open what is there, completing a segment that was cut, and delete what is over the quota.

        Returns the lengths of cut segments for whose rest there is no room.
        """
        cut: dict[int, int] = {}
        for number in self._segments.existing():
            if number >= self._segments_max:
                self._segments.remove(number)
                continue
            try:
                self._segments.open(number)
            except OSError as error:
                if error.errno not in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
                    raise
                cut[number] = self._segments.open_cut(number)
                LOG.warning("disk tier: segment %d was cut, and there is no room to complete it", number)
            else:
                self._slots.add_unit(number)
        return cut

    def _claim(self, parts: Sequence[Recorded], cut: dict[int, int]) -> None:
        """Take the shelves of recorded blocks, and their slots; of a cut segment also those that are not there."""
        self._shelves = {part.layout: part.shelf for part in parts}
        for segment, slot_bytes, taken in shelves.by_segment(parts):
            slots = taken
            if segment in cut:
                missing = np.arange(cut.pop(segment) // slot_bytes, self._slots.unit_bytes // slot_bytes)
                self._quarantined_bytes += len(missing) * slot_bytes
                self._slots.add_unit(segment)
                slots = np.concatenate([taken, missing])
            self._slots.claim(segment, slot_bytes, slots)
        for segment in cut:  # nothing in it is held: it is completed when there is room
            self._segments.let_go(segment)

    def _mend(self, parts: Sequence[Recorded]) -> None:
        """Write the log anew, without its damaged pages and what cannot be there any more."""
        try:
            self._journal.rewrite(np.concatenate([np.empty(0, journal.RECORD), *(part.records for part in parts)]))
        except OSError as error:  # what is there serves as well
            LOG.warning("disk tier: the index log could not be written anew: %s", error)


def _segments_of(writes: Sequence[Write]) -> set[int]:
    return {slot_at(place).unit for write in writes for place in write.places}
