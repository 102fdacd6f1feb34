"""The doctor of a disk tier: reads every page of its log and every frame that the log names. Writes nothing."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import msgspec
import numpy as np

from thermocline.errors import TierError
from thermocline.tiers import directory, journal, scan, shelves
from thermocline.tiers.scan import Progress
from thermocline.tiers.segments import Segments
from thermocline.tiers.shelves import Recorded


class Repairs(msgspec.Struct, kw_only=True):
    """What a repair did. All zero where there was nothing to do, and then nothing was written.

    Dropped from the log were blocks that do not verify (`corrupt`) or lack an ancestor (`orphans`), and records that
    cannot be true (`void`: a place that is not there, or in use twice). `restored` blocks were found by their frames
    alone. `log_pages` with a wrong sum are gone, and so are `files` that a crash left over.
    """

    corrupt: int
    orphans: int
    void: int
    restored: int
    log_pages: int
    files: int


class CheckReport(msgspec.Struct, kw_only=True):
    """What a check found. `ok` says that every block that can be matched is right, and that nothing durable was lost.

    `blocks` and `bytes` (of payload) are what the log names, `corrupt` the blocks of these that would be refused.
    `torn_pages` of the log have a wrong sum; at its end they are what a crash leaves, and no damage. `orphans` lack an
    ancestor and can never be matched. `unknown_pages` were written by another release. After a repair the counts are
    those of the directory as it is now, and `repaired` says what was done.
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
    repaired: Repairs | None = None


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
    files = Segments(path, segment_bytes)
    there = files.existing()
    named = set(there) | set(np.unique(history.live["segment"]).tolist())
    parts = shelves.recorded(history.live, named, segment_bytes)
    corrupt = sum(not verifies for _, _, verifies in scan.verify(files, parts, progress))
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
    rooted = part.found().rooted()
    return len(rooted) - int(np.count_nonzero(rooted))
