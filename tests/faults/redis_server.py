"""A real redis-server of a test's own, which can be frozen, killed, restarted and told to refuse.

It listens on a free port of loopback and on a Unix socket, keeps nothing on disk, and is gone when the test is. A test
without a redis-server on this machine is skipped, and says so.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from tests.faults.process import Process

READY_SECONDS = 20.0
NAMES = ("redis-server", "valkey-server")
Word = str | bytes | int


def program() -> str | None:
    """The server's program, if this machine has one."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class RedisError(Exception):
    """The server answered with an error."""


Reply = bytes | int | list["Reply"] | RedisError | None


class RedisServer(Process):
    """Started with the object, with these options of redis.conf; ended by `close`, whatever state it is in."""

    def __init__(self, folder: Path, **options: str) -> None:
        found = program()
        if found is None:
            pytest.skip("no redis-server on this machine (Debian: apt-get install redis-server)")
        super().__init__(folder / "redis.log")
        self._program = found
        self._options = options
        self.port = _free_port()
        self.socket_path = folder / "redis.sock"
        self.start()

    @property
    def address(self) -> tuple[str, int]:
        """Where it listens."""
        return "127.0.0.1", self.port

    @property
    def url(self) -> str:
        """Its URL over loopback, without a password."""
        return f"redis://127.0.0.1:{self.port}"

    # -- what a test does to it ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start it, empty, on the same port as before; returns when it answers."""
        argv = [self._program, "--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket_path)]
        fixed = {"save": "", "appendonly": "no", "daemonize": "no", "dir": str(self.socket_path.parent)}
        for name, value in (fixed | self._options).items():
            argv += [f"--{name.replace('_', '-')}", value]
        self.launch(argv, self._answers, seconds=READY_SECONDS, environment={})

    def kill(self) -> None:
        """SIGKILL: all it held is gone, its connections are reset, connecting is refused."""
        super().kill()
        self.socket_path.unlink(missing_ok=True)

    def restart(self) -> None:
        """Kill it and start it again, empty."""
        self.kill()
        self.start()

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

    def _answers(self) -> bool:
        try:
            self.call("PING")
        except RedisError as error:
            return str(error).startswith(("NOAUTH", "LOADING"))
        except OSError:
            return False
        return True


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
