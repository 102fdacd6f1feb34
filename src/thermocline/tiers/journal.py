"""The disk tier's index log: which key lies in which slot, in pages that each carry their own sum.

A page is never rewritten once its write succeeded, and what a failed write left is cut off, so a torn write can only
lose the records that were being written. A page whose sum is wrong is skipped and counted, and reading goes on behind
it. When too much of the log is history, the live records are written to a new file that takes the log's place in one
rename: the log is its own snapshot. The same is done at opening where pages were damaged, so that damage does not pile
up.

Behind the last page lie zeroes, written ahead: a sync then finds an append's place and length on the medium, and writes
the appended pages alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from thermocline.blocks.frame import PAGE_BYTES, SUM_BYTES

ADD = 1
REMOVE = 2
MAGIC = 0x31474F4C4D524854  # "THRMLOG1", little-endian

RECORD = np.dtype(
    [
        ("key", "V32"),
        ("parent", "V32"),
        ("layout", "V32"),
        ("kind", "<u4"),
        ("depth", "<u4"),
        ("segment", "<u4"),
        ("slot", "<u4"),
        ("slot_pages", "<u4"),
        ("length", "<u4"),
        ("stored", "<f8"),
    ]
)
"""128 bytes. `stored` is seconds since 1970; a slot's offset in its segment is `slot * slot_pages * 4096`."""

_HEAD = np.dtype(
    [("sum", "V16"), ("magic", "<u8"), ("count", "<u4"), ("version", "<u4"), ("epoch", "<u8"), ("rest", "V88")]
)
_PAGE = np.dtype([("head", _HEAD), ("records", RECORD, (31,))])
_CELL = np.dtype((np.void, RECORD.itemsize))
"""A record without its fields: numpy copies such rows much faster. A page's head is as large."""
RECORDS_PER_PAGE = 31
_CELLS = np.concatenate([[RECORDS_PER_PAGE + 1], np.arange(1, RECORDS_PER_PAGE + 1)])
"""Numbers of a page's cells: records count from 1, and the head comes behind all of them."""
STRETCH_BYTES = 4 * 1024 * 1024
COMPACT_BYTES_MIN = 8 * 1024 * 1024
AHEAD_BYTES = 1024 * 1024
"""Zeroes behind the log, while the quota has room for them; renewed when three quarters are used up."""
VERSION = 1
Records = NDArray[Any]
Recall = Callable[[Records], Records]


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a log held: live records in the order they were written, and what could not be read.

    A key whose REMOVE lay in a damaged page may appear twice: the later record is the true one. `bad_pages` counts the
    pages whose sum is wrong, `bad_inside` those of them that have a good page behind them: a write that a crash cut
    short leaves none of these.
    """

    live: Records
    epoch: int
    pages: int
    bad_pages: int
    bad_inside: int
    unknown_version: int


def pack(records: Records, epoch: int) -> bytes:
    """Records as whole pages, each with its sum."""
    count = -(-len(records) // RECORDS_PER_PAGE)
    pages = np.zeros(count, _PAGE)
    head = pages["head"]
    head["magic"], head["version"], head["epoch"] = MAGIC, VERSION, epoch
    head["count"] = RECORDS_PER_PAGE
    head["count"][-1:] = len(records) - (count - 1) * RECORDS_PER_PAGE
    flat = np.zeros(count * RECORDS_PER_PAGE, RECORD)
    flat[: len(records)] = records
    pages["records"] = flat.reshape(count, RECORDS_PER_PAGE)
    raw = bytearray(pages.tobytes())
    for start in range(0, len(raw), PAGE_BYTES):
        raw[start : start + SUM_BYTES] = xxh3_128_digest(memoryview(raw)[start + SUM_BYTES : start + PAGE_BYTES])
    return bytes(raw)


def read(path: Path) -> Recovered:
    """All of the log that is intact. An absent log is an empty one; a damaged page costs only its own records."""
    records, heads, good = _intact(path)
    known = int(np.count_nonzero(_known(heads) & good))
    unknown = int(np.count_nonzero((heads["magic"] == MAGIC) & (heads["version"] != VERSION) & good))
    epoch = int(heads["epoch"][_known(heads) & good].max(initial=0))
    behind_last_good = int(np.flatnonzero(good)[-1]) + 1 if good.any() else 0
    bad, bad_inside = len(heads) - known - unknown, behind_last_good - known - unknown
    return Recovered(_live(records), epoch, len(heads), bad, bad_inside, unknown)


def removals(path: Path) -> Records:
    """Every REMOVE that can still be read, whatever became of its place later."""
    records, _, _ = _intact(path)
    return rows(records, np.flatnonzero(records["kind"] == REMOVE))


def _intact(path: Path) -> tuple[Records, Records, NDArray[np.bool_]]:
    """All records that can be read, in the order written; every page's head, and whether the page's sum is right.

    Zeroes at the end were never written to, and are no pages.
    The log is read through one small buffer: memory that a process has not used yet is slower than the page cache.
    """
    nbytes = path.stat().st_size if path.exists() else 0
    count = -(-nbytes // PAGE_BYTES)
    records = np.empty(count * RECORDS_PER_PAGE, _CELL)
    heads, good = np.zeros(count, _HEAD), np.zeros(count, bool)
    buffer = np.empty(min(STRETCH_BYTES, nbytes), np.uint8)
    first = taken = behind = 0
    with path.open("rb") if count else BytesIO() as file:
        while got := file.readinto(buffer.data) // PAGE_BYTES:
            stretch, part = buffer[: got * PAGE_BYTES], slice(first, first + got)
            heads[part], good[part] = stretch.view(_PAGE)["head"], _sums_hold(stretch)
            behind = _end_of_words(stretch, first, good[part]) or behind
            counts = np.where(_known(heads[part]) & good[part], heads[part]["count"], 0)
            some = stretch.view(_CELL).reshape(got, -1)[counts[:, None] >= _CELLS]
            records[taken : taken + len(some)] = some
            first, taken = first + got, taken + len(some)
    behind = count if nbytes % PAGE_BYTES else behind
    return records[:taken].view(RECORD), heads[:behind], good[:behind]


def _end_of_words(stretch: NDArray[np.uint8], first: int, good: NDArray[np.bool_]) -> int:
    """Behind the last page that is not all zeroes, counted from the start of the log; 0 where there is none."""
    words = good.copy()
    words[~good] = stretch.reshape(-1, PAGE_BYTES)[~good].any(axis=1)
    return first + int(np.flatnonzero(words)[-1]) + 1 if words.any() else 0


def _sums_hold(stretch: NDArray[np.uint8]) -> list[bool]:
    view = memoryview(stretch.data)
    starts = range(0, len(view), PAGE_BYTES)
    return [xxh3_128_digest(view[at + SUM_BYTES : at + PAGE_BYTES]) == view[at : at + SUM_BYTES] for at in starts]


def _known(heads: Records) -> NDArray[np.bool_]:
    known: NDArray[np.bool_] = (
        (heads["magic"] == MAGIC) & (heads["version"] == VERSION) & (heads["count"] <= RECORDS_PER_PAGE)
    )
    return known


def rows(array: Records, numbers: NDArray[np.int64]) -> Records:
    """Some rows in ascending order; without a copy if they are all, as in a log without damage."""
    if len(numbers) == len(array):
        return array
    plain = array.view(_CELL)
    some: Records = plain[numbers].view(array.dtype)
    return some


def _live(records: Records) -> Records:
    """The last word about every slot, where that word is ADD, in the order they were written."""
    place = records["segment"].astype(np.uint64) << np.uint64(32) | records["slot"]
    _, from_end = np.unique(place[::-1], return_index=True)
    last = np.sort(len(place) - 1 - from_end)
    return rows(records, last[records["kind"][last] == ADD])


class Journal:
    """The open log. Not thread-safe: only the disk tier's writer appends.

    It never grows beyond `bytes_max`, and its successor, while one is written, not beyond that either. As long as no
    more than `records_max` places are in use, a record always finds room, if need be after a compaction.
    """

    def __init__(self, path: Path, *, bytes_max: int, epoch: int, recall: Recall | None = None) -> None:
        """Open or create. Raises OSError.

        `recall` gives the records that are missing in these, for a compaction that finds pages damaged.
        """
        self._path = path
        self._recall = recall
        self._fresh = path.with_suffix(".new")
        self._fresh.unlink(missing_ok=True)  # a compaction that a crash cut short
        self._pages_max = bytes_max // PAGE_BYTES
        self.epoch = epoch
        created = not path.exists()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size
        self._end = self._behind_last_word()
        self._fresh_bytes = 0
        self._tail = False  # True while bytes behind the end may lie in the file
        self._name_unsynced = created
        self._compact_at = 0

    @property
    def size_bytes(self) -> int:
        """Length of the log, and of its successor while that is being written."""
        return max(self._size, self._end) + self._fresh_bytes

    @property
    def records_max(self) -> int:
        """How many places may be in use, so that a compacted log leaves room for what follows."""
        return self._pages_max * 3 // 4 * RECORDS_PER_PAGE

    def append(self, records: Records, live: int) -> None:
        """Write records behind the last page; from then on they survive the process. `live` places are in use.

        Compacts where the log is mostly history. Raises OSError; then a part of the records may be in the log.
        """
        step = max(1, self._pages_max // 8) * RECORDS_PER_PAGE
        for start in range(0, len(records), step):
            part = records[start : start + step]
            if self._wants_compaction(live):
                with contextlib.suppress(OSError):  # not needed yet: tried again when the log has grown
                    self.compact()
                self._compact_at = self._end + COMPACT_BYTES_MIN
            if not self._fits(part):
                self.compact()
            if not self._fits(part):
                raise OSError(errno.ENOSPC, "the index log is full")
            self._write(part)

    def sync(self) -> None:
        """Make everything appended durable. Raises OSError."""
        os.fdatasync(self._fd)
        if self._name_unsynced:
            sync_directory(self._path.parent)
            self._name_unsynced = False

    def write_ahead(self) -> None:
        """Put zeroes where the next pages will lie; without room for them, appends only take longer."""
        start, stop = max(self._size, self._end), min(self._end + AHEAD_BYTES, self._pages_max * PAGE_BYTES)
        if start < stop and 4 * (start - self._end) < AHEAD_BYTES and not self._tail:
            with contextlib.suppress(OSError):
                self._size = start + os.pwrite(self._fd, bytes(stop - start), start)

    def compact(self) -> None:
        """Rewrite the log with its live records only. Raises OSError; the log is whole even then.

        Records of a page that rotted while the tier was open are taken from what the tier holds.
        """
        self._cut_tail()
        found = read(self._path)
        lost = self._recall(found.live) if found.bad_pages and self._recall else found.live[:0]
        self.rewrite(np.concatenate([found.live, lost]))

    def rewrite(self, live: Records) -> None:
        """Replace the log by one of these records, durable on return. Raises OSError; the log is whole even then."""
        raw = pack(live, self.epoch)
        if len(raw) > self._pages_max * PAGE_BYTES:
            raise OSError(errno.ENOSPC, "the index log is full")
        fd = os.open(self._fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._fresh_bytes = len(raw)
        try:
            _write_all(fd, raw)
            os.fdatasync(fd)
            self._fresh.rename(self._path)
        except OSError:
            os.close(fd)
            self._fresh.unlink(missing_ok=True)
            raise
        finally:
            self._fresh_bytes = 0
        os.close(self._fd)
        self._fd, self._size = fd, len(raw)
        self._end = self._size
        self._name_unsynced = True  # until the directory is durable, a power loss may bring the old log back
        self.sync()

    def close(self) -> None:
        """Let go of the file, and of the zeroes at its end. A second call does nothing."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                if self._size > self._end:
                    os.ftruncate(self._fd, self._end)
            os.close(self._fd)
            self._fd = -1

    def _wants_compaction(self, live: int) -> bool:
        """True when the log is large, and most of it history."""
        live_bytes = PAGE_BYTES * (live // RECORDS_PER_PAGE + 1)
        return self._end > max(COMPACT_BYTES_MIN, 4 * live_bytes, self._compact_at)

    def _fits(self, records: Records) -> bool:
        return self._end // PAGE_BYTES + -(-len(records) // RECORDS_PER_PAGE) <= self._pages_max

    def _write(self, records: Records) -> None:
        self._cut_tail()
        raw = pack(records, self.epoch)
        self._tail = True
        written = os.pwrite(self._fd, raw, self._end)
        if written != len(raw):
            self._cut_tail()
            raise OSError(errno.ENOSPC, f"index log: {written} of {len(raw)} bytes written")
        self._end += len(raw)
        self._tail = False

    def _cut_tail(self) -> None:
        """Cut off what a failed write left: whole pages of it would be read as words that nobody said."""
        if self._tail:
            os.ftruncate(self._fd, self._end)
            self._size, self._tail = self._end, False

    def _behind_last_word(self) -> int:
        end = -(-self._size // PAGE_BYTES) * PAGE_BYTES
        while end and not os.pread(self._fd, PAGE_BYTES, end - PAGE_BYTES).strip(b"\0"):
            end -= PAGE_BYTES
        return end


def split(column: Records) -> Iterator[bytes]:
    """A column of 32-byte values, as bytes."""
    raw = np.ascontiguousarray(column).tobytes()
    return (raw[at : at + 32] for at in range(0, len(raw), 32))


class Row(NamedTuple):
    """One record, in the order of `RECORD`'s fields."""

    key: bytes
    parent: bytes
    layout: bytes
    kind: int
    depth: int
    segment: int
    slot: int
    slot_pages: int
    length: int
    stored: float


def make(rows: Sequence[Row]) -> Records:
    """Rows as records."""
    return np.array(rows, RECORD)


def sync_directory(path: Path) -> None:
    """Make a rename or a new name in this directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, raw: bytes) -> None:
    view = memoryview(raw)
    while view:
        written = os.write(fd, view)
        if not written:
            raise OSError(errno.ENOSPC, "nothing of the index log was taken")
        view = view[written:]
