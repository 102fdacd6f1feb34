"""The disk tier's log written anew with only what verifies, and with blocks that only their own frames still name."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from thermocline.blocks.frame import PAGE_BYTES
from thermocline.blocks.key import NO_PARENT
from thermocline.errors import DiskFormatError, TierError
from thermocline.tiers import directory, journal, scan, shelves
from thermocline.tiers.check import CheckReport, Repairs
from thermocline.tiers.journal import Journal, Records, rows
from thermocline.tiers.scan import Progress, Stray
from thermocline.tiers.segments import Segments
from thermocline.tiers.shelves import Recorded

Name = tuple[bytes, bytes]
"""A layout and a key."""


def repair_path(path: Path, *, progress: Progress | None = None) -> CheckReport:
    """Make a disk tier that no server has open right again; `progress(done, of)` is told of blocks.

    Segments are only read. The log is replaced by one rename, so whatever ends this call leaves the old one or the new
    one. A second call changes nothing. Raises DiskFormatError where the path holds no disk tier of this format,
    DiskInUseError where a server holds it, and TierError where it cannot be read or written.
    """
    try:
        segment_bytes = directory.read_segment_bytes(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        held = directory.lock(path, os.open(path / directory.LOCK_FILE, flags, 0o600))
        try:
            return _repair(path, Segments(path, segment_bytes), progress or (lambda _done, _of: None))
        finally:
            os.close(held)
    except OSError as error:
        hint = "run it as the user that the server runs as, with room for a second index.log"
        raise TierError(f"cannot repair {path}: {error}", hint=hint) from error


def _repair(path: Path, files: Segments, progress: Progress) -> CheckReport:
    log = path / directory.LOG_FILE
    history = journal.read(log)
    if history.unknown_version:
        hint = "run the release that wrote it"
        raise DiskFormatError(f"{log} has pages of a version that is not known here", hint=hint)
    there = files.existing()
    parts = shelves.recorded(history.live, there, files.segment_bytes)
    named = sum(len(part.records) for part in parts)
    whole = _whole(files, parts, progress)
    removed, kept, restored = _hanging_together(files, there, whole, log)
    repairs = Repairs(
        corrupt=named - len(whole),
        orphans=len(whole) - len(kept),
        void=len(history.live) - named,
        restored=len(restored),
        log_pages=history.bad_pages,
        files=_sweep(path),
    )
    records = np.concatenate([kept, _records(restored, journal.ADD)])
    if len(kept) < len(history.live) or restored or history.bad_pages:
        epoch = max([history.epoch, *(stray.header.epoch for stray in restored)])
        _replace(log, np.concatenate([_records(removed, journal.REMOVE), records]), epoch)
    return CheckReport(
        path=str(path),
        blocks=len(records),
        bytes=int(records["length"].astype(np.int64).sum()),
        corrupt=0,
        torn_pages=0,
        orphans=0,
        unknown_pages=0,
        segments=len(there),
        ok=True,
        repaired=repairs,
    )


def _whole(files: Segments, parts: Sequence[Recorded], progress: Progress) -> Records:
    """The records of all blocks that verify."""
    good: dict[bytes, set[bytes]] = defaultdict(set)
    for part, key, verifies in scan.verify(files, parts, progress):
        if verifies:
            good[part.layout].add(key)
    some = (
        rows(part.records, np.flatnonzero([key in good[part.layout] for key in journal.split(part.records["key"])]))
        for part in parts
    )
    return np.concatenate([np.empty(0, journal.RECORD), *some])


def _hanging_together(
    files: Segments, there: Sequence[int], whole: Records, log: Path
) -> tuple[list[Stray], Records, list[Stray]]:
    """Strays that were removed on purpose, records to keep, and strays to restore.

    Again without the orphans, until there are none: an orphan that is given up no longer says how its segment is cut,
    and blocks from before it was written there may be whole.
    """
    while True:
        removed, others = _parted(_strays(files, there, whole), log)
        kept, restored = _chained(whole, others)
        if len(kept) == len(whole):
            return removed, kept, restored
        whole = kept


def _strays(files: Segments, there: Iterable[int], whole: Records) -> Iterator[Stray]:
    """Frames that verify, of one size per segment, in places where the log names none."""
    for number in there:
        here = rows(whole, np.flatnonzero(whole["segment"] == number))
        slot_bytes = int(here["slot_pages"][0]) * PAGE_BYTES if len(here) else 0
        taken = set((here["slot"] * here["slot_pages"]).tolist())
        found = list(scan.strays(files, number, taken))
        if found and not slot_bytes:  # the segment was emptied and cut into other slots at some time: which was last?
            latest = max(stray.header.epoch for stray in found)
            sizes = Counter(stray.frame_bytes for stray in found if stray.header.epoch == latest)
            [(slot_bytes, _)] = sizes.most_common(1)
        yield from (stray for stray in found if stray.frame_bytes == slot_bytes)


def _parted(strays: Iterable[Stray], log: Path) -> tuple[list[Stray], list[Stray]]:
    """Strays that were removed on purpose, as far as the log remembers, and all others."""
    words = journal.removals(log)
    columns = (words["segment"].tolist(), words["slot"].tolist(), journal.split(words["key"]))
    removed = set(zip(*columns, strict=True))
    parts: tuple[list[Stray], list[Stray]] = ([], [])
    for stray in strays:
        parts[(stray.segment, stray.slot, stray.header.key) not in removed].append(stray)
    return parts


def _chained(whole: Records, strays: Iterable[Stray]) -> tuple[Records, list[Stray]]:
    """What hangs together from a first block on: recorded blocks as they were written, and others by their depth."""
    lengths = dict(zip(journal.split(whole["layout"]), whole["length"].tolist(), strict=True))
    columns = (journal.split(whole[name]) for name in ("layout", "key", "parent"))
    recorded = zip(whole["depth"].tolist(), range(len(whole)), *columns, strict=True)
    by_age = sorted(strays, key=lambda stray: -stray.header.epoch)
    for stray in by_age:
        lengths.setdefault(stray.header.layout, stray.header.length_bytes)
    found = (
        (header.depth, len(whole) + at, header.layout, header.key, header.parent)
        for at, header in enumerate(stray.header for stray in by_age)
        if lengths[header.layout] == header.length_bytes
    )
    depths: dict[Name, int] = {}
    taken = []
    for depth, at, layout, key, parent in sorted(chain(recorded, found)):
        above = 0 if parent == NO_PARENT else depths.get((layout, parent))
        if above is not None and above + 1 == depth and (layout, key) not in depths:
            depths[layout, key] = depth
            taken.append(at)
    kept = np.array(sorted(at for at in taken if at < len(whole)), np.int64)
    return rows(whole, kept), [by_age[at - len(whole)] for at in taken if at >= len(whole)]


def _records(strays: Sequence[Stray], kind: int) -> Records:
    return journal.make(
        [
            journal.Row(
                stray.header.key,
                stray.header.parent,
                stray.header.layout,
                kind,
                stray.header.depth,
                stray.segment,
                stray.slot,
                stray.frame_bytes // PAGE_BYTES,
                stray.header.length_bytes,
                stray.written_wall_seconds,
            )
            for stray in strays
        ]
    )


def _sweep(path: Path) -> int:
    """Remove what a crash at the making of a file leaves; how many files that were."""
    left_over = [path / directory.FRESH_FORMAT_FILE, (path / directory.LOG_FILE).with_suffix(".new")]
    there = [file for file in left_over if file.exists()]
    for file in there:
        file.unlink()
    return len(there)


def _replace(log: Path, records: Records, epoch: int) -> None:
    written = Journal(log, bytes_max=PAGE_BYTES * (len(records) // journal.RECORDS_PER_PAGE + 1), epoch=epoch)
    try:
        written.rewrite(records)
    finally:
        written.close()
