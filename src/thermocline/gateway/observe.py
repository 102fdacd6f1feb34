"""What the gateway says of the events it hears and of its index: in its log, in /metrics and at the admin socket."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from typing import Protocol

from msgspec import Struct

from thermocline.fleet.index import FleetIndex
from thermocline.fleet.wiring import State
from thermocline.gateway.standing import Standing
from thermocline.metrics import Metrics

LOG = logging.getLogger("thermocline.gateway")
LOOK_SECONDS = 5.0
FINE = frozenset({State.NEW, State.EXACT})


class Blocks(Struct, frozen=True):
    """What an instance holds, as its events tell; guesses from what was sent there do not count."""

    device: int = 0
    host: int = 0
    disk: int = 0


class Listening(Protocol):
    """As much of a `Subscriber` as is told of."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Batches, by how they fared on the way."""

    @property
    def alive(self) -> bool:
        """True while it listens."""


class Observer:
    """Looks at the index, and at those who feed it. `counts` is what a `Hearing` counted."""

    def __init__(self, index: FleetIndex) -> None:
        self._index = index
        self._counts: dict[str, Mapping[str, int]] = {}
        self._listening: Listening | None = None
        self._told: dict[str, State] = {}

    def hears(self, counts: Mapping[str, int], listening: Listening) -> None:
        """Events come from there from now on."""
        self._counts = {"socket": listening.counts, "index": counts}
        self._listening = listening

    def wiring(self, standing: Standing) -> str:
        """Whether the instance's events can be believed, in one word; empty where none are listened for."""
        return self._index.wiring(standing.slot).state if self._listening is not None else ""

    def blocks(self, standing: Standing) -> Blocks:
        """How many blocks it holds, by tier. They are counted one by one: for people, not for every request."""
        return Blocks(*self._index.blocks_of(standing.slot))

    def measure(self, metrics: Metrics, standings: Iterable[Standing]) -> None:
        """Set the figures; counters too, as they are counted elsewhere."""
        metrics.gauge("index_blocks", self._index.blocks)
        metrics.gauge("index_bytes", self._index.nbytes)
        metrics.gauge("index_evicted_blocks_total", self._index.evicted_blocks)
        if self._listening is None:
            return
        metrics.gauge("events_listening", float(self._listening.alive))
        for stage, counts in self._counts.items():
            for outcome, count in [*counts.items()]:
                metrics.gauge("events_heard_total", count, (("stage", stage), ("outcome", outcome)))
        for standing in standings:
            fine = self._index.wiring(standing.slot).state in FINE
            metrics.gauge("instance_wired", float(fine), (("instance", standing.instance.name),))

    def look(self, standings: Iterable[Standing]) -> None:
        """Say it once, plainly, when an instance's events do not come or do not match what is routed."""
        before, self._told = self._told, {}
        for standing in standings:
            wiring, name = self._index.wiring(standing.slot), standing.instance.name
            if wiring.state not in FINE and before.get(name) != wiring.state:
                LOG.warning("instance %s: %s: %s", name, wiring.state, wiring.advice)
            self._told[name] = wiring.state

    async def watch(self, standings: Iterable[Standing]) -> None:
        """Look again and again."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            self.look(standings)
