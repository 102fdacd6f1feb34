"""Announcing what a store's own tiers hold, as KV events: memory is CPU, disk is STORAGE, hashes are full own keys.

Own keys say all, so the events have no token ids, but where the engine of this process tells them: other routers can
use its events then. The model is in the topic. Of an engine's layouts (ranks, KV groups) the first one is announced.
"""

from __future__ import annotations

import platform
from array import array
from collections.abc import Iterator, Sequence

from thermocline.blocks.key import NO_PARENT, BlockKey
from thermocline.blocks.layout import Layout, LayoutId
from thermocline.errors import SettingsError
from thermocline.settings import Settings
from thermocline.store.store import Store
from thermocline.tiers.tier import Medium
from thermocline.wire.events import CPU, STORAGE, BlockRemoved, BlockStored, Event, Topic, write_topic

LAYOUTS_MAX = 1024
TOLD_AT_ONCE = 1024
"""Places of the store that are told under one lock: a millisecond."""
NO_TOKENS: array[int] = array("I")


def open_announcer(settings: Settings, store: Store, *, name: str = "") -> Announcer | None:
    """What announces the tiers of this store, where the settings ask for that. `name` if they give none.

    Raises SettingsError where an endpoint cannot be had, or pyzmq is not installed.
    """
    if settings.events_endpoint is None:
        return None
    name = settings.events_name or name or platform.node()
    return Announcer(store, name, settings.events_endpoint, settings.events_replay_endpoint)


class Announcer:
    """The watch of one store. Layouts are announced from when they are declared. Close it before the store."""

    def __init__(self, store: Store, name: str, endpoint: str, replay_endpoint: str | None = None) -> None:
        self._store, self._name = store, name
        self._declared: dict[LayoutId, tuple[str, int]] = {}
        self._spelt: set[BlockKey] = set()  # what was told with its tokens since all was told
        self._told: tuple[dict[BlockKey, int], array[int]] | None = None
        self._media = {tier: CPU if store.medium(tier) is Medium.HOST else STORAGE for tier in store.usage()}
        try:
            from thermocline.wire.publisher import Publisher
        except ImportError:
            hint = "pip install 'thermocline[events]'"
            raise SettingsError("KV events need pyzmq, which is not installed", hint=hint) from None
        self._publisher = Publisher(endpoint, replay_endpoint, tell_all=self._tell_all)
        store.watch(self)

    def declare(self, layout: Layout) -> None:
        """Blocks of this layout are announced from now on, and those there are already. Does nothing the second time.

        Of one model two layouts may be announced; what one of them loses counts as lost, though the other may have it.
        """
        first = not (layout.tp_rank or layout.pp_rank or layout.kv_group)
        if first and layout.id not in self._declared:
            if len(self._declared) >= LAYOUTS_MAX:
                del self._declared[next(iter(self._declared))]  # nobody loads what was saved so many layouts ago
            self._declared[layout.id] = write_topic(Topic(self._name, layout.model)), layout.tokens_per_block
            self._publisher.tell_again()

    def text(self, keys: Sequence[BlockKey], tokens: bytes) -> None:
        """What enters until `text_over` is of this text (ids as u32), whose blocks have these keys."""
        self._told = dict(zip(keys, range(len(keys)), strict=True)), array("I", tokens)

    def text_over(self) -> None:
        """The text's tokens are told no more."""
        self._told = None

    def close(self) -> None:
        """Publish what waits, and end. A second call does nothing."""
        self._publisher.close()

    # -- the store's watch ---------------------------------------------------------------------------------------------

    def entered(self, tier: str, layout: LayoutId, keys: Sequence[BlockKey], parents: Sequence[BlockKey]) -> None:
        """See `Watch.entered`."""
        if layout in self._declared:
            topic, block_tokens = self._declared[layout]
            medium = self._media[tier]
            events = []
            for run, parent in _runs(keys, parents):
                tokens = self._tokens(run, parent, block_tokens) if medium == CPU else NO_TOKENS
                behind = None if parent == NO_PARENT else parent
                events.append(BlockStored(tuple(run), behind, tokens, block_tokens, medium))
            self._publish(topic, events)

    def left(self, tier: str, layout: LayoutId, keys: Sequence[BlockKey]) -> None:
        """See `Watch.left`."""
        if layout in self._declared:
            medium = self._media[tier]
            if medium == CPU:
                self._spelt.difference_update(keys)
            self._publish(self._declared[layout][0], [BlockRemoved(tuple(keys), medium)])

    def _publish(self, topic: str, events: Sequence[Event]) -> None:
        outcome = "queued" if self._publisher.publish(topic, events) else "dropped"
        self._store.metrics.count("event_batches_total", labels=(("outcome", outcome),))

    def _tokens(self, run: Sequence[BlockKey], behind: BlockKey, block_tokens: int) -> array[int]:
        """A block that follows one told by its key alone is told so too: nobody could chain its tokens."""
        told = self._told
        if told is None or run[0] not in told[0] or (behind != NO_PARENT and behind not in self._spelt):
            return NO_TOKENS
        self._spelt.update(run)
        first = told[0][run[0]]
        return told[1][first * block_tokens : (first + len(run)) * block_tokens]

    def _tell_all(self) -> Iterator[None]:
        self._spelt.clear()
        start, told = 0, bytearray()
        while start := self._store.tell_held(self, start, TOLD_AT_ONCE, told):
            yield


def _runs(keys: Sequence[BlockKey], parents: Sequence[BlockKey]) -> Iterator[tuple[list[BlockKey], BlockKey]]:
    """Blocks that follow each other, and what each such run follows."""
    run: list[BlockKey] = []
    behind = NO_PARENT
    for key, parent in zip(keys, parents, strict=True):
        if run and parent != run[-1]:
            yield run, behind
            run = []
        behind = behind if run else parent
        run.append(key)
    if run:
        yield run, behind
