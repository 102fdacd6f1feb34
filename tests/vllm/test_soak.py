"""The soak: engine and node under mixed traffic for an hour (or for `SOAK_SECONDS`), beside an engine without them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.store.making import make_layout
from tests.vllm.node import MIB, Node
from tests.vllm.prompts import prompt
from tests.vllm.server import CLOCK, MODEL, Server
from thermocline.blocks.key import block_keys, root_key
from thermocline.node import ask
from thermocline.node.client import NodeClient
from thermocline.store.ghosts import GHOSTS_KEPT
from thermocline.wire.status import TierStatus

SECONDS = float(os.environ.get("SOAK_SECONDS", "3600"))
WARM_UP_SHARE = 0.25
SAMPLES = 60
SLOPE_BYTES_PER_HOUR_MAX = 1e6
AT_ONCE = 3
PLAIN = "plain"
"""The engine beside it that has no connector: vLLM itself grows while it sees new shapes."""


@pytest.mark.vllm_long
def test_nothing_grows_and_nothing_is_left(start_node, start_vllm, folder):
    """Memory grows by less than 1 MB an hour more than plain vLLM's does; at idle nothing is leased, lent or open."""
    node = start_node(memory_bytes=96 * MIB, disk_path=folder / "disk", disk_bytes=256 * MIB)
    server, plain = (
        start_vllm("--num-gpu-blocks-override", "256", "--max-num-seqs", "8", node=at) for at in (node.socket, None)
    )
    ours, control = _engine(server), _engine(plain)
    processes = {"node": node.pid, **ours, **{f"{PLAIN} {name}": pid for name, pid in control.items()}}
    _fill(node)
    times, samples, asked = _watch_under_traffic(processes, (server, plain))
    slopes = {name: _slope(times, [each[name][0] for each in samples]) for name in processes}
    fds = {name: (samples[len(samples) // 4][name][1], samples[-1][name][1]) for name in processes}
    series = {name: [round(each[name][0] / 1e6, 1) for each in samples] for name in processes}
    told = {"seconds": SECONDS, "requests": asked, "bytes_per_hour": slopes, "descriptors": fds, "megabytes": series}
    print(json.dumps(told))  # noqa: T201  # for the record
    _nothing_is_left(node, server, fds["node"][0])
    if SECONDS >= 1800:  # a slope over less says nothing
        grown = {name: slopes[name] - slopes[f"{PLAIN} {name}"] for name in ours} | {"node": slopes["node"]}
        assert max(grown.values()) < SLOPE_BYTES_PER_HOUR_MAX, grown


def _watch_under_traffic(
    processes: dict[str, int], servers: Sequence[Server]
) -> tuple[list[float], list[dict[str, tuple[int, int]]], int]:
    """Times and what each process held then, while all servers are asked the same; and how often each was asked."""
    times: list[float] = []
    samples: list[dict[str, tuple[int, int]]] = []
    asked = 0
    rng, started = random.Random(7), CLOCK.now()  # noqa: S311  # must replay
    with ThreadPoolExecutor(AT_ONCE) as threads:
        while (spent := CLOCK.now() - started) < SECONDS:
            seeds = [rng.randrange(1 << 30) for _ in range(AT_ONCE)]
            for server in servers:
                list(threads.map(_traffic, [server] * AT_ONCE, seeds))
            asked += AT_ONCE
            if spent >= SECONDS * len(samples) / SAMPLES:
                times.append(spent)
                samples.append({name: _held(pid) for name, pid in processes.items()})
    return times, samples, asked


def _nothing_is_left(node: Node, server: Server, descriptors: int) -> None:
    """Idle, and then without its engine, the node has lent nothing, and has no block or file open too many."""
    status = ask.status(node.socket)
    assert all(client.leases == 0 for client in status.clients), status.clients
    before = _memory(node)
    slots = before.blocks + sum(client.lent_slots for client in status.clients)
    server.close()
    _until(lambda: not ask.status(node.socket).clients[1:])  # but for the one that asks
    after = _memory(node)
    assert before.used_bytes % slots == 0, "blocks of another size are left over"
    assert after.used_bytes == after.blocks * (before.used_bytes // slots), "slots are left over"
    assert _held(node.pid)[1] <= descriptors, "descriptors are left over"  # files of a filling disk are open by then


def _fill(node: Node) -> None:
    """Have the node remember as many blocks that are gone as it ever does: until then its memory grows, as is meant."""
    rng = np.random.default_rng(7)
    layout = make_layout("fill")
    blocks = [[np.zeros(4096, np.uint8)] for _ in range(64)]
    with contextlib.closing(NodeClient(node.socket, wait_seconds=10, save_wait_seconds=10)) as client:
        assert client.wait_up(10)
        for _ in range(2 * GHOSTS_KEPT // len(blocks)):
            tokens = rng.integers(0, 1 << 30, 16 * len(blocks), dtype=np.uint32)
            keys = block_keys(tokens.data, root=root_key(), tokens_per_block=16)
            assert client.save(layout, keys, blocks).wait(10)


def _traffic(server: Server, seed: int) -> None:
    """One request: a new prompt, a turn of an old conversation, one under a salt, or one whose client hangs up."""
    rng = random.Random(seed)  # noqa: S311  # as above
    tokens = prompt(rng.randrange(12), rng.choice((40, 200, 500, 900))) + prompt(seed, rng.randrange(1, 120))
    if rng.random() < 0.1:
        _hang_up(server, tokens)
    elif rng.random() < 0.1:
        with contextlib.suppress(AssertionError):  # while requests run, the cache may not let go
            server.forget()
    else:
        server.ask(tokens, rng.randrange(1, 8), **({"cache_salt": f"tenant {seed % 3}"} if rng.random() < 0.2 else {}))


def _hang_up(server: Server, tokens: list[int]) -> None:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)) as link:
        body = {"model": MODEL, "prompt": tokens, "max_tokens": 64, "stream": True, "ignore_eos": True}
        link.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        with contextlib.suppress(socket.timeout):
            link.getresponse().read(10)


def _engine(server: Server) -> dict[str, int]:
    """The processes of an engine, by what they call themselves."""
    names = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                name = (folder / "cmdline").read_bytes().split(b"\0")[0].decode()
                if int(fields[2]) == server._process.pid and name.startswith("VLLM::"):
                    names[name] = int(folder.name)
    assert names, "the engine's processes were not found"
    return names


def _held(pid: int) -> tuple[int, int]:
    """Bytes of a process' own memory (not those that it shares), and its open descriptors."""
    status = Path(f"/proc/{pid}/status").read_text()
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))
    return own * 1024, len(list(Path(f"/proc/{pid}/fd").iterdir()))


def _slope(times: list[float], values: list[int]) -> float:
    """Bytes an hour, after the warm-up."""
    first = int(len(times) * WARM_UP_SHARE)
    if len(times) - first < 2:
        return 0.0
    return float(np.polyfit(times[first:], values[first:], 1)[0] * 3600)


def _memory(node: Node) -> TierStatus:
    return next(tier for tier in ask.status(node.socket).tiers if tier.name == "memory")


def _until(done: Callable[[], bool]) -> None:
    deadline = CLOCK.now() + 30
    while not done():
        assert CLOCK.now() < deadline, "clients are left over"
        CLOCK.sleep(0.1)
