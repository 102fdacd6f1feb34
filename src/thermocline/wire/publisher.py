"""Publishing KV events over ZeroMQ, in vLLM's form: [topic, sequence, batch], and a replay of what was missed.

vLLM's replay: a subscriber sends ["", first sequence] and is answered ["", topic, sequence, batch] for each that is
still kept, and then a sequence of -1. Ours does one thing more: who subscribes is told all that is held, by `tell_all`,
so a router that comes late, or again, need not wait until everything was stored anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import zmq

from thermocline.clock import Clock, SystemClock
from thermocline.errors import SettingsError
from thermocline.settings import is_loopback
from thermocline.wire.events import Batch, Event, write_batch

LOG = logging.getLogger("thermocline.events")
QUEUED_MAX, KEPT_MAX, KEPT_BYTES_MAX = 10_000, 10_000, 32 << 20
WAITING_MAX = 1000
"""Messages that wait for one subscriber who does not read; what comes then it has missed, and may ask for."""
TOPICS_MAX = 256
REQUEST_BYTES_MAX = 1024
TELL_ALL_SECONDS = 1.0
"""Subscribers that come within so long of each other are told together."""
NO_TOPIC, END = b"", (-1).to_bytes(8, "big", signed=True)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a socket is: `address` as ZeroMQ writes it. It binds there, or it connects."""

    address: str
    binds: bool

    @classmethod
    def parse(cls, text: str, *, binds: bool) -> Endpoint:
        """tcp://HOST:PORT or ipc:///PATH; a leading @ says that it binds, a leading > that it connects.

        Raises SettingsError for anything else, and for binding where other machines reach it: events tell token ids, to
        whoever connects. A further ! says that one address of a network that is trusted is meant: @!tcp://10.0.0.5:5557
        """
        address = text.removeprefix("@").removeprefix(">").removeprefix("!")
        binds = text.startswith("@") or (binds and not text.startswith(">"))
        scheme, _, rest = address.partition("://")
        host, _, port = rest.rpartition(":")
        if scheme not in {"tcp", "ipc"} or not rest or (scheme == "tcp" and not (host and port.isdecimal())):
            raise SettingsError(f"{text} is no endpoint", hint="write tcp://127.0.0.1:5557 or ipc:///run/user/1000/kv")
        meant = "!" in text and _is_one_address(host.strip("[]"))
        if binds and scheme == "tcp" and not is_loopback(host.strip("[]")) and not meant:
            hint = "listen on 127.0.0.1, or name one address of a network that you trust, as in @!tcp://10.0.0.5:5557"
            raise SettingsError(f"{text} would give events to anyone who can reach this machine", hint=hint)
        return cls(address, binds)

    def open(self, sock: zmq.Socket[bytes]) -> None:
        """Bind or connect. Raises SettingsError where that cannot be."""
        try:
            if self.binds:
                sock.bind(self.address)
            else:
                sock.connect(self.address)
        except zmq.ZMQError as error:
            hint = "end what listens there, or choose another endpoint"
            raise SettingsError(f"cannot use {self.address} for KV events: {error.strerror}", hint=hint) from None


def _is_one_address(host: str) -> bool:
    import ipaddress

    with contextlib.suppress(ValueError):
        return not ipaddress.ip_address(host).is_unspecified
    return False


class Publisher:
    """Publishes from a thread of its own; any thread may hand in events, and none ever waits.

    Each topic is numbered from 0 on. What finds the queue full is dropped, and is a gap in the numbers then, as is what
    ZeroMQ drops. `tell_all` gives an iterator; each step of it publishes some of what is held now. Raises SettingsError
    where an endpoint cannot be had.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None = None,
        *,
        tell_all: Callable[[], Iterator[None]] | None = None,
        queued_max: int = QUEUED_MAX,
        kept_max: int = KEPT_MAX,
        clock: Clock | None = None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._tell_all = tell_all
        self._telling: Iterator[None] = iter(())
        self._told, self._wanted = -TELL_ALL_SECONDS, False
        self._queued_max, self._kept_max = queued_max, kept_max
        self._queue: deque[tuple[bytes, int, float, Sequence[Event]]] = deque()
        self._kept: deque[tuple[bytes, int, bytes]] = deque()
        self._kept_bytes = 0
        self._sequences: Counter[bytes] = Counter()
        self._lock = threading.Lock()
        self._closing = False
        self.dropped = 0
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context = zmq.Context()
        try:
            self._pub = self._socket(zmq.XPUB, Endpoint.parse(endpoint, binds=False))
            self._pub.set(zmq.XPUB_VERBOSE, 1)
            self._router = (
                self._socket(zmq.ROUTER, Endpoint.parse(replay_endpoint, binds=True)) if replay_endpoint else None
            )
        except BaseException:
            self._context.destroy(linger=0)
            os.close(self._wake)
            raise
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def publish(self, topic: str, events: Sequence[Event]) -> bool:
        """Send these as one batch, soon. False where they were dropped: too many wait, or it is closed."""
        name = topic.encode()
        with self._lock:
            if self._closing or (name not in self._sequences and len(self._sequences) >= TOPICS_MAX):
                self.dropped += 1
                return False
            sequence = self._sequences[name]
            self._sequences[name] += 1
            if len(self._queue) >= self._queued_max:
                self.dropped += 1
                return False
            self._queue.append((name, sequence, self._clock.wall(), events))
            if len(self._queue) == 1:
                os.eventfd_write(self._wake, 1)
        return True

    def tell_again(self) -> None:
        """Have all that is held told once more, to everyone: there is more of it than `publish` was told of."""
        with self._lock:
            if not self._closing:
                self._wanted = True
                os.eventfd_write(self._wake, 1)

    def close(self, seconds: float = 1.0) -> None:
        """Send what waits, within a bound, and end. A second call does nothing."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            os.eventfd_write(self._wake, 1)
        self._thread.join(seconds)
        if not self._thread.is_alive():
            os.close(self._wake)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _socket(self, kind: int, endpoint: Endpoint) -> zmq.Socket[bytes]:
        sock = self._context.socket(kind)
        sock.set(zmq.SNDHWM, WAITING_MAX if kind == zmq.XPUB else self._kept_max + 1)
        sock.set(zmq.MAXMSGSIZE, REQUEST_BYTES_MAX)
        sock.set(zmq.LINGER, 200)
        endpoint.open(sock)
        return sock

    def _run(self) -> None:
        poller = zmq.Poller()
        for each in (self._wake, self._pub, *([self._router] if self._router else [])):
            poller.register(each, zmq.POLLIN)
        try:
            while not self._closing or self._queue:
                busy = self._step()
                ready = dict(poller.poll(0 if busy else self._pause_ms()))
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                if self._pub in ready:
                    self._subscribed()
                if self._router in ready:
                    self._replay()
        except Exception:  # an engine goes on without events; the router finds out by their absence
            LOG.exception("KV events are published no more")
        finally:
            with self._lock:
                self._closing = True
            self._context.destroy(linger=200)

    def _pause_ms(self) -> int | None:
        return int(1000 * max(0.0, self._told + TELL_ALL_SECONDS - self._clock.now())) + 1 if self._wanted else None

    def _step(self) -> bool:
        """Send some of what waits, and begin or go on with telling all. True where there is more to do at once."""
        for _ in range(min(len(self._queue), 64)):
            topic, sequence, seconds, events = self._queue.popleft()
            self._send(topic, sequence, write_batch(Batch(seconds, tuple(events))))
        now = self._clock.now()
        if self._wanted and self._tell_all and now >= self._told + TELL_ALL_SECONDS:
            self._wanted, self._told, self._telling = False, now, self._tell_all()
        if not self._closing and len(self._queue) < self._queued_max // 2:
            with contextlib.suppress(StopIteration):
                next(self._telling)
                return True
        return bool(self._queue)

    def _send(self, topic: bytes, sequence: int, payload: bytes) -> None:
        with contextlib.suppress(zmq.Again):
            self._pub.send_multipart((topic, sequence.to_bytes(8, "big"), payload), zmq.NOBLOCK)
        self._kept.append((topic, sequence, payload))
        self._kept_bytes += len(payload)
        while len(self._kept) > self._kept_max or self._kept_bytes > KEPT_BYTES_MAX:
            self._kept_bytes -= len(self._kept.popleft()[2])

    def _subscribed(self) -> None:
        with contextlib.suppress(zmq.Again):
            while True:
                said = self._pub.recv(zmq.NOBLOCK)
                self._wanted |= said[:1] == b"\1" and self._tell_all is not None

    def _replay(self) -> None:
        """Answer one request. Whoever asks for what is not kept any more is told all that is held, a little later."""
        assert self._router is not None
        asker, *request = self._router.recv_multipart()
        if len(request) != 2 or len(request[1]) != len(END):  # noqa: PLR2004  # an empty frame and the sequence
            return
        first = int.from_bytes(request[1], "big")
        oldest: dict[bytes, int] = {}
        with contextlib.suppress(zmq.ZMQError):  # it does not read its answer, or is gone
            for topic, sequence, payload in self._kept:
                oldest.setdefault(topic, sequence)
                if sequence >= first:
                    frames = (asker, b"", topic, sequence.to_bytes(8, "big"), payload)
                    self._router.send_multipart(frames, zmq.NOBLOCK)
            self._router.send_multipart((asker, b"", NO_TOPIC, END, b""), zmq.NOBLOCK)
        self._wanted |= self._tell_all is not None and any(first < number for number in oldest.values())
