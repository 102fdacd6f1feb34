"""The link over which a Redis server tells this process what has changed, and the memory that hangs on it.

One RESP3 connection and one thread for all clients of a process that are set up alike, of either colour. Tracking is
switched on first, then memory is cleared, then served, for as long as PINGs are answered in time. When the link is lost
all of it is forgotten and nothing is served until there is a new one: slower, and still right.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import selectors
import socket
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.exceptions import RedisError

from thermocline.clock import Clock, SystemClock
from thermocline.errors import NearError
from thermocline.near.coherence import View
from thermocline.near.options import Options
from thermocline.near.recorder import Recorder

LOG = logging.getLogger("thermocline.near")
PINGS_PER_LEASE = 4
"""A lease is renewed so many times before it would end."""
RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.05, 5.0
CONNECT_SECONDS_MAX = 2.0
TELL_SECONDS = 300.0
"""A link that is lost is told in the log once in this time. `stats` counts each loss."""
ASKED_MAX = 10_000
"""Questions that may wait for the link; one more is answered at once: not told."""
OF_CONNECTIONS = ("host", "port", "path", "db", "username", "password", "credential_provider", "socket_keepalive")
"""What the link's connection shares with those of the clients, beside all about TLS."""
KINDS = {kind.__name__: kind for kind in (Connection, SSLConnection, UnixDomainSocketConnection)}
"""Of connections that the link can be one of, by their name in both colours."""


@dataclass(slots=True)
class LinkStats:
    """Counts since the start. `up`: whether memory is served now."""

    up: bool = False
    links: int = 0
    lost: int = 0
    failed: int = 0
    invalidations: int = 0
    fetches: int = 0
    refreshes_failed: int = 0


class Link:
    """A thread that follows one server for one view. Started by the first question, ended by `close`."""

    def __init__(self, arguments: Mapping[str, Any], options: Options, clock: Clock) -> None:
        self.stats = LinkStats()
        self._arguments, self._options, self._clock = arguments, options, clock
        self._lock = threading.Lock()
        self._asked: deque[tuple[tuple[Any, ...], Future[Any]]] = deque()
        self._sent: deque[tuple[float, Future[Any] | None]] = deque()
        self._connection: Any = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._woken: socket.socket | None = None
        self._wake: socket.socket | None = None
        self._quiet_until = -math.inf

    # -- any thread ----------------------------------------------------------------------------------------------------

    def start(self, view: View) -> None:
        """Follow the server, if that is not done already. The thread keeps the view's parts alive, not the view."""
        with self._lock:
            if self._thread is None and not self._closing.is_set():
                self._woken, self._wake = socket.socketpair()
                self._cache, self._lease, self._drop = view.cache, view.lease, _dropper(view)
                self._thread = threading.Thread(target=self._follow, name="near-tracking", daemon=True)
                self._thread.start()

    def ask(self, *command: Any) -> Future[Any]:  # noqa: ANN401  # the words of a command
        """Send a command over the link. The reply comes after all that the server told before; None if none comes."""
        future: Future[Any] = Future()
        if self._connection is None or len(self._asked) >= ASKED_MAX:
            future.set_result(None)
            return future
        self._asked.append((command, future))
        self._stir()
        return future

    def close(self) -> None:
        """Let go of the connection and the thread. Does not wait."""
        self._closing.set()
        self._stir()

    def leave_to_parent(self) -> None:
        """In a child process: close our copies of the descriptors; the parent's connection goes on."""
        connection = self._connection
        if connection is not None:
            connection.disconnect()  # knows that it belongs to another process
        self._let_go()

    def _stir(self) -> None:
        if self._wake is not None:
            with contextlib.suppress(OSError):  # full, so the thread is woken anyway; or closed
                self._wake.send(b"!", socket.MSG_DONTWAIT)

    def _let_go(self) -> None:
        for end in (self._woken, self._wake):
            if end is not None:
                end.close()

    # -- the link's own thread -----------------------------------------------------------------------------------------

    def _follow(self) -> None:
        pause = RETRY_SECONDS_MIN
        while not self._closing.is_set():
            try:
                self._connect()
                pause = RETRY_SECONDS_MIN
                self._listen()
            except (RedisError, NearError, OSError, ValueError, TypeError) as error:
                self._lost(None if self._closing.is_set() else error)  # a server that ends after its clients is no news
            self._closing.wait(pause)
            pause = min(2 * pause, RETRY_SECONDS_MAX)
        self._lost(None)
        self._let_go()

    def _connect(self) -> None:
        connection = _connection(self._arguments, self._options.stale_seconds_max)
        connection.connect()
        connection._parser.set_invalidation_push_handler(_as_it_is)  # noqa: SLF001  # there is no public way
        words = ["CLIENT", "TRACKING", "ON"]
        if self._options.mode == "bcast":
            words += ["BCAST", *(word for prefix in self._options.prefixes for word in ("PREFIX", prefix))]
        connection.send_command(*words)
        while _is_push(connection.read_response(disable_decoding=True, push_request=True)):
            pass
        self._cache.clear()  # also refuses what was fetched before the server began to tell
        self._connection = connection
        self.stats.links += 1

    def _listen(self) -> None:
        connection, beat = self._connection, self._options.stale_seconds_max / PINGS_PER_LEASE
        assert self._woken is not None
        next_ping = -math.inf
        with selectors.DefaultSelector() as ready:
            ready.register(connection._sock, selectors.EVENT_READ)  # noqa: SLF001  # two sockets are waited for
            ready.register(self._woken, selectors.EVENT_READ)
            while not self._closing.is_set():
                now = self._clock.now()
                if self._sent and now - self._sent[0][0] > self._options.stale_seconds_max:
                    raise TimeoutError("no answer to a PING in time")
                if now >= next_ping:
                    next_ping = now + beat
                    self._send(("PING",), None)
                while self._asked:
                    self._send(*self._asked.popleft())
                if connection.can_read(0):
                    self._heard(connection.read_response(disable_decoding=True, push_request=True))
                elif any(key.fileobj is self._woken for key, _ in ready.select(max(0.0, next_ping - now))):
                    self._woken.recv(4096)  # one that was counted as ready does not wait

    def _send(self, command: tuple[Any, ...], future: Future[Any] | None) -> None:
        self._sent.append((self._clock.now(), future))
        self._connection.send_command(*command)

    def _heard(self, message: Any) -> None:  # noqa: ANN401  # a push or a reply
        if _is_push(message):
            keys = message[1]
            self.stats.invalidations += 1 if keys is None else len(keys)
            if keys is None:
                self._cache.clear()
            else:
                self._drop(keys)
            return
        sent_at, future = self._sent.popleft()
        self._lease.until = max(self._lease.until, sent_at + self._options.stale_seconds_max)
        self.stats.up = True
        if future is not None:
            future.set_result(message)

    def _lost(self, error: Exception | None) -> None:
        self._lease.until = -math.inf
        self._cache.clear()
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()
        while self._asked or self._sent:
            _, future = self._asked.popleft() if self._asked else self._sent.popleft()
            if future is not None:
                future.set_result(None)
        self.stats.lost += self.stats.up
        self.stats.failed += error is not None and not self.stats.up
        self.stats.up = False
        if error is not None and self._clock.now() > self._quiet_until:
            self._quiet_until = self._clock.now() + TELL_SECONDS
            LOG.warning(
                "near: no tracking link (%s: %s); all reads go to the server until there is one. hint: %s",
                type(error).__name__,
                error,
                getattr(error, "hint", None) or "it takes Redis 6 or newer, and a user who may do CLIENT TRACKING",
            )


def _as_it_is(message: Any) -> Any:  # noqa: ANN401  # a push
    return message


def _is_push(message: object) -> bool:
    return isinstance(message, list) and bool(message) and message[0] == b"invalidate"


def _dropper(view: View) -> Any:  # noqa: ANN401  # a method that does not keep its object alive
    weak = weakref.WeakMethod(view.changed)

    def drop(keys: list[bytes]) -> None:
        method = weak()
        if method is not None:
            method(keys)

    return drop


def _connection(arguments: Mapping[str, Any], stale_seconds_max: float) -> Any:  # noqa: ANN401  # of one of three classes
    kind = arguments["kind"]
    if kind not in KINDS:
        hint = "connect to one server by host, port or path, without Sentinel or a class of your own"
        raise NearError("connections of this class may lead anywhere", hint=hint)
    chosen = {name: arguments[name] for name in OF_CONNECTIONS if arguments.get(name) is not None}
    tls = {name: value for name, value in arguments.items() if name.startswith("ssl_") and value is not None}
    if KINDS[kind] is UnixDomainSocketConnection:
        chosen = {name: value for name, value in chosen.items() if name not in {"host", "port", "socket_keepalive"}}
    else:
        chosen["socket_connect_timeout"] = CONNECT_SECONDS_MAX
    made: Any = KINDS[kind]
    return made(protocol=3, socket_timeout=min(stale_seconds_max, CONNECT_SECONDS_MAX), **chosen, **tls)


def _kind(connections: type) -> str:
    """A name of KINDS, or one that is not there: nobody knows where another class connects to."""
    ours = connections.__module__ in {"redis.connection", "redis.asyncio.connection"}
    return connections.__name__ if ours else f"{connections.__module__}.{connections.__name__}"


# -- one for all clients of a process that are set up alike -----------------------------------------------------------

_VIEWS: dict[object, weakref.ref[Near]] = {}
_LOCK = threading.Lock()


class Near:
    """A view and its link. What `client.near` is."""

    def __init__(self, arguments: Mapping[str, Any], options: Options) -> None:
        self._arguments, self.options = dict(arguments), options
        self.recorder = Recorder(options.profile) if options.profile else None
        self._users: weakref.WeakSet[Any] = weakref.WeakSet()
        self._begin()

    def _begin(self) -> None:
        clock = SystemClock()
        self.link = Link(self._arguments, self.options, clock)
        encoding = str(self._arguments.get("encoding", "utf-8")).lower().replace("utf8", "utf-8")
        errors = str(self._arguments.get("encoding_errors", "strict"))
        decodes = bool(self._arguments.get("decode_responses"))
        self.view = View(self.options, clock, self.link.ask, encoding=encoding, errors=errors, decodes=decodes)
        self._end = weakref.finalize(self, self.link.close)

    def join(self, client: object) -> None:
        """A client uses this."""
        self._users.add(client)

    def leave(self, client: object) -> None:
        """A client was closed. With the last one the link ends and all is forgotten, until one of them reads again."""
        self._users.discard(client)
        if not self._users:
            self.view.lease.until = -math.inf
            self._end()
            self._begin()

    def wait(self, seconds: float = 5.0) -> bool:
        """Wait until memory is served; False where it is not in time. Never needed: until then the server answers."""
        self.link.start(self.view)
        clock = SystemClock()
        deadline = clock.now() + seconds
        while not self.view.serving() and clock.now() < deadline:
            clock.sleep(0.001)
        return self.view.serving()

    def stats(self) -> LinkStats:
        """Counts of the link; those of the memory are `view.cache.stats()`."""
        view = self.view
        return replace(self.link.stats, up=view.serving(), fetches=view.fetches, refreshes_failed=view.refreshes_failed)

    def start_afresh(self) -> None:
        """In a child process: no thread and no lock of the parent's is here, so nothing of it is used."""
        self._end.detach()
        self.view.lease.until = -math.inf
        self.link.leave_to_parent()
        self._begin()


def near_of(pool: Any, options: Options) -> Near:  # noqa: ANN401  # of either colour
    """That of all clients whose pools make such connections, with these options."""
    arguments = {**pool.connection_kwargs, "kind": _kind(pool.connection_class)}
    names = ("kind", *OF_CONNECTIONS, "encoding", "encoding_errors", "decode_responses", "ssl_ca_certs", "ssl_certfile")
    identity = (options, *(_identity(arguments.get(name)) for name in names))
    with _LOCK:
        held = _VIEWS.get(identity)
        found = held() if held is not None else None
        if found is None:
            for dead in [key for key, weak in _VIEWS.items() if weak() is None]:
                del _VIEWS[dead]
            found = Near(arguments, options)
            _VIEWS[identity] = weakref.ref(found)
        return found


def _identity(value: object) -> object:
    return value if isinstance(value, str | int | bytes | None) else id(value)


def _forked() -> None:
    global _LOCK  # noqa: PLW0603  # the parent's may be held for ever
    _LOCK = threading.Lock()
    for weak in list(_VIEWS.values()):
        held = weak()
        if held is not None:
            held.start_afresh()


os.register_at_fork(after_in_child=_forked)
