"""Frames read straight from the files of a disk tier that nobody has open: those that its log names, and any others."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from thermocline.blocks.frame import MAGIC, PAGE_BYTES, Header, frame_bytes, payload_sum, read_header
from thermocline.blocks.key import BlockKey
from thermocline.tiers.segments import Segments, aligned_memory, open_direct
from thermocline.tiers.shelves import Recorded, Shelf, slot_at

Progress = Callable[[int, int], None]
STRETCH_BYTES = 4 * 1024 * 1024
_MAGIC = np.frombuffer(MAGIC, np.uint64)[0]
_UNREADABLE = {errno.EBADF, errno.EIO}


@dataclass(frozen=True, slots=True)
class Stray:
    """A frame that verifies, found by its header alone."""

    header: Header
    segment: int
    slot: int
    written_wall_seconds: float
    """The latest moment at which it can have been written."""

    @property
    def frame_bytes(self) -> int:
        """The size of its slot."""
        return frame_bytes(self.header.length_bytes)


def verify(files: Segments, parts: Sequence[Recorded], progress: Progress) -> Iterator[tuple[Recorded, BlockKey, bool]]:
    """Every block that a log names and whether its frame verifies; `progress(done, of)` is told of blocks."""
    total = sum(len(part.records) for part in parts)
    done = 0
    progress(0, total)
    for part in parts:
        frame = aligned_memory(part.shelf.frame_bytes)
        for key, fd, offset in _in_order(files, part.shelf):
            _read(fd, frame, offset)
            yield part, key, _is_block(part, key, frame)
            done += 1
            progress(done, total)


def strays(files: Segments, number: int, taken: Collection[int]) -> Iterator[Stray]:
    """Every frame of a segment that verifies and lies as a slot of its size would, except on the pages in `taken`.

    Damage is read past page by page. Frames of several sizes may be found where a segment changed its slots.
    """
    fd = _open(files, number)
    if fd < 0:
        return
    try:
        written = os.fstat(fd).st_mtime
        frame = aligned_memory(PAGE_BYTES)
        for offset, header in _headers(fd, files.segment_bytes):
            size = frame_bytes(header.length_bytes)
            if offset % size or offset + size > files.segment_bytes or offset // PAGE_BYTES in taken:
                continue
            if frame.nbytes != size:
                frame = aligned_memory(size)
            _read(fd, frame, offset)
            if read_header(frame[:PAGE_BYTES]) == header and _is_whole(header, frame):
                yield Stray(header, number, offset // size, written)
    finally:
        os.close(fd)


def _headers(fd: int, segment_bytes: int) -> Iterator[tuple[int, Header]]:
    stretch = aligned_memory(min(STRETCH_BYTES, segment_bytes))
    for start in range(0, segment_bytes, stretch.nbytes):
        _read_past_damage(fd, stretch, start)
        firsts = stretch.view(np.uint64)[:: PAGE_BYTES // 8]
        for at in (np.flatnonzero(firsts == _MAGIC) * PAGE_BYTES).tolist():
            header = read_header(stretch[at : at + PAGE_BYTES])
            if header is not None:
                yield start + at, header


def _read_past_damage(fd: int, stretch: NDArray[np.uint8], start: int) -> None:
    """Fill a stretch of a file; where the device cannot read all of it, page by page."""
    if _read(fd, stretch, start) < stretch.nbytes:
        for at in range(0, stretch.nbytes, PAGE_BYTES):
            _read(fd, stretch[at : at + PAGE_BYTES], start + at)


def _in_order(files: Segments, shelf: Shelf) -> Iterator[tuple[BlockKey, int, int]]:
    """Every block with the open file and the offset of its frame, in the order in which they lie on disk."""
    entries = sorted(shelf.entries.items(), key=lambda entry: entry[1])
    for number, some in groupby(entries, key=lambda entry: slot_at(entry[1]).unit):
        fd = _open(files, number)
        try:
            for key, place in some:
                yield key, fd, slot_at(place).number * shelf.frame_bytes
        finally:
            if fd >= 0:
                os.close(fd)


def _is_block(part: Recorded, key: BlockKey, frame: NDArray[np.uint8]) -> bool:
    """The frame is what the tier would ask for: header sum, key, layout, length, payload sum."""
    header = read_header(frame[:PAGE_BYTES])
    if header is None or (header.key, header.layout, header.length_bytes) != (
        key,
        part.layout,
        part.shelf.length_bytes,
    ):
        return False
    return _is_whole(header, frame)


def _is_whole(header: Header, frame: NDArray[np.uint8]) -> bool:
    return payload_sum([frame[PAGE_BYTES : PAGE_BYTES + header.length_bytes]]) == header.payload_sum


def _open(files: Segments, number: int) -> int:
    """A segment's file, read past the page cache; -1 where there is none any more."""
    try:
        return open_direct(files.file(number), os.O_RDONLY)
    except FileNotFoundError:
        return -1


def _read(fd: int, memory: NDArray[np.uint8], offset: int) -> int:
    """Fill memory and return how much was there; what cannot be read is zeroes, which never verify."""
    memory[:] = 0
    try:
        got = os.preadv(fd, [memory.data], offset)
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        got = 0
    memory[got:] = 0
    return got
