"""The state tax of an application: what its lookups cost before the first token, with memory in front and without.

A client with `Options(profile=FILE)` notes each lookup that memory may serve: its command with its key, the bytes that
were returned, how long it took, and whether memory had it. Values are not noted. Keys are, for without them nothing can
be asked again: the file is of this user alone. `replay` asks a server the same, in the same order, with plain redis-py
and with the near client, in turn.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from thermocline.errors import NearError
from thermocline.near.commands import EFFECTS, Kind
from thermocline.near.recorder import NOW, Lookup, kind, kind_of, request, size_of

__all__ = ["Lookup", "Tax", "kind", "read", "replay", "request", "tax"]

FILE_BYTES_MAX = 256 << 20
HINT = "name a file that Options(profile=...) wrote, or one of lines such as GET session:7 with --keys"


class Spread(msgspec.Struct, frozen=True):
    """Of some times: how many, their median, the one that 99 of 100 keep to, and their sum."""

    count: int
    p50_seconds: float
    p99_seconds: float
    sum_seconds: float


class Cost(msgspec.Struct, frozen=True):
    """Of one kind of lookup. `memory_share`: how many of them memory had."""

    seconds: Spread
    mean_bytes: float
    memory_share: float


class Side(msgspec.Struct, frozen=True):
    """One way to ask: its kinds, those that cost most first, and all lookups of a request, one after another."""

    kinds: dict[str, Cost]
    requests: Spread | None


class Tax(msgspec.Struct, frozen=True):
    """`recorded` is what the application saw; `plain` and `near` are the same asked again. `saved` is per request."""

    recorded: Side | None = None
    plain: Side | None = None
    near: Side | None = None
    saved: Spread | None = None
    overlapping_requests: int = 0
    """In which the application made several lookups at a time: one after another they take longer."""
    rounds: int = 0
    warm: bool = False


def read(path: Path, *, keys: bool = False) -> list[Lookup]:
    """What a recorder noted, in its order. Raises NearError for what is no such file.

    With `keys` its lines are commands such as GET session:7, and those between empty lines are one request's.
    """
    found: list[Lookup] = []
    number = at = 0
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            raise NearError(f"{path} is larger than {FILE_BYTES_MAX:,} bytes", hint="record for a shorter time")
        for at, line in enumerate(path.read_bytes().splitlines(), 1):  # noqa: B007  # told below
            words = line.decode(errors="surrogateescape").split() if keys else []
            number += not words
            if words or not keys:
                noted = Lookup(kind_of(words), [[words[0].upper(), *words[1:]]], str(number)) if keys else None
                found.append(_readable(noted or msgspec.convert(json.loads(line), Lookup)))
    except OSError as error:
        raise NearError(f"cannot read {path}: {error.strerror}", hint=HINT) from None
    except ValueError as error:
        raise NearError(f"{path}, line {at}: {error}", hint=HINT) from None
    if not found:
        raise NearError(f"{path} has no lookups", hint=HINT)
    return found if keys else sorted(found, key=lambda lookup: lookup.began_seconds)


def _readable(lookup: Lookup) -> Lookup:
    """Only what reads keys is asked again, whatever a file says. Raises ValueError."""
    if not lookup.commands:
        raise ValueError("no lookup")
    for words in lookup.commands:
        if len(words) < 2 or words[0] not in EFFECTS or EFFECTS[words[0]].kind is not Kind.LOCAL:  # noqa: PLR2004  # a key
            raise ValueError(f"{' '.join(words[:1])[:20]!r} does not read a key as GET and HGETALL do")
    return lookup


def replay(
    url: str, lookups: Sequence[Lookup], *, rounds: int = 5, warm: bool = False, password: str | None = None
) -> Tax:
    """Ask all of it again of a server, plainly and with a near client whose memory is empty before each round.

    The two take turns, request by request, and the first of a turn changes. `warm`: memory is filled before. Raises
    NearError where the server cannot be asked.
    """
    import redis

    from thermocline.near.redis import Redis

    try:
        with redis.Redis.from_url(url, password=password) as plain, Redis.from_url(url, password=password) as near:
            plain.ping()
            if not near.near.wait():
                raise NearError("this server does not tell what changes", hint="it takes Redis 6 or newer, or Valkey")
            sides: tuple[list[Lookup], list[Lookup]] = ([], [])
            for turn in range(-1 if warm else 0, rounds):
                if not warm:
                    near.near.view.clear()
                for at, group in enumerate(_requests(lookups)):
                    for side in (0, 1) if (at + turn) % 2 else (1, 0):
                        again = [_asked((plain, near)[side], lookup, turn) for lookup in group]
                        sides[side].extend(again if turn >= 0 else ())
    except (redis.RedisError, ValueError) as error:
        raise NearError(f"the server cannot be asked: {error}", hint="name it as --url redis://host:6379/0") from None
    seconds = [{group[0].request: _sum(group) for group in _requests(side) if group[0].request} for side in sides]
    saved = [each - seconds[1][name] for name, each in seconds[0].items()]
    found = {"plain": _side(sides[0]), "near": _side(sides[1]), "saved": _spread(saved), "rounds": rounds, "warm": warm}
    return msgspec.structs.replace(tax(lookups), **found)


def _asked(client: Any, lookup: Lookup, turn: int) -> Lookup:  # noqa: ANN401  # redis-py's or ours
    """This lookup, asked by this client now. Whether it asked the server is told by what it took from its pool."""
    from redis import ResponseError

    commands = [_words(words) for words in lookup.commands]
    pool, memory, reply = client.connection_pool, True, None
    take = type(pool).get_connection

    def taken(*args: Any, **options: Any) -> Any:  # noqa: ANN401  # redis-py's
        nonlocal memory
        memory = False
        return take(pool, *args, **options)

    pool.get_connection = taken
    began = NOW()
    if len(commands) > 1 and hasattr(client, "near_read"):
        reply = client.near_read(commands)
    elif len(commands) > 1:
        with client.pipeline(transaction=False) as pipe:
            for words in commands:
                pipe.execute_command(*words)
            reply = pipe.execute(raise_on_error=False)
    else:
        with contextlib.suppress(ResponseError):  # the key is of another kind by now
            reply = client.get(commands[0][1]) if commands[0][0] == "GET" else client.execute_command(*commands[0])
    seconds = NOW() - began
    request = f"{lookup.request}/{turn}" if lookup.request else ""
    return Lookup(lookup.kind, lookup.commands, request, began, seconds, size_of(reply), memory)


def _words(words: Sequence[str]) -> list[Any]:
    """As an application writes them: places as numbers, and text as text wherever it is some."""
    numbers = words[0] in {"LRANGE", "GETRANGE"}
    plain = [word if word.isprintable() else word.encode(errors="surrogateescape") for word in words]
    return [*plain[:2], *map(int, words[2:])] if numbers else list(plain)


def tax(lookups: Sequence[Lookup]) -> Tax:
    """What was noted; nothing where the lookups are only a list of keys."""
    noted = [lookup for lookup in lookups if lookup.seconds]
    overlapping = sum(map(_overlaps, _requests(noted)))
    return Tax(_side(noted) if noted else None, overlapping_requests=overlapping)


def _side(lookups: Sequence[Lookup]) -> Side:
    kinds: dict[str, list[Lookup]] = {}
    for lookup in lookups:
        kinds.setdefault(lookup.kind, []).append(lookup)
    by_cost = sorted(kinds.items(), key=lambda pair: -_sum(pair[1]))
    requests = [_sum(group) for group in _requests(lookups) if group[0].request]
    return Side({name: _cost(of_kind) for name, of_kind in by_cost}, _spread(requests))


def _cost(lookups: Sequence[Lookup]) -> Cost:
    count, spread = len(lookups), _spread([lookup.seconds for lookup in lookups])
    assert spread is not None
    return Cost(spread, sum(each.nbytes for each in lookups) / count, sum(each.memory for each in lookups) / count)


def _spread(seconds: Sequence[float]) -> Spread | None:
    if not seconds:
        return None
    ordered, count = sorted(seconds), len(seconds)
    p50, p99 = (ordered[min(count - 1, int(share * count))] for share in (0.5, 0.99))
    return Spread(count, p50, p99, sum(ordered))


def _sum(lookups: Iterable[Lookup]) -> float:
    return sum(lookup.seconds for lookup in lookups)


def _requests(lookups: Iterable[Lookup]) -> list[list[Lookup]]:
    """By request, in the order of their first lookups; a lookup of none stands alone."""
    groups: dict[object, list[Lookup]] = {}
    for at, lookup in enumerate(lookups):
        groups.setdefault(lookup.request or at, []).append(lookup)
    return list(groups.values())


def _overlaps(group: Sequence[Lookup]) -> bool:
    return any(a.began_seconds + a.seconds > b.began_seconds for a, b in itertools.pairwise(group))
