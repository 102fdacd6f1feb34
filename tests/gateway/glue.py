"""The gateway's two readers of outside bytes, without sockets: any bytes from a client, and any from an instance.

`feed_client` and `feed_link` raise where a reader does what it must not, so that a fuzzer can call them.
"""

from __future__ import annotations

from thermocline.errors import RequestError
from thermocline.fleet.instance import Instance
from thermocline.gateway.client import Client
from thermocline.gateway.link import Link
from thermocline.gateway.proxy import Gateway
from thermocline.gateway.seam import Arrived, Decision
from thermocline.wire.http import Limits

LIMITS = Limits(header_bytes_max=2048, body_bytes_max=4096)
CLIENT_SEEDS = (
    (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b'content-length: 13\r\n\r\n{"model":"m"}'
    ),
    (
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"transfer-encoding: chunked\r\nexpect: 100-continue\r\n\r\n2;a=b\r\n{}\r\n0\r\nx: y\r\n\r\n"
    ),
    b"GET /health HTTP/1.1\r\nhost: 127.0.0.1:80\r\nconnection: close, x\r\nx: y\r\n\r\n",
    b"GET /v1/models?a=b HTTP/1.1\r\nhost: localhost\r\nupgrade: h2c\r\nauthorization: Bearer k\r\n\r\n",
)
LINK_SEEDS = (
    b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 13\r\n\r\n{"model":"m"}',
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n6\r\ndata: \r\n0\r\nx: y\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\nkeep-alive: 5\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nx: y\r\n\r\nuntil it closes",
)


class Transport:
    """What was written, and whether it goes on."""

    def __init__(self) -> None:
        self.written, self.closing, self.ended = b"", False, False

    def get_extra_info(self, _: str) -> None:
        return None

    def write(self, data: bytes) -> None:
        assert not self.ended
        self.written += data

    def is_closing(self) -> bool:
        return self.closing

    def write_eof(self) -> None:
        self.ended = True

    def abort(self) -> None:
        self.closing = True

    close = abort

    def resume_reading(self) -> None:
        pass


class Nobody:
    """Takes note of what arrives, and sends it nowhere."""

    def __init__(self) -> None:
        self.arrived: list[Arrived] = []

    def joined(self, slot: int, instance: Instance) -> None:
        pass

    def lost(self, slot: int) -> None:
        pass

    def choose(self, request: Arrived) -> Decision:
        self.arrived.append(request)
        raise RequestError("nobody", status=503)


def feed_client(data: bytes, cut: int = 0) -> None:
    """Any bytes from a client, in two pieces: whole answers come back, and what is held is bounded and let go."""
    nobody, transport = Nobody(), Transport()
    gateway = Gateway(nobody, [Instance("i0", "http://localhost:1")], limits=LIMITS)
    client = Client(gateway)
    client.connection_made(transport)  # type: ignore[arg-type]  # as much of one as is used
    for piece in (data[:cut], data[cut:]):
        client.data_received(piece)
        assert 0 <= gateway.held_bytes <= LIMITS.body_bytes_max + len(piece)
    for arrived in nobody.arrived:
        assert len(arrived.body) <= LIMITS.body_bytes_max
        assert arrived.body == b"" or arrived.body in data or b"chunked" in data.lower()
    written = transport.written.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    while written:
        head, found, rest = written.partition(b"\r\n\r\n")
        assert found
        assert head.startswith(b"HTTP/1.1 ")
        length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
        assert len(rest) >= length
        written = rest[length:]
    client.connection_lost(None)
    assert gateway.held_bytes == gateway.in_flight == 0


class _Heard:
    """An exchange that holds its link to the order of things."""

    def __init__(self) -> None:
        self.body, self.begun, self.over = b"", False, False

    def begin(self, status: int, headers: bytes, body: bytes, *, framed: bool, whole: bool) -> None:
        assert not self.begun
        assert not self.over
        assert 200 <= status <= 999
        assert all(line.endswith(b"\r\n") and b":" in line for line in headers.splitlines(keepends=True))
        self.begun, self.body = True, body

    def more(self, data: bytes) -> None:
        assert self.begun
        assert not self.over
        self.body += data

    def ended(self) -> None:
        assert self.begun
        assert not self.over
        self.over = True

    def failed(self, trouble: object) -> None:
        assert not self.over
        self.over = True


def feed_link(data: bytes, cut: int = 0) -> None:
    """Any bytes from an instance, in two pieces: what passes is what came, and it ends once, in one way."""
    gateway = Gateway(Nobody(), [Instance("i0", "http://localhost:1")])
    link, heard = Link(gateway.standings[0]), _Heard()
    link.connection_made(Transport())  # type: ignore[arg-type]  # as above
    link.exchange = heard  # type: ignore[assignment]  # as above
    for piece in (data[:cut], data[cut:]):
        link.data_received(piece)
    link.connection_lost(None)
    assert heard.over
    assert heard.body in data
