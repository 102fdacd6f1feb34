"""Settings become wired parts, here and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

from thermocline.clock import Clock, SystemClock
from thermocline.costs import measured
from thermocline.costs.model import FitState, LearnedCosts
from thermocline.costs.saved import SavedCosts
from thermocline.errors import SettingsError
from thermocline.settings import Settings, read_key
from thermocline.store.calibrate import calibrate
from thermocline.store.receipts_file import ReceiptsFile
from thermocline.store.store import Store
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.redis import RedisTier
from thermocline.tiers.redis_scripts import Space
from thermocline.tiers.tier import Tier
from thermocline.wire.resp import Address


def store_from(settings: Settings, *, clock: Clock | None = None, costs: LearnedCosts | None = None) -> Store:
    """A store with a memory tier, disk where `disk_path` is set, Redis where `redis_url` is. The caller closes it.

    Without `costs`, they are those saved in `costs_path`; of tiers that they say nothing of, loads are measured now.

    Raises TierError (DiskInUseError, DiskFormatError) where the disk path cannot be used or Redis refuses us, and
    SettingsError where there is not as much memory, or no profile at `measured_path`. Then nothing is left open.
    """
    clock = clock or SystemClock()
    _check_memory(settings.memory_bytes)
    known = None if settings.measured_path is None else measured.read(settings.measured_path).prefills()
    with ExitStack() as opened:
        cold = list(_colder(settings, clock, opened))
        try:
            warm = MemoryTier(settings.memory_bytes, clock=clock)
        except OSError as error:
            raise _too_much_memory(settings.memory_bytes, error.strerror) from error
        opened.pop_all()
    costs = costs or _costs(settings, known)
    calibrate([warm, *cold], costs, clock)
    store = Store(
        warm,
        cold,
        clock=clock,
        ttl_seconds=settings.ttl_seconds,
        lease_seconds=settings.lease_seconds,
        load_seconds_max=settings.load_seconds_max,
        receipts_kept=settings.receipts_kept,
        costs=costs,
    )
    if settings.receipts_path is not None:
        store.receipts.keep_in(ReceiptsFile(settings.receipts_path, settings.receipts_bytes, metrics=store.metrics))
    return store


def _costs(settings: Settings, known: FitState | None) -> LearnedCosts:
    if settings.costs_path is None:
        return LearnedCosts(measured=known)
    return SavedCosts(settings.costs_path, measured=known)


def _colder(settings: Settings, clock: Clock, opened: ExitStack) -> Iterator[Tier]:
    """The tiers below memory, from fast to slow; `opened` closes them."""
    queue_bytes = min(settings.write_queue_bytes, settings.memory_bytes // 2)
    tier: Tier
    if settings.disk_path is not None:
        tier = DiskTier(settings.disk_path, settings.disk_bytes, clock=clock, queue_bytes_max=queue_bytes)
        opened.callback(tier.close)
        yield tier
    if settings.redis_url is not None:
        secret = settings.redis_password_file
        password = None if secret is None else read_key(secret, what="password of the Redis server")
        tier = RedisTier(
            Address.parse(settings.redis_url, password=password, ca_file=settings.redis_ca_file),
            _space(settings),
            clock=clock,
            wait_seconds=settings.redis_wait_seconds,
            queue_bytes_max=queue_bytes,
        )
        opened.callback(tier.close)
        yield tier


def _space(settings: Settings) -> Space:
    if settings.redis_prefix_tokens < settings.tokens_per_block:
        text = (
            f"redis_prefix_tokens is {settings.redis_prefix_tokens}, less than a block of {settings.tokens_per_block}"
        )
        raise SettingsError(f"{text} tokens: nothing would be kept", hint="raise it, or leave redis_url out")
    return Space(
        settings.redis_namespace.encode(),
        settings.redis_bytes,
        settings.redis_ttl_seconds,
        settings.redis_prefix_tokens // settings.tokens_per_block,
        settings.redis_gain_min,
    )


def _check_memory(memory_bytes: int) -> None:
    """All of it is used at once: asking for more than there is would have the kernel end some process, perhaps ours."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if memory_bytes > there:
        raise _too_much_memory(memory_bytes, f"this machine has {there >> 20} MiB")


def _too_much_memory(memory_bytes: int, why: str | None) -> SettingsError:
    hint = "give --memory-bytes what the machine can spare"
    return SettingsError(f"cannot take {memory_bytes >> 20} MiB as the memory tier: {why}", hint=hint)
