"""Clients set up in less usual ways: other encodings, other classes of connections, TLS, reads of any kind together."""

from __future__ import annotations

import socket

import pytest
import redis
import redis.sentinel

from tests.faults.redis_server import RedisServer
from thermocline.clock import until
from thermocline.near.options import Options
from thermocline.near.redis import Redis
from thermocline.wire.resp_server import url_of

TLS_HANDSHAKE = b"\x16"


@pytest.fixture
def other(redis_server):
    with redis.Redis(port=redis_server.port) as client:
        client.flushall()
        yield client


@pytest.mark.parametrize("decodes", [False, True])
@pytest.mark.parametrize(("encoding", "errors"), [("latin-1", "strict"), ("utf-8", "ignore"), ("utf-8", "replace")])
def test_any_encoding_reads_as_plainly(redis_server, other, encoding, errors, decodes):
    """With an encoding that is not strict UTF-8 each read gives what redis-py gives, and follows the server."""
    set_up = {"port": redis_server.port, "encoding": encoding, "encoding_errors": errors, "decode_responses": decodes}
    with Redis(**set_up) as client, redis.Redis(**set_up) as plain:
        assert client.near.wait()
        for turn in range(3):
            for key in ("é", "k", "é".encode()):
                plain.set(key, b"\xffabc%d" % turn)
            plain.hset("h", mapping={"é": "u", "f": turn})
            assert client.near.link.ask("PING").result(5)
            reads = [
                lambda one: [one.get(key) for key in ("é", "k", b"k")],
                lambda one: one.mget("é", "k"),
                lambda one: (one.strlen("k"), one.getrange("k", 0, 2)),
                lambda one: (one.hget("h", "é"), one.hgetall("h"), one.hmget("h", ["é", "none"])),
            ]
            for read in reads * 2:
                assert read(client) == read(plain)
            assert client.get("é".encode()) == client.get("é".encode())  # it may be the same key
            client.set("é", "own")
            assert [client.get(key) for key in ("é", "é".encode())] == [plain.get(key) for key in ("é", "é".encode())]
        assert client.near.view.cache.stats().hits > 0


def test_a_key_of_a_class_of_its_own_is_followed(redis_server, other):
    """Text of a subclass with another hash is the same key: its change elsewhere is seen."""

    class Name(str):
        __slots__ = ()

        def __hash__(self):
            return 5

    with Redis(port=redis_server.port) as client:
        assert client.near.wait()
        other.set("k", "1")
        assert client.get(Name("k")) == client.get(Name("k")) == b"1"
        other.set("k", "2")
        assert client.near.link.ask("PING").result(5)
        assert client.get(Name("k")) == b"2"


def test_connections_that_may_lead_elsewhere_are_not_followed(redis_server, other, folder, caplog):
    """A class of connections that is not redis-py's own, Sentinel's too, reads plainly: no other server is followed."""
    with RedisServer(folder) as wrong:

        class Elsewhere(redis.Connection):
            def __init__(self, **options):
                super().__init__(**(options | {"port": redis_server.port}))

        pool = redis.ConnectionPool(connection_class=Elsewhere, port=wrong.port)
        with Redis(connection_pool=pool) as client:
            assert not client.near.wait(0.3)
            for turn in range(3):
                other.set("k", turn)
                assert client.get("k") == client.get("k") == str(turn).encode()
        pool.disconnect()
    sentinel = redis.sentinel.Sentinel([("127.0.0.1", 1)])
    with sentinel.master_for("any", redis_class=Redis) as client:
        assert not client.near.wait(0.1)
    assert all("Sentinel" in record.getMessage() for record in caplog.records if record.name == "thermocline.near")
    assert caplog.records


def test_a_tls_url_is_followed_over_tls():
    """With rediss:// the link speaks TLS too, and sends no password in the clear."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        url = f"rediss://user:secret@127.0.0.1:{listener.getsockname()[1]}"
        with Redis.from_url(url) as client:
            client.near.link.start(client.near.view)
            peer, _ = listener.accept()
            with peer:
                peer.settimeout(10)
                assert peer.recv(1) == TLS_HANDSHAKE
            assert until(lambda: client.near.stats().failed, 10, pause_seconds=0.01)


def test_any_command_goes_along_with_reads(redis_server, other):
    """A write among reads together is done once and seen at once; a read that memory does not serve comes plainly."""
    with Redis(port=redis_server.port) as client:
        assert client.near.wait()
        other.set("k", "1")
        other.sadd("s", "a")
        assert client.near.link.ask("PING").result(5)
        assert client.get("k") == client.get("k") == b"1"
        for _ in range(2):
            assert client.near_read([("GET", "k"), ("SMEMBERS", "s"), ("get", "k")]) == [b"1", {b"a"}, b"1"]
        assert client.near_read([("APPEND", "k", "2"), ("EVAL", "return redis.call('incr', 'n')", 0)]) == [2, 1]
        assert client.get("k") == b"12"
        assert client.get("n") == b"1"


def test_a_read_that_writes_is_a_write(redis_server, other):
    """PFCOUNT notes its count in the key, so the key's bytes are read anew after it."""
    with Redis(port=redis_server.port) as client:
        assert client.near.wait()
        for turn in range(20):
            client.pfadd(f"visitors{turn}", "a")
            assert client.near.link.ask("PING").result(5)
            before = client.get(f"visitors{turn}")
            assert client.pfcount(f"visitors{turn}") == 1
            assert client.get(f"visitors{turn}") == other.get(f"visitors{turn}") != before


def test_a_client_with_options_holds_no_memory_without(redis_server, other):
    """A client made from a URL with options does not keep the link of clients without options alive."""
    plain = Redis.from_url(redis_server.url)
    with Redis.from_url(redis_server.url, near=Options(bytes_max=1 << 20)) as stays:
        assert plain.near is not stays.near
        assert plain.near.wait()
        link = plain.near.link._thread
        plain.close()
        link.join(10)
        assert not link.is_alive()


def test_a_socket_in_this_folder_has_a_url(tmp_path, monkeypatch):
    """A server on a relative path says a URL that redis-py connects to."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("near.sock")
        with redis.Redis.from_url(url_of(sock)) as client:
            assert client.connection_pool.connection_kwargs["path"] == str(tmp_path / "near.sock")
