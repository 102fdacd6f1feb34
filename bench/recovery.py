"""A million blocks found again at a start: the disk tier's opening and the store's index, over the least a log costs.

Each round is a process of its own, as a restart is: memory that no process used before is a good part of the price.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from xxhash import xxh3_128_digest

from bench.harness import ROOT, Progress, Report, check, ratios, spread, timed
from thermocline.blocks.frame import PAGE_BYTES, SUM_BYTES, frame_bytes
from thermocline.store.store import Store
from thermocline.tiers import directory, journal
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.journal import ADD, RECORD
from thermocline.tiers.memory import MemoryTier

MIB = 1024 * 1024
BLOCKS = 1_000_000
BLOCK_BYTES = 256 * 1024
PATH_BLOCKS = 512
TURN_BLOCKS = 16
"""What conversations said by turns lies in the log by turns, not path by path."""
ROUNDS = 9
SEGMENTS_MIN = directory.SEGMENTS_WANTED
"""With room for so many, segments have their full size."""
BUDGET_SECONDS = 1.5
OURS = "disk tier opened, index restored"
DROPPED = f"{OURS}, log not in the page cache"
RAW = "log read, its sums verified, its keys in a dict"


def run(progress: Progress) -> Report:
    """Write a log as a server leaves it, then start from it over and over."""
    seconds: dict[str, list[float]] = {OURS: [], DROPPED: [], RAW: []}
    with tempfile.TemporaryDirectory(prefix="thermocline-bench-") as folder:
        progress("writing the log")
        capacity_bytes = write_tier(Path(folder))
        _in_a_process(OURS, folder, capacity_bytes)  # reads the directory once
        for at in range(ROUNDS):
            progress(f"round {at + 1} of {ROUNDS}")
            for name in (*list(seconds)[at % 3 :], *list(seconds)[: at % 3]):
                _set_cache(Path(folder) / directory.LOG_FILE, keep=name != DROPPED)
                seconds[name].append(_in_a_process(name, folder, capacity_bytes))
    arms = {name: spread(taken) for name, taken in seconds.items()}
    name = f"recovery of {BLOCKS:,} blocks, median"
    notes = [
        f"Blocks of {BLOCK_BYTES // 1024} KiB in paths of {PATH_BLOCKS}. Each round is a new process, and its",
        "imports are not counted. The log is in the page cache, as after a restart of the server alone, but",
        "where it says otherwise.",
    ]
    details = {"arms": arms, "ratios": {"ours / raw": spread(ratios(seconds[OURS], seconds[RAW]))}, "notes": notes}
    return Report([check(name, arms[OURS]["median"], "s", BUDGET_SECONDS, "lower")], details)


def write_tier(folder: Path) -> int:
    """A disk tier full of blocks as a closed server leaves it, but with holes for payloads. Returns its quota."""
    per_segment = directory.SEGMENT_BYTES_MAX // frame_bytes(BLOCK_BYTES)
    segments = -(-BLOCKS // per_segment)
    room_bytes = segments * directory.SEGMENT_BYTES_MAX
    os.close(directory.claim(folder))
    directory.segment_bytes(folder, SEGMENTS_MIN * directory.SEGMENT_BYTES_MAX)
    for number in range(segments):
        with (folder / f"{number:06d}.segment").open("wb") as file:
            file.truncate(directory.SEGMENT_BYTES_MAX)
    with (folder / directory.LOG_FILE).open("wb") as file:
        file.write(journal.pack(_records(per_segment), epoch=1))
        os.fsync(file.fileno())
    return (room_bytes + directory.SMALL_FILES_BYTES) * 32 // 31 + PAGE_BYTES


def _records(per_segment: int) -> journal.Records:
    """Turn by turn of conversations that speak in a random order, each turn behind the last in the segments."""
    random = np.random.default_rng(4)
    number = np.arange(BLOCKS)
    turns_per_path, turns = PATH_BLOCKS // TURN_BLOCKS, -(-BLOCKS // TURN_BLOCKS)
    path_of_turn = random.permutation(np.arange(turns) // turns_per_path)
    by_path = np.argsort(path_of_turn, kind="stable")
    before, place_in_path = np.zeros(turns, np.int64), np.zeros(turns, np.int64)
    before[by_path[1:]] = by_path[:-1]
    place_in_path[by_path] = np.arange(turns) % turns_per_path
    turn, inside = number // TURN_BLOCKS, number % TURN_BLOCKS
    parent = np.where(inside > 0, number - 1, before[turn] * TURN_BLOCKS + TURN_BLOCKS - 1)
    records = np.zeros(BLOCKS, RECORD)
    records["key"] = np.frombuffer(random.bytes(32 * BLOCKS), "V32")
    records["depth"] = place_in_path[turn] * TURN_BLOCKS + inside + 1
    behind = np.flatnonzero(records["depth"] > 1)
    records["parent"][behind] = records["key"][parent[behind]]
    records["layout"] = np.frombuffer(bytes(range(32)), "V32")
    records["kind"], records["length"] = ADD, BLOCK_BYTES
    records["segment"], records["slot"] = number // per_segment, number % per_segment
    records["slot_pages"] = frame_bytes(BLOCK_BYTES) // PAGE_BYTES
    records["stored"] = 1.7e9 + number / 100
    return records


def _set_cache(log: Path, *, keep: bool) -> None:
    """Have the log in the page cache, or out of it."""
    with log.open("rb") as file:
        if not keep:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while keep and file.read(MIB):
            pass


def _in_a_process(name: str, folder: str, capacity_bytes: int) -> float:
    words = [sys.executable, "-m", "bench.recovery", name, folder, str(capacity_bytes), str(BLOCKS)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    return float(done.stdout)


# -- in that process ---------------------------------------------------------------------------------------------------


def _arm(name: str, folder: Path, capacity_bytes: int, blocks: int) -> float:
    """Seconds that one start took; closing is not counted."""
    if name == RAW:
        return timed(lambda: _read_raw(folder / directory.LOG_FILE, blocks))
    warm = MemoryTier(MIB)
    stores: list[Store] = []
    seconds = timed(lambda: stores.append(Store(warm, [DiskTier(folder, capacity_bytes)])))
    assert len(stores[0]._books.index) == blocks  # noqa: SLF001  # the store does not tell
    stores[0].close()
    return seconds


def _read_raw(log: Path, blocks: int) -> None:
    """What no index in Python can do without: every byte read and verified, every key an object, one dict."""
    raw = memoryview(log.read_bytes())
    starts = range(0, len(raw), PAGE_BYTES)
    assert all(xxh3_128_digest(raw[at + SUM_BYTES : at + PAGE_BYTES]) == raw[at : at + SUM_BYTES] for at in starts)
    records = [raw[at + journal.RECORD.itemsize : at + PAGE_BYTES] for at in starts]
    width = RECORD.itemsize
    keys = [bytes(page[at : at + 32]) for page in records for at in range(0, len(page), width)][:blocks]
    assert len(dict(zip(keys, range(blocks), strict=True))) == blocks


if __name__ == "__main__":
    print(_arm(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
