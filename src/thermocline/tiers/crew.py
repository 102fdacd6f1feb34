"""A crew of threads for calls that wait on a device: side by side they take as long as the slowest, not as all."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable

Task = Callable[[], object]


class Crew:
    """Helps one caller. The threads are daemons: a device that hangs cannot keep the process from ending."""

    def __init__(self, threads: int, *, name: str) -> None:
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._serve, name=name, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def run(self, tasks: Iterable[Task]) -> None:
        """Do all of them, each from the moment it is there, and wait for all; the caller lends a hand.

        Raises what one of them raised, or what came instead of the next one, after all have ended.
        """
        count = 0
        try:
            for task in tasks:
                self._tasks.put(task)
                count += 1
        finally:
            while (waiting := self._next_waiting()) is not None:
                self._results.put(_tried(waiting))
            failures = [self._results.get() for _ in range(count)]
        for failure in failures:
            if failure is not None:
                raise failure

    def close(self) -> None:
        """End the threads. Only while no `run` is under way."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _next_waiting(self) -> Task | None:
        try:
            return self._tasks.get_nowait()
        except queue.Empty:
            return None

    def _serve(self) -> None:
        while (task := self._tasks.get()) is not None:
            self._results.put(_tried(task))


def _tried(task: Task) -> Exception | None:
    try:
        task()
    except Exception as error:  # noqa: BLE001  # handed to the caller of `run`, who raises it
        return error
    return None
