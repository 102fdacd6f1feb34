"""Commands on hashes, lists, sets and sorted sets, worded and replying as in Redis 7."""

from __future__ import annotations

from itertools import islice

from thermocline.errors import CommandError
from thermocline.near.engine_keys import Keyspace
from thermocline.near.engine_strings import span, whole_sum
from thermocline.near.engine_table import (
    FIRST,
    OK,
    SYNTAX,
    Reply,
    command,
    integer,
    number,
    reading,
    wrong_number,
)
from thermocline.near.engine_values import Hash, Items, Members, Ranked

NOT_POSITIVE = "ERR value is out of range, must be positive"
KINDS: dict[bytes, type[Hash]] = {b"H": Hash, b"S": Members, b"Z": Ranked}


def _held(keys: Keyspace, words: list[bytes]) -> Hash:
    """The container that a command is about, by its first letter; an empty one where there is none."""
    kind = KINDS[words[0][:1].upper()]
    return keys.find(words[1], kind) or kind()


def _count(words: list[bytes], wrong: CommandError) -> int | None:
    """How many to take, where it is said."""
    if len(words) > 3:  # noqa: PLR2004  # command, key, count
        raise wrong
    count = integer(words[2], NOT_POSITIVE) if len(words) > 2 else None  # noqa: PLR2004  # as above
    if count is not None and count < 0:
        raise CommandError(NOT_POSITIVE)
    return count


# -- hashes, sets and sorted sets --------------------------------------------------------------------------------------

reading(
    {
        "hlen scard zcard": (2, lambda keys, words: len(_held(keys, words))),
        "hget zscore": (3, lambda keys, words: _held(keys, words).get(words[2])),
        "hmget": (-3, lambda keys, words: [*map(_held(keys, words).get, words[2:])]),
        "hexists sismember": (3, lambda keys, words: int(words[2] in _held(keys, words))),
        "hgetall": (2, lambda keys, words: dict(_held(keys, words))),
        "smembers": (2, lambda keys, words: set(_held(keys, words))),
        "llen": (2, lambda keys, words: len(keys.find(words[1], Items) or ())),
    }
)


@command("hset", -4, FIRST)
def _hset(keys: Keyspace, words: list[bytes]) -> Reply:
    if len(words) % 2:
        raise wrong_number("hset")
    held = keys.grow(words[1], Hash, words[2:])
    new = sum(held.assign(field, value) for field, value in zip(words[2::2], words[3::2], strict=True))
    keys.update(words[1], held)
    return new


@command("sadd", -3, FIRST)
def _sadd(keys: Keyspace, words: list[bytes]) -> Reply:
    held = keys.grow(words[1], Members, words[2:])
    new = sum(held.assign(member, b"") for member in words[2:])
    if new:
        keys.update(words[1], held)
    return new


@command("zadd", -4, FIRST)
def _zadd(keys: Keyspace, words: list[bytes]) -> Reply:
    """Without its flags."""
    if len(words) % 2:
        raise CommandError(SYNTAX)
    scores = [number(score) for score in words[2::2]]
    held = keys.grow(words[1], Ranked, words[3::2])
    old = len(held)
    changed = [
        held.assign(member, score)
        for score, member in zip(scores, words[3::2], strict=True)
        if held.get(member) != score
    ]
    if changed:
        keys.update(words[1], held)
    return len(held) - old


@command("hdel srem zrem", -3, FIRST)
def _remove(keys: Keyspace, words: list[bytes]) -> Reply:
    held = _held(keys, words)
    count = sum(map(held.discard, words[2:]))
    if count:
        keys.update(words[1], held)
    return count


@command("hincrby", 4, FIRST)
def _hincrby(keys: Keyspace, words: list[bytes]) -> Reply:
    by = integer(words[3])
    held = keys.grow(words[1], Hash, words[2:])
    old = held.get(words[2], b"0")
    assert isinstance(old, bytes)
    total = whole_sum(old, by, "ERR hash value is not an integer")
    held.assign(words[2], b"%d" % total)
    keys.update(words[1], held)
    return total


@command("spop", -2, FIRST)
def _spop(keys: Keyspace, words: list[bytes]) -> Reply:
    """The latest first: which one it is is left to the server."""
    count, held = _count(words, CommandError(SYNTAX)), keys.find(words[1], Members)
    if held is None:
        return None if count is None else set()
    taken = list(islice(reversed(held), 1 if count is None else count))
    for member in taken:
        held.discard(member)
    if taken:
        keys.update(words[1], held)
    return taken[0] if count is None else set(taken)


@command("zpopmin", -2, FIRST)
def _zpop(keys: Keyspace, words: list[bytes]) -> Reply:
    count, held = _count(words, CommandError(SYNTAX)), keys.find(words[1], Ranked)
    if held is None:
        return []
    taken = held.order[: 1 if count is None else count]
    for _, member in taken:
        held.discard(member)
    if taken:
        keys.update(words[1], held)
    pairs: list[Reply] = [[member, score] for score, member in taken]
    return pairs if count is not None and keys.protocol > 2 else [part for pair in taken for part in pair[::-1]]  # noqa: PLR2004  # RESP3


# -- lists -------------------------------------------------------------------------------------------------------------


@command("lpush rpush", -3, FIRST)
def _push(keys: Keyspace, words: list[bytes]) -> Reply:
    held = keys.grow(words[1], Items, words[2:])
    for item in words[2:]:
        held.add(item, left=words[0][:1] in b"lL")
    keys.update(words[1], held)
    return len(held)


@command("lpop rpop", -2, FIRST)
def _pop(keys: Keyspace, words: list[bytes]) -> Reply:
    count = _count(words, wrong_number(words[0].lower().decode()))
    held, left = keys.find(words[1], Items), words[0][:1] in b"lL"
    if held is None:
        return None if count is None else ()
    taken: list[Reply] = [held.take(left=left) for _ in range(min(len(held), 1 if count is None else count))]
    if taken:
        keys.update(words[1], held)
    return taken[0] if count is None else taken


@command("lrange", 4, FIRST, reads=True)
def _lrange(keys: Keyspace, words: list[bytes]) -> Reply:
    first, last = integer(words[2]), integer(words[3])
    held = keys.find(words[1], Items) or ()
    start, stop = span(first, last, len(held))
    return list(islice(held, start, stop)) if start < stop else []


@command("ltrim", 4, FIRST)
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
