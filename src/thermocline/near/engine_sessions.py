"""Commands about the connection, transactions, channels, and the server itself."""

from __future__ import annotations

import hmac
import itertools
from typing import TYPE_CHECKING

from thermocline.errors import CommandError
from thermocline.near.engine_keys import glob
from thermocline.near.engine_table import (
    OK,
    SYNTAX,
    TABLE,
    Command,
    Reply,
    command,
    integer,
    options,
    parents,
)
from thermocline.near.engine_tracking import Following

if TYPE_CHECKING:
    from thermocline.near.engine import Engine, Session

Words = list[bytes]
SPEAKS_VERSION = "7.0.0"
"""The release of Redis whose commands these are: clients choose by it what they may send."""
WRONG_PASSWORD = "WRONGPASS invalid username-password pair or user is disabled."  # noqa: S105  # a reply
UNPROTECTED = (
    "ERR AUTH <password> called without any password configured for the default user. Are you sure your "
    "configuration is correct?"
)
SUBSCRIPTIONS_MAX, PREFIXES_MAX, WATCHED_MAX = 10_000, 100, 100_000
TEXT_BYTES_MAX = 512
"""Of a client's name, a prefix, a channel."""
SETTABLE = {"timeout": "0", "slowlog-log-slower-than": "10000", "save": "", "appendonly": "no"}
"""What tools ask for, and set: only to what it is."""


def forget(engine: Engine, session: Session) -> None:
    """Nothing is owed to this session any more."""
    engine.followers.leave(session)
    _unwatch(engine, session)
    session.queue = None
    for table, names in ((engine.subscribers, session.channels), (engine.pattern_subscribers, session.patterns)):
        for name in names or ():
            _discard(table, name, session)
    session.channels = session.patterns = None


def _discard(table: dict[bytes, set[Session]], name: bytes, session: Session) -> None:
    table[name].discard(session)
    if not table[name]:
        del table[name]


def _short(text: bytes) -> bytes:
    if len(text) > TEXT_BYTES_MAX:
        raise CommandError("ERR this name is too long", hint=f"it may have {TEXT_BYTES_MAX} bytes")
    return text


# -- connection --------------------------------------------------------------------------------------------------------


@command("ping", -1, "fast", of_session=True)
def _ping(_: Engine, session: Session, words: Words) -> Reply:
    if len(words) > 2:  # noqa: PLR2004  # a word and a text
        raise CommandError("ERR wrong number of arguments for 'ping' command")
    if session.protocol < 3 and session.subscriptions:  # noqa: PLR2004  # RESP3 answers as always
        return [b"pong", words[1] if len(words) > 1 else b""]
    return words[1] if len(words) > 1 else "PONG"


@command("echo", 2, "fast", of_session=True)
def _echo(_: Engine, __: Session, words: Words) -> Reply:
    return words[1]


@command("quit", -1, "fast", of_session=True)
def _quit(_: Engine, session: Session, __: Words) -> Reply:
    session.closing = True
    return OK


@command("post", -1, of_session=True)
@command("host:", -1, of_session=True)
def _not_http(_: Engine, session: Session, __: Words) -> Reply:
    """A browser that was tricked into talking to a local port."""
    session.closing = True
    raise CommandError("ERR this is no HTTP server")


@command("select", 2, "fast", of_session=True)
def _select(_: Engine, __: Session, words: Words) -> Reply:
    if integer(words[1], "ERR invalid DB index"):
        raise CommandError("ERR DB index is out of range")
    return OK


@command("auth", -2, "fast", of_session=True)
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
    session.settle()


@command("hello", -1, "fast", of_session=True)
def _hello(engine: Engine, session: Session, words: Words) -> Reply:
    protocol = session.protocol
    if len(words) > 1:
        protocol = integer(words[1], "ERR Protocol version is not an integer or out of range")
        if protocol not in {2, 3}:
            raise CommandError("NOPROTO unsupported protocol version")
    try:
        found = options(words[2:], {"AUTH": 2, "SETNAME": 1})
    except CommandError:
        raise CommandError(f"ERR Syntax error in HELLO option '{words[2].decode(errors='replace')}'") from None
    if "AUTH" in found:
        _let_in(engine, session, found["AUTH"][0], found["AUTH"][1])
    if not session.authenticated:
        raise CommandError(
            "NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH "
            "<user> <pass> option can be used to authenticate the client and select the RESP protocol version at the "
            "same time"
        )
    if "SETNAME" in found:
        session.name = _named(found["SETNAME"][0])
    session.protocol = engine.keys.protocol = protocol
    session.settle()
    facts: dict[bytes, Reply] = {b"server": b"redis", b"version": SPEAKS_VERSION.encode(), b"proto": protocol}
    return facts | {b"id": session.id, b"mode": b"standalone", b"role": b"master", b"modules": []}


def _named(name: bytes) -> bytes:
    if any(byte < ord("!") or byte > ord("~") for byte in name):
        raise CommandError("ERR Client names cannot contain spaces, newlines or special characters.")
    return _short(name)


@command("reset", 1, "fast", of_session=True)
def _reset(engine: Engine, session: Session, _: Words) -> Reply:
    forget(engine, session)
    session.name, session.protocol, session.authenticated, session.answers = b"", 2, engine.password is None, "ON"
    session.settle()
    return "RESET"


# -- CLIENT ------------------------------------------------------------------------------------------------------------

parents("client", "config")


@command("client|id", 2, of_session=True)
def _client_id(_: Engine, session: Session, __: Words) -> Reply:
    return session.id


@command("client|getname", 2, of_session=True)
def _client_getname(_: Engine, session: Session, __: Words) -> Reply:
    return session.name or None


@command("client|setname", 3, of_session=True)
def _client_setname(_: Engine, session: Session, words: Words) -> Reply:
    session.name = _named(words[2])
    return OK


@command("client|setinfo", 4, of_session=True)
def _client_setinfo(_: Engine, session: Session, words: Words) -> Reply:
    which, value = words[2].upper(), _named(words[3])
    if which not in {b"LIB-NAME", b"LIB-VER"}:
        raise CommandError(f"ERR Unrecognized option '{_short(words[2]).decode(errors='replace')}'")
    name, version = session.library
    session.library = (value, version) if which == b"LIB-NAME" else (name, value)
    return OK


@command("client|info", 2, of_session=True)
def _client_info(engine: Engine, session: Session, __: Words) -> Reply:
    return _described(engine, session)


@command("client|list", -2, of_session=True)
def _client_list(engine: Engine, _: Session, words: Words) -> Reply:
    wanted = {integer(word) for word in words[3:]} if words[2:3] and words[2].upper() == b"ID" else None
    if len(words) > 2 and not wanted:  # noqa: PLR2004  # other filters
        options(words[2:], {"TYPE": 1})
    chosen = [session for session in engine.sessions.values() if wanted is None or session.id in wanted]
    return b"".join(_described(engine, session) for session in chosen)


def _described(engine: Engine, session: Session) -> bytes:
    now = engine.keys.clock.seconds
    facts = {
        "id": session.id,
        "addr": session.address,
        "name": session.name.decode("latin-1"),
        "age": int(now - session.since),
        "idle": int(now - session.last_at),
        "flags": "".join(("t" if session.following else "", "P" if session.subscriptions else "")) or "N",
        "db": 0,
        "sub": len(session.channels or ()),
        "psub": len(session.patterns or ()),
        "multi": -1 if session.queue is None else len(session.queue),
        "cmd": session.last_command or "NULL",
        "user": "default",
        "resp": session.protocol,
        "lib-name": session.library[0].decode("latin-1"),
        "lib-ver": session.library[1].decode("latin-1"),
    }
    return " ".join(f"{name}={value}" for name, value in facts.items()).encode() + b"\n"


@command("client|kill", -3, of_session=True)
def _client_kill(engine: Engine, session: Session, words: Words) -> Reply:
    old_way = len(words) == 3  # noqa: PLR2004  # CLIENT KILL addr
    given = {"ADDR": [words[2]]} if old_way else options(words[2:], dict.fromkeys(("ID", "ADDR", "USER", "SKIPME"), 1))
    wanted = {name: value[0] for name, value in given.items()}
    skips_me = wanted.get("SKIPME", b"no" if old_way else b"yes").lower() != b"no"
    number = integer(wanted["ID"], "ERR client-id should be greater than 0") if "ID" in wanted else None
    count = 0
    for other in tuple(engine.sessions.values()):
        fits = number in {None, other.id} and wanted.get("ADDR", other.address.encode()) == other.address.encode()
        if fits and wanted.get("USER", b"default") == b"default" and not (skips_me and other is session):
            other.closing = True
            other.wake()
            count += 1
    if not old_way:
        return count
    if not count:
        raise CommandError("ERR No such client")
    return OK


@command("client|no-evict", 3, of_session=True)
@command("client|no-touch", 3, of_session=True)
def _client_on_off(_: Engine, __: Session, words: Words) -> Reply:
    """No client is evicted here; nothing has to be done."""
    if words[2].upper() not in {b"ON", b"OFF"}:
        raise CommandError(SYNTAX)
    return OK


@command("client|reply", 3, of_session=True)
def _client_reply(_: Engine, session: Session, words: Words) -> Reply:
    how = words[2].upper().decode("latin-1")
    if how not in {"ON", "OFF", "SKIP"}:
        raise CommandError(SYNTAX)
    if how != "SKIP" or session.answers == "ON":
        session.answers = "SKIPPING" if how == "SKIP" else how
    session.settle()
    return OK


@command("client|tracking", -3, of_session=True)
def _client_tracking(engine: Engine, session: Session, words: Words) -> Reply:
    state, *rest = words[2:]
    prefixes: list[bytes] = []
    while b"PREFIX" in [word.upper() for word in rest[:-1]]:
        at = [word.upper() for word in rest].index(b"PREFIX")
        prefixes.append(_short(rest[at + 1]))
        del rest[at : at + 2]
        if len(prefixes) > PREFIXES_MAX:
            raise CommandError("ERR too many prefixes", hint=f"there may be {PREFIXES_MAX}")
    found = options(rest, {"BCAST": 0, "NOLOOP": 0, "OPTIN": 0, "OPTOUT": 0, "REDIRECT": 1})
    if "REDIRECT" in found:
        raise CommandError("ERR REDIRECT is not offered here", hint="say HELLO 3 and be told on this connection")
    if state.upper() not in {b"ON", b"OFF"}:
        raise CommandError(SYNTAX)
    if state.upper() == b"OFF":
        engine.followers.leave(session)
        return OK
    how = Following("BCAST" in found, tuple(prefixes), "NOLOOP" not in found, _choice(found))
    _check_tracking(session.following, how)
    if session.following is not None and how.broadcast:
        how = Following(True, (*session.following.prefixes, *how.prefixes), how.own_too, how.choice)  # noqa: FBT003  # broadcast
    engine.followers.follow(session, how)
    return OK


def _choice(found: dict[str, list[bytes]]) -> str:
    if {"OPTIN", "OPTOUT"} <= found.keys():
        raise CommandError("ERR You can't specify both OPTIN mode and OPTOUT mode")
    return "OPTIN" if "OPTIN" in found else "OPTOUT" if "OPTOUT" in found else ""


def _check_tracking(old: Following | None, how: Following) -> None:
    if how.prefixes and not how.broadcast:
        raise CommandError("ERR PREFIX option requires BCAST mode to be enabled")
    if how.broadcast and how.choice:
        raise CommandError("ERR OPTIN and OPTOUT are not compatible with BCAST")
    if old is not None and (old.broadcast, old.choice) != (how.broadcast, how.choice):
        what = "BCAST mode on/off" if old.broadcast != how.broadcast else "OPTIN/OPTOUT mode"
        raise CommandError(
            f"ERR You can't switch {what} before disabling tracking for this client, and then re-enabling it with a "
            "different mode."
        )
    existing = old.prefixes if old is not None else ()
    pairs = [(new, held, "an existing") for new in how.prefixes for held in existing]
    pairs += [(one, other, "another provided") for one, other in itertools.combinations(how.prefixes, 2)]
    for one, other, which in pairs:
        if one.startswith(other) or other.startswith(one):
            a, b = one.decode(errors="replace"), other.decode(errors="replace")
            raise CommandError(
                f"ERR Prefix '{a}' overlaps with {which} prefix '{b}'. Prefixes for a single client must not overlap."
            )


@command("client|caching", 3, of_session=True)
def _client_caching(_: Engine, session: Session, words: Words) -> Reply:
    choice = session.following.choice if session.following else ""
    if session.following is None:
        raise CommandError(
            "ERR CLIENT CACHING can be called only when the client is in tracking mode with OPTIN or OPTOUT mode "
            "enabled"
        )
    says = words[2].upper()
    if says not in {b"YES", b"NO"}:
        raise CommandError(SYNTAX)
    wanted = "OPTIN" if says == b"YES" else "OPTOUT"
    if choice != wanted:
        raise CommandError(
            f"ERR CLIENT CACHING {says.decode()} is only valid when tracking is enabled in {wanted} mode."
        )
    session.caching = says == b"YES"
    return OK


@command("client|getredir", 2, of_session=True)
def _client_getredir(_: Engine, session: Session, __: Words) -> Reply:
    return -1 if session.following is None else 0


# -- transactions ------------------------------------------------------------------------------------------------------


@command("multi", 1, "fast", of_session=True)
def _multi(_: Engine, session: Session, __: Words) -> Reply:
    if session.queue is not None:
        raise CommandError("ERR MULTI calls can not be nested")
    session.queue, session.queue_spoilt, session.queued_bytes = [], False, 0
    session.settle()
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
    caching = session.caching
    try:
        return engine.run(session, each, words)
    except CommandError as error:
        return error
    finally:
        session.caching = caching if each.name != "client|caching" else session.caching


@command("discard", 1, "fast", of_session=True)
def _discard_all(engine: Engine, session: Session, _: Words) -> Reply:
    if session.queue is None:
        raise CommandError("ERR DISCARD without MULTI")
    _leave_multi(engine, session)
    return OK


def _leave_multi(engine: Engine, session: Session) -> None:
    session.queue = None
    session.queued_bytes = 0
    _unwatch(engine, session)
    session.settle()


@command("watch", -2, "fast", (1, -1, 1), of_session=True)
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


@command("unwatch", 1, "fast", of_session=True)
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
    session.channels = session.channels or {}
    return _joined(session, b"subscribe", words[1:], session.channels, engine.subscribers)


@command("psubscribe", -2, of_session=True)
def _psubscribe(engine: Engine, session: Session, words: Words) -> Reply:
    session.patterns = session.patterns or {}
    for pattern in words[1:]:
        glob(pattern)
    return _joined(session, b"psubscribe", words[1:], session.patterns, engine.pattern_subscribers)


def _joined(
    session: Session, word: bytes, names: Words, mine: dict[bytes, None], table: dict[bytes, set[Session]]
) -> Reply:
    if session.subscriptions + len(names) > SUBSCRIPTIONS_MAX:
        raise CommandError("ERR too many channels", hint=f"there may be {SUBSCRIPTIONS_MAX}")
    said: list[tuple[Reply, ...]] = []
    for name in map(_short, names):
        mine[name] = None
        table.setdefault(name, set()).add(session)
        said.append((word, name, session.subscriptions))
    return _first_of(session, said)


@command("unsubscribe", -1, of_session=True)
def _unsubscribe(engine: Engine, session: Session, words: Words) -> Reply:
    return _left(session, b"unsubscribe", words[1:], session.channels or {}, engine.subscribers)


@command("punsubscribe", -1, of_session=True)
def _punsubscribe(engine: Engine, session: Session, words: Words) -> Reply:
    return _left(session, b"punsubscribe", words[1:], session.patterns or {}, engine.pattern_subscribers)


def _left(
    session: Session, word: bytes, names: Words, mine: dict[bytes, None], table: dict[bytes, set[Session]]
) -> Reply:
    said: list[tuple[Reply, ...]] = []
    for name in names or list(mine):
        if mine.pop(name, name) is None:
            _discard(table, name, session)
        said.append((word, name, session.subscriptions))
    return _first_of(session, said or [(word, None, session.subscriptions)])


def _first_of(session: Session, said: list[tuple[Reply, ...]]) -> Reply:
    """One is the reply; the others follow it."""
    session.settle()
    for message in said[1:]:
        session.push(message)
    return said[0]


@command("publish", 3, "fast", of_session=True)
def _publish(engine: Engine, _: Session, words: Words) -> Reply:
    channel, message = words[1], words[2]
    count = 0
    for session in tuple(engine.subscribers.get(channel, ())):
        session.push((b"message", channel, message))
        count += 1
    for pattern, sessions in tuple(engine.pattern_subscribers.items()):
        for session in tuple(sessions) if glob(pattern).fullmatch(channel) else ():
            session.push((b"pmessage", pattern, channel, message))
            count += 1
    return count


# -- the server --------------------------------------------------------------------------------------------------------


@command("time", 1, "fast", of_session=True)
def _time(engine: Engine, _: Session, __: Words) -> Reply:
    microseconds = int(engine.clock.wall() * 1e6)
    return [b"%d" % (microseconds // 1_000_000), b"%d" % (microseconds % 1_000_000)]


@command("info", -1, of_session=True)
def _info(engine: Engine, _: Session, words: Words) -> Reply:
    asked = {word.lower().decode("latin-1") for word in words[1:]}
    parts: dict[str, dict[str, object]] = {
        "server": {
            "redis_version": SPEAKS_VERSION,
            "redis_mode": "standalone",
            "server_name": "thermocline",
            "uptime_in_seconds": int(engine.keys.clock.seconds - engine.started),
        },
        "clients": {"connected_clients": len(engine.sessions)},
        "memory": {
            "used_memory": engine.keys.cache.nbytes,
            "maxmemory": engine.bytes_max,
            "maxmemory_policy": _settings(engine)["maxmemory-policy"],
        },
        "persistence": {"loading": 0},
        "stats": {"total_commands_processed": engine.commands, "evicted_keys": engine.keys.cache.stats().evicted},
        "replication": {"role": "master", "connected_slaves": 0},
        "keyspace": {"db0": f"keys={len(engine.keys)},expires=0,avg_ttl=0"} if len(engine.keys) else {},
    }
    everything = not asked or asked & {"all", "default", "everything"}
    texts = [_section(name, part) for name, part in parts.items() if everything or name in asked]
    return "\r\n".join(texts).encode()


def _section(name: str, part: dict[str, object]) -> str:
    return "".join([f"# {name.capitalize()}\r\n", *(f"{key}:{value}\r\n" for key, value in part.items())])


def _settings(engine: Engine) -> dict[str, str]:
    fixed = {
        "databases": "1",
        "maxmemory": str(engine.bytes_max),
        "maxmemory-policy": "adaptive",
        "proto-max-bulk-len": str(engine.keys.value_bytes_max),
    }
    return SETTABLE | fixed


@command("config|get", -3, of_session=True)
def _config_get(engine: Engine, _: Session, words: Words) -> Reply:
    wanted = [glob(word.lower()) for word in words[2:]]
    items = _settings(engine).items()
    return {k.encode(): v.encode() for k, v in items if any(each.fullmatch(k.encode()) for each in wanted)}


@command("config|set", -4, of_session=True)
def _config_set(engine: Engine, _: Session, words: Words) -> Reply:
    present = _settings(engine)
    for name, value in zip(words[2::2], words[3::2], strict=False):
        key = name.lower().decode("latin-1")
        if len(words) % 2 or present.get(key) != value.decode("latin-1"):
            raise CommandError(
                f"ERR Unknown option or number of arguments for CONFIG SET - '{_short(name).decode(errors='replace')}'",
                hint="settings are given to `thermocline near serve` when it starts",
            )
    return OK


@command("config|resetstat", 2, of_session=True)
def _config_resetstat(_: Engine, __: Session, ___: Words) -> Reply:
    return OK


@command("command", -1, of_session=True)
def _command(_: Engine, __: Session, words: Words) -> Reply:
    """Also its subcommands INFO, COUNT, LIST and DOCS."""
    which = words[1].upper() if len(words) > 1 else b"INFO"
    listed = [each for each in TABLE.values() if "|" not in each.name and each.name not in {"post", "host:"}]
    if which == b"COUNT":
        return len(listed)
    if which == b"LIST":
        return [each.name.encode() for each in listed]
    if which == b"DOCS":
        return {}
    if which != b"INFO":
        raise CommandError(f"ERR unknown subcommand '{_short(words[1]).decode(errors='replace')}'. Try COMMAND HELP.")
    if len(words) <= 2:  # noqa: PLR2004  # COMMAND INFO
        return [_row(each) for each in listed]
    return [_row(TABLE[name.upper()]) if name.upper() in TABLE else None for name in words[2:]]


def _row(each: Command) -> Reply:
    row: list[Reply] = [each.name.encode(), each.arity, list(each.flags), *each.keys, [], [], [], []]
    return row
