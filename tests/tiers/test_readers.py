"""Reads: many at once with few buffers, none of them for ever, and no byte that is not from the file."""

from __future__ import annotations

import errno
import os
import sys
import threading

import numpy as np
import pytest

from thermocline.tiers import segments
from thermocline.tiers.segments import READ_BYTES_MAX, Readers, aligned_memory

PAGE = 4096
PATIENCE_SECONDS = 60.0


@pytest.fixture
def file(tmp_path):
    """A file of 64 pages, each full of its own number."""
    path = tmp_path / "file"
    path.write_bytes(b"".join(bytes([number]) * PAGE for number in range(64)))
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


@pytest.fixture
def readers():
    """Two threads."""
    readers = Readers(2)
    yield readers
    readers.close(PATIENCE_SECONDS)


@pytest.fixture
def eager_switching():
    """Threads take turns as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Gate:
    """Reads that hang until the test lets them go."""

    def __init__(self, monkeypatch):
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self._preadv = os.preadv
        monkeypatch.setattr(segments.os, "preadv", self._wait)

    def _wait(self, fd, buffers, offset):
        self.entered.release()
        assert self.open.wait(PATIENCE_SECONDS)
        return self._preadv(fd, buffers, offset)


@pytest.fixture
def gate(monkeypatch):
    """A device that hangs."""
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def test_few_buffers_for_many_reads(file, readers, eager_switching):
    """Reads that are waited for in order all arrive, although finished ones keep their buffers until their turn."""
    for _ in range(100):
        reads = [readers.submit(file, page * PAGE, PAGE) for page in range(32)]
        for page, read in enumerate(reads):
            assert read.wait(PATIENCE_SECONDS), "all buffers lie with reads whose turn has not come"
            assert read.error is None
            assert set(read.bytes) == {page}
            read.release()


def test_many_callers(file, readers, eager_switching):
    """Callers that each wait for their own reads in order do not wait for each other's buffers."""
    late = []

    def call():
        for _ in range(40):
            reads = [readers.submit(file, page * PAGE, PAGE) for page in range(12)]
            for page, read in enumerate(reads):
                if not read.wait(PATIENCE_SECONDS) or set(read.bytes) != {page}:
                    late.append(page)
                read.release()

    callers = [threading.Thread(target=call) for _ in range(6)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert late == []


def test_abandoned_reads_give_their_buffers_back(file, readers):
    """Reads that nobody waits for leave the pool as it was."""
    for _ in range(50):
        for read in [readers.submit(file, page * PAGE, PAGE) for page in range(20)]:
            read.release()
    last = readers.submit(file, 7 * PAGE, PAGE)
    assert last.wait(PATIENCE_SECONDS)
    assert set(last.bytes) == {7}
    last.release()
    last.release()


def test_behind_the_end_are_zeroes(file, readers):
    """What a cut file does not have is zeroes, not what an earlier read left in the buffer."""
    for _ in range(5):  # every buffer has held ones
        read = readers.submit(file, PAGE, PAGE)
        assert read.wait(PATIENCE_SECONDS)
        read.release()
    for offset, there in ((63 * PAGE, PAGE), (64 * PAGE, 0), (1 << 40, 0)):
        read = readers.submit(file, offset, 3 * PAGE)
        assert read.wait(PATIENCE_SECONDS)
        assert set(read.bytes[:there]) <= {63}
        assert not np.any(read.bytes[there:])
        read.release()


def test_larger_than_a_buffer(tmp_path, readers):
    """A read beyond the largest buffer gets memory of its own, and the pool keeps its buffers."""
    path = tmp_path / "large"
    data = np.random.default_rng(1).integers(0, 256, 2 * READ_BYTES_MAX, np.uint8)
    path.write_bytes(data.tobytes())
    fd = os.open(path, os.O_RDONLY)
    for _ in range(8):
        read = readers.submit(fd, 0, data.nbytes)
        assert read.wait(PATIENCE_SECONDS)
        assert np.array_equal(read.bytes, data)
        read.release()
    os.close(fd)
    assert readers._pool.qsize() <= 4


def test_a_failed_read_is_a_value(readers):
    """A read that the system refuses ends with its error, and the thread goes on."""
    for _ in range(10):
        read = readers.submit(-1, 0, PAGE)
        assert read.wait(PATIENCE_SECONDS)
        assert read.error.errno == errno.EBADF
        read.release()


def test_a_device_that_hangs(file, readers, gate):
    """Whoever waits gets an answer in its own time, and a buffer in a hanging read is nobody else's until it ends."""
    reads = [readers.submit(file, page * PAGE, PAGE) for page in range(8)]
    for _ in range(2):
        assert gate.entered.acquire(timeout=PATIENCE_SECONDS)
    assert not any(read.wait(0.01) for read in reads)
    for read in reads:
        read.release()
    assert readers._pool.qsize() == 2, "two of four are out, in the hands of the device"
    gate.open.set()
    after = readers.submit(file, 9 * PAGE, PAGE)
    assert after.wait(PATIENCE_SECONDS)
    assert set(after.bytes) == {9}
    after.release()


def test_reads_that_nobody_waits_for_do_not_pile_up(file, readers, gate):
    """While a device hangs, given up reads leave the queue, and those that are waited for keep their turn."""
    wanted = [readers.submit(file, page * PAGE, PAGE) for page in range(32)]
    for _ in range(5_000):
        readers.submit(file, 0, PAGE).release()
    assert readers._queue.qsize() <= 2 * segments.READS_SWEPT_MIN
    gate.open.set()
    for page, read in enumerate(wanted):
        assert read.wait(PATIENCE_SECONDS)
        assert set(read.bytes) == {page}
        read.release()


def test_closing_while_a_device_hangs(file, gate):
    """Closing does not wait longer than it was told, and ends reads that were not begun; later ones are refused."""
    readers = Readers(2)
    reads = [readers.submit(file, page * PAGE, PAGE) for page in range(6)]
    for _ in range(2):
        assert gate.entered.acquire(timeout=PATIENCE_SECONDS)
    readers.close(0.01)
    for read in reads[2:]:
        assert read.wait(0)
        assert read.error.errno == errno.EBADF
    refused = readers.submit(file, 0, PAGE)
    assert refused.wait(0)
    assert refused.error is not None
    gate.open.set()
    for thread in readers._threads:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive(), "a thread that a device gave back ends"


def test_aligned_memory():
    """Memory for direct I/O begins on a page and is there when it is handed out."""
    memory = aligned_memory(3 * PAGE)
    assert memory.nbytes == 3 * PAGE
    assert memory.ctypes.data % PAGE == 0
