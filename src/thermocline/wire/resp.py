"""The Redis protocol (RESP2) for a client that moves large values: pipelines out, replies straight into its memory.

    Address   where a server is, from a URL
    connect   an open link: TCP, TLS or Unix socket, authenticated, its database chosen
    Link      sends requests and receives replies, each within a deadline and never idle for longer than a gap

Whatever goes wrong is an OSError (TimeoutError where time ran out), and leaves the link in a state that nobody knows:
close it. Every length is checked before memory is taken for it. Works with Redis 5 and later, and Valkey.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from thermocline.errors import SettingsError

LINE_BYTES_MAX = 8192
"""The longest line of a reply. Also what is received ahead: the head of the next reply comes with the value before."""

BULK_BYTES_MAX = 64 << 10
"""The longest value that `reply` takes; larger ones go through `value_into`, to memory that the caller has."""

ARRAY_MAX, INNER_ARRAY_MAX, DEPTH_MAX = 4096, 16, 2
BUFFERS_MAX = 1000  # the kernel takes 1,024 per call
PORT_DEFAULT = 6379
DIGITS_MAX = 19
SECONDS_MIN = 1e-4
"""A timeout of zero would mean not to wait at all."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is, and how to be let in. `path` is that of a Unix socket; without it `host` and `port` count."""

    host: str
    port: int
    path: str = ""
    tls: bool = False
    user: str = ""
    database: int = 0
    password: str | None = field(default=None, repr=False)
    ca_file: Path | None = None

    @classmethod
    def parse(cls, url: str, *, password: str | None = None, ca_file: Path | None = None) -> Address:
        """From redis://host:6379/0, rediss://user@host, unix:///path/to.sock. Raises SettingsError with a hint."""
        hint = "write it as redis://127.0.0.1:6379/0, rediss://host (TLS), or unix:///path/to/socket"
        try:
            parts = urlsplit(url)
            port, host = parts.port or PORT_DEFAULT, parts.hostname or ""
            host.encode("idna")
        except ValueError:  # what it says may quote a part of a password
            raise SettingsError("the address of the Redis server cannot be read", hint=hint) from None
        if parts.password:
            hint = "put the password into a file that only this user can read, and name it in redis_password_file"
            raise SettingsError("a password in redis_url would be shown wherever settings are", hint=hint)
        unix = parts.scheme == "unix"
        database = "" if unix else parts.path.strip("/")
        known = parts.scheme in {"redis", "rediss", "unix"} and bool(parts.path and not host if unix else host)
        if not known or parts.query or parts.fragment or (database and not database.isdecimal()):
            raise SettingsError(f"{url!r} is not the address of a Redis server", hint=hint)
        path = unquote(parts.path) if unix else ""
        user, tls = unquote(parts.username or ""), parts.scheme == "rediss"
        return cls(host, port, path, tls, user, int(database or 0), password, ca_file)


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error reply: its first word, which says what kind it is, and the whole line."""

    code: str
    text: str


def _refusal(line: bytes) -> Refusal:
    """Without what some servers quote of the command: it may be a password, or a key."""
    text = line.decode(errors="replace").partition(", with args")[0]
    return Refusal(text.partition(" ")[0], text)


Reply = int | bytes | Refusal | list["Reply"] | None


def encode(*parts: bytes) -> bytes:
    """A command."""
    return b"".join([b"*%d\r\n" % len(parts), *(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)])


def tls_of(address: Address) -> ssl.SSLContext | None:
    """What checks the server's certificate; None without TLS. Raises OSError where the CA file cannot be read."""
    if not address.tls:
        return None
    return ssl.create_default_context(cafile=None if address.ca_file is None else str(address.ca_file))


def connect(address: Address, *, now: Callable[[], float], deadline: float, tls: ssl.SSLContext | None = None) -> Link:
    """A link that has answered. Raises OSError; PermissionError where the server refuses user or password.

    `deadline` does not bound how long a host's name is looked up: call it where nobody waits.
    """
    seconds = max(SECONDS_MIN, deadline - now())
    link = Link(_socket(address, seconds, tls), now=now, gap_seconds=seconds)
    try:
        if address.password is not None:
            user = [address.user.encode()] if address.user else []
            _expect_ok(link, deadline, b"AUTH", *user, address.password.encode())
        if address.database:
            _expect_ok(link, deadline, b"SELECT", b"%d" % address.database)
        _expect_ok(link, deadline, b"PING")
    except BaseException:
        link.close()
        raise
    return link


def _socket(address: Address, seconds: float, tls: ssl.SSLContext | None) -> socket.socket:
    if address.path:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(seconds)
            sock.connect(address.path)
        except BaseException:
            sock.close()
            raise
        return sock
    sock = socket.create_connection((address.host, address.port), timeout=seconds)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return sock if tls is None else tls.wrap_socket(sock, server_hostname=address.host)
    except BaseException:
        sock.close()
        raise


def _expect_ok(link: Link, deadline: float, *command: bytes) -> None:
    link.send([encode(*command)], deadline)
    reply = link.reply(deadline)
    if not isinstance(reply, Refusal):
        return
    if reply.code in {"NOAUTH", "WRONGPASS", "NOPERM"} or "password" in reply.text:
        raise PermissionError(errno.EACCES, reply.text)
    raise OSError(errno.EPROTO, reply.text)


class Link:
    """One connection, used by one thread at a time. Requests are answered in their order."""

    __slots__ = (
        "_ahead",
        "_now",
        "_raw",
        "_scatters",
        "_seconds",
        "_sock",
        "_start",
        "_stop",
        "gap_seconds",
        "silent",
        "usable",
    )

    def __init__(self, sock: socket.socket, *, now: Callable[[], float], gap_seconds: float) -> None:
        """`now` is the clock of all deadlines. No wait for the next byte lasts longer than `gap_seconds`."""
        self._sock = sock
        self._now = now
        self.gap_seconds = gap_seconds
        self._scatters = not isinstance(sock, ssl.SSLSocket)
        self._raw = bytearray(LINE_BYTES_MAX)
        self._ahead = memoryview(self._raw)
        self._start = self._stop = 0  # what was received ahead
        self._seconds = -1.0  # the socket's timeout
        self.usable = True
        """False once it is closed, or stands in the middle of a reply."""
        self.silent = False
        """True once most of a gap passed without a byte: it is the server that is slow, not the caller in a hurry."""

    def send(self, buffers: Sequence[bytes | memoryview], deadline: float) -> None:
        """Send all of it. Raises OSError."""
        views = [memoryview(buffer) for buffer in buffers if len(buffer)]
        while views:
            self._be_patient(deadline)
            try:
                sent = self._sock.sendmsg(views[:BUFFERS_MAX]) if self._scatters else self._sock.send(views[0])
            except TimeoutError:
                self.silent = self._seconds > self.gap_seconds / 2
                raise
            views, _ = _behind(views, sent)

    def reply(self, deadline: float, *, depth: int = 0) -> Reply:
        """The next reply, a small one. Raises OSError, also for one that is out of bounds."""
        line = self._line(deadline)
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b":":
            return _number(rest)
        if kind == b"-":
            return _refusal(rest)
        size = _number(rest)
        if size < 0 and kind in b"$*":
            return None
        if kind == b"$" and size <= BULK_BYTES_MAX:
            value = bytearray(size + 2)
            self._fill([memoryview(value)], deadline)
            return bytes(_ended(value))
        if kind == b"*" and size <= (INNER_ARRAY_MAX if depth else ARRAY_MAX) and depth < DEPTH_MAX:
            return [self.reply(deadline, depth=depth + 1) for _ in range(size)]
        raise _broken("a reply that is too large, or none")

    def value_into(self, views: Sequence[memoryview], deadline: float) -> int | Refusal | None:
        """Receive a value into `views`, which together are as long as it should be; returns how long it was.

        None: there is no such value. A shorter value fills nothing that may be used, and is passed over. Of a longer
        one nothing is received, and the link is not `usable` any more. Raises OSError.
        """
        line = self._line(deadline)
        if line[:1] == b"-":
            return _refusal(line[1:])
        if line[:1] != b"$":
            raise _broken("another reply than a value")
        size, wanted = _number(line[1:]), sum(len(view) for view in views)
        if size < 0:
            return None
        if size > wanted:
            self.usable = False
            return size
        end = bytearray(2)
        targets = [*(views if size == wanted else _first(views, size)), memoryview(end)]
        self._fill(targets, deadline)
        _ended(end)
        return size

    def close(self) -> None:
        """Let go of it. A second call does nothing."""
        self.usable = False
        self._sock.close()

    def end(self) -> None:
        """From another thread than the one that uses it: whatever that one waits for fails now. Close it there."""
        self.usable = False
        with contextlib.suppress(OSError):  # it may be closed already
            self._sock.shutdown(socket.SHUT_RDWR)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _be_patient(self, deadline: float) -> None:
        """Give the next call on the socket as long as it may take."""
        seconds = min(deadline - self._now(), self.gap_seconds)
        if seconds <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "no time is left")
        seconds = max(SECONDS_MIN, seconds)
        if seconds != self._seconds:  # it is a system call, and mostly the gap
            self._sock.settimeout(seconds)
            self._seconds = seconds

    def _line(self, deadline: float) -> bytes:
        while True:
            start, stop = self._start, self._stop
            end = self._raw.find(b"\r\n", start, stop)
            if end >= 0:
                self._start = end + 2
                return bytes(self._ahead[start:end])
            if stop - start == LINE_BYTES_MAX:
                raise _broken("a line without an end")
            self._raw[: stop - start] = self._raw[start:stop]
            self._start, self._stop = 0, stop - start
            self._stop += self._receive([self._ahead[self._stop :]], deadline)

    def _fill(self, views: Sequence[memoryview], deadline: float) -> None:
        """Fill all of `views`: with what was received ahead, then from the socket, which brings what follows too."""
        left = self._drain(views) if self._stop > self._start else [view for view in views if len(view)]
        while left:
            more = [self._ahead] if len(left) < BUFFERS_MAX else []
            got = self._receive([*left[:BUFFERS_MAX], *more], deadline)
            left, over = _behind(left, got)
            self._start, self._stop = 0, over

    def _drain(self, views: Sequence[memoryview]) -> list[memoryview]:
        """Fill views with what was received ahead; those that are left."""
        held = self._ahead[self._start : self._stop]
        for view in views:
            part = min(len(view), len(held))
            view[:part] = held[:part]
            held = held[part:]
        taken = self._stop - self._start - len(held)
        self._start += taken
        return _behind(views, taken)[0]

    def _receive(self, views: list[memoryview], deadline: float) -> int:
        self._be_patient(deadline)
        try:
            got = self._sock.recvmsg_into(views)[0] if self._scatters else self._sock.recv_into(views[0])
        except TimeoutError:
            self.silent = self._seconds > self.gap_seconds / 2
            raise
        if not got:
            raise ConnectionResetError(errno.ECONNRESET, "the server closed the connection")
        return got


def _behind(views: Sequence[memoryview], count: int) -> tuple[list[memoryview], int]:
    """What is left of `views` behind their first `count` bytes, and how many bytes they are short of `count`."""
    for at, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[at + 1 :]], 0
        count -= len(view)
    return [], count


def _first(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """The first `count` bytes of `views`."""
    some: list[memoryview] = []
    for view in views:
        some.append(view[:count])
        count -= len(some[-1])
    return some


def _number(digits: bytes) -> int:
    if 0 < len(digits) <= DIGITS_MAX + 1 and digits.removeprefix(b"-").isdigit():
        return int(digits)
    raise _broken("a length that is no number")


def _ended(value: bytearray) -> bytearray:
    if value[-2:] != b"\r\n":
        raise _broken("a value without an end")
    return value[:-2]


def _broken(what: str) -> OSError:
    return OSError(errno.EPROTO, f"the server sent {what}")
