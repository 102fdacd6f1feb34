"""The disk tier over raw direct I/O of the same sizes by as many threads, on a file in the same folder.

Twice: on a fresh tier, and when it is at least 95 % full after three times its capacity was written and evicted.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bench.harness import Progress, interleaved
from bench.tiers_memory import Rounds
from thermocline.blocks.frame import payload_sum
from thermocline.blocks.key import NO_PARENT, BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.errors import BenchError
from thermocline.store.books import EVICT_BATCH
from thermocline.tiers.disk import READER_THREADS, DiskTier
from thermocline.tiers.segments import READ_BYTES_MAX, aligned_memory
from thermocline.tiers.tier import Block, Job, Outcome

KIB, MIB = 1024, 1024 * 1024
CAPACITY_BYTES = 768 * MIB
REQUEST_BYTES = 16 * MIB
SAVE_BYTES_MIN = 4 * MIB
NEW_SESSION_SHARE = 0.1
TURNOVER = 3
FRESH_ROUNDS = 16
"""Each writes 16 MiB to a part of the tier, and of the raw file, that was never written before."""
READ_ROUNDS = 31
TARGET = 0.85
LAYOUT = LayoutId(bytes(32))
REFUSED = frozenset({Outcome.FULL, Outcome.LATE, Outcome.FAILED})


def run(progress: Progress, notes: list[str]) -> Iterator[Rounds]:
    """Blocks of 256 KiB and 1 MiB; 16 MiB at a time."""
    for block_bytes in (256 * KIB, MIB):
        with tempfile.TemporaryDirectory(prefix="thermocline-bench-") as folder:
            _check_folder(Path(folder))
            yield from _run_one(Path(folder), block_bytes, progress, notes)


def _run_one(folder: Path, block_bytes: int, progress: Progress, notes: list[str]) -> Iterator[Rounds]:
    sessions = _Sessions(folder / "tier", block_bytes)
    raw = _Raw(folder / "scratch", sessions)
    size = f"{block_bytes // KIB} KiB blocks"
    try:
        yield from _phase(f"{size}, fresh", raw, sessions, FRESH_ROUNDS, progress)
        sessions.turn_over(progress)
        raw.fill()
        notes.append(
            f"{size}: {sessions.full:.1%} full after {sessions.written_bytes / CAPACITY_BYTES:.1f}x its capacity"
        )
        yield from _phase(f"{size}, full", raw, sessions, READ_ROUNDS, progress)
    finally:
        raw.close()
        sessions.close()


def _phase(label: str, raw: _Raw, sessions: _Sessions, writes: int, progress: Progress) -> Iterator[Rounds]:
    arms = {"save": sessions.save_some, "raw write": raw.write}
    seconds = interleaved(arms, rounds=writes, warmup=0, progress=progress)
    yield Rounds(f"disk write, {label}", TARGET, seconds["save"], seconds["raw write"])
    arms = {"load": sessions.load_some, "raw read": raw.read}
    seconds = interleaved(arms, rounds=READ_ROUNDS, warmup=1, progress=progress)
    yield Rounds(f"disk read, {label}", TARGET, seconds["load"], seconds["raw read"])


class _Raw:
    """The limit: one preallocated file, direct I/O, no names, no sums, no copy.

    It writes from the memory that the tier writes from, and reads into the tier's own buffers: which pages a transfer
    lands in makes up to twofold a difference on a virtual disk, and is no merit of anybody.
    """

    def __init__(self, path: Path, sessions: _Sessions) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, CAPACITY_BYTES)
        self._source = sessions.source
        self._buffers = sessions.buffers
        self._threads = ThreadPoolExecutor(READER_THREADS)
        self._random = np.random.default_rng(8)
        self._writes = 0

    def write(self) -> None:
        """16 MiB in one call, made durable: where nothing was written yet, while there is such a place."""
        offset = self._writes * REQUEST_BYTES % (CAPACITY_BYTES // REQUEST_BYTES * REQUEST_BYTES)
        assert os.pwrite(self._fd, self._source, offset) == REQUEST_BYTES
        os.fdatasync(self._fd)
        self._writes += 1

    def fill(self) -> None:
        """Write what was never written."""
        while self._writes < CAPACITY_BYTES // REQUEST_BYTES:
            self.write()

    def read(self) -> None:
        """16 MiB from anywhere in what was written, in reads as large as the tier's, by as many threads."""
        places = min(self._writes, CAPACITY_BYTES // REQUEST_BYTES)
        start = int(self._random.integers(places)) * REQUEST_BYTES
        stop = start + REQUEST_BYTES
        parts = [(at, min(READ_BYTES_MAX, stop - at)) for at in range(start, stop, READ_BYTES_MAX)]
        assert sum(self._threads.map(self._read_one, parts)) == REQUEST_BYTES

    def close(self) -> None:
        """Let go of file and threads."""
        self._threads.shutdown()
        os.close(self._fd)

    def _read_one(self, part: tuple[int, int]) -> int:
        offset, nbytes = part
        buffer = self._buffers.get()
        try:
            return os.preadv(self._fd, [buffer[:nbytes]], offset)
        finally:
            self._buffers.put(buffer)


class _Sessions:
    """Conversations that grow by turns in a disk tier of their own.

    The one that rested longest loses its last blocks first, which is what leaf-first LRU comes to.
    """

    def __init__(self, path: Path, block_bytes: int) -> None:
        self.written_bytes = 0
        self._tier = DiskTier(path, CAPACITY_BYTES)
        self._random = np.random.default_rng(5)
        self._block_bytes = block_bytes
        self._request_blocks = REQUEST_BYTES // block_bytes
        self._paths: list[list[BlockKey]] = []
        self.buffers = self._tier._readers._pool  # noqa: SLF001  # for the raw limit: see _Raw
        self.source, into = aligned_memory(REQUEST_BYTES), aligned_memory(REQUEST_BYTES)
        self.source[:] = np.frombuffer(self._random.bytes(REQUEST_BYTES), np.uint8)
        self._pieces = [[row] for row in self.source.reshape(-1, block_bytes)]
        self._into = [[row] for row in into.reshape(-1, block_bytes)]
        self._sums = [payload_sum(pieces) for pieces in self._pieces]

    @property
    def full(self) -> float:
        """The share of slots that hold a block."""
        held = self._tier.usage().blocks
        return held / (held + self._tier.free_slots(self._block_bytes))

    def save_some(self) -> None:
        """A turn of 16 MiB in some conversation, until it is durable; making room for it counts."""
        self._save(self._request_blocks)

    def load_some(self) -> None:
        """16 MiB from anywhere in some conversation, verified."""
        count = self._request_blocks
        starts = [(path, at) for path in self._paths for at in range(0, len(path) - count + 1, count)]
        path, at = starts[int(self._random.integers(len(starts)))]
        outcomes = self._tier.load(LAYOUT, path[at : at + count], self._into, math.inf)
        assert outcomes.count(Outcome.HIT) == count, f"not all blocks were loaded: {set(outcomes)}"

    def turn_over(self, progress: Progress) -> None:
        """Turns of 4 to 16 MiB until three times the capacity was written."""
        least = SAVE_BYTES_MIN // self._block_bytes
        while self.written_bytes < TURNOVER * CAPACITY_BYTES:
            progress(f"turnover: {self.written_bytes // MIB} of {TURNOVER * CAPACITY_BYTES // MIB} MiB")
            self._save(int(self._random.integers(least, self._request_blocks + 1)))

    def close(self) -> None:
        """Close the tier."""
        self._tier.check_integrity()
        self._tier.close()

    def _save(self, count: int) -> None:
        """A turn: mostly of a conversation that goes on, at times of a new one; its path counts as used now."""
        going_on = self._paths and self._random.random() >= NEW_SESSION_SHARE
        path = self._paths.pop(int(self._random.integers(len(self._paths)))) if going_on else []
        self._paths.append(path)
        keys = [BlockKey(self._random.bytes(32)) for _ in range(count)]
        above = [path[-1] if path else NO_PARENT, *keys]
        depth = len(path) + 1
        blocks = [Block(above[at], depth + at, self._pieces[at], self._sums[at]) for at in range(count)]
        for job in self._hand_over(keys, blocks):
            job.wait()
            assert Outcome.FAILED not in job.outcomes
        path += keys
        self.written_bytes += count * self._block_bytes

    def _hand_over(self, keys: Sequence[BlockKey], blocks: Sequence[Block]) -> list[Job]:
        """Save, making room first where some is lacking, and while the tier is full, as the store does."""
        jobs: list[Job] = []
        at = 0
        while at < len(keys):
            short = self._tier.shortfall(self._block_bytes, len(keys) - at)
            if short:
                self._make_room(short)
            jobs.append(self._tier.save(LAYOUT, keys[at:], blocks[at:]))
            outcomes = jobs[-1].outcomes
            at += next((taken for taken, outcome in enumerate(outcomes) if outcome in REFUSED), len(outcomes))
            if Outcome.LATE in outcomes:
                self._tier.wait_idle()
            elif at < len(keys):
                self._make_room(len(keys) - at)
        return jobs

    def _make_room(self, count: int) -> None:
        """Remove at least `count` blocks from the ends of the paths that rested longest."""
        count = max(count, EVICT_BATCH)
        while count > 0:
            path = self._paths[0]
            leaves = path[-count:]
            del path[-count:]
            count -= self._tier.remove(LAYOUT, leaves)
            if not path:
                self._paths.pop(0)


def _check_folder(folder: Path) -> None:
    """Raises BenchError where the figures would not be those of a disk."""
    hint = "set TMPDIR to a folder on the disk to be measured"
    if shutil.disk_usage(folder).free < 3 * CAPACITY_BYTES:
        raise BenchError(f"{folder} has too little free space for this bench", hint=hint)
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(point, kind) for point, kind in mounts if folder.is_relative_to(point)]
    _, kind = max(inside, key=lambda mount: len(mount[0]))
    if kind in {"tmpfs", "ramfs"}:
        raise BenchError(f"{folder} lies in memory ({kind}), not on a disk", hint=hint)
