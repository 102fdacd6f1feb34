"""What instances and nodes say of their caches, brought to the index: by their names, in order, from one thread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from thermocline.fleet.index import FleetIndex
from thermocline.fleet.instance import Instance
from thermocline.wire.events import read_batch, read_topic
from thermocline.wire.messages import MessageError

NODE = "node"
"""The index tells a node's stream of an instance from the engine's own by this."""


class Hearing:
    """Takes batches for a `Subscriber`. `over` names the instance whose events come over a socket of their own.

    A topic names its instance (by name or URL) or its node; a node's events are true of all instances that it serves.
    """

    def __init__(self, index: FleetIndex, over: dict[str, str] | None = None) -> None:
        self._index, self._over = index, over or {}
        self._slots: dict[str, tuple[tuple[int, str], ...]] = {}
        self.counts: Counter[str] = Counter()

    def now_there(self, instances: Sequence[tuple[int, Instance]]) -> None:
        """These are the instances from now on, by their slots."""
        slots: dict[str, tuple[tuple[int, str], ...]] = {}
        for slot, instance in instances:
            slots[instance.name] = slots[instance.url.rstrip("/")] = ((slot, ""),)
        for slot, instance in instances:
            if instance.node:
                slots[instance.node] = (*slots.get(instance.node, ()), (slot, NODE))
        self._slots = slots

    def take(self, source: str, sequence: int, payload: bytes) -> None:
        """One batch. What nobody here sent, or is no batch, is counted."""
        topic = read_topic(source)
        name = topic.name if topic is not None else self._over.get(source, source)
        slots = self._slots.get(name, ())
        if not slots:
            self.counts["unknown"] += 1
            return
        try:
            batch = read_batch(payload)
        except MessageError:
            self.counts["malformed"] += 1
            return
        self.counts["batches"] += 1
        for slot, kind in slots:
            stream = f"{kind} {topic.model}" if kind and topic is not None else kind  # a node numbers each model's
            applied = self._index.apply(slot, batch, sequence, source=stream)
            if applied.gap is not None and applied.gap[0]:  # the subscriber has asked already; it was not to be had
                self.counts["lost"] += applied.gap[1] - applied.gap[0]
