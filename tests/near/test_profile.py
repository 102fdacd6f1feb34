"""The state tax: lookups are noted with their keys and no values, and asked again plainly and with the near cache."""

from __future__ import annotations

import asyncio
import json
import stat
import subprocess
import sys

import pytest
import redis

from thermocline.errors import NearError
from thermocline.lens import tax
from thermocline.near import profile
from thermocline.near.options import Options
from thermocline.near.redis import Redis
from thermocline.near.redis_async import AsyncRedis


@pytest.fixture
def other(redis_server):
    with redis.Redis(port=redis_server.port) as client:
        client.flushall()
        client.set("flag:a", "on")
        client.set(b"\xff", "odd key")
        client.hset("session:7", mapping={"user": "ada", "turns": "3"})
        client.rpush("turns:7", "x" * 1000, "y" * 1000)
        yield client


@pytest.fixture
def noted(redis_server, other, tmp_path):
    """The file of an application that served three requests."""
    file = tmp_path / "lookups"
    with Redis(port=redis_server.port, near=Options(profile=str(file))) as client:
        assert client.near.wait()
        for _ in range(3):
            with profile.request():
                client.get("flag:a")
                client.hgetall("session:7")
                with profile.kind("history"):
                    client.lrange("turns:7", 0, -1)
                client.near_read([("GET", "flag:a"), ("HGET", "session:7", "user")])
            client.get(b"\xff")
        client.set("flag:b", "not a lookup")
    return file


def test_lookups_are_noted_without_values(noted):
    """Each lookup is a line with its kind, size, time and whether memory had it; the file is its user's alone."""
    lookups = profile.read(noted)
    assert len(lookups) == 15
    assert stat.S_IMODE(noted.stat().st_mode) == 0o600
    assert "ada" not in noted.read_text()
    assert "xxx" not in noted.read_text()
    kinds = [lookup.kind for lookup in lookups[:5]]
    assert kinds == ["flag:", "session:", "history", "flag:+session:", profile.kind_of(["GET", "k"])]
    assert [lookup.memory for lookup in lookups] == [False] * 3 + [True] + [False] + [True] * 10
    assert [lookup.nbytes for lookup in lookups[:3]] == [2, 4 + 3 + 5 + 1, 2000]
    assert len({lookup.request for lookup in lookups}) == 4
    assert all(lookup.seconds > 0 for lookup in lookups)


def test_what_was_noted_adds_up(noted):
    """Calls, times and sizes are those of the file; what comes before a first token is the sum of its lookups."""
    lookups = profile.read(noted)
    recorded = profile.tax(lookups).recorded
    assert {name: cost.seconds.count for name, cost in recorded.kinds.items()} == {
        "flag:": 3,
        "session:": 3,
        "history": 3,
        "flag:+session:": 3,
        profile.kind_of(["GET", "k"]): 3,
    }
    assert recorded.kinds["history"].mean_bytes == 2000
    assert recorded.kinds["session:"].memory_share == pytest.approx(2 / 3)
    assert recorded.requests.count == 3
    assert recorded.requests.sum_seconds == pytest.approx(sum(each.seconds for each in lookups if each.request))


@pytest.mark.parametrize("warm", [False, True])
def test_asked_again_memory_answers_what_it_may(noted, redis_server, other, warm):
    """Asked plainly every lookup goes to the server; with memory only first ones do, and none where it was filled."""
    before = other.info("commandstats")
    found = profile.replay(redis_server.url, profile.read(noted), rounds=4, warm=warm)
    after = other.info("commandstats")
    assert found.plain.requests.count == found.near.requests.count == found.saved.count == 12
    assert {cost.memory_share for cost in found.plain.kinds.values()} == {0.0}
    for name, cost in found.near.kinds.items():
        assert cost.mean_bytes == found.plain.kinds[name].mean_bytes
        assert cost.memory_share == pytest.approx(1.0 if warm or name == "flag:+session:" else 2 / 3)
    ranges = after["cmdstat_lrange"]["calls"] - before["cmdstat_lrange"]["calls"]
    assert ranges == (3 * 5 + 1 if warm else 3 * 4 + 4)
    text = tax.render(found)
    assert "no time of a GPU" in text
    assert "(12)" in text


def test_in_asyncio_too(redis_server, other, tmp_path):
    """Lookups of tasks are of the request that their task serves, and those made at the same time are told."""
    file = tmp_path / "lookups"

    async def served(client):
        with profile.request():
            await asyncio.gather(client.get("flag:a"), client.hgetall("session:7"))

    async def app():
        async with AsyncRedis(port=redis_server.port, near=Options(profile=str(file))) as client:
            assert await asyncio.to_thread(client.near.wait)
            await asyncio.gather(*(served(client) for _ in range(4)))

    asyncio.run(app())
    lookups = profile.read(file)
    assert len(lookups) == 8
    assert len({lookup.request for lookup in lookups}) == 4
    assert profile.tax(lookups).overlapping_requests > 0


def test_on_the_command_line(noted, redis_server, tmp_path):
    """`near profile` prints tables, or one JSON object; a list of keys needs a server, and writes are refused."""

    def ran(*words):
        argv = [sys.executable, "-m", "thermocline", "near", "profile", *map(str, words)]
        return subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)

    said = ran(noted)
    assert said.returncode == 0, said.stderr
    assert "history" in said.stdout
    found = json.loads(ran(noted, "--url", redis_server.url, "--rounds", 2, "--json").stdout)
    assert found["saved"]["count"] == 6
    keys = tmp_path / "keys"
    keys.write_text("GET flag:a\nHGETALL session:7\n\nget flag:a\n")
    said = ran(keys, "--keys", "--url", redis_server.url)
    assert "before the first token of a request (10)" in said.stdout
    assert ran(keys, "--keys").returncode == 2
    keys.write_text("SET flag:a off\n")
    said = ran(keys, "--keys", "--url", redis_server.url)
    assert said.returncode == 1
    assert "line 1: 'SET' does not read a key" in said.stderr
    assert ran(noted, "--url", "redis://127.0.0.1:1/0").returncode == 1


@pytest.mark.parametrize("text", ["", "x\n", '{"kind": "a"}\n', '{"kind": "a", "commands": [["FLUSHALL"]]}\n', "[]\n"])
def test_other_files_are_refused(text, tmp_path):
    """What no recorder wrote is an error with a hint, and nothing of it is sent anywhere."""
    file = tmp_path / "lookups"
    file.write_text(text)
    with pytest.raises(NearError) as caught:
        profile.read(file)
    assert caught.value.hint


def test_a_full_recorder_and_a_lost_one_cost_no_lookup(redis_server, other, tmp_path):
    """Where nothing more can be noted lookups are answered; where the file cannot be opened the client says so."""
    with Redis(port=redis_server.port, near=Options(profile="/dev/full")) as client:
        assert client.near.wait()
        assert [client.get("flag:a") for _ in range(3)] == [b"on"] * 3
    with pytest.raises(NearError) as caught:
        Redis(port=redis_server.port, near=Options(profile=str(tmp_path / "no" / "folder")))
    assert caught.value.hint
