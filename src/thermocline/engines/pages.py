"""The seam between a store and an engine's memory, and its in-memory twin."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from thermocline.blocks.layout import Layout
from thermocline.tiers.tier import Piece


class Pages(Protocol):
    """Memory in which an engine keeps blocks, one per page."""

    layout: Layout

    def view(self, page_ids: Sequence[int]) -> list[list[Piece]]:
        """The memory of these pages: for each its pieces in layout order, `layout.block_bytes` long in sum.

        Nothing is copied: writing into a piece writes into the engine's memory. Pieces of different pages never
        overlap, and stay valid as long as the pages themselves; what a page holds is the engine's business. Raises
        IndexError for a page that does not exist.
        """


class MemoryPages:
    """`count` pages in one stretch of faulted-in memory, one contiguous piece per page.

    The staging memory of an engine, and the twin that stands for any engine in tests.
    """

    def __init__(self, layout: Layout, count: int) -> None:
        self.layout = layout
        self.rows = fresh_memory(count * layout.block_bytes).reshape(count, layout.block_bytes)

    def __len__(self) -> int:
        return len(self.rows)

    def view(self, page_ids: Sequence[int]) -> list[list[Piece]]:
        """See `Pages.view`."""
        if any(not 0 <= page < len(self.rows) for page in page_ids):
            msg = f"there are pages 0 to {len(self.rows) - 1}"
            raise IndexError(msg)
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
