"""The client: constructed like redis-py's, own writes always seen, one fetch for a herd, afresh after a fork."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis
import redis.asyncio

from tests.faults.process import CLOCK
from thermocline.clock import until
from thermocline.errors import SettingsError
from thermocline.near.options import Options
from thermocline.near.redis import Redis
from thermocline.near.redis_async import AsyncRedis


@pytest.fixture
def other(redis_server):
    """Another process's client, as far as ours can tell. The server is empty."""
    with redis.Redis(port=redis_server.port) as client:
        client.flushall()
        yield client


@pytest.fixture(params=["bcast", "default"])
def client(request, redis_server, other):
    with Redis(port=redis_server.port, near=Options(mode=request.param)) as client:
        assert client.near.wait()
        yield client


def calls(other, name):
    """How often the server did a command."""
    return other.info("commandstats").get(f"cmdstat_{name}", {"calls": 0})["calls"]


def told(client):
    """Wait until the link has told all that has happened so far."""
    assert client.near.link.ask("PING").result(5)


def eventually(true):
    assert until(true, 5, pause_seconds=0.001)


def test_it_is_redis_pys_client(redis_server, other):
    """Every way to construct redis-py's client makes ours; a subclass may override what it likes."""
    url = redis_server.url
    pool = redis.ConnectionPool.from_url(url)
    made = [
        Redis(port=redis_server.port),
        Redis.from_url(url, near=Options(prefixes=("a",))),
        Redis(connection_pool=pool),
    ]
    made += [Redis.from_pool(pool), made[0].client(), Redis(unix_socket_path=str(redis_server.socket_path))]
    for client in made:
        assert isinstance(client, redis.Redis)
        client.set("a", "1")
        assert client.near.wait()
        assert [client.get("a") for _ in range(3)] == [b"1"] * 3
        assert client.near.view.cache.stats().hits > 0

    class Louder(Redis):
        def get(self, name):
            return super().get(name) + b"!"

    made.append(Louder(port=redis_server.port))
    assert [made[-1].get("a") for _ in range(2)] == [b"1!"] * 2
    for client in made:
        client.close()
    assert made[0].get("a") == b"1"  # a closed client connects again, as redis-py's does
    made[0].close()


def test_hits_ask_nothing_of_the_server(client, other):
    """What memory holds is served without a command: each read that may be local, once fetched."""
    other.set("s", "0123456789")
    other.hset("h", mapping={"f": "1", "g": "2"})
    other.rpush("l", "a", "b", "c")
    told(client)
    reads = [
        lambda: client.get("s"),
        lambda: client.mget("s", "none"),
        lambda: client.exists("s", "none"),
        lambda: (client.strlen("s"), client.getrange("s", 2, -3)),
        lambda: (client.hgetall("h"), client.hget("h", "f"), client.hmget("h", ["g", "x"])),
        lambda: client.lrange("l", 0, -1),
        lambda: (client.lrange("l", 1, 5), client.ttl("l"), client.pttl("none")),
    ]
    first = [read() for read in reads]
    before = other.info("stats")["total_commands_processed"]
    assert [read() for read in reads] == first
    assert other.info("stats")["total_commands_processed"] - before <= 1 + 8  # INFO itself, and the link's PINGs


def test_a_change_elsewhere_is_seen(client, other):
    """What another client writes, creates, expires, renames or flushes is invalidated here."""
    other.set("k", "1")
    assert (client.get("k"), client.get("new")) == (b"1", None)
    for change, then in [
        (lambda: other.set("k", "2"), (b"2", None)),
        (lambda: other.set("new", "1"), (b"2", b"1")),
        (lambda: other.rename("new", "k"), (b"1", None)),
        (other.flushall, (None, None)),
        (lambda: other.mset({"k": "a", "new": "b"}), (b"a", b"b")),
        (lambda: other.eval("redis.call('del', 'k')", 0), (None, b"b")),
    ]:
        change()
        eventually(lambda then=then: (client.get("k"), client.get("new")) == then)
        assert (client.get("k"), client.get("new")) == then


def test_expiry_is_the_servers(client, other):
    """A value is not served for a moment longer than the server would."""
    other.set("k", "1", px=60)
    told(client)
    began = CLOCK.now()
    assert client.get("k") == b"1"
    while client.get("k") is not None:
        assert CLOCK.now() - began < 5
    assert client.near.view.cache.stats().hits > 0
    assert client.ttl("k") == -2


def test_own_writes_are_seen_at_once(client, other):
    """After any way to write, the next read shows it: scripts, pipelines, transactions, unknown commands."""
    client.set("k", 0)

    def in_pipeline(transaction, value):
        with client.pipeline(transaction=transaction) as pipe:
            pipe.set("k", value)
            pipe.execute()

    def watched(value):
        client.transaction(lambda pipe: (pipe.multi(), pipe.set("k", value)), "k")

    script = client.register_script("return redis.call('set', 'k', ARGV[1])")
    ways = [
        lambda value: client.set("k", value),
        lambda value: client.eval("return redis.call('set', 'k', ARGV[1])", 0, value),
        lambda value: script(args=[value]),
        lambda value: in_pipeline(transaction=True, value=value),
        lambda value: in_pipeline(transaction=False, value=value),
        watched,
        lambda value: client.execute_command("set", b"k", value),
        lambda value: (client.set("t", value), client.rename("t", "k")),
        lambda value: (client.delete("k"), client.append("k", value)),
        lambda value: (client.flushdb(), client.set("k", value)),
    ]
    for value in range(10 * len(ways)):
        ways[value % len(ways)](value)
        assert int(client.get("k")) == value
        assert int(client.get("k")) == value


def test_nothing_is_served_inside_a_transaction(redis_server, other):
    """Between MULTI and EXEC replies come from the server, and after SELECT all of them do."""
    with Redis(port=redis_server.port, single_connection_client=True) as client:
        assert client.near.wait()
        client.set("k", "1")
        assert client.get("k") == client.get("k") == b"1"
        client.execute_command("MULTI")
        assert client.get("k") == b"QUEUED"
        client.set("k", "2")
        assert client.execute_command("EXEC")[0] == b"1"
        assert client.get("k") == b"2"
        client.execute_command("SELECT", 1)
        assert client.get("k") is None


def test_only_keys_under_prefixes_are_kept(redis_server, other):
    """Other keys are read from the server each time, and are not announced."""
    with Redis(port=redis_server.port, near=Options(prefixes=("in:", "also:"))) as client:
        assert client.near.wait()
        other.mset({"in:k": "1", "out:k": "1"})
        told(client)
        assert [client.get("in:k"), client.get("out:k")] == [b"1", b"1"]
        assert list(client.near.view.cache.entries) == ["in:k"]
        other.mset({"in:k": "2", "out:k": "2"})
        assert client.get("out:k") == b"2"
        eventually(lambda: client.get("in:k") == b"2")


def test_what_is_returned_may_be_changed(client, other):
    """A reader that changes a dict or list it was given changes no other reader's."""
    other.hset("h", "f", "1")
    other.rpush("l", "a")
    for _ in range(3):
        fields, items = client.hgetall("h"), client.lrange("l", 0, -1)
        assert (fields, items) == ({b"f": b"1"}, [b"a"])
        fields.clear()
        items.append(b"b")


def test_memory_is_bounded(redis_server, other):
    """However much is read, memory holds no more than it may, and what is too large is read each time."""
    with Redis(port=redis_server.port, near=Options(bytes_max=100_000)) as client:
        assert client.near.wait()
        other.set("large", b"x" * 90_000)
        for number in range(300):
            other.set(f"k{number}", b"x" * 1000)
            client.get(f"k{number}")
            assert client.near.view.cache.nbytes <= 100_000
        assert len(client.get("large")) == len(client.get("large")) == 90_000
        assert "large" not in client.near.view.cache.entries


def test_a_herd_on_a_cold_key_is_one_get(client, other):
    """16 threads that want one cold key together ask the server once."""
    other.set("cold", b"x" * 100_000)
    for _ in range(10):
        other.append("cold", "y")
        told(client)
        before, start = calls(other, "get"), threading.Barrier(16)

        def read(start=start):
            start.wait()
            return client.get("cold")

        with ThreadPoolExecutor(16) as threads:
            values = {future.result() for future in [threads.submit(read) for _ in range(16)]}
        assert len(values) == 1
        assert calls(other, "get") - before == 1


@pytest.mark.parametrize("threads", [2, 8])
def test_threads_on_cold_keys_never_stall(client, other, threads):
    """Threads that read the same cold keys all come to their end, each time with the right values."""
    for turn in range(20):
        keys = {f"k{turn}:{number}": str(number).encode() for number in range(20)}
        other.mset(keys)
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(lambda keys: [client.get(key) for key in keys], keys) for _ in range(threads)]
            assert all(future.result(timeout=10) == list(keys.values()) for future in futures)


def test_the_leaders_error_is_everyones(redis_server, other):
    """Where the fetch fails, all who wait for it get its error, and the next reader tries again."""
    other.hset("h", "f", "1")
    with Redis(port=redis_server.port) as client:
        assert client.near.wait()
        with ThreadPoolExecutor(8) as pool:
            for future in [pool.submit(client.get, "h") for _ in range(40)]:
                with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
                    future.result()
        other.delete("h")
        other.set("h", "now text")
        assert client.get("h") == b"now text"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # of Pythons after 3.11: that is what is tried here
def test_a_child_process_starts_afresh(client, other):
    """After a fork parent and child serve right values, each over a link of its own."""
    other.set("k", "1")
    told(client)
    assert client.get("k") == client.get("k") == b"1"
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        first = client.get("k")
        ready = client.near.wait()
        other.set("k", "2")
        eventually(lambda: client.get("k") == b"2")
        os.write(theirs, b"%b %d %d" % (first, ready, client.near.stats().links))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(ours, 100) == b"1 1 1"
    os.close(ours)
    os.close(theirs)
    eventually(lambda: client.get("k") == b"2")
    other.set("k", "3")
    eventually(lambda: client.get("k") == b"3")
    assert client.near.stats().lost == 0


def test_a_cancelled_leader_hands_over(redis_server, other):
    """Of tasks that wait for one fetch, the next one leads where the first is cancelled; none hangs."""
    other.set("cold", "1")

    async def herd():
        client = AsyncRedis(port=redis_server.port)
        assert await asyncio.to_thread(client.near.wait)
        await asyncio.to_thread(other.client_pause, 100, all=True)
        tasks = [asyncio.create_task(client.get("cold")) for _ in range(8)]
        await asyncio.sleep(0.02)
        tasks[0].cancel()
        values = await asyncio.gather(*tasks, return_exceptions=True)
        fetches = client.near.stats().fetches
        await client.aclose()
        return values, fetches

    values, fetches = asyncio.run(herd())
    assert isinstance(values[0], asyncio.CancelledError)
    assert values[1:] == [b"1"] * 7
    assert fetches == 2


def test_a_herd_of_tasks_is_one_get(redis_server, other):
    """64 tasks that want one cold key together ask the server once."""
    other.set("cold", "1")

    async def herd():
        async with AsyncRedis(port=redis_server.port) as client:
            assert await asyncio.to_thread(client.near.wait)
            return await asyncio.gather(*(client.get("cold") for _ in range(64)))

    before = calls(other, "get")
    assert asyncio.run(herd()) == [b"1"] * 64
    assert calls(other, "get") - before == 1


def test_options_that_cannot_be_are_refused():
    """Overlapping prefixes, ages of nothing and modes that do not exist are errors with a hint."""
    for wrong in ({"prefixes": ("a", "ab")}, {"mode": "optin"}, {"stale_seconds_max": 0.0}):
        with pytest.raises(SettingsError) as caught:
            Options(**wrong)
        assert caught.value.hint
