"""Settings become wired parts, here and nowhere else."""

from __future__ import annotations

import os

from thermocline.clock import Clock, SystemClock
from thermocline.errors import SettingsError
from thermocline.settings import Settings
from thermocline.store.store import Store
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier


def store_from(settings: Settings, *, clock: Clock | None = None) -> Store:
    """A store with a memory tier, and a disk tier where `disk_path` is set. The caller closes it.

    Raises TierError (DiskInUseError, DiskFormatError) where the disk path cannot be used, and SettingsError where
    there is not as much memory. Then nothing is left open.
    """
    clock = clock or SystemClock()
    _check_memory(settings.memory_bytes)
    cold = []
    if settings.disk_path is not None:
        queue_bytes = min(settings.write_queue_bytes, settings.memory_bytes // 2)
        cold.append(DiskTier(settings.disk_path, settings.disk_bytes, clock=clock, queue_bytes_max=queue_bytes))
    try:
        warm = MemoryTier(settings.memory_bytes, clock=clock)
    except OSError as error:
        for tier in cold:
            tier.close()
        raise _too_much_memory(settings.memory_bytes, error.strerror) from error
    return Store(
        warm,
        cold,
        clock=clock,
        ttl_seconds=settings.ttl_seconds,
        lease_seconds=settings.lease_seconds,
        load_seconds_max=settings.load_seconds_max,
        receipts_kept=settings.receipts_kept,
    )


def _check_memory(memory_bytes: int) -> None:
    """All of it is used at once: asking for more than there is would have the kernel end some process, perhaps ours."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if memory_bytes > there:
        raise _too_much_memory(memory_bytes, f"this machine has {there >> 20} MiB")


def _too_much_memory(memory_bytes: int, why: str | None) -> SettingsError:
    hint = "give --memory-bytes what the machine can spare"
    return SettingsError(f"cannot take {memory_bytes >> 20} MiB as the memory tier: {why}", hint=hint)
