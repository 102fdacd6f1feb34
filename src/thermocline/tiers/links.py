"""A few open links to a server, made ahead of their use: requests borrow them, and never connect."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from thermocline.clock import Clock
from thermocline.wire.resp import Link, encode


class Links:
    """`number` links that `make` opens. Any thread may borrow; one thread mends."""

    def __init__(self, make: Callable[[], Link], number: int, *, clock: Clock, lost: Callable[[], object]) -> None:
        """`lost` is called when links were dropped, so that somebody mends soon."""
        self._make = make
        self._number = number
        self._clock = clock
        self._lost = lost
        self._changed = threading.Condition()
        self._ready: list[Link] = []
        self._lent: set[Link] = set()
        self._doomed: set[Link] = set()  # lent, and to be closed when they come back
        self._closed = False

    @property
    def up(self) -> bool:
        """True while there is a link, ready or lent."""
        return bool(self._ready or self._lent)

    @property
    def whole(self) -> bool:
        """True while none is missing."""
        return len(self._ready) + len(self._lent - self._doomed) >= self._number

    @contextlib.contextmanager
    def lent(self, deadline: float) -> Iterator[Link | None]:
        """A link for the time of the block; None where there is none, or none was free by `deadline`.

        After an OSError in the block its link is closed. Where the server is silent or gone, all are dropped: nobody
        should wait as long again to find that out. A caller whose own time ran out says nothing about the others.
        """
        link = self._take(deadline)
        if link is None:
            yield None
            return
        whole = False
        try:
            yield link
            whole = True
        except OSError as error:
            if link.silent or not isinstance(error, TimeoutError):
                self.drop()
            raise
        finally:
            self._give(link, whole=whole)

    def mend(self) -> None:
        """Open what is missing. Raises OSError."""
        while not self.whole:
            link = self._make()
            with self._changed:
                if self._closed:
                    link.close()
                    return
                self._ready.append(link)
                self._changed.notify()

    def ping(self, seconds: float) -> None:
        """See that the idle ones still answer, each within `seconds`; where one does not, all are dropped."""
        with self._changed:
            idle, self._ready = self._ready, []
            self._lent.update(idle)
        well = True
        for link in idle:
            well = well and _answers(link, self._clock.now() + seconds)
            self._give(link, whole=well)
        if not well:
            self.drop()

    def drop(self) -> None:
        """Close all; those that are lent when they come back."""
        with self._changed:
            idle, self._ready = self._ready, []
            self._doomed |= self._lent
            self._changed.notify_all()
        for link in idle:
            link.close()
        self._lost()

    def close(self) -> None:
        """No links any more."""
        self._closed = True
        self.drop()

    def _take(self, deadline: float) -> Link | None:
        with self._changed:
            while not self._ready:
                left = deadline - self._clock.now()
                if not self._lent or left <= 0 or self._closed:
                    return None
                self._changed.wait(left)
            link = self._ready.pop()  # the one used last: the others go cold, as they may
            self._lent.add(link)
            return link

    def _give(self, link: Link, *, whole: bool) -> None:
        with self._changed:
            self._lent.discard(link)
            keep = whole and link.usable and link not in self._doomed and not self._closed
            self._doomed.discard(link)
            if keep:
                self._ready.append(link)
            self._changed.notify()
        if not keep:
            link.close()
            self._lost()


def _answers(link: Link, deadline: float) -> bool:
    try:
        link.send([encode(b"PING")], deadline)
        link.reply(deadline)
    except OSError:
        return False
    return True
