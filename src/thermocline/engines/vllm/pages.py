"""The pages of one KV group on one rank: blocks go from them to the node's memory and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import Layout
from thermocline.engines.vllm.layout import Span
from thermocline.node.client import NodeClient
from thermocline.node.places import Places
from thermocline.store.receipts import Loaded
from thermocline.tiers.tier import Job, Piece


class GroupPages(Protocol):
    """How blocks are moved. `load` has a thread of its own; the model's thread calls the other verbs."""

    layout: Layout

    def load(self, places: Places, pages: Sequence[int]) -> Loaded:
        """Bring blocks into these pages, and verify what arrived there, before this returns.

        Only the first `Loaded.blocks` of the pages hold their block then; later ones hold anything at all. After the
        return nothing writes into them.
        """

    def behind_engine(self) -> None:
        """Loads from now on come behind what the engine has told its device until now. Does not wait."""

    def save(self, keys: Sequence[BlockKey], pages: Sequence[int], start: int) -> Job:
        """Copy the blocks in these pages to the node: that of keys[start], of keys[start + 1], ...

        Whatever the engine does with the pages after the return comes after the copy. See `NodeClient.save`.
        """

    def relabel(self, layout: Layout) -> None:
        """What is saved from now on has this layout: the same bytes, under another name."""

    def close(self) -> None:
        """Wait for copies under way. A second call does nothing."""


class HostPages:
    """Pages in this process's own memory: copied by the processor, verified where they arrive."""

    def __init__(self, client: NodeClient, layout: Layout, spans: Sequence[Span], regions: Sequence[Piece]) -> None:
        """`regions` are the engine's allocations, by the number that the spans have for them."""
        self.layout = layout
        self._client = client
        self._spans = [(regions[span.region], span.offset, span.stride, span.nbytes) for span in spans]
        self._pages = min((_pages(regions[span.region], span) for span in spans), default=0)

    def view(self, page: int) -> list[Piece]:
        """The pieces of the block in a page, in layout order. Raises IndexError for a page that does not exist."""
        if not 0 <= page < self._pages:
            raise IndexError(f"there are pages 0 to {self._pages - 1}")
        return [
            region[offset + page * stride : offset + page * stride + nbytes]
            for region, offset, stride, nbytes in self._spans
        ]

    def load(self, places: Places, pages: Sequence[int]) -> Loaded:
        """See `GroupPages.load`."""
        return self._client.fetch(places, [self.view(page) for page in pages])

    def behind_engine(self) -> None:
        """See `GroupPages.behind_engine`: the processor has done it when this is called."""

    def save(self, keys: Sequence[BlockKey], pages: Sequence[int], start: int) -> Job:
        """See `GroupPages.save`."""
        return self._client.save(self.layout, keys, [self.view(page) for page in pages], start=start)

    def relabel(self, layout: Layout) -> None:
        """See `GroupPages.relabel`."""
        self._client.ready(layout, self._client.unready(self.layout))
        self.layout = layout

    def close(self) -> None:
        """See `GroupPages.close`: nothing is under way once a call returned."""


def _pages(region: Piece, span: Span) -> int:
    return (region.nbytes - span.offset - span.nbytes) // span.stride + 1
