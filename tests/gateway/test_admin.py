"""The operator's socket, and how instances stand: who may be asked, how those that come take up their share."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import stat
from dataclasses import replace

import pytest

from tests.gateway.serving import RULES, WAIT_SECONDS, InTurn, Line, World, get, post, until
from thermocline.clock import ManualClock
from thermocline.errors import SettingsError, ThermoclineError
from thermocline.fleet.instance import Instance
from thermocline.gateway.admin import admin, admin_socket
from thermocline.gateway.rules import Rules
from thermocline.gateway.standing import Health, Standings, State


@contextlib.contextmanager
def _administered(folder, **options):
    """A gateway with an admin socket, and a way to ask it."""
    with World() as world:
        instances = [world.good(), world.good()]
        door = world.gateway([each.port for each in instances], **options)
        path = folder / "admin.sock"
        sock = admin_socket(path)
        server = world.call(lambda: admin(door.gateway))
        world.run(server.start(sock))

        def ask(data):
            link = socket.socket(socket.AF_UNIX)
            link.settimeout(WAIT_SECONDS)
            link.connect(str(path))
            with _UnixLine(link) as line:
                return line.ask(data)

        yield door, ask, path
        world.run(server.stop(0))


class _UnixLine(Line):
    def __init__(self, sock):
        self.sock, self._held = sock, b""


def test_instances_come_and_go(folder):
    """Instances are listed, added, drained and removed, and requests follow at once."""
    with _administered(folder) as (door, ask, path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        listed = ask(get("/instances")).json
        assert [(each["name"], each["state"], each["in_flight"]) for each in listed] == [
            ("i0", "up", 0),
            ("i1", "up", 0),
        ]
        assert ask(post(b"", path="/drain/i0")).json[0]["state"] == "draining"
        assert door.ask().headers["x-thermocline-instance"] == "i1"
        url = listed[0]["url"]
        added = ask(post(json.dumps({"name": "new", "url": url}).encode(), path="/instances"))
        assert (added.status, added.json[0]["slot"]) == (201, 2)
        assert ask(get("/instances/i1").replace(b"GET", b"DELETE")).status == 200
        assert door.ask().headers["x-thermocline-instance"] == "new"
        assert door.chooser.slots == {0: "i0", 2: "new"}
        assert ask(post(json.dumps({"name": "again", "url": url}).encode(), path="/instances")).json[0]["slot"] == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "instance"),
        (b'{"name":"i0","url":"http://127.0.0.1:1"}', "taken"),
        (b'{"name":"a b","url":"http://127.0.0.1:1"}', "letters"),
        (b'{"name":"x","url":"https://127.0.0.1:1"}', "http://host:port"),
        (b'{"name":"x","url":"http://127.0.0.1:99999"}', "http://host:port"),
        (b'{"name":"x","url":"http://a:1/b\\r\\nx: y"}', "http://host:port"),
    ],
)
def test_refused_instances(folder, body, says):
    """What is no instance is refused with a hint."""
    with _administered(folder) as (door, ask, _):
        answer = ask(post(body, path="/instances"))
        assert answer.status == 400
        assert says in answer.json["error"]["message"]
        assert len(door.gateway.standings) == 2


def test_unknown_names(folder):
    """What is not known is 404: instances, decisions, and routes of the public door."""
    with _administered(folder) as (_, ask, _):
        for request in (post(b"", path="/drain/x"), get("/decisions/x"), get("/v1/models"), get("/health")):
            assert ask(request).status == 404
        assert ask(get("/decisions?limit=x")).status == 400


def test_drain_finishes(folder):
    """An instance that drains ends what it has begun, and its place is seen to empty."""
    with _administered(folder) as (door, ask, _), door.connect() as line:
        line.send(post(b'{"wait_seconds":0.3}'))
        assert until(lambda: door.chooser.open == 1)
        assert ask(post(b"", path="/drain/i0")).json[0]["in_flight"] == 1
        assert line.answer().status == 200
        assert until(lambda: ask(get("/instances")).json[0]["in_flight"] == 0)


def test_removed_while_it_answers(folder):
    """Removing an instance cuts nothing off that it is answering."""
    with _administered(folder) as (door, ask, _), door.connect() as line:
        line.send(post(b'{"wait_seconds":0.3}'))
        assert until(lambda: door.chooser.open == 1)
        ask(get("/instances/i0").replace(b"GET", b"DELETE"))
        assert line.answer().status == 200


def test_decisions(folder):
    """What was decided is kept with what came of it, and has no text and no salt in it."""
    with _administered(folder) as (door, ask, _):
        named = door.ask(b'{"model":"m","prompt":"a secret"}').headers["x-thermocline-request"]
        record = ask(get(f"/decisions/{named}"))
        assert b"secret" not in record.body
        (first,) = record.json["tries"]
        assert (record.json["status"], record.json["model"], record.json["usage"]["cached_tokens"]) == (200, "m", 64)
        assert (first["instance"], first["predicted_seconds"], first["trouble"]) == ("i0", 0.25, None)
        assert 0 < first["first_byte_seconds"] <= record.json["seconds"]
        assert ask(get("/decisions?limit=1")).json == [record.json]
        assert b"thermocline_first_byte_seconds_bucket" in ask(get("/metrics")).body


def test_the_socket_is_ours(folder):
    """A socket that an ended gateway left is replaced; one in use, or a file, is not."""
    path = folder / "admin.sock"
    admin_socket(path).close()
    with contextlib.closing(admin_socket(path)) as sock:
        sock.listen()
        with pytest.raises(ThermoclineError):
            admin_socket(path)
    file = folder / "file"
    file.write_text("kept")
    with pytest.raises(ThermoclineError):
        admin_socket(file)
    assert file.read_text() == "kept"


def test_removed_after_it_was_tried():
    """An instance that was tried and is gone does not stand in the way of one that is there."""
    standings = _standings(2, ManualClock(100))
    standings.remove(standings[0])
    assert not standings.all_in(frozenset({0}))
    assert standings.all_in(frozenset({0, 1}))


# -- standings ---------------------------------------------------------------------------------------------------------


def _standings(count, clock, rules=None):
    standings = Standings(InTurn(), rules or Rules(), clock)
    for at in range(count):
        standings.add(Instance(f"i{at}", f"http://localhost:{at + 1}"), slowly=False)
    return standings


def test_breaker():
    """Three failures in a row set an instance aside; after a pause one request tries it, and success brings it back."""
    clock = ManualClock(100)
    standings = _standings(2, clock)
    for _ in range(3):
        standings.failed(standings[0], clock.now(), clock.now())
    assert standings.excluded(clock.now()) == {0}
    clock.seconds += 1.1
    assert standings.excluded(clock.now()) == frozenset()
    standings.tried(standings[0], clock.now())
    assert standings.excluded(clock.now()) == {0}, "one request tries it, and no other"
    standings.succeeded(standings[0])
    assert standings.excluded(clock.now()) == frozenset()
    assert standings[0].state(clock.now()) is State.UP


def test_slow_start():
    """One that comes takes a tenth of its share at first and all of it at the end, spread evenly."""
    clock = ManualClock(100)
    standings = _standings(1, clock, Rules(slow_start_seconds=10))
    standings.add(Instance("new", "http://localhost:9"))
    allowed = []
    for _ in range(10):
        allowed.append(sum(1 not in standings.excluded(clock.now()) for _ in range(100)))
        clock.seconds += 1
    assert allowed[0] == pytest.approx(10, abs=2)
    assert allowed == sorted(allowed)
    assert allowed[9] > 85
    assert 1 not in standings.excluded(clock.now())


def test_slow_start_alone():
    """Where nobody else is up, one that starts slowly takes everything."""
    clock = ManualClock(100)
    standings = _standings(1, clock)
    standings.add(Instance("new", "http://localhost:9"))
    standings[0].draining = True
    standings.changed()
    assert all(standings.excluded(clock.now()) == {0} for _ in range(20))


def test_health():
    """Two failed questions set an instance aside; one that succeeds brings it back, slowly."""
    clock = ManualClock(100)
    standing = _standings(1, clock)[0]
    assert [standing.checked(clock.now(), Health.ILL) for _ in range(3)] == [False, True, False]
    assert standing.state(clock.now()) is State.DOWN
    assert standing.refused_checks == 0, "lateness is no loss"
    assert standing.checked(clock.now(), Health.WELL)
    assert standing.state(clock.now()) is State.UP
    assert standing.ramp(clock.now()) == pytest.approx(0.1)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 503 no\r\n\r\n", b"HTTP/1.1 200", b"", b"SSH-2.0\r\n", None])
def test_unhealthy_answers(answer):
    """Only 200 is health; anything else and silence are not."""

    async def script(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        if answer is None:
            await asyncio.sleep(30)
        writer.write(answer)

    with World() as world:
        port = world.raw(script)
        door = world.gateway([port], rules=replace(RULES, health_seconds=60))
        standing = door.gateway.standings[0]
        standing.rules = replace(RULES, health_seconds=0.2)
        assert world.run(standing.check()) is (Health.WELL if answer == b"HTTP/1.1 200" else Health.ILL)


def test_all_down():
    """Where no instance is up, health says so; one is tried all the same, unless it drains: then it is 503 at once."""
    with World() as world, socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
        nobody.close()
        door = world.gateway([port])
        assert until(lambda: not door.gateway.standings[0].healthy)
        assert door.ask().status == 502
        door.gateway.standings[0].draining = True
        world.call(door.gateway.standings.changed)
        answer = door.ask()
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "no_instance", "1")
        with door.connect() as line:
            assert line.ask(get("/health")).status == 503


def test_no_instances():
    """A gateway without instances answers 503, and one that is added is asked."""
    with World() as world:
        door = world.gateway([])
        assert door.ask().status == 503
        good = world.good()
        world.call(lambda: door.gateway.standings.add(Instance("i0", f"http://localhost:{good.port}")))
        assert door.ask().status == 200
        with pytest.raises(SettingsError):
            door.gateway.standings.add(Instance("i0", "http://localhost:1"))
