"""Frames on their way to a segment: header pages and payloads side by side, without a copy where memory is aligned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby

from thermocline.blocks.frame import PAGE_BYTES, Header, copy_in, frame_bytes, padded, write_header
from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.tiers.crew import Crew, Task
from thermocline.tiers.segments import Segments, aligned_memory
from thermocline.tiers.shelves import position, slot_at
from thermocline.tiers.tier import Block, Piece, block_length

FRAMES_MAX = 256
"""Frames under way at a time, so that headers and payloads stay below the kernel's bound on pieces."""

WRITE_BYTES_MAX = 32 * 1024 * 1024
"""Bytes per write call, and so the bound on the aligned copy of what does not lie aligned."""


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
            pieces = self._frames(layout, keys[part], blocks[part], length)
            self._crew.run(list(self._stretches(places[part], pieces, frame_bytes(length))))

    def _stretches(self, places: Sequence[int], pieces: Sequence[Piece], size: int) -> Iterator[Task]:
        """One write per stretch of places that lie side by side; a frame is two pieces."""
        for _, run in groupby(enumerate(places), key=lambda pair: position(pair[1]) - pair[0]):
            numbers = [number for number, _ in run]
            slot = slot_at(places[numbers[0]])
            part = pieces[2 * numbers[0] : 2 * numbers[-1] + 2]
            yield partial(self._segments.write, slot.unit, slot.number * size, part)

    def _frames(self, layout: LayoutId, keys: Sequence[BlockKey], blocks: Sequence[Block], length: int) -> list[Piece]:
        pieces: list[Piece] = []
        for at, (key, block) in enumerate(zip(keys, blocks, strict=True)):
            page = self._headers[at * PAGE_BYTES : (at + 1) * PAGE_BYTES]
            write_header(Header(key, block.parent, layout, block.depth, length, block.sum, self._epoch), page)
            pieces.append(page)
            if len(block.pieces) == 1 and _aligned(block.pieces[0]):
                pieces.append(block.pieces[0])
            else:
                pieces.append(self._bounced(block.pieces, at, len(keys), padded(length)))
        return pieces

    def _bounced(self, pieces: Sequence[Piece], at: int, count: int, padded_bytes: int) -> Piece:
        """The block in aligned memory of our own, padded to whole pages."""
        if self._bounce.nbytes < count * padded_bytes:
            self._bounce = aligned_memory(count * padded_bytes)
        target = self._bounce[at * padded_bytes : (at + 1) * padded_bytes]
        copy_in(pieces, target)
        target[sum(piece.nbytes for piece in pieces) :] = 0
        return target


def _aligned(piece: Piece) -> bool:
    address: int = piece.__array_interface__["data"][0]
    return piece.nbytes % PAGE_BYTES == 0 and address % PAGE_BYTES == 0
