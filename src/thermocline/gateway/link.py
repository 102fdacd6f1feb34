"""One kept-alive connection to an instance. Bytes of an answer pass as they came; the parser only finds its ends."""

from __future__ import annotations

import asyncio
import socket
from http import HTTPStatus
from typing import TYPE_CHECKING

import httptools
from msgspec import Struct

from thermocline.gateway.mould import ENDING, Mould, mould_of
from thermocline.gateway.seam import Trouble

if TYPE_CHECKING:
    from thermocline.gateway.exchange import Exchange
    from thermocline.gateway.standing import Standing

HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te upgrade".split()
)
"""Headers that are between two neighbours, and end there."""
NO_BODY = frozenset({204, 304})


class Known(Struct, frozen=True, gc=False):
    """The head of an instance's answers that are no streams."""

    mould: Mould
    line_bytes: int


def without_delay(transport: asyncio.BaseTransport) -> None:
    """Every piece goes out at once: waiting for more would cost 40 ms at the first token."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family in {socket.AF_INET, socket.AF_INET6}:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class Link(asyncio.Protocol):
    """One connection. It carries one exchange at a time, and is given back to its instance between them."""

    def __init__(self, standing: Standing) -> None:
        self._standing = standing
        self.transport: asyncio.Transport
        self.exchange: Exchange | None = None
        self.fresh = True
        self.idle_since = 0.0
        self._parser = httptools.HttpResponseParser(self)
        self._reset()

    def _reset(self) -> None:
        self._pending = b""
        self._headers: list[bytes] = []
        self._head_complete = self._complete = self._passing = self._framed = self._keep_alive = False
        self._status = 0

    @property
    def stale(self) -> bool:
        """True where it was used before, and nothing of this answer has come."""
        return not self.fresh and not self._pending and not self._passing

    def send(self, exchange: Exchange, pieces: tuple[bytes | memoryview, ...]) -> None:
        """Ask. The answer goes to `exchange`."""
        self.exchange = exchange
        if len(pieces) == 1:
            self.transport.write(pieces[0])
        else:
            self.transport.writelines(pieces)

    def drop(self) -> None:
        """Nobody wants the answer: closing is how an instance learns that it need not go on."""
        self.exchange = None
        self.transport.abort()

    # -- the transport's calls -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The instance took us."""
        self.transport = transport  # type: ignore[assignment]  # TCP transports read and write
        without_delay(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The instance went, or we did."""
        self._standing.forget(self)
        exchange, self.exchange = self.exchange, None
        if exchange is None:
            return
        if exc is None and self._passing and not self._framed:
            exchange.ended()  # such an answer ends with its connection
        else:
            exchange.failed(Trouble.LOST)

    def data_received(self, data: bytes) -> None:
        """A piece of the answer."""
        exchange = self.exchange
        if exchange is None:
            self.transport.abort()  # nobody asked
            return
        first = not (self._pending or self._passing)
        if first and self._come_again(exchange, data):
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._malformed()
            return
        if self._passing:
            exchange.more(data)
        elif not self._begin(exchange, data):
            return
        if self._complete:
            if first:
                self._remember(data)
            self._end(exchange)

    def _come_again(self, exchange: Exchange, data: bytes) -> bool:
        """A whole answer with the head of an earlier one: nothing is left to read in it."""
        known = self._standing.answered
        begin = known.mould.body_at(data) if known is not None else 0
        if known is None or not begin:
            return False
        self._passing = self._keep_alive = True
        exchange.begin(HTTPStatus.OK, data[known.line_bytes : begin - 2], data[begin:], framed=True, whole=True)
        if self.exchange is exchange:
            self._end(exchange)
        return True

    def _remember(self, data: bytes) -> None:
        """The next answer may have the same head. Only one that passes as it is, is remembered."""
        if self._status != HTTPStatus.OK or not self._keep_alive:
            return
        line_bytes, end = data.find(b"\r\n") + 2, data.find(ENDING) + 2
        lines = b"".join(self._headers)
        if data[line_bytes:end] == lines and b"transfer-encoding" not in lines.lower():
            mould = mould_of(data, len(data) - end - 2)
            self._standing.answered = None if mould is None else Known(mould, line_bytes)

    def _begin(self, exchange: Exchange, data: bytes) -> bool:
        """The head waits for the body's first byte: until then the request can be tried elsewhere."""
        self._pending = self._pending + data if self._pending else data
        if not self._head_complete:
            if len(self._pending) > self._standing.rules.response_head_bytes_max:
                self._malformed()
            return False
        cut = self._pending.find(ENDING) + len(ENDING)
        if len(self._pending) == cut and not self._complete:
            return False
        self._passing = True
        body, self._pending = self._pending[cut:], b""
        headers = b"".join(self._headers)
        exchange.begin(self._status, headers, body, framed=self._framed, whole=self._complete)
        return self.exchange is exchange

    def _end(self, exchange: Exchange) -> None:
        self.exchange = None
        if self._keep_alive:
            self._reset()
            self.fresh = False
            self.transport.resume_reading()
            self._standing.give_back(self)
        else:
            self.transport.close()
        exchange.ended()

    def _malformed(self) -> None:
        exchange, self.exchange = self.exchange, None
        self.transport.abort()
        if exchange is not None:
            exchange.failed(Trouble.MALFORMED)

    # -- the parser's calls --------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """An answer begins. Behind a whole one it is one that nobody asked for."""
        if self._head_complete:
            raise httptools.HttpParserError("a second answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header, passed on unless it is between neighbours. Those behind a chunked body pass with it."""
        if self._head_complete:
            return
        lower = name.lower()
        if lower not in HOP_BY_HOP:
            self._headers.append(b"%b: %b\r\n" % (name, value))
            if lower in {b"content-length", b"transfer-encoding"}:
                self._framed = True

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._head_complete = True
        self._status = self._parser.get_status_code()
        self._keep_alive = self._parser.should_keep_alive()
        if self._status < HTTPStatus.OK or self._parser.get_http_version() != "1.1":
            raise httptools.HttpParserError("an answer that cannot be passed on")
        if self._status in NO_BODY:
            self._framed = True

    def on_message_complete(self) -> None:
        """The answer is whole."""
        self._complete = True
