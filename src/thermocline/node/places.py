"""Where blocks lie in a node's memory: a plain value that travels from an engine's scheduler to its workers."""

from __future__ import annotations

from dataclasses import dataclass

from thermocline.blocks.frame import SUM_BYTES


@dataclass(frozen=True, slots=True)
class Places:
    """Offsets into the memory of one life of the node, and what the bytes there must add up to.

    After `deadline` (monotonic clock of this machine) the blocks may be gone, and nothing is copied any more. The sums
    decide: whatever lies there by then is a miss if it is not the very block.
    """

    incarnation: int
    deadline: float
    offsets: tuple[int, ...]
    sums: bytes

    def part(self, start: int, stop: int) -> Places:
        """The places of blocks [start, stop)."""
        sums = self.sums[start * SUM_BYTES : stop * SUM_BYTES]
        return Places(self.incarnation, self.deadline, self.offsets[start:stop], sums)


NOWHERE = Places(0, 0.0, (), b"")
