"""A small HTTP/1.1 server. Everything that a client can make large, slow or many has a limit.

    Server       listens, counts connections, drains
    _Connection  one client: reads a request, calls its handler, writes the response, and again

Parsing is httptools' (the parser of Node.js). A client that goes away cancels its handler; one that reads slowly slows
its own stream down and nobody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import unquote

import httptools

from thermocline.errors import RequestError
from thermocline.wire.routes import Request, Response, Routes

LOG = logging.getLogger("thermocline.http")
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
CLIENT_GONE = 499
"""What is observed, never sent, when a client left before its response was complete. The number is nginx's."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client, and all of them together, may take."""

    header_bytes_max: int = 32 << 10
    body_bytes_max: int = 8 << 20
    connections_max: int = 512
    header_seconds: float = 10.0
    body_seconds: float = 60.0
    idle_seconds: float = 75.0
    write_seconds: float = 60.0
    linger_seconds: float = 2.0


Refusal = Callable[[RequestError], Response]
Observer = Callable[[str, int], object]


class Server:
    """Listens until stopped. `refuse` makes an error a response; `observe` hears each response's route and status."""

    def __init__(
        self, routes: Routes, refuse: Refusal, *, limits: Limits | None = None, observe: Observer = lambda *_: None
    ) -> None:
        self.routes, self.refuse, self.observe = routes, refuse, observe
        self.limits = limits or Limits()
        self.stopping = False
        self._connections: set[_Connection] = set()
        self._gone = asyncio.Event()
        self._listener: asyncio.Server | None = None

    async def start(self, sock: socket.socket) -> None:
        """Accept connections on a bound socket."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: _Connection(self), sock=sock, backlog=256)

    async def stop(self, drain_seconds: float = 10.0) -> None:
        """Accept nothing more, let requests in flight finish for so long, then cancel them."""
        self.stopping = True
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self._connections):
            connection.close_when_idle()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                while self._connections:
                    self._gone.clear()
                    await self._gone.wait()
        for connection in tuple(self._connections):
            connection.abort()

    def admit(self, connection: _Connection) -> bool:
        """Count a connection; False when there are too many."""
        self._connections.add(connection)
        return len(self._connections) <= self.limits.connections_max

    def forget(self, connection: _Connection) -> None:
        """The connection is closed."""
        self._connections.discard(connection)
        self._gone.set()


def url_of(sock: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Connection(asyncio.Protocol):
    """One client. Requests are served one after the other; one that comes before its turn ends the connection."""

    def __init__(self, server: Server) -> None:
        self._server, self._limits = server, server.limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._closing = False
        self._reset()

    def _reset(self) -> None:
        """Ready for the next request."""
        self._parser = httptools.HttpRequestParser(self)
        self._route, self._method, self._url = "unknown", "", b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._received_bytes = 0
        self._body_bytes = 0
        self._head_complete = False
        self._head_sent = False
        self._keep_alive = self._chunks = True

    # -- the transport's calls -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        self._transport = transport  # type: ignore[assignment]  # TCP transports read and write
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in {socket.AF_INET, socket.AF_INET6}:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._server.admit(self):
            self._set_timer(self._limits.header_seconds)
        else:
            self._refuse(RequestError("too many connections", hint="reuse connections, or retry later", status=503))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        """The client went, or was sent away."""
        self._server.forget(self)
        self._set_timer(None)
        self._writable.set()
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """It caught up."""
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        """Bytes came: feed the parser, whose calls below collect the request."""
        if self._closing:
            return  # read on nevertheless, so that the client can finish sending and learn why it was refused
        if self._task is not None:
            self._keep_alive = False  # pipelined: the request in flight is answered, this one never is
            return
        self._received_bytes += len(data)
        try:
            self._parser.feed_data(data)
            self._check_received()
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            self._refuse(cause if isinstance(cause, RequestError) else _malformed(str(error)))
        except httptools.HttpParserUpgrade:
            self._keep_alive = False  # the request is served as plain HTTP, and what follows is not HTTP any more
        except httptools.HttpParserError as error:
            self._refuse(_malformed(str(error)))
        except RequestError as error:
            self._refuse(error)

    def _check_received(self) -> None:
        """What the parser holds back is bounded too: a head without an end, or the trimmings of a chunked body."""
        if not self._head_complete and self._received_bytes > self._limits.header_bytes_max:
            self._head_too_large()
        if self._received_bytes > self._limits.header_bytes_max + 2 * self._limits.body_bytes_max:
            self._body_too_large()

    # -- the parser's calls --------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins. Behind a whole one in the same bytes, it is pipelined."""
        if self._task is not None:
            self._keep_alive = False
        else:
            self._set_timer(self._limits.header_seconds)

    def on_url(self, url: bytes) -> None:
        """Part of the request line."""
        if self._task is None:
            self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        if self._task is None and not self._head_complete:
            key, text = name.decode("latin-1").lower(), value.decode("latin-1")
            self._headers[key] = f"{self._headers[key]}, {text}" if key in self._headers else text

    def on_headers_complete(self) -> None:
        """The head is there: refuse now what will be too large, before it is sent."""
        if self._task is not None:
            return
        self._head_complete = True
        self._method = self._parser.get_method().decode("latin-1")
        self._keep_alive = self._parser.should_keep_alive() and self._method != "HEAD"
        version = self._parser.get_http_version()
        if version not in {"1.0", "1.1"}:
            raise _malformed(f"version {version}")
        self._chunks = version == "1.1"
        head_bytes = len(self._url) + sum(len(key) + len(value) + 4 for key, value in self._headers.items())
        if head_bytes > self._limits.header_bytes_max:
            self._head_too_large()
        length = self._headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._limits.body_bytes_max:
            self._body_too_large()
        self._set_timer(self._limits.body_seconds)
        if self._headers.get("expect", "").lower() == "100-continue":
            self._transport.write(CONTINUE)

    def on_body(self, body: bytes) -> None:
        """Part of the body."""
        if self._task is None:
            self._body_bytes += len(body)
            if self._body_bytes > self._limits.body_bytes_max:
                self._body_too_large()
            self._body.append(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self._task is None and not self._closing:
            self._set_timer(None)
            self._task = self._loop.create_task(self._answer())

    # -- answering -----------------------------------------------------------------------------------------------------

    async def _answer(self) -> None:
        """Serve one request, then be ready for the next."""
        status = 500
        try:
            response = await self._respond()
            status = response.status
            await self._send(response)
        except asyncio.CancelledError:
            status = CLIENT_GONE
            self._transport.abort()
        except Exception:
            LOG.exception("a handler failed")
            if self._head_sent:
                self._transport.abort()  # a stream that breaks off must not look whole
            else:
                self._write(
                    self._server.refuse(RequestError("the server failed", hint="its log says more", status=500))
                )
        self._server.observe(self._route, status)
        self._task = None
        if self._keep_alive and not self._server.stopping and not self._transport.is_closing():
            self._reset()
            self._set_timer(self._limits.idle_seconds)
        else:
            self._close()

    async def _respond(self) -> Response:
        """The handler's response, or the one for a mistake in the request."""
        try:
            url = httptools.parse_url(self._url)
            path = unquote((url.path or b"/").decode("latin-1"))
            self._route, rest, handler = self._server.routes.find(self._method, path)
            query = (url.query or b"").decode("latin-1")
            return await handler(Request(self._method, path, query, self._headers, b"".join(self._body), rest))
        except httptools.HttpParserInvalidURLError as error:
            return self._server.refuse(_malformed(str(error)))
        except RequestError as error:
            return self._refusal(error)

    def _refusal(self, error: RequestError) -> Response:
        response = self._server.refuse(error)
        if error.status != HTTPStatus.METHOD_NOT_ALLOWED:
            return response
        path = unquote(self._url.partition(b"?")[0].decode("latin-1"))
        allow = {"allow": self._server.routes.allowed(path)}
        return Response(response.body, response.status, response.content_type, {**response.headers, **allow})

    async def _send(self, response: Response) -> None:
        self._write(response)
        if isinstance(response.body, bytes):
            await self._drain()
            return
        # No wait before the first piece is asked for: a body that never began cannot be told that its reader is gone.
        async with contextlib.aclosing(response.body) as pieces:
            async for piece in pieces:
                if piece:
                    self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunks else piece)
                    await self._drain()
        if self._chunks:
            self._transport.write(b"0\r\n\r\n")

    def _write(self, response: Response) -> None:
        """The head, and a body that is there already."""
        body = response.body
        if isinstance(body, bytes):
            self._transport.write(self._head(response, f"content-length: {len(body)}") + body)
        elif self._chunks:
            self._transport.write(self._head(response, "transfer-encoding: chunked"))
        else:
            self._keep_alive = False  # in HTTP/1.0 the end of the connection is the end of the body
            self._transport.write(self._head(response, "cache-control: no-store"))

    def _head(self, response: Response, framing: str) -> bytes:
        self._head_sent = True
        lines = [
            f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}",
            f"content-type: {response.content_type}",
            framing,
            f"connection: {'keep-alive' if self._keep_alive and not self._server.stopping else 'close'}",
            *(f"{name}: {value}" for name, value in response.headers.items()),
        ]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    async def _drain(self) -> None:
        """Wait for a slow reader, but not for ever."""
        if not self._writable.is_set():
            try:
                async with asyncio.timeout(self._limits.write_seconds):
                    await self._writable.wait()
            except TimeoutError:
                raise asyncio.CancelledError from None

    # -- sending away --------------------------------------------------------------------------------------------------

    def _refuse(self, error: RequestError) -> None:
        """Answer an unusable request and close: where its end is cannot be known."""
        if self._task is None and not self._closing:
            self._keep_alive = False
            response = self._server.refuse(error)
            self._server.observe("refused", response.status)
            self._write(response)
            self._close()

    def _close(self) -> None:
        """Say that no more comes, and let the client read what did: closing at once could destroy it on the way."""
        if not self._closing and not self._transport.is_closing():
            self._closing = True
            self._transport.write_eof()
            self._set_timer(self._limits.linger_seconds)

    def _head_too_large(self) -> None:
        msg = f"the request line and headers exceed {self._limits.header_bytes_max} bytes"
        raise RequestError(msg, hint="send fewer or shorter headers", status=431, code="headers_too_large")

    def _body_too_large(self) -> None:
        msg = f"the body exceeds {self._limits.body_bytes_max} bytes"
        raise RequestError(msg, hint="send less, or raise body_bytes_max", status=413, code="body_too_large")

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self._loop.call_later(seconds, self._time_is_up)

    def _time_is_up(self) -> None:
        if self._closing:
            self._transport.abort()
        elif self._received_bytes:
            self._refuse(RequestError("the request did not arrive in time", hint="send it faster", status=408))
        else:
            self._transport.close()  # idle: nothing was asked

    def close_when_idle(self) -> None:
        """The server stops: finish the request in flight, if there is one."""
        if self._task is None:
            self._transport.close()

    def abort(self) -> None:
        """The server cannot wait any longer."""
        self._transport.abort()


def _malformed(what: str) -> RequestError:
    return RequestError(f"this is not HTTP/1.1: {what}", hint="check the client", status=400, code="malformed")
