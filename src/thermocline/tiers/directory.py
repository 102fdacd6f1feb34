"""The directory of a disk tier: one process at a time, one format, nothing of anybody else's touched."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import msgspec

from thermocline.blocks.frame import PAGE_BYTES
from thermocline.errors import DiskFormatError, DiskInUseError, TierError
from thermocline.tiers.journal import sync_directory

FORMAT_VERSION = 1
MIB = 1024 * 1024
SEGMENT_BYTES_MAX = 256 * MIB
SEGMENT_BYTES_WANTED = 16 * MIB
SEGMENTS_WANTED = 32
FORMAT_FILE = "thermocline-disk.json"
FRESH_FORMAT_FILE = "thermocline-disk.new"
LOG_FILE = "index.log"
LOCK_FILE = "lock"
SMALL_FILES_BYTES = 8 * PAGE_BYTES
"""The directory itself, the lock and the format file: reserved, so that the quota holds for all of the folder."""
_BEFORE_FORMAT = frozenset({LOCK_FILE, FRESH_FORMAT_FILE, "lost+found"})


class _Format(msgspec.Struct, forbid_unknown_fields=True):
    thermocline_disk: int
    segment_bytes: int


def claim(path: Path) -> int:
    """Create the directory where needed and lock it; returns the open lock, which the tier closes at its end.

    Raises TierError where it cannot be created or written, DiskFormatError where it holds something else (and then
    nothing in it is touched), DiskInUseError where another process has it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        refuse_foreign(path)
        fd = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        hint = "name a directory that this user may create and write, with --disk-path"
        raise TierError(f"cannot use {path} as a disk tier: {error.strerror}", hint=hint) from error
    return lock(path, fd)


def lock(path: Path, fd: int, kind: int = fcntl.LOCK_EX) -> int:
    """Lock an open lock file. Raises DiskInUseError, having closed it, where another process holds it."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        hint = "stop the other server, or give this one its own --disk-path"
        raise DiskInUseError(f"{path} is in use by another process", hint=hint) from error
    return fd


def refuse_foreign(path: Path) -> None:
    """Raises DiskFormatError where a directory holds something, but no disk tier. A crash at its making is none."""
    if (path / FORMAT_FILE).exists():
        return
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in _BEFORE_FORMAT)
    if foreign and not (path / FORMAT_FILE).exists():  # another process may have made it just now
        hint = "name an empty directory, or one that thermocline made"
        raise DiskFormatError(f"{path} is not empty and holds no thermocline data (found {foreign[0]!r})", hint=hint)


def log_bytes(capacity_bytes: int) -> int:
    """The bound on the index log: a 64th of the quota, which holds two records for each block of 16 KiB or more."""
    return max(64 * PAGE_BYTES, capacity_bytes // 64)


def segment_bytes(path: Path, room_bytes: int) -> int:
    """Size of a segment here: what the format file says, or a fitting size, which is then written there.

    Raises DiskFormatError where that file is of another format, and TierError where the quota is too small.
    """
    file = path / FORMAT_FILE
    if file.exists():
        size = _read_format(file).segment_bytes
        if size > room_bytes:
            hint = f"give --disk-bytes at least {size * 2 // MIB + 1}MiB, or an empty --disk-path"
            raise TierError(f"the disk quota is below one segment of {path}, which has {size} bytes", hint=hint)
        return size
    size = _fitting(room_bytes)
    if size < 2 * PAGE_BYTES:
        raise TierError("the disk quota is too small to hold anything", hint="give --disk-bytes at least 8MiB")
    fresh = path / FRESH_FORMAT_FILE
    with fresh.open("wb") as out:
        out.write(msgspec.json.encode(_Format(FORMAT_VERSION, size)))
        out.flush()
        os.fsync(out.fileno())
    fresh.rename(file)
    sync_directory(path)
    return size


def _fitting(room_bytes: int) -> int:
    """A 32nd of the room, but enough for a block of any common model, and never less than four segments."""
    size = min(SEGMENT_BYTES_MAX, max(room_bytes // SEGMENTS_WANTED, min(SEGMENT_BYTES_WANTED, room_bytes // 4)))
    return size - size % (MIB if size > MIB else PAGE_BYTES)


def read_segment_bytes(path: Path) -> int:
    """Size of a segment in an existing directory. Raises DiskFormatError where there is none."""
    file = path / FORMAT_FILE
    if not file.exists():
        hint = "name the directory that was given to --disk-path"
        raise DiskFormatError(f"{path} holds no thermocline data", hint=hint)
    return _read_format(file).segment_bytes


def _read_format(file: Path) -> _Format:
    hint = "move the directory away, or run the release that wrote it"
    try:
        found = msgspec.json.decode(file.read_bytes()[:4096], type=_Format)
    except (msgspec.DecodeError, OSError) as error:
        raise DiskFormatError(f"{file} is damaged or not ours", hint=hint) from error
    if found.thermocline_disk != FORMAT_VERSION:
        raise DiskFormatError(f"{file.parent} has format {found.thermocline_disk}, not {FORMAT_VERSION}", hint=hint)
    if not 2 * PAGE_BYTES <= found.segment_bytes <= SEGMENT_BYTES_MAX or found.segment_bytes % PAGE_BYTES:
        raise DiskFormatError(f"{file} names segments of {found.segment_bytes} bytes", hint=hint)
    return found
