"""Trouble that does not stop: something done again and again while a test goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count


@contextmanager
def constantly(act: Callable[[], object], pause_seconds: float = 0.01) -> Iterator[None]:
    """`act` again and again, in a thread. Fails where it was never done."""
    stop = threading.Event()
    done = count()

    def work() -> None:
        while not stop.is_set():
            act()
            next(done)
            stop.wait(pause_seconds)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert next(done) > 0
