"""Commands about the connection, transactions, channels, and the server itself."""

from __future__ import annotations

import hmac
import itertools
from typing import TYPE_CHECKING

from thermocline.errors import CommandError
from thermocline.near.engine_keys import glob
from thermocline.near.engine_table import (
    ALL,
    OK,
    SYNTAX,
    TABLE,
    Command,
    Reply,
    command,
    integer,
    options,
    wrong_number,
)
from thermocline.near.engine_tracking import Following

if TYPE_CHECKING:
    from thermocline.near.engine import Engine, Session

Words = list[bytes]
SPEAKS_VERSION = "7.0.0"
"""The release of Redis whose commands these are: clients choose by it what they may send."""
WRONG_PASSWORD = "WRONGPASS invalid username-password pair or user is disabled."  # noqa: S105  # a reply
UNPROTECTED = "ERR AUTH <password> called without any password configured for the default user."
SUBSCRIPTIONS_MAX, PREFIXES_MAX, WATCHED_MAX = 10_000, 100, 100_000
TEXT_BYTES_MAX = 512
"""Of a client's name, a prefix, a channel."""


def forget(engine: Engine, session: Session) -> None:
    """Nothing is owed to this session any more."""
    engine.followers.leave(session)
    _unwatch(engine, session)
    session.queue = None
    for name in session.channels:
        _discard(engine.subscribers, name, session)
    session.channels = {}


def _discard(table: dict[bytes, set[Session]], name: bytes, session: Session) -> None:
    table[name].discard(session)
    if not table[name]:
        del table[name]


def _short(text: bytes) -> bytes:
    if len(text) > TEXT_BYTES_MAX:
        raise CommandError("ERR this name is too long", hint=f"it may have {TEXT_BYTES_MAX} bytes")
    return text


# -- connection --------------------------------------------------------------------------------------------------------


@command("ping", -1, of_session=True)
def _ping(_: Engine, session: Session, words: Words) -> Reply:
    if len(words) > 2:  # noqa: PLR2004  # a word and a text
        raise wrong_number("ping")
    if session.listens:
        return [b"pong", words[1] if len(words) > 1 else b""]
    return words[1] if len(words) > 1 else "PONG"


@command("echo", 2, of_session=True)
def _echo(_: Engine, __: Session, words: Words) -> Reply:
    return words[1]


@command("quit", -1, of_session=True)
def _quit(_: Engine, session: Session, __: Words) -> Reply:
    session.closing = True
    return OK


@command("post host:", -1, of_session=True)
def _not_http(_: Engine, session: Session, __: Words) -> Reply:
    """A browser that was tricked into talking to a local port."""
    session.closing = True
    raise CommandError("ERR this is no HTTP server")


@command("select", 2, of_session=True)
def _select(_: Engine, __: Session, words: Words) -> Reply:
    if integer(words[1], "ERR invalid DB index"):
        raise CommandError("ERR DB index is out of range")
    return OK


@command("auth", -2, of_session=True)
def _auth(engine: Engine, session: Session, words: Words) -> Reply:
    if len(words) > 3:  # noqa: PLR2004  # user and password
        raise CommandError(SYNTAX)
    if engine.password is None and len(words) == 2:  # noqa: PLR2004  # a password alone
        raise CommandError(UNPROTECTED)
    _let_in(engine, session, words[1] if len(words) > 2 else b"default", words[-1])  # noqa: PLR2004  # as above
    return OK


def _let_in(engine: Engine, session: Session, user: bytes, password: bytes) -> None:
    """As long for a wrong password as for the right one. Without a password the default user needs none."""
    good = engine.password is None or hmac.compare_digest(engine.password, password)
    if not good or user != b"default":
        raise CommandError(WRONG_PASSWORD)
    session.authenticated = True


@command("hello", -1, of_session=True)
def _hello(engine: Engine, session: Session, words: Words) -> Reply:
    protocol = session.protocol
    if len(words) > 1:
        protocol = integer(words[1], "ERR Protocol version is not an integer or out of range")
        if protocol not in {2, 3}:
            raise CommandError("NOPROTO unsupported protocol version")
    found = options(words[2:], {"AUTH": 2, "SETNAME": 1})
    if "AUTH" in found:
        _let_in(engine, session, found["AUTH"][0], found["AUTH"][1])
    if not session.authenticated:
        raise CommandError("NOAUTH HELLO must be called with the client already authenticated, or with AUTH")
    session.protocol = engine.keys.protocol = protocol
    facts: dict[bytes, Reply] = {b"server": b"redis", b"version": SPEAKS_VERSION.encode(), b"proto": protocol}
    return facts | {b"id": session.id, b"mode": b"standalone", b"role": b"master", b"modules": []}


# -- CLIENT ------------------------------------------------------------------------------------------------------------


@command("client|setname", 3, of_session=True)
@command("client|setinfo", 4, of_session=True)
def _client_is(_: Engine, __: Session, ___: Words) -> Reply:
    """Nobody lists clients here: who they are is not kept."""
    return OK


@command("client|tracking", -3, of_session=True)
def _client_tracking(engine: Engine, session: Session, words: Words) -> Reply:
    state, *rest = words[2:]
    prefixes, others, left = [], [], iter(rest)
    for word in left:
        if word.upper() == b"PREFIX":
            prefixes.append(_short(next(left, b"")))
        else:
            others.append(word)
    if len(prefixes) > PREFIXES_MAX:
        raise CommandError("ERR too many prefixes", hint=f"there may be {PREFIXES_MAX}")
    found = options(others, {"BCAST": 0, "NOLOOP": 0})
    if state.upper() not in {b"ON", b"OFF"}:
        raise CommandError(SYNTAX)
    if state.upper() == b"OFF":
        engine.followers.leave(session)
        return OK
    how = Following("BCAST" in found, tuple(prefixes), "NOLOOP" not in found)
    _check_tracking(session.following, how)
    if session.following is not None and how.broadcast:
        how = Following(True, (*session.following.prefixes, *how.prefixes), how.own_too)  # noqa: FBT003  # broadcast
    engine.followers.follow(session, how)
    return OK


def _check_tracking(old: Following | None, how: Following) -> None:
    if how.prefixes and not how.broadcast:
        raise CommandError("ERR PREFIX option requires BCAST mode to be enabled")
    if old is not None and old.broadcast != how.broadcast:
        raise CommandError("ERR You can't switch BCAST mode on/off before disabling tracking for this client")
    told = (*how.prefixes, *(old.prefixes if old is not None else ()))
    if any(a.startswith(b) or b.startswith(a) for a, b in itertools.combinations(told, 2)):
        raise CommandError("ERR Prefixes for a single client must not overlap.")


# -- transactions ------------------------------------------------------------------------------------------------------


@command("multi", 1, of_session=True)
def _multi(_: Engine, session: Session, __: Words) -> Reply:
    if session.queue is not None:
        raise CommandError("ERR MULTI calls can not be nested")
    session.queue, session.queue_spoilt, session.queued_bytes = [], False, 0
    return OK


@command("exec", 1, of_session=True)
def _exec(engine: Engine, session: Session, _: Words) -> Reply:
    queue, spoilt, stale = session.queue, session.queue_spoilt, session.stale
    if queue is None:
        raise CommandError("ERR EXEC without MULTI")
    _leave_multi(engine, session)
    if spoilt:
        raise CommandError("EXECABORT Transaction discarded because of previous errors.")
    if stale:
        return ()
    return [_ran(engine, session, *each) for each in queue]


def _ran(engine: Engine, session: Session, each: Command, words: Words) -> Reply:
    try:
        return engine.run(session, each, words)
    except CommandError as error:
        return error


@command("discard", 1, of_session=True)
def _discard_all(engine: Engine, session: Session, _: Words) -> Reply:
    if session.queue is None:
        raise CommandError("ERR DISCARD without MULTI")
    _leave_multi(engine, session)
    return OK


def _leave_multi(engine: Engine, session: Session) -> None:
    session.queue = None
    session.queued_bytes = 0
    _unwatch(engine, session)


@command("watch", -2, ALL, of_session=True)
def _watch(engine: Engine, session: Session, words: Words) -> Reply:
    if session.queue is not None:
        raise CommandError("ERR WATCH inside MULTI is not allowed")
    watched = session.watched = session.watched or {}
    for key in words[1:]:
        watched[key] = None
        engine.watchers.setdefault(key, set()).add(session)
    if len(watched) > WATCHED_MAX:
        _unwatch(engine, session)
        raise CommandError("ERR too many keys are watched", hint=f"there may be {WATCHED_MAX}")
    return OK


@command("unwatch", 1, of_session=True)
def _unwatch_all(engine: Engine, session: Session, _: Words) -> Reply:
    if session.queue is not None:
        session.queue.append((TABLE[b"UNWATCH"], [b"UNWATCH"]))
        return "QUEUED"
    _unwatch(engine, session)
    return OK


def _unwatch(engine: Engine, session: Session) -> None:
    for key in session.watched or ():
        _discard(engine.watchers, key, session)
    session.watched, session.stale = None, False


# -- channels ----------------------------------------------------------------------------------------------------------


@command("subscribe", -2, of_session=True)
def _subscribe(engine: Engine, session: Session, words: Words) -> Reply:
    if len(session.channels) + len(words) > SUBSCRIPTIONS_MAX:
        raise CommandError("ERR too many channels", hint=f"there may be {SUBSCRIPTIONS_MAX}")
    said: list[tuple[Reply, ...]] = []
    for name in map(_short, words[1:]):
        session.channels[name] = None
        engine.subscribers.setdefault(name, set()).add(session)
        said.append((b"subscribe", name, len(session.channels)))
    return _first_of(session, said)


@command("unsubscribe", -1, of_session=True)
def _unsubscribe(engine: Engine, session: Session, words: Words) -> Reply:
    said: list[tuple[Reply, ...]] = []
    for name in words[1:] or list(session.channels):
        if session.channels.pop(name, name) is None:
            _discard(engine.subscribers, name, session)
        said.append((b"unsubscribe", name, len(session.channels)))
    return _first_of(session, said or [(b"unsubscribe", None, 0)])


def _first_of(session: Session, said: list[tuple[Reply, ...]]) -> Reply:
    """One is the reply; the others follow it."""
    for message in said[1:]:
        session.push(message)
    return said[0]


@command("publish", 3, of_session=True)
def _publish(engine: Engine, _: Session, words: Words) -> Reply:
    listeners = tuple(engine.subscribers.get(words[1], ()))
    for session in listeners:
        session.push((b"message", words[1], words[2]))
    return len(listeners)


# -- the server --------------------------------------------------------------------------------------------------------


@command("info", -1, of_session=True)
def _info(engine: Engine, _: Session, __: Words) -> Reply:
    """All sections, whichever are asked for."""
    keys = engine.keys
    up = int(keys.clock.seconds - engine.started)
    parts: dict[str, dict[str, object]] = {
        "Server": {"redis_version": SPEAKS_VERSION, "server_name": "thermocline", "uptime_in_seconds": up},
        "Clients": {"connected_clients": len(engine.sessions)},
        "Memory": {"used_memory": keys.cache.nbytes, "maxmemory": engine.bytes_max, "maxmemory_policy": "adaptive"},
        "Persistence": {"loading": 0},
        "Stats": {"total_commands_processed": engine.commands, "evicted_keys": keys.cache.stats().evicted},
        "Replication": {"role": "master", "connected_slaves": 0},
        "Keyspace": {"db0": f"keys={len(keys)},expires=0,avg_ttl=0"} if len(keys) else {},
    }
    lines = [line for name, part in parts.items() for line in (f"# {name}", *(f"{k}:{v}" for k, v in part.items()), "")]
    return "\r\n".join(lines).encode()


@command("config|get", -3, of_session=True)
def _config_get(engine: Engine, _: Session, words: Words) -> Reply:
    """What redis-benchmark asks for, and how much memory there is."""
    present = {b"save": b"", b"appendonly": b"no", b"maxmemory": b"%d" % engine.bytes_max}
    return {name: value for name, value in present.items() if any(glob(w.lower()).fullmatch(name) for w in words[2:])}


@command("command", -1, of_session=True)
def _command(_: Engine, __: Session, words: Words) -> Reply:
    """COUNT, LIST and DOCS: what redis-cli asks for."""
    which = words[1].upper() if len(words) > 1 else b""
    listed = [name.lower() for name in TABLE if b"|" not in name and name not in {b"POST", b"HOST:"}]
    answers: dict[bytes, Reply] = {b"COUNT": len(listed), b"LIST": listed, b"DOCS": {}}
    if which not in answers:
        raise CommandError("ERR only COMMAND COUNT, LIST and DOCS are offered here")
    return answers[which]
