"""Every command beside a real redis-server: the same replies, of the same types, and the same errors."""

from __future__ import annotations

import contextlib
import re

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.redis_server import RedisServer
from tests.near.serving import NearServer, Wire

KEYS = st.sampled_from(["a", "b", "c", "list", "hash", "set", "zset", "none"])
TEXTS = st.sampled_from(
    ["", "x", "yy", "10", "-3", "007", "3.5", "1e3", "inf", "a b\r\n", "9223372036854775807", "é", "z" * 50]
)
NUMBERS = st.one_of(
    st.integers(-5, 5).map(str), st.sampled_from(["9223372036854775807", "-9223372036854775808", "x", "1.5", ""])
)
SCORES = st.sampled_from(["0", "1", "-1", "2.5", "inf", "-inf", "1e10", "nan", "x"])
SECONDS = st.sampled_from(["100", "1000", "0", "-1", "x", "99999999999999999"])
ENDS = st.sampled_from(
    [
        [],
        ["EX", "100"],
        ["PX", "100000"],
        ["KEEPTTL"],
        ["EX", "0"],
        ["EX"],
        ["NO"],
        ["EX", "5", "PX", "5"],
    ]
)
CONDITIONS = st.lists(st.sampled_from(["NX", "XX", "GET"]), max_size=2)


def _command(name, *parts):
    return st.tuples(st.just(name), *parts).map(
        lambda words: [part for word in words for part in (word if isinstance(word, list) else [word])]
    )


def _some(strategy, least=1, most=3):
    return st.lists(strategy, min_size=least, max_size=most)


PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3).map(
    lambda pairs: [part for pair in pairs for part in pair]
)
KEY_PAIRS = st.lists(st.tuples(KEYS, TEXTS), min_size=1, max_size=3).map(
    lambda pairs: [part for pair in pairs for part in pair]
)
SCORED = st.lists(st.tuples(SCORES, TEXTS), min_size=1, max_size=3).map(
    lambda pairs: [part for pair in pairs for part in pair]
)

COMMANDS = st.one_of(
    _command("SET", KEYS, TEXTS, ENDS, CONDITIONS),
    _command("GETEX", KEYS, st.one_of(ENDS, st.just(["PERSIST"]))),
    _command("APPEND", KEYS, TEXTS),
    *(_command(name, KEYS) for name in ("GET", "GETDEL", "STRLEN", "TYPE", "PERSIST", "INCR", "DECR", "HGETALL")),
    *(_command(name, KEYS) for name in ("HLEN", "LLEN", "SMEMBERS", "SCARD", "ZCARD")),
    *(_command(name, _some(KEYS)) for name in ("DEL", "UNLINK", "EXISTS", "MGET")),
    *(_command(name, KEYS, NUMBERS) for name in ("INCRBY", "DECRBY", "LPOP", "RPOP", "ZPOPMIN")),
    _command("MSET", KEY_PAIRS),
    *(_command(name, KEYS, NUMBERS, NUMBERS) for name in ("GETRANGE", "LRANGE", "LTRIM")),
    _command("SETEX", KEYS, SECONDS, TEXTS),
    *(_command(name, KEYS, SECONDS) for name in ("EXPIRE", "PEXPIRE")),
    _command("RENAME", KEYS, KEYS),
    _command("HSET", KEYS, PAIRS),
    *(_command(name, KEYS, TEXTS) for name in ("HGET", "HEXISTS", "SISMEMBER", "ZSCORE")),
    *(_command(name, KEYS, _some(TEXTS)) for name in ("HMGET", "HDEL", "LPUSH", "RPUSH", "SADD", "SREM", "ZREM")),
    _command("HINCRBY", KEYS, TEXTS, NUMBERS),
    _command("SPOP", KEYS, st.just("100")),
    _command("ZADD", KEYS, SCORED),
    _command("KEYS", st.sampled_from(["*", "?", "[ab]*", "*s*t", "[^a-c]*", "\\a", "l*", "[a-]*", "*[a"])),
    st.sampled_from(
        [
            ["DBSIZE"],
            ["FLUSHALL"],
            ["GET"],
            ["SET", "a"],
            ["NOSUCH", "x"],
            ["MULTI"],
            ["EXEC"],
            ["DISCARD"],
            ["PING", "x"],
            ["ECHO", "x"],
            ["SELECT", "0"],
            ["UNWATCH"],
            ["WATCH", "a"],
        ]
    ),
)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    with RedisServer(folder, databases="1") as real, NearServer(folder) as ours:
        yield real.port, ours.port


def _reply(client, words):
    try:
        found = client.execute_command(*words)
    except redis.RedisError as error:
        return type(error).__name__, re.sub(r" \(hint: .*", "", str(error))
    except (ValueError, TypeError, AttributeError, IndexError):
        return "QUEUED", "what redis-py cannot read as that command's reply"
    if words[0] in {"SMEMBERS", "SPOP", "KEYS"} and isinstance(found, list | set):
        return type(found).__name__, sorted(found)
    return type(found).__name__, found


@pytest.mark.slow
@pytest.mark.parametrize("protocol", [2, 3])
def test_the_same_replies_as_redis(both, protocol):
    """Any sequence of commands has the replies, types and errors of a real server, in RESP2 and in RESP3."""
    clients = [redis.Redis(port=port, protocol=protocol, single_connection_client=True) for port in both]

    @settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(COMMANDS, min_size=1, max_size=25))
    def holds(commands):
        for client in clients:
            with contextlib.suppress(redis.ResponseError):
                client.execute_command("DISCARD")
            client.execute_command("UNWATCH")
            client.execute_command("HELLO", protocol)
            client.execute_command("FLUSHALL")
        for words in commands:
            theirs, ours = (_reply(client, words) for client in clients)
            assert ours == theirs, words

    try:
        holds()
    finally:
        for client in clients:
            client.close()


SCRIPT = """
SET a 1|GET a|GET none|SET a x GET|HSET h f v g w|HGETALL h|HGET h none|HMGET h f none|LPUSH l a b c|LRANGE l 0 -1
LPOP l 2|LPOP none 2|LPOP none|SADD s a|SMEMBERS s|SPOP s|SPOP s 2|ZADD z 1.5 a 2 b|ZSCORE z a|ZPOPMIN z
ZPOPMIN z 1|ZPOPMIN none|TTL a|TYPE a|TYPE none|MGET a none|EXISTS a a|PING|PING x|ECHO x
MULTI|GET a|NOSUCH|EXEC|MULTI|GET a|INCR a|EXEC|WATCH a|SET a 2|MULTI|GET a|EXEC|GET|CONFIG GET save|SETEX a 0 x
CLIENT SETNAME me|SELECT 1|EXPIRE a 100|PTTL none|RENAME none b|GETDEL a|SCAN 0 COUNT 100 MATCH zz
CLIENT TRACKING ON PREFIX a|CLIENT NOSUCH|SUBSCRIBE c|UNSUBSCRIBE c|UNSUBSCRIBE|CLIENT
"""


@pytest.mark.parametrize("protocol", [2, 3])
def test_the_same_bytes_as_redis(both, protocol):
    """A status is a status, a map a map, and what is not there is not there in the same way."""
    with Wire(both[0]) as theirs, Wire(both[1]) as ours:
        for wire in (theirs, ours):
            wire.ask("HELLO", protocol)
            wire.ask("FLUSHALL")
        for words in [line.split() for line in SCRIPT.replace("\n", "|").split("|") if line]:
            assert _rough(ours.ask(*words), words) == _rough(theirs.ask(*words), words), words


def _rough(reply, words):
    """Which member is taken first differs."""
    if words[0] == "SPOP":
        return reply[0]
    return reply
