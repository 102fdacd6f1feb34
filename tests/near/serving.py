"""`thermocline near serve` as a process of a test's own, and a reader of replies that keeps their types."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Self

from tests.faults.process import Process

READY_SECONDS = 30.0


class NearServer(Process):
    """Started with the object, on a free port; ended by `close`."""

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(folder / "near.log", stop_seconds=5.0)
        port = () if "--unix-socket" in options else ("--port", "0")
        argv = [sys.executable, "-m", "thermocline", "near", "serve", "--json", *port, *options]
        self.launch(argv, self._said, seconds=READY_SECONDS, environment={"PYTHONUNBUFFERED": "1"})
        self.url = json.loads(self.log.read_text().splitlines()[0])["url"]

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rpartition(":")[2])

    def _said(self) -> bool:
        return self.log.exists() and self.log.read_text().endswith("}\n")

    def memory_bytes(self) -> int:
        """What the process has in memory now."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * 4096


class Wire:
    """A client that sees bytes: each reply is (mark, value), so that a status is told from a bulk string."""

    def __init__(self, port: int, *, seconds: float = 20.0) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=seconds)
        self.file = self.sock.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        self.sock.close()

    def send(self, *words: str | bytes | float) -> None:
        """One request."""
        self.sock.sendall(encoded(*words))

    def ask(self, *words: str | bytes | float):
        """One request and its reply."""
        self.send(*words)
        return self.read()

    def read(self):
        """The next reply, or push."""
        line = self.file.readline()
        if not line:
            raise ConnectionResetError
        mark, rest = line[:1].decode(), line[1:-2]
        if mark in "+-:,_#(":
            return mark, rest
        size = int(rest)
        if size < 0:
            return mark, None
        if mark in "$=":
            return mark, self.file.read(size + 2)[:-2]
        return mark, [self.read() for _ in range(2 * size if mark == "%" else size)]


def encoded(*words: str | bytes | float) -> bytes:
    """A request."""
    parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"".join([b"*%d\r\n" % len(parts), *(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)])
