"""What may be served from memory, how a reply is kept, and what a write forgets: once, for threads and for asyncio.

Nothing here does I/O. A command is a generator of `Step`s: the two clients take each step in their own colour and send
back what came of it. One cache entry per Redis key holds all that is known of it (`Held`), so an invalidation is one
removal. Three things together keep it right:

- the *lease*: the tracking link has proved, by a PONG to a PING sent then, that it has told all until then; memory is
  served for `stale_seconds_max` from that moment and no longer, whatever becomes of the link;
- the *generation* (cache.py): what was fetched while its key was dropped is not stored;
- a value that differs from one stored while it was fetched makes the key forgotten: nobody sees a key go backwards.

Where a prefix has a grace (options.py), an entry that the server says has changed is *old* for so long: it is still
served, and fetched anew in the background once. So nothing older than `stale_seconds_max + grace_seconds` is served.
Own writes remove entries, old or not; after one whose keys cannot be told no entry that was old by then is served.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from thermocline.clock import Clock
from thermocline.near.cache import REFRESHES_MAX, Cache, Entry
from thermocline.near.commands import Args, Effect, Kind
from thermocline.near.held import ANSWERS, KEY_MISSING, NOT_HERE, Held, Name, Reply
from thermocline.near.options import PLAIN_UNDER, Options, Under

ASK_SECONDS = 0.05
"""How long a command waits for the tracking link; then memory is cleared or left out instead."""
REFRESH_PAUSE_SECONDS = 0.1
"""After a fetch in the background has failed, its key's next one waits so long."""


@dataclass(frozen=True, slots=True)
class Fetch:
    """Step: these commands in one round trip; the replies come back, errors among them as values."""

    commands: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Step: wait for a future; comes back with whether it is done."""

    future: Future[Any]
    seconds: float


@dataclass(frozen=True, slots=True)
class Background:
    """Step: take these steps beside what goes on; comes back with whether that was begun."""

    steps: Steps


class Plain:
    """Step: the command itself, as it was given, as redis-py does it."""


PLAIN = Plain()
Step = Fetch | Wait | Background | Plain
Steps = Generator[Step, Any, Any]


class Lease:
    """Memory may be served until then, on the cache's clock."""

    __slots__ = ("until",)

    def __init__(self) -> None:
        self.until = -math.inf


class Flight(Future[Any]):
    """One fetch that others wait for. `generation` is its key's when it began."""

    def __init__(self, generation: int) -> None:
        super().__init__()
        self.generation = generation


Flights = dict[tuple[Any, ...], Flight]


class View:
    """The memory of all clients of this process that are set up alike. Any thread.

    `ask` sends a command over the tracking link and gives the future of its reply. `encoding` and `errors` are the
    clients'.
    """

    def __init__(
        self,
        options: Options,
        clock: Clock,
        ask: Callable[..., Future[Any]],
        *,
        encoding: str = "utf-8",
        errors: str = "strict",
        decodes: bool,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.options = options
        self._under = [(under.prefix.encode(), under) for under in options.under]
        self._under.sort(key=lambda pair: -len(pair[0]))
        longest = options.max_age_seconds + max((under.grace_seconds for under in options.under), default=0.0)
        self.cache = Cache(options.bytes_max, max_age_seconds=longest, policy=options.policy, clock=clock)
        self.lease = Lease()
        self.flights: Flights = {}
        self.fetches = self.refreshes_failed = 0
        self.now = clock.now
        self._chance = chance
        self._refreshes: dict[Name, float] = {}  # of which keys, and until when no other one begins
        self._old_until = -math.inf  # what was old by then is not served
        self._ask = ask
        self._codec = encoding, errors
        self.plain_text = self._codec == ("utf-8", "strict")
        self.decodes = decodes
        self._prefixes = tuple(prefix.encode() for prefix in options.prefixes)
        self._filing = threading.Lock()

    # -- names ---------------------------------------------------------------------------------------------------------

    def name(self, key: object) -> Name | None:
        """Where a key is kept: text as text, all else as bytes. None for what may not be kept or is no key."""
        encoded = self._encoded(key)
        if encoded is None or not encoded.startswith(self._prefixes or b""):
            return None
        return key if type(key) is str and self.plain_text else encoded  # another class may have another hash

    def drop(self, keys: Iterable[object]) -> None:
        """Forget keys under every name they may be kept as."""
        names = [name for key in keys for name in self._names(key)]
        if names:
            self.cache.drop(names)

    def changed(self, keys: Iterable[bytes]) -> None:
        """What others have changed, as the server says: forgotten, or old from now on where there is a grace."""
        if not self._under:
            self.drop(keys)
            return
        for key in keys:
            grace = self.under(key).grace_seconds
            for name in self._names(key):
                entry = self.cache.entries.get(name)
                if grace and entry is not None and entry.value.exists:
                    self.cache.make_old(name, grace)
                else:
                    self.cache.drop((name,))

    def under(self, name: Name) -> Under:
        """How a key is kept: by the longest prefix that fits."""
        encoded = name if isinstance(name, bytes) else name.encode(errors="surrogatepass")
        return next((under for prefix, under in self._under if encoded.startswith(prefix)), PLAIN_UNDER)

    def clear(self) -> None:
        """Forget everything."""
        self.cache.clear()

    def serving(self) -> bool:
        """Whether memory may be served now."""
        return self.now() < self.lease.until

    def _names(self, key: object) -> list[Name]:
        encoded = self._encoded(key)
        names: list[Name] = [] if encoded is None else [encoded]
        if encoded is None and isinstance(key, str):
            for codec in (self._codec, ("utf-8", "strict")):
                with contextlib.suppress(UnicodeEncodeError):
                    names.append(key.encode(*codec))
        with contextlib.suppress(UnicodeDecodeError):
            names += [] if encoded is None else [encoded.decode()]
        return names

    def _encoded(self, key: object) -> bytes | None:
        if isinstance(key, bytes):
            return key
        if isinstance(key, str):
            with contextlib.suppress(UnicodeEncodeError):
                encoded = key.encode()
                if self.plain_text or (key.isascii() and encoded == key.encode(*self._codec)):
                    return encoded
            return None  # hiredis sends UTF-8, redis-py's own code what the client is set to
        if isinstance(key, memoryview | bytearray):
            return bytes(key)
        return repr(key).encode() if isinstance(key, int | float) and not isinstance(key, bool) else None

    def field(self, name: object) -> Name | None:
        """A hash's field as the client returns it; None where memory cannot name it."""
        encoded = self._encoded(name)
        if encoded is None or not self.decodes:
            return encoded
        with contextlib.suppress(UnicodeDecodeError):
            return encoded.decode(*self._codec)
        return None

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, args: Args, flights: Flights) -> Steps:
        """A command of kind LOCAL: from memory, or fetched once for all who want it, or plainly."""
        command = str(args[0])
        keys = args[1:] if command in {"MGET", "EXISTS"} else args[1:2]
        names = [name for name in map(self.name, keys) if name is not None]
        if not names or len(names) < len(keys) or not self.serving():
            return (yield from self._ahead(names))
        if command == "MGET":
            return (yield from self._read_many(names))
        many = len(names) > 1
        answer = self._exist(names) if many else self._answer(args, names[0])
        if answer is NOT_HERE and not many:
            answer = yield from self._old(args, names[0])
        if answer is not NOT_HERE:
            return answer
        if many or command in {"STRLEN", "GETRANGE"} or (command == "LRANGE" and args[2:] != (0, -1)):
            return (yield from self._ahead(names))
        return (yield from self._read_one(args, names[0], flights))

    def _ahead(self, names: Sequence[Name]) -> Steps:
        """Plainly. The reply may be newer than what is kept, or is being fetched: so that is forgotten."""
        reply = yield PLAIN
        self.drop(names)
        return reply

    def _old(self, args: Args, name: Name) -> Steps:
        """From an entry that is old, within its grace, or will be soon; it is fetched anew beside that."""
        entry, now = self.cache.entries.get(name), self.now()
        if not self._under or entry is None or not self._old_until < entry.deadline <= now < entry.gone_at:
            return NOT_HERE
        reply = self._answer(args, name, entry)
        if reply is NOT_HERE or not (yield from self._refreshed(args, name, entry.value)):
            return NOT_HERE
        return reply

    def _refreshed(self, args: Args, name: Name, held: Held) -> Generator[Step, Any, bool]:
        """Whether a fetch in the background is under way, or may not be yet: one per key, and some at a time."""
        with self._filing:
            now = self.now()
            for key in [key for key, until in list(self._refreshes.items()) if until <= now]:
                self._refreshes.pop(key, None)
            if self._refreshes.get(name, now) > now or len(self._refreshes) >= REFRESHES_MAX:
                return True
            self._refreshes[name] = now + self.options.wait_seconds
        if (yield Background(self._anew(held.read_by(args, name), name))):
            return True
        self._refreshes.pop(name, None)
        return False

    def _anew(self, command: tuple[Any, ...], name: Name) -> Steps:
        try:
            yield from self._fetch([name], command)
            self._refreshes.pop(name, None)
        except Exception:  # noqa: BLE001  # counted; the old value serves to its end, then the reader sees the error
            self.refreshes_failed += 1
            self._refreshes[name] = self.now() + REFRESH_PAUSE_SECONDS
        except BaseException:
            self._refreshes.pop(name, None)
            raise

    def _forget_old(self, names: Iterable[Name]) -> None:
        """After a reader was given what is newer."""
        entries, now = self.cache.entries, self.now()
        old = [name for name in names if name in entries and entries[name].deadline <= now] if self._under else []
        if old:
            self.cache.drop(old)

    def _read_one(self, args: Args, name: Name, flights: Flights) -> Steps:
        key = (args[0], name, *(self.field(field) for field in args[2:] if args[0] in {"HGET", "HMGET"}))
        while True:
            generation = self.cache.generation(name)
            mine = Flight(generation)
            other = flights.setdefault(key, mine)
            if other is mine or other.generation != generation:
                flights[key] = mine
                return (yield from self._lead(args, name, mine, flights, key))
            if not (yield Wait(other, self.options.wait_seconds)):
                return (yield from self._ahead((name,)))
            if not other.cancelled():  # a leader that was cancelled leaves the lead to whoever comes first
                return _own(other.result())

    def _lead(self, args: Args, name: Name, flight: Flight, flights: Flights, key: tuple[Any, ...]) -> Steps:
        try:
            reply = self._answer(args, name)  # a flight may have landed since we looked
            if reply is NOT_HERE:
                ((reply, kept),) = yield from self._fetch([name], tuple(args))
                if not kept:
                    reply = yield from self._agreed(args, name, reply, flights.get(key), flight)
            flight.set_result(reply)
            return _own(reply)
        except Exception as error:
            flight.set_exception(error)
            raise
        finally:
            if not flight.done():
                flight.cancel()
            if flights.get(key) is flight:
                del flights[key]

    def _agreed(self, args: Args, name: Name, reply: Reply, newer: Flight | None, flight: Flight) -> Steps:
        """What is returned for a reply that could not be kept.

        It was overtaken by a drop, and since then others may have fetched the key. Theirs may be older than ours and be
        served after it: so theirs is returned, it was fetched while we were asked, too.
        """
        if newer is not None and newer is not flight:
            if not (yield Wait(newer, ASK_SECONDS)):
                self.cache.drop((name,))
            elif not newer.cancelled() and newer.exception() is None:
                return newer.result()
        kept = self._answer(args, name)
        return reply if kept is NOT_HERE else kept

    def _read_many(self, names: Sequence[Name]) -> Steps:
        values = {name: self._answer(("GET", name), name) for name in names}
        for name in names if self._under else ():
            if values[name] is NOT_HERE:
                values[name] = yield from self._old(("GET", name), name)
        cold = [name for name, value in values.items() if value is NOT_HERE]
        if cold:
            fetched = yield from self._fetch(cold, ("MGET", *cold))
            values.update((name, value) for name, (value, _) in zip(cold, fetched, strict=True))
        return [values[name] for name in names]

    def _fetch(self, names: Sequence[Name], command: tuple[Any, ...]) -> Generator[Step, Any, list[tuple[Any, bool]]]:
        """The reply (of MGET: one for each name) and whether it is kept. Expiry is asked for in the same round trip."""
        generations = [self.cache.generation(name) for name in names]
        seen = [self.cache.entries.get(name) for name in names]
        tracked = True
        if self.options.mode == "default":  # the server announces what was read over the tracking link
            told = self._ask("EXISTS", *names)
            tracked = (yield Wait(told, ASK_SECONDS)) and told.result() is not None
        started = self.now()
        self.fetches += 1
        *ages, reply = yield Fetch((*(("PTTL", name) for name in names), command))
        if isinstance(reply, Exception):
            raise reply
        replies = reply if command[0] == "MGET" else [reply]
        kept = []
        for name, value, age, generation, old in zip(names, replies, ages, generations, seen, strict=True):
            held = self._held(command, value, age, started) if tracked and isinstance(age, int) else None
            kept.append(held is not None and self._file(name, held, generation, old, self.now() - started))
            if not kept[-1]:
                self._forget_old([name])
        return list(zip(replies, kept, strict=True))

    # -- keeping -------------------------------------------------------------------------------------------------------

    def _held(self, command: Args, reply: Reply, age_ms: int, started: float) -> Held | None:
        """A reply as it is kept; None where reply and age are of different moments, or the key is of another kind."""
        expires = started + age_ms / 1000 if age_ms >= 0 else math.inf
        held = Held(expires, exists=age_ms != KEY_MISSING)
        verb = command[0]
        if not held.exists:
            empty = reply in (None, 0, KEY_MISSING, {}, []) or (
                verb == "HMGET" and not any(item is not None for item in reply)
            )
            return held if empty else None
        if verb in {"GET", "MGET"}:
            held.text = reply
            return held if reply is not None else None
        if verb == "HGETALL":
            held.fields, held.whole = dict(reply), True
            return held if reply else None
        if verb == "LRANGE":
            held.items = tuple(reply)
            return held if reply else None
        if verb in {"HGET", "HMGET"}:
            fields = [self.field(field) for field in command[2:]]
            held.fields = dict(zip(fields, [reply] if verb == "HGET" else reply, strict=True))
            return held if None not in fields else None
        return held if reply not in (0, KEY_MISSING) else None

    def _file(self, name: Name, held: Held, generation: int, seen: Entry | None, took_seconds: float) -> bool:
        if not self.serving():
            return False
        now = self.now()
        with self._filing:
            entry = self.cache.entries.get(name)
            if entry is not None and entry.deadline > now:
                if not held.differs(entry.value):
                    held = held.with_what_was_known(entry.value)
                elif entry is not seen:  # stored while we fetched: which of the two is newer, nobody knows
                    self.cache.drop((name,))
                    return False
            if self._differs_elsewhere(name, held, now):
                self.drop((name,))
                return False
            under = self.under(name) if self._under else PLAIN_UNDER
            negative = under.negative_seconds or self.options.negative_seconds
            ours = min(math.inf if held.exists else negative, self.options.max_age_seconds)
            ends = min(held.expires - now, ours)
            sooner = -took_seconds * under.early * math.log(1.0 - self._chance()) if under.early else 0.0
            age = ends - sooner if ends == ours and sooner < ends else ends  # nobody renews what the server ends
            grace = under.grace_seconds if held.exists else 0.0
            return self.cache.put(
                name,
                held,
                ttl_seconds=age,
                weight_bytes=held.weight_bytes(),
                generation=generation,
                stale_seconds=ends - age + grace,
            )

    def _differs_elsewhere(self, name: Name, held: Held, now: float) -> bool:
        """Whether the same key is kept as bytes where this is text, or the other way round, with another value."""
        others = (self.cache.entries.get(other) for other in self._names(name) if type(other) is not type(name))
        return any(other is not None and other.deadline > now and held.differs(other.value) for other in others)

    # -- answering -----------------------------------------------------------------------------------------------------

    def _answer(self, args: Args, name: Name, old: Entry | None = None) -> Reply:
        entry = old or self.cache.entries.get(name)
        now = self.now()
        if entry is None or (entry.deadline <= now and old is None):
            return NOT_HERE
        length, answer = ANSWERS[str(args[0])]
        reply = answer(self, entry.value, args) if length in {0, len(args)} else NOT_HERE
        if reply is not NOT_HERE:
            entry.touched = now
            entry.hits += 1
        return reply

    def _exist(self, names: Sequence[Name]) -> Reply:
        known = [self._answer(("EXISTS", name), name) for name in names]
        return NOT_HERE if NOT_HERE in known else sum(known)

    # -- writing -------------------------------------------------------------------------------------------------------

    def write(self, effects: Sequence[tuple[Effect, Args]]) -> Steps:
        """Commands that may change keys, sent as one step: forgotten before they are sent and after the reply."""
        keys = [key for effect, args in effects if effect.kind is Kind.KEYS for key in effect.keys(args)]
        kinds = {effect.kind for effect, _ in effects}
        failure: Exception | None = None
        reply = None
        self._forget(keys, kinds)
        try:
            reply = yield PLAIN
        except Exception as error:  # noqa: BLE001  # raised below: what failed may have written
            failure = error
        except BaseException:  # cancelled: no waiting for the link any more
            self._forget(keys, {Kind.ALL} if kinds & {Kind.UNKNOWN, Kind.RELEASE} else kinds)
            raise
        self._forget(keys, kinds)
        if kinds & {Kind.UNKNOWN, Kind.RELEASE}:
            told = self._ask("PING") if self.serving() else None
            if told is None or not (yield Wait(told, ASK_SECONDS)) or told.result() is None:
                self.clear()
            self._old_until = self.now()
        if failure is not None:
            raise failure
        return reply

    def _forget(self, keys: Sequence[object], kinds: set[Kind]) -> None:
        self.drop(keys)
        if Kind.ALL in kinds:
            self.clear()

    def saw(self, commands: Sequence[Args], replies: Reply) -> None:
        """Values that a pipeline read: where memory holds another, the pipeline's is newer or as old."""
        if not isinstance(replies, list) or len(replies) != len(commands):
            return
        for args, reply in zip(commands, replies, strict=True):
            if self._under and len(args) > 1:
                self._forget_old(name for key in args[1:] for name in self._names(key))
            name = self.name(args[1]) if args[0] == "GET" and len(args) == ANSWERS["GET"][0] else None
            if name is None:
                continue
            entry = self.cache.entries.get(name)
            if entry is None or entry.value.text != reply:  # what is being fetched may be older, too
                self.cache.drop((name,))


def _own(reply: Reply) -> Reply:
    """A reply that its reader may change."""
    return reply.copy() if isinstance(reply, list | dict) else reply
