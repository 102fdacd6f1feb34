"""Settings become wired parts, here and nowhere else."""

from __future__ import annotations

from thermocline.clock import Clock, SystemClock
from thermocline.settings import Settings
from thermocline.store.store import Store
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier


def store_from(settings: Settings, *, clock: Clock | None = None) -> Store:
    """A store with a memory tier, and a disk tier where `disk_path` is set. The caller closes it.

    Raises TierError (DiskInUseError, DiskFormatError) where the disk path cannot be used.
    """
    clock = clock or SystemClock()
    cold = []
    if settings.disk_path is not None:
        queue_bytes = min(settings.write_queue_bytes, settings.memory_bytes // 2)
        cold.append(DiskTier(settings.disk_path, settings.disk_bytes, clock=clock, queue_bytes_max=queue_bytes))
    return Store(
        MemoryTier(settings.memory_bytes, clock=clock),
        cold,
        clock=clock,
        ttl_seconds=settings.ttl_seconds,
        lease_seconds=settings.lease_seconds,
        load_seconds_max=settings.load_seconds_max,
        receipts_kept=settings.receipts_kept,
    )
