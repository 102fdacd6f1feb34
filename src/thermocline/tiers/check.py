"""The doctor of a disk tier: reads every page of its log and every frame that the log names. Writes nothing."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from thermocline.blocks.frame import PAGE_BYTES, payload_sum, read_header
from thermocline.blocks.key import NO_PARENT, BlockKey
from thermocline.errors import TierError
from thermocline.tiers import directory, journal, shelves
from thermocline.tiers.segments import Segments, aligned_memory, open_direct
from thermocline.tiers.shelves import Recorded, Shelf, slot_at

Progress = Callable[[int, int], None]


class CheckReport(msgspec.Struct, kw_only=True):
    """What a check found. `ok` says that every block that can be matched is right, and that nothing durable was lost.

    `blocks` and `bytes` (of payload) are what the log names, `corrupt` the blocks of these that would be refused.
    `torn_pages` of the log have a wrong sum; at its end they are what a crash leaves, and no damage. `orphans` lack an
    ancestor and can never be matched. `unknown_pages` were written by another release.
    """

    path: str
    blocks: int
    bytes: int
    corrupt: int
    torn_pages: int
    orphans: int
    unknown_pages: int
    segments: int
    ok: bool


def check_path(path: Path, *, progress: Progress | None = None) -> CheckReport:
    """Verify a disk tier that no server has open; `progress(done, of)` is told of blocks.

    Raises DiskFormatError where the path holds no disk tier of this format, DiskInUseError where a server holds it, and
    TierError where it cannot be read.
    """
    try:
        segment_bytes = directory.read_segment_bytes(path)
        lock = _lock(path)
        try:
            return _check(path, segment_bytes, progress or (lambda _done, _of: None))
        finally:
            if lock is not None:
                os.close(lock)
    except OSError as error:
        raise TierError(f"cannot read {path}: {error}", hint="run it as the user that the server runs as") from error


def _lock(path: Path) -> int | None:
    """Keep servers out while reading; a copy of a directory may lack the lock file, and then nobody has it open."""
    try:
        fd = os.open(path / directory.LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    return directory.lock(path, fd, fcntl.LOCK_SH)


def _check(path: Path, segment_bytes: int, progress: Progress) -> CheckReport:
    history = journal.read(path / directory.LOG_FILE)
    there = Segments(path, segment_bytes).existing()
    named = set(there) | set(np.unique(history.live["segment"]).tolist())
    parts = shelves.recorded(history.live, named, segment_bytes)
    corrupt = _corrupt(path, parts, progress)
    return CheckReport(
        path=str(path),
        blocks=sum(len(part.records) for part in parts),
        bytes=sum(len(part.records) * part.shelf.length_bytes for part in parts),
        corrupt=corrupt,
        torn_pages=history.bad_pages,
        orphans=sum(map(_orphans, parts)),
        unknown_pages=history.unknown_version,
        segments=len(there),
        ok=not (corrupt or history.bad_inside or history.unknown_version),
    )


def _orphans(part: Recorded) -> int:
    """How many blocks of a layout lack an ancestor."""
    found = part.found()
    reachable: set[BlockKey] = {NO_PARENT}
    for key, parent in zip(found.keys, found.parents, strict=True):  # parents come first
        if parent in reachable:
            reachable.add(key)
    return len(found.keys) - (len(reachable) - 1)


def _corrupt(path: Path, parts: Sequence[Recorded], progress: Progress) -> int:
    """How many blocks do not verify."""
    total = sum(len(part.records) for part in parts)
    done = corrupt = 0
    progress(0, total)
    for part in parts:
        frame = aligned_memory(part.shelf.frame_bytes)
        for key, fd, offset in _in_order(path, part.shelf):
            _read(fd, frame, offset)
            corrupt += not _verifies(part, key, frame)
            done += 1
            progress(done, total)
    return corrupt


def _in_order(path: Path, shelf: Shelf) -> Iterator[tuple[BlockKey, int, int]]:
    """Every block with the open file and the offset of its frame, in the order in which they lie on disk."""
    entries = sorted(shelf.entries.items(), key=lambda entry: entry[1])
    for number, some in groupby(entries, key=lambda entry: slot_at(entry[1]).unit):
        fd = _open(path, number, shelf.frame_bytes)
        try:
            for key, place in some:
                yield key, fd, slot_at(place).number * shelf.frame_bytes
        finally:
            if fd >= 0:
                os.close(fd)


def _verifies(part: Recorded, key: BlockKey, frame: NDArray[np.uint8]) -> bool:
    """The frame is what the tier would ask for: header sum, key, layout, length, payload sum."""
    header, length = read_header(frame[:PAGE_BYTES]), part.shelf.length_bytes
    if header is None or (header.key, header.layout, header.length_bytes) != (key, part.layout, length):
        return False
    return payload_sum([frame[PAGE_BYTES : PAGE_BYTES + length]]) == header.payload_sum


def _open(path: Path, number: int, segment_bytes: int) -> int:
    """A segment's file, read past the page cache; -1 where there is none any more."""
    try:
        return open_direct(Segments(path, segment_bytes).file(number), os.O_RDONLY)
    except FileNotFoundError:
        return -1


def _read(fd: int, frame: NDArray[np.uint8], offset: int) -> None:
    """Fill a frame; what cannot be read is zeroes, which never verify."""
    frame[:] = 0
    try:
        got = os.preadv(fd, [frame.data], offset)
    except OSError as error:
        if error.errno not in {errno.EBADF, errno.EIO}:
            raise
        got = 0
    frame[got:] = 0
