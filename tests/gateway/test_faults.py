"""Instances that die, hang, reset or talk nonsense, and clients that leave: what a client sees, and who is blamed."""

from __future__ import annotations

import asyncio
import socket
import struct
from dataclasses import replace

import pytest

from tests.gateway.serving import LIMITS, RULES, USAGE, InTurn, World, post, served, until
from thermocline.gateway.seam import Trouble, Usage
from thermocline.gateway.standing import State

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
STREAM = b'{"stream":true,"events":1000}'


async def _request(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    if head.startswith(b"GET /health"):
        return True
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    await reader.readexactly(length)
    return False


def _says(*pieces, reset=False, hang=False):
    """An instance that is healthy, and answers with these bytes; then it closes, resets or hangs."""

    async def script(reader, writer):
        if await _request(reader):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            return
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.02)
        if hang:
            await asyncio.sleep(30)
        if reset:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    return script


BEFORE = {
    "closes at once": _says(),
    "resets at once": _says(reset=True),
    "closes after half a head": _says(b"HTTP/1.1 200 OK\r\ncontent-"),
    "closes after the head": _says(HEAD),
    "is no HTTP": _says(b"SSH-2.0-OpenSSH\r\n\r\n"),
    "sends two lengths": _says(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\nok"),
    "is too busy": _says(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\nno"),
    "sends an endless head": _says(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000),
    "answers before it is asked": _says(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "speaks HTTP/1.0": _says(b"HTTP/1.0 200 OK\r\n\r\nold"),
}


@pytest.mark.parametrize("fault", BEFORE.values(), ids=BEFORE)
def test_before_the_first_byte(fault):
    """Whatever an instance does before the first byte of its answer, the request is tried elsewhere, unseen."""
    with World() as world:
        good = world.good()
        door = world.gateway([world.raw(fault), good.port])
        answer = door.ask(b'{"a":1}')
        assert (answer.status, answer.headers["x-thermocline-instance"]) == (200, "i1")
        assert door.counted("retries_total") == {"": 1}
        assert until(lambda: door.chooser.open == 0)
        assert door.chooser.arrived[1].exclude == {0}
        assert door.gateway.decisions.get("last").tries[0].trouble is not None


def test_refused_connections():
    """An instance that is not there costs a try, and after a few of them it is left alone."""
    with World() as world, socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
        nobody.close()
        good = world.good()
        door = world.gateway([port, good.port], rules=replace(RULES, health_seconds=60))
        for _ in range(10):
            assert door.ask().status == 200
        assert sum(door.counted("tries_failed_total").values()) <= 4


AFTER = {
    "closes": _says(HEAD, b"5\r\ndata:\r\n"),
    "resets": _says(HEAD, b"5\r\ndata:\r\n", reset=True),
    "talks nonsense": _says(HEAD, b"5\r\ndata:\r\n", b"zz\r\n"),
    "answers twice": _says(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nab", b"cdefghiHTTP/1.1 200 OK\r\n\r\nno"),
    "hangs": _says(HEAD, b"5\r\ndata:\r\n", hang=True),
}


@pytest.mark.parametrize("fault", AFTER.values(), ids=AFTER)
def test_after_the_first_byte(fault):
    """An answer that breaks off is never tried again, and never looks whole."""
    with World() as world:
        good = world.good()
        door = world.gateway([world.raw(fault), good.port], rules=replace(RULES, gap_seconds=0.3))
        answer = door.ask()
        assert (answer.status, answer.whole) == (200, False)
        assert good.requests == []
        assert until(lambda: door.chooser.open == 0)


def test_hangs_before_the_first_byte():
    """An instance that hangs costs its deadline; then the request is tried elsewhere."""
    with World() as world:
        good = world.good()
        ports = [world.raw(_says(hang=True)), good.port]
        door = world.gateway(ports, rules=replace(RULES, first_byte_seconds=0.3))
        assert door.ask().headers["x-thermocline-instance"] == "i1"
        assert ("failed", Trouble.LATE) in door.chooser.heard


def test_nobody_answers():
    """Where every instance fails, the client is told within the deadlines: 502 for failures, 504 for silence."""
    with World() as world:
        door = world.gateway([world.raw(_says()), world.raw(_says(reset=True))])
        assert door.ask().status == 502
        silent = world.gateway([world.raw(_says(hang=True))], rules=replace(RULES, first_byte_seconds=0.3))
        assert silent.ask().status == 504
        total = world.gateway([world.raw(_says(hang=True))] * 2, rules=replace(RULES, total_seconds=0.3))
        assert total.ask().status == 504
        assert total.chooser.open == 0
        assert total.gateway.in_flight == 0


def test_busy_everywhere_passes():
    """Where all instances are too busy, the last one's own answer is what the client gets."""
    with World() as world:
        busy = BEFORE["is too busy"]
        answer = world.gateway([world.raw(busy), world.raw(busy)]).ask()
        assert (answer.status, answer.body) == (503, b"no")


def test_retries_have_a_budget():
    """In the long run at most a tenth of the requests are tried again, so that trouble is not doubled."""
    asked = 0

    async def every_other_time(reader, writer):
        nonlocal asked
        if await _request(reader):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            return
        asked += 1
        status = b"503 Service Unavailable" if asked % 2 else b"200 OK"
        writer.write(b"HTTP/1.1 %b\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok" % status)

    with World() as world:
        door = world.gateway([world.raw(every_other_time), world.good().port], rules=replace(RULES, retry_burst=3))
        answers = [door.ask().status for _ in range(80)]
        assert 25 <= answers.count(503) <= 40 - 3
        assert door.counted("retries_total") == {"": 40 - answers.count(503)}


def test_unused_connection_that_was_closed():
    """A kept connection that the instance closed as we began to use it costs nothing: neither a try nor blame."""
    answers = 0

    async def script(reader, writer):
        nonlocal answers
        while True:
            if await _request(reader):
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
                return
            if answers % 2:
                answers += 1
                return  # as if its keep-alive time had just run out
            answers += 1
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    with World() as world:
        door = world.gateway([world.raw(script)])
        for _ in range(6):
            assert door.ask().status == 200
        assert door.counted("retries_total") == {}
        assert door.counted("tries_failed_total") == {}


def test_client_leaves():
    """A client that leaves mid-stream ends the instance's work, and is not held against the instance."""
    with served() as (door, (instance,)):
        with door.connect() as line:
            line.send(post(STREAM))
            assert line.head() is not None
        assert instance.left.wait(5)
        assert until(lambda: door.chooser.heard[-1] == ("failed", Trouble.CLIENT_LEFT))
        assert door.gateway.standings[0].breaker.failures == 0
        assert door.counted("requests_total") == {'{route="/v1/chat/completions",status="499"}': 1}
        assert door.gateway.in_flight == 0


def test_client_leaves_before_the_answer():
    """A client that leaves while it waits ends the try, also while a connection is being made."""
    with World() as world:
        door = world.gateway([world.raw(_says(hang=True))])
        for _ in range(3):
            with door.connect() as line:
                line.send(post(b"{}"))
                assert until(lambda: door.chooser.open == 1)
            assert until(lambda: door.chooser.open == 0)
        assert door.gateway.in_flight == 0


def test_slow_reader_slows_only_itself():
    """A client that reads nothing stops its own stream, with little held for it; after a while it is cut off."""
    with served(limits=replace(LIMITS, write_seconds=0.6)) as (door, (_instance,)), door.connect() as line:
        line.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.send(post(b'{"pad":20000000}'))
        assert until(lambda: door.gateway._clients and any(client.paused for client in door.gateway._clients))
        client = next(client for client in door.gateway._clients if client.paused)
        assert client._transport.get_write_buffer_size() < 1 << 20
        assert door.ask().status == 200
        assert until(lambda: door.chooser.open == 0)
        assert ("failed", Trouble.CLIENT_LEFT) in door.chooser.heard


def test_killed_and_back():
    """An instance that goes is set aside by its health, and is asked again soon after it is back."""
    with World() as world:
        first, second = world.good(), world.good()
        door = world.gateway([first.port, second.port])
        world.run(first.server.stop(0))
        assert until(lambda: _state(door, 0) is State.DOWN)
        assert until(lambda: ("lost", 0) in door.chooser.heard)
        assert door.ask().headers["x-thermocline-instance"] == "i1"
        world.good(port=first.port)
        assert until(lambda: _state(door, 0) is State.UP)
        assert door.ask().headers["x-thermocline-instance"] == "i0"
        assert door.chooser.heard.count(("lost", 0)) == 1


def test_errors_of_an_instance():
    """Whatever status says that an instance is broken counts against it, though the client gets that answer."""
    with served() as (door, _):
        for _ in range(3):
            assert door.ask(b'{"status":500}').status == 500
        assert _state(door, 0) is State.OPEN
        record = door.gateway.decisions.get("last")
        assert (record.error, record.regret_seconds) == (0.5, 0.125)


def _state(door, slot):
    return door.gateway.standings[slot].state(door.gateway.clock.now())


def test_no_request_lost():
    """While an instance dies under load, every request that had not begun to be answered is answered by another."""
    with World() as world:
        first, second = world.good(), world.good()
        door = world.gateway([first.port, second.port], chooser=InTurn(turn=True))
        lines = [door.connect() for _ in range(24)]
        for line in lines:
            line.send(post(b'{"wait_seconds":0.3}'))
        assert until(lambda: len(first.requests) + len(second.requests) == 24)
        world.call(lambda: [each.abort() for each in tuple(first.server._connections)])
        world.call(first.server._listener.close)
        assert [line.answer().status for line in lines] == [200] * 24
        for line in lines:
            line.sock.close()
        assert first.requests


def test_stopping_finishes():
    """A gateway that stops finishes what is in flight, tells its clients to close, and takes nothing more."""
    with served() as (door, _), door.connect() as line, door.connect() as idle:
        idle.ask(post(b"{}"))
        line.send(post(b'{"wait_seconds":0.3}'))
        assert until(lambda: door.chooser.open == 1)
        door.world.run(door.gateway.stop(5))
        answer = line.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert idle.closed()
        with pytest.raises(OSError):  # noqa: PT011  # refused or reset, as the kernel likes
            door.connect()


@pytest.mark.parametrize("cut", [1, 20, len(USAGE) - 3])
def test_usage_that_comes_in_two_pieces_is_read_whole(cut):
    """Where a plain answer is cut inside its usage, no header tells a part of a number, and the whole is learned."""
    body = b'{"choices":[],%b}' % USAGE
    at = body.index(USAGE) + cut
    head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body)
    with World() as world:
        door = world.gateway([world.raw(_says(head + body[:at], body[at:]))])
        answer = door.ask()
        assert answer.body == body
        assert "x-thermocline-cached-tokens" not in answer.headers
        assert until(lambda: ("finished", Usage(100, 64, 3)) in door.chooser.heard)
