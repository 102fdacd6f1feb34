"""What the tests of the store are made from: layouts, keys, bytes that follow from the key, a scripted tier."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from thermocline.blocks.frame import copy_out
from thermocline.blocks.key import NO_PARENT, BlockKey
from thermocline.blocks.layout import Layout, LayoutId
from thermocline.store.receipts import account
from thermocline.store.store import Store
from thermocline.tiers.tier import Bitmap, Block, Found, Job, Medium, Outcome, Piece, Usage

BLOCK_BYTES = 4096
TOKENS_PER_BLOCK = 16
GUARD_SECONDS = 30.0
"""No test waits longer than this for a job: whatever takes longer is a deadlock."""


def make_layout(
    model: str = "model", *, block_bytes: int = BLOCK_BYTES, tokens_per_block: int = TOKENS_PER_BLOCK, rank: int = 0
) -> Layout:
    """A layout that differs from others only in what is named here."""
    return Layout(
        model=model,
        weights_digest=b"weights",
        dtype="float32",
        kv_dtype="float32",
        layers=1,
        kv_heads=1,
        head_dim=1,
        tokens_per_block=tokens_per_block,
        block_bytes=block_bytes,
        engine="test",
        engine_version="1",
        isa="any",
        order="any",
        tp_rank=rank,
    )


LAYOUT = make_layout()


def chain(name: str, count: int, *, behind: Sequence[BlockKey] = ()) -> list[BlockKey]:
    """A path of keys: those of `behind`, then `count` that only this name has."""
    keys = list(behind)
    for at in range(count):
        above = keys[-1] if keys else NO_PARENT
        keys.append(BlockKey(hashlib.sha256(above + f"{name} {at}".encode()).digest()))
    return keys


def content(layout: Layout, key: BlockKey) -> NDArray[np.uint8]:
    """The bytes of a block, which follow from what it is, so that any wrong byte shows."""
    return np.frombuffer(hashlib.shake_128(layout.id + key).digest(layout.block_bytes), np.uint8)


def contents(layout: Layout, keys: Sequence[BlockKey]) -> list[list[Piece]]:
    """Every block as two pieces, as an engine's memory is rarely contiguous."""
    cut = layout.block_bytes // 4
    whole = [content(layout, key) for key in keys]
    return [[piece[:cut], piece[cut:]] for piece in whole]


def save(store: Store, keys: Sequence[BlockKey], layout: Layout = LAYOUT, *, start: int = 0) -> Job:
    """Save the path from `start` on, and wait until it lies wherever it is going to."""
    job = store.save(layout, keys, contents(layout, keys[start:]), start=start)
    assert job.visible
    assert job.wait(GUARD_SECONDS)
    return job


@dataclass(frozen=True)
class Answer:
    """What a match and a load brought."""

    blocks: int
    planned: int
    by_tier: dict[str, int]
    reasons: list[tuple[int, int, str]]


def ask(store: Store, keys: Sequence[BlockKey], *layouts: Layout) -> Answer:
    """Match, load every rank, check each byte, release, and check that each block that is missing has one reason."""
    layouts = layouts or (LAYOUT,)
    plan = store.match(layouts, keys, prompt_tokens=len(keys) * TOKENS_PER_BLOCK + 1)
    answers = []
    for rank, layout in enumerate(layouts):
        into = [[np.zeros(layout.block_bytes, np.uint8)] for _ in range(plan.blocks)]
        loaded = store.load(plan, rank, into)
        for key, pieces in zip(keys[: loaded.blocks], into, strict=False):
            assert np.array_equal(pieces[0], content(layout, key)), "a block that was called verified holds other bytes"
        answers.append(loaded)
    store.release(plan.lease)
    least = min(answers, key=lambda loaded: loaded.blocks)
    missing = account(plan, least)[:-1]  # the tail is always there
    assert [at for part in missing for at in range(part.start, part.stop)] == list(range(least.blocks, len(keys)))
    reasons = [(part.start, part.stop, str(part.reason)) for part in missing]
    return Answer(least.blocks, plan.blocks, least.by_tier, reasons)


def flip_in_memory(store: Store, key: BlockKey, layout: Layout = LAYOUT) -> bool:
    """Flip one bit of a block in memory; False if it is not there."""
    lent = store._warm.block(layout.id, key)
    if lent is not None:
        lent[0][100] ^= 1
    return lent is not None


def flip_on_disk(folder: Path, key: BlockKey, layout: Layout = LAYOUT) -> bool:
    """Flip one bit of a block in its segment file; False if it is not there."""
    for path in folder.glob("*.segment"):
        at = path.read_bytes().find(content(layout, key).tobytes())
        if at >= 0:
            with path.open("r+b") as file:
                file.seek(at + 100)
                byte = file.read(1)[0]
                file.seek(at + 100)
                file.write(bytes([byte ^ 1]))
            return True
    return False


def never(*_: object) -> None:
    """What a scripted tier does while all is well."""


@dataclass
class ScriptedTier:
    """A cold tier in memory whose failures are scripted: a twin of the real ones for what they cannot be made to do.

    `on_save` and `on_load` are called with the keys first, and may raise or block. `answer` replaces the outcomes of a
    load. `refusal(keys)` names how many blocks a save takes and why no more. With `holding`, saves stay in flight until
    `finish` is called.
    """

    name: str = "cold"
    medium: Medium = Medium.DISK
    capacity_blocks: int = 1_000_000
    on_save: Callable[[Sequence[BlockKey]], object] = never
    on_load: Callable[[Sequence[BlockKey]], object] = never
    answer: Callable[[list[Outcome]], list[Outcome]] = list
    refuse: Callable[[Sequence[BlockKey]], tuple[int, Outcome]] | None = None
    holding: bool = False
    closed: int = 0
    reserved: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    written: list[BlockKey] = field(default_factory=list)
    blocks: dict[tuple[LayoutId, BlockKey], tuple[bytes, bytes]] = field(default_factory=dict)
    waiting: list[tuple[LayoutId, Sequence[BlockKey], Sequence[Block], Job]] = field(default_factory=list)

    def holds(self, layout: LayoutId, keys: Sequence[BlockKey]) -> Bitmap:
        return [(layout, key) in self.blocks for key in keys]

    def load(
        self, layout: LayoutId, keys: Sequence[BlockKey], into: Sequence[Sequence[Piece]], deadline: float
    ) -> list[Outcome]:
        self.on_load(keys)
        outcomes = []
        for key, pieces in zip(keys, into, strict=True):
            held = self.blocks.get((layout, key))
            if held is None:
                outcomes.append(Outcome.MISS)
            else:
                arrived = copy_out(np.frombuffer(held[0], np.uint8), pieces)
                outcomes.append(Outcome.HIT if arrived == held[1] else Outcome.CORRUPT)
        for key, outcome in zip(keys, outcomes, strict=True):
            if outcome is Outcome.CORRUPT:
                self.blocks.pop((layout, key), None)
        return self.answer(outcomes)

    def save(self, layout: LayoutId, keys: Sequence[BlockKey], blocks: Sequence[Block]) -> Job:
        self.on_save(keys)
        wanted, why = (len(keys), Outcome.FULL) if self.refuse is None else self.refuse(keys)
        with self.lock:
            room = self.capacity_blocks - len(self.blocks) - self.reserved
            taken, why = (wanted, why) if wanted <= room else (room, Outcome.FULL)
            self.reserved += taken
        job = Job([Outcome.PENDING] * taken + [why] * (len(keys) - taken))
        self.waiting.append((layout, keys[:taken], blocks[:taken], job))
        if not self.holding:
            self.finish()
        return job

    def _next(self) -> tuple[LayoutId, Sequence[BlockKey], Sequence[Block], Job] | None:
        with self.lock:
            return self.waiting.pop(0) if self.waiting else None

    def finish(self, outcome: Outcome = Outcome.HIT, *, after_visible: Outcome = Outcome.HIT) -> None:
        """End every save in flight with `outcome`; with `after_visible`, it turns bad between visible and durable."""
        while (waiting := self._next()) is not None:
            layout, keys, blocks, job = waiting
            with self.lock:
                self.reserved -= len(keys)
                if outcome is Outcome.HIT:
                    self.written += keys
                    for key, block in zip(keys, blocks, strict=True):
                        self.blocks[layout, key] = (b"".join(bytes(piece) for piece in block.pieces), block.sum)
            job.outcomes[: len(keys)] = [outcome] * len(keys)
            if outcome is Outcome.HIT:
                job.set_visible()
            if after_visible is not Outcome.HIT:
                self.remove(layout, keys)
                job.outcomes[: len(keys)] = [after_visible] * len(keys)
            job.set_done()

    def remove(self, layout: LayoutId, keys: Sequence[BlockKey]) -> int:
        return sum(self.blocks.pop((layout, key), None) is not None for key in keys)

    def usage(self) -> Usage:
        return Usage(len(self.blocks), len(self.blocks) * BLOCK_BYTES, self.capacity_blocks * BLOCK_BYTES)

    def found(self) -> Sequence[Found]:
        return ()

    def check_integrity(self) -> None:
        assert len(self.blocks) <= self.capacity_blocks

    def close(self) -> None:
        self.closed += 1
