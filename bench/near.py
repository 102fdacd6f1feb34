"""A near hit beside what else keeps values in a process, and beside asking Redis: 100 bytes, 4 KB and 8 MB.

All arms run in one child process with the peers' own Python, so that none of them is a dependency: `make
bench-near-env` makes it. Arms in memory are timed in CPU time of that process, what waits for the server on the wall.
Every figure is the mean of a loop over several keys, and contains the loop's own step (`loop alone`).
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import ROOT, Progress, Report, check, percentile, spread
from thermocline.clock import until
from thermocline.demo import local_redis
from thermocline.errors import BenchError, TierError

SIZES = {"100 B": (100, 64), "4 KB": (4096, 64), "8 MB": (8 << 20, 4)}
"""Bytes of a value, and how many keys are read in turn."""
HIT_NS_MAX = 200.0
INVALIDATION_SECONDS, INVALIDATION_P99_SECONDS = 300e-6, 2e-3
ROUNDS = 15
CALLS, CALLS_LARGE = {"memory": 20_000, "redis": 200}, {"memory": 20_000, "redis": 4}
CHANGES, PENDING = 1_000, 10_000
PENDING_RATIO_MAX = 3.0
"""Microseconds per change, 10,000 held over 1,000 held: as much each, or nearly."""
HERD = 16
CHILD_SECONDS_MAX = 400.0
OURS, FACADE = "ours, embedded get", "ours, Redis.get hit"
Arm = Callable[[Any], Any]


def run(progress: Progress) -> Report:
    """One child for all; this side only starts the server and judges."""
    python = Path(os.environ.get("NEAR_PYTHON") or ROOT / ".venv-near" / "bin" / "python")
    if not python.exists():
        raise BenchError(f"this bench runs {python}, which does not exist", hint="run `make bench-near-env` first")
    progress("caches and clients, round after round")
    with tempfile.TemporaryDirectory(prefix="thermocline-bench-") as folder:
        try:
            with local_redis.running(Path(folder), port=free_port()) as server:
                found = _child(python, server.url)
        except TierError as error:
            raise BenchError(error.message, hint=error.hint) from None
    hits: dict[str, dict[str, list[float]]] = found["hits"]
    checks = []
    for size, arms in hits.items():
        for name in (OURS, FACADE):
            mean = statistics.median(arms[name]) * 1e9
            checks.append(check(f"hit, {size}: {name}", mean, "ns", HIT_NS_MAX, "lower"))
    herds = found["herds"]
    checks += [
        check(f"{HERD} threads on a cold key: {name}", loads, "loads", 1, "lower") for name, loads in herds.items()
    ]
    seen = found["invalidation_seconds"]
    per_change = {held: statistics.median(taken) for held, taken in found["pending_seconds"].items()}
    checks += [
        check("invalidation seen elsewhere, p50", percentile(seen, 0.5), "s", INVALIDATION_SECONDS, "lower"),
        check("invalidation seen elsewhere, p99", percentile(seen, 0.99), "s", INVALIDATION_P99_SECONDS, "lower"),
        check("a change, 10,000 held / 1,000 held", per_change["10000"] / per_change["1000"], "x", 3.0, "lower"),
    ]
    arms = {f"{size}: {name}": spread(taken) for size, rows in hits.items() for name, taken in rows.items()}
    arms |= {"invalidation seen elsewhere": spread(seen)}
    notes = [
        f"Peers: {', '.join(found['versions'])}; redis-server over loopback.",
        f"Each arm reads {SIZES['100 B'][1]} keys in turn ({SIZES['8 MB'][1]} of 8 MB).",
        "redis-py's client-side cache runs with its check of the server's version overridden.",
        "An invalidation is timed from before a SET in another process until the entry is gone from this one.",
        *(
            f"{float(held):,.0f} held: {each * 1e6:.1f} us a change, all changed at once"
            for held, each in per_change.items()
        ),
        *found["left_out"],
    ]
    least = {
        name: min(taken) for name, taken in ((f"{s}: {n}", t) for s, rows in hits.items() for n, t in rows.items())
    }
    return Report(checks, {"arms": arms, "least_seconds": least, "notes": notes, "pending": per_change, "herds": herds})


def free_port() -> int:
    """A port that nobody listens on. redis-py's client-side cache knows no Unix sockets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _child(python: Path, url: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    argv = [str(python), "-m", "bench.near", url]
    try:
        done = subprocess.run(
            argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, timeout=CHILD_SECONDS_MAX, check=True, text=True
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"the peers' process: {error}", hint="run `make bench-near-env` again") from None
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# -- in the peers' process ---------------------------------------------------------------------------------------------


def child(url: str) -> dict[str, Any]:
    """Everything that is measured."""
    import redis

    left_out: list[str] = []
    clients = _clients(url, left_out)
    hits = {size: _hits(clients, *shape, left_out) for size, shape in SIZES.items()}
    facade = clients[FACADE]
    found = {
        "hits": hits,
        "herds": _herds(facade, redis.from_url(url)),
        "invalidation_seconds": _invalidations(facade, url),
        "pending_seconds": {str(held): _pending(facade, url, held) for held in (1_000, PENDING)},
        "versions": _versions(),
        "left_out": sorted(set(left_out)),
    }
    for client in clients.values():
        client.close()
    return found


def _clients(url: str, left_out: list[str]) -> dict[str, Any]:
    import redis
    from redis.cache import CacheConfig

    from thermocline.near import Options, Redis

    redis.connection.CacheProxyConnection.MIN_ALLOWED_VERSION = "6.0.0"
    clients = {
        FACADE: Redis.from_url(url, near=Options(bytes_max=256 << 20)),
        "redis-py GET": redis.from_url(url),
    }
    try:
        clients["redis-py client-side cache"] = redis.from_url(url, protocol=3, cache_config=CacheConfig())
    except Exception as error:  # noqa: BLE001  # a peer that cannot run is said, and left out
        left_out.append(f"redis-py client-side cache left out: {error!r}")
    return clients


def _caches() -> dict[str, Any]:
    import cachebox
    import cachetools
    import moka_py
    import theine

    from thermocline.near import Cache

    return {
        "dict": {},
        OURS: Cache(256 << 20),
        "cachebox VTTLCache": cachebox.VTTLCache(1_000),
        "cachebox LRUCache": cachebox.LRUCache(1_000),
        "moka-py": moka_py.Moka(1_000),
        "cachetools TTLCache": cachetools.TTLCache(1_000, 3600.0),
        "theine": theine.Cache(1_000),
    }


def _fill(name: str, cache: Any, keys: list[str], value: bytes) -> None:  # noqa: ANN401  # any peer's cache
    for key in keys:
        if name == OURS:
            cache.put(key, value, ttl_seconds=3600.0)
        elif name in {"moka-py", "theine"}:
            cache.set(key, value)
        elif name == "cachebox VTTLCache":
            cache.insert(key, value, 3600.0)
        else:
            cache[key] = value


def _hits(clients: dict[str, Any], size: int, count: int, left_out: list[str]) -> dict[str, list[float]]:
    value = os.urandom(size)
    keys = [f"near:{size}:{number}" for number in range(count)]
    arms: dict[str, tuple[Arm, str]] = {"loop alone": (_nothing, "memory")}
    for name, cache in _caches().items():
        _fill(name, cache, keys, value)
        arms[name] = cache.get, "memory"
    for name, client in clients.items():
        for key in keys:
            client.set(key, value)
        arms[name] = client.get, "memory" if name == FACADE else "redis"
    for name, (get, _) in list(arms.items()):
        try:
            held = [get(key) for _ in range(3) for key in keys][-1]
        except Exception as error:  # noqa: BLE001  # a peer that cannot run is said, and left out
            left_out.append(f"{name} left out: {error!r}")
            del arms[name]
            continue
        held = held[0] if isinstance(held, tuple) else held  # theine says beside it whether it was there
        assert held == value or name == "loop alone", f"{name} returned something else"
    return _interleaved(arms, keys, CALLS if size < 1 << 20 else CALLS_LARGE)


def _interleaved(arms: dict[str, tuple[Arm, str]], keys: list[str], calls: dict[str, int]) -> dict[str, list[float]]:
    """Seconds per call of each arm in each round; the first place moves on."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    asked = {kind: list(itertools.islice(itertools.cycle(keys), count)) for kind, count in calls.items()}
    for at in range(ROUNDS + 1):
        turn = at % len(names)
        for name in names[turn:] + names[:turn]:
            get, kind = arms[name]
            taken = _mean(get, asked[kind], time.process_time if kind == "memory" else time.perf_counter)
            if at:  # the first round warms up
                seconds[name].append(taken)
    return seconds


def _mean(get: Arm, keys: list[str], clock: Callable[[], float]) -> float:
    started = clock()
    for key in keys:
        get(key)
    return (clock() - started) / len(keys)


def _nothing(key: str) -> None:
    """The loop and a call that does nothing."""


def _herds(facade: Any, plain: Any) -> dict[str, int]:  # noqa: ANN401  # clients of another package
    """Loads, and GETs at the server, when sixteen threads miss one key at once: the worst of ten herds."""
    from thermocline.near import Cache

    most = {"loads, embedded": 0, "GETs at the server": 0}
    for number in range(10):
        loads: list[int] = []
        cache = Cache(1 << 20)

        def load(loads: list[int] = loads) -> bytes:
            loads.append(1)
            time.sleep(0.01)
            return b"v"

        _together(lambda cache=cache, load=load: cache.get_or_load("cold", load))
        name = f"near:cold:{number}"
        plain.set(name, b"v")
        facade.get("near:warm")
        time.sleep(0.02)
        plain.config_resetstat()
        _together(lambda name=name: facade.get(name))
        gets = plain.info("commandstats").get("cmdstat_get", {}).get("calls", 0)
        most = {
            "loads, embedded": max(most["loads, embedded"], len(loads)),
            "GETs at the server": max(most["GETs at the server"], gets),
        }
    return most


def _together(ask: Callable[[], object]) -> None:
    gate = threading.Barrier(HERD)

    def one() -> None:
        gate.wait()
        ask()

    threads = [threading.Thread(target=one) for _ in range(HERD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


WRITER = """
import sys, time, redis
client = redis.from_url(sys.argv[1])
for line in sys.stdin:
    kind, *rest = line.split()
    started = time.perf_counter()
    if kind == "one":
        client.set(rest[0], b"changed")
    else:
        pipeline = client.pipeline(transaction=False)
        for number in range(int(rest[0])):
            pipeline.set(f"near:many:{number}", b"changed")
        started = time.perf_counter()
        pipeline.execute()
    print(started, flush=True)
"""


def _writer(url: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def _order(writer: subprocess.Popen[str], words: str) -> float:
    assert writer.stdin is not None
    assert writer.stdout is not None
    writer.stdin.write(words + "\n")
    return float(writer.stdout.readline())


def _invalidations(facade: Any, url: str) -> list[float]:  # noqa: ANN401  # a client of another package
    """Seconds from before a SET elsewhere until the entry is gone here. perf_counter is one clock for all processes."""
    cache = facade.near.view.cache
    dropped: list[float] = []
    plain_drop = cache.drop

    def drop(keys: Any) -> int:  # noqa: ANN401  # as Cache.drop
        count = plain_drop(keys)
        if count:
            dropped.append(time.perf_counter())
        return count  # type: ignore[no-any-return]  # a client of another package

    facade.set("near:watched", b"first")
    cache.drop = drop
    taken = []
    with _writer(url) as writer:
        _order(writer, "one near:other")
        for _ in range(CHANGES):
            facade.get("near:watched")
            dropped.clear()
            started = _order(writer, "one near:watched")
            if until(lambda: dropped, 1.0, pause_seconds=1e-4):
                taken.append(dropped[0] - started)
        writer.terminate()
    cache.drop = plain_drop
    assert len(taken) > 0.9 * CHANGES, f"only {len(taken)} changes of {CHANGES} were seen"
    return taken


def _pending(facade: Any, url: str, held: int) -> list[float]:  # noqa: ANN401  # a client of another package
    """Seconds per change, until all of so many entries are gone that another process changes at once."""
    cache = facade.near.view.cache
    names = [f"near:many:{number}" for number in range(held)]
    taken = []
    with _writer(url) as writer:
        for _ in range(3):
            _order(writer, f"many {held}")
            time.sleep(0.3)
            for start in range(0, held, 1_000):
                facade.mget(names[start : start + 1_000])
            before = len(cache)
            assert before >= held, f"{before} entries of {held} are held"
            started = _order(writer, f"many {held}")
            assert until(lambda before=before: len(cache) <= before - held, 60.0, pause_seconds=1e-4), (
                "changes were not seen"
            )
            taken.append((time.perf_counter() - started) / held)
        writer.terminate()
    return taken


def _versions() -> list[str]:
    from importlib.metadata import version

    return [f"{name} {version(name)}" for name in ("cachebox", "moka-py", "cachetools", "theine", "redis", "hiredis")]


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1])))
