"""A proxy that treats a connection badly: it delays, freezes, cuts, drops, repeats and flips what passes through it.

It stands on loopback between any client and any server, and knows no protocol. What happens to a connection is a list
of faults, at offsets counted in bytes of one direction; a seed can write that list. The same faults on the same bytes
give the same bytes, however the network cuts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import fcntl
import random
import socket
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Self

CHUNK_BYTES = 1 << 16
REST = 1 << 62
"""A count of bytes that no connection reaches."""
ARRIVAL_WAITS_MAX = 1000


class Way(enum.StrEnum):
    """A direction."""

    UP = "up"  # from the client to the server
    DOWN = "down"  # from the server to the client


@dataclass(frozen=True, slots=True)
class Flip:
    """One bit of the byte at this offset is wrong."""

    way: Way
    at: int
    bit: int = 0
    count: int = field(default=1, init=False)


@dataclass(frozen=True, slots=True)
class Drop:
    """So many bytes never arrive; those behind them do."""

    way: Way
    at: int
    count: int = REST


@dataclass(frozen=True, slots=True)
class Repeat:
    """So many bytes arrive twice in a row."""

    way: Way
    at: int
    count: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Once so many bytes have passed, both ends see the connection reset."""

    way: Way
    at: int = 0


@dataclass(frozen=True, slots=True)
class End:
    """Once so many bytes have passed, this direction ends as if its sender had closed it; the other one goes on."""

    way: Way
    at: int = 0


@dataclass(frozen=True, slots=True)
class Freeze:
    """Once so many bytes have passed, nothing more does in this direction; the connection stays open."""

    way: Way
    at: int = 0


@dataclass(frozen=True, slots=True)
class Pause:
    """Once so many bytes have passed, the next ones wait for so long."""

    way: Way
    at: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Delay:
    """Whatever arrives in this direction is passed on so much later."""

    way: Way
    seconds: float


@dataclass(frozen=True, slots=True)
class Rate:
    """This direction passes so many bytes in a second."""

    way: Way
    bytes_per_second: float


Change = Flip | Drop | Repeat
Stop = Cut | End | Freeze | Pause
Fault = Change | Stop | Delay | Rate
Script = Callable[[int], Sequence[Fault]]
"""The faults of the connection with this number; the first one has number 0."""


def chaos(seed: int, *, share: float = 1.0, span_bytes: int = 1 << 16, seconds_max: float = 0.05) -> Script:
    """A script that follows from its seed: one fault, of any kind, on that share of the connections."""

    def script(number: int) -> Sequence[Fault]:
        rng = random.Random(f"{seed} {number}")  # noqa: S311  # a seed must replay
        if rng.random() >= share:
            return ()
        way, at, count = rng.choice(list(Way)), rng.randrange(span_bytes), rng.randrange(1, 256)
        seconds = rng.uniform(0.0, seconds_max)
        slow: list[Fault] = [Pause(way, at, seconds), Delay(way, seconds), Rate(way, span_bytes * rng.uniform(1, 100))]
        wrong: list[Fault] = [
            Flip(way, at, rng.randrange(8)),
            Drop(way, at, count),
            Drop(way, at),
            Repeat(way, at, count),
        ]
        return [rng.choice([*slow, *wrong, Cut(way, at), End(way, at), Freeze(way, at)])]

    return script


class Stream:
    """One direction of one connection: what becomes of its bytes. Reads no clock and moves nothing."""

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self.position = 0
        self._changes: list[Change] = []
        self._stops: list[Stop] = []
        self._again: dict[Change, bytes] = {}
        self.add(faults)

    def add(self, faults: Sequence[Fault], *, start: int = 0) -> None:
        """More faults, whose offsets count from `start`."""
        for fault in faults:
            if isinstance(fault, Change):
                self._changes.append(replace(fault, at=start + fault.at))
            elif isinstance(fault, Stop):
                self._stops.append(replace(fault, at=start + fault.at))

    def stops(self) -> list[Stop]:
        """What happens here, before the next byte. Each is named once."""
        here = [stop for stop in self._stops if stop.at <= self.position]
        self._stops = [stop for stop in self._stops if stop.at > self.position]
        return here

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What is to be sent for `data`, in parts; ask for `stops` after each of them, also where it is empty."""
        end = self.position + len(data)
        edges = {self.position, end} | {stop.at for stop in self._stops}
        edges |= {edge for change in self._changes for edge in (change.at, change.at + change.count)}
        inside = sorted(edge for edge in edges if self.position <= edge <= end)
        begin = self.position
        for first, last in pairwise(inside):
            part = self._changed(first, last, data[first - begin : last - begin])
            self.position = last
            yield part

    def _changed(self, first: int, last: int, part: bytes) -> bytes:
        for change in self._changes:
            if not change.at <= first < change.at + change.count:
                continue
            if isinstance(change, Flip):
                part = bytes([part[0] ^ 1 << change.bit]) if part else part
            elif isinstance(change, Drop):
                part = b""
            else:
                again = self._again.pop(change, b"") + part
                if last == change.at + change.count:
                    part += again
                else:
                    self._again[change] = again
        return part


class Proxy:
    """Passes connections on to `target`, which is a (host, port) or the path of a Unix socket.

    Any thread may call any verb; one thread of its own moves the bytes. Used as a context manager, it ends by itself.
    """

    def __init__(self, target: tuple[str, int] | str, script: Script = lambda number: ()) -> None:
        self.script = script
        self.connections = 0
        self._target = target
        self._links: set[_Link] = set()
        self._loop = asyncio.new_event_loop()
        self._listener = _bound(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._listening = False
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self.allow()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- what a test does to the connections ---------------------------------------------------------------------------

    def strike(self, *faults: Fault) -> int:
        """Add faults to every open connection, at offsets that count from now. Returns how many connections."""

        async def act() -> int:
            for link in self._links:
                link.add(faults)
            return len(self._links)

        return self._run(act())

    def freeze(self) -> None:
        """Connections are accepted and stay open, and nothing passes."""

        async def act() -> None:
            self._thawed.clear()

        self._run(act())

    def thaw(self) -> None:
        """What was held back passes, also where a `Freeze` held it."""

        async def act() -> None:
            self._thawed.set()
            for link in self._links:
                link.thawed.set()

        self._run(act())

    def cut(self) -> int:
        """Reset every open connection. Returns how many."""

        async def act() -> int:
            links = list(self._links)
            for link in links:
                await link.reset()
            return len(links)

        return self._run(act())

    def refuse(self) -> None:
        """From now on connecting is refused, as if nobody listened there; open connections stay."""
        self._run(self._stop_listening())
        self._listener = _bound(self.address)

    def allow(self) -> None:
        """Connections are accepted again."""

        async def act() -> None:
            if not self._listening:
                self._listener.listen(128)
                self._loop.add_reader(self._listener, self._accept)
                self._listening = True

        self._run(act())

    @property
    def open_connections(self) -> int:
        """How many connections are open now."""
        return len(self._links)

    def close(self) -> None:
        """Reset what is open, let go of sockets and the thread. A second call does nothing."""
        if self._loop.is_closed():
            return
        self._run(self._stop_listening())
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _run(self, act):
        return asyncio.run_coroutine_threadsafe(act, self._loop).result(30)

    async def _stop_listening(self) -> None:
        if self._listening:
            self._loop.remove_reader(self._listener)
            self._listening = False
        self._listener.close()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:  # whoever it was has gone again
            return
        client.settimeout(0)
        link = _Link(self, client, self.script(self.connections))
        self.connections += 1
        self._links.add(link)
        link.begin()


class _Link:
    """One connection through the proxy: two sockets, two directions."""

    def __init__(self, proxy: Proxy, client: socket.socket, faults: Sequence[Fault]) -> None:
        self.thawed = asyncio.Event()
        self._proxy = proxy
        self._client = client
        self._server: socket.socket | None = None
        self._faults = list(faults)
        self._streams = {way: Stream([fault for fault in faults if fault.way is way]) for way in Way}
        self._work: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._work = self._proxy._loop.create_task(self._pass_all())

    def add(self, faults: Sequence[Fault]) -> None:
        self._faults += [fault for fault in faults if isinstance(fault, Delay | Rate)]
        for way, stream in self._streams.items():
            stream.add([fault for fault in faults if fault.way is way], start=stream.position)

    async def reset(self) -> None:
        if self._work is not None:
            await _ended(self._work)
        self._let_go(reset=True)

    async def _pass_all(self) -> None:
        loop = self._proxy._loop
        reset = False
        try:
            self._server = await _connected(loop, self._proxy._target)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(Way.UP, self._client, self._server))
                group.create_task(self._pass(Way.DOWN, self._server, self._client))
        except* (_Reset, OSError):
            reset = True
        self._let_go(reset=reset)

    async def _pass(self, way: Way, source: socket.socket, target: socket.socket) -> None:
        """Move bytes until the source ends or a fault ends it; then the target sees that end."""
        loop, stream = self._proxy._loop, self._streams[way]
        while await self._stopped(stream):
            data = await loop.sock_recv(source, CHUNK_BYTES)
            await self._proxy._thawed.wait()
            if not data or not await self._send(way, data, target):
                break
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    async def _send(self, way: Way, data: bytes, target: socket.socket) -> bool:
        """False once this direction has ended."""
        stream = self._streams[way]
        await asyncio.sleep(sum(each.seconds for each in self._faults if isinstance(each, Delay) and each.way is way))
        if not await self._stopped(stream):  # a fault may have come while we waited for these bytes
            return False
        for part in stream.feed(data):
            for slice_ in self._paced(way, part):
                await self._proxy._loop.sock_sendall(target, slice_)
                await asyncio.sleep(self._seconds(way, len(slice_)))
            if not await self._stopped(stream):
                return False
        return True

    def _paced(self, way: Way, part: bytes) -> Iterator[bytes]:
        rates = [each.bytes_per_second for each in self._faults if isinstance(each, Rate) and each.way is way]
        step = max(1, int(min(rates) / 100)) if rates else CHUNK_BYTES
        for at in range(0, len(part), step):
            yield part[at : at + step]

    def _seconds(self, way: Way, count: int) -> float:
        rates = [each.bytes_per_second for each in self._faults if isinstance(each, Rate) and each.way is way]
        return count / min(rates) if rates else 0.0

    async def _stopped(self, stream: Stream) -> bool:
        """Do what happens at this place. False where this direction ends here."""
        for stop in stream.stops():
            if isinstance(stop, Cut):
                await self._arrived()
                raise _Reset
            if isinstance(stop, End):
                return False
            if isinstance(stop, Freeze):
                self.thawed.clear()
                await self.thawed.wait()
            else:
                await asyncio.sleep(stop.seconds)
        return True

    async def _arrived(self) -> None:
        """Wait until both ends have what was sent: a reset takes back what is still on its way."""
        for sock in (self._client, self._server):
            for _ in range(ARRIVAL_WAITS_MAX):
                if sock is None or not any(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4))):
                    break
                await asyncio.sleep(0.001)

    def _let_go(self, *, reset: bool) -> None:
        """Close both sockets, in good order or with a reset."""
        for sock in (self._client, self._server):
            if sock is not None and sock.fileno() >= 0:
                if reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                sock.close()
        self._proxy._links.discard(self)


class _Reset(Exception):  # noqa: N818  # an event, not an error
    """A fault resets the connection."""


def _bound(address: tuple[str, int]) -> socket.socket:
    """A socket that keeps the address and does not listen yet: connecting to it is refused."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(address)
    listener.settimeout(0)
    return listener


async def _connected(loop: asyncio.AbstractEventLoop, target: tuple[str, int] | str) -> socket.socket:
    server = socket.socket(socket.AF_UNIX if isinstance(target, str) else socket.AF_INET, socket.SOCK_STREAM)
    server.settimeout(0)
    try:
        await loop.sock_connect(server, target)
    except BaseException:
        server.close()
        raise
    return server


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
