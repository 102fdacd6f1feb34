"""A gateway on uvloop in a thread, with real instances behind it: our own HTTP server, and some that misbehave."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import hashlib
import json
import socket
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator, Sequence
from typing import Any, Self

import uvloop

from thermocline.clock import SystemClock
from thermocline.errors import RequestError
from thermocline.fleet.instance import Instance, Outcome
from thermocline.gateway.admission import Keys
from thermocline.gateway.proxy import Gateway
from thermocline.gateway.rules import Rules
from thermocline.gateway.seam import Arrived, Decision, Trouble, Usage
from thermocline.wire import openai
from thermocline.wire.http import Limits, Server
from thermocline.wire.routes import Request, Response, Routes
from thermocline.wire.sockets import listening

WAIT_SECONDS = 10
CLOCK = SystemClock()
LIMITS = Limits(
    header_bytes_max=4096,
    body_bytes_max=100_000,
    connections_max=50,
    header_seconds=0.5,
    body_seconds=0.5,
    idle_seconds=5,
    write_seconds=1.0,
    linger_seconds=0.5,
)
RULES = Rules(
    choose_seconds=0.5,
    connect_seconds=1.0,
    first_byte_seconds=5.0,
    gap_seconds=5.0,
    health_seconds=0.1,
    slow_start_seconds=0,
)
CHAT = "/v1/chat/completions"
USAGE = b'"usage":{"prompt_tokens":100,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":64}}'
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class InTurn:
    """The plainest chooser: the least slot that may be chosen, or the next in turn. It writes down what it hears."""

    def __init__(self, *, turn: bool = False) -> None:
        self.turn, self.asked = turn, 0
        self.slots: dict[int, str] = {}
        self.arrived: list[Arrived] = []
        self.heard: list[tuple[str, object]] = []
        self.open = 0

    def joined(self, slot: int, instance: Instance) -> None:
        self.slots[slot] = instance.name

    def left(self, slot: int) -> None:
        del self.slots[slot]

    def lost(self, slot: int) -> None:
        self.heard.append(("lost", slot))

    def choose(self, request: Arrived) -> Decision | Awaitable[Decision]:
        self.arrived.append(request)
        may = sorted(self.slots.keys() - request.exclude)
        slot = may[self.asked % len(may)] if self.turn else may[0]
        self.asked += 1
        self.open += 1
        return Decision(instance=slot, predicted_seconds=0.25, cached_tokens=48)

    def first_byte(self, decision: Decision, now: float) -> None:
        self.heard.append(("first_byte", decision.instance))

    def finished(self, decision: Decision, now: float, usage: Usage | None) -> Outcome:
        self.open -= 1
        self.heard.append(("finished", usage))
        return Outcome(decision.instance, 0.25, 0.5, 48, None, 0.125)

    def failed(self, decision: Decision, now: float, trouble: Trouble) -> None:
        self.open -= 1
        self.heard.append(("failed", trouble))


class World:
    """One loop in a thread, with everything on it."""

    def __init__(self) -> None:
        self._stack = contextlib.AsyncExitStack()
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: self._main(ready))
        self._thread.start()
        assert ready.wait(WAIT_SECONDS)

    def _main(self, ready: threading.Event) -> None:
        async def main() -> None:
            self.loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            ready.set()
            await self._stop.wait()
            await self._stack.aclose()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run on the loop, and wait."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT_SECONDS)

    def call(self, function: Callable[[], Any]) -> Any:
        """Call on the loop, and wait."""
        found: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.loop.call_soon_threadsafe(lambda: found.set_result(function()))
        return found.result(WAIT_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()

    # -- instances -----------------------------------------------------------------------------------------------------

    def good(self, *, port: int = 0) -> Good:
        """An instance that behaves."""
        instance = Good(port)
        self.run(instance.server.start(instance.sock))
        self._stack.push_async_callback(instance.server.stop, 0.2)
        return instance

    def raw(self, script: Script) -> int:
        """An instance that does what a script says with each connection; the port it listens on."""
        sock = socket.create_server(("127.0.0.1", 0))

        async def guarded(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(OSError, EOFError, asyncio.CancelledError), contextlib.closing(writer):
                await script(reader, writer)

        async def start() -> None:
            server = await asyncio.start_server(guarded, sock=sock)
            self._stack.callback(server.close)

        self.run(start())
        return sock.getsockname()[1]

    # -- the gateway ---------------------------------------------------------------------------------------------------

    def gateway(
        self,
        ports: Sequence[int],
        *,
        chooser: InTurn | None = None,
        limits: Limits = LIMITS,
        rules: Rules = RULES,
        keys: Keys | None = None,
        port: int = 0,
        shared: bool = False,
    ) -> Door:
        """A gateway in front of instances i0, i1 and so on."""
        chooser = chooser or InTurn()
        instances = [Instance(f"i{at}", f"http://127.0.0.1:{port}") for at, port in enumerate(ports)]
        sock = listening("127.0.0.1", port, shared=shared)

        async def start() -> Gateway:
            gateway = Gateway(chooser, instances, limits=limits, rules=rules, keys=keys)
            await gateway.start(sock)
            self._stack.push_async_callback(gateway.stop, 0.2)
            return gateway

        return Door(self, self.run(start()), chooser, sock.getsockname()[1])


class Good:
    """An instance on our own HTTP server: it says what it got, or streams as it is told."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_server(("127.0.0.1", port), reuse_port=False)
        self.port = self.sock.getsockname()[1]
        self.requests: list[Request] = []
        self.left = threading.Event()
        self.go_on = asyncio.Event()
        table = {("POST", path): self._answer for path in (CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses")}
        table |= {("GET", "/v1/models"): self._models, ("GET", "/health"): self._models}
        limits = Limits(body_bytes_max=64 << 20, connections_max=2000, idle_seconds=30)
        self.server = Server(Routes(table), _refuse, limits=limits)

    async def _models(self, request: Request) -> Response:
        return Response(b'{"object":"list","data":[]}')

    async def _answer(self, request: Request) -> Response:
        self.requests.append(request)
        body = json.loads(request.body)
        if body.get("stream"):
            events = self._events(body.get("events", 3), USAGE if body.get("usage", True) else b'"choices":[]')
            return Response(events, content_type="text/event-stream")
        if "status" in body:
            return Response(b'{"error":{}}', body["status"])
        if "wait_seconds" in body:
            await asyncio.sleep(body["wait_seconds"])
        digest = hashlib.sha256(request.body).hexdigest().encode()
        return Response(b'{"sha256":"%b","pad":"%b",%b}' % (digest, b"x" * body.get("pad", 0), USAGE))

    async def _events(self, count: int, last: bytes) -> AsyncGenerator[bytes]:
        try:
            for at in range(count):
                yield b'data: {"at":%d}\n\n' % at
                await asyncio.sleep(0.005)
            yield b"data: {%b}\n\n" % last
            await asyncio.sleep(0.005)
            yield b"data: [DONE]\n\n"
            await asyncio.sleep(0.005)
        finally:
            self.left.set()


class Door:
    """A running gateway, and how tests speak with it."""

    def __init__(self, world: World, gateway: Gateway, chooser: InTurn, port: int) -> None:
        self.world, self.gateway, self.chooser, self.port = world, gateway, chooser, port

    def connect(self) -> Line:
        """A new connection."""
        return Line(socket.create_connection(("127.0.0.1", self.port), WAIT_SECONDS))

    def ask(self, body: bytes = b"{}", *, path: str = CHAT, headers: str = "") -> Answer:
        """One request on a connection of its own."""
        with self.connect() as line:
            line.send(post(body, path=path, headers=headers))
            return line.answer()

    def counted(self, name: str) -> dict[str, float]:
        """The series of one counter."""
        text = self.world.call(self.gateway.metrics_text)
        lines = [line.rpartition(" ") for line in text.splitlines() if line.startswith(f"thermocline_{name}")]
        return {series.removeprefix(f"thermocline_{name}"): float(value) for series, _, value in lines}


def post(body: bytes, *, path: str = CHAT, headers: str = "", method: str = "POST") -> bytes:
    """A request."""
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n{headers}"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body


def get(path: str, headers: str = "") -> bytes:
    """A request."""
    return f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n{headers}\r\n".encode()


class Answer:
    """What came back. `whole` is False where the connection ended before the answer did."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes, *, whole: bool) -> None:
        self.status, self.headers, self.body, self.whole = status, headers, body, whole

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """The `code` of an error."""
        return self.json["error"]["code"]


class Line:
    """One connection of a client."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._held = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def ask(self, data: bytes) -> Answer:
        self.send(data)
        return self.answer()

    def _more(self) -> bool:
        try:
            data = self.sock.recv(1 << 16)
        except ConnectionResetError:
            data = b""
        self._held += data
        return bool(data)

    def _until(self, ending: bytes) -> bytes | None:
        while ending not in self._held:
            if not self._more():
                return None
        found, _, self._held = self._held.partition(ending)
        return found

    def _exactly(self, count: int) -> bytes:
        while len(self._held) < count and self._more():
            pass
        found, self._held = self._held[:count], self._held[count:]
        return found

    def closed(self) -> bool:
        """True once the other side has closed and nothing more came."""
        return not self._more() and not self._held

    def head(self) -> tuple[int, dict[str, str]] | None:
        """Status and headers; None where the connection ended."""
        head = self._until(b"\r\n\r\n")
        if head is None:
            return None
        first, *lines = head.decode("latin-1").split("\r\n")
        pairs = [line.partition(": ") for line in lines]
        return int(first.split()[1]), {name.lower(): value for name, _, value in pairs}

    def answer(self) -> Answer:
        """One answer, framed as its head says."""
        found = self.head()
        assert found is not None, "the connection ended before an answer"
        status, headers = found
        if headers.get("transfer-encoding") == "chunked":
            body, whole = self._chunks()
            return Answer(status, headers, body, whole=whole)
        if "content-length" in headers:
            length = int(headers["content-length"])
            body = self._exactly(length)
            return Answer(status, headers, body, whole=len(body) == length)
        while self._more():
            pass
        body, self._held = self._held, b""
        return Answer(status, headers, body, whole=True)

    def _chunks(self) -> tuple[bytes, bool]:
        body = b""
        while (size := self._until(b"\r\n")) is not None:
            piece = self._exactly(int(size, 16) + 2)
            if piece == b"\r\n":
                return body, True
            body += piece[: int(size, 16)]
        return body, False


@contextlib.contextmanager
def served(count: int = 1, **options: Any) -> Iterator[tuple[Door, list[Good]]]:
    """A gateway in front of so many good instances."""
    with World() as world:
        instances = [world.good() for _ in range(count)]
        yield world.gateway([each.port for each in instances], **options), instances


def until(true: Callable[[], object]) -> bool:
    """Wait for something to become true."""
    deadline = CLOCK.now() + WAIT_SECONDS
    while not true():
        if CLOCK.now() > deadline:
            return False
        CLOCK.sleep(0.005)
    return True


def _refuse(error: RequestError) -> Response:
    return Response(openai.error_body(error), error.status)
