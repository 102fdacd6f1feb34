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
SEGMENTS_WANTED = 32
FORMAT_FILE = "thermocline-disk.json"
LOG_FILE = "index.log"
LOCK_FILE = "lock"


class _Format(msgspec.Struct, forbid_unknown_fields=True):
    thermocline_disk: int
    segment_bytes: int


def claim(path: Path) -> int:
    """Create the directory where needed and lock it; returns the open lock, which the tier closes at its end.

    Raises TierError where it cannot be created or written, DiskInUseError where another process has it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        fd = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        hint = "name a directory that this user may create and write, with --disk-path"
        raise TierError(f"cannot use {path} as a disk tier: {error.strerror}", hint=hint) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        hint = "stop the other server, or give this one its own --disk-path"
        raise DiskInUseError(f"{path} is in use by another process", hint=hint) from error
    return fd


def log_bytes(capacity_bytes: int) -> int:
    """The bound on the index log: a 64th of the quota, which holds two records for each block of 16 KiB or more."""
    return max(64 * PAGE_BYTES, capacity_bytes // 64)


def segment_bytes(path: Path, room_bytes: int) -> int:
    """Size of a segment here: what the format file says, or a fitting size, which is then written there.

    Raises DiskFormatError where the directory holds something else, and TierError where the quota is too small.
    """
    file = path / FORMAT_FILE
    if file.exists():
        return _read_format(file).segment_bytes
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name not in {LOCK_FILE, "lost+found"})
    if foreign:
        hint = "name an empty directory, or one that thermocline made"
        raise DiskFormatError(f"{path} is not empty and holds no thermocline data (found {foreign[0]!r})", hint=hint)
    size = min(SEGMENT_BYTES_MAX, room_bytes // SEGMENTS_WANTED // MIB * MIB) or min(MIB, room_bytes)
    if size < 2 * PAGE_BYTES:
        raise TierError("the disk quota is too small to hold anything", hint="give --disk-bytes at least 8MiB")
    size -= size % PAGE_BYTES
    fresh = file.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(_Format(FORMAT_VERSION, size)))
    fresh.rename(file)
    sync_directory(path)
    return size


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
