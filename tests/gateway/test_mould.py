"""A head that came before is not parsed again: what is understood must not depend on that."""

from __future__ import annotations

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.gateway.glue import LIMITS, Nobody, Transport
from thermocline.fleet.instance import Instance
from thermocline.gateway.client import Client
from thermocline.gateway.mould import mould_of
from thermocline.gateway.proxy import Gateway

HEADERS = (
    b"host: localhost\r\n",
    b"content-type: application/json\r\n",
    b"X-Session-ID:s\r\n",
    b"x: content-length: 5\r\n",
)
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
PIECES = (
    b"\r\n",
    b"\r",
    b"\n",
    b":",
    b" ",
    b"0",
    b"00",
    b"9",
    b"-1",
    b"content-length: 2\r\n",
    b"transfer-encoding: chunked\r\n",
)


def _request(body: bytes, headers: tuple[bytes, ...] = HEADERS) -> bytes:
    head = b"POST /v1/completions HTTP/1.1\r\n" + b"".join(headers)
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def _understood(*requests: bytes) -> tuple[list[object], bytes, bool]:
    """What arrives of the last of some requests on one connection, what the client is told, and whether it goes on."""
    nobody, transport = Nobody(), Transport()
    client = Client(Gateway(nobody, [Instance("i0", "http://localhost:1")], limits=LIMITS))
    client.connection_made(transport)
    for request in requests:
        nobody.arrived.clear()
        transport.written = b""
        client.data_received(request)
    return [(each.path, each.body, each.session) for each in nobody.arrived], transport.written, transport.ended


@settings(max_examples=500)
@given(st.data())
def test_the_same_with_and_without(data):
    """A request is understood alike on a connection where its head came before, and on a new one, whatever it is."""
    second = bytearray(_request(data.draw(st.sampled_from([b"{}", b'{"a":1}', b"{", b"[]", b" " * 5000]))))
    for _ in range(data.draw(st.integers(0, 2))):
        at = data.draw(st.integers(0, len(second) - 1))
        second[at : at + data.draw(st.integers(0, 3))] = data.draw(st.sampled_from(PIECES))
    assert _understood(_request(b'{"b":2}'), bytes(second)) == _understood(bytes(second))


def test_it_is_used():
    """The second request and the second answer on a connection go past the parser."""
    nobody = Nobody()
    gateway = Gateway(nobody, [Instance("i0", "http://localhost:1")], limits=LIMITS)
    client = Client(gateway)
    client.connection_made(Transport())
    client.data_received(_request(b"{}"))
    client._parser = None
    client.data_received(_request(b'{"a": 1}'))
    assert [each.body for each in nobody.arrived] == [b"{}", b'{"a": 1}']
    assert gateway.held_bytes == gateway.in_flight == 0


@settings(max_examples=300)
@given(st.binary(max_size=40), st.binary(max_size=40), st.integers(0, 200))
@example(b"", b"", 0)
def test_a_mould_fits_its_own(one, other, cut):
    """A mould finds the body of a message that has its head and is whole, and of no other."""
    message, second = ANSWER % (len(one), one), ANSWER % (len(other), other)
    mould = mould_of(message, len(one))
    assert mould is not None
    begin = mould.body_at(second)
    assert second[begin:] == other
    assert not mould.body_at(second[:cut]) or cut >= len(second)
    assert not mould.body_at(second + b"x")
    assert not mould.body_at(second, len(other) - 1) or not other
    assert mould_of(message, len(one) + 1) is None
