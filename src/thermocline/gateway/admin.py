"""The operator's door: a Unix socket that only this user can open. Instances come and go here, and decisions are read.

It is `wire.http.Server` with routes of its own; the public door knows none of them.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qs

import msgspec
from msgspec import Struct

from thermocline.errors import RequestError, SettingsError
from thermocline.fleet.instance import Instance
from thermocline.gateway.observe import Blocks
from thermocline.gateway.proxy import Gateway
from thermocline.gateway.standing import Standing, State
from thermocline.wire import openai
from thermocline.wire.http import Limits, Server
from thermocline.wire.routes import Request, Response, Routes
from thermocline.wire.sockets import private_socket

LISTED = 100
LIMIT_DIGITS_MAX = 6


class Listed(Struct, frozen=True):
    """One instance, as the admin socket shows it."""

    slot: int
    name: str
    url: str
    state: State
    in_flight: int
    ramp: float
    """The share of its share that it takes: below 1.0 while it starts slowly."""
    failures: int
    wiring: str
    """Whether its events can be believed; empty where none are listened for."""
    blocks: Blocks


def admin(gateway: Gateway) -> Server:
    """The server behind the admin socket."""
    doors = _Doors(gateway)
    table = {
        ("GET", "/instances"): doors.instances,
        ("POST", "/instances"): doors.add,
        ("POST", "/drain/*"): doors.drain,
        ("DELETE", "/instances/*"): doors.remove,
        ("GET", "/decisions"): doors.decisions,
        ("GET", "/decisions/*"): doors.decision,
        ("GET", "/metrics"): doors.metrics,
        ("GET", "/trace"): doors.trace,
    }
    return Server(Routes(table), _refusal, limits=Limits(body_bytes_max=64 << 10, connections_max=16))


def admin_socket(path: Path) -> socket.socket:
    """A bound socket that nobody else can open. What an ended gateway left behind is replaced.

    Raises ThermoclineError where it cannot be had, or another gateway listens there.
    """
    return private_socket(path, "gateway", hint="give each gateway an admin socket of its own, of at most 107 bytes")


class _Doors:
    """The handlers."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def instances(self, _: Request) -> Response:
        return _json(self._listed(tuple(self._gateway.standings)))

    async def add(self, request: Request) -> Response:
        try:
            instance = msgspec.json.decode(request.body, type=Instance)
            added = self._gateway.standings.add(instance)
        except (msgspec.MsgspecError, UnicodeDecodeError, SettingsError) as error:
            msg = f"this is no instance: {error}"
            hint = getattr(error, "hint", "") or 'send {"name": "...", "url": "http://host:port"}'
            raise RequestError(msg, hint=hint) from None
        return _json(self._listed([added]), 201)

    async def drain(self, request: Request) -> Response:
        standing = self._named(request)
        standing.draining = True
        self._gateway.standings.changed()
        return _json(self._listed([standing]))

    async def remove(self, request: Request) -> Response:
        standing = self._named(request)
        self._gateway.standings.remove(standing)
        return _json(self._listed([standing]))

    async def decisions(self, request: Request) -> Response:
        text = parse_qs(request.query).get("limit", [str(LISTED)])[0]
        if not text.isascii() or not text.isdecimal() or len(text) > LIMIT_DIGITS_MAX:
            msg = f"limit is not a number of at most {LIMIT_DIGITS_MAX} digits"
            raise RequestError(msg, hint="write ?limit=100", param="limit")
        return _json(self._gateway.decisions.latest(int(text)))

    async def decision(self, request: Request) -> Response:
        record = self._gateway.decisions.get(request.rest)
        if record is None:
            msg = f"nothing is known of the request {request.rest}"
            hint = "the header x-thermocline-request names it; old ones are forgotten"
            raise RequestError(msg, hint=hint, status=404, code="not_found")
        return _json(record)

    async def metrics(self, _: Request) -> Response:
        return Response(self._gateway.metrics_text().encode(), content_type="text/plain; version=0.0.4")

    async def trace(self, _: Request) -> Response:
        recent = self._gateway.recent
        lines = await asyncio.to_thread(recent.lines) if recent is not None else b""
        return Response(lines, content_type="application/jsonl")

    def _named(self, request: Request) -> Standing:
        found = self._gateway.standings.named(request.rest)
        if found is None:
            msg = f"no instance is called {request.rest}"
            raise RequestError(msg, hint="GET /instances lists them", status=404, code="not_found")
        return found

    def _listed(self, standings: Sequence[Standing]) -> list[Listed]:
        now, observer = self._gateway.clock.now(), self._gateway.observer
        return [
            Listed(
                each.slot, each.instance.name, each.instance.url, each.state(now), each.in_flight, each.ramp(now),
                each.breaker.failures, observer.wiring(each) if observer is not None else "",
                observer.blocks(each) if observer is not None else Blocks(),
            )
            for each in standings
        ]  # fmt: skip


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status)


def _refusal(error: RequestError) -> Response:
    return Response(openai.error_body(error), error.status)
