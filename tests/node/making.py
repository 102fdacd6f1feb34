"""What the tests of the node are made from: a node in this process, its clients, and clients that say anything."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np

from tests.engines.eager import EagerCosts
from tests.store.making import BLOCK_BYTES, GUARD_SECONDS, LAYOUT, TOKENS_PER_BLOCK, content, contents
from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import Layout
from thermocline.clock import Clock, SystemClock
from thermocline.node.client import NodeClient
from thermocline.node.server import NodeServer
from thermocline.store.store import Store
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.tier import Job
from thermocline.wire import messages as say

CLOCK = SystemClock()
Said = Callable[[], dict[str, Any]]
ROOT = Path(__file__).parents[2]
PATIENT = {"wait_seconds": GUARD_SECONDS, "save_wait_seconds": GUARD_SECONDS}
"""A client for which no machine is too slow."""
MIB = 1 << 20


def until(true: Callable[[], object], what: str, seconds: float = GUARD_SECONDS) -> None:
    """Wait until something holds."""
    deadline = CLOCK.now() + seconds
    while not true():
        assert CLOCK.now() < deadline, f"in vain waited for: {what}"
        CLOCK.sleep(0.002)


class Host:
    """A store of real tiers and a node that serves it, in this process, and clients of it."""

    def __init__(
        self,
        folder: Path,
        *,
        blocks: int = 256,
        disk: bool = False,
        clock: Clock | None = None,
        lease_seconds: float = 60.0,
    ) -> None:
        self.folder, self.blocks, self.disk, self.lease_seconds = folder, blocks, disk, lease_seconds
        self.clock = clock or CLOCK
        self.socket = folder / "node.sock"
        self.clients: list[NodeClient] = []
        self.open()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Start the node."""
        warm = MemoryTier(self.blocks * BLOCK_BYTES, clock=self.clock)
        warm.wait_ready()
        cold = [DiskTier(self.folder / "disk", 64 * MIB, clock=self.clock)] if self.disk else []
        self.store = Store(warm, cold, clock=self.clock, lease_seconds=self.lease_seconds, costs=EagerCosts())
        self.server = NodeServer(self.store, self.socket, lease_seconds=self.lease_seconds, clock=self.clock)

    def client(self, **options: object) -> NodeClient:
        """An attached client, closed with this."""
        client = NodeClient(self.socket, **{**PATIENT, **options})
        self.clients.append(client)
        assert client.wait_up(GUARD_SECONDS)
        return client

    def settle(self) -> None:
        """Wait until nobody is connected, then nothing may be left: no lease, no slot, and all adds up."""
        until(lambda: not self.server.clients, "all clients to be gone")
        assert len(self.store._books.leases) == 0
        self.check()
        assert not self.store._warm._lent

    def check(self) -> None:
        """All adds up, at the latest when a tier's thread has told the last watcher of a job that is done."""
        assert self.store.flush(GUARD_SECONDS)
        deadline = CLOCK.now() + 2.0
        while CLOCK.now() < deadline:
            with contextlib.suppress(AssertionError):
                return self.store.check_integrity()
            CLOCK.sleep(0.005)
        return self.store.check_integrity()

    def stop(self) -> None:
        """End the node as its process does."""
        self.server.close()
        self.store.close()

    def restart(self) -> None:
        """Another life of the node, warm from disk."""
        self.stop()
        self.open()

    def close(self) -> None:
        """End clients, then the node."""
        with ExitStack() as stack:
            stack.callback(self.stop)
            for client in self.clients:
                stack.callback(client.close)


class Raw:
    """A client that says what a test wants, and waits for what comes."""

    def __init__(self, path: Path, *, hello: bytes | None = None) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(GUARD_SECONDS)
        self.sock.connect(str(path))
        self._inbox = say.Inbox()
        self._bodies: list[bytes] = []
        if hello is None:
            self.say(say.Hello(say.PROTOCOL, "test", "raw"))
            received, fds, _, _ = socket.recv_fds(self.sock, 1 << 16, 1)
            self.fd = fds[0]
            (body,) = self._inbox.feed(received)
            assert isinstance(say.node_says(body), say.Welcome)
        else:
            self.fd = -1
            self.sock.sendall(hello)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, *messages: say.FromClient) -> None:
        """Send messages."""
        self.sock.sendall(b"".join(map(say.encode, messages)))

    def hear(self) -> say.FromNode | None:
        """The next message, or None where the connection has ended."""
        while not self._bodies:
            try:
                received = self.sock.recv(1 << 16)
            except ConnectionResetError:
                return None
            if not received:
                return None
            self._bodies += self._inbox.feed(received)
        return say.node_says(self._bodies.pop(0))

    def ask(self, question: say.Question) -> say.FromNode | None:
        """Send a question, and wait for an answer."""
        self.say(question)
        return self.hear()

    def declare(self, layout: Layout = LAYOUT, number: int = 1) -> None:
        """Have the node know a layout."""
        self.say(say.Declare(number, msgspec.msgpack.encode(layout)))

    def close(self) -> None:
        """Leave."""
        self.sock.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def tokens(keys: Sequence[BlockKey]) -> int:
    """The length of a prompt whose full blocks have these keys."""
    return len(keys) * TOKENS_PER_BLOCK + 1


def keep(client: NodeClient, keys: Sequence[BlockKey], layout: Layout = LAYOUT, *, start: int = 0) -> Job:
    """Save a path from `start` on, and wait until the node has answered."""
    job = client.save(layout, keys, contents(layout, keys[start:]), start=start)
    assert job.wait(GUARD_SECONDS)
    return job


def fetch(client: NodeClient, keys: Sequence[BlockKey], *layouts: Layout) -> tuple[int, dict[str, int]]:
    """Match, load every layout, check each byte, release. How many blocks every layout brought, and whence."""
    layouts = layouts or (LAYOUT,)
    plan = client.match(layouts, keys, prompt_tokens=tokens(keys))
    least, by_tier = plan.blocks, {}
    for rank, layout in enumerate(layouts):
        into = [[np.zeros(layout.block_bytes, np.uint8)] for _ in range(plan.blocks)]
        loaded = client.load(plan, rank, into)
        for key, pieces in zip(keys[: loaded.blocks], into, strict=False):
            assert np.array_equal(pieces[0], content(layout, key)), "a block that was called verified holds other bytes"
        assert loaded.blocks == plan.blocks or loaded.missing, "blocks are missing without a reason"
        least, by_tier = min(least, loaded.blocks), loaded.by_tier
    client.release(plan.lease)
    return least, by_tier


@contextmanager
def process(verb: str, path: Path, *more: str) -> Iterator[tuple[subprocess.Popen[bytes], Said]]:
    """A client in a process of its own (see other_process.py), and what it says next."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    argv = [sys.executable, str(Path(__file__).with_name("other_process.py")), verb, str(path), *more]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as child:
        try:
            yield child, lambda: json.loads(child.stdout.readline())
        finally:
            child.kill()
