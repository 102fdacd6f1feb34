"""Damage to what two caches have written for a prompt, while neither runs: the same faults in both formats."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from bench.vllm_server import BLOCK_TOKENS
from thermocline.blocks.frame import MAGIC, PAGE_BYTES, frame_bytes, read_header
from thermocline.blocks.key import BlockKey, block_keys, root_key

HIGH_BIT = 0x40
"""In the second byte of a bf16 number: the highest of its exponent, which makes a small number a huge one."""

VALUES_BYTES = 8192
"""So far from the end of a block lie values of attention on a CPU. One key more or less may not change an answer."""


class Fault(StrEnum):
    """What is done to the first thing that was written for a prompt. Cutting is last: what lies behind it goes too."""

    FLIPPED = "one bit flipped"
    ZEROED = "zeroes of the same length"
    OTHER = "another prompt's bytes in its place"
    CUT = "file cut in its middle"


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a cache keeps something: a stretch of a file."""

    file: Path
    offset: int
    nbytes: int

    def read(self) -> bytes:
        """What lies there."""
        with self.file.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.nbytes)

    def write(self, data: bytes) -> None:
        """Put something else there, and leave nothing of it in memory."""
        with self.file.open("r+b") as file:
            file.seek(self.offset)
            file.write(data)


def hurt(fault: Fault, stored: Stored, other: Stored) -> None:
    """Damage what is stored. `other` is what the same cache has stored for another prompt, of the same length."""
    data = stored.read()
    middle = len(data) // 2
    if fault is Fault.FLIPPED:
        at = len(data) - VALUES_BYTES | 1
        stored.write(data[:at] + bytes([data[at] ^ HIGH_BIT]) + data[at + 1 :])
    elif fault is Fault.ZEROED:
        stored.write(bytes(len(data)))
    elif fault is Fault.OTHER:
        stored.write(other.read())
    else:
        os.truncate(stored.file, stored.offset + middle)


def files_of(files: Sequence[Path]) -> list[Stored]:
    """Whole files, as LMCache keeps its chunks."""
    return [Stored(file, 0, file.stat().st_size) for file in files]


def frames_of(disk: Path, prompts: Sequence[Sequence[int]]) -> list[list[Stored]]:
    """The frames of each prompt's blocks in thermocline's files, found by their headers."""
    found: dict[BlockKey, Stored] = {}
    for file in sorted(disk.glob("*.segment")):
        data = np.memmap(file, np.uint8, "r")
        starts = np.flatnonzero(data.view(np.uint64)[:: PAGE_BYTES // 8] == np.frombuffer(MAGIC, np.uint64)[0])
        for start in (starts * PAGE_BYTES).tolist():
            header = read_header(np.asarray(data[start : start + PAGE_BYTES]))
            if header is not None:
                found[header.key] = Stored(file, start, frame_bytes(header.length_bytes))
    return [[found[key] for key in keys_of(tokens) if key in found] for tokens in prompts]


def keys_of(tokens: Sequence[int]) -> list[BlockKey]:
    """The keys of a prompt without a salt."""
    return block_keys(np.array(tokens, np.uint32), root=root_key(), tokens_per_block=BLOCK_TOKENS)
