"""Commands on hashes, lists, sets and sorted sets, worded and replying as in Redis 7."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import islice

from thermocline.errors import CommandError
from thermocline.near.engine_keys import C, Keyspace, glob
from thermocline.near.engine_strings import COUNT_DEFAULT, NO_KEY, fraction_sum, span, whole_sum
from thermocline.near.engine_table import OK, SYNTAX, Reply, command, integer, number, options
from thermocline.near.engine_values import Hash, Items, Members, Ranked

NOT_POSITIVE = "ERR value is out of range, must be positive"
NOT_A_RANGE = "ERR min or max is not a float"
ZADD_FLAGS = ("NX", "XX", "GT", "LT", "CH", "INCR")


def _count(words: list[bytes]) -> int | None:
    """How many to take, where it is said."""
    if len(words) > 3:  # noqa: PLR2004  # command, key, count
        raise CommandError(f"ERR wrong number of arguments for '{words[0].lower().decode()}' command")
    if len(words) < 3:  # noqa: PLR2004  # as above
        return None
    count = integer(words[2], NOT_POSITIVE)
    if count < 0:
        raise CommandError(NOT_POSITIVE)
    return count


# -- hashes ------------------------------------------------------------------------------------------------------------


@command("hset", -4, "write denyoom fast", 1)
@command("hmset", -4, "write denyoom fast", 1)
def _hset(keys: Keyspace, words: list[bytes]) -> Reply:
    name = words[0].lower().decode()
    if len(words) % 2:
        raise CommandError(f"ERR wrong number of arguments for '{name}' command")
    held = keys.grow(words[1], Hash, words[2:])
    new = sum(held.assign(field, value) for field, value in zip(words[2::2], words[3::2], strict=True))
    keys.update(words[1], held)
    return OK if name == "hmset" else new


@command("hsetnx", 4, "write denyoom fast", 1)
def _hsetnx(keys: Keyspace, words: list[bytes]) -> Reply:
    held = keys.grow(words[1], Hash, words[2:])
    if words[2] in held:
        return 0
    held.assign(words[2], words[3])
    keys.update(words[1], held)
    return 1


@command("hget", 3, "readonly fast", 1)
def _hget(keys: Keyspace, words: list[bytes]) -> Reply:
    held = keys.find(words[1], Hash)
    return None if held is None else held.get(words[2])


@command("hmget", -3, "readonly fast", 1)
def _hmget(keys: Keyspace, words: list[bytes]) -> Reply:
    held = keys.find(words[1], Hash) or Hash()
    return [held.get(field) for field in words[2:]]


@command("hgetall", 2, "readonly", 1)
def _hgetall(keys: Keyspace, words: list[bytes]) -> Reply:
    return dict(keys.find(words[1], Hash) or {})


@command("hkeys", 2, "readonly", 1)
def _hkeys(keys: Keyspace, words: list[bytes]) -> Reply:
    return list(keys.find(words[1], Hash) or ())


@command("hvals", 2, "readonly", 1)
def _hvals(keys: Keyspace, words: list[bytes]) -> Reply:
    return list((keys.find(words[1], Hash) or Hash()).values())


@command("hlen", 2, "readonly fast", 1)
def _hlen(keys: Keyspace, words: list[bytes]) -> Reply:
    return len(keys.find(words[1], Hash) or ())


@command("hexists", 3, "readonly fast", 1)
def _hexists(keys: Keyspace, words: list[bytes]) -> Reply:
    return int(words[2] in (keys.find(words[1], Hash) or ()))


@command("hstrlen", 3, "readonly fast", 1)
def _hstrlen(keys: Keyspace, words: list[bytes]) -> Reply:
    return len((keys.find(words[1], Hash) or Hash()).get(words[2], b""))


@command("hdel", -3, "write fast", 1)
def _hdel(keys: Keyspace, words: list[bytes]) -> Reply:
    return _removed(keys, words, Hash, Hash.discard)


@command("hincrby", 4, "write denyoom fast", 1)
@command("hincrbyfloat", 4, "write denyoom fast", 1)
def _hincrby(keys: Keyspace, words: list[bytes]) -> Reply:
    whole, by = words[0].upper() == b"HINCRBY", words[3]
    _ = integer(by) if whole else number(by)
    held = keys.grow(words[1], Hash, words[2:])
    old = held.get(words[2], b"0")
    if whole:
        total = whole_sum(old, integer(by), "ERR hash value is not an integer")
        held.assign(words[2], b"%d" % total)
        keys.update(words[1], held)
        return total
    text = fraction_sum(old, by, "ERR hash value is not a float")
    held.assign(words[2], text)
    keys.update(words[1], held)
    return text


@command("hscan", -3, "readonly", 1)
@command("sscan", -3, "readonly", 1)
@command("zscan", -3, "readonly", 1)
def _hscan(keys: Keyspace, words: list[bytes]) -> Reply:
    """All in one go: a value is bounded."""
    found = options(words[3:], {"MATCH": 1, "COUNT": 1})
    if integer(found["COUNT"][0] if "COUNT" in found else b"%d" % COUNT_DEFAULT) < 1:
        raise CommandError(SYNTAX)
    if not words[2].isdigit():
        raise CommandError("ERR invalid cursor")
    fits = glob(found["MATCH"][0] if "MATCH" in found else b"*")
    if words[0].upper() == b"SSCAN":
        return [b"0", [member for member in keys.find(words[1], Members) or () if fits.fullmatch(member)]]
    if words[0].upper() == b"HSCAN":
        fields = (keys.find(words[1], Hash) or Hash()).items()
        return [b"0", [part for field, value in fields if fits.fullmatch(field) for part in (field, value)]]
    order = (keys.find(words[1], Ranked) or Ranked()).order
    return [b"0", [part for score, member in order if fits.fullmatch(member) for part in (member, _text(score))]]


# -- lists -------------------------------------------------------------------------------------------------------------


@command("lpush", -3, "write denyoom fast", 1)
@command("rpush", -3, "write denyoom fast", 1)
@command("lpushx", -3, "write denyoom fast", 1)
@command("rpushx", -3, "write denyoom fast", 1)
def _push(keys: Keyspace, words: list[bytes]) -> Reply:
    held, left = keys.grow(words[1], Items, words[2:]), words[0][:1] in b"lL"
    if not held and words[0][-1:] in b"xX":
        return 0
    for item in words[2:]:
        held.add(item, left=left)
    keys.update(words[1], held)
    return len(held)


@command("lpop", -2, "write fast", 1)
@command("rpop", -2, "write fast", 1)
def _pop(keys: Keyspace, words: list[bytes]) -> Reply:
    count, held, left = _count(words), keys.find(words[1], Items), words[0][:1] in b"lL"
    if held is None:
        return None if count is None else ()
    taken: list[Reply] = [held.take(left=left) for _ in range(min(len(held), 1 if count is None else count))]
    if taken:
        keys.update(words[1], held)
    return taken[0] if count is None else taken


@command("llen", 2, "readonly fast", 1)
def _llen(keys: Keyspace, words: list[bytes]) -> Reply:
    return len(keys.find(words[1], Items) or ())


@command("lrange", 4, "readonly", 1)
def _lrange(keys: Keyspace, words: list[bytes]) -> Reply:
    first, last = integer(words[2]), integer(words[3])
    held = keys.find(words[1], Items) or Items()
    start, stop = span(first, last, len(held))
    return list(islice(held, start, stop)) if start < stop else []


@command("lindex", 3, "readonly", 1)
def _lindex(keys: Keyspace, words: list[bytes]) -> Reply:
    held, at = keys.find(words[1], Items), words[2]
    if held is None:
        return None
    index = integer(at)
    return held[index] if -len(held) <= index < len(held) else None


@command("lset", 4, "write denyoom", 1)
def _lset(keys: Keyspace, words: list[bytes]) -> Reply:
    held = keys.grow(words[1], Items, words[3:])
    if not held:
        raise CommandError(NO_KEY)
    index = integer(words[2])
    if not -len(held) <= index < len(held):
        raise CommandError("ERR index out of range")
    held.nbytes += len(words[3]) - len(held[index])
    held[index] = words[3]
    keys.update(words[1], held)
    return OK


@command("ltrim", 4, "write", 1)
def _ltrim(keys: Keyspace, words: list[bytes]) -> Reply:
    first, last = integer(words[2]), integer(words[3])
    held = keys.find(words[1], Items)
    if held is None:
        return OK
    start, stop = span(first, last, len(held))
    behind = len(held) - max(start, stop)
    for left, count in ((False, behind), (True, min(start, len(held) - behind))):
        for _ in range(count):
            held.take(left=left)
    keys.update(words[1], held)
    return OK


@command("lrem", 4, "write", 1)
def _lrem(keys: Keyspace, words: list[bytes]) -> Reply:
    count, item = integer(words[2]), words[3]
    held = keys.find(words[1], Items)
    if held is None:
        return 0
    order = list(reversed(held) if count < 0 else held)
    most, kept, removed = abs(count) or len(order), [], 0
    for each in order:
        if each == item and removed < most:
            removed += 1
        else:
            kept.append(each)
    if removed:
        rest = Items(reversed(kept) if count < 0 else kept, held.nbytes)
        gone = Items()
        gone.add(item, left=True)
        rest.nbytes -= removed * gone.nbytes
        keys.update(words[1], rest)
    return removed


@command("linsert", 5, "write denyoom", 1)
def _linsert(keys: Keyspace, words: list[bytes]) -> Reply:
    where = words[2].upper()
    if where not in {b"BEFORE", b"AFTER"}:
        raise CommandError(SYNTAX)
    held = keys.grow(words[1], Items, words[4:])
    if not held:
        return 0
    if words[3] not in held:
        return -1
    at = held.index(words[3]) + (where == b"AFTER")
    held.add(words[4], left=False)
    held.insert(at, held.pop())
    keys.update(words[1], held)
    return len(held)


# -- sets --------------------------------------------------------------------------------------------------------------


@command("sadd", -3, "write denyoom fast", 1)
def _sadd(keys: Keyspace, words: list[bytes]) -> Reply:
    held = keys.grow(words[1], Members, words[2:])
    new = sum(held.include(member) for member in words[2:])
    if new:
        keys.update(words[1], held)
    return new


@command("srem", -3, "write fast", 1)
def _srem(keys: Keyspace, words: list[bytes]) -> Reply:
    return _removed(keys, words, Members, Members.exclude)


def _removed(keys: Keyspace, words: list[bytes], kind: type[C], remove: Callable[[C, bytes], bool]) -> int:
    held = keys.find(words[1], kind)
    if held is None:
        return 0
    count = sum(remove(held, element) for element in words[2:])
    if count:
        keys.update(words[1], held)
    return count


@command("smembers", 2, "readonly", 1)
def _smembers(keys: Keyspace, words: list[bytes]) -> Reply:
    return set(keys.find(words[1], Members) or ())


@command("sismember", 3, "readonly fast", 1)
def _sismember(keys: Keyspace, words: list[bytes]) -> Reply:
    return int(words[2] in (keys.find(words[1], Members) or ()))


@command("smismember", -3, "readonly fast", 1)
def _smismember(keys: Keyspace, words: list[bytes]) -> Reply:
    held = keys.find(words[1], Members) or Members()
    return [int(member in held) for member in words[2:]]


@command("scard", 2, "readonly fast", 1)
def _scard(keys: Keyspace, words: list[bytes]) -> Reply:
    return len(keys.find(words[1], Members) or ())


@command("spop", -2, "write fast", 1)
def _spop(keys: Keyspace, words: list[bytes]) -> Reply:
    if len(words) > 3:  # noqa: PLR2004  # command, key, count
        raise CommandError(SYNTAX)
    count, held = _count(words), keys.find(words[1], Members)
    if held is None:
        return None if count is None else set()
    taken = [held.take() for _ in range(min(len(held), 1 if count is None else count))]
    if taken:
        keys.update(words[1], held)
    return taken[0] if count is None else set(taken)


# -- sorted sets -------------------------------------------------------------------------------------------------------


@command("zadd", -4, "write denyoom fast", 1)
def _zadd(keys: Keyspace, words: list[bytes]) -> Reply:
    at = 2
    while at < len(words) and words[at].upper().decode("latin-1") in ZADD_FLAGS:
        at += 1
    flags, pairs = {word.upper() for word in words[2:at]}, words[at:]
    if not pairs or len(pairs) % 2:
        raise CommandError(SYNTAX)
    if b"NX" in flags and b"XX" in flags:
        raise CommandError("ERR XX and NX options at the same time are not compatible")
    if len(flags & {b"NX", b"GT", b"LT"}) > 1:
        raise CommandError("ERR GT, LT, and/or NX options at the same time are not compatible")
    if b"INCR" in flags and len(pairs) > 2:  # noqa: PLR2004  # one pair
        raise CommandError("ERR INCR option supports a single increment-element pair")
    scores = [number(score) for score in pairs[::2]]
    held = keys.grow(words[1], Ranked, pairs[1::2])
    added = changed = 0
    score: float | None = None
    for given, member in zip(scores, pairs[1::2], strict=True):
        old = held.scores.get(member)
        score = _scored(given, old, flags)
        if score is not None and score != old:
            held.assign(member, score)
            added += old is None
            changed += 1
    if changed:
        keys.update(words[1], held)
    if b"INCR" in flags:
        return score
    return changed if b"CH" in flags else added


def _scored(given: float, old: float | None, flags: set[bytes]) -> float | None:
    """A member's score now; None where the flags leave it alone."""
    if (old is None and b"XX" in flags) or (old is not None and b"NX" in flags):
        return None
    if b"INCR" in flags and old is not None:
        given += old
        if math.isnan(given):
            raise CommandError("ERR resulting score is not a number (NaN)")
    if old is not None and ((b"GT" in flags and given <= old) or (b"LT" in flags and given >= old)):
        return None
    return given


@command("zincrby", 4, "write denyoom fast", 1)
def _zincrby(keys: Keyspace, words: list[bytes]) -> Reply:
    return _zadd(keys, [words[0], words[1], b"INCR", *words[2:]])


@command("zrem", -3, "write fast", 1)
def _zrem(keys: Keyspace, words: list[bytes]) -> Reply:
    return _removed(keys, words, Ranked, Ranked.discard)


@command("zcard", 2, "readonly fast", 1)
def _zcard(keys: Keyspace, words: list[bytes]) -> Reply:
    return len(keys.find(words[1], Ranked) or ())


@command("zscore", 3, "readonly fast", 1)
def _zscore(keys: Keyspace, words: list[bytes]) -> Reply:
    held = keys.find(words[1], Ranked)
    return None if held is None else held.scores.get(words[2])


@command("zrank", 3, "readonly fast", 1)
def _zrank(keys: Keyspace, words: list[bytes]) -> Reply:
    held = keys.find(words[1], Ranked)
    return None if held is None else held.rank(words[2])


@command("zrange", -4, "readonly", 1)
def _zrange(keys: Keyspace, words: list[bytes]) -> Reply:
    given = {"WITHSCORES": 0, "REV": 0, "BYSCORE": 0, "LIMIT": 2}
    found = options(words[4:], given)
    if "LIMIT" in found and "BYSCORE" not in found:
        raise CommandError("ERR syntax error, LIMIT is only supported in combination with either BYSCORE or BYLEX")
    first, last = words[2], words[3]
    if "BYSCORE" not in found:
        low, high = integer(first), integer(last)
        order = (keys.find(words[1], Ranked) or Ranked()).order
        start, stop = span(low, high, len(order))
        return _ranked(keys, order[::-1][start:stop] if "REV" in found else order[start:stop], found)
    if "REV" in found:
        first, last = last, first
    return _by_score(keys, words[1], first, last, found)


@command("zrangebyscore", -4, "readonly", 1)
def _zrangebyscore(keys: Keyspace, words: list[bytes]) -> Reply:
    return _by_score(keys, words[1], words[2], words[3], options(words[4:], {"WITHSCORES": 0, "LIMIT": 2}))


def _by_score(keys: Keyspace, key: bytes, low: bytes, high: bytes, found: dict[str, list[bytes]]) -> Reply:
    offset, count = [integer(word) for word in found.get("LIMIT", (b"0", b"-1"))]
    bounds = [number(end.removeprefix(b"("), NOT_A_RANGE) for end in (low, high)]
    held = keys.find(key, Ranked) or Ranked()
    chosen = held.order[held.between(*bounds, low_open=low[:1] == b"(", high_open=high[:1] == b"(")]
    if "REV" in found:
        chosen.reverse()
    if offset < 0:
        return []
    return _ranked(keys, chosen[offset : offset + count if count >= 0 else None], found)


def _ranked(keys: Keyspace, chosen: list[tuple[float, bytes]], found: dict[str, list[bytes]]) -> Reply:
    if "WITHSCORES" not in found:
        return [member for _, member in chosen]
    return _pairs(keys, [(member, score) for score, member in chosen])


def _pairs(keys: Keyspace, chosen: list[tuple[bytes, float]]) -> list[Reply]:
    """Members with scores: pairs in RESP3, one after the other in RESP2."""
    if keys.protocol > 2:  # noqa: PLR2004  # RESP3
        return [[member, score] for member, score in chosen]
    return [part for pair in chosen for part in pair]


@command("zpopmin", -2, "write fast", 1)
@command("zpopmax", -2, "write fast", 1)
def _zpop(keys: Keyspace, words: list[bytes]) -> Reply:
    if len(words) > 3:  # noqa: PLR2004  # command, key, count
        raise CommandError(SYNTAX)
    count, held = _count(words), keys.find(words[1], Ranked)
    if held is None:
        return []
    last = words[0][-1:] in b"xX"
    taken = [held.take(last=last) for _ in range(min(len(held), 1 if count is None else count))]
    if taken:
        keys.update(words[1], held)
    return list(taken[0]) if count is None else _pairs(keys, taken)


def _text(score: float) -> bytes:
    """Within an array of texts."""
    return (b"%d" % int(score)) if score.is_integer() else repr(score).encode()
