"""Receipts as lines of a file: one JSON object each, written by a thread of its own, so that no request waits for it.

What cannot be written is counted and told once. A crash may cut the last line; a reader passes over it.
"""

from __future__ import annotations

import logging
import os
import queue
import stat
import threading
from pathlib import Path

import msgspec

from thermocline.metrics import Metrics
from thermocline.store.receipt import Receipt

LOG = logging.getLogger("thermocline.receipts")
WAITING_MAX = 1024
LINE_BYTES_MAX = 1 << 20
"""A longer line is not written: a reader may hold any line in memory."""
CLOSE_SECONDS = 5.0


def older(path: Path) -> Path:
    """Where the generation before this file is kept."""
    return path.with_name(path.name + ".1")


class ReceiptsFile:
    """Appends receipts to `path`, readable by its owner only. Safe to use from several threads; one process per file.

    A file of more than `bytes_max` becomes the older generation, of which there is one: both together never take more
    than twice that. Receipts hold no text, no tokens and no keys.
    """

    def __init__(self, path: Path, bytes_max: int, *, metrics: Metrics) -> None:
        self._path, self._bytes_max, self._metrics = path, bytes_max, metrics
        self._waiting: queue.Queue[Receipt | None] = queue.Queue(WAITING_MAX)
        self._file: int | None = None
        self._torn = False  # the last write was cut short, so the next line needs a beginning
        self._warned = False
        self._thread = threading.Thread(target=self._write_all, name="receipts", daemon=True)
        self._thread.start()

    def append(self, receipt: Receipt) -> None:
        """Write this behind the caller's back. Returns at once, and drops it where too many wait."""
        try:
            self._waiting.put_nowait(receipt)
        except queue.Full:
            self._metrics.count("receipts_dropped_total")

    def close(self) -> None:
        """Write what waits, and close the file; gives up after a few seconds where the device hangs."""
        try:
            self._waiting.put(None, timeout=CLOSE_SECONDS)
        except queue.Full:
            return
        self._thread.join(CLOSE_SECONDS)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        while (receipt := self._waiting.get()) is not None:
            try:
                self._write(msgspec.json.encode(receipt) + b"\n")
            except OSError as error:
                self._metrics.count("receipts_dropped_total")
                self._warn(error)
                self._shut()  # the next line tries anew: the disk may have room again, the folder be back
        self._shut()

    def _write(self, line: bytes) -> None:
        if len(line) > min(LINE_BYTES_MAX, self._bytes_max):
            self._metrics.count("receipts_dropped_total")
            return
        if self._file is None:
            self._file = self._open()
        if os.fstat(self._file).st_size + len(line) > self._bytes_max:
            self._shut()
            self._path.replace(older(self._path))
            self._file = self._open()
        whole = b"\n" + line if self._torn else line
        self._torn = True
        if os.write(self._file, whole) != len(whole):
            raise OSError("the line was cut short")
        self._torn = False

    def _open(self) -> int:
        """Append to a regular file of ours: a link is not followed, a pipe not waited for."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(self._path, flags, 0o600)
        try:
            self._torn = _is_torn(file)
        except OSError:
            os.close(file)
            raise
        return file

    def _shut(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            LOG.warning("receipts are not written to %s: %s", self._path, error.strerror or error)


def _is_torn(file: int) -> bool:
    """True where the last line has no end. Raises OSError for what is no regular file."""
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode):
        raise OSError("it is not a regular file")
    return found.st_size > 0 and os.pread(file, 1, found.st_size - 1) != b"\n"
