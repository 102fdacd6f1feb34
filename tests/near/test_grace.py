"""Under a prefix with a grace: the old value now, the new one soon, within the stated bound, and own writes at once."""

from __future__ import annotations

import asyncio
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from tests.faults.process import CLOCK
from tests.faults.proxy import Proxy
from tests.faults.redis_server import RedisServer
from thermocline.clock import ManualClock, until
from thermocline.errors import SettingsError
from thermocline.near.cache import REFRESHES_MAX, Cache
from thermocline.near.coherence import Fetch, View
from thermocline.near.options import Options, Under
from thermocline.near.redis import Redis
from thermocline.near.redis_async import AsyncRedis

LONG = Options(under=(Under(prefix="soft:", grace_seconds=30.0),))


@pytest.fixture
def other(redis_server):
    """Another process's client, as far as ours can tell. The server is empty."""
    with redis.Redis(port=redis_server.port) as client:
        client.flushall()
        yield client


@pytest.fixture
def client(redis_server, other):
    with Redis(port=redis_server.port, near=LONG) as client:
        assert client.near.wait()
        yield client


def eventually(true):
    assert until(true, 5, pause_seconds=0.001)


def told(client):
    """Wait until the link has told all that has happened so far."""
    assert client.near.link.ask("PING").result(5)


def test_the_old_value_now_and_the_new_one_soon(client, other):
    """After a change elsewhere the next read is answered at once with the old value, and fetches the new one beside."""
    other.set("soft:k", "1")
    other.set("hard:k", "1")
    told(client)
    assert client.mget("soft:k", "hard:k") == [b"1", b"1"]
    other.mset({"soft:k": "2", "hard:k": "2"})
    told(client)
    assert client.get("hard:k") == b"2"
    fetches = client.near.stats().fetches
    assert client.get("soft:k") == b"1"
    eventually(lambda: client.get("soft:k") == b"2")
    assert client.near.stats().fetches - fetches == 1


def test_a_hash_and_a_list_are_fetched_whole_again(client, other):
    """The background reads all that was known of the key, so that what was served from memory still is."""
    other.hset("soft:h", mapping={"f": "1", "g": "1"})
    other.rpush("soft:l", "a")
    told(client)
    client.hgetall("soft:h"), client.lrange("soft:l", 0, -1)
    other.hset("soft:h", mapping={"f": "2", "g": "2"})
    other.rpush("soft:l", "b")
    told(client)
    assert (client.hget("soft:h", "f"), client.lrange("soft:l", 0, -1)) == (b"1", [b"a"])
    eventually(lambda: client.lrange("soft:l", 0, -1) == [b"a", b"b"])
    eventually(lambda: client.hget("soft:h", "f") == b"2")
    fetches = client.near.stats().fetches
    assert client.hgetall("soft:h") == {b"f": b"2", b"g": b"2"}
    assert client.near.stats().fetches == fetches


def test_nothing_is_older_than_the_bound(redis_server, other):
    """However often a key changes, and though no refresh gets through, no value is older than the stated bound."""
    with Proxy(("127.0.0.1", redis_server.port)) as proxy:
        options = Options(stale_seconds_max=0.2, under=(Under(prefix="k", grace_seconds=0.2),))
        client = Redis(port=proxy.address[1], near=options, socket_timeout=0.3, retry=None)
        client.near.link._arguments["port"] = redis_server.port
        assert client.near.wait()
        other.set("k", 0)
        assert client.get("k") == b"0"
        written, stop, version, late = {0: CLOCK.now()}, CLOCK.now() + 2.0, 0, 0.0
        while CLOCK.now() < stop:
            version += 1
            other.set("k", version)
            written[version] = CLOCK.now()
            began = CLOCK.now()
            (proxy.freeze if version % 40 == 20 else proxy.thaw if version % 40 == 0 else lambda: None)()
            try:
                seen = int(client.get("k"))
            except redis.RedisError:
                continue
            late = max(late, began - written.get(seen + 1, math.inf))
        assert late <= 0.4
        proxy.thaw()
        client.close()


def test_own_writes_are_seen_at_once(client, other):
    """No grace lies between a write of this client and its next read, whatever did it, also on a key that is old."""
    ways = [
        lambda value: client.set("soft:k", value),
        lambda value: client.eval("return redis.call('set', 'soft:k', ARGV[1])", 0, value),
        lambda value: client.pipeline().set("soft:k", value).execute(),
        lambda value: client.rename("soft:t", "soft:k"),
    ]
    for value in range(40):
        other.set("soft:t", value)
        other.set("soft:k", "old")
        told(client)
        client.get("soft:k")
        other.set("soft:k", "older")
        told(client)
        assert client.get("soft:k") in {b"old", b"older", b"%d" % max(0, value - 1)}
        ways[value % len(ways)](value)
        assert int(client.get("soft:k")) == value


def test_a_pipeline_that_saw_the_new_value_ends_the_grace(client, other):
    """After a read past memory showed the new value, memory does not show the old one again."""
    for read in (
        lambda: client.pipeline(transaction=False).get("soft:k").execute()[0],
        lambda: client.getrange(b"soft:k", 0, 0) and client.pipeline().strlen("soft:k").get("soft:k").execute()[1],
    ):
        other.set("soft:k", "1")
        told(client)
        client.delete("soft:k")
        other.set("soft:k", "1")
        told(client)
        assert client.get("soft:k") == b"1"
        other.set("soft:k", "2")
        told(client)
        assert read() == b"2"
        assert client.get("soft:k") == b"2"


def test_what_is_gone_is_gone_after_the_grace(redis_server, other):
    """A key that was deleted, or has ended, is served for its grace at most; that none exists has no grace."""
    options = Options(under=(Under(prefix="", grace_seconds=0.3),))
    with Redis(port=redis_server.port, near=options) as client:
        assert client.near.wait()
        other.set("k", "1", px=100)
        began = CLOCK.now()
        told(client)
        assert client.get("k") == b"1"
        while client.get("k") is not None:
            assert CLOCK.now() - began < 0.5
        assert client.get("new") is None
        other.set("new", "1")
        told(client)
        assert client.get("new") == b"1"


def test_a_refresh_that_fails_fails_nobody(client, other):
    """The old value serves to the end of its grace, the failure is counted, and then the reader sees the error."""
    other.set("soft:k", "1")
    told(client)
    assert client.get("soft:k") == b"1"
    with other.pipeline() as pipe:
        pipe.delete("soft:k").hset("soft:k", "f", "1").execute()
    told(client)
    assert client.get("soft:k") == b"1"
    eventually(lambda: client.near.stats().refreshes_failed == 1)
    assert client.get("soft:k") == b"1"
    assert client.near.stats().refreshes_failed == 1  # the next one waits
    client.near.view.drop(["soft:k"])
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        client.get("soft:k")


def test_many_readers_of_old_values_start_few_refreshes(client, other):
    """However many keys are old and read at once, eight fetches at most go on in the background, and no read fails."""
    keys = [f"soft:{number}" for number in range(200)]
    other.mset(dict.fromkeys(keys, "1"))
    told(client)
    assert set(client.mget(keys)) == {b"1"}
    other.mset(dict.fromkeys(keys, "2"))
    told(client)
    most: list[int] = []

    def read(key):
        value = client.get(key)
        most.append(sum(thread.name == "near-refresh" for thread in threading.enumerate()))
        return value

    with ThreadPoolExecutor(16) as threads:
        seen = set(threads.map(read, keys * 5))
    assert seen <= {b"1", b"2"}
    assert max(most) <= 2 * REFRESHES_MAX  # one that has just ended is still a thread
    eventually(lambda: {client.get(key) for key in keys} == {b"2"})
    assert client.near.stats().refreshes_failed == 0


def test_a_server_that_dies_takes_what_is_old_with_it(folder):
    """Without the link nothing is served from memory, old or not: the error is the server's, and it ends with it."""
    with (
        RedisServer(folder) as server,
        redis.Redis(port=server.port) as other,
        Redis(port=server.port, near=LONG, retry=None) as client,
    ):
        assert client.near.wait()
        other.set("soft:k", "1")
        told(client)
        assert client.get("soft:k") == b"1"
        other.set("soft:k", "2")
        server.restart()
        eventually(lambda: client.near.stats().lost == 1)
        assert client.near.wait(10)
        assert client.get("soft:k") is None


def test_tasks_get_the_old_value_too(redis_server, other):
    """In asyncio the same: old at once, new soon; a client that is closed leaves no task behind."""

    async def lived():
        async with AsyncRedis(port=redis_server.port, near=LONG) as client:
            assert await asyncio.to_thread(client.near.wait)
            other.set("soft:k", "1")
            await asyncio.to_thread(told, client)
            assert await client.get("soft:k") == b"1"
            other.set("soft:k", "2")
            await asyncio.to_thread(told, client)
            first = await asyncio.gather(*(client.get("soft:k") for _ in range(20)))
            async with asyncio.timeout(5):
                while await client.get("soft:k") != b"2":
                    await asyncio.to_thread(told, client)
            second = await client.get("soft:k")
            other.set("soft:k", "3")
            await asyncio.to_thread(told, client)
            await client.get("soft:k")  # a refresh is under way as the client is closed
        return set(first), second, len(asyncio.all_tasks())

    first, second, tasks = asyncio.run(lived())
    assert first <= {b"1", b"2"}
    assert b"1" in first
    assert second == b"2"
    assert tasks <= 2


def test_a_client_with_one_connection_waits_for_what_is_new(redis_server, other):
    """Where there is no second connection nothing is fetched beside: the reader fetches it."""
    with Redis(port=redis_server.port, single_connection_client=True, near=LONG) as client:
        assert client.near.wait()
        other.set("soft:k", "1")
        told(client)
        assert client.get("soft:k") == b"1"
        other.set("soft:k", "2")
        told(client)
        assert client.get("soft:k") == b"2"


def fetched(steps, replies, clock, seconds):
    """What a command gives, when its fetch takes so long."""
    step = next(steps)
    try:
        while True:
            assert isinstance(step, Fetch)
            clock.seconds += seconds
            step = steps.send(replies)
    except StopIteration as end:
        return end.value


@pytest.mark.parametrize(("chance", "sooner"), [(0.0, 0.0), (0.5, 0.02 * math.log(2)), (1 - math.exp(-4), 0.08)])
def test_early_is_before_the_end_by_the_time_of_the_fetch(chance, sooner):
    """A value is replaced before max_age_seconds by -log(chance) times its fetch; never before the server's own end."""
    clock = ManualClock(100.0)
    options = Options(max_age_seconds=50.0, under=(Under(prefix="e:", early=1.0), Under(prefix="e:not")))
    view = View(options, clock, lambda *_: None, encoding="utf-8", decodes=False, chance=lambda: chance)
    view.lease.until = math.inf
    for name, age_ms, early in (("e:k", -1, sooner), ("e:ends", 20_000, None), ("e:not", -1, 0.0)):
        now = clock.now()
        assert fetched(view.read(("GET", name), view.flights), [age_ms, b"v"], clock, 0.02) == b"v"
        entry = view.cache.entries[name]
        ends = now + 20.0 if early is None else clock.now() + 50.0
        assert entry.deadline == pytest.approx(ends - (early or 0.0))
        assert entry.gone_at == pytest.approx(ends)


def test_negative_entries_have_an_age_of_their_prefix(redis_server, other):
    """That a key does not exist is remembered as long as its prefix says."""
    clock = ManualClock(0.0)
    options = Options(negative_seconds=10.0, under=(Under(prefix="n:", negative_seconds=60.0),))
    view = View(options, clock, lambda *_: None, encoding="utf-8", decodes=False)
    view.lease.until = math.inf
    for name, seconds in (("n:k", 60.0), ("k", 10.0)):
        fetched(view.read(("GET", name), view.flights), [-2, None], clock, 0.0)
        assert view.cache.entries[name].gone_at == seconds


def test_what_is_old_goes_at_the_end_of_its_first_grace():
    """Made old again, an entry does not live longer; its place is free when its grace is over."""
    clock = ManualClock(0.0)
    cache = Cache(10_000, clock=clock)
    cache.put("k", b"v", ttl_seconds=100.0)
    generation = cache.generation("k")
    cache.make_old("k", 5.0)
    assert cache.get("k") is None
    assert not cache.put("k", b"w", generation=generation)
    clock.seconds = 4.0
    cache.make_old("k", 5.0)
    assert cache.entries["k"].gone_at == 5.0
    clock.seconds = 5.0
    cache.put("other", b"v")
    assert list(cache.entries) == ["other"]


def test_graces_that_cannot_be_are_refused():
    """Less than nothing is an error with a hint."""
    for wrong in ({"grace_seconds": -1.0}, {"early": -1.0}, {"negative_seconds": 0.0}):
        with pytest.raises(SettingsError) as caught:
            Under(prefix="a", **wrong)
        assert caught.value.hint
