"""A node's two ends without a socket: any bytes of a client into a node's session, any of a node into its client."""

from __future__ import annotations

import functools
import struct
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from tests.engines.eager import EagerCosts
from tests.store.making import BLOCK_BYTES, LAYOUT, chain, make_layout
from thermocline.clock import ManualClock, SystemClock
from thermocline.node.client import NodeClient
from thermocline.node.session import Session
from thermocline.node.staging import Staging
from thermocline.store.receipt import Reason, Receipt
from thermocline.store.store import Store
from thermocline.tiers.memory import MemoryTier
from thermocline.wire import messages as say

BLOCKS, GIANT = 32, make_layout("giant", block_bytes=1 << 50)
KEYS = chain("fuzz", 4)
RECEIPT = msgspec.msgpack.encode(
    Receipt(
        request="request",
        prompt_tokens=16,
        tokens_per_block=16,
        loaded_tokens=0,
        computed_tokens=16,
        by_tier={},
        missing=(),
        match_seconds=0.0,
        load_seconds=0.0,
        prefill_seconds=0.0,
        planned_load_seconds=0.0,
        planned_recompute_seconds=0.0,
        planned_cold_seconds=0.0,
    )
)


class _Reports:
    def status(self) -> bytes:
        return b"{}"

    def metrics(self) -> bytes:
        return b""

    def declared(self, layout: object) -> None:
        """Nothing is announced."""


class _Socket:
    """Takes what is sent."""

    def __init__(self) -> None:
        self.sent = b""

    def sendall(self, data: bytes) -> None:
        self.sent += data

    def shutdown(self, _: int) -> None:
        """Nobody is there."""

    def close(self) -> None:
        """Nothing is open."""


@functools.cache
def _store() -> tuple[Store, ManualClock]:
    clock = ManualClock(1000.0)
    warm = MemoryTier(BLOCKS * BLOCK_BYTES, clock=clock)
    warm.wait_ready()
    return Store(warm, [], clock=clock, lease_seconds=60.0, costs=EagerCosts()), clock


def feed_session(data: bytes) -> None:
    """Any bytes from a client: each answer is one, no more is lent than may be, and what it held is given back."""
    (store, clock), sock = _store(), _Socket()
    session = Session(sock, store, _Reports(), clock=clock, role="fuzz", pid=1, lease_seconds=60.0)  # type: ignore[arg-type]  # as much of a socket as is used
    inbox = say.Inbox()
    session._hear(say.encode(say.Declare(1, msgspec.msgpack.encode(LAYOUT))), inbox)
    script = b"".join(map(say.encode, _said(data[1:]))) if data[:1] == b"\0" else data
    for piece in (script[: len(script) // 2], script[len(script) // 2 :]):
        session._hear(piece, inbox)
        assert session.lent <= max(BLOCKS // 16, len(session.layouts))
    for body in say.Inbox().feed(sock.sent):
        say.node_says(body)
    session._end()
    assert not session.leases
    assert not session.lent
    assert not store._warm._lent
    assert not len(store._books.leases)
    store.check_integrity()


def _said(script: bytes) -> Iterator[say.FromClient]:
    """Well-formed messages, four bytes each: what a mutation of raw bytes hardly ever finds."""
    for what, a, b, c in struct.iter_unpack("4b", script[: len(script) // 4 * 4]):
        keys = b"".join(KEYS[: max(0, a) % 5])
        slots = tuple(range(1, 1 + max(0, b) % 5))
        yield (
            say.Stage(a, (1, c)[: 1 + b % 2], keys, b),
            say.Release((a, b, c)),
            say.Damaged(b, keys),
            say.Lend(a, b % 3, c),
            say.GiveBack(slots),
            say.Commit(a, 1, keys, c, slots, bytes(16 * len(slots))),
            say.Unsaved(a, b, keys),
            say.Prefetch(a, (1,) * (1 + b % 2), keys, c / 8),
            say.Computed(a, b, c / 8, "m" * max(0, c)),
            say.Record(RECEIPT, bytes(max(0, b)), bytes(32)),
            say.Receipts(a, ("", "last", "request")[b % 3], c),
            say.Declare(b, msgspec.msgpack.encode(GIANT if c % 2 else LAYOUT)),
            say.Status(a),
            say.Metrics(a),
            say.Trace(a),
        )[what % 15]


class _Link:
    """As much of a link as the client's takers use. What the client asks, it is answered with `data`."""

    incarnation, ended = 7, False

    def __init__(self) -> None:
        self.memory = np.zeros(BLOCKS * BLOCK_BYTES, np.uint8)
        self.told: list[say.FromClient] = []

    def tell(self, message: say.FromClient) -> None:
        self.told.append(message)

    def number(self, _: object) -> int:
        return 1

    def ask(self, make: object, taker: object) -> None:
        """Nobody answers."""


@functools.cache
def _client() -> NodeClient:
    return NodeClient(Path(tempfile.mkdtemp(prefix="fuzz-node-")) / "nobody.sock", clock=SystemClock(), role="fuzz")


def feed_replies(data: bytes) -> None:
    """Any answers of a node: a plan whose parts fit together or none, and what is copied is verified or a miss."""
    client, link = _client(), _Link()
    client._memories = {link.incarnation: link.memory}
    for answer in _answers(data):
        staging = Staging([LAYOUT], KEYS, 65, client._clock, client._clock.now() + 1, client)
        client._staged(link, staging, answer)  # type: ignore[arg-type]  # as above
        plan = staging.plan()
        if plan is not None:
            assert 0 <= plan.blocks <= len(KEYS)
            into = [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in range(plan.blocks)]
            loaded = client.load(plan, 0, into)
            assert 0 <= loaded.blocks <= plan.blocks
            assert all(isinstance(gap.reason, Reason) for gap in (*plan.missing, *loaded.missing))
            client.release(plan.lease)
    assert not client._held


def _answers(data: bytes) -> Sequence[say.Answer]:
    found: list[say.Answer] = []
    try:
        for body in say.Inbox().feed(data):
            said = say.node_says(body)
            if not isinstance(said, say.Welcome | say.Refused):
                found.append(said)
    except say.MessageError:
        pass
    return found


SESSION_SEEDS = (
    b"\0" + bytes((3, 1, 1, 2, 5, 2, 2, 0, 0, 3, 0, 0, 1, 0, 1, 2)),
    b"\0" + bytes((0, 4, 64, 0, 6, 4, 1, 0, 7, 4, 0, 8, 2, 2, 1, 0, 4, 0, 3, 0, 11, 0, 2, 1)),
    b"\0" + bytes((8, 9, 1, 8, 9, 0, 4, 0, 10, 0, 1, 1, 12, 0, 0, 0, 13, 0, 0, 0)),
    say.encode(say.Lend(1, 1, 2)) + say.encode(say.Stage(2, (1,), b"".join(KEYS), 65)) + say.encode(say.Ping(3)),
    say.encode(say.Record(RECEIPT, bytes(64), bytes(32))),
)


def _staged(runs: tuple[say.RunStaged, ...], offsets: tuple[int, ...]) -> bytes:
    sums = bytes(16 * len(offsets))
    staged = say.Staged(1, 5, 1e9, runs, (say.Gap(2, 4, "EVICTED", ""),), 0.1, 0.2, 0.3, 1.0, 0.1, (offsets,), (sums,))
    return say.encode(staged)


REPLY_SEEDS = (
    _staged((say.RunStaged(0, 2, "memory", 0.1),), (0, BLOCK_BYTES)),
    _staged((say.RunStaged(0, 1, "memory", 0.1), say.RunStaged(1, 4, "disk", 0.1)), (0, 1 << 40, -5, 7)),
    say.encode(say.Promoting(1, 5.0)) + say.encode(say.Failed(1, "no")),
    say.encode(say.Lent(1, (1, 2), (0, 4096)))
    + say.encode(say.Committed(2, ("hit",), ()))
    + say.encode(say.Count(3, 1)),
)
