"""The client of redis-py and ours, side by side on one server: the same commands give the same results and errors."""

from __future__ import annotations

import asyncio

import pytest
import redis
import redis.asyncio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from thermocline.near.options import Options
from thermocline.near.redis import Redis
from thermocline.near.redis_async import AsyncRedis

KEYS = st.sampled_from(["a", b"a", "b", "ü", 7, b"\xff"])
FIELDS = st.sampled_from(["f", b"g", 1, "ü"])
VALUES = st.sampled_from(["1", "x", b"y" * 300, "", "ünicode", 5, b"0123456789"])
PLACES = st.integers(-12, 12)
READS = st.one_of(
    st.tuples(st.just("get"), KEYS),
    st.tuples(st.just("mget"), st.lists(KEYS, max_size=4)),
    st.tuples(st.just("exists"), KEYS),
    st.tuples(st.just("exists"), KEYS, KEYS),
    st.tuples(st.just("strlen"), KEYS),
    st.tuples(st.just("getrange"), KEYS, PLACES, PLACES),
    st.tuples(st.just("hget"), KEYS, FIELDS),
    st.tuples(st.just("hmget"), KEYS, st.lists(FIELDS, min_size=1, max_size=3)),
    st.tuples(st.just("hgetall"), KEYS),
    st.tuples(st.just("lrange"), KEYS, st.just(0), st.just(-1)),
    st.tuples(st.just("lrange"), KEYS, PLACES, PLACES),
    st.tuples(st.just("ttl"), KEYS),
    st.tuples(st.just("pttl"), KEYS),
)
WRITES = st.one_of(
    st.tuples(st.just("set"), KEYS, VALUES),
    st.tuples(st.just("execute_command"), st.just("SETEX"), KEYS, st.just(100), VALUES),
    st.tuples(st.just("append"), KEYS, VALUES),
    st.tuples(st.just("hset"), KEYS, FIELDS, VALUES),
    st.tuples(st.just("hdel"), KEYS, FIELDS),
    st.tuples(st.just("rpush"), KEYS, VALUES),
    st.tuples(st.just("lpop"), KEYS),
    st.tuples(st.just("delete"), KEYS),
    st.tuples(st.just("rename"), KEYS, KEYS),
    st.tuples(st.just("copy"), KEYS, KEYS),
    st.tuples(st.just("expire"), KEYS, st.just(50)),
    st.tuples(st.just("persist"), KEYS),
    st.tuples(st.just("incr"), KEYS),
    st.tuples(st.just("getdel"), KEYS),
    st.tuples(st.just("flushdb")),
    st.tuples(st.just("eval"), st.just("return redis.call('set', ARGV[1], 'script')"), st.just(0), KEYS),
    st.tuples(st.just("execute_command"), st.just("set"), KEYS, VALUES),
    st.tuples(st.just("execute_command"), st.just(b"GET"), KEYS),
    st.tuples(st.just("execute_command"), st.just("GET")),
    st.tuples(st.just("get"), st.just([1])),
    st.tuples(st.just("get"), st.booleans()),
    st.tuples(st.just("sort"), KEYS),
)
BATCHES = st.tuples(st.just("batch"), st.booleans(), st.lists(st.one_of(READS, WRITES), max_size=4))
COMMANDS = st.lists(st.one_of(READS, READS, WRITES, BATCHES), min_size=10, max_size=40)
SETUPS = [
    pytest.param({"decode_responses": False, "protocol": 2}, id="bytes-RESP2"),
    pytest.param({"decode_responses": True, "protocol": 2}, id="text-RESP2"),
    pytest.param({"decode_responses": False, "protocol": 3}, id="bytes-RESP3"),
    pytest.param({"decode_responses": True, "protocol": 3, "legacy_responses": False}, id="text-RESP3-unified"),
]
READING = {"get", "mget", "exists", "strlen", "getrange", "hget", "hmget", "hgetall", "lrange", "ttl", "pttl"}
EXAMPLES = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def again(command):
    """How often to run a command: one that reads, also when memory has it, unless it was invalidated meanwhile."""
    return range(3 if command[0] in READING else 1)


def same(ours, theirs, command):
    """Equal in type and value; what is left of a time to live may differ by what lies between two questions."""
    if command[0] in {"ttl", "pttl"} and isinstance(theirs, int) and theirs > 0:
        return isinstance(ours, int) and abs(ours - theirs) <= (1 if command[0] == "ttl" else 2000)
    if isinstance(ours, list) and command[0] == "batch" and len(ours) == len(theirs):
        return all(map(same, ours, theirs, command[2]))
    return repr(ours) == repr(theirs)


def outcome(call):
    """What a command gives, or the error that it raises."""
    try:
        return call()
    except (redis.RedisError, UnicodeError) as error:
        return type(error), str(error)


def run(client, command):
    """One command, or some in a pipeline."""
    name, *args = command
    if name != "batch":
        return outcome(lambda: getattr(client, name)(*args))
    with client.pipeline(transaction=args[0]) as pipe:

        def all_of_them():
            for each, *words in args[1]:
                getattr(pipe, each)(*words)
            return pipe.execute(raise_on_error=False)

        replies = outcome(all_of_them)
    return [repr(reply) if isinstance(reply, Exception) else reply for reply in replies]


async def run_async(client, command):
    """The same, awaited."""
    name, *args = command
    try:
        if name != "batch":
            return await getattr(client, name)(*args)
        async with client.pipeline(transaction=args[0]) as pipe:
            for each, *words in args[1]:
                getattr(pipe, each)(*words)
            replies = await pipe.execute(raise_on_error=False)
        return [repr(reply) if isinstance(reply, Exception) else reply for reply in replies]
    except (redis.RedisError, UnicodeError) as error:
        return [type(error), str(error)] if name == "batch" else (type(error), str(error))


@pytest.fixture(params=["bcast", "default"])
def mode(request):
    return request.param


@pytest.mark.parametrize("setup", SETUPS)
def test_every_command_gives_what_redis_py_gives(setup, mode, redis_server):
    """Results, their types and errors are the plain client's, after any commands, for all settings of replies."""
    ours = Redis(port=redis_server.port, near=Options(mode=mode), **setup)
    other = redis.Redis(port=redis_server.port, db=1, **setup)
    assert ours.near.wait()

    @EXAMPLES
    @given(COMMANDS)
    def alike(commands):
        ours.flushall()
        for command in commands:
            for _ in again(command):
                mine, theirs = run(ours, command), run(other, command)
                assert same(mine, theirs, command), f"{command}: {mine!r}, not {theirs!r}"

    alike()
    assert ours.near.view.cache.stats().hits > 50
    ours.close()
    other.close()


@pytest.mark.parametrize("setup", SETUPS[:2])
def test_every_command_gives_what_redis_py_gives_in_asyncio(setup, redis_server):
    """The same for the asyncio client."""
    with asyncio.Runner() as runner:
        ours = AsyncRedis(port=redis_server.port, **setup)
        other = redis.asyncio.Redis(port=redis_server.port, db=1, **setup)
        assert ours.near.wait()

        async def both(commands):
            await ours.flushall()
            for command in commands:
                for _ in again(command):
                    mine, theirs = await run_async(ours, command), await run_async(other, command)
                    assert same(mine, theirs, command), f"{command}: {mine!r}, not {theirs!r}"

        @EXAMPLES
        @given(COMMANDS)
        def alike(commands):
            runner.run(both(commands))

        alike()
        assert ours.near.view.cache.stats().hits > 50
        runner.run(ours.aclose())
        runner.run(other.aclose())
