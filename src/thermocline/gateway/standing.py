"""How each instance stands with the gateway: its connections, health, breaker, drain and slow start.

What an instance holds and costs is the chooser's; here is only whether it may be asked at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus

from thermocline.clock import Clock
from thermocline.errors import SettingsError
from thermocline.fleet.instance import Instance
from thermocline.gateway.link import Known, Link
from thermocline.gateway.rules import Rules
from thermocline.gateway.seam import Chooser
from thermocline.store.breaker import Breaker

LOG = logging.getLogger("thermocline.gateway")
_URL = re.compile(r"http://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]{1,255}):(\d{1,5})/?")
_NAME = re.compile(r"[A-Za-z0-9._:-]{1,64}")
SLOW_START_LEAST = 0.1
"""The share of its share that an instance takes at once."""
ANSWER_BYTES = 64


class Health(enum.Enum):
    """What a question for an instance's health came to."""

    WELL = enum.auto()
    ILL = enum.auto()
    """It answered something else, or too late: it may be as busy as it can be, and hold all that it held."""
    GONE = enum.auto()
    """Nobody listens there: what comes back there begins with nothing."""


class State(enum.StrEnum):
    """What the admin socket shows."""

    UP = "up"
    DRAINING = "draining"
    DOWN = "down"
    """It does not answer for its health."""
    OPEN = "open"
    """Its requests failed: it is left alone for a while, then tried once."""


class Standing:
    """One instance."""

    def __init__(self, slot: int, instance: Instance, rules: Rules, since: float) -> None:
        self.slot, self.instance, self.rules = slot, instance, rules
        self.address = _address(instance)
        self.host = instance.url.removeprefix("http://").rstrip("/").encode()
        self.label = instance.name.encode()
        self.breaker = Breaker()
        self.healthy, self.draining = True, False
        self.failed_checks = self.refused_checks = self.in_flight = self.routed = 0
        self.answered: Known | None = None
        self._links: list[Link] = []
        self._since, self._turn = since, 1.0

    # -- may it be asked -----------------------------------------------------------------------------------------------

    def state(self, now: float) -> State:
        """Whether it may be asked, and else why not."""
        if self.draining:
            return State.DRAINING
        if not self.healthy:
            return State.DOWN
        return State.UP if self.breaker.allows(now) else State.OPEN

    def ramp(self, now: float) -> float:
        """Which share of its share it takes: 1.0 once it has been up for long enough."""
        seconds = self.rules.slow_start_seconds
        if seconds <= 0 or now - self._since >= seconds:
            return 1.0
        return SLOW_START_LEAST + (1 - SLOW_START_LEAST) * (now - self._since) / seconds

    def its_turn(self, now: float) -> bool:
        """While it starts slowly, True for its share of the requests, evenly spread."""
        ramp = self.ramp(now)
        if ramp < 1.0:
            self._turn += ramp
            if self._turn < 1.0:
                return False
            self._turn -= 1.0
        return True

    def came_back(self, now: float) -> None:
        """After being down it starts slowly: its caches are cold."""
        self.healthy = True
        self.breaker.succeeded()
        self._since, self._turn = now, 1.0

    # -- connections ---------------------------------------------------------------------------------------------------

    def take(self) -> Link | None:
        """The connection that was used last: those behind it grow old and are closed."""
        while self._links:
            link = self._links.pop()
            if not link.transport.is_closing():
                return link
        return None

    def give_back(self, link: Link) -> None:
        """An exchange is over and its connection still good."""
        if self.draining or len(self._links) >= self.rules.links_idle_max:
            link.transport.close()
            return
        link.idle_since = -1.0
        self._links.append(link)

    def forget(self, link: Link) -> None:
        """The connection is closed."""
        with contextlib.suppress(ValueError):
            self._links.remove(link)

    def sweep(self, now: float) -> None:
        """Close connections that nobody has used for a while."""
        for link in tuple(self._links):
            if link.idle_since < 0:
                link.idle_since = now
            elif now - link.idle_since > self.rules.link_idle_seconds:
                link.transport.close()

    def close(self) -> None:
        """Close every connection that is not in use."""
        for link in tuple(self._links):
            link.transport.close()

    async def connect(self) -> Link:
        """A new connection. Raises OSError, TimeoutError, or ValueError for a name that cannot be one."""
        host, port = self.address
        async with asyncio.timeout(self.rules.connect_seconds):
            _, link = await asyncio.get_running_loop().create_connection(lambda: Link(self), host, port)
        return link

    # -- health --------------------------------------------------------------------------------------------------------

    async def check(self) -> Health:
        """Ask it for its health."""
        request = b"GET /health HTTP/1.1\r\nhost: %b\r\nconnection: close\r\n\r\n" % self.host
        try:
            async with asyncio.timeout(self.rules.health_seconds):
                reader, writer = await asyncio.open_connection(*self.address)
                with contextlib.closing(writer):
                    writer.write(request)
                    line = await reader.read(ANSWER_BYTES)
        except ConnectionRefusedError:
            return Health.GONE
        except (OSError, TimeoutError, ValueError):
            return Health.ILL
        return Health.WELL if line.split(b" ")[1:2] == [str(HTTPStatus.OK.value).encode()] else Health.ILL

    def checked(self, now: float, health: Health) -> bool:
        """Take in an answer of `check`. True if that changed whether it may be asked."""
        self.refused_checks = self.refused_checks + 1 if health is Health.GONE else 0
        if health is Health.WELL:
            self.failed_checks = 0
            if self.healthy:
                return False  # a breaker that is open closes by a request that succeeds
            self.came_back(now)
            return True
        self.failed_checks += 1
        if self.healthy and self.failed_checks >= self.rules.unhealthy_after:
            self.healthy = False
            return True
        return False


class Standings:
    """All instances, by their slots."""

    def __init__(self, chooser: Chooser, rules: Rules, clock: Clock) -> None:
        self._chooser, self._rules, self._clock = chooser, rules, clock
        self._by_slot: dict[int, Standing] = {}
        self._excluded: frozenset[int] = frozenset()
        self._valid_until = 0.0
        self.on_change: Callable[[], None] = lambda: None

    def __iter__(self) -> Iterator[Standing]:
        return iter(tuple(self._by_slot.values()))

    def __len__(self) -> int:
        return len(self._by_slot)

    def __getitem__(self, slot: int) -> Standing:
        return self._by_slot[slot]

    def all_in(self, slots: frozenset[int]) -> bool:
        """True where there is no instance outside these slots."""
        return self._by_slot.keys() <= slots

    def at(self, slot: int) -> Standing | None:
        """The instance in that slot, if there is one."""
        return self._by_slot.get(slot)

    def named(self, name: str) -> Standing | None:
        """The instance of that name."""
        return next((each for each in self if each.instance.name == name), None)

    def add(self, instance: Instance, *, slowly: bool = True) -> Standing:
        """A new instance. Raises SettingsError for a name that is taken or a URL that cannot be used."""
        if not _NAME.fullmatch(instance.name) or self.named(instance.name) is not None:
            msg = f"the name {instance.name!r} is taken, or not letters, digits and . _ : -"
            raise SettingsError(msg, hint="give each instance a short name of its own")
        slot = next(number for number in range(len(self) + 1) if number not in self._by_slot)
        now = self._clock.now()
        since = now if slowly else now - self._rules.slow_start_seconds
        standing = Standing(slot, instance, self._rules, since)
        self._by_slot[slot] = standing
        self._chooser.joined(slot, instance)
        self.changed()
        return standing

    def remove(self, standing: Standing) -> None:
        """Forget an instance. What it is answering it may end."""
        del self._by_slot[standing.slot]
        standing.draining = True
        standing.close()
        self._chooser.left(standing.slot)
        self.changed()

    def changed(self) -> None:
        """Something may be asked, or may not be any more."""
        self._valid_until = 0.0
        self.on_change()

    def excluded(self, now: float) -> frozenset[int]:
        """Slots that may not be asked now. Slow starters stay out of other requests' way, unless nobody else is up.

        Where all are down, they are asked all the same, but for those that drain: more likely than that all died is
        that what is known of them is wrong (Envoy calls this its panic mode).
        """
        if now < self._valid_until:
            return self._excluded
        out = {each.slot for each in self if each.state(now) is not State.UP}
        if len(out) == len(self):
            out = {each.slot for each in self if each.draining}
        slow = {each.slot for each in self if each.slot not in out and not each.its_turn(now)}
        if len(out) + len(slow) < len(self):
            out |= slow
        starting = any(each.ramp(now) < 1.0 for each in self)
        pending = [each.breaker.open_until for each in self if not each.breaker.closed]
        self._excluded = frozenset(out)
        self._valid_until = now if starting else min(pending, default=float("inf"))
        return self._excluded

    def any_up(self, now: float) -> bool:
        """True while at least one instance may be asked."""
        return any(each.state(now) is State.UP for each in self)

    def tried(self, standing: Standing, now: float) -> None:
        """A request goes to the instance. After failures it is the only one until it is answered."""
        standing.in_flight += 1
        if not standing.breaker.closed:
            standing.breaker.trying(now)
            self.changed()

    def succeeded(self, standing: Standing) -> None:
        """The instance answered."""
        if standing.breaker.failures or not standing.breaker.closed:
            standing.breaker.succeeded()
            self.changed()

    def failed(self, standing: Standing, now: float, started: float) -> None:
        """The instance did not answer a request that was `started` then."""
        if standing.breaker.failed(now, started):
            self.changed()

    async def watch(self) -> None:
        """Ask every instance for its health, again and again."""
        while True:
            standings: Sequence[Standing] = tuple(self)
            answers = await asyncio.gather(*(each.check() for each in standings), return_exceptions=True)
            now = self._clock.now()
            for standing, answer in zip(standings, answers, strict=True):
                self._take(standing, answer if isinstance(answer, Health) else Health.ILL, now)
            await asyncio.sleep(self._rules.health_seconds)

    def _take(self, standing: Standing, health: Health, now: float) -> None:
        if self.at(standing.slot) is not standing:
            return  # removed while it was asked
        if standing.checked(now, health):
            self.changed()
        if standing.refused_checks == self._rules.unhealthy_after:
            try:
                self._chooser.lost(standing.slot)
            except Exception:
                LOG.exception("what an instance held could not be forgotten")


def _address(instance: Instance) -> tuple[str, int]:
    found = _URL.fullmatch(instance.url)
    if found is None or not 0 < int(found[2]) < 1 << 16:
        msg = f"{instance.url!r} is not the address of an instance"
        raise SettingsError(msg, hint="write http://host:port")
    return found[1].strip("[]"), int(found[2])
