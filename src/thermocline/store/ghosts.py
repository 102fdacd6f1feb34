"""Ghosts: what became of blocks that are gone. Bounded; what is older than its horizon is UNKNOWN, not NEVER_SEEN."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.store.receipt import Missing, Reason, merged

GHOSTS_KEPT = 65_536


class Ghost(NamedTuple):
    """Why a block left, from which tier, and when on the store's clock."""

    layout: LayoutId
    reason: Reason
    tier: str
    by: str
    at_seconds: float


class Ghosts:
    """The last blocks that left. Not thread-safe: the store holds its lock."""

    def __init__(self, kept: int = GHOSTS_KEPT) -> None:
        self._kept = kept
        self._ghosts: OrderedDict[BlockKey, Ghost] = OrderedDict()
        self._forgot = False

    def __len__(self) -> int:
        return len(self._ghosts)

    def note(self, key: BlockKey, ghost: Ghost) -> None:
        """A block left, or was not taken in."""
        self._ghosts[key] = ghost
        self._ghosts.move_to_end(key)
        if len(self._ghosts) > self._kept:
            self._ghosts.popitem(last=False)
            self._forgot = True

    def forget(self, keys: Sequence[BlockKey]) -> None:
        """These blocks are held again."""
        if self._ghosts:
            for key in keys:
                self._ghosts.pop(key, None)

    def explain(self, keys: Sequence[BlockKey], start: int, layout: LayoutId, now: float) -> tuple[Missing, ...]:
        """One reason for each of keys[start:], as runs."""
        unseen = Reason.UNKNOWN if self._forgot else Reason.NEVER_SEEN
        detail = "older than what is remembered of evicted blocks" if self._forgot else ""
        if not self._ghosts:
            return merged([Missing(start, len(keys), unseen, detail)])
        parts = []
        for at in range(start, len(keys)):
            ghost = self._ghosts.get(keys[at])
            if ghost is None:
                parts.append(Missing(at, at + 1, unseen, detail))
            elif ghost.layout != layout:
                parts.append(Missing(at, at + 1, Reason.OTHER_LAYOUT, "was held for another layout"))
            else:
                parts.append(Missing(at, at + 1, ghost.reason, _words(ghost, now)))
        return merged(parts)


def _words(ghost: Ghost, now: float) -> str:
    age = max(0.0, now - ghost.at_seconds)
    return f"left {ghost.tier} {_ago(age)} ago ({ghost.by})"


def _ago(seconds: float) -> str:
    """A rough age, so that blocks that left together read as one run."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return "less than a minute"
