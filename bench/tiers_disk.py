"""The disk tier over raw direct I/O of the same sizes by as many threads, on a file in the same folder.

Twice: on a fresh tier, and when it is at least 95 % full after three times its capacity was written and evicted.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.harness import CLOCK, Progress, interleaved
from bench.tiers_memory import Rounds
from thermocline.blocks.frame import payload_sum
from thermocline.blocks.key import NO_PARENT, BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.errors import BenchError
from thermocline.metrics import Metrics
from thermocline.store.books import Books
from thermocline.store.evict import LeastRecent
from thermocline.tiers.disk import READER_THREADS, DiskTier
from thermocline.tiers.segments import READ_BYTES_MAX, aligned_memory
from thermocline.tiers.tier import Block, Job, Outcome, Piece

KIB, MIB = 1024, 1024 * 1024
CAPACITY_BYTES = 768 * MIB
SCRATCH_BYTES = 256 * MIB
REQUEST_BYTES = 16 * MIB
SAVE_BYTES_MIN = 4 * MIB
SESSIONS = 16
TURNOVER = 3
FRESH_ROUNDS = 16
"""Each writes 16 MiB to a part of the tier, and of the raw file, that was never written before."""
READ_ROUNDS = 31
TARGET = 0.85
LAYOUT = LayoutId(bytes(32))


def run(progress: Progress, notes: list[str]) -> Iterator[Rounds]:
    """Blocks of 256 KiB and 1 MiB; 16 MiB at a time."""
    for block_bytes in (256 * KIB, MIB):
        with tempfile.TemporaryDirectory(prefix="thermocline-bench-") as folder:
            _check_folder(Path(folder))
            yield from _run_one(Path(folder), block_bytes, progress, notes)


def _run_one(folder: Path, block_bytes: int, progress: Progress, notes: list[str]) -> Iterator[Rounds]:
    raw, sessions = _Raw(folder / "scratch"), _Sessions(folder / "tier", block_bytes)
    size = f"{block_bytes // KIB} KiB blocks"
    try:
        yield from _phase(f"{size}, fresh", raw, sessions, FRESH_ROUNDS, progress)
        sessions.turn_over(progress)
        notes.append(
            f"{size}: {sessions.full:.1%} full after {sessions.written_bytes / CAPACITY_BYTES:.1f}x its capacity"
        )
        yield from _phase(f"{size}, full", raw, sessions, READ_ROUNDS, progress)
    finally:
        sessions.close()
        raw.close()


def _phase(label: str, raw: _Raw, sessions: _Sessions, writes: int, progress: Progress) -> Iterator[Rounds]:
    arms = {"save": sessions.save_some, "raw write": raw.write}
    seconds = interleaved(arms, rounds=writes, warmup=0, progress=progress)
    yield Rounds(f"disk write, {label}", TARGET, seconds["save"], seconds["raw write"])
    arms = {"load": sessions.load_some, "raw read": raw.read}
    seconds = interleaved(arms, rounds=READ_ROUNDS, warmup=1, progress=progress)
    yield Rounds(f"disk read, {label}", TARGET, seconds["load"], seconds["raw read"])


class _Raw:
    """The limit: one preallocated file, direct I/O, no names, no sums, no copy."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
        os.posix_fallocate(self._fd, 0, SCRATCH_BYTES)
        self._memory = aligned_memory(REQUEST_BYTES)
        self._memory[:] = np.frombuffer(np.random.default_rng(4).bytes(REQUEST_BYTES), np.uint8)
        self._threads = ThreadPoolExecutor(READER_THREADS)
        self._at = 0

    def write(self) -> None:
        """16 MiB in one call, made durable."""
        assert os.pwrite(self._fd, self._memory, self._next()) == REQUEST_BYTES
        os.fdatasync(self._fd)

    def read(self) -> None:
        """16 MiB in reads as large as the tier's, by as many threads."""
        start = self._next()
        parts = range(0, REQUEST_BYTES, READ_BYTES_MAX)
        reads = [self._threads.submit(self._read_one, start + part, part) for part in parts]
        assert sum(read.result() for read in reads) == REQUEST_BYTES

    def close(self) -> None:
        """Let go of file and threads."""
        self._threads.shutdown()
        os.close(self._fd)

    def _read_one(self, offset: int, at: int) -> int:
        return os.preadv(self._fd, [self._memory[at : at + READ_BYTES_MAX]], offset)

    def _next(self) -> int:
        offset, self._at = self._at, (self._at + REQUEST_BYTES) % SCRATCH_BYTES
        return offset


@dataclass(slots=True)
class _Session:
    """A conversation: its path so far."""

    keys: list[BlockKey] = field(default_factory=list)


class _Sessions:
    """Conversations that grow by turns in a disk tier of their own; leaf-first LRU makes room, as in a store."""

    def __init__(self, path: Path, block_bytes: int) -> None:
        self.written_bytes = 0
        self._tier = DiskTier(path, CAPACITY_BYTES)
        self._books = Books(
            [self._tier],
            clock=CLOCK,
            policy=LeastRecent(),
            metrics=Metrics(),
            ttl_seconds=None,
            lease_seconds=30.0,
        )
        self._random = np.random.default_rng(5)
        self._block_bytes = block_bytes
        self._sessions = [_Session() for _ in range(SESSIONS)]
        source, self._into = aligned_memory(REQUEST_BYTES), aligned_memory(REQUEST_BYTES)
        source[:] = np.frombuffer(self._random.bytes(REQUEST_BYTES), np.uint8)
        self._pieces = [[piece] for piece in self._cut(source)]
        self._sums = [payload_sum(pieces) for pieces in self._pieces]

    @property
    def full(self) -> float:
        """The share of slots that hold a block."""
        held = self._tier.usage().blocks
        return held / (held + self._tier.free_slots(self._block_bytes))

    def save_some(self) -> None:
        """A turn of 16 MiB in some conversation, until it is durable; making room for it counts."""
        self._save(REQUEST_BYTES // self._block_bytes)

    def load_some(self) -> None:
        """The first 16 MiB of some conversation, verified."""
        count = REQUEST_BYTES // self._block_bytes
        long = [session for session in self._sessions if self._held(session) >= count]
        keys = long[int(self._random.integers(len(long)))].keys[:count]
        outcomes = self._tier.load(LAYOUT, keys, [[piece] for piece in self._cut(self._into)], math.inf)
        assert outcomes.count(Outcome.HIT) == count, f"not all blocks were loaded: {set(outcomes)}"

    def turn_over(self, progress: Progress) -> None:
        """Turns of 4 to 16 MiB until three times the capacity was written."""
        least = SAVE_BYTES_MIN // self._block_bytes
        while self.written_bytes < TURNOVER * CAPACITY_BYTES:
            progress(f"turnover: {self.written_bytes // MIB} of {TURNOVER * CAPACITY_BYTES // MIB} MiB")
            self._save(int(self._random.integers(least, REQUEST_BYTES // self._block_bytes + 1)))

    def close(self) -> None:
        """Close the tier."""
        self._books.check_integrity()
        self._tier.close()

    def _save(self, count: int) -> None:
        """A turn: mostly of a conversation that goes on, at times of a new one in its place."""
        at = int(self._random.integers(SESSIONS))
        if self._random.random() < 0.1:
            self._sessions[at] = _Session()
        session = self._sessions[at]
        del session.keys[self._held(session) :]
        depth = len(session.keys)
        session.keys += [BlockKey(self._random.bytes(32)) for _ in range(count)]
        above = [NO_PARENT, *session.keys]
        blocks = [Block(above[depth + i], depth + i + 1, self._pieces[i], self._sums[i]) for i in range(count)]
        if depth:
            self._books.index.touch(self._books.index.node(LAYOUT, session.keys[depth - 1]), CLOCK.now())
        for job in self._hand_over(session.keys[depth:], blocks):
            job.wait()
            assert set(job.outcomes) == {Outcome.HIT}
        self.written_bytes += count * self._block_bytes

    def _hand_over(self, keys: Sequence[BlockKey], blocks: Sequence[Block]) -> list[Job]:
        """Save, making room while the tier is full, as the store's mover does. Blocks are entered once visible."""
        jobs: list[Job] = []
        at = 0
        while at < len(keys):
            job = self._tier.save(LAYOUT, keys[at:], blocks[at:])
            taken = next((i for i, outcome in enumerate(job.outcomes) if outcome in _REFUSED), len(job.outcomes))
            late = Outcome.LATE in job.outcomes
            if taken:
                del job.outcomes[taken:]
                job.watch(visible=self._entering(keys[at : at + taken], blocks[at : at + taken]))
                jobs.append(job)
                at += taken
            if late:
                self._tier.wait_idle()
            elif at < len(keys):
                self._books.evict(self._tier.name, len(keys) - at)
        return jobs

    def _entering(self, keys: Sequence[BlockKey], blocks: Sequence[Block]) -> Callable[[Job], object]:
        return lambda _: self._books.enter(LAYOUT, keys, blocks, self._tier.name)

    def _held(self, session: _Session) -> int:
        return self._books.index.covered(LAYOUT, session.keys, self._tier.name)

    def _cut(self, memory: Piece) -> list[Piece]:
        return [memory[at : at + self._block_bytes] for at in range(0, memory.nbytes, self._block_bytes)]


_REFUSED = frozenset({Outcome.FULL, Outcome.LATE, Outcome.FAILED})


def _check_folder(folder: Path) -> None:
    """Raises BenchError where the figures would not be those of a disk."""
    hint = "set TMPDIR to a folder on the disk to be measured"
    if shutil.disk_usage(folder).free < 2 * (CAPACITY_BYTES + SCRATCH_BYTES):
        raise BenchError(f"{folder} has too little free space for this bench", hint=hint)
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    inside = [(point, kind) for point, kind in mounts if folder.is_relative_to(point)]
    _, kind = max(inside, key=lambda mount: len(mount[0]))
    if kind in {"tmpfs", "ramfs"}:
        raise BenchError(f"{folder} lies in memory ({kind}), not on a disk", hint=hint)
