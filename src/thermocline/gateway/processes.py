"""Several gateways on one address: the kernel spreads connections over them, and all of them hear the same events.

Each decides for itself. What the others have sent shows in the events, in how long answers take, and in nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from thermocline.clock import SystemClock
from thermocline.errors import SettingsError, ThermoclineError
from thermocline.gateway.serve import announce
from thermocline.settings import Settings, without_settings
from thermocline.wire.sockets import listening

LOG = logging.getLogger("thermocline.gateway")
LOOK_SECONDS, AGAIN_SECONDS, STOP_SECONDS = 0.1, 1.0, 15.0


def serve_many(settings: Settings, admin_path: Path, *, shared: bool = False, as_json: bool = False) -> None:
    """Run so many gateways until SIGINT or SIGTERM; one that dies is started again.

    Each is administered at a socket of its own: `admin_path` with its number behind the name. Raises ThermoclineError
    where one of them does not start, and SettingsError where this is one of several (`shared`) itself.
    """
    if shared:
        raise SettingsError("one of several gateways is one process", hint="leave --shared out, or gateway_processes")
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with contextlib.ExitStack() as stack:
        sock = stack.enter_context(contextlib.closing(listening(settings.host, settings.port, shared=True)))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="thermocline-")))
        inner = dataclasses.replace(settings, port=sock.getsockname()[1], gateway_processes=1)
        if settings.events_listen:
            from thermocline.wire.forward import Forwarder

            goes = f"ipc://{folder / 'events'}"
            stack.callback(Forwarder(settings.events_listen, goes).close)
            inner = dataclasses.replace(inner, events_listen=f">{goes}")
        numbers = range(settings.gateway_processes)
        own = [dataclasses.replace(inner, admin_socket=numbered(admin_path, number)) for number in numbers]
        children = _Children([_words(each) for each in own])
        stack.callback(children.close)
        children.wait_ready()
        announce(sock, numbered(admin_path, 0), as_json=as_json)
        while not stop.wait(LOOK_SECONDS):
            children.look()


def numbered(admin_path: Path, number: int) -> Path:
    """Where the gateway of that number is administered."""
    return admin_path.with_name(f"{admin_path.stem}-{number}{admin_path.suffix}")


def _words(settings: Settings) -> list[str]:
    return [sys.executable, "-m", "thermocline", "route", "--shared", "--json", *settings.flags()]


class _Children:
    """The processes. Each says on stdout when it listens, and ends when its stdin does: with whoever started it."""

    def __init__(self, words: list[list[str]]) -> None:
        self._words, self._clock = words, SystemClock()
        self._running = [self._start(each) for each in words]
        self._started = [self._clock.now()] * len(words)

    def wait_ready(self) -> None:
        """Until each has told its address. Raises ThermoclineError where one has ended instead."""
        for child in self._running:
            assert child.stdout is not None
            if not child.stdout.readline():
                raise ThermoclineError("a gateway did not start", hint="what it said of that stands above")

    def look(self) -> None:
        """Start again what has died, no more often than once a second each."""
        now = self._clock.now()
        for at, child in enumerate(self._running):
            if child.poll() is not None and now > self._started[at] + AGAIN_SECONDS:
                LOG.warning("a gateway ended with %s; it is started again", child.returncode)
                _close(child)
                self._running[at], self._started[at] = self._start(self._words[at]), now

    def close(self) -> None:
        """End them: in good order, within a bound."""
        for child in self._running:
            child.terminate()
        deadline = self._clock.now() + STOP_SECONDS
        for child in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.1, deadline - self._clock.now()))
            child.kill()
            child.wait()
            _close(child)

    @staticmethod
    def _start(words: list[str]) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        return subprocess.Popen(words, stdin=pipe, stdout=pipe, env=without_settings(os.environ))  # noqa: S603  # ourselves


def _close(child: subprocess.Popen[bytes]) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
