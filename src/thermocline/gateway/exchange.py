"""One request's way through: choose, send, splice the answer, and try elsewhere while the client has seen nothing."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, TypeVar

import msgspec

from thermocline.errors import RequestError
from thermocline.fleet.instance import Outcome
from thermocline.gateway.admission import Tenant, spliced
from thermocline.gateway.decisions import Record, Try
from thermocline.gateway.routes import Route
from thermocline.gateway.seam import Arrived, Decision, Trouble, Usage
from thermocline.gateway.usage import TAIL_BYTES, read_usage
from thermocline.tokens.prompt import Front
from thermocline.wire.http import CLIENT_GONE

if TYPE_CHECKING:
    from thermocline.gateway.client import Client
    from thermocline.gateway.link import Link
    from thermocline.gateway.proxy import Gateway
    from thermocline.gateway.standing import Standing

T = TypeVar("T")
LOG = logging.getLogger("thermocline.gateway")
BUSY = frozenset({429, 502, 503, 504})
OK, BROKEN = 200, 500
JOINED_BYTES_MAX = 16 << 10
"""Shorter bodies are copied behind their heads: one piece costs less to send than two."""
UNTOLD = Usage(None, None, None)
"""Of a success that does not say what it used, as streams that are not asked with `include_usage`."""
END_BYTES = 64
"""`[DONE]` and the end of the last chunk may come in pieces of their own, behind the one that tells of usage."""
MODEL_CHARACTERS_MAX = 128
"""Of what a client calls the model, in a record: thousands of those are kept."""
LINES = {each.value: f"HTTP/1.1 {each.value} {each.phrase}\r\n".encode() for each in HTTPStatus}
KEEP, CLOSE = b"connection: keep-alive\r\n", b"connection: close\r\n"


class Ask(msgspec.Struct):
    """What a client asks: the parts of its request that outlive a try."""

    id: str
    route: Route
    target: bytes
    """Method, path and query, as they came."""
    headers: bytes
    """Those that pass, each with its line's end."""
    front: Front
    body: bytes
    tenant: Tenant | None
    session: str | None


class Exchange:
    """One request, from when it is whole to the last byte of its answer."""

    def __init__(self, gateway: Gateway, client: Client, ask: Ask, now: float) -> None:
        self._gateway, self.client, self.ask = gateway, client, ask
        self._started = now
        self._total_deadline = self.deadline = now + gateway.rules.total_seconds
        self._decision: Decision | None = None
        self._standing: Standing | None = None
        self._link: Link | None = None
        self._task: asyncio.Task[None] | None = None
        self._tried: frozenset[int] = frozenset()
        self._tries: list[Try] = []
        self._begun = self._over = self._chosen = False
        self._before = self._last = b""
        self._usage: Usage | None = None
        self._status = 0
        self._first_byte = self._try_started = 0.0

    # -- a try ---------------------------------------------------------------------------------------------------------

    def start(self, now: float) -> None:
        """The first try, or the next one. Raises RequestError where no instance takes requests."""
        standings, ask, front = self._gateway.standings, self.ask, self.ask.front
        exclude = standings.excluded(now) | self._tried
        if standings.all_in(exclude):
            raise _nobody()
        self._try_started = now
        arrived = Arrived(
            ask.route.path,
            front.model if isinstance(front.model, str) else None,
            ask.body,
            ask.tenant.salt if ask.tenant else b"",
            ask.session,
            front.output_tokens,
            front.stream is True,
            exclude,
            now,
            front,
        )
        try:
            found = self._gateway.chooser.choose(arrived)
        except RequestError:
            raise
        except Exception as error:  # noqa: BLE001  # whatever goes wrong there, requests go on
            _log(error)
            self._go_undecided(exclude, now)
        else:
            if type(found) is Decision:
                self._go(found, now, chosen=True)
            else:
                self._task = asyncio.get_running_loop().create_task(self._aside(found, exclude))  # type: ignore[arg-type]  # not a Decision

    async def _aside(self, deciding: Awaitable[Decision], exclude: frozenset[int]) -> None:
        """Wait for a decision, not for ever."""
        try:
            async with asyncio.timeout(self._gateway.rules.choose_seconds):
                decision = await deciding
        except RequestError as error:
            self.refuse(error)
        except Exception as error:  # noqa: BLE001  # as above
            _log(error)
            self._task = None
            self._go_undecided(exclude, self._gateway.clock.now())
        else:
            self._task = None
            self._go(decision, self._gateway.clock.now(), chosen=True)

    def _go_undecided(self, exclude: frozenset[int], now: float) -> None:
        """Whoever decides has failed, or is late: the least busy instance is as good as any."""
        standings = [each for each in self._gateway.standings if each.slot not in exclude]
        if not standings:
            self.refuse(_nobody())
            return
        self._gateway.metrics.count("decisions_missed_total")
        slot = min(standings, key=lambda each: each.in_flight).slot
        self._go(Decision(instance=slot, predicted_seconds=0.0, cached_tokens=0), now, chosen=False)

    def _go(self, decision: Decision, now: float, *, chosen: bool) -> None:
        self._decision, self._chosen = decision, chosen
        standing = self._gateway.standings.at(decision.instance)
        if standing is None:  # removed while this was decided aside
            self._tell(self._gateway.chooser.failed, now, Trouble.UNREACHABLE)
            self._decision = None
            self._go_undecided(self._gateway.standings.excluded(now) | self._tried, now)
            return
        self._standing = standing
        self._gateway.standings.tried(standing, now)
        self.deadline = min(now + self._gateway.rules.first_byte_seconds, self._total_deadline)
        link = standing.take()
        if link is None:
            self._task = asyncio.get_running_loop().create_task(self._connect(standing))
        else:
            self._send(link, standing)

    async def _connect(self, standing: Standing) -> None:
        try:
            link = await standing.connect()
        except (OSError, TimeoutError, ValueError):
            self._task = None
            self.failed(Trouble.UNREACHABLE)
            return
        self._task = None
        self._send(link, standing)

    def _send(self, link: Link, standing: Standing) -> None:
        ask, decision = self.ask, self._decision
        assert decision is not None
        self._link = link
        if ask.route.method == "GET":
            link.send(self, (b"%b HTTP/1.1\r\nhost: %b\r\n%b\r\n" % (ask.target, standing.host, ask.headers),))
            return
        hint = decision.kv_transfer_params if ask.front.kv_transfer_params is msgspec.UNSET else b""
        body = spliced(ask.body, ask.tenant.salt if ask.tenant else b"", hint)
        length = sum(map(len, body)) if len(body) > 1 else len(ask.body)
        head = b"%b HTTP/1.1\r\nhost: %b\r\n%bcontent-length: %d\r\n\r\n" % (
            ask.target,
            standing.host,
            ask.headers,
            length,
        )
        link.send(self, (b"".join((head, *body)),) if length < JOINED_BYTES_MAX else (head, *body))

    # -- the answer ----------------------------------------------------------------------------------------------------

    def begin(self, status: int, headers: bytes, body: bytes, *, framed: bool, whole: bool) -> None:
        """The head and the first bytes of the body: from here on there is no other try."""
        assert self._link is not None
        if status in BUSY and self._may_retry():
            self._link.drop()
            self._fail(Trouble.BUSY)
            self._again()
            return
        now = self._gateway.clock.now()
        self._begun, self._status, self._first_byte, self._last = True, status, now, body
        self.deadline = min(now + self._gateway.rules.gap_seconds, self._total_deadline)
        decision, standing = self._decision, self._standing
        assert decision is not None
        assert standing is not None
        actual = b""
        if status == OK:
            self._tell(self._gateway.chooser.first_byte, now)
            actual = self._cached_already(body) if whole else b""
        if not framed or self._gateway.stopping:
            self.client.keep_alive = False
        if self.client.paused:
            self.pause()
        self.client.write(
            b"%b%b%bx-thermocline-instance: %b\r\nx-thermocline-predicted-ttft: %.4f\r\n"
            b"x-thermocline-predicted-cached-tokens: %d\r\n%bx-thermocline-request: %b\r\n\r\n%b"
            % (
                LINES.get(status) or b"HTTP/1.1 %d \r\n" % status,
                headers,
                KEEP if self.client.keep_alive else CLOSE,
                standing.label,
                decision.predicted_seconds,
                decision.cached_tokens,
                actual,
                self.ask.id.encode(),
                body,
            )
        )

    def _cached_already(self, body: bytes) -> bytes:
        """The header that says what the instance found cached, where its answer is there at once."""
        self._usage = read_usage(b"", body)
        if self._usage is None or self._usage.cached_tokens is None:
            return b""
        return b"x-thermocline-cached-tokens: %d\r\n" % self._usage.cached_tokens

    def more(self, data: bytes) -> None:
        """More of the answer, as it came."""
        if len(data) < END_BYTES:
            self._last = (self._last + data)[-TAIL_BYTES:]
        else:
            self._before, self._last = self._last, data
        self.deadline = min(self._gateway.clock.now() + self._gateway.rules.gap_seconds, self._total_deadline)
        self.client.write(data)

    def ended(self) -> None:
        """The answer is whole."""
        now, gateway = self._gateway.clock.now(), self._gateway
        assert self._decision is not None
        assert self._standing is not None
        usage = self._usage
        if usage is None and self._status == OK:
            usage = read_usage(self._before, self._last)
        told = UNTOLD if usage is None and self._status == OK else usage
        outcome = self._tell(gateway.chooser.finished, now, told)
        self._standing.in_flight -= 1
        self._standing.routed += 1
        if self._status in BUSY or self._status >= BROKEN:
            gateway.standings.failed(self._standing, now, self._try_started)
        else:
            gateway.standings.succeeded(self._standing)
        self._note(None)
        self._close(self._status, usage, outcome)
        self.client.done()

    def pause(self) -> None:
        """The client reads more slowly than the instance writes."""
        if self._link is not None:
            self._link.transport.pause_reading()

    def resume(self) -> None:
        """It caught up."""
        if self._link is not None:
            self._link.transport.resume_reading()

    # -- trouble -------------------------------------------------------------------------------------------------------

    def failed(self, trouble: Trouble) -> None:
        """The try came to nothing. Another one where the client has seen nothing yet, else the stream breaks off."""
        link, standing = self._link, self._standing
        assert standing is not None
        if trouble is Trouble.LOST and link is not None and link.stale and not self._over:
            # The instance closed a connection that nobody used, as we began to use it: not its fault, nor ours.
            self._link = None
            self._task = asyncio.get_running_loop().create_task(self._connect(standing))
            return
        self._fail(trouble)
        if self._begun:
            self._close(self._status)
            self.client.cut()
        elif self._may_retry():
            self._again()
        else:
            self.refuse(_no_answer(trouble))

    def _again(self) -> None:
        self._gateway.metrics.count("retries_total")
        try:
            self.start(self._gateway.clock.now())
        except RequestError as error:
            self.refuse(error)

    def late(self, now: float) -> None:
        """A deadline is over."""
        self._stop_waiting()
        if self._decision is None:
            self.refuse(_no_answer(Trouble.LATE))
            return
        if now >= self._total_deadline and not self._begun:
            self._fail(Trouble.LATE)
            self.refuse(_no_answer(Trouble.LATE))
        else:
            self.failed(Trouble.LATE)

    def cancel(self) -> None:
        """The client is gone: the instance need not go on."""
        if not self._over:
            self._stop_waiting()
            if self._decision is not None:
                self._fail(Trouble.CLIENT_LEFT)
            self._close(CLIENT_GONE)

    def _stop_waiting(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None
        if self._link is not None:
            self._link.drop()

    def _fail(self, trouble: Trouble) -> None:
        """Tell everybody who counted on this try."""
        now, gateway = self._gateway.clock.now(), self._gateway
        assert self._decision is not None
        assert self._standing is not None
        self._tell(gateway.chooser.failed, now, trouble)
        self._standing.in_flight -= 1
        if trouble is not Trouble.CLIENT_LEFT:
            gateway.standings.failed(self._standing, now, self._try_started)
        labels = (("instance", self._standing.instance.name), ("trouble", trouble.value))
        gateway.metrics.count("tries_failed_total", labels=labels)
        self._note(trouble)
        self._tried |= {self._decision.instance}
        self._decision = self._link = None

    def _may_retry(self) -> bool:
        now, gateway = self._gateway.clock.now(), self._gateway
        return (
            not self._over
            and len(self._tries) + (self._decision is not None) < gateway.rules.tries_max
            and now < self._total_deadline
            and not gateway.standings.all_in(gateway.standings.excluded(now) | self._tried | self._now_trying())
            and gateway.budget.spend()
        )

    def _now_trying(self) -> frozenset[int]:
        return frozenset() if self._decision is None else frozenset({self._decision.instance})

    def refuse(self, error: RequestError) -> None:
        """No instance's answer comes: ours does."""
        self._close(error.status, by_us=True)
        self.client.refuse(error)

    def _tell(self, hear: Callable[..., T], *what: object) -> T | None:
        """Word to whoever decided, and what they say to it. What goes wrong there goes no further."""
        if self._chosen:
            try:
                return hear(self._decision, *what)
            except Exception as error:  # noqa: BLE001  # as above
                _log(error)
        return None

    # -- the end -------------------------------------------------------------------------------------------------------

    def _note(self, trouble: Trouble | None) -> None:
        decision, standing = self._decision, self._standing
        assert decision is not None
        assert standing is not None
        first = self._first_byte - self._try_started if self._begun else None
        name = standing.instance.name
        self._tries.append(
            Try(name, decision.predicted_seconds, decision.cached_tokens, decision.choices, trouble, first)
        )

    def _close(
        self, status: int, usage: Usage | None = None, outcome: Outcome | None = None, *, by_us: bool = False
    ) -> None:
        """Whatever became of it is written down, once. An answer `by_us` is counted where it is written."""
        self._over = True
        if not by_us:
            self._gateway.count(self.ask.route, status)
        if self.ask.tenant is not None:
            self.ask.tenant.in_flight -= 1
        gateway, front = self._gateway, self.ask.front
        model = front.model[:MODEL_CHARACTERS_MAX] if isinstance(front.model, str) else None
        tenant = self.ask.tenant.name if self.ask.tenant else None
        seconds = gateway.clock.now() - self._started
        error, regret = (outcome.error, outcome.regret_seconds) if outcome is not None else (None, None)
        tries = tuple(self._tries)
        gateway.over(
            Record(self.ask.id, self.ask.route.path, model, tenant, status, seconds, usage, tries, error, regret)
        )


def _nobody() -> RequestError:
    msg = "no instance takes requests now"
    return RequestError(msg, hint="`thermocline ps` shows what is down", status=503, code="no_instance")


def _log(error: Exception) -> None:
    """What went wrong where decisions are made. Not what the error says: that could quote a prompt."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    LOG.error("whoever decides failed: %s at %s:%s", type(error).__name__, last.filename, last.lineno)


def _no_answer(trouble: Trouble) -> RequestError:
    if trouble is Trouble.LATE:
        msg = "no instance answered in time"
        return RequestError(msg, hint="send less, or raise the deadlines", status=504, code="late")
    msg = f"no instance answered ({trouble})"
    return RequestError(msg, hint="try again in a moment", status=502, code="no_answer")
