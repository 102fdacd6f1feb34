"""Commands on strings and on keys of any kind, worded and replying as in Redis 7."""

from __future__ import annotations

import decimal
import math
import random

from thermocline.errors import CommandError
from thermocline.near.engine_keys import Keyspace, glob
from thermocline.near.engine_table import (
    NOT_A_FLOAT,
    NOT_AN_INTEGER,
    OK,
    SYNTAX,
    Reply,
    command,
    exclusive,
    integer,
    number,
    options,
    parents,
)
from thermocline.near.engine_values import Container, encoding_of, kind_of

NO_KEY = "ERR no such key"
MILLISECONDS_MAX = 1 << 63
ENDS = {"EX": (1000, False), "PX": (1, False), "EXAT": (1000, True), "PXAT": (1, True)}
"""Options and commands that say when a key ends: milliseconds of their unit, and whether they name a moment."""
DIGITS = decimal.Context(prec=60, traps=[])
COUNT_DEFAULT = 10


def moment(keys: Keyspace, text: bytes, unit: int, *, is_moment: bool, name: str) -> float:
    """When a key ends, in seconds since 1970. Raises CommandError for a time that cannot be."""
    milliseconds = integer(text) * unit + (0 if is_moment else round(keys.clock.seconds * 1000))
    if abs(milliseconds) >= MILLISECONDS_MAX:
        raise CommandError(f"ERR invalid expire time in '{name}' command")
    return milliseconds / 1000


def positive(keys: Keyspace, text: bytes, unit: int, *, is_moment: bool, name: str) -> float:
    """As `moment`, for commands that want no time that has passed."""
    if integer(text) <= 0:
        raise CommandError(f"ERR invalid expire time in '{name}' command")
    return moment(keys, text, unit, is_moment=is_moment, name=name)


def _deadline(keys: Keyspace, found: dict[str, list[bytes]], name: str) -> float | None:
    given = exclusive(found, *ENDS, "PERSIST", "KEEPTTL")
    if given is None or given not in ENDS:
        return None
    unit, is_moment = ENDS[given]
    return positive(keys, found[given][0], unit, is_moment=is_moment, name=name)


# -- strings -----------------------------------------------------------------------------------------------------------


@command("get", 2, "readonly fast", 1)
def _get(keys: Keyspace, words: list[bytes]) -> Reply:
    return keys.find(words[1], bytes)


@command("set", -3, "write denyoom", 1)
def _set(keys: Keyspace, words: list[bytes]) -> Reply:
    key = words[1]
    if len(words) == 3:  # noqa: PLR2004  # the usual one
        keys.keep(key, words[2])
        return OK
    given = {"NX": 0, "XX": 0, "GET": 0, "KEEPTTL": 0} | dict.fromkeys(ENDS, 1)
    found = options(words[3:], given)
    condition = exclusive(found, "NX", "XX")
    deadline = _deadline(keys, found, "set")
    old = keys.find(key, bytes) if "GET" in found else keys.any(key)
    refused = condition is not None and (old is None) != (condition == "NX")
    if not refused:
        _store_until(keys, key, words[2], keys.deadline(key) if "KEEPTTL" in found else deadline)
    if "GET" in found:
        return old if isinstance(old, bytes) else None
    return None if refused else OK


def _store_until(keys: Keyspace, key: bytes, value: bytes, deadline: float | None) -> None:
    if deadline is not None and deadline <= keys.clock.seconds:
        keys.drop(key)
    else:
        keys.keep(key, value, math.inf if deadline is None else deadline)


@command("setex", 4, "write denyoom", 1)
@command("psetex", 4, "write denyoom", 1)
def _setex(keys: Keyspace, words: list[bytes]) -> Reply:
    name = words[0].lower().decode()
    unit = 1000 if name == "setex" else 1
    keys.keep(words[1], words[3], positive(keys, words[2], unit, is_moment=False, name=name))
    return OK


@command("setnx", 3, "write denyoom fast", 1)
def _setnx(keys: Keyspace, words: list[bytes]) -> Reply:
    if keys.any(words[1]) is not None:
        return 0
    keys.keep(words[1], words[2])
    return 1


@command("getset", 3, "write denyoom fast", 1)
def _getset(keys: Keyspace, words: list[bytes]) -> Reply:
    old = keys.find(words[1], bytes)
    keys.keep(words[1], words[2])
    return old


@command("getdel", 2, "write fast", 1)
def _getdel(keys: Keyspace, words: list[bytes]) -> Reply:
    old = keys.find(words[1], bytes)
    keys.drop(words[1])
    return old


@command("getex", -2, "write fast", 1)
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


@command("mget", -2, "readonly fast", (1, -1, 1))
def _mget(keys: Keyspace, words: list[bytes]) -> Reply:
    found = [keys.any(key) for key in words[1:]]
    return [value if isinstance(value, bytes) else None for value in found]


@command("mset", -3, "write denyoom", (1, -1, 2))
@command("msetnx", -3, "write denyoom", (1, -1, 2))
def _mset(keys: Keyspace, words: list[bytes]) -> Reply:
    name = words[0].lower().decode()
    if len(words) % 2 == 0:
        raise CommandError(f"ERR wrong number of arguments for '{name}' command")
    if name == "msetnx" and any(keys.any(key) is not None for key in words[1::2]):
        return 0
    for key, value in zip(words[1::2], words[2::2], strict=True):
        keys.keep(key, value)
    return OK if name == "mset" else 1


@command("strlen", 2, "readonly fast", 1)
def _strlen(keys: Keyspace, words: list[bytes]) -> Reply:
    return len(keys.find(words[1], bytes) or b"")


@command("append", 3, "write denyoom fast", 1)
def _append(keys: Keyspace, words: list[bytes]) -> Reply:
    value = (keys.find(words[1], bytes) or b"") + words[2]
    keys.update(words[1], value)
    return len(value)


@command("getrange", 4, "readonly", 1)
@command("substr", 4, "readonly", 1)
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


@command("setrange", 4, "write denyoom", 1)
def _setrange(keys: Keyspace, words: list[bytes]) -> Reply:
    offset, piece = integer(words[2]), words[3]
    if offset < 0:
        raise CommandError("ERR offset is out of range")
    value = keys.find(words[1], bytes) or b""
    if not piece:
        return len(value)
    if offset + len(piece) > keys.value_bytes_max:
        raise CommandError("ERR string exceeds maximum allowed size (proto-max-bulk-len)")
    value = value[:offset].ljust(offset, b"\0") + piece + value[offset + len(piece) :]
    keys.update(words[1], value)
    return len(value)


@command("incr", 2, "write denyoom fast", 1)
@command("decr", 2, "write denyoom fast", 1)
def _incr(keys: Keyspace, words: list[bytes]) -> Reply:
    return _add(keys, words[1], 1 if words[0][:1] in b"iI" else -1)


@command("incrby", 3, "write denyoom fast", 1)
@command("decrby", 3, "write denyoom fast", 1)
def _incrby(keys: Keyspace, words: list[bytes]) -> Reply:
    by = integer(words[2])
    if words[0][:1] in b"iI":
        return _add(keys, words[1], by)
    if by == -1 << 63:
        raise CommandError("ERR decrement would overflow")
    return _add(keys, words[1], -by)


def _add(keys: Keyspace, key: bytes, by: int) -> int:
    value = keys.find(key, bytes)
    total = whole_sum(b"0" if value is None else value, by, NOT_AN_INTEGER)
    keys.update(key, b"%d" % total)
    return total


def whole_sum(text: bytes, by: int, wrong: str) -> int:
    """Raises CommandError for what is no number, and for a sum beyond 64 bits."""
    total = integer(text, wrong) + by
    if not -(1 << 63) <= total < 1 << 63:
        raise CommandError("ERR increment or decrement would overflow")
    return total


@command("incrbyfloat", 3, "write denyoom fast", 1)
def _incrbyfloat(keys: Keyspace, words: list[bytes]) -> Reply:
    value = keys.find(words[1], bytes)
    total = fraction_sum(b"0" if value is None else value, words[2], NOT_A_FLOAT)
    keys.update(words[1], total)
    return total


def fraction_sum(text: bytes, by: bytes, wrong: str) -> bytes:
    """The exact sum, to 17 places: Redis adds in 80 bits, which is less. Raises CommandError."""
    if math.isinf(number(text, wrong)) or math.isinf(number(by)):
        raise CommandError("ERR increment would produce NaN or Infinity")
    total = DIGITS.add(decimal.Decimal(text.decode()), decimal.Decimal(by.decode()))
    digits = f"{total:.17f}".rstrip("0").rstrip(".")
    return b"0" if digits == "-0" else digits.encode()


# -- keys of any kind --------------------------------------------------------------------------------------------------


@command("del", -2, "write", (1, -1, 1))
@command("unlink", -2, "write fast", (1, -1, 1))
def _del(keys: Keyspace, words: list[bytes]) -> Reply:
    return sum(keys.drop(key) for key in words[1:])


@command("exists", -2, "readonly fast", (1, -1, 1))
@command("touch", -2, "readonly fast", (1, -1, 1))
def _exists(keys: Keyspace, words: list[bytes]) -> Reply:
    return sum(keys.any(key) is not None for key in words[1:])


@command("type", 2, "readonly fast", 1)
def _type(keys: Keyspace, words: list[bytes]) -> Reply:
    value = keys.any(words[1])
    return "none" if value is None else kind_of(value)


@command("keys", 2, "readonly")
def _keys(keys: Keyspace, words: list[bytes]) -> Reply:
    return list(keys.names(words[1]))


@command("scan", -2, "readonly")
def _scan(keys: Keyspace, words: list[bytes]) -> Reply:
    found = options(words[2:], {"MATCH": 1, "COUNT": 1, "TYPE": 1})
    count = integer(found["COUNT"][0]) if "COUNT" in found else COUNT_DEFAULT
    if count < 1:
        raise CommandError(SYNTAX)
    if not words[1].isdigit() or len(words[1]) > 20:  # noqa: PLR2004  # digits of 64 bits
        raise CommandError("ERR invalid cursor")
    cursor, seen = keys.scan(int(words[1]), count)
    if "MATCH" in found:
        fits = glob(found["MATCH"][0])
        seen = [key for key in seen if fits.fullmatch(key)]
    if "TYPE" in found:
        kind = found["TYPE"][0].lower().decode("latin-1")
        seen = [key for key in seen if kind_of(keys.any(key) or b"") == kind]
    return [b"%d" % cursor, list(seen)]


@command("randomkey", 1, "readonly")
def _randomkey(keys: Keyspace, _: list[bytes]) -> Reply:
    names = keys.names(b"*")
    return random.choice(names) if names else None  # noqa: S311  # no secret


@command("dbsize", 1, "readonly fast")
def _dbsize(keys: Keyspace, _: list[bytes]) -> Reply:
    return len(keys)


@command("flushdb", -1, "write")
@command("flushall", -1, "write")
def _flush(keys: Keyspace, words: list[bytes]) -> Reply:
    exclusive(options(words[1:], {"SYNC": 0, "ASYNC": 0}), "SYNC", "ASYNC")
    keys.clear()
    return OK


@command("rename", 3, "write", (1, 2, 1))
@command("renamenx", 3, "write fast", (1, 2, 1))
def _rename(keys: Keyspace, words: list[bytes]) -> Reply:
    _, source, target = words
    only_new = len(words[0]) > len("rename")
    value = keys.any(source)
    if value is None:
        raise CommandError(NO_KEY)
    if only_new and keys.any(target) is not None:
        return 0
    if source != target:
        deadline = keys.deadline(source)
        keys.drop(source)
        keys.keep(target, value, deadline)
    return 1 if only_new else OK


@command("copy", -3, "write denyoom", (1, 2, 1))
def _copy(keys: Keyspace, words: list[bytes]) -> Reply:
    source, target = words[1], words[2]
    found = options(words[3:], {"REPLACE": 0, "DB": 1})
    if "DB" in found and integer(found["DB"][0]):
        raise CommandError("ERR DB index is out of range")
    if source == target:
        raise CommandError("ERR source and destination objects are the same")
    value = keys.any(source)
    if value is None or ("REPLACE" not in found and keys.any(target) is not None):
        return 0
    keys.keep(target, value.twin() if isinstance(value, Container) else value, keys.deadline(source))
    return 1


@command("expire", -3, "write fast", 1)
@command("pexpire", -3, "write fast", 1)
@command("expireat", -3, "write fast", 1)
@command("pexpireat", -3, "write fast", 1)
def _expire(keys: Keyspace, words: list[bytes]) -> Reply:
    name = words[0].lower().decode()
    unit = 1 if name.startswith("p") else 1000
    found = options(words[3:], dict.fromkeys(("NX", "XX", "GT", "LT"), 0))
    if "NX" in found and len(found) > 1:
        raise CommandError("ERR NX and XX, GT or LT options at the same time are not compatible")
    if {"GT", "LT"} <= found.keys():
        raise CommandError("ERR GT and LT options at the same time are not compatible")
    deadline = moment(keys, words[2], unit, is_moment=name.endswith("at"), name=name)
    old = keys.deadline(words[1])
    never = old == math.inf
    refused = (
        keys.any(words[1]) is None
        or ("NX" in found and not never)
        or ("XX" in found and never)
        or ("GT" in found and deadline <= old)
        or ("LT" in found and deadline >= old)
    )
    if not refused:
        keys.expire(words[1], deadline)
    return int(not refused)


@command("ttl", 2, "readonly fast", 1)
@command("pttl", 2, "readonly fast", 1)
@command("expiretime", 2, "readonly fast", 1)
@command("pexpiretime", 2, "readonly fast", 1)
def _ttl(keys: Keyspace, words: list[bytes]) -> Reply:
    name = words[0].lower()
    deadline = keys.deadline(words[1])
    if deadline == math.inf:
        return -2 if keys.any(words[1]) is None else -1
    left = round((deadline if name.endswith(b"time") else deadline - keys.clock.seconds) * 1000)
    return left if name.startswith(b"p") else (left + 500) // 1000


@command("persist", 2, "write fast", 1)
def _persist(keys: Keyspace, words: list[bytes]) -> Reply:
    if keys.deadline(words[1]) == math.inf:
        return 0
    keys.expire(words[1], math.inf)
    return 1


parents("object", "memory")


@command("object|encoding", 3, "readonly", 2)
def _object_encoding(keys: Keyspace, words: list[bytes]) -> Reply:
    value = keys.any(words[2])
    return None if value is None else encoding_of(value).encode()


@command("memory|usage", -3, "readonly", 2)
def _memory_usage(keys: Keyspace, words: list[bytes]) -> Reply:
    options(words[3:], {"SAMPLES": 1})
    entry = keys.cache.entries.get(words[2])
    return None if entry is None else entry.weight_bytes
