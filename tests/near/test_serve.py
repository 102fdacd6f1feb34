"""`thermocline near serve` as its users see it: redis-cli, redis-py, tracking, passwords, clients that mean harm."""

from __future__ import annotations

import contextlib
import shutil
import socket
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import redis

from tests.near.serving import NearServer, Wire, encoded
from thermocline.clock import until

MIB = 1 << 20
OK = ("+", b"OK")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with NearServer(tmp_path_factory.mktemp("near"), "--memory-bytes", "64MiB") as started:
        yield started


@pytest.fixture
def wire(server):
    with Wire(server.port) as opened:
        opened.ask("FLUSHALL")
        yield opened


def _follower(server, *how):
    opened = Wire(server.port)
    opened.ask("HELLO", 3)
    assert opened.ask("CLIENT", "TRACKING", "ON", *how) == OK
    return opened


def _told(follower):
    """The keys of the next message."""
    mark, (what, keys) = follower.read()
    assert (mark, what) == (">", ("$", b"invalidate"))
    return keys if keys[1] is None or keys[0] == "_" else [key for _, key in keys[1]]


def test_tracking_tells_what_changes_under_prefixes(server, wire):
    """With BCAST every change under a prefix is told, whoever made it, and nothing else; FLUSHALL tells everything."""
    with _follower(server, "BCAST", "PREFIX", "user:", "PREFIX", "flag:") as follower:
        for words in (
            ["SET", "other", "1"],
            ["SET", "user:1", "a"],
            ["MSET", "flag:a", "1", "other", "2"],
            ["DEL", "user:1"],
        ):
            wire.ask(*words)
        assert [_told(follower) for _ in range(3)] == [[b"user:1"], [b"flag:a"], [b"user:1"]]
        wire.ask("RENAME", "flag:a", "user:2")
        assert sorted(_told(follower) + _told(follower)) == [b"flag:a", b"user:2"]  # one message per prefix
        wire.ask("PEXPIRE", "user:2", 30)
        assert [_told(follower) for _ in range(2)] == [[b"user:2"], [b"user:2"]]  # set to end, and ended
        wire.ask("FLUSHALL")
        assert _told(follower)[0] == "_"
        follower.send("SET", "user:9", "mine")
        assert follower.read() == OK  # the message about one's own write comes behind the reply
        assert _told(follower) == [b"user:9"]


def test_tracking_tells_what_was_read(server, wire):
    """Without BCAST a client is told once of each key that it has read, and with NOLOOP not of its own writes."""
    wire.ask("MSET", "a", "1", "b", "2")
    with _follower(server, "NOLOOP") as follower:
        follower.ask("GET", "a")
        wire.ask("SET", "b", "3")
        wire.ask("SET", "a", "4")
        assert _told(follower) == [b"a"]
        wire.ask("SET", "a", "5")
        follower.ask("GET", "a")
        follower.ask("SET", "a", "6")
        assert follower.ask("PING") == ("+", b"PONG")
        follower.ask("GET", "missing")
        wire.ask("SET", "missing", "now there")
        assert _told(follower) == [b"missing"]


def test_transactions_see_writes_of_others(server, wire):
    """EXEC does nothing where a watched key has changed since, by writing, by ending, or by FLUSHALL."""
    with Wire(server.port) as other:
        for change in (["SET", "k", "2"], ["DEL", "k"], ["FLUSHALL"], ["EXPIRE", "k", "100"]):
            wire.ask("SET", "k", "1")
            wire.ask("WATCH", "k")
            other.ask(*change)
            wire.ask("MULTI")
            assert wire.ask("SET", "done", "1") == ("+", b"QUEUED")
            assert wire.ask("EXEC") == ("*", None)
    assert wire.ask("EXISTS", "done") == (":", b"0")


def test_channels(server, wire):
    """What is published reaches who subscribed, in RESP2 and RESP3, until they have gone."""
    for protocol, mark in ((2, "*"), (3, ">")):
        with Wire(server.port) as listener:
            listener.ask("HELLO", protocol)
            assert listener.ask("SUBSCRIBE", "news", "more")[0] == mark
            listener.read()
            assert wire.ask("PUBLISH", "news", "text") == (":", b"1")
            assert listener.read() == (mark, [("$", b"message"), ("$", b"news"), ("$", b"text")])
            if protocol == 2:
                assert listener.ask("GET", "a")[0] == "-"
        assert until(lambda: wire.ask("PUBLISH", "news", "text") == (":", b"0"), 5, pause_seconds=0.01)


def test_keys_end_when_they_should(wire):
    """A key ends at its moment, and keeps it through changes."""
    wire.ask("SET", "k", "1", "EX", 1000)
    for _ in range(50):
        wire.ask("INCR", "k")
    assert 900_000 < int(wire.ask("PTTL", "k")[1]) <= 1_000_000
    wire.ask("SET", "short", "1", "PX", 40)
    assert wire.ask("GET", "short") == ("$", b"1")
    assert until(lambda: wire.ask("DBSIZE") == (":", b"1"), 5, pause_seconds=0.01)
    assert wire.ask("GET", "short") == ("$", None)


def test_scan_sees_what_stays(wire):
    """A key that is there all the time is seen by SCAN, whatever comes and goes, also while another scan goes on."""
    for at in range(300):
        wire.ask("SET", f"stays{at}", "x")
    seen, cursor, turn = set(), b"0", 0
    while turn == 0 or cursor != b"0":
        _, ((_, cursor), (_, found)) = wire.ask("SCAN", cursor, "COUNT", 7)
        seen |= {key for _, key in found}
        wire.ask("SET", f"new{turn}", "x")
        wire.ask("DEL", f"new{turn - 3}")
        wire.ask("SCAN", "0")
        turn += 1
    assert {key for key in seen if key.startswith(b"stays")} == {b"stays%d" % at for at in range(300)}


def test_memory_is_bounded(server, wire):
    """More than --memory-bytes is never held, one value takes a quarter at most, and the latest keys are there."""
    value = b"x" * MIB
    for at in range(150):
        assert wire.ask("SET", f"k{at}", value) == OK
    assert wire.ask("GET", "k149") == ("$", value)
    assert int(wire.ask("DBSIZE")[1]) < 64
    for _ in range(15):
        assert wire.ask("APPEND", "long", value)[0] == ":"
    assert wire.ask("APPEND", "long", value + value)[0] == "-"
    refused = 0
    for _ in range(40):
        refused += wire.ask("RPUSH", "list", value)[0] == "-"
    assert refused > 20
    assert server.memory_bytes() < 400 * MIB


def _holds(wire) -> bool:
    """Whether 8 MiB of a longer value are taken, and the rest is waited for."""
    try:
        wire.sock.sendall(b"x" * 8 * MIB)
        wire.sock.settimeout(0.2)
        assert wire.read() == ("-", b"OOM too much is being sent to this server at once")
    except TimeoutError:
        return True
    except OSError:
        pass
    return False


@pytest.mark.slow
def test_announced_bytes_take_no_memory(server):
    """Who announces 256 MiB is refused at once; of what may come, memory is taken as it comes, and given back."""
    before = server.memory_bytes()
    with Wire(server.port) as wire:
        wire.sock.sendall(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$268435456\r\n")
        assert wire.read() == ("-", b"ERR Protocol error: invalid bulk length")
        with pytest.raises(ConnectionResetError):
            wire.read()
    opened = [Wire(server.port) for _ in range(50)]
    for each in opened:
        each.sock.sendall(b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$16777000\r\n" + b"x" * 1000)
    assert server.memory_bytes() - before < 20 * MIB
    assert sum(map(_holds, opened)) <= 4  # half of --memory-bytes, in pieces of 8 MiB
    for each in opened:
        each.__exit__()
    with Wire(server.port) as wire:
        assert wire.ask("PING") == ("+", b"PONG")
    assert server.memory_bytes() - before < 100 * MIB


def test_who_reads_nothing_is_not_read_from(server, wire):
    """10,000 pipelined requests for large values wait in their sender; other clients are served meanwhile."""
    wire.ask("SET", "big", b"x" * MIB)
    before = server.memory_bytes()
    with Wire(server.port) as lazy:
        lazy.sock.settimeout(0)
        requests = encoded("GET", "big") * 10_000
        try:
            sent = lazy.sock.send(requests)
        except BlockingIOError:
            sent = 0
        assert wire.ask("PING") == ("+", b"PONG")
        assert server.memory_bytes() - before < 60 * MIB
        lazy.sock.settimeout(20)
        whole = sent // len(encoded("GET", "big"))
        for _ in range(min(whole, 100)):
            assert lazy.read() == ("$", b"x" * MIB)
    for _ in range(3):
        assert wire.ask(*["MGET"] + ["big"] * 500)[0] == "-"  # 500 MiB in one reply


def test_who_takes_no_messages_is_sent_away(server, wire):
    """Messages wait for a slow follower within a bound; beyond it the connection is closed, which it notices."""
    with _follower(server, "BCAST") as slow:
        key = "k" * 200_000
        for _ in range(400):
            wire.ask("SET", key, "x")
        count = 0
        with contextlib.suppress(ConnectionResetError):
            while slow.read():
                count += 1
        assert count < 400
    assert wire.ask("PING") == ("+", b"PONG")


def test_many_requests_in_one_go(server):
    """10,000 pipelined requests are answered in their order."""
    with Wire(server.port) as wire:
        wire.sock.sendall(b"".join(encoded("ECHO", at) for at in range(10_000)))
        assert [wire.read()[1] for _ in range(10_000)] == [b"%d" % at for at in range(10_000)]


def test_password(tmp_path):
    """Without the password nothing but AUTH is answered, and little is read; with it all is, however it was said."""
    file = tmp_path / "password"
    file.write_text("open sesame\n")
    with NearServer(tmp_path, "--password-file", str(file)) as server:
        with Wire(server.port) as wire:
            assert wire.ask("GET", "a") == ("-", b"NOAUTH Authentication required.")
            assert wire.ask("AUTH", "wrong")[1].startswith(b"WRONGPASS")
            assert wire.ask("HELLO", 3)[1].startswith(b"NOAUTH")
            wire.send("SET", "a", b"x" * 20_000)
            assert wire.read() == ("-", b"ERR Protocol error: unauthenticated bulk length")
        with Wire(server.port) as wire:
            assert wire.ask("AUTH", "default", "open sesame") == OK
            assert wire.ask("SET", "a", b"x" * 20_000) == OK
        client = redis.Redis.from_url(server.url, password=file.read_text().strip(), protocol=3)
        assert client.get("a") == b"x" * 20_000
        client.close()


def test_unreachable_from_elsewhere_unless_a_password_is_set(tmp_path):
    """Another address than loopback is refused without a password, with a hint."""
    argv = [sys.executable, "-m", "thermocline", "near", "serve", "--port", "0", "--host", "0.0.0.0"]  # noqa: S104  # refused
    ended = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2
    assert "hint: set near_password_file" in ended.stderr


def test_unix_socket(tmp_path):
    """A Unix socket is for this user alone, and gone when the server has ended."""
    path = tmp_path / "near.sock"
    with NearServer(tmp_path, "--unix-socket", str(path)) as server:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with closing(redis.Redis(unix_socket_path=str(path))) as client:
            assert client.ping()
        server.close()
    assert not path.exists()


def test_browsers_are_sent_away(server):
    """A web page that posts to this port has nothing run."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n\r\nSET hacked 1\r\n")
        assert sock.makefile("rb").read() == b"-ERR this is no HTTP server\r\n"
    with Wire(server.port) as wire:
        assert wire.ask("EXISTS", "hacked") == (":", b"0")


def test_durable_state_is_refused_with_a_hint(wire):
    """What belongs in a real server says so."""
    for words in (["SAVE"], ["EVAL", "return 1", 0], ["BGREWRITEAOF"], ["REPLICAOF", "no", "one"], ["SHUTDOWN"]):
        mark, text = wire.ask(*words)
        assert mark == "-"
        assert b"belong in Redis or Valkey" in text


def test_connections_are_bounded(tmp_path):
    """One more than --connections-max is told so; when one has gone, another may come."""
    with NearServer(tmp_path, "--connections-max", "3") as server:
        held = [Wire(server.port) for _ in range(3)]
        assert [each.ask("PING") for each in held] == [("+", b"PONG")] * 3
        with Wire(server.port) as more:
            assert more.read() == ("-", b"ERR max number of clients reached")
        for each in held:
            each.__exit__()

        def served() -> bool:
            with Wire(server.port) as again:
                return again.ask("PING") == ("+", b"PONG")

        assert until(served, 5, pause_seconds=0.05)


@pytest.mark.skipif(shutil.which("redis-cli") is None, reason="no redis-cli here (Debian: apt-get install redis-tools)")
def test_redis_cli(server, tmp_path):
    """A scripted session of redis-cli prints what it prints with Redis."""
    lines = ('SET greeting "hello there"', "GET greeting", "HSET h f 1 g 2", "HGETALL h", "INCR n", "NOSUCH")
    script = "\n".join([*lines, "DEL h n greeting", ""])
    for flag in ([], ["-3"]):
        argv = ["redis-cli", "-p", str(server.port), "--no-raw", *flag]
        said = subprocess.run(argv, input=script, capture_output=True, text=True, check=True, timeout=60).stdout
        assert said.splitlines()[:3] == ["OK", '"hello there"', "(integer) 2"]
        assert ('1# "f" => "1"' if flag else '1) "f"') in said
        assert "(error) ERR unknown command 'NOSUCH'" in said
        assert said.splitlines()[-1] == "(integer) 3"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("redis-benchmark") is None, reason="no redis-benchmark here (apt: redis-tools)")
def test_redis_benchmark(server):
    """All default tests of redis-benchmark run through, also pipelined."""
    for more in ([], ["-P", "16"]):
        argv = ["redis-benchmark", "-q", "-p", str(server.port), "-n", "1000", "-c", "20", *more]
        ended = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120)
        done = [line for line in ended.stdout.replace("\r", "\n").splitlines() if "requests per second" in line]
        assert len(done) >= 19, ended.stdout


def test_our_client_follows_our_server(server):
    """`thermocline.near.Redis` keeps what it read, and sees what another client changed."""
    near = pytest.importorskip("thermocline.near.redis", reason="needs redis-py")
    with closing(near.Redis(port=server.port)) as ours, closing(redis.Redis(port=server.port)) as other:
        other.set("shared", "1")
        assert ours.get("shared") == b"1"
        other.set("shared", "2")
        assert until(lambda: ours.get("shared") == b"2", 5, pause_seconds=0.001)
        other.hset("h", mapping={"f": "v"})
        assert ours.hgetall("h") == {b"f": b"v"}
        other.hset("h", "f", "w")
        assert until(lambda: ours.hget("h", "f") == b"w", 5, pause_seconds=0.001)


def test_what_ended_badly_leaves_its_socket_replaceable(tmp_path):
    """A socket that a killed server left behind is replaced; one that is served is not."""
    path = tmp_path / "near.sock"
    with NearServer(tmp_path, "--unix-socket", str(path)) as first:
        argv = [sys.executable, "-m", "thermocline", "near", "serve", "--unix-socket", str(path)]
        assert subprocess.run(argv, capture_output=True, check=False, timeout=60).returncode == 1
        assert Path(path).exists()
        first.kill()
    (tmp_path / "near.log").unlink()
    with NearServer(tmp_path, "--unix-socket", str(path)), closing(redis.Redis(unix_socket_path=str(path))) as client:
        assert client.ping()
