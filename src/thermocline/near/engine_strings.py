"""Commands on strings and on keys of any kind, worded and replying as in Redis 7."""

from __future__ import annotations

import math

from thermocline.errors import CommandError
from thermocline.near.engine_keys import Keyspace, glob
from thermocline.near.engine_table import (
    ALL,
    FIRST,
    NOT_AN_INTEGER,
    OK,
    PAIRS,
    SYNTAX,
    Reply,
    command,
    exclusive,
    integer,
    options,
    reading,
    wrong_number,
)

MILLISECONDS_MAX = 1 << 63
ENDS = {"EX": 1000, "PX": 1}
"""Options that say when a key ends: milliseconds of their unit."""
COUNT_DEFAULT = 10


def _moment(keys: Keyspace, text: bytes, unit: int, name: str, *, least: int = -MILLISECONDS_MAX) -> float:
    """When a key ends, in seconds since 1970. Raises CommandError for a time that cannot be."""
    count = integer(text)
    milliseconds = count * unit + round(keys.clock.seconds * 1000)
    if count < least or abs(milliseconds) >= MILLISECONDS_MAX:
        raise CommandError(f"ERR invalid expire time in '{name}' command")
    return milliseconds / 1000


def _deadline(keys: Keyspace, found: dict[str, list[bytes]], name: str) -> float | None:
    """When a key ends by one of ENDS, which want no time that has passed."""
    given = exclusive(found, *ENDS, "PERSIST", "KEEPTTL")
    return None if given not in ENDS else _moment(keys, found[given][0], ENDS[given], name, least=1)


# -- strings -----------------------------------------------------------------------------------------------------------

reading(
    {
        "get": (2, lambda keys, words: keys.find(words[1], bytes)),
        "strlen": (2, lambda keys, words: len(keys.find(words[1], bytes) or b"")),
        "type": (2, lambda keys, words: _kind(keys, words[1])),
    }
)


@command("set", -3, FIRST)
def _set(keys: Keyspace, words: list[bytes]) -> Reply:
    key = words[1]
    if len(words) == 3:  # noqa: PLR2004  # the usual one
        keys.keep(key, words[2])
        return OK
    found = options(words[3:], {"NX": 0, "XX": 0, "GET": 0, "KEEPTTL": 0} | dict.fromkeys(ENDS, 1))
    condition = exclusive(found, "NX", "XX")
    deadline = _deadline(keys, found, "set")
    old = keys.find(key, bytes) if "GET" in found else keys.any(key)
    refused = condition is not None and (old is None) != (condition == "NX")
    if "KEEPTTL" in found:
        deadline = keys.deadline(key)
    if not refused:
        keys.keep(key, words[2], math.inf if deadline is None else deadline)
    if "GET" in found:
        return old if isinstance(old, bytes) else None
    return None if refused else OK


@command("setex", 4, FIRST)
def _setex(keys: Keyspace, words: list[bytes]) -> Reply:
    deadline = _deadline(keys, {"EX": [words[2]]}, "setex")
    keys.keep(words[1], words[3], math.inf if deadline is None else deadline)
    return OK


@command("getdel", 2, FIRST)
def _getdel(keys: Keyspace, words: list[bytes]) -> Reply:
    old = keys.find(words[1], bytes)
    keys.drop(words[1])
    return old


@command("getex", -2, FIRST)
def _getex(keys: Keyspace, words: list[bytes]) -> Reply:
    found = options(words[2:], {"PERSIST": 0} | dict.fromkeys(ENDS, 1))
    exclusive(found, *ENDS, "PERSIST")
    value = keys.find(words[1], bytes)
    deadline = None if value is None else _deadline(keys, found, "getex")
    if deadline is not None:
        keys.expire(words[1], deadline)
    elif value is not None and found and keys.deadline(words[1]) != math.inf:
        keys.expire(words[1], math.inf)
    return value


@command("mget", -2, ALL, reads=True)
def _mget(keys: Keyspace, words: list[bytes]) -> Reply:
    found = [keys.any(key) for key in words[1:]]
    return [value if isinstance(value, bytes) else None for value in found]


@command("mset", -3, PAIRS)
def _mset(keys: Keyspace, words: list[bytes]) -> Reply:
    if len(words) % 2 == 0:
        raise wrong_number("mset")
    for key, value in zip(words[1::2], words[2::2], strict=True):
        keys.keep(key, value)
    return OK


@command("append", 3, FIRST)
def _append(keys: Keyspace, words: list[bytes]) -> Reply:
    value = (keys.find(words[1], bytes) or b"") + words[2]
    keys.update(words[1], value)
    return len(value)


@command("getrange", 4, FIRST, reads=True)
def _getrange(keys: Keyspace, words: list[bytes]) -> Reply:
    first, last = integer(words[2]), integer(words[3])
    value = keys.find(words[1], bytes) or b""
    if not last < first < 0:  # what lies before the beginning is the first byte, in this command alone
        last = max(last, -len(value))
    start, stop = span(first, last, len(value))
    return value[start:stop]


def span(first: int, last: int, length: int) -> tuple[int, int]:
    """Redis' ranges, both ends in and negative ones from the end, as Python's."""
    start = max(0, first + length) if first < 0 else first
    stop = last + length if last < 0 else last
    return start, max(start, min(stop, length - 1) + 1)


@command("incr decr", 2, FIRST)
@command("incrby decrby", 3, FIRST)
def _add(keys: Keyspace, words: list[bytes]) -> Reply:
    by = integer(words[2]) if len(words) > 2 else 1  # noqa: PLR2004  # how much is said
    if words[0][:1] not in b"iI":
        if by == -1 << 63:
            raise CommandError("ERR decrement would overflow")
        by = -by
    value = keys.find(words[1], bytes)
    total = whole_sum(b"0" if value is None else value, by, NOT_AN_INTEGER)
    keys.update(words[1], b"%d" % total)
    return total


def whole_sum(text: bytes, by: int, wrong: str) -> int:
    """Raises CommandError for what is no number, and for a sum beyond 64 bits."""
    total = integer(text, wrong) + by
    if not -(1 << 63) <= total < 1 << 63:
        raise CommandError("ERR increment or decrement would overflow")
    return total


# -- keys of any kind --------------------------------------------------------------------------------------------------


@command("del unlink", -2, ALL)
def _del(keys: Keyspace, words: list[bytes]) -> Reply:
    return sum(keys.drop(key) for key in words[1:])


@command("exists", -2, ALL, reads=True)
def _exists(keys: Keyspace, words: list[bytes]) -> Reply:
    return sum(keys.any(key) is not None for key in words[1:])


def _kind(keys: Keyspace, key: bytes) -> str:
    value = keys.any(key)
    return "none" if value is None else "string" if isinstance(value, bytes) else value.name


@command("keys", 2)
def _keys(keys: Keyspace, words: list[bytes]) -> Reply:
    return list(keys.names(words[1]))


@command("scan", -2)
def _scan(keys: Keyspace, words: list[bytes]) -> Reply:
    found = options(words[2:], {"MATCH": 1, "COUNT": 1})
    count = integer(found["COUNT"][0]) if "COUNT" in found else COUNT_DEFAULT
    if count < 1:
        raise CommandError(SYNTAX)
    if not words[1].isdigit() or len(words[1]) > 20:  # noqa: PLR2004  # digits of 64 bits
        raise CommandError("ERR invalid cursor")
    cursor, seen = keys.scan(int(words[1]), count)
    if "MATCH" in found:
        fits = glob(found["MATCH"][0])
        seen = [key for key in seen if fits.fullmatch(key)]
    return [b"%d" % cursor, list(seen)]


@command("dbsize", 1)
def _dbsize(keys: Keyspace, _: list[bytes]) -> Reply:
    return len(keys)


@command("flushdb flushall", -1)
def _flush(keys: Keyspace, words: list[bytes]) -> Reply:
    exclusive(options(words[1:], {"SYNC": 0, "ASYNC": 0}), "SYNC", "ASYNC")
    keys.clear()
    return OK


@command("rename", 3, (1, 2, 1))
def _rename(keys: Keyspace, words: list[bytes]) -> Reply:
    _, source, target = words
    value = keys.any(source)
    if value is None:
        raise CommandError("ERR no such key")
    if source != target:
        deadline = keys.deadline(source)
        keys.drop(source)
        keys.keep(target, value, deadline)
    return OK


@command("expire pexpire", 3, FIRST)
def _expire(keys: Keyspace, words: list[bytes]) -> Reply:
    name = words[0].lower().decode()
    deadline = _moment(keys, words[2], 1000 if name == "expire" else 1, name)
    if keys.any(words[1]) is None:
        return 0
    keys.expire(words[1], deadline)
    return 1


@command("ttl pttl", 2, FIRST, reads=True)
def _ttl(keys: Keyspace, words: list[bytes]) -> Reply:
    deadline = keys.deadline(words[1])
    if deadline == math.inf:
        return -2 if keys.any(words[1]) is None else -1
    left = round((deadline - keys.clock.seconds) * 1000)
    return left if words[0][:1] in b"pP" else (left + 500) // 1000


@command("persist", 2, FIRST)
def _persist(keys: Keyspace, words: list[bytes]) -> Reply:
    if keys.deadline(words[1]) == math.inf:
        return 0
    keys.expire(words[1], math.inf)
    return 1
