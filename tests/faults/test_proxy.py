"""The chaos proxy does to a connection what it was told, and nothing else: other fault tests rest on that."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
from pathlib import Path

import pytest

from tests.faults.proxy import Cut, Delay, Drop, End, Flip, Freeze, Pause, Proxy, Rate, Repeat, Stream, Way, chaos
from thermocline.clock import SystemClock

CLOCK = SystemClock()
GUARD_SECONDS = 10.0
DATA = random.Random(1).randbytes(300_000)  # noqa: S311  # any bytes will do


class Echo:
    """A server that sends back what it gets, and ends when its client does."""

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self):
        """Stop."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self):
        handlers = []
        with contextlib.suppress(OSError):
            while True:
                handlers.append(threading.Thread(target=self._answer, args=(self._listener.accept()[0],), daemon=True))
                handlers[-1].start()
        for handler in handlers:
            handler.join(GUARD_SECONDS)

    def _answer(self, connection):
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                connection.sendall(data)


@pytest.fixture
def echo():
    """A real server to stand before."""
    server = Echo()
    yield server
    server.close()


def _connect(proxy, seconds=GUARD_SECONDS):
    return socket.create_connection(proxy.address, seconds)


def _exchange(proxy, data, seconds=GUARD_SECONDS):
    """Send `data`, close that direction, and read to the end. What arrived, and how it ended."""
    arrived, ends = bytearray(), []
    try:
        with _connect(proxy, seconds) as client:
            sender = threading.Thread(target=_send, args=(client, data, ends))
            sender.start()
            try:
                while part := client.recv(1 << 16):
                    arrived += part
            finally:
                sender.join()
    except ConnectionResetError:
        ends.append("reset")
    except TimeoutError:
        ends.append("nothing more")
    return bytes(arrived), ends[0] if ends else "end"


def _send(client, data, ends):
    """Whichever thread uses the connection first hears of a reset; the other one sees an end."""
    try:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
    except (ConnectionResetError, BrokenPipeError):
        ends.append("reset")
    except OSError:
        pass  # it ended before all was sent


def _through(echo, *faults, data=DATA, seconds=GUARD_SECONDS):
    with Proxy(echo.address, lambda number: faults) as proxy:
        return _exchange(proxy, data, seconds)


def test_no_fault(echo):
    """Without faults every byte passes, in both directions, on many connections at once."""
    with Proxy(echo.address) as proxy:
        results = []
        threads = [threading.Thread(target=lambda: results.append(_exchange(proxy, DATA))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [(DATA, "end")] * 8
        assert proxy.connections == 8


@pytest.mark.parametrize("way", Way)
def test_flip(echo, way):
    """One bit at one offset is wrong, and every other bit is right."""
    for at, bit in ((0, 0), (65_535, 3), (65_536, 7), (len(DATA) - 1, 1)):
        wrong = bytearray(DATA)
        wrong[at] ^= 1 << bit
        assert _through(echo, Flip(way, at, bit)) == (bytes(wrong), "end")


@pytest.mark.parametrize("way", Way)
def test_drop_and_repeat(echo, way):
    """Dropped bytes are missing, repeated ones arrive twice, and what follows them is whole."""
    assert _through(echo, Drop(way, 70_000, 1_000)) == (DATA[:70_000] + DATA[71_000:], "end")
    assert _through(echo, Drop(way, 70_000)) == (DATA[:70_000], "end")
    assert _through(echo, Repeat(way, 60_000, 9_000)) == (DATA[:69_000] + DATA[60_000:], "end")
    both = (Drop(way, 10, 5), Repeat(way, 20, 3), Flip(way, 30, 0))
    expected = DATA[:10] + DATA[15:23] + DATA[20:30] + bytes([DATA[30] ^ 1]) + DATA[31:]
    assert _through(echo, *both) == (expected, "end")


def test_cut(echo):
    """After so many bytes the connection is reset, at any offset, not before and not later."""
    for at in (0, 1, 4_096, 65_536, 65_537, len(DATA) - 1):
        assert _through(echo, Cut(Way.DOWN, at)) == (DATA[:at], "reset")
    arrived, end = _through(echo, Cut(Way.UP, 1_000))
    assert (DATA[:1_000].startswith(arrived), end) == (True, "reset")


@pytest.mark.parametrize("way", Way)
def test_end(echo, way):
    """After so many bytes one direction ends in good order, and the reader sees an end, not an error."""
    for at in (0, 1, 4_096, 65_537):
        assert _through(echo, End(way, at)) == (DATA[:at], "end")


def test_half_close_leaves_the_other_direction(echo):
    """Where the client's direction was ended, the server's goes on."""
    with Proxy(echo.address, lambda number: [Pause(Way.DOWN, 0, 0.05), End(Way.UP, 5)]) as proxy:
        assert _exchange(proxy, b"12345678") == (b"12345", "end")


@pytest.mark.parametrize("way", Way)
def test_freeze_at_an_offset(echo, way):
    """After so many bytes nothing more arrives and the connection stays open; thawed, the rest arrives."""
    with Proxy(echo.address, lambda number: [Freeze(way, 500)]) as proxy, _connect(proxy, 0.3) as client:
        client.sendall(DATA[:1_000])
        assert _read(client, 500) == DATA[:500]
        with pytest.raises(TimeoutError):
            client.recv(1)
        assert proxy.open_connections == 1
        proxy.thaw()
        client.settimeout(GUARD_SECONDS)
        assert _read(client, 500) == DATA[500:1_000]


def test_freeze_all(echo):
    """A frozen proxy accepts connections and passes nothing, old or new, until it is thawed."""
    with Proxy(echo.address) as proxy, _connect(proxy, 0.3) as old:
        old.sendall(b"before")
        assert _read(old, 6) == b"before"
        proxy.freeze()
        with _connect(proxy, 0.3) as new:
            for client in (old, new):
                client.sendall(b"frozen")
            for client in (old, new):
                with pytest.raises(TimeoutError):
                    client.recv(1)
            proxy.thaw()
            for client in (old, new):
                client.settimeout(GUARD_SECONDS)
                assert _read(client, 6) == b"frozen"


def _read(client, count):
    data = b""
    while len(data) < count:
        part = client.recv(count - len(data))
        assert part, "ended too early"
        data += part
    return data


def test_slow(echo):
    """A delay, a pause and a rate hold the bytes back for at least that long, and change none."""
    for faults, least in (
        ([Delay(Way.UP, 0.1), Delay(Way.DOWN, 0.1)], 0.2),
        ([Pause(Way.DOWN, 100, 0.2)], 0.2),
        ([Rate(Way.DOWN, 10_000)], 0.19),
    ):
        started = CLOCK.now()
        assert _through(echo, *faults, data=DATA[:2_000]) == (DATA[:2_000], "end")
        assert CLOCK.now() - started >= least


def test_refuse(echo):
    """While it refuses, connecting fails at once and open connections go on; then it accepts on the same port."""
    with Proxy(echo.address) as proxy, _connect(proxy) as old:
        address = proxy.address
        old.sendall(b"a")
        assert _read(old, 1) == b"a"
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            _connect(proxy)
        old.sendall(b"b")
        assert _read(old, 1) == b"b"
        proxy.allow()
        assert proxy.address == address
        assert _exchange(proxy, b"again") == (b"again", "end")


def test_cut_all(echo):
    """Every open connection is reset, and new ones pass."""
    with Proxy(echo.address) as proxy, _connect(proxy) as old:
        old.sendall(b"a")
        assert _read(old, 1) == b"a"
        assert proxy.cut() == 1
        with pytest.raises(ConnectionResetError):
            old.recv(1)
        assert _exchange(proxy, b"again") == (b"again", "end")


def test_strike(echo):
    """Faults for open connections count from where these are now."""
    with Proxy(echo.address) as proxy, _connect(proxy) as client:
        client.sendall(DATA[:1_000])
        assert _read(client, 1_000) == DATA[:1_000]
        assert proxy.strike(Flip(Way.DOWN, 10, 7)) == 1
        client.sendall(bytes(20))
        assert _read(client, 20) == bytes(10) + b"\x80" + bytes(9)
        assert proxy.strike(Freeze(Way.DOWN, 0)) == 1
        client.sendall(b"0")
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(1)
        proxy.thaw()
        client.settimeout(GUARD_SECONDS)
        assert _read(client, 1) == b"0"
        assert proxy.strike(Cut(Way.DOWN, 3)) == 1
        client.sendall(b"12345")
        assert _read(client, 3) == b"123"
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_server_is_gone(echo):
    """Where nobody listens behind the proxy, the client sees a reset; a Unix socket may be the target."""
    with Proxy("/nowhere/at/all") as proxy:
        assert _exchange(proxy, b"hello") == (b"", "reset")


def test_a_seed_replays(echo):
    """The same seed gives the same faults, whatever the kind, and what arrives is the same."""
    script, same, other = chaos(3), chaos(3), chaos(4)
    faults = [script(number) for number in range(200)]
    assert faults == [same(number) for number in range(200)]
    assert faults != [other(number) for number in range(200)]
    assert {type(fault) for (fault,) in faults} >= {Flip, Drop, Repeat, Cut, End, Freeze, Pause, Delay, Rate}
    assert not any(chaos(3, share=0.0)(number) for number in range(50))
    runs = [
        _through(echo, *chaos(seed, span_bytes=2_000)(0), data=DATA[:2_000], seconds=0.5)
        for seed in (11, 11, 12, 12, 13, 13)
    ]
    assert runs[::2] == runs[1::2]


def test_chunks_do_not_matter():
    """However the network cuts the bytes, the same faults give the same bytes."""
    faults = [Flip(Way.UP, 5, 1), Drop(Way.UP, 10, 4), Repeat(Way.UP, 12, 9), Flip(Way.UP, 15), Drop(Way.UP, 40, 20)]
    seen = set()
    for step in (1, 2, 3, 7, 16, 100):
        stream = Stream(faults)
        seen.add(b"".join(part for at in range(0, 100, step) for part in stream.feed(DATA[at : at + step][: 100 - at])))
    assert len(seen) == 1


def test_nothing_is_left(echo):
    """A closed proxy leaves no thread and no descriptor, whatever state its connections were in."""
    threads, files = threading.active_count(), _open_files()
    for faults in ([], [Freeze(Way.DOWN, 0)], [Rate(Way.UP, 10)], [End(Way.UP, 1)], [Pause(Way.DOWN, 0, 60)]):
        proxy = Proxy(echo.address, lambda number, faults=faults: faults)
        with _connect(proxy) as client:
            client.sendall(b"hello")
            proxy.close()
            proxy.close()
    deadline = CLOCK.now() + GUARD_SECONDS
    while (threading.active_count() > threads or _open_files() > files) and CLOCK.now() < deadline:
        CLOCK.sleep(0.01)
    assert threading.active_count() <= threads  # what other tests had open may be closed meanwhile
    assert _open_files() <= files


def _open_files():
    return len(list(Path(f"/proc/{os.getpid()}/fd").iterdir()))
