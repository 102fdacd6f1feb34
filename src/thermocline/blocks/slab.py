"""Slab: one stretch of memory for all blocks of a host, faulted in before use and never given back.

Fresh memory costs a page fault per 4 KiB, several times the price of the copy itself, so nothing is allocated per
block. The memory is a memfd: another process can map the same pages.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import threading

import numpy as np
from numpy.typing import NDArray

from thermocline.blocks.frame import PAGE_BYTES, padded
from thermocline.blocks.slots import Slot, SlotMap

LOG = logging.getLogger("thermocline.blocks")
UNIT_BYTES_MIN = 16 * 1024 * 1024
UNITS_MAX = 64
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""Nobody can cut it: a process that reads what was cut off is ended by the kernel."""
STEP_BYTES = 16 * 1024 * 1024


class Slab:
    """`capacity_bytes` of slots. The first unit is ready on return, the others as a thread faults them in."""

    def __init__(self, capacity_bytes: int, name: str = "thermocline") -> None:
        pages = max(1, capacity_bytes // PAGE_BYTES)
        unit_bytes = PAGE_BYTES * max(min(UNIT_BYTES_MIN // PAGE_BYTES, pages), pages // UNITS_MAX)
        units = max(1, capacity_bytes // unit_bytes)
        self.capacity_bytes = units * unit_bytes
        self._lock = threading.Lock()
        self._slots = SlotMap(unit_bytes)
        self._fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, self.capacity_bytes)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, SEALS)
        self._map = mmap.mmap(self._fd, self.capacity_bytes)
        self._bytes: NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)
        self._closing = threading.Event()
        self._fault_in(0)
        self._thread = threading.Thread(target=self._fault_in_rest, args=(units,), name="slab", daemon=True)
        self._thread.start()

    def take(self, block_bytes: int, count: int) -> list[Slot]:
        """Up to `count` slots for blocks of this size."""
        with self._lock:
            return self._slots.take(padded(block_bytes), count)

    def give(self, slot: Slot) -> None:
        """Take a slot back; a view of it stays readable but no longer means anything."""
        with self._lock:
            self._slots.give(slot)

    def free_slots(self, block_bytes: int) -> int:
        """How many blocks of this size fit now."""
        with self._lock:
            return self._slots.free_slots(padded(block_bytes))

    def view(self, slot: Slot, block_bytes: int) -> NDArray[np.uint8]:
        """The bytes of a slot, page-aligned, valid until the slab is closed."""
        start = self.offset(slot, block_bytes)
        return self._bytes[start : start + block_bytes]

    def offset(self, slot: Slot, block_bytes: int) -> int:
        """Where a slot begins: the same in every process that maps `fd`."""
        return slot.unit * self._slots.unit_bytes + slot.number * padded(block_bytes)

    @property
    def fd(self) -> int:
        """The memfd's descriptor, valid until `close`. Who is given a copy of it may map all of the slab."""
        return self._fd

    def is_current(self, slot: Slot) -> bool:
        """True while the slot has not been given back: read after a copy, it says whether the copy was of this use."""
        return self._slots.is_current(slot)

    @property
    def unit_bytes(self) -> int:
        """No block is longer than this."""
        return self._slots.unit_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes in slots that are taken."""
        return self._slots.used_bytes

    def check_integrity(self) -> None:
        """Free and used slots add up. Raises AssertionError."""
        with self._lock:
            self._slots.check_integrity()

    def wait_ready(self, seconds: float | None = None) -> bool:
        """Wait until all memory is faulted in; False if `seconds` passed first."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def close(self) -> None:
        """Let go of the memory once no view of it is left. A second call does nothing."""
        if not self._closing.is_set():
            self._closing.set()
            self._thread.join()
            os.close(self._fd)

    def _fault_in_rest(self, units: int) -> None:
        for unit in range(1, units):
            if self._closing.is_set():
                return
            try:
                self._fault_in(unit)
            except OSError as error:  # to touch what there is no room for would end the process
                there = unit * self._slots.unit_bytes
                LOG.warning("memory: only %d of %d MiB could be had: %s", there >> 20, self.capacity_bytes >> 20, error)
                return

    def _fault_in(self, unit: int) -> None:
        """Other threads run meanwhile; `mmap.madvise` would hold up all of Python."""
        start = unit * self._slots.unit_bytes
        for at in range(start, start + self._slots.unit_bytes, STEP_BYTES):
            step = self._bytes[at : min(at + STEP_BYTES, start + self._slots.unit_bytes)]
            os.posix_fallocate(self._fd, at, step.nbytes)
            step[::PAGE_BYTES].max()
        with self._lock:
            self._slots.add_unit(unit)
