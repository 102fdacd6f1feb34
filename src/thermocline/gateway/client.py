"""One client's connection: requests are read whole, checked, and answered one after the other.

What comes in is bounded in bytes and in time. A request is passed on in a form of our own making, with one length that
we counted, so nothing behind us can disagree about where it ends.
"""

from __future__ import annotations

import asyncio
import enum
import re
from http import HTTPStatus
from typing import TYPE_CHECKING

import httptools
from msgspec import Struct

from thermocline.errors import RequestError
from thermocline.gateway.admission import Tenant, read_front, refuse_salt
from thermocline.gateway.exchange import CLOSE, KEEP, LINES, Ask, Exchange
from thermocline.gateway.link import HOP_BY_HOP, without_delay
from thermocline.gateway.mould import Mould, mould_of
from thermocline.gateway.routes import ROUTES, Kind, Route
from thermocline.tokens.prompt import SESSION_CHARACTERS_MAX, Front
from thermocline.wire import openai
from thermocline.wire.http import CONTINUE

if TYPE_CHECKING:
    from thermocline.gateway.proxy import Gateway

SEEN = {
    b"host": False,
    b"connection": False,
    b"content-length": False,
    b"transfer-encoding": False,
    b"expect": False,
    b"authorization": False,
    b"content-type": True,
    b"content-encoding": True,
    b"x-request-id": True,
    b"x-session-id": True,
}
"""Headers that we look at, which may come once; and whether they are passed on as they are."""
DROPPED = HOP_BY_HOP | {b"accept-encoding", b"trailer"}
"""Compressed answers would hide what the instance says it used."""
JSON = b"application/json"
_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_NO_FRONT = Front()


class Head(Struct, frozen=True, gc=False):
    """What is known of a request before its body. On a kept connection it is often the same as that before."""

    route: Route
    target: bytes
    headers: bytes
    name: str
    """Its x-request-id; empty where we give it one."""
    renamed: bool
    """Whether it has an x-request-id that is none. It passes, and is not what we call the request."""
    session: str | None
    authorization: bytes


class Phase(enum.IntEnum):
    """Where a connection is."""

    HEAD = 0
    BODY = 1
    BUSY = 2
    CLOSING = 3


HEAD, BODY, BUSY, CLOSING = Phase


class Client(asyncio.Protocol):
    """One client."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._transport: asyncio.Transport
        self._parser = httptools.HttpRequestParser(self)
        self._exchange: Exchange | None = None
        self.paused = False
        self.deadline = 0.0
        self._held_bytes = self._received_bytes = 0
        self._route: Route | None = None
        self._head: Head | None = None
        self._mould: Mould | None = None
        self._tenant: Tenant | None = None
        self._phase, self._whole, self.keep_alive = HEAD, False, True
        self._begin_head()

    def _begin_head(self) -> None:
        self._url = b""
        self._seen: dict[bytes, bytes] = {}
        self._headers: list[bytes] = []
        self._body: list[bytes] = []

    # -- the transport's calls -----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        self._transport = transport  # type: ignore[assignment]  # TCP transports read and write
        without_delay(transport)
        limits = self._gateway.limits
        self.deadline = self._gateway.clock.now() + limits.header_seconds
        if not self._gateway.admit(self):
            self.keep_alive = False
            self.refuse(_full("too many connections", 503))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  # asyncio's signature
        """The client went, or was sent away."""
        self._gateway.forget(self)
        self._let_go()
        self._phase = CLOSING
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.cancel()

    def pause_writing(self) -> None:
        """The client reads more slowly than the instance writes: its stream slows down, and nobody else's."""
        self.paused = True
        self.deadline = self._gateway.clock.now() + self._gateway.limits.write_seconds
        if self._exchange is not None:
            self._exchange.pause()

    def resume_writing(self) -> None:
        """It caught up."""
        self.paused = False
        if self._phase is HEAD:
            self.deadline = self._gateway.clock.now() + self._gateway.limits.idle_seconds
        if self._exchange is not None:
            self._exchange.resume()

    def data_received(self, data: bytes) -> None:
        """Bytes came: feed the parser, whose calls below collect the request."""
        if self._phase is BUSY:
            self.keep_alive = False  # pipelined: the request in flight is answered, this one never is
            return
        if self._phase is CLOSING:
            return  # read on nevertheless, so that the client can finish sending and learn why it was refused
        first = not self._received_bytes
        self._received_bytes += len(data)
        try:
            if first:
                mould = self._mould
                begin = mould.body_at(data, self._gateway.limits.body_bytes_max) if mould is not None else 0
                if begin:
                    self._come_again(data[begin:])
                    return
                self._route = self._head = self._mould = None
                self.deadline = self._gateway.clock.now() + self._gateway.limits.header_seconds
            self._parser.feed_data(data)
            self._check_received()
            if self._whole:
                if first:
                    self._remember(data)
                self._begin(b"".join(self._body))
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            self._refuse_for_good(cause if isinstance(cause, RequestError) else _malformed(str(error)))
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._refuse_for_good(_malformed(f"{error}"))
        except RequestError as error:
            self._refuse_for_good(error)

    def _check_received(self) -> None:
        """What the parser holds back is bounded too: a head without an end, or the trimmings of a chunked body."""
        limits = self._gateway.limits
        if self._phase is HEAD and self._received_bytes > limits.header_bytes_max:
            raise _head_too_large(limits.header_bytes_max)
        if self._received_bytes > limits.header_bytes_max + 2 * limits.body_bytes_max:
            raise _body_too_large(limits.body_bytes_max)

    def _come_again(self, body: bytes) -> None:
        """A request with the head of the one before. Only what does not follow from its bytes is looked at again."""
        head = self._head
        assert head is not None
        self._tenant = self._gateway.tenant(head.route, head.authorization)
        self._hold(len(body))
        self._whole = True
        self._begin(body)

    def _remember(self, data: bytes) -> None:
        """The next request may have the same head. Not where it was named: names are not given twice."""
        head = self._head
        assert head is not None
        own = head.name or head.renamed or self._seen.keys() & {b"transfer-encoding", b"expect"}
        if self.keep_alive and head.route.method == "POST" and not own:
            self._mould = mould_of(data, self._held_bytes)

    # -- the parser's calls --------------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins. Behind a whole one in the same bytes, it is pipelined."""
        if self._whole:
            self.keep_alive = False
        else:
            self._begin_head()

    def on_url(self, url: bytes) -> None:
        """Part of the request line."""
        if not self._whole:
            self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header: looked at, passed on, or dropped. What follows a chunked body is dropped."""
        if self._phase is not HEAD:
            return
        lower = name.lower()
        passes = SEEN.get(lower)
        if passes is not None:
            if lower in self._seen:
                raise _malformed(f"two headers {lower.decode('latin-1')}")
            self._seen[lower] = value
        if passes or (passes is None and lower not in DROPPED):
            self._headers.append(b"%b: %b\r\n" % (name, value))

    def on_headers_complete(self) -> None:
        """The head is there: refuse now what will be refused, before its body is sent."""
        if self._whole:
            return
        gateway, seen, limits = self._gateway, self._seen, self._gateway.limits
        head_bytes = len(self._url) + sum(map(len, self._headers))
        if head_bytes > limits.header_bytes_max:
            raise _head_too_large(limits.header_bytes_max)
        self.keep_alive = self._parser.should_keep_alive()
        method = self._parser.get_method()
        self._route = route = gateway.find(method, self._url)
        if self._parser.get_http_version() != "1.1" and (
            route.kind is Kind.PASS or self._parser.get_http_version() != "1.0"
        ):
            msg = f"HTTP/{self._parser.get_http_version()} is not passed on"
            raise RequestError(msg, hint="use HTTP/1.1", status=505, code="http_version")
        self._check_framing(route, limits.body_bytes_max)
        gateway.check_host(seen.get(b"host", b""))
        self._tenant = gateway.tenant(route, seen.get(b"authorization", b""))
        if route.method == "POST":
            _check_content(seen)
        if seen.get(b"connection", b"keep-alive").lower() not in {b"keep-alive", b"close"}:
            self._drop_named(seen[b"connection"])
        self._head = self._known(route, method + b" " + self._url)
        self._phase = BODY
        self.deadline = gateway.clock.now() + limits.body_seconds
        if seen.get(b"expect", b"").lower() == b"100-continue":
            self._transport.write(CONTINUE)

    def _known(self, route: Route, target: bytes) -> Head:
        seen = self._seen
        authorization = seen.get(b"authorization", b"")
        if self._gateway.instance_key:
            self._headers.append(self._gateway.instance_key)
        elif authorization and self._gateway.keys is None:  # else it is our key, and goes no further
            self._headers.append(b"authorization: %b\r\n" % authorization)
        told, session = seen.get(b"x-request-id", b""), seen.get(b"x-session-id", b"")
        name = told.decode() if _ID.fullmatch(told) else ""
        headers, session_text = b"".join(self._headers), session.decode("latin-1")[:SESSION_CHARACTERS_MAX] or None
        return Head(route, target, headers, name, bool(told) and not name, session_text, authorization)

    def _check_framing(self, route: Route, body_bytes_max: int) -> None:
        """A body has one length, or comes in chunks and nothing else. The parser refuses more than that; so do we."""
        length, encoding = self._seen.get(b"content-length"), self._seen.get(b"transfer-encoding")
        if encoding is not None and (encoding.lower() != b"chunked" or length is not None):
            raise _malformed("transfer-encoding is not chunked alone")
        if length is not None and not length.isdigit():
            raise _malformed("content-length is no number")
        if route.method == "GET" and (encoding is not None or int(length or 0) > 0):
            raise _malformed("a GET with a body")
        if int(length or 0) > body_bytes_max:
            raise _body_too_large(body_bytes_max)

    def _drop_named(self, connection: bytes) -> None:
        """Headers that `Connection` names are between the client and us."""
        named = {name.strip().lower() for name in connection.split(b",")}
        self._headers = [line for line in self._headers if line.partition(b":")[0].lower() not in named]

    def on_body(self, body: bytes) -> None:
        """Part of the body."""
        if self._whole:
            return
        self._body.append(body)
        self._hold(len(body))
        if self._held_bytes > self._gateway.limits.body_bytes_max:
            raise _body_too_large(self._gateway.limits.body_bytes_max)

    def on_message_complete(self) -> None:
        """The request is whole."""
        if self._phase is BODY:
            self._whole = True

    def _hold(self, count: int) -> None:
        gateway = self._gateway
        self._held_bytes += count
        gateway.held_bytes += count
        if gateway.held_bytes > gateway.rules.held_bytes_max:
            raise _full("too many bytes of requests are in flight", 429)

    # -- answering -----------------------------------------------------------------------------------------------------

    def _begin(self, body: bytes) -> None:
        """Answer it, or have it answered. An error here leaves the connection as it is: its bytes were understood."""
        self._phase, head, gateway = BUSY, self._head, self._gateway
        assert head is not None
        self._body = []
        try:
            if head.route.kind is not Kind.PASS:
                self.respond(*gateway.answer(head.route.kind))
                return
            ask = self._ask(head, body)
            now = gateway.enter(ask.tenant)
            self._exchange = exchange = Exchange(gateway, self, ask, now)
            exchange.start(now)
        except RequestError as error:
            if self._exchange is not None:
                self._exchange.refuse(error)
            else:
                self.refuse(error)

    def _ask(self, head: Head, body: bytes) -> Ask:
        front, tenant = _NO_FRONT, self._tenant
        if head.route.method == "POST":
            front = read_front(body)
            if tenant is not None and tenant.salt:
                refuse_salt(front)
        name, headers = head.name, head.headers
        if not name:
            name = self._gateway.new_id()
            if not head.renamed:
                headers += b"x-request-id: %b\r\n" % name.encode()
        return Ask(name, head.route, head.target, headers, front, body, tenant, head.session or front.session)

    def write(self, data: bytes) -> None:
        """Bytes of an answer."""
        if not self._transport.is_closing():
            self._transport.write(data)

    def respond(
        self, body: bytes, status: int = 200, content_type: str = "application/json", more: bytes = b""
    ) -> None:
        """A whole answer of our own."""
        self._gateway.count(self._route, status)
        line = LINES[status]
        kept = KEEP if self.keep_alive and not self._gateway.stopping else CLOSE
        head = b"content-type: %b\r\ncontent-length: %d\r\n" % (content_type.encode(), len(body))
        self.write(b"%b%b%b%b\r\n%b" % (line, head, kept, more, body))
        self.done()

    def refuse(self, error: RequestError) -> None:
        """An error as the answer."""
        self._exchange = None
        more = b""
        if error.status in {HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE}:
            more = b"retry-after: %d\r\n" % self._gateway.rules.retry_after_seconds
        elif error.status == HTTPStatus.METHOD_NOT_ALLOWED:
            more = b"allow: %b\r\n" % ROUTES[self._url.partition(b"?")[0]].method.encode()
        self.respond(openai.error_body(error), error.status, more=more)

    def _refuse_for_good(self, error: RequestError) -> None:
        """Where its end is cannot be known, or is far away: answer and close."""
        if self._phase not in {BUSY, CLOSING}:
            self.keep_alive = False
            self.refuse(error)

    def done(self) -> None:
        """The answer is written: be ready for the next request, or say that no more comes."""
        self._exchange = None
        self._let_go()
        gateway = self._gateway
        if self._transport.is_closing():
            return
        if self.keep_alive and not gateway.stopping:
            self._phase, self._whole, self._received_bytes = HEAD, False, 0
            seconds = gateway.limits.write_seconds if self.paused else gateway.limits.idle_seconds
            self.deadline = gateway.clock.now() + seconds
            return
        # Closing at once could destroy the answer on its way, if the client still sends.
        self._phase = CLOSING
        self._transport.write_eof()
        self.deadline = gateway.clock.now() + gateway.limits.linger_seconds

    def _let_go(self) -> None:
        self._gateway.held_bytes -= self._held_bytes
        self._held_bytes = 0

    def cut(self) -> None:
        """The answer breaks off, and must not look whole."""
        self._exchange = None
        self._transport.close()

    def sweep(self, now: float) -> None:
        """Whatever takes too long ends."""
        exchange = self._exchange
        if exchange is not None and now > exchange.deadline and not self.paused:
            exchange.late(now)
        elif now > self.deadline and (self.paused or self._phase is CLOSING):
            self._transport.abort()
        elif now > self.deadline and self._phase in {HEAD, BODY}:
            if self._received_bytes:
                msg = "the request did not arrive in time"
                self._refuse_for_good(RequestError(msg, hint="send it faster", status=408))
            else:
                self._transport.close()  # idle: nothing was asked

    def close_when_idle(self) -> None:
        """The gateway stops: finish the request in flight, if there is one."""
        if self._exchange is None:
            self._transport.close()

    def abort(self) -> None:
        """The gateway cannot wait any longer."""
        self._transport.abort()


def _check_content(seen: dict[bytes, bytes]) -> None:
    """Only plain JSON: browsers send that across sites only after asking, and what is packed cannot be looked into."""
    kind = seen.get(b"content-type", b"")
    if kind != JSON and kind.partition(b";")[0].strip().lower() != JSON:
        msg = "the content type is not application/json"
        raise RequestError(msg, hint="send `Content-Type: application/json`", status=415, code="unsupported_media_type")
    if seen.get(b"content-encoding", b"identity").lower() != b"identity":
        msg = "the body is packed"
        raise RequestError(msg, hint="send it without Content-Encoding", status=415, code="unsupported_media_type")


def _malformed(what: str) -> RequestError:
    return RequestError(f"this is not HTTP/1.1: {what}", hint="check the client", status=400, code="malformed")


def _full(what: str, status: int) -> RequestError:
    return RequestError(what, hint="come again after Retry-After seconds", status=status, code="too_many")


def _head_too_large(most: int) -> RequestError:
    msg = f"the request line and headers exceed {most} bytes"
    return RequestError(msg, hint="send fewer or shorter headers", status=431, code="headers_too_large")


def _body_too_large(most: int) -> RequestError:
    msg = f"the body exceeds {most} bytes"
    return RequestError(msg, hint="send less, or raise body_bytes_max", status=413, code="body_too_large")
