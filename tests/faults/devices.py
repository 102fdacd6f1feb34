"""A device in trouble under the disk tier's file calls, and a witness of how late this machine itself is.

`TroubledDevice` lets reads, writes and syncs hang until they are let go, take their time, fail, or do half of what
they were asked, each as the test says and the seed decides. `Witness` tells stalls of the machine from those of a tier:
it is another process that only sleeps, and writes down when it was woken late or threads of this one were kept from
running.
"""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass

from tests.conformance.samples import CLOCK, PATIENCE_SECONDS

READ, WRITE, SYNC = "read", "write", "sync"
HALF = -1
_CALLS = {
    "preadv": READ,
    "pwritev": WRITE,
    "pwrite": WRITE,
    "write": WRITE,
    "posix_fallocate": WRITE,
    "ftruncate": WRITE,
    "rename": WRITE,
    "fdatasync": SYNC,
    "fsync": SYNC,
}
_HALVED = {"pwrite", "write"}


@dataclass(frozen=True)
class Trouble:
    """What calls of one kind suffer: `delay_seconds` at most, and these chances of an error or of half a write."""

    delay_seconds: float = 0.0
    errors: float = 0.0
    halves: float = 0.0


class TroubledDevice:
    """All files of this process lie on it while it is `installed`."""

    def __init__(self, seed=0):
        self.trouble = dict.fromkeys((READ, WRITE, SYNC), Trouble())
        self.waiting = 0
        self.failed = 0
        self.calls: list[str] = []
        self.plan = lambda _number: 0
        """The error number of the call with that number, HALF for half of a write, 0 for none."""
        self._random = random.Random(seed)  # noqa: S311  # must replay
        self._gates = {kind: threading.Event() for kind in self.trouble}
        self._lock = threading.Lock()
        self.resume()

    @contextmanager
    def installed(self, monkeypatch):
        """Put it under `os`; at the end nothing hangs any more."""
        with monkeypatch.context() as patch:
            for name, kind in _CALLS.items():
                patch.setattr(os, name, self._through(name, kind, getattr(os, name)))
            try:
                yield self
            finally:
                self.resume()

    def hang(self, *kinds):
        """Calls of these kinds do not come back until `resume`."""
        for kind in kinds:
            self._gates[kind].clear()

    def resume(self):
        """Nothing hangs, is slow or fails."""
        self.trouble = dict.fromkeys(self.trouble, Trouble())
        for gate in self._gates.values():
            gate.set()

    def until_hanging(self, calls=1):
        """Wait until that many calls hang."""
        deadline = CLOCK.now() + PATIENCE_SECONDS
        while self.waiting < calls:
            assert CLOCK.now() < deadline, f"{self.waiting} calls hang, not {calls}"
            CLOCK.sleep(0.001)

    def _through(self, name, kind, real):
        def call(*arguments):
            if not self._gates[kind].is_set():
                self._wait(kind)
            trouble = self.trouble[kind]
            if trouble.delay_seconds:
                CLOCK.sleep(self._random.uniform(0, trouble.delay_seconds))
            error = self._error(name, kind, trouble)
            if error == HALF:
                fd, data, *rest = arguments
                return real(fd, data[: len(data) // 2], *rest)
            if error:
                raise OSError(error, "planted")
            return real(*arguments)

        return call

    def _error(self, name, kind, trouble):
        with self._lock:
            self.calls.append(name)
            error = self.plan(len(self.calls) - 1)
            if self._random.random() < trouble.errors:
                error = self._random.choice((errno.EIO, errno.EIO if kind == READ else errno.ENOSPC))
            elif self._random.random() < trouble.halves:
                error = HALF
            if error == HALF and name not in _HALVED:
                error = 0
            self.failed += bool(error)
        return error

    def _wait(self, kind):
        with self._lock:
            self.waiting += 1
        try:
            assert self._gates[kind].wait(2 * PATIENCE_SECONDS), "a test forgot a hanging device"
        finally:
            with self._lock:
                self.waiting -= 1


_WITNESS = """
import glob, select, sys, time

def waited():  # nanoseconds that each thread could have run and had no processor
    found = {}
    for path in glob.glob(f"/proc/{sys.argv[1]}/task/*/schedstat"):
        try:
            with open(path) as file:
                found[path] = int(file.read().split()[1])
        except OSError:
            pass
    return found

print("ready", flush=True)
before = waited()
while not select.select([sys.stdin], [], [], 0)[0]:
    begin = time.perf_counter()
    time.sleep(0.002)
    end = time.perf_counter()
    if end - begin > 0.012:
        print(begin, end, flush=True)
    now = waited()
    for path, nanoseconds in now.items():
        seconds = (nanoseconds - before.get(path, nanoseconds)) / 1e9
        if seconds > 0.005:
            print(begin - seconds, time.perf_counter(), flush=True)
    before = now
"""


class Witness:
    """When the machine was late: it woke a sleeper late, or a thread of this process was ready and got no processor."""

    def __enter__(self):
        command = [sys.executable, "-c", _WITNESS, str(os.getpid())]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._child.stdout.readline() == "ready\n"
        self._lines = []
        self._reader = threading.Thread(target=lambda: self._lines.extend(self._child.stdout))
        self._reader.start()
        return self

    def __exit__(self, *_):
        CLOCK.sleep(0.02)  # it may be about to tell of the end
        self._child.stdin.close()
        self._reader.join()
        self._child.wait()
        self._child.stdout.close()
        self.stalls = _merged(sorted(tuple(map(float, line.split())) for line in self._lines))

    def stalled_seconds(self, begin, end):
        """How long of that time the machine did not even wake a sleeper."""
        return sum(max(0.0, min(end, stop) - max(begin, start)) for start, stop in self.stalls)

    @property
    def worst_seconds(self):
        """The longest stall."""
        return max((end - begin for begin, end in self.stalls), default=0.0)


def _merged(stalls):
    merged = []
    for begin, end in stalls:
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
