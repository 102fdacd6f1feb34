"""A real redis-server of a test's own, which can be frozen, killed, restarted and told to refuse.

It listens on a free port of loopback and on a Unix socket, keeps nothing on disk, and is gone when the test is. A test
without a redis-server on this machine is skipped, and says so.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import pytest

from thermocline.clock import SystemClock

CLOCK = SystemClock()
READY_SECONDS = 20.0
NAMES = ("redis-server", "valkey-server")
Word = str | bytes | int


def program() -> str | None:
    """The server's program, if this machine has one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class RedisError(Exception):
    """The server answered with an error."""


Reply = bytes | int | list["Reply"] | RedisError | None


class RedisServer:
    """Started with the object, with these options of redis.conf; ended by `close`, whatever state it is in."""

    def __init__(self, folder: Path, **options: str) -> None:
        found = program()
        if found is None:
            pytest.skip("no redis-server on this machine (Debian: apt-get install redis-server)")
        self._program = found
        self._options = options
        self.port = _free_port()
        self.socket_path = folder / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return "127.0.0.1", self.port

    @property
    def url(self) -> str:
        """Its URL over loopback, without a password."""
        return f"redis://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Its process."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what a test does to it ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it, empty, on the same port as before; returns when it answers."""
        argv = [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket_path)]
        fixed = {"save": "", "appendonly": "no", "daemonize": "no", "dir": str(self.socket_path.parent)}
        for name, value in (fixed | self._options).items():
            argv += [f"--{name.replace('_', '-')}", value]
        self._process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = CLOCK.now() + READY_SECONDS
        while True:
            try:
                self.call("PING")
            except (OSError, RedisError) as error:
                if isinstance(error, RedisError) and str(error).startswith(("NOAUTH", "LOADING")):
                    return
                assert self._process.poll() is None, "redis-server ended as soon as it was started"
                assert CLOCK.now() < deadline, "redis-server does not answer"
                CLOCK.sleep(0.01)
            else:
                return

    def kill(self) -> None:
        """SIGKILL: all it held is gone, its connections are reset, connecting is refused."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self.socket_path.unlink(missing_ok=True)

    def restart(self) -> None:
        """Kill it and start it again, empty."""
        self.kill()
        self.start()

    def freeze(self) -> None:
        """SIGSTOP: the kernel goes on accepting connections and bytes, and nobody answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT: it answers what has piled up."""
        self._signal(signal.SIGCONT)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Frozen, and thawed again whatever happens."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def config(self, name: str, value: str) -> None:
        """CONFIG SET."""
        self.call("CONFIG", "SET", name, value)

    def keys(self, pattern: str) -> list[bytes]:
        """The keys that it holds and that look like this."""
        found = self.call("KEYS", pattern)
        assert isinstance(found, list)
        return [key for key in found if isinstance(key, bytes)]

    def call(self, *words: Word, seconds: float = 5.0) -> Reply:
        """One command on a connection of its own, over the Unix socket. Raises RedisError for an error reply."""
        (reply,) = self.calls([words], seconds=seconds)
        if isinstance(reply, RedisError):
            raise reply
        return reply

    def calls(self, commands: Iterable[Sequence[Word]], *, seconds: float = 30.0) -> list[Reply]:
        """Many commands in one go; error replies are among the answers."""
        sent = list(commands)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(seconds)
            connection.connect(str(self.socket_path))
            connection.sendall(b"".join(map(_encoded, sent)))
            with connection.makefile("rb") as file:
                return [_reply(file) for _ in sent]

    def close(self) -> None:
        """End it, frozen or not. A second call does nothing."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self.thaw()
            self._process.kill()
            self._process.wait()
            self._process = None

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)


def _encoded(words: Sequence[Word]) -> bytes:
    parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"".join([b"*%d\r\n" % len(parts), *(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)])


def _reply(file) -> Reply:
    line = file.readline()
    kind, rest = line[:1], line[1:].rstrip()
    if kind == b"-":
        return RedisError(rest.decode())
    if kind == b":":
        return int(rest)
    if kind == b"$":
        return None if rest == b"-1" else file.read(int(rest) + 2)[:-2]
    if kind == b"*":
        return [_reply(file) for _ in range(int(rest))]
    if kind != b"+":
        raise ConnectionError(f"no reply: {line!r}")
    return rest


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
