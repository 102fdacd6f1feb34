"""Memory of an engine into which a store loads."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from thermocline.blocks.layout import Layout
from thermocline.tiers.tier import Piece


class MemoryPages:
    """The staging memory of an engine: `count` pages of a block each, in one stretch of faulted-in memory."""

    def __init__(self, layout: Layout, count: int) -> None:
        self.layout = layout
        self.rows = fresh_memory(count * layout.block_bytes).reshape(count, layout.block_bytes)

    def __len__(self) -> int:
        return len(self.rows)

    def view(self, page_ids: Sequence[int]) -> list[list[Piece]]:
        """The memory of these pages, each one piece, for as long as this lives. Raises IndexError for one not there."""
        if any(not 0 <= page < len(self.rows) for page in page_ids):
            raise IndexError(f"there are pages 0 to {len(self.rows) - 1}")
        return [[self.rows[page]] for page in page_ids]


def fresh_memory(nbytes: int, *, faulted: bool = True) -> NDArray[np.uint8]:
    """Page-aligned zeroed memory, in huge pages where the kernel has them: page faults cost more than copies.

    `faulted` memory pays for them now, other memory as it is first touched.
    """
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    array = np.frombuffer(memory, np.uint8)
    if faulted:
        array[:: mmap.PAGESIZE] = 0
    return array
