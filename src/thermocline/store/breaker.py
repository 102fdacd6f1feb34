"""A breaker per tier and verb: after failures in a row the tier is left alone for a while, then tried once."""

from __future__ import annotations

import math
from dataclasses import dataclass

FAILURES_MAX = 3
OPEN_SECONDS_MIN = 1.0
OPEN_SECONDS_MAX = 60.0
CLOSED = float("-inf")


@dataclass(slots=True)
class Breaker:
    """A state machine over times that it is given; it reads no clock."""

    failures: int = 0
    open_until: float = CLOSED
    open_seconds: float = OPEN_SECONDS_MIN
    opened_at: float = CLOSED

    @property
    def closed(self) -> bool:
        """True while nothing speaks against the tier."""
        return self.open_until == CLOSED

    def allows(self, now: float) -> bool:
        """False while the tier is left alone; then it may be tried."""
        return now >= self.open_until

    def trying(self, now: float) -> None:
        """A request is about to use the tier. After failures it is the only one, until it is answered or late."""
        if self.open_until != CLOSED:
            self.open_until = now + self.open_seconds

    def succeeded(self) -> None:
        """The tier answered: forget its failures."""
        self.failures = 0
        self.open_until = CLOSED
        self.open_seconds = OPEN_SECONDS_MIN

    def failed(self, now: float, started: float = math.inf) -> bool:
        """The tier failed or was late. True if that opened the breaker; each time it stays open twice as long.

        What was `started` before the breaker opened last says nothing new: many requests may fail of one hiccup.
        """
        if started < self.opened_at:
            return False
        self.failures += 1
        if self.failures < FAILURES_MAX:
            return False
        self.opened_at = now
        self.open_until = now + self.open_seconds
        self.open_seconds = min(2 * self.open_seconds, OPEN_SECONDS_MAX)
        self.failures = FAILURES_MAX - 1  # the one request that tries again may fail once
        return True
