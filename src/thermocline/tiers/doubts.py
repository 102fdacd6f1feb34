"""A bad sector costs one block for good. A dead device costs none: it may come back with all that it had."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence

UNREADABLE = frozenset({errno.EIO, errno.ENODATA, errno.EILSEQ, errno.EREMOTEIO})
"""What a medium says of a sector that it cannot read; other errors are the system's."""

DOUBTED_MAX = 65_536


class Doubts:
    """Places that could not be read. One that fails again after the device has read others is damaged."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._doubted: dict[int, int] = {}  # with the number of good reads before
        self._good_reads = 0
        self._answers = True

    def could_not_read(self, places: Sequence[int]) -> None:
        """One read of several places failed: at least one of them is to blame, or the device."""
        with self._lock:
            for place in places[: DOUBTED_MAX - len(self._doubted)]:
                self._doubted.setdefault(place, self._good_reads)

    def is_damaged(self, place: int) -> bool:
        """A read of this place alone failed. True where it did before, and the device reads others meanwhile.

        The last read of a single place has to be a good one: then an outage, however often it comes, costs no more than
        the block that met it first.
        """
        with self._lock:
            damaged = self._answers and self._doubted.get(place, self._good_reads) < self._good_reads
            self._answers = False
            if damaged:
                self._doubted.pop(place)
        if not damaged:
            self.could_not_read([place])
        return damaged

    def could_read(self, place: int) -> None:
        """A place was read, alone or with others."""
        if self._doubted:  # as it hardly ever is: loads wait for no lock
            with self._lock:
                self._doubted.pop(place, None)
                self._good_reads += 1
                self._answers = True
