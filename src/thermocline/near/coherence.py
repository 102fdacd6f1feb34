"""What may be served from memory, how a reply is kept, and what a write forgets: once, for threads and for asyncio.

Nothing here does I/O. A command is a generator of `Step`s: the two clients take each step in their own colour and send
back what came of it. One cache entry per Redis key holds all that is known of it (`Held`), so an invalidation is one
removal. Three things together keep it right:

- the *lease*: the tracking link has proved, by a PONG to a PING sent then, that it has told all until then; memory is
  served for `stale_seconds_max` from that moment and no longer, whatever becomes of the link;
- the *generation* (cache.py): what was fetched while its key was dropped is not stored;
- a value that differs from one stored while it was fetched makes the key forgotten: nobody sees a key go backwards.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from thermocline.clock import Clock
from thermocline.errors import SettingsError
from thermocline.near.cache import Cache, Entry
from thermocline.near.commands import Args, Effect, Kind

FIELDS_MAX = 256
"""Fields of a hash that are known one by one; one more starts anew. A hash read whole has no such bound."""
ITEM_BYTES = 120
"""Charged per field of a hash and item of a list, beside its bytes."""
ASK_SECONDS = 0.05
"""How long a command waits for the tracking link; then memory is cleared or left out instead."""
KEY_MISSING = -2
"""What TTL and PTTL say of a key that does not exist."""
Name = bytes | str
"""Under which a key is kept."""
Reply = Any
"""Whatever redis-py returns for a command."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a client keeps values. Raises SettingsError for what cannot be.

    `stale_seconds_max`: nothing older than that is served, even where the link to the server dies silently.
    `mode`: "bcast" has the server announce every change under `prefixes` (all keys where there are none);
    "default" only changes of keys that were read, for large key spaces of which this process reads few.
    With `prefixes` only keys that begin with one of them are kept. `max_age_seconds` and `negative_seconds` (for keys
    that do not exist) bound every entry once more. `wait_seconds`: how long readers of a cold key wait for the first.
    """

    bytes_max: int = 64 << 20
    prefixes: tuple[str, ...] = ()
    mode: str = "bcast"
    stale_seconds_max: float = 1.0
    max_age_seconds: float = 300.0
    negative_seconds: float = 10.0
    wait_seconds: float = 5.0
    policy: str = "adaptive"

    def __post_init__(self) -> None:
        if self.mode not in {"bcast", "default"}:
            raise SettingsError(f"no tracking mode {self.mode!r}", hint='the mode is "bcast" or "default"')
        if any(a != b and a.startswith(b) for a in self.prefixes for b in self.prefixes):
            raise SettingsError("prefixes overlap", hint='give prefixes such as ("session:", "flag:")')
        if min(self.stale_seconds_max, self.max_age_seconds, self.negative_seconds, self.wait_seconds) <= 0:
            raise SettingsError("an age or a wait is not above 0 seconds", hint="give seconds above 0")


@dataclass(frozen=True, slots=True)
class Fetch:
    """Step: these commands in one round trip; the replies come back, errors among them as values."""

    commands: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Step: wait for a future; comes back with whether it is done."""

    future: Future[Any]
    seconds: float


class Plain:
    """Step: the command itself, as it was given, as redis-py does it."""


PLAIN = Plain()
Step = Fetch | Wait | Plain
Steps = Generator[Step, Any, Any]


class Lease:
    """Memory may be served until then, on the cache's clock."""

    __slots__ = ("until",)

    def __init__(self) -> None:
        self.until = -math.inf


class Held:
    """What is known of one key. Never changed once it is stored."""

    __slots__ = ("exists", "expires", "fields", "items", "text", "whole")

    def __init__(self, expires: float, *, exists: bool = True) -> None:
        self.exists = exists
        self.expires = expires
        self.text: Any = None  # a string's value as the client returns it; `get` looks no further
        self.fields: dict[Any, Any] | None = None  # of a hash; None for a field that does not exist
        self.whole = False  # all fields are known
        self.items: tuple[Any, ...] | None = None  # of a list

    def weight_bytes(self) -> int:
        """What it takes in memory, about."""
        pairs = self.fields.items() if self.fields else ()
        weight = _size(self.text) + sum(_size(name) + _size(value) + ITEM_BYTES for name, value in pairs)
        return weight + sum(_size(item) + ITEM_BYTES for item in self.items or ())

    def differs(self, other: Held) -> bool:
        """Whether the two cannot both be what the server holds."""
        if self.exists != other.exists:
            return True
        if any(a is not None and b is not None and a != b for a, b in _pairs(self, other)):
            return True
        kinds = {kind for held in (self, other) for kind, value in held.parts() if value is not None}
        mine, theirs = self.fields or {}, other.fields or {}
        return len(kinds) > 1 or any(mine[name] != theirs[name] for name in mine.keys() & theirs.keys())

    def parts(self) -> tuple[tuple[str, Any], ...]:
        """Its value by the kind of key that has one."""
        return ("text", self.text), ("fields", self.fields), ("items", self.items)

    def with_what_was_known(self, old: Held) -> Held:
        """This, and what an entry that does not differ knew beside it."""
        if self.text is None:
            self.text = old.text
        if self.items is None:
            self.items = old.items
        if old.fields is not None and not self.whole:
            both = {**old.fields, **(self.fields or {})}
            if old.whole or len(both) <= FIELDS_MAX or self.fields is None:
                self.fields, self.whole = both, old.whole
        self.expires = min(self.expires, old.expires)
        return self


def _pairs(a: Held, b: Held) -> tuple[tuple[Any, Any], ...]:
    both_whole = a.whole and b.whole
    return (a.text, b.text), (a.items, b.items), (a.fields, b.fields) if both_whole else (None, None)


def _size(value: object) -> int:
    if isinstance(value, str):
        return len(value) if value.isascii() else 4 * len(value)
    return len(value) if isinstance(value, bytes) else 0


class Flight(Future[Any]):
    """One fetch that others wait for. `generation` is its key's when it began."""

    def __init__(self, generation: int) -> None:
        super().__init__()
        self.generation = generation


Flights = dict[tuple[Any, ...], Flight]
NOT_HERE = object()
"""Memory has no answer."""


class View:
    """The memory of all clients of this process that are set up alike. Any thread.

    `ask` sends a command over the tracking link and gives the future of its reply.
    """

    def __init__(
        self, options: Options, clock: Clock, ask: Callable[..., Future[Any]], *, encoding: str, decodes: bool
    ) -> None:
        self.options = options
        self.cache = Cache(
            options.bytes_max, max_age_seconds=options.max_age_seconds, policy=options.policy, clock=clock
        )
        self.lease = Lease()
        self.flights: Flights = {}
        self.fetches = 0
        self.now = clock.now
        self._ask = ask
        self.encoding = encoding
        self.decodes = decodes
        self._prefixes = tuple(prefix.encode() for prefix in options.prefixes)
        self._filing = threading.Lock()

    # -- names ---------------------------------------------------------------------------------------------------------

    def name(self, key: object) -> Name | None:
        """Where a key is kept: text as text, all else as bytes. None for what may not be kept or is no key."""
        encoded = self._encoded(key)
        if encoded is None or not encoded.startswith(self._prefixes or b""):
            return None
        return key if isinstance(key, str) and self.encoding == "utf-8" else encoded

    def drop(self, keys: Iterable[object]) -> None:
        """Forget keys under every name they may be kept as."""
        names: list[bytes | str] = []
        for key in keys:
            encoded = self._encoded(key)
            if encoded is not None:
                names.append(encoded)
                with contextlib.suppress(UnicodeDecodeError):
                    names.append(encoded.decode())
        if names:
            self.cache.drop(names)

    def clear(self) -> None:
        """Forget everything."""
        self.cache.clear()

    def serving(self) -> bool:
        """Whether memory may be served now."""
        return self.now() < self.lease.until

    def _encoded(self, key: object) -> bytes | None:
        if isinstance(key, bytes):
            return key
        if isinstance(key, str):
            with contextlib.suppress(UnicodeEncodeError):
                return key.encode(self.encoding)
            return None
        if isinstance(key, memoryview | bytearray):
            return bytes(key)
        return repr(key).encode() if isinstance(key, int | float) and not isinstance(key, bool) else None

    def field(self, name: object) -> Name | None:
        """A hash's field as the client returns it; None where memory cannot name it."""
        encoded = self._encoded(name)
        if encoded is None or not self.decodes:
            return encoded
        with contextlib.suppress(UnicodeDecodeError):
            return encoded.decode(self.encoding)
        return None

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, args: Args, flights: Flights) -> Steps:
        """A command of kind LOCAL: from memory, or fetched once for all who want it, or plainly."""
        command = str(args[0])
        keys = args[1:] if command in {"MGET", "EXISTS"} else args[1:2]
        names = [name for name in map(self.name, keys) if name is not None]
        if not names or len(names) < len(keys):
            return (yield PLAIN)
        if not self.serving():
            reply = yield PLAIN
            self.cache.drop(names)
            return reply
        if command == "MGET":
            return (yield from self._read_many(names))
        many = len(names) > 1
        answer = self._exist(names) if many else self._answer(args, names[0])
        if answer is not NOT_HERE:
            return answer
        if many or command in {"STRLEN", "GETRANGE"} or (command == "LRANGE" and args[2:] != (0, -1)):
            return (yield PLAIN)
        return (yield from self._read_one(args, names[0], flights))

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
                reply = yield PLAIN
                self.cache.drop((name,))
                return reply
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
            kept.append(held is not None and self._file(name, held, generation, old))
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

    def _file(self, name: Name, held: Held, generation: int, seen: Entry | None) -> bool:
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
            bound = math.inf if held.exists else self.options.negative_seconds
            return self.cache.put(
                name,
                held,
                ttl_seconds=min(held.expires - now, bound, self.options.max_age_seconds),
                weight_bytes=held.weight_bytes(),
                generation=generation,
            )

    # -- answering -----------------------------------------------------------------------------------------------------

    def _answer(self, args: Args, name: Name) -> Reply:
        entry = self.cache.entries.get(name)
        now = self.now()
        if entry is None or entry.deadline <= now:
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
            name = self.name(args[1]) if args[0] == "GET" and len(args) == ANSWERS["GET"][0] else None
            if name is None:
                continue
            entry = self.cache.entries.get(name)
            if ("GET", name) in self.flights or (entry is not None and entry.value.text != reply):
                self.cache.drop((name,))


def _get(view: View, held: Held, args: Args) -> Reply:
    del view, args
    return held.text if held.text is not None or not held.exists else NOT_HERE


def _exists(view: View, held: Held, args: Args) -> Reply:
    del view, args
    return int(held.exists)


def _characters(view: View, held: Held) -> Reply:
    """A string whose places are those of its bytes."""
    if not held.exists:
        return "" if view.decodes else b""
    plain = isinstance(held.text, bytes) or (isinstance(held.text, str) and held.text.isascii())
    return held.text if plain and view.encoding == "utf-8" else NOT_HERE


def _strlen(view: View, held: Held, args: Args) -> Reply:
    del args
    text = _characters(view, held)
    return text if text is NOT_HERE else len(text)


def _getrange(view: View, held: Held, args: Args) -> Reply:
    text = _characters(view, held)
    return text if text is NOT_HERE else _cut(text, args[2], args[3])


def _hget(view: View, held: Held, args: Args) -> Reply:
    found = _hmget(view, held, args)
    return found if found is NOT_HERE else found[0]


def _hmget(view: View, held: Held, args: Args) -> Reply:
    fields = [view.field(field) for field in args[2:]]
    if not fields or None in fields or (held.exists and held.fields is None):
        return NOT_HERE
    known = held.fields or {}
    if held.exists and not held.whole and not all(field in known for field in fields):
        return NOT_HERE
    return [known.get(field) for field in fields]


def _hgetall(view: View, held: Held, args: Args) -> Reply:
    del view, args
    return dict(held.fields or {}) if held.whole or not held.exists else NOT_HERE


def _lrange(view: View, held: Held, args: Args) -> Reply:
    del view
    if held.exists and held.items is None:
        return NOT_HERE
    cut = _cut(held.items or (), args[2], args[3])
    return cut if cut is NOT_HERE else list(cut)


def _ttl(view: View, held: Held, args: Args) -> Reply:
    if not held.exists:
        return KEY_MISSING
    if held.expires == math.inf:
        return -1
    left_ms = max(0, round((held.expires - view.now()) * 1000))
    return left_ms if args[0] == "PTTL" else (left_ms + 500) // 1000


ANSWERS: dict[str, tuple[int, Callable[[View, Held, Args], Reply]]] = {
    "GET": (2, _get),
    "EXISTS": (2, _exists),
    "STRLEN": (2, _strlen),
    "GETRANGE": (4, _getrange),
    "HGET": (3, _hget),
    "HMGET": (0, _hmget),
    "HGETALL": (2, _hgetall),
    "LRANGE": (4, _lrange),
    "TTL": (2, _ttl),
    "PTTL": (2, _ttl),
}
"""How long a command is that memory may answer (0: any length), and how it does."""


def _own(reply: Reply) -> Reply:
    """A reply that its reader may change."""
    return reply.copy() if isinstance(reply, list | dict) else reply


def _cut(whole: Reply, start: object, end: object) -> Reply:
    """What GETRANGE and LRANGE give for two places, both counted from the end where negative."""
    if type(start) is not int or type(end) is not int:
        return NOT_HERE
    if start < 0 and end < 0 and start > end:
        return whole[:0]
    length, is_text = len(whole), isinstance(whole, bytes | str)
    start = max(0, start + length if start < 0 else start)
    end = end + length if end < 0 else end
    end = max(end, 0) if is_text else end  # GETRANGE's way: its end is never before the first byte
    return whole[start : end + 1] if end >= start else whole[:0]
