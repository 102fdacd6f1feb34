"""A server of the Redis protocol (RESP2 and RESP3). Everything that a client can make large, slow or many has a limit.

    Commands     what runs commands: given by whoever joins it to this listener
    RespServer   listens on TCP or a Unix socket, counts connections and what they hold
    _Client      one connection: parses, has commands run in their order, writes replies and pushes

Requests may be pipelined. A client that does not read its replies is not read from either; one that does not take its
pushes is sent away.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from thermocline.errors import CommandError
from thermocline.wire.resp_parse import STRANGER, Bounds, RequestParser
from thermocline.wire.sockets import listening, private_socket

LOG = logging.getLogger("thermocline.resp")
TICK_SECONDS = 0.1
JOINED_BYTES_MAX = 16 << 10
"""Of one write: replies are joined up to this size, and a longer value goes by itself, uncopied."""
RESP3 = 3
ONE_LINE = str.maketrans("\r\n", "  ")
"""An error is on one line, whatever of the request it quotes."""
FULL = b"-ERR max number of clients reached\r\n"


@dataclass(frozen=True, slots=True)
class RespLimits:
    """What one client, and all of them together, may take."""

    connections_max: int = 1024
    request: Bounds = field(default_factory=Bounds)
    waiting_bytes_max: int = 256 << 20
    """Of requests that are not whole yet, all connections together."""
    output_bytes_max: int = 1 << 30
    """Of one reply."""
    pushed_bytes_max: int = 32 << 20
    """What may wait for a client that is not reading, before it is sent away for what is pushed to it."""
    write_seconds: float = 60.0

    @classmethod
    def of(cls, memory_bytes: int, connections_max: int) -> RespLimits:
        """For a server that keeps so much: a request may be as large as a value, and a quarter of it may wait."""
        part = max(memory_bytes // 4, 1 << 20)
        return cls(connections_max, Bounds(bulk_bytes_max=part), waiting_bytes_max=2 * part, output_bytes_max=4 * part)


class Session(Protocol):
    """One client, as commands know it."""

    protocol: int
    authenticated: bool
    closing: bool
    pushes: list[object] | None
    queued_bytes: int


S = TypeVar("S", bound=Session)


class Commands(Protocol[S]):
    """What runs commands. Everything is called on the loop's thread, and returns at once."""

    def connect(self, wake: Callable[[], None]) -> S:
        """A client came; `wake` is to be called when it has pushes, or is to be closed."""

    def disconnect(self, session: S) -> None:
        """It went."""

    def execute(self, session: S, words: list[bytes]) -> object:
        """A command's reply, of the kinds that `encode` knows."""

    def tick(self) -> None:
        """Called some times a second."""


# -- replies -----------------------------------------------------------------------------------------------------------


def encode(value: object, protocol: int, out: list[bytes]) -> None:
    """Append a reply as RESP2 or RESP3.

    str a status, bytes a bulk string, int, float, None, list an array, dict a map, set a set, CommandError an error;
    tuple a push, and the empty tuple the array that is not there.
    """
    if isinstance(value, bytes):
        if len(value) > JOINED_BYTES_MAX:
            out += (b"$%d\r\n" % len(value), value, b"\r\n")
        else:
            out.append(b"$%d\r\n%b\r\n" % (len(value), value))
    elif isinstance(value, str):
        out.append(b"+%b\r\n" % value.encode())
    elif isinstance(value, int):
        out.append(b":%d\r\n" % value)
    elif value is None:
        out.append(b"_\r\n" if protocol == RESP3 else b"$-1\r\n")
    elif isinstance(value, float):
        digits = repr(value).removesuffix(".0").encode()
        out.append(b",%b\r\n" % digits if protocol == RESP3 else b"$%d\r\n%b\r\n" % (len(digits), digits))
    elif isinstance(value, CommandError):
        text = f"{value.message} (hint: {value.hint})" if value.hint else value.message
        out.append(b"-%b\r\n" % text.translate(ONE_LINE).encode())
    else:
        _encode_many(value, protocol, out)


def _encode_many(value: object, protocol: int, out: list[bytes]) -> None:
    new = protocol == RESP3
    if isinstance(value, dict):
        out.append(b"%%%d\r\n" % len(value) if new else b"*%d\r\n" % (2 * len(value)))
        for key, each in value.items():
            encode(key, protocol, out)
            encode(each, protocol, out)
        return
    if value == ():
        out.append(b"_\r\n" if new else b"*-1\r\n")
        return
    assert isinstance(value, list | tuple | set)
    mark = b">" if isinstance(value, tuple) else b"~" if isinstance(value, set) else b"*"
    out.append(b"%b%d\r\n" % (mark if new else b"*", len(value)))
    for each in value:
        if type(each) is bytes and len(each) <= JOINED_BYTES_MAX:  # the usual one
            out.append(b"$%d\r\n%b\r\n" % (len(each), each))
        else:
            encode(each, protocol, out)


# -- the listener ------------------------------------------------------------------------------------------------------


class RespServer:
    """Listens until stopped."""

    def __init__(self, commands: Commands[Any], limits: RespLimits) -> None:
        self.commands, self.limits = commands, limits
        self.waiting_bytes = 0
        self.clients: set[_Client] = set()
        self._listener: asyncio.Server | None = None
        self._ticking: asyncio.TimerHandle | None = None

    async def start(self, sock: socket.socket) -> None:
        """Accept connections on a bound socket."""
        loop = asyncio.get_running_loop()
        create = loop.create_unix_server if sock.family == socket.AF_UNIX else loop.create_server
        self._listener = await create(lambda: _Client(self), sock=sock, backlog=511)
        self._tick()

    async def stop(self) -> None:
        """Accept nothing more, and close every connection: what was answered is still sent."""
        if self._listener is not None and self._ticking is not None:
            self._listener.close()
            self._ticking.cancel()
        for client in tuple(self.clients):
            client.close()
        await asyncio.sleep(0)

    def _tick(self) -> None:
        self.commands.tick()
        self._ticking = asyncio.get_running_loop().call_later(TICK_SECONDS, self._tick)


class _Client(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: RespServer) -> None:
        self._server, self._limits = server, server.limits
        self._commands = server.commands
        self._transport: asyncio.Transport
        self._session: Session | None = None
        self._parser = RequestParser(STRANGER)
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._paused = self._running = False
        self._timer: asyncio.TimerHandle | None = None
        self._waiting_bytes = 0

    # -- the transport's calls -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        self._transport = transport  # type: ignore[assignment]  # these transports read and write
        if len(self._server.clients) >= self._limits.connections_max:
            self._transport.write(FULL)
            self._transport.close()
            return
        self._server.clients.add(self)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._session = self._commands.connect(self._woken)
        self._let_in()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        """The client went, or was sent away."""
        self._server.clients.discard(self)
        self._server.waiting_bytes -= self._waiting_bytes
        self._waiting_bytes = 0
        self._set_timer(None)
        session, self._session = self._session, None
        if session is not None:
            self._commands.disconnect(session)

    def pause_writing(self) -> None:
        """The client reads more slowly than it is answered: no more is taken from it."""
        self._paused = True
        self._transport.pause_reading()
        self._set_timer(self._limits.write_seconds)

    def resume_writing(self) -> None:
        """It caught up."""
        self._paused = False
        self._set_timer(None)
        self._work(None)
        if not self._paused:
            self._transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self._session is not None:
            self._work(data)

    # -- work ----------------------------------------------------------------------------------------------------------

    def _work(self, data: bytes | None) -> None:
        """Run what is whole, in its order, until the client should read first."""
        session, execute = self._session, self._commands.execute
        if session is None:
            return
        self._running = True
        try:
            words = self._parser.next() if data is None else self._parser.feed(data) or self._parser.next()
            while words is not None and not session.closing:
                self._answer(session, execute(session, words))
                if self._paused:
                    break
                words = self._parser.next()
        except CommandError as error:
            self._answer(session, error)
            session.closing = True
        except Exception:
            LOG.exception("a command failed")
            self._answer(session, CommandError("ERR the server failed", hint="its log says more"))
            session.closing = True
        self._running = False
        self._flush()
        self._account(session)
        if session.closing:
            self.close()

    def _answer(self, session: Session, reply: object) -> None:
        at = len(self._out)
        encode(reply, session.protocol, self._out)
        if len(self._out) - at > 1:
            self._check_size(session, at)
        self._out_bytes += sum(map(len, self._out[at:]))
        if session.pushes:
            self._take_pushes(session)
        if session.authenticated and self._parser.bounds is STRANGER:
            self._let_in()
        if self._out_bytes > JOINED_BYTES_MAX:
            self._flush()

    def _check_size(self, session: Session, at: int) -> None:
        """A value that is named a thousand times in one request is held once, but would be sent a thousand times."""
        if sum(map(len, self._out[at:])) > self._limits.output_bytes_max:
            del self._out[at:]
            error = CommandError("ERR this reply is too large", hint="ask for fewer values at once")
            encode(error, session.protocol, self._out)

    def _take_pushes(self, session: Session) -> None:
        pushes, session.pushes = session.pushes or [], None
        at = len(self._out)
        for push in pushes:
            encode(push, session.protocol, self._out)
        self._out_bytes += sum(map(len, self._out[at:]))

    def _woken(self) -> None:
        """Something was pushed by another client's command, or this one is to be closed."""
        session = self._session
        if session is None or self._running:
            return  # nothing to do, or it is done behind the reply
        if session.closing:
            self._transport.abort()
            return
        self._take_pushes(session)
        self._flush()
        if self._transport.get_write_buffer_size() > self._limits.pushed_bytes_max:
            self._transport.abort()

    def _flush(self) -> None:
        out, self._out, self._out_bytes = self._out, [], 0
        if not out or self._transport.is_closing():
            return
        if len(out) == 1:
            self._transport.write(out[0])
        elif sum(map(len, out)) <= 2 * JOINED_BYTES_MAX:
            self._transport.write(b"".join(out))
        else:
            self._transport.writelines(out)

    def _account(self, session: Session) -> None:
        """Count what waits here, and refuse what would be too much of all clients together."""
        waiting = self._parser.held_bytes + session.queued_bytes
        self._server.waiting_bytes += waiting - self._waiting_bytes
        self._waiting_bytes = waiting
        if self._server.waiting_bytes > self._limits.waiting_bytes_max and waiting > JOINED_BYTES_MAX:
            self._transport.write(b"-OOM too much is being sent to this server at once\r\n")
            self.close()

    def _let_in(self) -> None:
        if self._session is not None and self._session.authenticated:
            self._parser.bounds = self._limits.request

    def close(self) -> None:
        """Send what was answered, then close."""
        self._transport.close()
        self._set_timer(self._limits.write_seconds)

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        late = self._transport.abort
        self._timer = None if seconds is None else asyncio.get_running_loop().call_later(seconds, late)


# -- a process ---------------------------------------------------------------------------------------------------------


def serve(
    commands: Commands[Any],
    limits: RespLimits,
    *,
    host: str,
    port: int,
    path: Path | None,
    ready: Callable[[str], None],
) -> None:
    """Listen on a Unix socket, if a path is given, or else on TCP, until a signal; `ready` hears the address.

    On uvloop where it is installed. Raises ThermoclineError where the address cannot be had.
    """
    try:
        import uvloop

        factory: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
    except ImportError:
        factory = None
    hint = "choose another path with --unix-socket, of at most 107 bytes"
    bound = private_socket(path, "server", hint=hint) if path else listening(host, port)
    with contextlib.closing(bound) as sock:
        try:
            with asyncio.Runner(loop_factory=factory) as runner:
                runner.run(_until_signal(RespServer(commands, limits), sock, ready))
        finally:
            if path is not None:
                path.unlink(missing_ok=True)


async def _until_signal(server: RespServer, sock: socket.socket, ready: Callable[[str], None]) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    await server.start(sock)
    ready(url_of(sock))
    await stop.wait()
    await server.stop()


def url_of(sock: socket.socket) -> str:
    """Where a bound socket is reached, as Redis' clients take it."""
    if sock.family == socket.AF_UNIX:
        return f"unix://{Path(sock.getsockname()).absolute()}"
    host, port = sock.getsockname()[:2]
    return f"redis://[{host}]:{port}" if ":" in host else f"redis://{host}:{port}"
