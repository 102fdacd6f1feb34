"""Coherence under fire: several processes, threads and tasks, a real server, and trouble that does not stop."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.proxy import Proxy
from tests.faults.redis_server import RedisError, RedisServer
from tests.near import fire
from thermocline.clock import SystemClock

ROOT = Path(__file__).parents[2]
CLOCK = SystemClock()


def trouble(rng, server, proxy, wiped):
    """One thing that goes wrong."""
    kind = rng.choice(("kill", "kill", "silence", "silence", "cut", "flush", "restart"))
    if kind == "kill":
        clients = [line.split()[0].removeprefix("id=") for line in server.call("CLIENT", "LIST").decode().splitlines()]
        try:
            server.call("CLIENT", "KILL", "ID", rng.choice(clients))
        except RedisError:  # it has gone by itself
            return
    elif kind == "silence":
        proxy.freeze()
        CLOCK.sleep(rng.uniform(0.2, 3 * fire.STALE_SECONDS_MAX))
        proxy.thaw()
    elif kind == "cut":
        proxy.cut()
    else:
        began = CLOCK.now()
        if kind == "flush":
            server.call("FLUSHDB")
        else:
            server.restart()
        wiped.append((fire.GONE, fire.ALWAYS, 0, began, CLOCK.now(), -1))


def burn(tmp_path, folder, mode, operations, seed, seconds_max):
    """Run the clients until they are done, in trouble; returns the verdict and what the clients counted."""
    rng, wiped, processes = random.Random(seed), [], 3  # noqa: S311  # a seed must replay
    with RedisServer(folder) as server, Proxy(server.address) as proxy:
        words = [str(server.port), str(proxy.address[1]), mode, str(operations), str(seed)]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
        argv = [sys.executable, str(ROOT / "tests/near/fire.py"), str(tmp_path)]
        clients = [subprocess.Popen([*argv, str(n), str(processes), *words], env=environment) for n in range(processes)]
        deadline = CLOCK.now() + seconds_max
        try:
            while any(client.poll() is None for client in clients):
                assert CLOCK.now() < deadline, "a client does not come to an end"
                CLOCK.sleep(rng.uniform(0.1, 0.5))
                trouble(rng, server, proxy, wiped)
        finally:
            for client in clients:
                client.kill()
                client.wait()
        assert [client.returncode for client in clients] == [0] * processes
    told = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(processes)]
    records = [tuple(record) for each in told for record in each["records"]] + wiped
    stats = {name: sum(each["stats"][name] for each in told) for name in told[0]["stats"]}
    grace = fire.GRACE_SECONDS if mode.endswith("+grace") else 0.0
    return fire.check(records, fire.STALE_SECONDS_MAX + grace), stats


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bcast", "default", "bcast+grace"])
def test_no_value_is_older_than_the_bound_and_none_goes_backwards(mode, tmp_path, folder):
    """With connections killed, links silent, keys gone and servers new, memory is right within the stated bound.

    With a grace the bound is larger by it, own writes are seen at once all the same, and no key goes backwards.
    """
    verdict, stats = burn(tmp_path, folder, mode, 2500, 6, 60)
    assert verdict.faults[:5] == []
    assert verdict.reads > 8000
    assert stats["hits"] > 50
    assert stats["lost"] > 0


@pytest.mark.faults_long
@pytest.mark.parametrize("mode", ["bcast", "default", "bcast+grace"])
def test_a_million_operations_under_fire(mode, tmp_path, folder):
    """The same, on more than 10^6 operations in each mode."""
    verdict, stats = burn(tmp_path, folder, mode, 115_000, 66, 1500)
    print(f"{mode}: {verdict.reads} reads, {verdict.writes} writes, oldest {verdict.stale_seconds:.3f} s, {stats}")  # noqa: T201  # a long run says what it saw
    assert verdict.faults[:5] == []
    assert verdict.reads + verdict.writes > 1_000_000


def test_the_checker_finds_what_it_is_for():
    """A stale value, one from the future, a step backwards and an own write not seen are each found."""
    write, read, bound = fire.WRITE, fire.READ, 0.5
    writes = [(write, "k", 1, 0.0, 0.1, 0), (write, "k", 2, 1.0, 1.1, 0), (write, "k", 3, 9.0, math.inf, 0)]
    good = [(read, "k", 1, 1.3, 1.4, 1), (read, "k", 2, 1.5, 1.6, 1), (read, "k", 3, 10.0, 10.1, 1)]
    assert fire.check(writes + good, bound).faults == []
    for bad in (
        [(read, "k", 1, 1.7, 1.8, 1)],
        [(read, "k", 2, 0.5, 0.6, 1)],
        [(read, "k", 2, 1.15, 1.16, 1), (read, "k", 1, 1.2, 1.3, 1)],
        [(fire.OWN, "k", 1, 1.2, 1.3, 0)],
        [(read, "k", 0, 5.0, 5.1, 1)],
    ):
        assert len(fire.check(writes + bad, bound).faults) == 1, bad
    wiped = [(fire.GONE, fire.ALWAYS, 0, 4.0, 4.1, -1)]
    assert fire.check([*writes, *wiped, (read, "k", 0, 5.0, 5.1, 1)], bound).faults == []
