"""The disk tier's index log: which key lies in which slot, in pages that each carry their own sum.

A page is written once and never rewritten, so a torn write can only lose the records that were being written. A page
whose sum is wrong is skipped and counted, and reading goes on behind it. When too much of the log is history, the live
records are written to a new file that takes the log's place in one rename: the log is its own snapshot.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
RECORDS_PER_PAGE = 31
VERSION = 1
Records = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Recovered:
    """What a log held: live records in the order they were written, and what could not be read.

    A key whose REMOVE lay in a damaged page may appear twice: the later record is the true one.
    """

    live: Records
    epoch: int
    pages: int
    bad_pages: int
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
    raw = path.read_bytes() if path.exists() else b""
    view = memoryview(raw)[: len(raw) - len(raw) % PAGE_BYTES]
    good = [
        start
        for start in range(0, len(view), PAGE_BYTES)
        if xxh3_128_digest(view[start + SUM_BYTES : start + PAGE_BYTES]) == view[start : start + SUM_BYTES]
    ]
    total = -(-len(raw) // PAGE_BYTES)
    pages = np.frombuffer(view, _PAGE)[np.array(good, np.int64) // PAGE_BYTES]
    ours = pages["head"]["magic"] == MAGIC
    known = ours & (pages["head"]["version"] == VERSION) & (pages["head"]["count"] <= RECORDS_PER_PAGE)
    unknown = int(np.count_nonzero(ours & (pages["head"]["version"] != VERSION)))
    pages = pages[known]
    inside = np.arange(RECORDS_PER_PAGE) < pages["head"]["count"][:, None]
    epoch = int(pages["head"]["epoch"].max(initial=0))
    return Recovered(_live(pages["records"][inside]), epoch, total, total - len(pages) - unknown, unknown)


def _live(records: Records) -> Records:
    """The last word about every slot, where that word is ADD, in the order they were written."""
    place = records["segment"].astype(np.uint64) << np.uint64(32) | records["slot"]
    _, from_end = np.unique(place[::-1], return_index=True)
    last: Records = records[np.sort(len(place) - 1 - from_end)]
    live: Records = last[last["kind"] == ADD]
    return live


class Journal:
    """The open log. Not thread-safe: only the disk tier's writer appends."""

    def __init__(self, path: Path, *, bytes_max: int) -> None:
        self._path = path
        self._bytes_max = bytes_max
        self.recovered = read(path)
        self.epoch = self.recovered.epoch + 1
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._end = -(-os.fstat(self._fd).st_size // PAGE_BYTES) * PAGE_BYTES

    @property
    def size_bytes(self) -> int:
        """Length of the log file."""
        return self._end

    def append(self, records: Records) -> None:
        """Write records behind the last page; from then on they survive the process. Raises OSError."""
        raw = pack(records, self.epoch)
        written = os.pwrite(self._fd, raw, self._end)
        if written != len(raw):  # a full disk may take a part: what it took is torn pages, which are skipped
            msg = f"index log: {written} of {len(raw)} bytes written"
            raise OSError(msg)
        self._end += len(raw)

    def sync(self) -> None:
        """Make everything appended durable. Raises OSError."""
        os.fdatasync(self._fd)

    def wants_compaction(self, live: int) -> bool:
        """True when the log is over half its bound, and most of it is history."""
        return self._end > self._bytes_max // 2 and self._end > 2 * PAGE_BYTES * (live // RECORDS_PER_PAGE + 1)

    def full(self, records: int) -> bool:
        """True if so many more records, and the new log of a compaction, might not fit into the bound."""
        return self._end + PAGE_BYTES * (records // RECORDS_PER_PAGE + 1) > self._bytes_max

    def compact(self) -> None:
        """Replace the log by one of its live records only. Durable on return. Raises OSError, leaving the old log."""
        fresh = self._path.with_suffix(".new")
        raw = pack(read(self._path).live, self.epoch)
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            _write_all(fd, raw)
            os.fdatasync(fd)
            fresh.rename(self._path)
            sync_directory(self._path.parent)
        except OSError:
            os.close(fd)
            fresh.unlink(missing_ok=True)
            raise
        os.close(self._fd)
        self._fd, self._end = fd, len(raw)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)


def split(records: Records, field: str) -> Iterator[bytes]:
    """One 32-byte field of every record, as bytes."""
    raw = np.ascontiguousarray(records[field]).tobytes()
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
        view = view[os.write(fd, view) :]
