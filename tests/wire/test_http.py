"""The HTTP server over real sockets: what it answers, what it refuses, what it survives."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace

import pytest

from thermocline.errors import RequestError
from thermocline.wire.http import CLIENT_GONE, Limits, Server
from thermocline.wire.routes import Request, Response, Routes

LIMITS = Limits(
    header_bytes_max=4096,
    body_bytes_max=10_000,
    connections_max=20,
    header_seconds=0.4,
    body_seconds=0.4,
    idle_seconds=5,
    write_seconds=0.5,
    linger_seconds=0.5,
)
WAIT_SECONDS = 10
PIECE = b"x" * 65536


class Served:
    """A server in a thread, with handlers that the tests talk to."""

    def __init__(self, limits: Limits) -> None:
        self.observed: list[tuple[str, int]] = []
        self.cancelled = threading.Event()
        self.release = threading.Event()
        self.pieces_sent = 0
        self.drain_seconds = 8.0
        sock = socket.create_server(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve(sock, limits, ready)))
        self.thread.start()
        assert ready.wait(WAIT_SECONDS)

    async def _serve(self, sock: socket.socket, limits: Limits, ready: threading.Event) -> None:
        self.loop, self.stop = asyncio.get_running_loop(), asyncio.Event()
        table = {
            ("POST", "/echo"): self._echo,
            ("GET", "/hello"): self._hello,
            ("GET", "/stream"): self._stream,
            ("GET", "/endless"): self._endless,
            ("GET", "/unread"): self._unread,
            ("GET", "/wait"): self._wait,
            ("GET", "/broken"): self._broken,
            ("GET", "/breaks"): self._breaks,
            ("GET", "/things/*"): self._thing,
        }
        self.server = Server(Routes(table), _refuse, limits=limits, observe=self._observe)
        await self.server.start(sock)
        ready.set()
        await self.stop.wait()
        await self.server.stop(self.drain_seconds)

    def _observe(self, route: str, status: int) -> None:
        self.observed.append((route, status))

    async def _echo(self, request: Request) -> Response:
        return Response(request.body, content_type="text/plain")

    async def _hello(self, request: Request) -> Response:
        return Response(f"hello {request.query}".encode())

    async def _thing(self, request: Request) -> Response:
        return Response(request.rest.encode())

    async def _stream(self, request: Request) -> Response:
        async def pieces() -> AsyncGenerator[bytes]:
            for piece in (b"one ", b"", b"two"):
                yield piece
                await asyncio.sleep(0)

        return Response(pieces())

    async def _endless(self, request: Request) -> Response:
        async def pieces() -> AsyncGenerator[bytes]:
            try:
                while True:
                    yield PIECE
                    self.pieces_sent += 1
                    await asyncio.sleep(0)
            finally:
                self.cancelled.set()

        return Response(pieces())

    async def _unread(self, request: Request) -> Response:
        """A stream to a client that has not read yet what it was sent before."""
        for connection in self.server._connections:
            connection.pause_writing()
        return await self._endless(request)

    async def _wait(self, request: Request) -> Response:
        try:
            await asyncio.to_thread(self.release.wait, 5)
        except asyncio.CancelledError:
            self.cancelled.set()
            self.release.set()
            raise
        return Response(b"waited")

    async def _broken(self, request: Request) -> Response:
        msg = "secret detail"
        raise LookupError(msg)

    async def _breaks(self, request: Request) -> Response:
        async def pieces() -> AsyncGenerator[bytes]:
            yield b"half"
            msg = "secret detail"
            raise LookupError(msg)

        return Response(pieces())

    def close(self) -> None:
        self.release.set()
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.stop.set)
            self.thread.join(WAIT_SECONDS)
        assert not self.thread.is_alive()


def _refuse(error: RequestError) -> Response:
    return Response(error.message.encode(), error.status, "text/plain")


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """Start servers; they are stopped at the end."""
    started: list[Served] = []

    def start(**limits: float) -> Served:
        started.append(Served(replace(LIMITS, **limits)))
        return started[-1]

    yield start
    for served in started:
        served.close()


@pytest.fixture
def served(serve: Callable[..., Served]) -> Served:
    """A server with the limits above."""
    return serve()


def connect(served: Served) -> socket.socket:
    """A new connection."""
    return socket.create_connection(("127.0.0.1", served.port), timeout=WAIT_SECONDS)


def read_all(sock: socket.socket) -> bytes:
    """Everything until the server closes."""
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def exchange(served: Served, *requests: bytes) -> bytes:
    """Send, and read until the server closes."""
    with connect(served) as sock:
        for request in requests:
            sock.sendall(request)
        return read_all(sock)


def get(path: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    """A request's head."""
    return "\r\n".join([f"{method} {path} HTTP/{version}", "host: x", *headers, "", ""]).encode()


def status(answer: bytes) -> int:
    """The status of the first answer."""
    return int(answer.split(b" ", 2)[1])


def eventually(condition: Callable[[], bool]) -> bool:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def test_one_connection_serves_many_requests(served: Served) -> None:
    """Requests one after the other share a connection, and each is answered with its own body."""
    with connect(served) as sock:
        for number in range(3):
            body = b"body %d" % number
            sock.sendall(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
            answer = sock.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert answer.endswith(b"\r\n\r\n" + body)
            assert b"connection: keep-alive" in answer


def test_query_and_rest_of_the_path_arrive_decoded(served: Served) -> None:
    """A handler gets the query as it was sent, and the open part of a path decoded, slashes included."""
    assert exchange(served, get("/hello?a=b%20c", "connection: close")).endswith(b"hello a=b%20c")
    assert exchange(served, get("/things/a%20b/c", "connection: close")).endswith(b"a b/c")


def test_what_is_not_listed_is_refused(served: Served) -> None:
    """Unknown paths are 404, unknown methods 405 with the methods that would do."""
    assert status(exchange(served, get("/nothing", "connection: close"))) == 404
    assert status(exchange(served, get("/things/", "connection: close"))) == 404
    answer = exchange(served, get("/echo", "connection: close"))
    assert status(answer) == 405
    assert b"allow: POST\r\n" in answer


def test_head_is_refused_without_confusing_what_follows(served: Served) -> None:
    """HEAD is not served, and the connection ends, since its answer must not have the body that ours has."""
    assert b"connection: close" in exchange(served, get("/hello", method="HEAD"))


def test_a_stream_comes_in_chunks(served: Served) -> None:
    """A generator's pieces are sent as chunks; empty ones, which would end the stream, are left out."""
    answer = exchange(served, get("/stream", "connection: close"))
    assert b"transfer-encoding: chunked" in answer
    assert answer.endswith(b"\r\n\r\n4\r\none \r\n3\r\ntwo\r\n0\r\n\r\n")


def test_http_1_0_gets_a_stream_without_chunks(served: Served) -> None:
    """Old proxies speak HTTP/1.0: they get the plain pieces, and the end of the connection as their end."""
    answer = exchange(served, get("/stream", version="1.0"))
    assert answer.endswith(b"\r\n\r\none two")
    assert b"chunked" not in answer


def test_a_chunked_request_body_arrives_whole(served: Served) -> None:
    """Request bodies may come in chunks of any size, split anywhere."""
    head = b"POST /echo HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    body = b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
    assert exchange(served, head, *(body[at : at + 1] for at in range(len(body)))).endswith(b"\r\n\r\nhello world")


def test_expect_continue_is_answered_before_the_body(served: Served) -> None:
    """A client that asks first is told to go on, and one whose body is too large learns it before sending."""
    ask = b"POST /echo HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
    with connect(served) as sock:
        sock.sendall(ask % 5)
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(b"hello")
        assert read_all(sock).endswith(b"\r\n\r\nhello")
    assert status(exchange(served, ask % 10**9)) == 413


@pytest.mark.parametrize("framing", ["content-length: 50000", "transfer-encoding: chunked"])
def test_a_large_body_is_refused_and_the_client_learns_why(served: Served, framing: str) -> None:
    """A body beyond the limit is 413, readable even by a client that sends all of it before it reads."""
    piece = b"c350\r\n" + b"x" * 50_000 + b"\r\n" if "chunked" in framing else b"x" * 50_000
    assert status(exchange(served, get("/echo", framing, method="POST"), piece)) == 413


def test_endless_trailers_are_refused(served: Served) -> None:
    """Bytes that belong to no body count as well: trailers without an end are cut off."""
    head = get("/echo", "transfer-encoding: chunked", method="POST") + b"1\r\nx\r\n0\r\n"
    with connect(served) as sock:
        sock.sendall(head)
        sock.sendall(b"a: b\r\n" * 20_000)
        assert status(sock.recv(65536)) == 413


@pytest.mark.parametrize("head", [b"x: " + b"y" * 100_000, b"x: y\r\n" * 2000 + b"\r\n", b"z" * 100_000])
def test_large_headers_are_refused(served: Served, head: bytes) -> None:
    """One long header, many short ones, or a line without an end: 431 at the limit."""
    assert status(exchange(served, b"GET /hello HTTP/1.1\r\n" + head)) == 431


def test_a_slow_head_is_refused(served: Served) -> None:
    """A request whose head does not arrive in time is 408, whatever keeps trickling in."""
    with connect(served) as sock:
        sock.sendall(b"GET /hello HTTP/1.1\r\n")
        for _ in range(20):
            time.sleep(0.05)
            try:
                sock.sendall(b"a: b\r\n")
            except OSError:
                break
        assert status(sock.recv(65536)) == 408


def test_a_slow_body_is_refused(served: Served) -> None:
    """A body that does not arrive in time is 408."""
    assert status(exchange(served, get("/echo", "content-length: 5", method="POST"), b"hel")) == 408


def test_an_idle_connection_is_closed_without_a_word(serve: Callable[..., Served]) -> None:
    """Nobody asked anything, so nothing is answered: before the first request and between two."""
    served = serve(header_seconds=0.2, idle_seconds=0.2)
    assert exchange(served) == b""
    assert exchange(served, get("/hello")).count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /hello\r\n\r\n",
        b"GET /hello HTTP/1.1\r\nbad header\r\n\r\n",
        b"POST /echo HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"POST /echo HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /echo HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"GET http://[::bad/hello HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    ],
)
def test_what_is_not_http_is_refused(served: Served, request_bytes: bytes) -> None:
    """TLS, malformed and ambiguous requests are 400, never served and never an error of the server."""
    assert status(exchange(served, request_bytes)) == 400


def test_an_upgrade_is_ignored(served: Served) -> None:
    """A request to change the protocol is answered in this one, and nothing behind it is read as a request."""
    ask = get("/hello?1", "connection: upgrade", "upgrade: websocket")
    answer = exchange(served, ask + get("/hello?2"))
    assert answer.endswith(b"hello 1")
    assert answer.count(b"HTTP/1.1") == 1
    assert b"connection: close" in answer


def test_pipelined_requests_are_not_answered(served: Served) -> None:
    """A request that does not wait for its turn ends the connection, after the one before it was answered."""
    together = exchange(served, get("/hello?1") + get("/hello?2"))
    assert together.count(b"HTTP/1.1 200") == 1
    assert together.endswith(b"hello 1")
    with connect(served) as sock:
        sock.sendall(get("/wait"))
        time.sleep(0.1)
        sock.sendall(get("/hello?2"))
        time.sleep(0.1)
        served.release.set()
        answer = read_all(sock)
    assert answer.count(b"HTTP/1.1 200") == 1
    assert answer.endswith(b"waited")


def test_a_client_that_leaves_cancels_its_handler(served: Served) -> None:
    """A handler that is waiting learns at once that nobody waits for it."""
    sock = connect(served)
    sock.sendall(get("/wait"))
    time.sleep(0.1)
    sock.close()
    assert served.cancelled.wait(WAIT_SECONDS)
    assert eventually(lambda: ("/wait", CLIENT_GONE) in served.observed)


def test_a_client_that_leaves_ends_its_stream(served: Served) -> None:
    """A generator is closed when its reader is gone."""
    sock = connect(served)
    sock.sendall(get("/endless"))
    sock.recv(1000)
    sock.close()
    assert served.cancelled.wait(WAIT_SECONDS)


def test_a_client_that_leaves_before_its_stream_began_ends_it(served: Served) -> None:
    """A client that goes between the head and the first piece ends the stream like any other: nothing runs on."""
    sock = connect(served)
    sock.sendall(get("/unread"))
    assert sock.recv(15) == b"HTTP/1.1 200 OK"
    sock.close()
    assert served.cancelled.wait(WAIT_SECONDS)


def test_a_slow_reader_slows_its_own_stream_only(served: Served) -> None:
    """What a client does not read is not made, others are served meanwhile, and the stream ends at last."""
    with connect(served) as slow:
        slow.sendall(get("/endless"))
        assert eventually(lambda: served.pieces_sent > 0)
        assert exchange(served, get("/hello", "connection: close")).endswith(b"hello ")
        assert served.cancelled.wait(WAIT_SECONDS)
        assert served.pieces_sent * len(PIECE) < 64 << 20


def test_a_broken_handler_tells_the_client_nothing(served: Served) -> None:
    """An unexpected error is 500 without details before the head is sent, and a broken stream behind it."""
    answer = exchange(served, get("/broken", "connection: close"))
    assert status(answer) == 500
    assert b"secret" not in answer
    stream = exchange(served, get("/breaks"))
    assert stream.endswith(b"4\r\nhalf\r\n")  # without the last chunk no client takes it for whole


def test_connections_are_bounded(serve: Callable[..., Served]) -> None:
    """One client too many is 503; room is there again when others leave."""
    served = serve(connections_max=2)
    with connect(served) as first, connect(served):
        first.sendall(get("/hello"))
        first.recv(65536)
        assert status(exchange(served)) == 503
    assert eventually(lambda: status(exchange(served, get("/hello", "connection: close"))) == 200)


def test_stopping_lets_requests_finish(served: Served) -> None:
    """A stop refuses new connections, closes idle ones, and waits for what is being answered."""
    with connect(served) as idle, connect(served) as busy:
        busy.sendall(get("/wait"))
        time.sleep(0.1)
        served.loop.call_soon_threadsafe(served.stop.set)
        assert idle.recv(100) == b""
        with pytest.raises(OSError, match=r"refused|reset"):
            connect(served).recv(1)
        served.release.set()
        answer = read_all(busy)
    assert answer.endswith(b"waited")
    assert b"connection: close" in answer


def test_stopping_does_not_wait_for_ever(served: Served) -> None:
    """A request that does not end is cut off when the time to drain is over."""
    served.drain_seconds = 0.2
    with connect(served) as sock:
        sock.sendall(get("/wait"))
        time.sleep(0.1)
        served.loop.call_soon_threadsafe(served.stop.set)
        served.thread.join(WAIT_SECONDS)
        assert not served.thread.is_alive()
        assert served.cancelled.is_set()
