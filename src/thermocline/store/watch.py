"""Watching what a store's own tiers hold, as it changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import LayoutId


class Watch(Protocol):
    """Told of every change, in the order of changes: the store's lock is held, so take it in and return at once."""

    def entered(self, tier: str, layout: LayoutId, keys: Sequence[BlockKey], parents: Sequence[BlockKey]) -> None:
        """Blocks may be matched in this tier from now on. The parent of a text's first block is NO_PARENT."""

    def left(self, tier: str, layout: LayoutId, keys: Sequence[BlockKey]) -> None:
        """Blocks were evicted, expired, or turned out to be damaged: this tier does not have them any more."""
