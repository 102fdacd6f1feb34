"""The slab: memory that is there before it is needed, never more than was asked for."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest

from thermocline.blocks.slab import UNIT_BYTES_MIN, Slab

MIB = 1 << 20
BLOCK = 256 * 1024


@pytest.fixture
def slab():
    """Four MiB, all faulted in."""
    slab = Slab(4 * MIB)
    assert slab.wait_ready(60)
    yield slab
    slab.close()


def test_every_byte_is_a_slot_once(slab):
    """All slots together are all of the memory, and what is written into one is in no other."""
    slots = slab.take(BLOCK, 100)
    assert len(slots) == 16 == slab.capacity_bytes // BLOCK
    for number, slot in enumerate(slots):
        slab.view(slot, BLOCK)[:] = number
    assert [set(slab.view(slot, BLOCK)) for slot in slots] == [{number} for number in range(16)]
    assert slab.used_bytes == slab.capacity_bytes
    assert slab.take(BLOCK, 1) == []
    slab.check_integrity()


def test_views_are_aligned(slab):
    """Every view begins on a page, so that it can be written to disk without a copy, and has the block's length."""
    for slot in slab.take(5000, 10):
        view = slab.view(slot, 5000)
        assert view.nbytes == 5000
        assert view.ctypes.data % 4096 == 0


def test_generations(slab):
    """A slot that was given back is never current again, though its place is used again."""
    (slot,) = slab.take(slab.capacity_bytes, 1)
    assert slab.is_current(slot)
    slab.give(slot)
    assert not slab.is_current(slot)
    (again,) = slab.take(slab.capacity_bytes, 1)
    assert again[:2] == slot[:2]
    assert not slab.is_current(slot)
    with pytest.raises(ValueError, match="not in use"):
        slab.give(slot)
    slab.check_integrity()


@pytest.mark.parametrize(
    "capacity", [1, 4095, 4096, 5000, MIB, UNIT_BYTES_MIN - 1, UNIT_BYTES_MIN, 3 * UNIT_BYTES_MIN + 1]
)
def test_capacity_is_kept(capacity):
    """A slab takes what it was given, in whole pages, and never a page more."""
    slab = Slab(capacity)
    assert slab.wait_ready(60)
    assert slab.capacity_bytes <= max(4096, capacity)
    assert slab.capacity_bytes > capacity - UNIT_BYTES_MIN
    slab.close()


def test_ready_while_it_grows():
    """The first unit serves at once; the rest arrives in the background, each unit once."""
    slab = Slab(4 * UNIT_BYTES_MIN)
    first = slab.take(UNIT_BYTES_MIN, 1)
    assert len(first) == 1
    assert slab.wait_ready(60)
    rest = slab.take(UNIT_BYTES_MIN, 9)
    assert len({slot.unit for slot in first + rest}) == 4
    slab.check_integrity()
    slab.close()


def test_close():
    """Closing twice is closing once: the thread ends, and the memory goes with the last view of it."""
    slab = Slab(2 * UNIT_BYTES_MIN, name="closing")
    (slot,) = slab.take(BLOCK, 1)
    view = slab.view(slot, BLOCK)
    view[:] = 7
    slab.close()
    slab.close()
    assert slab._thread not in threading.enumerate()
    assert np.all(view == 7)
    del view, slab
    gc.collect()
    links = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    assert not any("memfd:closing" in link for link in links)


def test_threads_never_share_a_slot(slab):
    """Threads that take and give at once never hold the same slot."""
    wrong = []

    def work(number):
        for _ in range(300):
            for slot in slab.take(4096 * (1 + number % 2), 5):
                view = slab.view(slot, 4096)
                view[:] = number
                if not np.all(view == number):
                    wrong.append(slot)
                slab.give(slot)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert slab.used_bytes == 0
    slab.check_integrity()
