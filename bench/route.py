"""A routing decision and the index behind it, beside Dynamo's router core on the same events and the same prompts.

Both sides hear the same batches over ZeroMQ, each sent by the other side's process, and are asked in turns about the
same prompts. A decision of ours is all that a gateway does with token ids: prints, match, and the router's prices.
Nothing is remembered from one decision to the next. Compared is CPU time of the whole process, the least of all rounds.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from typing import Any

from bench.dynamo_peer import (
    CONVERSATIONS,
    FORMS,
    KINDS,
    LONG,
    Dynamo,
    Senders,
    blocks_of,
    payloads,
    placed,
    prompts,
    resident_bytes,
)
from bench.harness import CLOCK, Check, Progress, Report, check, spread
from bench.vllm_server import python_of
from thermocline.errors import BenchError
from thermocline.fleet.books import Fleet
from thermocline.fleet.index import FleetIndex
from thermocline.fleet.instance import Ask, Instance
from thermocline.fleet.router import route
from thermocline.wire.events import read_batch
from thermocline.wire.subscriber import Subscriber

FLEETS = (8, 64)
ROUNDS = 15
AT_ONCE = 100
"""Conversations whose events are taken in by one side before it is the other's turn: fewer than what PUB drops."""
CONNECT_SECONDS, REST_SECONDS = 2.0, 0.002
BLOCKS_MIN = 900_000
BLOCKS_MAX = 1_300_000
PATIENCE_SECONDS = 60.0
POLICY = "predicted_ttft"
Seconds = tuple[float, float]


def run(progress: Progress) -> Report:
    """Both fleets, one after the other."""
    peer_python = python_of("DYNAMO_PYTHON", ".venv-dynamo", "bench-dynamo-env")
    checks: list[Check] = []
    details: dict[str, Any] = {"arms": {}, "ratios": {}, "least": {}, "notes": []}
    for instances in FLEETS:
        with contextlib.closing(Dynamo(peer_python, instances)) as peer, contextlib.closing(Ours(instances)) as ours:
            progress(f"{instances} instances: both sides make their events")
            ours.prepare()
            ours.hear(peer.ask("connect", *ours.senders.endpoints))
            _ingested(ours, peer, instances, progress, checks, details)
            _same(ours, peer)
            _decided(ours, peer, instances, progress, checks, details)
    return Report(checks, details)


class Ours:
    """Our side: the index, the books of a fleet, and the subscriber's thread that feeds the index."""

    def __init__(self, instances: int) -> None:
        self._places = placed(instances)
        self.index = FleetIndex(BLOCKS_MAX, secret=1)
        self._fleet = Fleet()
        for slot in range(instances):
            self._fleet.join(Instance(f"i{slot}"))
        self.senders = Senders(instances)
        self._slots: dict[str, int] = {}
        self._subscriber: Subscriber | None = None
        self._taken = 0
        self._payloads: list[list[bytes]] = []
        self._prompts: dict[tuple[str, str], list[Any]] = {}
        self._memory = 0

    def prepare(self) -> None:
        """Make all events, so that their memory and time are not counted."""
        self._payloads = [payloads(number) for number in range(CONVERSATIONS + LONG)]
        self._memory = resident_bytes()

    def hear(self, endpoints: Sequence[str]) -> None:
        """Connect to the instances' events. What is sent before that is done is lost."""
        self._slots = {f">{endpoint}": slot for slot, endpoint in enumerate(endpoints)}
        self._subscriber = Subscriber([*self._slots], self._take)
        CLOCK.sleep(CONNECT_SECONDS)

    def memory(self) -> int:
        """What this process has grown by since `prepare`."""
        return resident_bytes() - self._memory

    def send(self, first: int, stop: int) -> None:
        """Send these conversations' events to the other side."""
        for number in range(first, stop):
            self.senders.send(self._places[number], self._payloads[number])

    def ingest(self, peer: Dynamo, first: int, stop: int) -> float:
        """CPU seconds of taking in these conversations' events, which the other side sends."""
        self._taken = 0
        before = time.process_time()
        sent = peer.ask("send", first, stop)
        deadline = CLOCK.now() + PATIENCE_SECONDS
        while self._taken < sent:
            CLOCK.sleep(REST_SECONDS)
            if CLOCK.now() > deadline:
                raise BenchError("events are not heard", hint="the machine may be too busy")
        return time.process_time() - before

    def decide(self, kind: str, form: str) -> tuple[float, float]:
        """CPU and wall seconds per decision."""
        asked = self._prompts.get((kind, form))
        if asked is None:
            asked = self._prompts[kind, form] = prompts(kind, form)
        cpu, wall = time.process_time(), time.perf_counter()
        for tokens in asked:
            self._route(tokens)
        return (time.process_time() - cpu) / len(asked), (time.perf_counter() - wall) / len(asked)

    def found(self, kind: str) -> list[tuple[int, int]]:
        """For each prompt: the chosen instance, and the longest match in tokens."""
        return [
            (self._route(tokens), max(self.index.match(self.index.chain(tokens)).device, default=0))
            for tokens in prompts(kind, "list")
        ]

    def close(self) -> None:
        """End the thread."""
        if self._subscriber is not None:
            self._subscriber.close()
        self.senders.close()

    def _route(self, tokens: Sequence[int]) -> int:
        overlaps = self.index.match(self.index.chain(tokens))
        return route(Ask(len(tokens), overlaps), self._fleet, POLICY, 0.0)[0].instance

    def _take(self, source: str, sequence: int, payload: bytes) -> None:
        self.index.apply(self._slots[source], read_batch(payload), sequence)
        self._taken += 1


# -- what is measured --------------------------------------------------------------------------------------------------


def _ingested(
    ours: Ours, peer: Dynamo, instances: int, progress: Progress, checks: list[Check], details: dict[str, Any]
) -> None:
    taken: tuple[list[float], list[float]] = ([], [])
    inserts = 0
    for first in range(0, CONVERSATIONS + LONG, AT_ONCE):
        progress(f"{instances} instances: events of conversation {first}")
        stop = min(first + AT_ONCE, CONVERSATIONS + LONG)
        inserts += sum(blocks_of(number) for number in range(first, stop))
        taken[0].append(ours.ingest(peer, first, stop))
        peer.ask("begin")
        ours.send(first, stop)
        taken[1].append(peer.ask("end"))
    mine, theirs = (1e6 * sum(seconds) / inserts for seconds in taken)
    blocks = ours.index.blocks
    where = f"{instances} instances"
    grown = ours.memory()
    checks += [
        check(f"{where}: unique blocks", blocks, "blocks", BLOCKS_MIN, "higher"),
        check(f"{where}: CPU time per announced block / Dynamo's", mine / theirs, "x", 1.0, "lower"),
        check(f"{where}: index, by its own count", ours.index.nbytes / blocks, "bytes/block", 160, "lower"),
    ]
    if instances == FLEETS[0]:  # later ones grow into memory that the first one has left
        checks.append(check(f"{where}: growth of this process", grown / blocks, "bytes/block", 160, "lower"))
    details["ratios"][f"{where}: ingest per {AT_ONCE} conversations, ours / Dynamo"] = spread(
        [a / b for a, b in zip(*taken, strict=True)]
    )
    details["notes"].append(
        f"{where}: {inserts:,} announced blocks, {blocks:,} unique; CPU per block {mine:.2f} us, Dynamo {theirs:.2f};"
        f" memory {grown / 1e6:,.0f} MB, Dynamo {peer.ask('memory') / 1e6:,.0f} MB"
    )


def _same(ours: Ours, peer: Dynamo) -> None:
    """Both must find the same, else their times cannot be compared."""
    for kind in KINDS:
        pairs = list(zip(ours.found(kind), peer.ask("found", kind), strict=True))
        if any(mine[1] != theirs[1] for mine, theirs in pairs):
            wrong = [(mine[1], theirs[1]) for mine, theirs in pairs if mine[1] != theirs[1]]
            raise BenchError(f"{kind}: other matches than Dynamo's: {wrong[:3]}", hint="some events may be lost")


def _decided(
    ours: Ours, peer: Dynamo, instances: int, progress: Progress, checks: list[Check], details: dict[str, Any]
) -> None:
    """Each kind of prompt in both forms. What is held of it matters most, so a check is about the worst kind."""
    worst: dict[str, float] = {}
    for kind, form in itertools.product(KINDS, FORMS):
        name = f"{instances} instances, {kind}, {form}"
        progress(name)
        mine, theirs = _rounds(ours, peer, kind, form)
        rows = [[min(column) for column in zip(*side, strict=True)] for side in (mine, theirs)]
        ratio = rows[0][0] / rows[1][0]
        group = f"{instances} instances, {kind.partition(',')[0]} as {form}: decision / Dynamo's, worst kind"
        worst[group] = max(worst.get(group, 0.0), ratio)
        details["ratios"][name] = spread([a[0] / b[0] for a, b in zip(mine, theirs, strict=True)])
        for who, side, row in (("ours", mine, rows[0]), ("Dynamo", theirs, rows[1])):
            details["arms"][f"{name}: {who}"] = spread([cpu for cpu, _ in side])
            details["least"][f"{name}: {who}"] = {"cpu_seconds": row[0], "wall_seconds": row[1]}
        cells = [f"{1e6 * row[at]:,.0f}" for at in (0, 1) for row in rows]
        details["notes"].append(
            f"{name}: CPU us {cells[0]} / {cells[1]} = {ratio:.2f} x, wall us {cells[2]} / {cells[3]}"
        )
    checks += [check(group, ratio, "x", 1 / 3, "lower") for group, ratio in worst.items()]


def _rounds(ours: Ours, peer: Dynamo, kind: str, form: str) -> tuple[list[Seconds], list[Seconds]]:
    """CPU and wall seconds of both sides, in turns, behind one round that warms up."""
    sides: tuple[list[Seconds], list[Seconds]] = ([], [])
    for at in range(ROUNDS + 1):
        turns = [(0, ours.decide), (1, lambda *asked: peer.ask("decide", *asked))]
        for side, decide in turns if at % 2 else turns[::-1]:
            cpu, wall = decide(kind, form)
            if at:
                sides[side].append((cpu, wall))
    return sides
