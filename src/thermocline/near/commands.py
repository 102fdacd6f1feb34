"""What a Redis command reads and writes, by name: which are served from memory, and what must be forgotten for others.

The tables are those of Redis 7 (its own answer to COMMAND is what the tests compare them with). A command that stands
nowhere here, a script, a module's, one of a later server, may have written anything: after it the tracking link is
asked whether it has told all. So a gap in these tables costs a round trip, and never a stale value.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass

Args = Sequence[object]
"""A command as redis-py sends it: its name, which may be two words in one text, and its arguments."""


class Kind(enum.Enum):
    """What a command means to values held in memory."""

    LOCAL = "may be answered from memory"
    NOTHING = "changes no key"
    KEYS = "changes the keys at known places"
    ALL = "changes every key, and is not always announced"
    UNKNOWN = "may change any key"
    HOLD = "from here on replies are no values: nothing is served from memory"
    RELEASE = "the end of that; may have changed any key"
    ELSEWHERE = "from here on this client's keys may be other keys: nothing is served from memory any more"


WRITING = {Kind.KEYS, Kind.ALL, Kind.UNKNOWN, Kind.RELEASE}
"""Kinds of what may change a key."""


@dataclass(frozen=True, slots=True)
class Effect:
    """A kind, and for KEYS the places of keys as the server counts them: first, last (negative: from the end), step."""

    kind: Kind
    first: int = 0
    last: int = 0
    step: int = 1

    def keys(self, args: Args) -> Args:
        """The keys that a command changes."""
        return args[self.first : len(args) + self.last + 1 if self.last < 0 else self.last + 1 : self.step]


LOCAL = "GET MGET EXISTS STRLEN GETRANGE HGET HMGET HGETALL LRANGE TTL PTTL"
READS = """
BITCOUNT BITFIELD_RO BITPOS DBSIZE DUMP EVALSHA_RO EVAL_RO EXPIRETIME FCALL_RO GEODIST GEOHASH GEOPOS
GEORADIUSBYMEMBER_RO GEORADIUS_RO GEOSEARCH GETBIT HEXISTS HEXPIRETIME HKEYS HLEN HPEXPIRETIME HPTTL HRANDFIELD HSCAN
HSTRLEN HTTL HVALS KEYS LCS LINDEX LLEN LOLWUT LPOS PEXPIRETIME RANDOMKEY SCAN SCARD SDIFF SINTER SINTERCARD
SISMEMBER SMEMBERS SMISMEMBER SORT_RO SRANDMEMBER SSCAN SUBSTR SUNION TOUCH TYPE XLEN XPENDING XRANGE XREAD XREVRANGE
ZCARD ZCOUNT ZDIFF ZINTER ZINTERCARD ZLEXCOUNT ZMSCORE ZRANDMEMBER ZRANGE ZRANGEBYLEX ZRANGEBYSCORE ZRANK ZREVRANGE
ZREVRANGEBYLEX ZREVRANGEBYSCORE ZREVRANK ZSCAN ZSCORE ZUNION
ACL ASKING BGREWRITEAOF BGSAVE CLIENT CLUSTER COMMAND CONFIG ECHO HELLO INFO LASTSAVE LATENCY MEMORY MONITOR OBJECT PING
PSUBSCRIBE PUBLISH PUBSUB PUNSUBSCRIBE QUIT READONLY READWRITE ROLE SAVE SCRIPT SHUTDOWN SLOWLOG SPUBLISH SSUBSCRIBE
SUBSCRIBE SUNSUBSCRIBE TIME UNSUBSCRIBE WAIT XINFO FT.AGGREGATE FT.INFO FT.SEARCH JSON.GET JSON.MGET JSON.TYPE
"""
WRITES = {
    (1, 1, 1): """
APPEND BITFIELD DECR DECRBY EXPIRE EXPIREAT GEOADD GETDEL GETEX GETSET HDEL HEXPIRE HEXPIREAT HGETDEL HGETEX HINCRBY
HINCRBYFLOAT HMSET HPERSIST HPEXPIRE HPEXPIREAT HSET HSETEX HSETNX INCR INCRBY INCRBYFLOAT LINSERT LPOP LPUSH LPUSHX
LREM LSET LTRIM MOVE PERSIST PEXPIRE PEXPIREAT PFADD PSETEX RESTORE RESTORE-ASKING RPOP RPUSH RPUSHX SADD SET SETBIT
SETEX SETNX SETRANGE SPOP SREM XACK XADD XAUTOCLAIM XCLAIM XDEL XSETID XTRIM ZADD ZDIFFSTORE ZINCRBY ZINTERSTORE
ZPOPMAX ZPOPMIN ZREM ZREMRANGEBYLEX ZREMRANGEBYRANK ZREMRANGEBYSCORE ZUNIONSTORE
""",
    (1, -1, 1): "DEL PFCOUNT PFMERGE SDIFFSTORE SINTERSTORE SUNIONSTORE UNLINK",  # PFCOUNT notes its count in the key
    (1, -1, 2): "MSET MSETNX",
    (1, -2, 1): "BLPOP BRPOP BZPOPMAX BZPOPMIN",
    (1, 2, 1): "BLMOVE BRPOPLPUSH COPY GEOSEARCHSTORE LMOVE RENAME RENAMENX RPOPLPUSH SMOVE ZRANGESTORE",
    (2, -1, 1): "BITOP",
}
OTHERS = {
    Kind.LOCAL: LOCAL,
    Kind.NOTHING: READS,
    Kind.ALL: "FLUSHALL FLUSHDB SWAPDB",
    Kind.HOLD: "MULTI WATCH",
    Kind.RELEASE: "EXEC DISCARD UNWATCH",
    Kind.ELSEWHERE: "SELECT AUTH RESET",
}
EFFECTS = {name: Effect(kind) for kind, names in OTHERS.items() for name in names.split()} | {
    name: Effect(Kind.KEYS, *places) for places, names in WRITES.items() for name in names.split()
}
UNKNOWN = Effect(Kind.UNKNOWN)


def effect(args: Args) -> Effect:
    """What a command means to memory. A name may be text or bytes, of any case, with its second word or without."""
    name = args[0]
    found = EFFECTS.get(name) if isinstance(name, str) else None
    if found is not None:
        return found
    text = name.decode("latin-1") if isinstance(name, bytes) else str(name)
    words = text.upper().split()
    found = EFFECTS.get(words[0], UNKNOWN) if words else UNKNOWN
    if len(words) > 1 and found.kind is not Kind.NOTHING:  # its keys stand elsewhere
        return UNKNOWN
    return Effect(Kind.NOTHING) if found.kind is Kind.LOCAL else found
