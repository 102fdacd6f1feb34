"""A live server while one of its tiers is killed, frozen, slow, full or corrupting.

Every answer is the one that the same server gives without its cache, no request fails, and what the trouble costs is
read from the receipts: the time that a request spent in match and load without loading anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import urllib.request
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path

import pytest

from tests.faults import matrix
from tests.faults.constantly import constantly
from tests.faults.devices import READ, SYNC, WRITE, Trouble, TroubledDevice
from tests.faults.proxy import Delay, Proxy, Way
from tests.faults.redis_server import RedisServer
from tests.faults.test_full import _small_file_system
from thermocline.build import store_from
from thermocline.clock import SystemClock
from thermocline.settings import Settings

CLOCK = SystemClock()
MIB = 1 << 20
PROMPTS = [" ".join(f"{name} {number}" for number in range(150)) for name in ("ant", "bee", "cat", "dog", "eel")]
GUARD_SECONDS = 120.0
SMALL = {"memory_bytes": 8 * MIB}
"""Three of the five prompts fit, so that most of what is asked comes from a colder tier."""
LONG = pytest.mark.faults_long


class Live:
    """A running server, wherever it runs: ask it, and hold it to what it answers without its cache."""

    def __init__(self, url, pid):
        self.url = url
        self.pid = pid
        self._salts = count()
        self.right = {}

    def get(self, path):
        """What a route answers."""
        with urllib.request.urlopen(self.url + path, timeout=GUARD_SECONDS) as response:  # noqa: S310  # our own server
            return json.load(response)

    def ask(self, prompt, **more):
        """An answer: choices, and the receipt."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0, "logprobs": 1, **more}
        request = urllib.request.Request(  # noqa: S310  # our own server
            f"{self.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=GUARD_SECONDS) as response:  # noqa: S310  # as above
            assert response.status == 200
            answer = json.load(response)
        return answer["choices"], self.get(f"/receipts/{answer['id']}")

    def learn(self, prompts=PROMPTS):
        """Take down what it answers without a cache: under a salt that nobody used, nothing is ever found."""
        for prompt in prompts:
            choices, receipt = self.ask(prompt, cache_salt=f"nobody {next(self._salts)}")
            assert receipt["loaded_tokens"] == 0
            self.right[prompt] = choices

    def check(self, prompts=PROMPTS):
        """Ask each prompt: all answers must be right. The receipts."""
        receipts = []
        for prompt in prompts:
            choices, receipt = self.ask(prompt)
            assert choices == self.right[prompt], "another answer than without a cache"
            receipts.append(receipt)
        return receipts

    def until_used(self, tier):
        """Ask until a prompt comes from that tier."""
        deadline = CLOCK.now() + GUARD_SECONDS
        while not any(tier in receipt["by_tier"] for receipt in self.check()):
            assert CLOCK.now() < deadline, f"nothing comes from {tier}"


def _reasons(receipts):
    return {part["reason"] for receipt in receipts for part in receipt["missing"]}


def _added(receipts):
    """Seconds that match and load took in requests that loaded nothing, in their order."""
    return [each["match_seconds"] + each["load_seconds"] for each in receipts if not each["loaded_tokens"]]


@contextmanager
def _serving(**settings):
    """`thermocline serve` in a process of its own."""
    flags = [word for name, value in (SMALL | settings).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    argv = [sys.executable, "-m", "thermocline", "serve", "--json", "--port", "0", "--threads", "1", *flags]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            yield Live(json.loads(server.stdout.readline())["url"], server.pid)
            server.terminate()
            assert server.wait(GUARD_SECONDS) == 0, "it does not stop in good order"
        finally:
            server.kill()


@pytest.fixture
def note(record_property, cases):
    """Reports how many requests were asked, and what the trouble added to those that loaded nothing."""

    def say(receipts):
        cases(len(receipts))
        added = _added(receipts)
        if added:
            after = sorted(added[1:]) or added
            text = f"added {1e3 * added[0]:.2f} ms first, then {1e3 * after[len(after) // 2]:.2f} ms (median)"
            record_property(matrix.NOTE, f"{text}, {1e3 * max(after):.2f} ms at most")

    return say


# -- Redis -------------------------------------------------------------------------------------------------------------


@contextmanager
def _killed(server, proxy):
    server.kill()
    yield
    server.start()


@contextmanager
def _frozen(server, proxy):
    with server.frozen():
        yield


@contextmanager
def _slow(server, proxy):
    script, proxy.script = proxy.script, lambda number: [Delay(Way.DOWN, 0.2)]
    proxy.strike(Delay(Way.DOWN, 0.2))
    yield
    proxy.script = script
    proxy.cut()


@contextmanager
def _full(server, proxy):
    server.config("maxmemory", "1")
    yield
    server.config("maxmemory", "0")


@contextmanager
def _corrupting(server, proxy):
    rng = random.Random(1)  # noqa: S311  # which bits
    names = [name for name in server.keys("*") if len(name) == len("thermocline:") + 64]

    def flip():
        server.calls(("SETBIT", name, rng.randrange(8 * 100_000), 1) for name in names)
        server.calls(("SETBIT", name, rng.randrange(8 * 100_000), 0) for name in names)

    flip()
    with constantly(flip):
        yield


TROUBLES = {"killed": _killed, "frozen": _frozen, "slow": _slow, "full": _full, "corrupting": _corrupting}


def _redis_trouble(live, server, proxy, trouble, rounds):
    """The receipts of requests during one trouble."""
    live.until_used("redis")
    with TROUBLES[trouble](server, proxy):
        receipts = [receipt for _ in range(rounds) for receipt in live.check()]
    expected = {
        "killed": {"tier_down"},
        "frozen": {"tier_down", "late"},
        "slow": {"tier_down", "late"},
        "corrupting": {"corrupt"},
    }
    assert _reasons(receipts) & expected.get(trouble, _reasons(receipts)), "the trouble was not met"
    return receipts


@contextmanager
def _with_redis(folder):
    """A server whose only other tier is Redis, behind a proxy."""
    with RedisServer(folder) as server, Proxy(server.address) as proxy:
        url = f"redis://127.0.0.1:{proxy.address[1]}"
        with _serving(redis_url=url, redis_gain_min=0) as live:
            live.learn()
            yield live, server, proxy


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["frozen"])
@pytest.mark.matrix("serve: frozen", "redis")
def test_redis_freezes(tmp_path, trouble, note):
    """A live server whose Redis freezes gives the answers that it gives without a cache."""
    with _with_redis(tmp_path) as (live, server, proxy):
        note(_redis_trouble(live, server, proxy, trouble, 1))


@pytest.fixture(scope="module")
def redis_live(tmp_path_factory):
    """One server for all troubles of the long form."""
    with _with_redis(tmp_path_factory.mktemp("live")) as parts:
        yield parts


def _marked(fault, tier):
    return [pytest.mark.matrix(f"serve: {fault}", tier), LONG]


@pytest.mark.parametrize("trouble", [pytest.param(each, marks=_marked(each, "redis")) for each in TROUBLES])
def test_redis_in_trouble(redis_live, trouble, note):
    """Whatever happens to Redis under a live server, each answer is right, and the trouble costs next to nothing."""
    live, server, proxy = redis_live
    receipts = _redis_trouble(live, server, proxy, trouble, 8)
    note(receipts)
    live.until_used("redis")  # and all is well again


# -- disk --------------------------------------------------------------------------------------------------------------


def _flip_file(path, rng):
    """One bit in every 64 KiB of a file."""
    with contextlib.suppress(OSError), path.open("r+b", buffering=0) as file:
        for start in range(0, path.stat().st_size, 65_536):
            at = start + rng.randrange(65_536)
            byte = os.pread(file.fileno(), 1, at)
            if byte:
                os.pwrite(file.fileno(), bytes([byte[0] ^ 1 << rng.randrange(8)]), at)
        os.fdatasync(file.fileno())


@LONG
@pytest.mark.matrix("serve: corrupting", "disk")
def test_disk_corrupts(tmp_path, note):
    """Bits that flip in the segment files of a live server never reach an answer."""
    rng = random.Random(2)  # noqa: S311  # which bits
    disk = tmp_path / "disk"
    with _serving(disk_path=disk, disk_bytes=256 * MIB) as live:
        live.learn()
        live.until_used("disk")
        with constantly(lambda: [_flip_file(path, rng) for path in disk.glob("*.segment")]):
            receipts = [receipt for _ in range(8) for receipt in live.check()]
        assert "corrupt" in _reasons(receipts)
        note(receipts)
        live.until_used("disk")


@LONG
@pytest.mark.parametrize("kind", ["quota", "file system"])
@pytest.mark.matrix("serve: full", "disk")
def test_disk_is_full(tmp_path, kind, note):
    """A full disk, by its quota or by its file system, costs misses."""
    with ExitStack() as stack:
        disk, room = tmp_path / "disk", 16 * MIB
        if kind == "file system":
            disk, room = stack.enter_context(_small_file_system(tmp_path / "small", 12 * MIB)) / "disk", 64 * MIB
        live = stack.enter_context(_serving(disk_path=disk, disk_bytes=room))
        live.learn()
        receipts = [receipt for _ in range(6) for receipt in live.check()]
        assert sum(file.stat().st_size for file in disk.iterdir()) <= room
        note(receipts)


@contextmanager
def _serving_here(**settings):
    """A server in this process, so that its device can be a troubled one."""
    from tests.engines.api_server import ApiServer
    from thermocline.engines.models import load_model
    from thermocline.engines.transformers import Engine

    chosen = Settings(port=0, threads=1, **(SMALL | settings))
    with ExitStack() as stack:
        store = stack.enter_context(closing(store_from(chosen)))
        engine = stack.enter_context(closing(Engine(load_model("tiny", threads=1), store)))
        yield Live(stack.enter_context(ApiServer(engine, chosen)).url, os.getpid())


@LONG
@pytest.mark.parametrize("trouble", [pytest.param(each, marks=_marked(each, "disk")) for each in ("frozen", "slow")])
def test_disk_hangs(tmp_path, trouble, note, monkeypatch):
    """A disk that hangs or is slow under a live server costs one deadline, then next to nothing, and no answer."""
    device = TroubledDevice()
    with device.installed(monkeypatch), _serving_here(disk_path=tmp_path / "disk", disk_bytes=256 * MIB) as live:
        live.learn()
        live.until_used("disk")
        if trouble == "frozen":
            device.hang(READ, WRITE, SYNC)
        else:
            device.trouble = dict.fromkeys((READ, WRITE, SYNC), Trouble(delay_seconds=0.3))
        receipts = [receipt for _ in range(8) for receipt in live.check()]
        device.trouble = dict.fromkeys((READ, WRITE, SYNC), Trouble())
        device.resume()
        assert trouble == "slow" or _reasons(receipts) & {"late", "tier_down"}
        note(receipts)
        live.until_used("disk")


# -- memory ------------------------------------------------------------------------------------------------------------


def _slab_files(pid):
    """The memory tier's memory, which another process of this user may open as a file."""
    folder = Path(f"/proc/{pid}/fd")
    return [each for each in folder.iterdir() if "memfd:" in str(each.readlink())]


@LONG
@pytest.mark.matrix("serve: corrupting", "memory")
def test_memory_corrupts(note):
    """Bits that flip in the memory tier of a live server never reach an answer."""
    rng = random.Random(3)  # noqa: S311  # which bits
    with _serving(memory_bytes=64 * MIB) as live:
        live.learn()
        live.until_used("memory")
        slabs = _slab_files(live.pid)
        assert slabs
        with constantly(lambda: [_flip_file(slab, rng) for slab in slabs]):
            receipts = [receipt for _ in range(8) for receipt in live.check()]
        assert "corrupt" in _reasons(receipts)
        note(receipts)
        live.until_used("memory")


@LONG
@pytest.mark.matrix("serve: full", "memory")
def test_memory_is_full(note):
    """Memory that holds half of what is asked costs misses."""
    with _serving() as live:
        live.learn()
        note([receipt for _ in range(6) for receipt in live.check()])
