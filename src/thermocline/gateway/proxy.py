"""The gateway: an OpenAI-compatible door in front of many instances, on one event loop.

Gateway     listens, counts, drains; owns what the others share
client.py   one client's connection: what comes in
exchange.py one request: choose, send, splice, retry
link.py     one connection to an instance: what comes back
standing.py which instances may be asked at all
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Sequence

import msgspec

from thermocline.clock import Clock, SystemClock
from thermocline.errors import RequestError, SettingsError
from thermocline.fleet.instance import Instance
from thermocline.gateway.admission import Keys, RetryBudget, Tenant
from thermocline.gateway.client import Client
from thermocline.gateway.decisions import Decisions, Record
from thermocline.gateway.observe import Observer
from thermocline.gateway.routes import ROUTES, Kind, Route, openapi
from thermocline.gateway.rules import Rules
from thermocline.gateway.seam import Chooser
from thermocline.gateway.standing import Standings, State
from thermocline.metrics import Metrics
from thermocline.settings import is_loopback
from thermocline.tokens.recent import Recent
from thermocline.wire.http import Limits

LOG = logging.getLogger("thermocline.gateway")
SWEEP_SECONDS = 0.1
"""How late a deadline may be noticed. One timer looks at all connections: one each would cost every request."""
HOSTS_KNOWN_MAX = 64
BACKLOG = 1024
TEXT, JSON = "text/plain; version=0.0.4", "application/json"


class Gateway:
    """Listens until stopped. All of it runs on the loop that `start` was called on."""

    def __init__(
        self,
        chooser: Chooser,
        instances: Sequence[Instance] = (),
        *,
        host: str = "127.0.0.1",
        keys: Keys | None = None,
        limits: Limits | None = None,
        rules: Rules | None = None,
        clock: Clock | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        if keys is None and not is_loopback(host):
            msg = f"host {host} can be reached from other machines, and no API keys protect it"
            raise SettingsError(msg, hint="give it API keys, or listen on 127.0.0.1")
        self.chooser, self.keys = chooser, keys
        self.instance_key = b""  # the header's line that all instances get, if they ask for a key
        self.limits, self.rules = limits or Limits(connections_max=4096), rules or Rules()
        self.clock, self.metrics = clock or SystemClock(), metrics or Metrics()
        self.budget = RetryBudget(self.rules.retry_share, self.rules.retry_burst)
        self.decisions = Decisions(self.rules.decisions_kept)
        self.standings = Standings(chooser, self.rules, self.clock)
        for instance in instances:
            self.standings.add(instance, slowly=False)
        self.observer: Observer | None = None
        self.recent: Recent | None = None
        self.stopping = False
        self.held_bytes = self.in_flight = 0
        self._local = is_loopback(host)
        self._hosts: set[bytes] = set()
        self._clients: set[Client] = set()
        self._gone = asyncio.Event()
        self._listeners: list[asyncio.Server] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._answers: dict[tuple[str, int], int] = {}
        self._took: list[tuple[float, float]] = []
        self._prompt_tokens = self._cached_tokens = self._predicted_tokens = self._output_tokens = 0
        self._name, self._count = secrets.token_hex(4), 0

    # -- its life ------------------------------------------------------------------------------------------------------

    async def start(self, sock: socket.socket) -> None:
        """Accept connections on a bound socket, and begin to watch the instances."""
        loop = asyncio.get_running_loop()
        self._listeners.append(await loop.create_server(lambda: Client(self), sock=sock, backlog=BACKLOG))
        self._tasks = [loop.create_task(self.standings.watch()), loop.create_task(self._sweep())]

    async def stop(self, drain_seconds: float = 10.0) -> None:
        """Accept nothing more, let requests in flight finish for so long, then cut them off."""
        self.stopping = True
        for listener in self._listeners:
            listener.close()
        for client in tuple(self._clients):
            client.close_when_idle()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                while self._clients:
                    self._gone.clear()
                    await self._gone.wait()
        for client in tuple(self._clients):
            client.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for standing in self.standings:
            standing.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = self.clock.now()
            self._observe()
            for each in (*self._clients, *self.standings):
                try:
                    each.sweep(now)
                except Exception:
                    LOG.exception("a deadline could not be held")  # those of the others are

    # -- who comes in --------------------------------------------------------------------------------------------------

    def admit(self, client: Client) -> bool:
        """Count a connection; False when there are too many."""
        self._clients.add(client)
        return len(self._clients) <= self.limits.connections_max

    def forget(self, client: Client) -> None:
        """The connection is closed."""
        self._clients.discard(client)
        self._gone.set()

    def find(self, method: bytes, url: bytes) -> Route:
        """The route of a request. Raises RequestError for everything that is not in the table."""
        path = url.partition(b"?")[0]
        route = ROUTES.get(path)
        if route is None:
            msg = f"there is nothing at {path.decode('latin-1')}"
            raise RequestError(msg, hint="/openapi.json lists the routes", status=404, code="not_found")
        if method != route.method.encode():
            msg = f"{route.path} does not take {method.decode('latin-1')}"
            raise RequestError(msg, hint=f"use {route.method}", status=405, code="method_not_allowed")
        return route

    def check_host(self, host: bytes) -> None:
        """On loopback, a browser led here by a foreign name (DNS rebinding) gets nothing. Raises RequestError."""
        if not self._local or host in self._hosts:
            return
        name = host.decode("latin-1")
        name = name.rpartition(":")[0] if name.rpartition(":")[2].isdecimal() else name
        if name and not is_loopback(name.strip("[]")):
            msg = "this gateway answers to its loopback address only"
            raise RequestError(msg, hint="use the address it printed", status=403, code="wrong_host")
        if len(self._hosts) < HOSTS_KNOWN_MAX:
            self._hosts.add(host)

    def tenant(self, route: Route, authorization: bytes) -> Tenant | None:
        """Who asks; None where no keys are needed. Raises RequestError for a wrong key, or one that may not."""
        if self.keys is None or route.kind in {Kind.HEALTH, Kind.OPENAPI}:
            return None
        tenant = self.keys.tenant(authorization)
        if route.kind is Kind.METRICS and not tenant.operator:
            msg = "this key may not see the counters"
            raise RequestError(msg, hint="use one with operator = true", status=403, code="not_operator")
        return tenant

    def enter(self, tenant: Tenant | None) -> float:
        """A request begins; returns the time. Raises RequestError where there are too many."""
        if self.in_flight >= self.rules.requests_max or (tenant and tenant.in_flight >= tenant.requests_max):
            msg = "too many requests are in flight"
            raise RequestError(msg, hint="come again after Retry-After seconds", status=429, code="too_many")
        self.in_flight += 1
        self.budget.earn()
        if tenant is not None:
            tenant.in_flight += 1
        return self.clock.now()

    def new_id(self) -> str:
        """A name for a request that has none."""
        self._count += 1
        return f"{self._name}-{self._count:x}"

    # -- our own answers -----------------------------------------------------------------------------------------------

    def answer(self, kind: Kind) -> tuple[bytes, int, str]:
        """Body, status and content type of a route that no instance answers."""
        if kind is Kind.METRICS:
            return self.metrics_text().encode(), 200, TEXT
        if kind is Kind.OPENAPI:
            return msgspec.json.encode(openapi()), 200, JSON
        up = not self.stopping and self.standings.any_up(self.clock.now())
        return (b'{"status":"ok"}', 200, JSON) if up else (b'{"status":"no instance"}', 503, JSON)

    # -- what is counted -----------------------------------------------------------------------------------------------

    def count(self, route: Route | None, status: int) -> None:
        """An answer was written."""
        key = (route.path if route is not None else "unknown", status)
        self._answers[key] = self._answers.get(key, 0) + 1

    def over(self, record: Record) -> None:
        """A request is over, however it ended."""
        self.in_flight -= 1
        self.decisions.keep(record)
        last, usage = record.tries[-1] if record.tries else None, record.usage
        if last is None or last.first_byte_seconds is None:
            return
        self._took.append((last.first_byte_seconds, record.seconds))
        if usage is not None:
            self._prompt_tokens += usage.prompt_tokens or 0
            self._cached_tokens += usage.cached_tokens or 0
            self._predicted_tokens += last.cached_tokens
            self._output_tokens += usage.output_tokens or 0

    def _observe(self) -> None:
        """What answers took, since the last sweep: all at once costs less than each by itself."""
        for first_byte_seconds, seconds in self._took:
            self.metrics.observe("first_byte_seconds", first_byte_seconds)
            self.metrics.observe("answer_seconds", seconds)
        self._took.clear()

    def metrics_text(self) -> str:
        """Everything counted, in the Prometheus text format. What requests counted in plain numbers is added now."""
        now, metrics = self.clock.now(), self.metrics
        self._observe()
        for (path, status), count in self._answers.items():
            metrics.count("requests_total", count, (("route", path), ("status", str(status))))
        self._answers.clear()
        metrics.count("prompt_tokens_total", self._prompt_tokens)
        metrics.count("routed_cached_tokens_total", self._cached_tokens)
        metrics.count("predicted_cached_tokens_total", self._predicted_tokens)
        metrics.count("generated_tokens_total", self._output_tokens)
        self._prompt_tokens = self._cached_tokens = self._predicted_tokens = self._output_tokens = 0
        for standing in self.standings:
            label = (("instance", standing.instance.name),)
            metrics.count("routed_total", standing.routed, label)
            standing.routed = 0
            metrics.gauge("instance_up", float(standing.state(now) is State.UP), label)
            metrics.gauge("instance_in_flight", standing.in_flight, label)
        metrics.gauge("requests_in_flight", self.in_flight)
        metrics.gauge("client_connections", len(self._clients))
        metrics.gauge("held_body_bytes", self.held_bytes)
        if self.observer is not None:
            self.observer.measure(metrics, self.standings)
        return metrics.text()
