"""Stores of real tiers on a clock that stands still, closed at the end of each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.store.making import BLOCK_BYTES
from thermocline.clock import ManualClock
from thermocline.store.store import Store
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.tier import Tier

MIB = 1024 * 1024
START = 1_000_000.0


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands still unless a test moves it."""
    return ManualClock(START)


@pytest.fixture
def opened() -> Iterator[list[Store]]:
    """Stores to close at the end."""
    stores: list[Store] = []
    yield stores
    for store in stores:
        store.close(5.0)


@pytest.fixture
def make_store(clock, opened) -> Callable[..., Store]:
    """A store over memory of so many blocks, and whatever colder tiers are given."""

    def make(*cold: Tier, blocks: int = 256, **options: float) -> Store:
        warm = MemoryTier(blocks * BLOCK_BYTES, clock=clock)
        warm.wait_ready()
        opened.append(Store(warm, cold, clock=clock, **options))
        return opened[-1]

    return make


@pytest.fixture
def make_disk(tmp_path, clock) -> Callable[..., DiskTier]:
    """A disk tier; the same path again is the same disk, reopened."""

    def make(name: str = "disk", capacity_bytes: int = 16 * MIB, queue_bytes: int = 64 * MIB) -> DiskTier:
        return DiskTier(tmp_path / name, capacity_bytes, clock=clock, queue_bytes_max=queue_bytes)

    return make
