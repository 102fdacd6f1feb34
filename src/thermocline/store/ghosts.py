"""Ghosts: what became of blocks that are gone. Bounded; what is older than its horizon is UNKNOWN, not NEVER_SEEN."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import NamedTuple

from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.store.receipt import Missing, Reason, merged

GHOSTS_KEPT = 65_536


class Ghost(NamedTuple):
    """Why a block is not there: `what` happened, such as "left memory", when on the store's clock, `by` what rule."""

    reason: Reason
    what: str
    by: str
    at_seconds: float


class Ghosts:
    """The last blocks that left. Not thread-safe: the store holds its lock."""

    def __init__(self, kept: int = GHOSTS_KEPT) -> None:
        self._kept = kept
        self._ghosts: OrderedDict[BlockKey, dict[LayoutId, Ghost]] = OrderedDict()
        self._forgot = False

    def __len__(self) -> int:
        return len(self._ghosts)

    def note(self, layout: LayoutId, key: BlockKey, ghost: Ghost) -> None:
        """A block left, or was not taken in. Blocks that go together share one ghost: see `explain`.

        One that leaves the only tier it was in, as another did not admit it, is missing for that other's reason.
        """
        noted = self._ghosts.setdefault(key, {})
        if ghost.reason is not Reason.EVICTED or layout not in noted or noted[layout].reason is not Reason.NOT_ADMITTED:
            noted[layout] = ghost
        self._ghosts.move_to_end(key)
        if len(self._ghosts) > self._kept:
            self._ghosts.popitem(last=False)
            self._forgot = True

    def refused(self, layout: LayoutId, keys: Iterable[BlockKey], tier: str, why: str, now: float) -> None:
        """A tier was not given these blocks, deepest first; above one of which that is known already, all are known."""
        ghost = Ghost(Reason.NOT_ADMITTED, f"not written to {tier}", why, now)
        for key in keys:
            noted = self._ghosts.get(key, {}).get(layout)
            if noted is not None and noted.reason is Reason.NOT_ADMITTED:
                break
            self.note(layout, key, ghost)

    def forget(self, layout: LayoutId, keys: Sequence[BlockKey]) -> None:
        """These blocks are held again."""
        for key in keys if self._ghosts else ():
            ghosts = self._ghosts.get(key)
            if ghosts is not None:
                ghosts.pop(layout, None)
                if not ghosts:
                    del self._ghosts[key]

    def explain(
        self, layout: LayoutId, keys: Sequence[BlockKey], start: int, others: int, now: float
    ) -> tuple[Missing, ...]:
        """One reason for each of keys[start:], as runs; the first `others` blocks are held for another layout.

        This runs for every block of every prompt that is new, so it looks up keys and compares neighbours, no more.
        """
        get = self._ghosts.get
        noted = [get(key) for key in keys[start:]]
        causes = [None if ghosts is None else ghosts.get(layout, _OF_ANOTHER_LAYOUT) for ghosts in noted]
        parts: list[Missing] = []
        at = start
        for cause, run in groupby(causes):
            stop = at + len(list(run))
            if cause is None:
                parts.append(Missing(at, min(stop, others), Reason.OTHER_LAYOUT, "held for another layout"))
                parts.append(Missing(max(at, others), stop, *self._unseen()))
            else:
                parts.append(Missing(at, stop, cause.reason, _words(cause, now)))
            at = stop
        return merged(parts)

    def _unseen(self) -> tuple[Reason, str]:
        if self._forgot:
            return Reason.UNKNOWN, "older than what is remembered of evicted blocks"
        return Reason.NEVER_SEEN, ""


_OF_ANOTHER_LAYOUT = Ghost(Reason.OTHER_LAYOUT, "was held for another layout", "", 0.0)


def _words(ghost: Ghost, now: float) -> str:
    if ghost is _OF_ANOTHER_LAYOUT:
        return ghost.what
    by = f" ({ghost.by})" if ghost.by else ""
    return f"{ghost.what} {_ago(max(0.0, now - ghost.at_seconds))} ago{by}"


def _ago(seconds: float) -> str:
    """A rough age, so that blocks that left together read as one run."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return "less than a minute"
