"""The keeper: attaches to a node, leaves it alone while it is not well, attaches again. No request waits for it."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from pathlib import Path

from thermocline.clock import Clock
from thermocline.errors import NodeError
from thermocline.node.link import Link
from thermocline.wire import messages as say

LOG = logging.getLogger("thermocline.node")
RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.05, 1.0
REFUSED_SECONDS = 10.0
STEADY_SECONDS = 1.0
"""A link that ended sooner was of no use: the next is not made at once."""
AWAY_SECONDS_MIN, AWAY_SECONDS_MAX = 0.05, 10.0
"""How long a node that was late is left alone before it is tried again, in the background."""
WELL_ANSWERS, WELL_SECONDS = 32, 10.0
"""After so many answers in time, or so long without a late one, a node that was late is trusted as before."""
HUNG_SECONDS = 30.0
"""A node that is silent for so long is given up: another one may listen there by now."""


class Keeper:
    """Owns the link of one client. `link` is what requests use: None while there is none, or it is not trusted."""

    def __init__(
        self,
        path: Path,
        role: str,
        clock: Clock,
        wait_seconds: float,
        attached: Callable[[Link], object],
        parted: Callable[[Link], object],
    ) -> None:
        self._path, self._role, self._clock, self._wait_seconds = path, role, clock, wait_seconds
        self._attached, self._parted = attached, parted
        self.link: Link | None = None
        self._any_link: Link | None = None
        self._changed = threading.Condition()
        self._suspected_at = -math.inf
        self._away_seconds = AWAY_SECONDS_MIN
        self._answers = 0
        self._trusted_since = 0.0
        self._closing = False
        self._said = ""
        self._thread = threading.Thread(target=self._serve, name="node keeper", daemon=True)
        self._thread.start()

    def wait_up(self, seconds: float) -> bool:
        """Wait until the link is trusted; False if `seconds` passed first."""
        with self._changed:
            return self._changed.wait_for(lambda: self.link is not None, seconds)

    def answered(self) -> None:
        """The node answered in time."""
        self._answers += 1
        if self._answers >= WELL_ANSWERS:
            self._away_seconds = AWAY_SECONDS_MIN

    def suspect(self, started: float) -> None:
        """The node was late with what it was asked at `started`. Many may be late of one hiccup: it counts once."""
        with self._changed:
            if started < self._suspected_at or self.link is None:
                return
            self._suspected_at = self._clock.now()
            if self._suspected_at - self._trusted_since > WELL_SECONDS:
                self._away_seconds = AWAY_SECONDS_MIN
            self._answers = 0
            self.link = None
            self._changed.notify_all()

    def close(self) -> None:
        """End the link and the thread. A second call does nothing."""
        with self._changed:
            self._closing = True
            link, self.link = self._any_link, None
            self._changed.notify_all()
        if link is not None:
            link.end()
        self._thread.join(2.0)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        pause, attached = 0.0, -math.inf
        while not self._closing:
            if self._any_link is None or self._any_link.ended:
                self._pause(pause)
                pause = min(max(2 * pause, RETRY_SECONDS_MIN), RETRY_SECONDS_MAX)
                attached = self._clock.now() if self._connect() else attached
            elif self.link is None:
                self._probe(self._any_link)
            else:
                with self._changed:
                    self._changed.wait_for(lambda: self._closing or self.link is None)
                pause = 0.0 if self._clock.now() - attached > STEADY_SECONDS else pause

    def _connect(self) -> bool:
        try:
            link = Link(self._path, self._role, wait_seconds=self._wait_seconds, on_end=self._ended)
        except NodeError as error:
            self._say(f"{error.message}; hint: {error.hint}")
            self._pause(REFUSED_SECONDS)
            return False
        except OSError as error:
            self._say(f"no node at {self._path} ({error.strerror or error}); requests go on without it")
            return False
        try:
            self._attached(link)
        except Exception:  # no memory to map, say: the engine goes on without a node, and it is tried again
            LOG.exception("the node's memory cannot be used")
            link.end()
            return False
        self._away_seconds, self._answers = AWAY_SECONDS_MIN, 0  # what another life did says nothing of this one
        with self._changed:
            self._any_link = link
            self._trusted_since = self._clock.now()
            self.link = None if link.ended or self._closing else link
            self._changed.notify_all()
        if self._closing:
            link.end()
        self._said = ""
        LOG.info("attached to the node at %s", self._path)
        return True

    def _ended(self, link: Link) -> None:
        with self._changed:
            if self._any_link is link:
                self._any_link = self.link = None
            self._changed.notify_all()
        self._parted(link)

    def _probe(self, link: Link) -> None:
        """Leave the node alone for a while, then ask if it is there. Trust it once it answers as fast as it should."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._any_link is not link, self._away_seconds)
        self._away_seconds = min(2 * self._away_seconds, AWAY_SECONDS_MAX)
        came = threading.Event()
        asked = self._clock.now()
        link.ask(say.Ping, lambda _: came.set())
        if not came.wait(HUNG_SECONDS):
            link.end()
            return
        if self._clock.now() - asked <= self._wait_seconds and not link.ended:
            with self._changed:
                self._trusted_since = self._clock.now()
                self.link = None if self._any_link is not link else link
                self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing, seconds)

    def _say(self, text: str) -> None:
        """Log a state once, not every time it is found unchanged."""
        if text != self._said:
            LOG.warning("%s", text)
        self._said = text
