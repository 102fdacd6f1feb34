"""The Redis protocol, between two ends of a socket pair."""

from __future__ import annotations

import contextlib
import math
import socket
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.clock import SystemClock
from thermocline.errors import SettingsError
from thermocline.wire.resp import ARRAY_MAX, BULK_BYTES_MAX, LINE_BYTES_MAX, Address, Link, Refusal, encode

CLOCK = SystemClock()
GAP_SECONDS = 20.0
"""Long: nothing here waits for it but where a test says so."""


@pytest.fixture
def pair():
    """A link, and the other end of its connection."""
    ours, theirs = socket.socketpair()
    link = Link(ours, now=CLOCK.now, gap_seconds=GAP_SECONDS)
    yield link, theirs
    link.close()
    theirs.close()


def _sent(theirs, data, step=1 << 16):
    """Have the other end send this in pieces of so many bytes, then close."""

    def send():
        with contextlib.suppress(OSError):  # a link that had enough closes its end
            for start in range(0, len(data), step):
                theirs.sendall(data[start : start + step])
            theirs.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    return thread


def test_encode():
    """A command is an array of counted strings, binary ones too."""
    assert encode(b"GET", b"a\r\n\x00") == b"*2\r\n$3\r\nGET\r\n$4\r\na\r\n\x00\r\n"


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_replies(pair, step):
    """Every kind of small reply arrives, however its bytes are cut."""
    link, theirs = pair
    _sent(theirs, b"+OK\r\n:-12\r\n$-1\r\n$3\r\na\r\n\r\n*2\r\n:1\r\n*1\r\n+x\r\n*-1\r\n-OOM no room\r\n", step)
    replies = [link.reply(math.inf) for _ in range(7)]
    assert replies == [b"OK", -12, None, b"a\r\n", [1, [b"x"]], None, Refusal("OOM", "OOM no room")]
    with pytest.raises(ConnectionResetError):
        link.reply(math.inf)


@pytest.mark.parametrize("step", [7, 4096, 1 << 20])
@pytest.mark.parametrize("cuts", [1, 3, 2000])
def test_values_go_into_place(pair, step, cuts):
    """Values that follow each other land in the pieces that they are meant for, however either side is cut."""
    link, theirs = pair
    random = np.random.default_rng(1)
    values = [random.integers(0, 256, length, np.uint8) for length in (20_000, 1, 9_999)]
    thread = _sent(theirs, b"".join(b"$%d\r\n%b\r\n" % (len(value), value.tobytes()) for value in values), step)
    for value in values:
        room = np.zeros(len(value), np.uint8)
        assert link.value_into([part.data for part in np.array_split(room, cuts)], math.inf) == len(value)
        assert np.array_equal(room, value)
    thread.join()


def test_values_of_other_lengths(pair):
    """A shorter value is passed over and the next reply is right; behind a longer one the link is of no use."""
    link, theirs = pair
    _sent(theirs, b"$-1\r\n$3\r\nabc\r\n$0\r\n\r\n-WRONGTYPE not a string\r\n:7\r\n$9\r\n")
    room = memoryview(bytearray(5))
    assert link.value_into([room[:2], room[2:]], math.inf) is None
    assert link.value_into([room[:2], room[2:]], math.inf) == 3
    assert link.value_into([room], math.inf) == 0
    assert link.value_into([room], math.inf) == Refusal("WRONGTYPE", "WRONGTYPE not a string")
    assert link.reply(math.inf) == 7
    assert link.usable
    assert link.value_into([room], math.inf) == 9
    assert not link.usable


@pytest.mark.parametrize(
    "data",
    [
        b"$%d\r\n" % (BULK_BYTES_MAX + 1),
        b"*%d\r\n" % (ARRAY_MAX + 1),
        b"*1\r\n*17\r\n",
        b"*1\r\n" * 10,
        b"$99999999999999999999999\r\n",
        b"$1x\r\n",
        b"$\r\n",
        b":\r\n",
        b"?what\r\n",
        b"\r\n",
        b"$1\r\nabc",
        b"+" + b"x" * LINE_BYTES_MAX,
    ],
)
def test_bounds(pair, data):
    """A reply that is out of bounds, or none at all, is an error before memory is taken for it."""
    link, theirs = pair
    _sent(theirs, data)
    with pytest.raises(OSError, match="server sent"):
        link.reply(math.inf)


@given(data=st.binary(max_size=300))
def test_anything_is_a_reply_or_an_error(data):
    """Whatever bytes arrive, a link answers with replies and then an OSError; it never hangs and never breaks."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        link = Link(ours, now=CLOCK.now, gap_seconds=GAP_SECONDS)
        with pytest.raises(OSError, match="server"):
            _read_all(link)


def _read_all(link):
    room = memoryview(bytearray(16))
    while True:
        link.reply(math.inf)
        link.value_into([room], math.inf)


def test_time_runs_out(pair):
    """A deadline that is past, and a gap without a byte, end a wait."""
    link, _ = pair
    with pytest.raises(TimeoutError):
        link.reply(CLOCK.now() - 1)
    link.gap_seconds = 0.01
    with pytest.raises(TimeoutError):
        link.reply(math.inf)


def test_sending_waits_no_longer_than_it_may(pair):
    """A peer that reads nothing ends a send by its deadline, not for ever."""
    link, _ = pair
    with pytest.raises(TimeoutError):
        link.send([bytes(1 << 24)], CLOCK.now() + 0.05)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://127.0.0.1", Address("127.0.0.1", 6379)),
        ("redis://host:7000/3", Address("host", 7000, database=3)),
        ("rediss://me@host", Address("host", 6379, tls=True, user="me")),
        ("redis://[::1]:7000", Address("::1", 7000)),
        ("unix:///run/redis%20x.sock", Address("", 6379, path="/run/redis x.sock")),
    ],
)
def test_addresses(url, address):
    """The usual ways to write where a Redis server is."""
    assert Address.parse(url) == address


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host",
        "http://host",
        "redis://",
        "unix://",
        "redis://host:x",
        "redis://host/one",
        "redis://:pw@host",
        "redis://:p/pw@host",
        "unix://run/x.sock",
        "redis://host?db=2",
        "redis://" + "a" * 64 + ".example",
    ],
)
def test_bad_addresses(url):
    """What is no address is refused with a hint, and a password in one is not taken, as settings are shown."""
    with pytest.raises(SettingsError) as raised:
        Address.parse(url)
    assert raised.value.hint
    assert "pw" not in raised.value.message


def test_a_password_is_not_shown():
    """The password of an address does not appear in its text."""
    assert "hush" not in repr(Address.parse("redis://host", password="hush"))  # noqa: S106  # planted
