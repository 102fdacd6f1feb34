"""Clients under fire: what each of them writes and reads, and when; and the checker of such a history.

As a program it is one client process: `fire.py FOLDER ID OF SERVER_PORT LINK_PORT MODE OPERATIONS SEED`. Every key has
one writer, a thread of one process, so its versions are in order; anyone reads it. Times are of a clock that all
processes share. A history is a list of records (see Record): a write that got no answer ended never.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import sys
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import redis
import redis.exceptions

from thermocline.clock import SystemClock
from thermocline.near.options import Options, Under
from thermocline.near.redis import Redis
from thermocline.near.redis_async import AsyncRedis

NOW = SystemClock.now
THREADS, KEYS = 3, 24
STALE_SECONDS_MAX, GRACE_SECONDS, EXPIRY_SECONDS, ALWAYS = 0.5, 0.2, 0.04, "*"
TICK_SECONDS = 0.003
"""The server counts milliseconds of its own clock."""
READ, OWN, WRITE, GONE = "read", "own", "write", "gone"
Record = tuple[str, str, int, float, float, int]
"""Kind, key, version (0: nothing there), began, ended, reader."""


def client_of(kind, server_port, link_port, mode):
    """A client whose commands go to the server, and whose tracking link goes through the proxy."""
    mode, _, grace = mode.partition("+")
    under = (Under(prefix="", grace_seconds=GRACE_SECONDS, early=1.0),) if grace else ()
    options = Options(mode=mode, stale_seconds_max=STALE_SECONDS_MAX, bytes_max=1 << 20, under=under)
    client = kind(port=server_port, socket_timeout=2, retry=None, near=options)
    client.near.link._arguments["port"] = link_port
    return client


def plan(rng, mine):
    """What to do next: a command's word, and a key."""
    if rng.random() < 0.9:
        key = f"k{rng.randrange(KEYS)}"
        return rng.choice(("get", "get", "get", "get", "mget", "pipelined", "hget", "hgetall", "together")), key
    return rng.choice(("set", "px", "eval", "multi", "rename", "mset", "del", "pipe")), rng.choice(mine)


SET_BOTH = "redis.call('set', KEYS[1], ARGV[1]) redis.call('set', ARGV[2], ARGV[1]) return 1"


def written(word, key, version):
    """The commands of a write, and whether they are a transaction."""
    both = [("HSET", f"h{key}", "a", version, "b", version)]
    return {
        "set": ([("SET", key, version), *both], False),
        "px": ([("SET", key, version, "PX", int(EXPIRY_SECONDS * 1000)), *both], False),
        "eval": ([("EVAL", SET_BOTH, 1, key, version, f"other:{key}"), *both], False),
        "multi": ([("SET", key, version), *both], True),
        "rename": ([("SET", f"tmp:{key}", version), ("RENAME", f"tmp:{key}", key), *both], True),
        "mset": ([("MSET", key, version, f"other:{key}", version), *both], False),
        "del": ([("DEL", key, f"h{key}")], False),
        "pipe": ([("SET", key, version), *both], False),
    }[word]


class Life:
    """One thread or task: what it saw."""

    def __init__(self, number, of, seed):
        self.number, self.rng = number, random.Random(seed * 1000 + number)  # noqa: S311  # a seed must replay
        self.mine = [f"k{index}" for index in range(KEYS) if index % of == number]
        self.version, self.records = 0, []

    def saw(self, key, value, began):
        self.records.append((READ, key, int(value or 0), began, NOW(), self.number))

    def wrote(self, word, key, began, ended):
        if word == "del":
            self.records += [(GONE, name, 0, began, ended, self.number) for name in (key, f"h{key}")]
            return
        self.records += [(WRITE, name, self.version, began, ended, self.number) for name in (key, f"h{key}")]
        if word == "px":
            self.records.append((GONE, key, -self.version, began + EXPIRY_SECONDS, ended + EXPIRY_SECONDS, self.number))

    def mark_own(self):
        """The read just made follows an own acknowledged write, which it must show whatever the bound."""
        self.records.append((OWN, *self.records.pop()[1:]))

    def reading(self, word, key):
        """The call of a client that reads, as a name and arguments."""
        return {
            "get": ("get", key),
            "mget": ("mget", [key]),
            "hget": ("hget", f"h{key}", "a"),
            "hgetall": ("hgetall", f"h{key}"),
            "together": ("near_read", [("HGETALL", f"h{key}"), ("GET", key)]),
        }[word]

    def found(self, word, key, reply, began):
        if word == "together":
            for each in reply:
                if isinstance(each, Exception):
                    raise each
            self.found("hgetall", key, reply[0], began)
            self.saw(key, reply[1], began)
        elif word == "mget":
            self.saw(key, reply[0], began)
        elif word == "hgetall":
            assert reply.get(b"a") == reply.get(b"b"), f"torn: {reply}"
            self.saw(f"h{key}", reply.get(b"a"), began)
        else:
            self.saw(f"h{key}" if word == "hget" else key, reply, began)


def live(life, client, operations):
    """Operations, one after another, in a thread."""
    for _ in range(operations):
        word, key = plan(life.rng, life.mine)
        began, ended = NOW(), math.inf
        try:
            if word == "pipelined":
                life.found("get", key, client.pipeline(transaction=False).get(key).execute()[0], began)
            elif word in {"get", "mget", "hget", "hgetall", "together"}:
                name, *args = life.reading(word, key)
                life.found(word, key, getattr(client, name)(*args), began)
            else:
                life.version += 1
                commands, transaction = written(word, key, life.version)
                try:
                    if word in {"multi", "rename", "pipe"}:
                        with client.pipeline(transaction=transaction) as pipe:
                            for command in commands:
                                pipe.execute_command(*command)
                            pipe.execute()
                    else:
                        for command in commands:
                            client.execute_command(*command)
                    ended = NOW()
                finally:
                    life.wrote(word, key, began, ended)
                if word != "px":  # its own writes are seen at once
                    began = NOW()
                    life.saw(key, client.get(key), began)
                    life.mark_own()
        except redis.exceptions.RedisError:
            SystemClock.sleep(0.005)


async def live_async(life, client, operations):
    """Operations, one after another, in a task."""
    for _ in range(operations):
        word, key = plan(life.rng, life.mine)
        began, ended = NOW(), math.inf
        try:
            if word == "pipelined":
                life.found("get", key, (await client.pipeline(transaction=False).get(key).execute())[0], began)
            elif word in {"get", "mget", "hget", "hgetall", "together"}:
                name, *args = life.reading(word, key)
                life.found(word, key, await getattr(client, name)(*args), began)
                await asyncio.sleep(0)
            else:
                life.version += 1
                commands, transaction = written(word, key, life.version)
                try:
                    if word in {"multi", "rename", "pipe"}:
                        async with client.pipeline(transaction=transaction) as pipe:
                            for command in commands:
                                pipe.execute_command(*command)
                            await pipe.execute()
                    else:
                        for command in commands:
                            await client.execute_command(*command)
                    ended = NOW()
                finally:
                    life.wrote(word, key, began, ended)
                if word != "px":
                    began = NOW()
                    life.saw(key, await client.get(key), began)
                    life.mark_own()
        except (redis.exceptions.RedisError, TimeoutError):
            await asyncio.sleep(0.005)


def main(folder, number, of, server_port, link_port, mode, operations, seed):
    """One process: threads, or tasks where its number is odd."""
    lives = [Life(number * THREADS + index, of * THREADS, seed) for index in range(THREADS)]
    if number % 2:

        async def tasks():
            client = client_of(AsyncRedis, server_port, link_port, mode)
            client.near.wait(10)
            await asyncio.gather(*(live_async(life, client, operations) for life in lives))
            await client.aclose()
            return client

        client = asyncio.run(tasks())
    else:
        client = client_of(Redis, server_port, link_port, mode)
        client.near.wait(10)
        threads = [threading.Thread(target=live, args=(life, client, operations)) for life in lives]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    stats, kept = client.near.stats(), client.near.view.cache.stats()
    told = {"hits": kept.hits, "links": stats.links, "lost": stats.lost, "invalidations": stats.invalidations}
    records = [record for life in lives for record in life.records]
    Path(folder, f"{number}.json").write_text(json.dumps({"stats": told, "records": records}))


# -- the checker -------------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What a history shows."""

    reads: int = 0
    writes: int = 0
    stale_seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


class _Times:
    """Spans of time, sorted by when they began."""

    def __init__(self, spans):
        self.spans = sorted(spans)
        self.begins = [began for began, _ in self.spans]
        self.least, self.most = [math.inf], [-math.inf]
        for _, ended in reversed(self.spans):
            self.least.append(min(self.least[-1], ended))
        for _, ended in self.spans:
            self.most.append(max(self.most[-1], ended))
        self.least.reverse()

    def first_end_after(self, time):
        """The earliest end of those that began after `time`."""
        return self.least[bisect_right(self.begins, time)]

    def last_end_before(self, time):
        """The latest end of those that began before `time`."""
        return self.most[bisect_right(self.begins, time)]


class _Key:
    """All that happened to one key. Its versions are written one after another, so they are in order of time."""

    def __init__(self, records):
        self.versions = {version: (began, ended) for kind, _, version, began, ended, _ in records if kind == WRITE}
        gone = [record for record in records if record[0] == GONE]
        self.expires = {-version: ended for _, _, version, _, ended, _ in gone if version < 0}
        self.writes = _Times(self.versions.values())
        self.gone = _Times((began, ended) for _, _, _, began, ended, _ in gone)
        sure = [(began, ended) for _, _, version, began, ended, _ in gone if version == 0]
        self.changes = _Times([*self.versions.values(), *sure])

    def wrong_since(self, version, ended):
        """Since when a read that ended then must not have found this version; 0 is nothing."""
        if version == 0:
            return self.writes.first_end_after(self.gone.last_end_before(ended) + TICK_SECONDS)
        expired = self.expires.get(version, math.inf)
        return min(expired, self.changes.first_end_after(self.versions[version][1] + TICK_SECONDS))


def check(records: Iterable[Record], bound_seconds: float) -> Verdict:
    """Every read against every write: none older than the bound, none from the future or backwards, own ones seen."""
    verdict, by_key, wiped = Verdict(), defaultdict(list), []
    for record in records:
        (wiped if record[1] == ALWAYS else by_key[record[1]]).append(tuple(record))
    for key, own in by_key.items():
        everything = own + [(GONE, key, *wipe[2:]) for wipe in wiped]
        known = _Key(everything)
        verdict.writes += len(known.versions)
        newest: dict[int, int] = {}
        for kind, _, version, began, ended, reader in sorted(own, key=lambda record: record[4]):
            if kind not in {READ, OWN}:
                continue
            verdict.reads += 1
            _check_read(verdict, known, key, (kind, version, began, ended), bound_seconds)
            if 0 < version < newest.get(reader, 0):
                verdict.faults.append(f"{key}: reader {reader} saw {newest[reader]}, then {version}")
            newest[reader] = max(newest.get(reader, 0), version)
    return verdict


def _check_read(verdict, known, key, read, bound_seconds):
    kind, version, began, ended = read
    if version and (version not in known.versions or known.versions[version][0] > ended):
        verdict.faults.append(f"{key}: {version} was read before it was written")
        return
    stale = began - known.wrong_since(version, ended) - TICK_SECONDS
    verdict.stale_seconds = max(verdict.stale_seconds, stale)
    if stale > (0.0 if kind == OWN else bound_seconds):
        verdict.faults.append(f"{key}: {version} was {stale:.3f} s stale ({kind})")


if __name__ == "__main__":
    folder_, *numbers = sys.argv[1:]
    number_, of_, server_, link_, mode_, operations_, seed_ = numbers
    main(folder_, int(number_), int(of_), int(server_), int(link_), mode_, int(operations_), int(seed_))
