"""The disk tier's files and threads: preallocated segments, direct I/O, readers that cannot hold up their callers."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import queue
import threading
from collections.abc import Collection, Sequence
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from thermocline.tiers.journal import sync_directory
from thermocline.tiers.tier import Piece

READ_BYTES_MAX = 4 * 1024 * 1024 + 4096
"""One read: a frame of 4 MiB fits. Large enough to run at the device's speed, small enough that checking one hides
behind reading the next."""

READS_WAITING_MAX = 65_536
READS_SWEPT_MIN = 512
_BUSY = OSError(errno.EBUSY, "too many reads wait")
_CLOSED = OSError(errno.EBADF, "the tier is closed")
PIECES_MAX = 1000  # the kernel takes 1,024 pieces per call


NAME_DIGITS = 6


def aligned_memory(nbytes: int) -> NDArray[np.uint8]:
    """Page-aligned memory, faulted in, as direct I/O wants it."""
    memory = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    memory[::4096] = 0
    return memory


class Segments:
    """Files of equal size below one directory, each allocated whole before it is used."""

    def __init__(self, path: Path, segment_bytes: int) -> None:
        self._path = path
        self.segment_bytes = segment_bytes
        self._fds: dict[int, int] = {}
        self.names_unsynced = False

    def existing(self) -> list[int]:
        """Numbers of the segment files that are there, whole or cut; foreign names are left alone."""
        stems = [entry.stem for entry in self._path.glob("*.segment")]
        return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit() and len(stem) == NAME_DIGITS)

    @property
    def numbers(self) -> Collection[int]:
        """The open segments."""
        return self._fds.keys()

    def next_number(self) -> int:
        """The lowest number that is not open."""
        return next(number for number in count() if number not in self._fds)

    def open(self, number: int) -> None:
        """Open a segment, allocating what of it is not there. Raises OSError, leaving files as they were.

        A new file's name is durable after `sync_names`.
        """
        path = self.file(number)
        fresh = not path.exists()
        fd = open_direct(path, os.O_RDWR | os.O_CREAT)
        nbytes = os.fstat(fd).st_size
        try:
            if nbytes != self.segment_bytes:
                os.posix_fallocate(fd, 0, self.segment_bytes)
                os.ftruncate(fd, self.segment_bytes)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, nbytes)
            os.close(fd)
            if fresh:
                path.unlink(missing_ok=True)
            raise
        self._fds[number] = fd
        self.names_unsynced |= fresh

    def open_cut(self, number: int) -> int:
        """Open a segment as it is, however short. Returns its length in bytes. Raises OSError."""
        self._fds[number] = open_direct(self.file(number), os.O_RDWR)
        return os.fstat(self._fds[number]).st_size

    def let_go(self, number: int) -> None:
        """Close a segment."""
        fd = self._fds.pop(number, None)
        if fd is not None:
            os.close(fd)

    def remove(self, number: int) -> None:
        """Delete a segment's file."""
        self.let_go(number)
        self.file(number).unlink(missing_ok=True)

    def fd(self, number: int) -> int:
        """The open file of a segment; -1, which every call refuses, once it is closed."""
        return self._fds.get(number, -1)

    def write(self, number: int, offset: int, pieces: Sequence[Piece]) -> None:
        """Write adjacent aligned pieces. Raises OSError, also for a short write."""
        fd = self.fd(number)
        for start in range(0, len(pieces), PIECES_MAX):
            part = pieces[start : start + PIECES_MAX]
            wanted = sum(piece.nbytes for piece in part)
            if os.pwritev(fd, [piece.data for piece in part], offset) != wanted:
                raise OSError(errno.ENOSPC, "short write to a segment")
            offset += wanted

    def sync(self, number: int) -> None:
        """Make what was written to a segment durable. Raises OSError."""
        os.fdatasync(self._fds[number])

    def sync_names(self) -> None:
        """Make the names of new segments durable. Raises OSError."""
        if self.names_unsynced:
            sync_directory(self._path)
            self.names_unsynced = False

    def close(self) -> None:
        """Let go of all files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def file(self, number: int) -> Path:
        """Where a segment lies."""
        return self._path / f"{number:0{NAME_DIGITS}d}.segment"


def open_direct(path: Path, flags: int) -> int:
    """Open past the page cache; through it on a file system without direct I/O, with the same bytes. Raises OSError."""
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_DIRECT, 0o600)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags | os.O_CLOEXEC, 0o600)


class Read:
    """One read under way. Its buffer is the reader's until `wait` returns True, then the caller's until `release`."""

    __slots__ = ("_abandoned", "_arrived", "_buffer", "_lock", "_pool", "_token", "error", "fd", "nbytes", "offset")

    def __init__(self, pool: queue.SimpleQueue[NDArray[np.uint8]], fd: int, offset: int, nbytes: int) -> None:
        self._pool = pool
        self.fd, self.offset, self.nbytes = fd, offset, nbytes
        self.error: OSError | None = None
        self._buffer: NDArray[np.uint8] | None = None
        self._arrived = threading.Event()
        self._abandoned = False
        self._token: NDArray[np.uint8] | None = None
        """The buffer of the pool that a larger read keeps from others, so that as many are under way as of any size."""
        self._lock = threading.Lock()

    def wait(self, seconds: float) -> bool:
        """True once the bytes are there or the read failed (`error`); False if `seconds` passed first."""
        return self._arrived.wait(min(max(0.0, seconds), threading.TIMEOUT_MAX))

    @property
    def bytes(self) -> NDArray[np.uint8]:
        """What was read. Only after `wait` returned True without an error."""
        assert self._buffer is not None
        return self._buffer[: self.nbytes]

    def release(self) -> None:
        """Give the buffer back; if the read still runs, its reader does so when it ends."""
        with self._lock:
            self._abandoned = True
            buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._give_back(buffer)

    @property
    def abandoned(self) -> bool:
        """True once nobody waits for it any more."""
        return self._abandoned

    def fail(self, error: OSError) -> None:
        """For the readers: this read will not happen."""
        self.error = error
        self._arrived.set()

    def run(self, buffer: NDArray[np.uint8]) -> None:
        """For the reader thread: read into this buffer of the pool, or into larger memory; or record why not."""
        if not self._abandoned and self.nbytes > buffer.nbytes:
            self._token, buffer = buffer, aligned_memory(self.nbytes)
        if not self._abandoned:
            try:
                got = os.preadv(self.fd, [buffer[: self.nbytes].data], self.offset)
                buffer[got : self.nbytes] = 0  # the file was cut: nobody sees what an earlier read left here
            except OSError as error:
                self.error = error
        self._hand_over(buffer)
        self._arrived.set()

    def _hand_over(self, buffer: NDArray[np.uint8]) -> None:
        with self._lock:
            if not self._abandoned:
                self._buffer = buffer
                return
        self._give_back(buffer)

    def _give_back(self, buffer: NDArray[np.uint8]) -> None:
        self._pool.put(buffer if self._token is None else self._token)


class Readers:
    """A few threads that read into their own buffers, so a device that hangs holds up nobody and overwrites nothing."""

    def __init__(self, threads: int, *, name: str = "disk-reader") -> None:
        self._queue: queue.SimpleQueue[Read | None] = queue.SimpleQueue()
        self._pool: queue.SimpleQueue[NDArray[np.uint8]] = queue.SimpleQueue()
        for _ in range(threads * 2):
            self._pool.put(aligned_memory(READ_BYTES_MAX))
        self._lock = threading.Lock()
        self._closed = False
        self._sweep_at = READS_SWEPT_MIN
        self._threads = [threading.Thread(target=self._serve, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, fd: int, offset: int, nbytes: int) -> Read:
        """Start a read; release it whatever becomes of it. Over READ_BYTES_MAX it pays for memory of its own."""
        read = Read(self._pool, fd, offset, nbytes)
        with self._lock:
            if self._closed:
                read.fail(_CLOSED)
                return read
            if self._queue.qsize() >= self._sweep_at:  # a device that hangs, and callers that went away
                self._sweep()
            if self._queue.qsize() >= READS_WAITING_MAX:
                read.fail(_BUSY)
            else:
                self._queue.put(read)
        return read

    def _sweep(self) -> None:
        """Drop the reads that nobody waits for; at most as many are kept as there are others."""
        kept = []
        with contextlib.suppress(queue.Empty):
            while True:
                waiting = self._queue.get_nowait()
                if waiting is not None and not waiting.abandoned:
                    kept.append(waiting)
        for waiting in kept:
            self._queue.put(waiting)
        self._sweep_at = max(READS_SWEPT_MIN, 2 * len(kept))

    def close(self, seconds: float) -> None:
        """Stop the threads. One that hangs in a read is left behind; it is a daemon and owns its buffer."""
        with self._lock:
            self._closed = True
            for _ in self._threads:
                self._queue.put(None)
        for thread in self._threads:
            thread.join(seconds)
        with contextlib.suppress(queue.Empty):
            while True:
                waiting = self._queue.get_nowait()
                if waiting is not None:
                    waiting.fail(_CLOSED)
        for _ in self._threads:  # for those that come back after all
            self._queue.put(None)

    def _serve(self) -> None:
        while True:
            # the buffer first, so that buffers go to reads in the order of the queue: a finished read that waits for
            # its turn never holds what the read before it needs
            buffer = self._pool.get()
            read = self._queue.get()
            if read is None:
                self._pool.put(buffer)
                return
            read.run(buffer)
