"""Time as an input. The only module that imports `time`: everything else is given a `Clock`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """Where time comes from."""

    def now(self) -> float:
        """Seconds on a clock that never goes back. Only differences mean something."""

    def wall(self) -> float:
        """Seconds since 1970, comparable between processes and restarts."""

    def cpu(self) -> float:
        """CPU seconds this process has used, all threads together."""

    def sleep(self, seconds: float) -> None:
        """Wait. A manual clock moves itself forward instead."""


class SystemClock:
    """The machine's clocks."""

    __slots__ = ()

    now = staticmethod(time.perf_counter)
    wall = staticmethod(time.time)
    cpu = staticmethod(time.process_time)
    sleep = staticmethod(time.sleep)


def until(true: Callable[[], object], seconds: float, *, pause_seconds: float) -> bool:
    """Ask again and again, with a pause in between, until the answer is true; False where it was not for so long."""
    clock = SystemClock()
    deadline = clock.now() + seconds
    while not true():
        if clock.now() > deadline:
            return False
        clock.sleep(pause_seconds)
    return True


class ManualClock:
    """A clock that a test or the simulator moves by hand."""

    __slots__ = ("seconds",)

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def now(self) -> float:
        """The seconds set so far."""
        return self.seconds

    wall = now
    cpu = now

    def sleep(self, seconds: float) -> None:
        """Move forward without waiting."""
        self.seconds += seconds
