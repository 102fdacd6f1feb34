"""`thermocline route`: settings to a listening gateway, until a signal."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import secrets
import signal
import socket
import threading
from dataclasses import dataclass
from pathlib import Path

import uvloop

from thermocline.clock import SystemClock
from thermocline.costs import measured
from thermocline.errors import SettingsError
from thermocline.fleet.books import Fleet
from thermocline.fleet.chains import Chain
from thermocline.fleet.index import FleetIndex
from thermocline.fleet.instance import Instance
from thermocline.fleet.router import POLICIES
from thermocline.gateway.admin import admin, admin_socket
from thermocline.gateway.admission import Keys
from thermocline.gateway.door import Door
from thermocline.gateway.hearing import Hearing
from thermocline.gateway.observe import Observer
from thermocline.gateway.proxy import Gateway
from thermocline.metrics import Metrics
from thermocline.settings import Settings, read_key
from thermocline.tokens.reader import Reader
from thermocline.wire.http import Limits, url_of
from thermocline.wire.sockets import listening

CONNECTIONS_MAX = 4096
MEMO_BYTES = 256 << 20
_OPTIONS = {"node": "node", "capacity": "capacity_tokens", "seats": "seats"}
_COUNTS = frozenset({"capacity", "seats"})


@dataclass(frozen=True, slots=True)
class Routed:
    """One instance of the settings, with where its events come from if not from the common address."""

    instance: Instance
    replay: str = ""
    events: str = ""


def serve(settings: Settings, admin_path: Path, *, shared: bool = False, as_json: bool = False) -> None:
    """Listen until SIGINT or SIGTERM, then let requests in flight finish.

    `shared`: others listen there too, and this one ends with whoever started it, that is when stdin ends.

    The address goes to stdout, as JSON if asked. Raises SettingsError and ThermoclineError for what cannot be had.
    """
    routed = instances_of(settings.route_to or "")
    if settings.policy not in POLICIES:
        raise SettingsError(f"no policy {settings.policy}", hint=f"one of {', '.join(POLICIES)}")
    _open_many()
    sock = listening(settings.host, settings.port, shared=shared)
    with contextlib.closing(sock), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_until_signal(settings, routed, sock, admin_path, shared=shared, as_json=as_json))


async def _until_signal(
    settings: Settings, routed: list[Routed], sock: socket.socket, admin_path: Path, *, shared: bool, as_json: bool
) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if shared:
        threading.Thread(target=_end_with_stdin, args=(loop, stop), daemon=True).start()
    with contextlib.ExitStack() as stack:
        secret = secrets.token_bytes(32)
        index = FleetIndex(settings.index_blocks, secret=int.from_bytes(secret[:8], "little"))
        metrics = Metrics()
        known = measured.read(settings.measured_path) if settings.measured_path else None
        door = Door(
            index,
            Fleet(offset=os.getpid() % 64, known=known),
            policy=settings.policy,
            secret=secret,
            model=settings.model if "model" in settings.origins else None,
            reader=_reader(settings),
            metrics=metrics,
        )
        stack.callback(door.close)
        gateway = _gateway(settings, door, [each.instance for each in routed], metrics)
        gateway.recent, gateway.observer = door.recent, (observer := Observer(index))
        hears = _heard(settings, index, gateway, routed, stack)
        door_for_operators, admin_sock = admin(gateway), admin_socket(admin_path)
        stack.callback(admin_path.unlink, missing_ok=True)
        await gateway.start(sock)
        await door_for_operators.start(admin_sock)
        watch = loop.create_task(observer.watch(gateway.standings)) if hears else None
        announce(sock, admin_path, as_json=as_json)
        await stop.wait()
        await asyncio.gather(gateway.stop(), door_for_operators.stop())
        if watch is not None:
            watch.cancel()


def _open_many() -> None:
    """As many connections as may be: shells begin with 1,024 files, which is fewer than clients and instances are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):  # where "no bound" is more than the system gives
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _end_with_stdin(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Whoever started this holds the other end of stdin, and never writes: it ends with them, however they end."""
    while os.read(0, 4096):
        pass
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(stop.set)


def _gateway(settings: Settings, door: Door, instances: list[Instance], metrics: Metrics) -> Gateway:
    keys = None
    if settings.tenants_path is not None:
        keys = Keys.read(settings.tenants_path)
    elif settings.api_key_file is not None:
        keys = Keys.of_one(read_key(settings.api_key_file))
    limits = Limits(body_bytes_max=settings.body_bytes_max, connections_max=CONNECTIONS_MAX)
    gateway = Gateway(door, instances, host=settings.host, keys=keys, limits=limits, metrics=metrics)
    if settings.instance_key_file is not None:
        gateway.instance_key = _instance_key(settings.instance_key_file)
    return gateway


def _instance_key(path: Path) -> bytes:
    """The header's line."""
    key = read_key(path, what="instances' API key")
    if not key.isprintable() or " " in key:
        raise SettingsError(f"the instances' API key in {path} cannot be one", hint="write it in one word, in ASCII")
    return b"authorization: Bearer %b\r\n" % key.encode()


def _reader(settings: Settings) -> Reader[Chain] | None:
    if settings.tokenizer_path is None:
        return None
    return Reader(settings.tokenizer_path, clock=SystemClock(), memo_bytes=MEMO_BYTES)


def _heard(
    settings: Settings, index: FleetIndex, gateway: Gateway, routed: list[Routed], stack: contextlib.ExitStack
) -> bool:
    """Hear KV events, where there is an address for them."""
    own = {each.events: each.instance.name for each in routed if each.events}
    listen = [*([settings.events_listen] if settings.events_listen else []), *own]
    if not listen:
        return False
    from thermocline.wire.subscriber import Subscriber

    hearing = Hearing(index, own)

    def changed() -> None:
        hearing.now_there([(standing.slot, standing.instance) for standing in gateway.standings])

    gateway.standings.on_change = changed
    changed()
    subscriber = Subscriber(listen, hearing.take)
    stack.callback(subscriber.close)
    for each in routed:
        for source in {each.events, each.instance.name} - {""} if each.replay else ():  # a topic may name it, or not
            subscriber.replay_from(source, each.replay)
    if gateway.observer is not None:
        gateway.observer.hears(hearing.counts, subscriber)
    return True


def announce(sock: socket.socket, admin_path: Path, *, as_json: bool) -> None:
    """Say where clients and operators find it."""
    line = f"thermocline is routing at {url_of(sock)} (administered at {admin_path})"
    print(json.dumps({"url": url_of(sock), "admin": str(admin_path)}) if as_json else line, flush=True)  # noqa: T201  # the result of the command


def instances_of(text: str) -> list[Routed]:
    """NAME=URL, separated by commas, each with options behind it. Raises SettingsError."""
    found = [_instance_of(part.split()) for part in text.split(",") if part.strip()]
    names = [each.instance.name for each in found]
    if len(set(names)) != len(names):
        raise SettingsError("two instances have one name", hint="give each instance a name of its own")
    return found


def _instance_of(words: list[str]) -> Routed:
    named = [word.partition("=") for word in words]
    if any(not value for _, _, value in named):
        raise SettingsError(f"{' '.join(words)} is no instance", hint="write NAME=http://host:port")
    (name, _, url), *rest = named
    options = {key: value for key, _, value in rest}
    unknown = options.keys() - {*_OPTIONS, "replay", "events"}
    if unknown or any(not options[key].isdecimal() for key in _COUNTS & options.keys()):
        hint = "node=NAME, replay=ENDPOINT, events=ENDPOINT, capacity=TOKENS, seats=COUNT"
        raise SettingsError(f"{' '.join(words)} is no instance", hint=hint)
    own = {_OPTIONS[key]: int(value) if key in _COUNTS else value for key, value in options.items() if key in _OPTIONS}
    return Routed(Instance(name, url, **own), options.get("replay", ""), options.get("events", ""))  # type: ignore[arg-type]  # by name
