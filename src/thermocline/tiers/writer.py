"""Frames on their way to a segment: header pages and payloads side by side, without a copy where memory is aligned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter

import numpy as np

from thermocline.blocks.frame import PAGE_BYTES, Header, copy_in, frame_bytes, padded, write_header
from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.tiers import journal
from thermocline.tiers.crew import Crew, Task
from thermocline.tiers.journal import Records
from thermocline.tiers.segments import Segments, aligned_memory
from thermocline.tiers.shelves import position, records, slot_at
from thermocline.tiers.tier import Block, Job, Piece, block_length

FRAMES_MAX = 256
"""Frames under way at a time, so that headers and payloads stay below the kernel's bound on pieces."""

WRITE_BYTES_MAX = 32 * 1024 * 1024
"""Bytes per write call, and so the bound on the aligned copy of what does not lie aligned."""


@dataclass(frozen=True, slots=True)
class Write:
    """Blocks of one save that have places."""

    layout: LayoutId
    keys: Sequence[BlockKey]
    blocks: Sequence[Block]
    places: Sequence[int]
    length_bytes: int
    job: Job

    @property
    def nbytes(self) -> int:
        """What they take on disk."""
        return len(self.places) * frame_bytes(self.length_bytes)


def removals(forgotten: Sequence[tuple[LayoutId, BlockKey, int]]) -> Records:
    """The log's records of blocks that left their places."""
    parts = [
        records(journal.REMOVE, layout, [key for _, key, _ in some], [place for _, _, place in some])
        for layout, some in ((layout, list(some)) for layout, some in groupby(forgotten, key=itemgetter(0)))
    ]
    return np.concatenate([np.empty(0, journal.RECORD), *parts])


class FrameWriter:
    """Writes frames to their places. Used by one thread."""

    def __init__(self, segments: Segments, epoch: int, crew: Crew) -> None:
        self._segments = segments
        self._epoch = epoch
        self._crew = crew
        self._headers = aligned_memory(FRAMES_MAX * PAGE_BYTES)
        self._bounce = aligned_memory(PAGE_BYTES)

    def write(self, layout: LayoutId, keys: Sequence[BlockKey], blocks: Sequence[Block], places: Sequence[int]) -> None:
        """Write every block to its place; stretches that do not lie side by side are written at the same time.

        Raises OSError; then none of them may be trusted.
        """
        length = block_length(blocks)
        step = max(1, min(FRAMES_MAX, WRITE_BYTES_MAX // frame_bytes(length)))
        for start in range(0, len(keys), step):
            part = slice(start, start + step)
            self._crew.run(self._stretches(layout, keys[part], blocks[part], places[part], length))

    def _stretches(
        self, layout: LayoutId, keys: Sequence[BlockKey], blocks: Sequence[Block], places: Sequence[int], length: int
    ) -> Iterator[Task]:
        """One write per stretch of places that lie side by side: while one is under way, the next gets its headers."""
        size = frame_bytes(length)
        aligned = [_is_aligned(block) for block in blocks]
        if not all(aligned) and self._bounce.nbytes < len(keys) * padded(length):
            self._bounce = aligned_memory(len(keys) * padded(length))
        for _, run in groupby(range(len(places)), key=lambda at: position(places[at]) - at):
            numbers = list(run)
            pieces: list[Piece] = []
            for at in numbers:
                block = blocks[at]
                header = Header(keys[at], block.parent, layout, block.depth, length, block.sum, self._epoch)
                pieces += self._frame(header, block, at, aligned=aligned[at])
            slot = slot_at(places[numbers[0]])
            yield partial(self._segments.write, slot.unit, slot.number * size, pieces)

    def _frame(self, header: Header, block: Block, at: int, *, aligned: bool) -> tuple[Piece, Piece]:
        """A header page, and the payload where it lies; or in aligned memory of our own, padded to whole pages."""
        page = self._headers[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]
        write_header(header, page)
        if aligned:
            return page, block.pieces[0]
        size = padded(header.length_bytes)
        target = self._bounce[at * size : (at + 1) * size]
        copy_in(block.pieces, target)
        target[header.length_bytes :] = 0
        return page, target


def _is_aligned(block: Block) -> bool:
    if len(block.pieces) != 1:
        return False
    piece = block.pieces[0]
    address: int = piece.__array_interface__["data"][0]
    return piece.nbytes % PAGE_BYTES == 0 and address % PAGE_BYTES == 0
