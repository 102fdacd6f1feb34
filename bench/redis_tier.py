"""The Redis tier over MGET with a copy, and over two keys per block as LMCache's Redis connector has them.

Each arm finds out how much of a path is there, then loads it into the same faulted-in pieces. Only ours verifies.
"""

from __future__ import annotations

import asyncio
import math
import socket
import struct
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from bench.harness import Check, Progress, Report, check, interleaved, ratios, spread
from thermocline.blocks.frame import payload_sum
from thermocline.blocks.key import NO_PARENT, BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.demo import local_redis
from thermocline.errors import BenchError, TierError
from thermocline.tiers.redis import RedisTier
from thermocline.tiers.redis_scripts import Space
from thermocline.tiers.segments import aligned_memory
from thermocline.tiers.tier import Block, Outcome, Piece
from thermocline.wire.resp import Address, encode

KIB, MIB = 1024, 1024 * 1024
WAIT_SECONDS = 2.0
"""A busy machine must slow a bench down, not end it."""

SIZES = ((64, 256 * KIB, 4.0), (24, 2 * MIB, 2.5))
"""Blocks, bytes of each, and how many times the speed of two keys per block is promised."""
ROUNDS = 41
LAYOUT = LayoutId(b"bench".ljust(32, b"\0"))
CONNECTIONS_MAX = 150
"""As many as LMCache's connector opens at most (redis_connector.py, 2026)."""
OURS, OURS_UNIX, MGET, TWO_KEYS = "ours", "ours, Unix socket", "EXISTS pipelined, MGET, copy", "two keys per block"
RAW = "raw: GET pipelined, received into one buffer"


def run(progress: Progress) -> Report:
    """64 blocks of 256 KiB and 24 of 2 MiB, over loopback."""
    redis = _clients()
    details: dict[str, Any] = {"ratios": {}, "arms": {}, "notes": []}
    checks: list[Check] = []
    try:
        with tempfile.TemporaryDirectory(prefix="thermocline-bench-") as folder:
            for count, size, target in SIZES:
                seconds = _measured(Path(folder), redis, count, size, progress)
                name = f"{count} x {size // KIB} KiB"
                details["arms"] |= {f"{name}: {arm}": spread(taken) for arm, taken in seconds.items()}
                details["ratios"][f"{name}: ours / raw"] = spread(ratios(seconds[OURS], seconds[RAW]))
                for other in (TWO_KEYS, MGET, "find: two keys per block"):
                    ours = "find: ours" if other.startswith("find") else OURS
                    details["ratios"][f"{name}: {other} / ours"] = spread(ratios(seconds[other], seconds[ours]))
                ratio = details["ratios"][f"{name}: {TWO_KEYS} / ours"]["median"]
                checks.append(check(f"{name}: {TWO_KEYS} / ours", ratio, "x", target, "higher"))
    except TierError as error:
        raise BenchError(error.message, hint=error.hint) from None
    details["notes"] = [
        "redis-server on this machine, over loopback but where it says Unix socket: server and client share the cores.",
        "`two keys per block` re-creates the algorithm of LMCache's Redis connector: redis.asyncio with hiredis, one",
        "EXISTS after the other, then for all blocks at once a GET for the metadata, one for the bytes, and a copy.",
    ]
    return Report(checks, details)


def _clients() -> Any:  # noqa: ANN401  # the module of another package
    try:
        import hiredis  # noqa: F401  # without it, redis-py parses in Python: no fair peer
        import redis
        import redis.asyncio
    except ImportError:
        raise BenchError("redis-py and hiredis are not installed", hint="pip install -e '.[bench]'") from None
    return redis


def _measured(folder: Path, redis: Any, count: int, size: int, progress: Progress) -> dict[str, list[float]]:  # noqa: ANN401  # as _clients
    random = np.random.default_rng(7)
    payloads = [np.frombuffer(random.bytes(size), np.uint8) for _ in range(count)]
    keys = [BlockKey(random.bytes(32)) for _ in range(count)]
    memory = aligned_memory(count * size)
    into = [memory[at * size : (at + 1) * size] for at in range(count)]
    port = _free_port()
    with ExitStack() as stack, local_redis.running(folder, port=port) as server, asyncio.Runner() as runner:
        tier = _filled(server.address, keys, payloads)
        unix = _filled(Address("", 0, str(folder / "redis.sock")), keys, payloads)
        plain = redis.Redis(port=port)
        raw = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        request = b"".join(encode(b"GET", b"plain:" + key) for key in keys)
        everything = memoryview(bytearray(count * len(b"$%d\r\n%b\r\n" % (size, bytes(size)))))
        pool = redis.asyncio.ConnectionPool.from_url(f"redis://127.0.0.1:{port}", max_connections=CONNECTIONS_MAX)
        peer = redis.asyncio.Redis.from_pool(pool)
        runner.run(_save_two_keys(peer, keys, payloads))
        for key, payload in zip(keys, payloads, strict=True):
            plain.set(b"plain:" + key, payload.tobytes())
        arms: dict[str, Callable[[], object]] = {
            OURS: lambda: _load(tier, keys, into),
            OURS_UNIX: lambda: _load(unix, keys, into),
            RAW: lambda: _load_raw(raw, request, everything),
            MGET: lambda: _load_mget(plain, keys, into),
            TWO_KEYS: lambda: runner.run(_load_two_keys(peer, keys, into)),
            "find: ours": lambda: tier.find(LAYOUT, keys, math.inf),
            "find: two keys per block": lambda: runner.run(_find_two_keys(peer, keys)),
        }
        for name, arm in arms.items():
            memory[:] = 0
            arm()
            right = all(np.array_equal(row, payload) for row, payload in zip(into, payloads, strict=True))
            assert right or name == RAW or name.startswith("find"), f"{name} brought something else"
        progress(f"{count} blocks of {size // KIB} KiB")
        seconds = interleaved(arms, rounds=ROUNDS, warmup=1, progress=progress)
        tier.close()
        unix.close()
        plain.close()
        runner.run(peer.aclose(close_connection_pool=True))
    return seconds


def _filled(address: Address, keys: Sequence[BlockKey], payloads: Sequence[Piece]) -> RedisTier:
    tier = RedisTier(address, Space(b"bench", 4096 * MIB, 3600.0), wait_seconds=WAIT_SECONDS)
    assert tier.wait_up(10.0), "the server does not answer"
    blocks = [Block(NO_PARENT, 1, [payload], payload_sum([payload])) for payload in payloads]
    job = tier.save(LAYOUT, keys, blocks)
    job.wait()
    assert set(job.outcomes) == {Outcome.HIT}, "a block was not saved"
    return tier


def _load(tier: RedisTier, keys: Sequence[BlockKey], into: Sequence[Piece]) -> None:
    found = tier.find(LAYOUT, keys, math.inf)
    outcomes = tier.load(LAYOUT, keys, [[row] for row in into], math.inf)
    assert found.count(Outcome.HIT) == outcomes.count(Outcome.HIT) == len(keys), "a block was not loaded"


def _load_raw(sock: socket.socket, request: bytes, into: memoryview) -> None:
    """The least that the same bytes cost from this server: nothing is parsed, checked, or put in its place."""
    sock.sendall(request)
    got = 0
    while got < len(into):
        got += sock.recv_into(into[got:])


def _load_mget(client: Any, keys: Sequence[BlockKey], into: Sequence[Piece]) -> None:  # noqa: ANN401  # as _clients
    pipeline = client.pipeline(transaction=False)
    for key in keys:
        pipeline.exists(b"plain:" + key)
    assert all(pipeline.execute()), "a block is not there"
    for row, value in zip(into, client.mget([b"plain:" + key for key in keys]), strict=True):
        row[:] = np.frombuffer(value, np.uint8)


# -- two keys per block ------------------------------------------------------------------------------------------------

_METADATA = struct.Struct("<6q")


async def _save_two_keys(client: Any, keys: Sequence[BlockKey], payloads: Sequence[Piece]) -> None:  # noqa: ANN401  # as _clients
    for key, payload in zip(keys, payloads, strict=True):
        await client.set(key.hex() + "kv_bytes", payload.tobytes())
        await client.set(key.hex() + "metadata", _METADATA.pack(payload.nbytes, 0, 2, 8, 256, 128))


async def _find_two_keys(client: Any, keys: Sequence[BlockKey]) -> int:  # noqa: ANN401  # as _clients
    for at, key in enumerate(keys):
        if not await client.exists(key.hex() + "metadata"):
            return at
    return len(keys)


async def _load_two_keys(client: Any, keys: Sequence[BlockKey], into: Sequence[Piece]) -> None:  # noqa: ANN401  # as _clients
    async def one(key: BlockKey, row: Piece) -> None:
        length, *_ = _METADATA.unpack(await client.get(key.hex() + "metadata"))
        value = await client.get(key.hex() + "kv_bytes")
        memoryview(row)[:length] = value

    assert await _find_two_keys(client, keys) == len(keys), "a block is not there"
    await asyncio.gather(*(one(key, row) for key, row in zip(keys, into, strict=True)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
