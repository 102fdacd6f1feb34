"""The link: without it nothing is served, when it is lost all is forgotten, and it comes back by itself."""

from __future__ import annotations

import gc
import logging
import threading

import pytest
import redis

from tests.faults.process import CLOCK
from tests.faults.proxy import Proxy
from tests.faults.redis_server import RedisServer
from thermocline.clock import until
from thermocline.near.options import Options
from thermocline.near.redis import Redis


@pytest.fixture
def server(folder):
    with RedisServer(folder) as server:
        yield server


def eventually(true):
    assert until(true, 10, pause_seconds=0.002)


def test_a_closed_link_forgets_at_once_and_comes_back(server):
    """Killed, the link leaves nothing in memory; a new one serves again, and nothing was ever wrong."""
    with Redis(port=server.port) as client, redis.Redis(port=server.port) as other:
        assert client.near.wait()
        for turn in range(5):
            other.set("k", turn)
            eventually(lambda turn=turn: client.get("k") == str(turn).encode())
            other.client_kill_filter(skipme=True)
            eventually(lambda turn=turn: client.near.stats().lost > turn)
            assert client.near.wait(10)
        assert client.near.stats().links >= 6


def test_a_restarted_server_is_a_new_one(server):
    """What was read before a restart is not served after it."""
    with Redis(port=server.port) as client:
        assert client.near.wait()
        client.set("k", "1")
        assert client.get("k") == client.get("k") == b"1"
        server.restart()
        eventually(lambda: client.near.stats().lost == 1)
        assert client.get("k") is None
        assert client.near.wait(10)


def test_a_silent_link_serves_nothing_older_than_the_bound(server):
    """While nothing comes over the link, memory is served for `stale_seconds_max` after the last proof, not longer."""
    with Proxy(server.address) as proxy, redis.Redis(port=server.port) as other:
        client = Redis(port=server.port, near=Options(stale_seconds_max=0.3))
        client.near.link._arguments["port"] = proxy.address[1]
        assert client.near.wait()
        other.set("k", "1")
        assert client.get("k") == client.get("k") == b"1"
        proxy.freeze()
        other.set("k", "2")
        written, oldest = CLOCK.now(), 0.0
        while CLOCK.now() - written < 1.0:
            began = CLOCK.now()
            if client.get("k") == b"1":
                oldest = max(oldest, began - written)
        assert oldest <= 0.3
        assert client.get("k") == b"2"
        proxy.thaw()
        assert client.near.wait(10)
        assert client.get("k") == b"2"
        client.close()


def test_a_server_that_cannot_track_serves_all_reads_itself(server, caplog):
    """Refused, the link costs no request: reads are right, one line says why, and a counter goes up."""
    with redis.Redis(port=server.port) as admin:
        admin.acl_setuser("app", enabled=True, nopass=True, keys=["*"], commands=["+@all", "-client"])
        with Redis(port=server.port, username="app", password="any") as client:  # noqa: S106  # none is asked
            for turn in range(50):
                admin.set("k", turn)
                assert client.get("k") == str(turn).encode()
                client.set("k", "own")
                assert client.get("k") == b"own"
                assert client.eval("return redis.call('set', 'k', 'script')", 0)
                assert client.get("k") == b"script"
            eventually(lambda: client.near.stats().failed > 1)
            assert client.near.stats().links == 0
            assert client.near.view.cache.stats().hits == 0
    lines = [record for record in caplog.records if record.name == "thermocline.near"]
    assert [line.levelno for line in lines] == [logging.WARNING]
    assert "hint" in lines[0].getMessage()
    assert "any" not in lines[0].getMessage().split()


def test_clients_set_up_alike_share_memory_and_link(server):
    """Two clients of one setup are one memory and one link; another setup has its own; closed, the link is gone."""
    near = Options(stale_seconds_max=2.0)
    a, b = Redis(port=server.port, near=near), Redis(port=server.port, near=near)
    text = Redis(port=server.port, decode_responses=True, near=near)
    assert a.near is b.near is not text.near
    assert a.near.wait()
    a.set("k", "1")
    assert a.near.link.ask("PING").result(5)  # our own write has been announced, too
    assert a.get("k") == b.get("k") == b"1"
    assert text.get("k") == "1"
    assert a.near.stats().fetches == 1
    links = [thread for thread in threading.enumerate() if thread.name == "near-tracking"]
    for client in (a, b, text):
        client.close()
    for link in links:
        link.join(10)
        assert not link.is_alive()


def test_a_client_that_is_let_go_takes_its_link_along(server):
    """Without `close`, the thread and its connection end with the last client."""
    client = Redis(port=server.port, near=Options(stale_seconds_max=1.5))
    assert client.near.wait()
    thread = client.near.link._thread
    del client
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_ten_thousand_invalidations_cost_as_many(server):
    """Each pending invalidation costs one removal: the link keeps up with a writer, whatever memory holds."""
    with Redis(port=server.port) as client, redis.Redis(port=server.port) as other:
        assert client.near.wait()
        keys = [f"k{number}" for number in range(10_000)]
        for value in (b"1", b"2"):
            other.mset(dict.fromkeys(keys, value))
            eventually(lambda value=value: set(client.mget(keys)) == {value})
        eventually(lambda: client.near.stats().invalidations >= 10_000)
        other.mset(dict.fromkeys(keys, b"3"))
        eventually(lambda: not client.near.view.cache.entries)
