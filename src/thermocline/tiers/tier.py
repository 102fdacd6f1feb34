"""The seam between the store and a medium. One conformance suite (tests/conformance) runs on every implementation."""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.blocks.slots import Slot

LOG = logging.getLogger("thermocline.tiers")

Piece = NDArray[np.uint8]
"""One contiguous stretch of a block, one-dimensional. A block's pieces, in layout order, are its bytes."""

Bitmap = list[bool]


class Medium(enum.StrEnum):
    """What a tier is made of."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    REMOTE = "remote"


class Outcome(enum.StrEnum):
    """What became of one block. Values, because none of these is an error of the program."""

    HIT = "hit"
    MISS = "miss"
    PENDING = "pending"
    CORRUPT = "corrupt"
    LATE = "late"
    FAILED = "failed"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Block:
    """A block on its way into a tier: its place in the chain (depth 1 is the first) and its bytes.

    `sum` was computed over the engine's own bytes when they were saved and travels with the block from tier to tier, so
    damage on the way is found, never blessed with a fresh sum. `slot` is set where the tier lent that room beforehand,
    and the bytes lie there already: then there is nothing to copy.
    """

    parent: BlockKey
    depth: int
    pieces: Sequence[Piece]
    sum: bytes
    slot: Slot | None = None


FIRST, GONE = -1, -2


@dataclass(frozen=True, slots=True)
class Found:
    """Blocks of one layout that a tier already held when it was opened, in columns of equal length and in any order.

    `positions` gives each key's place in the columns, 0 first. `parents` are such positions too: FIRST for a first
    block, GONE where the parent is not among these. Who restores a million blocks has no time for anything less plain.
    """

    layout: LayoutId
    positions: dict[BlockKey, int]
    parents: NDArray[np.int64]
    depths: NDArray[np.int64]
    stored_wall_seconds: NDArray[np.float64]

    @property
    def keys(self) -> list[BlockKey]:
        """All keys, by position."""
        return list(self.positions)

    def rooted(self) -> NDArray[np.bool_]:
        """Which blocks have all their ancestors here, each one less deep than the one below it."""
        above = np.where(self.parents >= 0, self.depths[np.maximum(self.parents, 0)], 0)
        jump = np.where(above + 1 == self.depths, self.parents, GONE)
        if (jump != GONE).all():
            return np.ones(len(jump), bool)
        while (jump >= 0).any():  # twice as far each time
            jump = np.where(jump >= 0, jump[np.maximum(jump, 0)], jump)
        rooted: NDArray[np.bool_] = jump == FIRST
        return rooted

    def only(self, some: NDArray[np.bool_]) -> Found:
        """These blocks of it; with each block its parent, or the parent is GONE."""
        keys = [key for key, stays in zip(self.positions, some.tolist(), strict=True) if stays]
        number = np.where(some, np.cumsum(some) - 1, GONE)
        above = self.parents[some]
        parents = np.where(above >= 0, number[np.maximum(above, 0)], above)
        columns = (parents, self.depths[some], self.stored_wall_seconds[some])
        return Found(self.layout, dict(zip(keys, range(len(keys)), strict=True)), *columns)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tier holds. `used_bytes <= capacity_bytes` always, headers, logs and temporary files included."""

    blocks: int
    used_bytes: int
    capacity_bytes: int


class Job:
    """The progress of a save: first visible (may be matched), then durable (survives the process, or the tier cannot).

    `outcomes` has one entry per block: PENDING at first, HIT once it is stored. A dropped block is FULL (no room), MISS
    (it can never fit), LATE (too much waits to be written already) or FAILED (the medium refused).
    """

    __slots__ = ("_done", "_lock", "_visible", "_when_done", "_when_visible", "outcomes")

    def __init__(self, outcomes: list[Outcome]) -> None:
        self.outcomes = outcomes
        self._visible = threading.Event()
        self._done = threading.Event()
        self._when_visible: list[Watcher] = []
        self._when_done: list[Watcher] = []
        self._lock = threading.Lock()

    @property
    def visible(self) -> bool:
        """True once the blocks that were stored may be matched."""
        return self._visible.is_set()

    @property
    def done(self) -> bool:
        """True once the blocks that were stored are durable, and the caller's buffers are free again."""
        return self._done.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Block until done; False if `seconds` passed first."""
        return self._done.wait(seconds)

    def watch(self, *, visible: Watcher | None = None, done: Watcher | None = None) -> None:
        """Call `visible(job)`, then `done(job)`, once each, in the thread that gets there; at once if that is past.

        A watcher that raises in a tier's thread is logged, and the others are called.
        """
        if visible is not None:
            self._watch(self._visible, self._when_visible, visible)
        if done is not None:
            self._watch(self._done, self._when_done, done)

    def set_visible(self) -> None:
        """For the tier: the stored blocks may be matched from now on."""
        self._advance(self._visible, self._when_visible)

    def set_done(self) -> None:
        """For the tier: the stored blocks are durable."""
        self.set_visible()
        self._advance(self._done, self._when_done)

    def _watch(self, event: threading.Event, watchers: list[Watcher], watcher: Watcher) -> None:
        with self._lock:
            if not event.is_set():
                watchers.append(watcher)
                return
        watcher(self)

    def _advance(self, event: threading.Event, watchers: list[Watcher]) -> None:
        with self._lock:
            event.set()
            calls, watchers[:] = tuple(watchers), ()
        for call in calls:
            try:
                call(self)
            except Exception:
                LOG.exception("a watcher of a save raised")


Watcher = Callable[[Job], object]


def block_length(blocks: Sequence[Block]) -> int:
    """Bytes of each of the blocks of one save (0 for none). Raises ValueError if they differ: a layout has one size."""
    lengths = {sum(piece.nbytes for piece in block.pieces) for block in blocks}
    if len(lengths) > 1:
        raise ValueError(f"blocks of one layout have one size, not {sorted(lengths)}")
    return lengths.pop() if lengths else 0


def leading_hits(outcomes: Sequence[Outcome]) -> int:
    """How many blocks, from the first one on, are a HIT: what lies behind another outcome is of no use."""
    return next((at for at, outcome in enumerate(outcomes) if outcome is not Outcome.HIT), len(outcomes))


class Tier(Protocol):
    """A place that keeps blocks. Every verb takes many keys; no verb raises because of a block.

    Keys of different layouts never meet. A tier does not decide what to evict: it answers FULL, and the store, which
    knows the tree of blocks, removes some and asks again.
    """

    name: str
    medium: Medium

    def holds(self, layout: LayoutId, keys: Sequence[BlockKey]) -> Bitmap:
        """Which of the keys are here and not known to be damaged. Touches no medium that can block."""

    def load(
        self, layout: LayoutId, keys: Sequence[BlockKey], into: Sequence[Sequence[Piece]], deadline: float
    ) -> list[Outcome]:
        """Copy each block into the caller's pieces, then verify that private copy.

        Only pieces whose outcome is HIT hold the block; all others hold anything at all, and must not be used. Returns
        by `deadline` (on the tier's clock), with LATE for what did not arrive; after the return nothing writes into
        `into`. A CORRUPT block is not held any more. PENDING: the tier serves others, and was not asked.
        """

    def save(self, layout: LayoutId, keys: Sequence[BlockKey], blocks: Sequence[Block]) -> Job:
        """Store blocks. Returns at once or after a copy; what cannot be taken now is FULL in the job's outcomes.

        A key that is already held is replaced. The caller's pieces must stay as they are until the job is done.
        """

    def remove(self, layout: LayoutId, keys: Sequence[BlockKey]) -> int:
        """Forget blocks; their room is free at once. Returns how many were held."""

    def usage(self) -> Usage:
        """What is held now."""

    def found(self) -> Sequence[Found]:
        """What was held when the tier was opened; empty for a tier that starts cold."""

    def check_integrity(self) -> None:
        """Conservation laws hold: what is free and what is used adds up. Raises AssertionError."""

    def close(self) -> None:
        """Finish what is in flight, make it durable, let go of files and threads. A second call does nothing."""


class LendingTier(Tier, Protocol):
    """A tier in this process's memory, whose blocks can be written elsewhere without a copy."""

    def block(self, layout: LayoutId, key: BlockKey) -> tuple[Piece, bytes] | None:
        """A view of a block and its sum. The caller keeps it from eviction for as long as it uses the view."""

    def places(self, layout: LayoutId, keys: Sequence[BlockKey]) -> tuple[list[int], bytes]:
        """Where each leading block that is here lies in the memory behind `fd`, and their sums one behind the other."""

    def lendable(self, block_bytes: int) -> int:
        """How many slots for blocks of this size may be lent beyond those that are, if there is or will be room."""

    def lend(self, block_bytes: int, count: int) -> list[Slot]:
        """Up to `count` slots for blocks that others write in place, until they are saved or taken back."""

    def lent(self, slot: Slot, block_bytes: int) -> tuple[int, Piece]:
        """Where a lent slot lies in the memory behind `fd`, and its bytes."""

    def take_back(self, slots: Sequence[Slot]) -> None:
        """Lent slots are free again. Nobody may write there any more: the caller knows that."""

    @property
    def fd(self) -> int:
        """The descriptor of the memory, for processes that map it. Valid until `close`."""


@runtime_checkable
class BoundedTier(Tier, Protocol):
    """A tier that knows beforehand what a save will lack: making room first leaves the save in one piece."""

    def shortfall(self, block_bytes: int, count: int) -> int:
        """How many blocks should go before a save of `count`. None, where all that it may take now finds room."""


@runtime_checkable
class SharedTier(Tier, Protocol):
    """A tier that other processes use as well: it evicts by itself, and only asking tells what it holds now."""

    depth_max: int | None
    """Blocks deeper than this are never kept."""

    gain_min: float
    """Only beginnings that are loaded at least so many times faster than computed are worth their room."""

    def find(self, layout: LayoutId, keys: Sequence[BlockKey], deadline: float) -> list[Outcome]:
        """Which of the keys are there now: HIT or MISS; LATE, FAILED or PENDING for all where that was not learned.

        One round trip for all keys, over by `deadline` and by the tier's own bound.
        """

    def known(self, layout: LayoutId, keys: Sequence[BlockKey]) -> Bitmap:
        """Which of the keys this process wrote, or met there, not long ago, or is writing. Asks nobody."""
