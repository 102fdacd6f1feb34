"""The disk tier where it hurts: devices that hang, fail or fill up, races, and a log that has to hold all of it."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.conformance.faulty import flip, overwrite, where
from tests.conformance.samples import (
    CLOCK,
    LENGTH,
    PATIENCE_SECONDS,
    blocks_of,
    chain,
    cut,
    hits,
    layout_of,
    load,
    room_for,
    save,
)
from thermocline.blocks.frame import frame_bytes, payload_sum
from thermocline.blocks.key import NO_PARENT
from thermocline.clock import ManualClock
from thermocline.errors import DiskInUseError
from thermocline.tiers import disk, journal, segments
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.shelves import position
from thermocline.tiers.tier import Block, Outcome

MIB = 1 << 20
A, B = layout_of("a"), layout_of("b")
KEYS = chain(1, 12)
FRAME = frame_bytes(LENGTH)


@pytest.fixture
def opened():
    """Opens tiers, and closes them at the end."""
    tiers = []

    def open_tier(path, capacity=32 * MIB, **settings):
        tiers.append(DiskTier(path, capacity, **settings))
        return tiers[-1]

    yield open_tier
    for tier in tiers:
        tier.close()
        tier._thread.join(PATIENCE_SECONDS)


@pytest.fixture
def tier(opened, tmp_path):
    """A tier of 32 MiB."""
    return opened(tmp_path / "tier")


class Gate:
    """A system call that hangs until the test opens the gate."""

    def __init__(self, monkeypatch, name):
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self._real = getattr(os, name)
        monkeypatch.setattr(segments.os, name, self._call)

    def _call(self, *arguments):
        self.entered.release()
        assert self.open.wait(PATIENCE_SECONDS)
        return self._real(*arguments)

    def wait(self):
        assert self.entered.acquire(timeout=PATIENCE_SECONDS), "nobody called"


@pytest.fixture
def gate(monkeypatch):
    """Makes gates, and opens them at the end."""
    gates = []

    def make(name):
        gates.append(Gate(monkeypatch, name))
        return gates[-1]

    yield make
    for made in gates:
        made.open.set()


def _fails(monkeypatch, where_, name, error=errno.EIO):
    """A system call that fails from now on; returns what undoes it."""
    real = getattr(os, name)

    def fail(*arguments):
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(where_.os, name, fail)
    return lambda: monkeypatch.setattr(where_.os, name, real)


# -- a device that hangs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["pwritev", "fdatasync"])
def test_a_hanging_write_holds_up_nobody(opened, tmp_path, gate, call):
    """While a write or a sync hangs, saves are taken up to the queue's bound and then LATE; all other verbs answer."""
    tier = opened(tmp_path / "tier", queue_bytes_max=40 * FRAME)
    assert hits(save(tier, A, KEYS).outcomes) == 12
    hanging = gate(call)
    jobs = [tier.save(B, chain(2, 10), blocks_of(B, chain(2, 10)))]
    hanging.wait()
    jobs += [tier.save(B, keys, blocks_of(B, keys)) for keys in (chain(seed, 10) for seed in range(3, 9))]
    taken = sum(job.outcomes.count(Outcome.PENDING) + job.outcomes.count(Outcome.HIT) for job in jobs)
    assert taken == 40
    assert sum(job.outcomes.count(Outcome.LATE) for job in jobs) == 30
    assert not any(job.done for job in jobs[:4])
    assert all(job.done for job in jobs[4:])
    assert hits(load(tier, A, KEYS)) == 12
    assert tier.remove(A, KEYS[6:]) == 6
    assert sum(tier.holds(A, KEYS)) == 6
    assert tier.usage().used_bytes <= tier.capacity_bytes
    tier.check_integrity()
    assert not tier.wait_idle(0.01)
    hanging.open.set()
    assert tier.wait_idle(PATIENCE_SECONDS)
    assert hits(out for job in jobs for out in job.outcomes) == 40
    tier.check_integrity()


def test_a_hanging_write_does_not_hold_up_closing(opened, tmp_path, gate, monkeypatch):
    """Closing gives up on a device that hangs: what waits is FAILED, and the path stays locked until it answers."""
    monkeypatch.setattr(disk, "CLOSE_SECONDS_MAX", 0.05)
    tier = opened(tmp_path / "tier")
    hanging = gate("pwritev")
    jobs = [tier.save(A, KEYS, blocks_of(A, KEYS))]
    hanging.wait()
    jobs += [tier.save(B, KEYS, blocks_of(B, KEYS)) for _ in range(3)]
    tier.close()
    assert [job.done for job in jobs] == [False, True, True, True], "the device still reads the first one's pieces"
    assert {out for job in jobs[1:] for out in job.outcomes} == {Outcome.FAILED}
    with pytest.raises(DiskInUseError):
        DiskTier(tmp_path / "tier", 32 * MIB)
    hanging.open.set()
    tier._thread.join(PATIENCE_SECONDS)
    assert jobs[0].done
    again = opened(tmp_path / "tier")
    assert hits(load(again, A, KEYS)) == 12
    assert not any(again.holds(B, KEYS))


def test_a_hanging_read_is_late(tier, gate):
    """While reads hang, loads return LATE in their own time, saves go on, and nothing is written into their pieces."""
    assert hits(save(tier, A, KEYS).outcomes) == 12
    hanging = gate("preadv")
    into = room_for(12)
    assert set(tier.load(A, KEYS, into, CLOCK.now() + 0.02)) == {Outcome.LATE}
    for _ in range(20):
        assert set(load(tier, A, KEYS, seconds=0.001)) == {Outcome.LATE}
    assert hits(save(tier, B, KEYS).outcomes) == 12
    hanging.open.set()
    assert hits(load(tier, A, KEYS)) == 12
    assert all(np.all(pieces[0] == 0xA5) for pieces in into)
    tier.check_integrity()


def test_closing_while_reads_hang(opened, tmp_path, gate, monkeypatch):
    """Closing gives up on reads that hang, too, and leaves what was saved durable."""
    monkeypatch.setattr(disk, "READERS_CLOSE_SECONDS_MAX", 0.05)
    tier = opened(tmp_path / "tier")
    save(tier, A, KEYS)
    hanging = gate("preadv")
    assert set(load(tier, A, KEYS, seconds=0.01)) == {Outcome.LATE}
    save(tier, B, KEYS)
    tier.close()
    assert set(load(tier, A, KEYS, seconds=PATIENCE_SECONDS)) == {Outcome.FAILED}
    hanging.open.set()
    again = opened(tmp_path / "tier")
    assert hits(load(again, A, KEYS)) == hits(load(again, B, KEYS)) == 12


# -- a device that fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where_", "call"), [(segments, "pwritev"), (segments, "fdatasync"), (journal, "pwrite"), (journal, "fdatasync")]
)
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_failing_write(opened, tmp_path, monkeypatch, where_, call, error):
    """A write that the system refuses is FAILED, holds no room, hurts no other block, and the next one works."""
    tier = opened(tmp_path / "tier")
    save(tier, A, KEYS)
    free = tier.free_slots(LENGTH)
    mend = _fails(monkeypatch, where_, call, error)
    assert set(save(tier, B, KEYS).outcomes) == {Outcome.FAILED}
    assert not any(tier.holds(B, KEYS))
    assert hits(load(tier, A, KEYS)) == 12
    mend()
    assert tier.wait_idle(PATIENCE_SECONDS)
    assert tier.free_slots(LENGTH) == free
    tier.check_integrity()
    assert hits(save(tier, B, KEYS).outcomes) == 12
    tier.close()
    again = opened(tmp_path / "tier")
    assert hits(load(again, A, KEYS)) == hits(load(again, B, KEYS)) == 12


def test_a_short_write(tier, monkeypatch):
    """A write of which the device takes only a part is FAILED as a whole."""
    real = os.pwritev
    monkeypatch.setattr(segments.os, "pwritev", lambda fd, pieces, at: real(fd, pieces[:1], at))
    assert set(save(tier, A, KEYS).outcomes) == {Outcome.FAILED}
    monkeypatch.setattr(segments.os, "pwritev", real)
    assert hits(save(tier, A, KEYS).outcomes) == 12
    assert hits(load(tier, A, KEYS)) == 12
    tier.check_integrity()


def test_done_means_synced(tier, monkeypatch):
    """A job is done only after every segment that it wrote to, and then the log's name and pages, were synced."""
    synced, real = set(), os.fdatasync

    def record(fd):
        synced.add(str(Path(f"/proc/self/fd/{fd}").readlink()))
        real(fd)

    monkeypatch.setattr(segments.os, "fdatasync", record)
    layout, length = layout_of("large", 1_000_000), 1_000_000
    keys = chain(3, 12)
    at_the_end = []
    job = tier.save(layout, keys, blocks_of(layout, keys, length))
    job.watch(done=lambda _: at_the_end.append(set(synced)))
    assert job.wait(PATIENCE_SECONDS)
    assert tier.wait_idle(PATIENCE_SECONDS)
    touched = {str(where(tier, layout, key)[0]) for key in keys}
    assert len(touched) > 1
    assert at_the_end[0] >= touched | {str(where(tier, layout, keys[0])[0].with_name("index.log"))}


def test_a_failing_sync_leaves_what_was_to_be_replaced(tier, monkeypatch):
    """A replacement whose sync fails is not held, and what it was to replace, which is durable, still is."""
    save(tier, A, KEYS)
    mend = _fails(monkeypatch, segments, "fdatasync")
    assert set(save(tier, A, KEYS, version=1).outcomes) == {Outcome.FAILED}
    mend()
    assert set(load(tier, A, KEYS)) == {Outcome.HIT}
    tier.check_integrity()


def test_a_replacement_gives_back_its_room_once_it_is_durable(tier):
    """However often blocks are replaced, only their last version takes room, and the log names no other."""
    for version in range(5):
        save(tier, A, KEYS, version=version)
    assert set(load(tier, A, KEYS, versions=(4,))) == {Outcome.HIT}
    assert tier.wait_idle(60)
    used = tier._slots.used_bytes
    tier.check_integrity()
    tier.remove(A, KEYS[:1])
    assert tier._slots.used_bytes == used * 11 // 12


def test_a_failing_read(tier, monkeypatch):
    """Reads that the system refuses are FAILED, and the blocks are held for the time when it answers again."""
    save(tier, A, KEYS)
    mend = _fails(monkeypatch, segments, "preadv")
    assert set(load(tier, A, KEYS)) == {Outcome.FAILED}
    mend()
    assert hits(load(tier, A, KEYS)) == 12


def test_a_log_that_fails_on_removals(opened, tmp_path, monkeypatch):
    """While the log cannot hear of removals nothing is written over their room, so a crash leaves every block right."""
    tier = opened(tmp_path / "tier", capacity=8 * MIB)
    layout, length = layout_of("large", 1_000_000), 1_000_000
    keys = chain(1, 6)
    assert hits(save(tier, layout, keys, length).outcomes) == 6
    mend = _fails(monkeypatch, journal, "pwrite", errno.ENOSPC)
    assert tier.remove(layout, keys) == 6
    assert set(save(tier, layout, chain(2, 6), length).outcomes) == {Outcome.FAILED}
    shutil.copytree(tmp_path / "tier", tmp_path / "crashed")
    mend()
    assert hits(save(tier, layout, chain(2, 6), length).outcomes) == 6
    crashed = opened(tmp_path / "crashed", capacity=8 * MIB)
    assert hits(load(crashed, layout, keys, length)) == 6, "what was removed is there again, and right"
    tier.close()
    again = opened(tmp_path / "tier", capacity=8 * MIB)
    assert hits(load(again, layout, chain(2, 6), length)) == 6
    assert not any(again.holds(layout, keys))


def test_pieces_that_are_no_plain_memory(tier):
    """A block whose pieces are not one stretch of memory is FAILED or stored right, and the writer goes on."""
    layout = layout_of("page", 4096)
    strided = np.zeros((4096, 2), np.uint8)[:, 0]
    odd = Block(NO_PARENT, 1, [strided], payload_sum([strided.copy()]))
    for _ in range(3):
        job = tier.save(layout, KEYS[:1], [odd])
        assert job.wait(PATIENCE_SECONDS)
        if job.outcomes == [Outcome.HIT]:
            into = room_for(1, 4096)
            assert tier.load(layout, KEYS[:1], into, CLOCK.now() + PATIENCE_SECONDS) == [Outcome.HIT]
            assert not into[0][0].any()
    assert hits(save(tier, A, KEYS).outcomes) == 12
    tier.check_integrity()


def test_a_defect_in_the_writer(opened, tmp_path, monkeypatch):
    """An exception that nobody expects ends no thread: the jobs are FAILED, their room is free, and the next go in."""
    tier = opened(tmp_path / "tier")
    free = tier.free_slots(LENGTH)
    real = tier._additions
    monkeypatch.setattr(tier, "_additions", lambda writes: real(None))
    for _ in range(3):
        assert set(save(tier, A, KEYS).outcomes) == {Outcome.FAILED}
    monkeypatch.undo()
    assert tier.wait_idle(PATIENCE_SECONDS)
    assert tier.free_slots(LENGTH) == free
    tier.check_integrity()
    assert hits(save(tier, A, KEYS).outcomes) == 12
    assert hits(load(tier, A, KEYS)) == 12


def test_padding_is_zero(tier):
    """The rest of a block's last page is zeroes on disk, never a part of an earlier block."""
    long, short = layout_of("long", 3 * 4096), layout_of("short", 4096 + 1)
    save(tier, long, KEYS, 3 * 4096, cuts=2)
    save(tier, short, KEYS, 4096 + 1, cuts=2)
    for key in KEYS:
        segment, offset, length = where(tier, short, key)
        assert not any(segment.read_bytes()[offset + 4096 + length : offset + 3 * 4096])


def test_a_watcher_that_raises(tier):
    """A watcher that raises is logged; the others are called, and the writer goes on."""
    told = threading.Event()
    job = tier.save(A, KEYS, blocks_of(A, KEYS))
    job.watch(visible=_raise, done=_raise)
    job.watch(done=lambda _: told.set())
    assert told.wait(PATIENCE_SECONDS)
    assert hits(save(tier, B, KEYS).outcomes) == 12


def _raise(job):
    if threading.current_thread().name == "disk-writer":
        raise RuntimeError("a watcher's mistake")


# -- room --------------------------------------------------------------------------------------------------------------


def test_a_full_file_system_is_asked_again(opened, tmp_path, monkeypatch):
    """Where the file system has no room, saves are FULL; later they wait for a segment, get it, and go in."""
    clock = ManualClock()
    tier = opened(tmp_path / "tier", queue_bytes_max=MIB, clock=clock)
    layout, length = layout_of("large", 1_000_000), 1_000_000
    mend = _fails(monkeypatch, segments, "posix_fallocate", errno.ENOSPC)
    held = []
    for seed in range(100):
        job = tier.save(layout, chain(seed, 1), blocks_of(layout, chain(seed, 1), length))
        assert job.wait(PATIENCE_SECONDS)
        held += chain(seed, 1) if job.outcomes == [Outcome.HIT] else []
        if job.outcomes == [Outcome.FULL]:
            break
    assert job.outcomes == [Outcome.FULL]
    segments_before = len(list((tmp_path / "tier").glob("*.segment")))
    assert segments_before >= 1
    mend()
    assert save(tier, layout, chain(200, 1), length).outcomes == [Outcome.FULL], "not asked again at once"
    clock.sleep(disk.GROW_RETRY_SECONDS)
    deadline = CLOCK.now() + PATIENCE_SECONDS
    while save(tier, layout, chain(300, 1), length).outcomes != [Outcome.HIT]:
        assert CLOCK.now() < deadline, "the tier never grows again"
        CLOCK.sleep(0.005)
    into = room_for(1, length)
    assert tier.load(layout, chain(300, 1), into, clock.now() + PATIENCE_SECONDS) == [Outcome.HIT]
    assert len(list((tmp_path / "tier").glob("*.segment"))) > segments_before
    tier.check_integrity()


def test_growing_for_another_size(opened, tmp_path):
    """Room that only blocks of another size can use does not keep the tier from growing."""
    tier = opened(tmp_path / "tier", capacity=64 * MIB, queue_bytes_max=4 * MIB)
    assert hits(save(tier, A, KEYS).outcomes) == 12
    layout, length = layout_of("huge", 9 * MIB), 9 * MIB
    taken = 0
    deadline = CLOCK.now() + PATIENCE_SECONDS
    for seed in range(2):
        while (job := save(tier, layout, chain(seed, 1), length)).outcomes == [Outcome.LATE]:
            assert CLOCK.now() < deadline
        taken += hits(job.outcomes)
    assert taken == 2
    assert hits(load(tier, A, KEYS)) == 12


def test_a_block_larger_than_the_queue(opened, tmp_path):
    """A block that exceeds the queue's bound goes in alone, when nothing else waits."""
    tier = opened(tmp_path / "tier", queue_bytes_max=4096)
    job = save(tier, A, KEYS)
    assert job.outcomes == [Outcome.HIT] + [Outcome.LATE] * 11
    assert hits(load(tier, A, KEYS)) == 1


def test_a_block_larger_than_a_segment(opened, tmp_path):
    """A block that no segment can hold is dropped, and nobody is told to make room for it."""
    tier = opened(tmp_path / "tier", capacity=8 * MIB)
    layout = layout_of("huge", 4 * MIB)
    assert save(tier, layout, KEYS[:2], 4 * MIB).outcomes == [Outcome.MISS] * 2
    assert hits(save(tier, A, KEYS).outcomes) == 12
    tier.check_integrity()


def test_another_length_under_one_layout(tier):
    """A save whose blocks have another length than the layout's is FAILED, and what is held stays."""
    save(tier, A, KEYS[:6])
    assert set(save(tier, A, KEYS[6:], 500).outcomes) == {Outcome.FAILED}
    assert hits(load(tier, A, KEYS)) == 6
    tier.check_integrity()


def test_saving_nothing_says_nothing_about_a_layout(tier):
    """An empty save is done at once and does not bind the layout to a length."""
    assert save(tier, A, []).outcomes == []
    assert hits(save(tier, A, KEYS).outcomes) == 12


@pytest.mark.parametrize("capacity", [8 * MIB, 24 * MIB])
def test_tiny_blocks_fill_the_log_before_the_disk(opened, tmp_path, capacity):
    """With blocks of 4 KiB the log is what is full: saves are FULL, never FAILED, also after many turnovers."""
    path = tmp_path / "tier"
    tier = opened(path, capacity, queue_bytes_max=2 * MIB)
    layout, length = layout_of("tiny", 4096), 4096
    held, outcomes = [], set()
    for turn in range(60):
        keys = chain((1, turn), 100)
        job = save(tier, layout, keys, length)
        outcomes.update(job.outcomes)
        held += [key for key, outcome in zip(keys, job.outcomes, strict=True) if outcome is Outcome.HIT]
        if Outcome.FULL in job.outcomes:
            gone, held = held[:150], held[150:]
            assert tier.remove(layout, gone) == 150
        usage = tier.usage()
        assert usage.used_bytes <= usage.capacity_bytes
        assert usage.blocks == len(held)
    assert outcomes <= {Outcome.HIT, Outcome.FULL, Outcome.LATE}
    assert hits(load(tier, layout, held, length)) == len(held)
    assert len(held) * 3 * 4096 > capacity or Outcome.FULL not in outcomes
    tier.close()
    again = opened(path, capacity)
    assert hits(load(again, layout, held, length)) == len(held)
    assert again.usage().blocks == len(held)
    again.check_integrity()


def test_compaction_in_use(opened, tmp_path, monkeypatch):
    """However often the log is compacted under load, nothing durable is lost and the quota holds in every moment."""
    monkeypatch.setattr(journal, "COMPACT_BYTES_MIN", 32 * 1024)
    rewrites, real = [], journal.Journal.rewrite

    def rewrite(log, live):
        rewrites.append(len(live))
        real(log, live)

    monkeypatch.setattr(journal.Journal, "rewrite", rewrite)
    path = tmp_path / "tier"
    tier = opened(path, 16 * MIB)
    kept = [chain(seed, 5) for seed in range(20)]
    for keys in kept:
        save(tier, A, keys)
    stop = threading.Event()
    over = []

    def watch():
        while not stop.is_set():
            usage = tier.usage()
            disk_bytes = _disk_bytes(path)
            if max(usage.used_bytes, disk_bytes) > 16 * MIB:
                over.append((usage, disk_bytes))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for turn in range(60):
        keys = chain((9, turn), 4)
        assert hits(save(tier, B, keys).outcomes) == 4
        assert tier.remove(B, keys) == 4
    stop.set()
    watcher.join()
    assert len(rewrites) >= 3
    assert over == []
    tier.close()
    again = opened(path, 16 * MIB)
    for keys in kept:
        assert hits(load(again, A, keys)) == 5
    assert again.usage().blocks == 100


def _disk_bytes(path):
    """What the file system says; a file may go while it is asked."""
    total = 0
    for file in [path, *path.iterdir()]:
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_blocks * 512
    return total


def test_a_compaction_of_a_log_that_rotted(opened, tmp_path):
    """Records of log pages that rotted while the tier was open are in the compacted log again, and no others."""
    path = tmp_path / "tier"
    tier = opened(path)
    for seed in range(6):
        for layout in (A, B):
            save(tier, layout, chain(seed, 8))
    tier.remove(A, chain(2, 8))
    save(tier, B, chain(9, 8))  # where a block was removed
    assert tier.wait_idle(PATIENCE_SECONDS)
    pages = journal.read(path / "index.log").pages
    for page in range(0, pages, 2):
        flip(path / "index.log", 4096 * page + 700)
    lost = [where(tier, A, key) for key in chain(0, 8)[7:]]  # its frame has rotted as well
    flip(lost[0][0], lost[0][1] + 50)
    expected = {
        (layout, key)
        for layout, seeds in ((A, (0, 1, 3, 4, 5)), (B, (0, 1, 2, 3, 4, 5, 9)))
        for seed in seeds
        for key in chain(seed, 8)
    } - {(A, chain(0, 8)[7])}
    tier._journal.compact()
    assert hits(save(tier, B, KEYS).outcomes) == 12
    tier.close()
    assert journal.read(path / "index.log").bad_pages == 0
    again = opened(path)
    found = {part.layout: part for part in again.found()}
    names = {(layout, key) for layout, part in found.items() for key in part.keys}
    assert names >= expected | {(B, key) for key in KEYS}
    assert all(part.rooted().all() for part in found.values())
    for layout, key in expected:
        assert load(again, layout, [key]) == [Outcome.HIT]
    again.check_integrity()


def test_a_crash_between_rename_and_reopen(opened, tmp_path, monkeypatch):
    """Whatever moment of a compaction a crash hits, the next opening finds all that was durable."""
    path = tmp_path / "tier"
    tier = opened(path)
    save(tier, A, KEYS)
    tier.remove(A, KEYS[:2])
    assert tier.wait_idle(PATIENCE_SECONDS)
    moments = {"before": tmp_path / "before", "renamed": tmp_path / "renamed", "after": tmp_path / "after"}
    real_rename, real_sync = type(path).rename, journal.sync_directory

    def rename(source, target):
        shutil.copytree(path, moments["before"])
        return real_rename(source, target)

    def sync(directory):
        shutil.copytree(path, moments["renamed"])
        real_sync(directory)

    monkeypatch.setattr(type(path), "rename", rename)
    monkeypatch.setattr(journal, "sync_directory", sync)
    tier._journal.compact()
    monkeypatch.undo()
    assert hits(save(tier, B, KEYS).outcomes) == 12
    shutil.copytree(path, moments["after"])
    assert (moments["before"] / "index.new").exists()
    for name, moment in moments.items():
        crashed = opened(moment)
        assert hits(load(crashed, A, KEYS)) == 10
        assert hits(load(crashed, B, KEYS)) == (12 if name == "after" else 0)
        assert not (moment / "index.new").exists()
        crashed.check_integrity()


# -- races -------------------------------------------------------------------------------------------------------------


def test_remove_while_the_key_is_queued(tier, gate):
    """A remove concerns what is held: a save under way becomes visible later, and can be removed then."""
    hanging = gate("pwritev")
    job = tier.save(A, KEYS, blocks_of(A, KEYS))
    hanging.wait()
    assert tier.remove(A, KEYS) == 0
    hanging.open.set()
    assert job.wait(PATIENCE_SECONDS)
    assert all(tier.holds(A, KEYS))
    assert hits(load(tier, A, KEYS)) == 12
    assert tier.remove(A, KEYS) == 12
    assert tier.wait_idle(PATIENCE_SECONDS)
    assert tier.usage().blocks == 0
    tier.check_integrity()


def test_replace_while_it_is_read(tier, gate):
    """A load that a replacement overtakes gives the old bytes, the new bytes or a miss, and the new block stays."""
    save(tier, A, KEYS)
    hanging = gate("preadv")
    outcomes = []
    reader = threading.Thread(target=lambda: outcomes.extend(load(tier, A, KEYS, versions=(0, 1))))
    reader.start()
    hanging.wait()
    assert hits(save(tier, A, KEYS, version=1).outcomes) == 12
    for seed in range(2, 30):  # room that was given back is written again
        save(tier, B, chain(seed, 12))
    hanging.open.set()
    reader.join()
    assert set(outcomes) <= {Outcome.HIT, Outcome.MISS}
    assert hits(load(tier, A, KEYS, versions=(1,))) == 12
    tier.check_integrity()


def test_the_same_place_again(opened, tmp_path, gate):
    """A key that is removed and saved again into its old place while it is read is not mistaken for damaged."""
    tier = opened(tmp_path / "tier", capacity=8 * MIB)
    layout, length = layout_of("large", 1_000_000), 1_000_000
    key = KEYS[:1]
    fillers = chain(5, 6)
    assert hits(save(tier, layout, [*key, *fillers], length).outcomes) >= 4
    before = tier._shelves[layout].entries[key[0]]
    hanging = gate("preadv")
    outcomes = []
    reader = threading.Thread(target=lambda: outcomes.extend(load(tier, layout, key, length)))
    reader.start()
    hanging.wait()
    tier.remove(layout, key)
    overwrite(*_where_of(tier, layout, before, length), b"\0" * 4096)
    assert save(tier, layout, key, length).outcomes == [Outcome.HIT]
    assert position(tier._shelves[layout].entries[key[0]]) == position(before)
    segment, offset, _ = where(tier, layout, key[0])
    header = segment.read_bytes()[offset : offset + 4096]
    overwrite(segment, offset, b"\0" * 4096)  # what a read in the middle of the new write sees
    hanging.open.set()
    reader.join()
    assert outcomes == [Outcome.MISS]
    overwrite(segment, offset, header)
    assert load(tier, layout, key, length) == [Outcome.HIT]
    tier.check_integrity()


def _where_of(tier, layout, place, length):
    """Segment file and offset of a place."""
    slot = disk.slot_at(place)
    return tier._segments.file(slot.unit), slot.number * frame_bytes(length)


def test_two_removers(tier):
    """Of many threads that remove the same blocks one is counted for each, and no slot is given back twice."""
    for turn in range(20):
        keys = chain(turn, 30)
        save(tier, A, keys)
        with ThreadPoolExecutor(4) as threads:
            removed = threads.map(lambda _, keys=keys: tier.remove(A, keys), range(4))
        assert sum(removed) == 30
    tier.check_integrity()
    assert tier.usage().blocks == 0


def test_a_load_while_closing(opened, tmp_path):
    """Loads that a close overtakes end with an outcome."""
    for turn in range(10):
        tier = opened(tmp_path / str(turn))
        save(tier, A, KEYS)
        outcomes, wrong = [], []

        def work(tier=tier, outcomes=outcomes, wrong=wrong):
            try:
                for _ in range(20):
                    outcomes.extend(load(tier, A, KEYS, seconds=5))
            except Exception as error:  # noqa: BLE001  # shown below, in the test's own thread
                wrong.append(error)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        tier.close()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert set(outcomes) <= {Outcome.HIT, Outcome.FAILED, Outcome.LATE}


# -- damage ------------------------------------------------------------------------------------------------------------


def test_a_damaged_place_is_set_aside(opened, tmp_path):
    """A place where damage was found is not used again before a restart, is accounted for, and then is used again."""
    path = tmp_path / "tier"
    tier = opened(path)
    save(tier, A, KEYS)
    free = tier.free_slots(LENGTH)
    places = {tier._shelves[A].entries[key] for key in KEYS[:4]}
    for key in KEYS[:4]:
        flip(*where(tier, A, key)[:2])
    assert load(tier, A, KEYS) == [Outcome.CORRUPT] * 4 + [Outcome.HIT] * 8
    assert load(tier, A, KEYS) == [Outcome.MISS] * 4 + [Outcome.HIT] * 8
    assert tier.free_slots(LENGTH) == free
    tier.check_integrity()
    save(tier, A, KEYS[:4])
    assert not {position(tier._shelves[A].entries[key]) for key in KEYS} & set(map(position, places))
    tier.close()
    again = opened(path)
    assert again.free_slots(LENGTH) == free
    assert hits(load(again, A, KEYS)) == 12
    again.check_integrity()


class BadSectors:
    """Reads that touch these bytes of a file fail, as those of a sector that is gone; or all reads do."""

    def __init__(self, monkeypatch):
        self.bad = set()
        self.dead = False
        self._preadv = os.preadv
        monkeypatch.setattr(segments.os, "preadv", self._read)

    def _read(self, fd, buffers, offset):
        name, end = Path(f"/proc/self/fd/{fd}").readlink(), offset + sum(map(len, buffers))
        if self.dead or any(file == name and offset <= at < end for file, at in self.bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._preadv(fd, buffers, offset)

    def add(self, tier, key):
        segment, offset, _ = where(tier, A, key)
        self.bad.add((segment, offset + 4096))


@pytest.fixture
def sectors(monkeypatch):
    """None is bad at first."""
    return BadSectors(monkeypatch)


def test_a_bad_sector_costs_one_block(opened, tmp_path, sectors):
    """The block on a sector that cannot be read goes like a damaged one, its neighbours are hits, it is saved anew."""
    tier = opened(tmp_path / "tier")
    save(tier, A, KEYS)
    place = tier._shelves[A].entries[KEYS[3]]
    sectors.add(tier, KEYS[3])
    assert load(tier, A, KEYS) == [Outcome.HIT] * 3 + [Outcome.CORRUPT] + [Outcome.HIT] * 8
    assert tier.holds(A, KEYS) == [True] * 3 + [False] + [True] * 8
    tier.check_integrity()
    save(tier, A, KEYS[3:4])
    assert position(tier._shelves[A].entries[KEYS[3]]) != position(place)
    assert hits(load(tier, A, KEYS)) == 12
    tier.close()
    assert hits(load(opened(tmp_path / "tier"), A, KEYS)) == 12, "the log names the new place"


@pytest.mark.parametrize("at", [0, 11])
def test_a_bad_sector_is_tried_twice(tier, sectors, at):
    """A block that is read alone fails once, and goes when it fails again while others could be read."""
    save(tier, A, KEYS)
    sectors.add(tier, KEYS[at])
    for _ in range(3):
        assert load(tier, A, KEYS[at : at + 1]) == [Outcome.FAILED]
    assert hits(load(tier, A, KEYS[4:6])) == 2
    assert load(tier, A, KEYS[at : at + 1]) == [Outcome.CORRUPT]
    assert load(tier, A, KEYS[at : at + 1]) == [Outcome.MISS]
    tier.check_integrity()


def test_a_bad_first_sector_of_a_run(tier, sectors):
    """Also where the bad sector comes first its block goes, at the second load at the latest."""
    save(tier, A, KEYS)
    sectors.add(tier, KEYS[0])
    assert load(tier, A, KEYS)[1:] == [Outcome.HIT] * 11
    assert load(tier, A, KEYS)[1:] == [Outcome.HIT] * 11
    assert not tier.holds(A, KEYS)[0]


def test_a_device_that_comes_back_has_its_blocks(tier, sectors):
    """While no read succeeds no block is given up, and an outage after the first costs one block at most."""
    save(tier, A, KEYS)
    for outage in range(2):
        sectors.dead = True
        for _ in range(4):
            assert set(load(tier, A, KEYS)) <= {Outcome.FAILED, Outcome.CORRUPT, Outcome.MISS}
            assert set(load(tier, A, KEYS[5:6])) == {Outcome.FAILED}
        sectors.dead = False
        assert sum(tier.holds(A, KEYS)) >= 12 - outage
        assert hits(load(tier, A, KEYS[4:])) == 8
        assert hits(load(tier, A, KEYS)) == sum(tier.holds(A, KEYS))
    tier.check_integrity()


def test_reads_that_the_system_refuses_are_no_damage(tier, monkeypatch):
    """An error that says nothing about the sector costs no block, however often it comes."""
    save(tier, A, KEYS)
    for _ in range(3):
        mend = _fails(monkeypatch, segments, "preadv", errno.ENOMEM)
        assert set(load(tier, A, KEYS)) == {Outcome.FAILED}
        mend()
        assert hits(load(tier, A, KEYS)) == 12


def test_a_cut_segment_costs_only_its_own_blocks(opened, tmp_path):
    """A segment that is cut, or gone, loses its own blocks and no others; the room is used again."""
    path = tmp_path / "tier"
    tier = opened(path, capacity=64 * MIB, queue_bytes_max=60 * MIB)
    layout, length = layout_of("large", 1_000_000), 1_000_000
    keys = chain(1, 40)
    assert hits(save(tier, layout, keys, length).outcomes) == 40
    segment_of = {key: where(tier, layout, key)[0] for key in keys}
    tier.close()
    cut_one, gone = sorted(set(segment_of.values()))[:2]
    os.truncate(cut_one, 5000)
    gone.unlink()
    again = opened(path, capacity=64 * MIB)
    outcomes = dict(zip(keys, load(again, layout, keys, length), strict=True))
    for key, outcome in outcomes.items():
        assert (outcome is Outcome.HIT) == (segment_of[key] not in {cut_one, gone})
    again.check_integrity()
    assert sum(again.holds(layout, keys)) == hits(outcomes.values())
    missing = [key for key in keys if outcomes[key] is not Outcome.HIT]
    assert hits(save(again, layout, missing[:5], length).outcomes) == 5


def test_a_cut_segment_that_cannot_be_completed(opened, tmp_path, monkeypatch):
    """Without room for the rest of a cut segment its whole blocks are held, nothing is written behind the cut."""
    path, layout, length = tmp_path / "tier", layout_of("large", 100_000), 100_000
    tier = opened(path, capacity=8 * MIB)
    keys = chain(1, 60)
    assert hits(save(tier, layout, keys, length).outcomes) == 60
    segment_of = {key: where(tier, layout, key)[0] for key in keys}
    first, empty = segment_of[keys[0]], path / "000002.segment"
    inside = [key for key in keys if segment_of[key] == first]
    _, offset, _ = where(tier, layout, inside[8])
    tier.close()
    cut_at = offset + 5000
    os.truncate(first, cut_at)
    os.truncate(empty, 5000)
    mend = _fails(monkeypatch, segments, "posix_fallocate", errno.ENOSPC)
    again = opened(path, capacity=8 * MIB)
    expected = [key for key in keys if key not in inside[8:] and segment_of[key] != empty]
    assert load(again, layout, keys, length) == [Outcome.HIT if key in expected else Outcome.MISS for key in keys]
    again.check_integrity()
    save(again, layout, chain(2, 60), length)
    assert first.stat().st_size == cut_at
    held = [key for key in chain(2, 60) if again.holds(layout, [key])[0]]
    again.remove(layout, inside[:8])
    assert hits(load(again, layout, held, length)) == len(held)
    again.check_integrity()
    again.close()
    mend()
    whole = opened(path, capacity=8 * MIB)
    rest = [key for key in expected if key not in inside]
    assert hits(load(whole, layout, [*rest, *held], length)) == len(rest) + len(held)
    assert {file.stat().st_size for file in path.glob("*.segment")} == {whole._segments.segment_bytes}
    whole.check_integrity()


def test_a_segment_that_is_cut_while_it_is_open(tier):
    """Blocks behind a cut are CORRUPT, not the bytes of an earlier read, and the others are loaded."""
    layout, length = layout_of("large", 100_000), 100_000
    keys = chain(1, 20)
    save(tier, layout, keys, length)
    load(tier, layout, keys, length)
    segment, offset, _ = where(tier, layout, keys[10])
    os.truncate(segment, offset + 4096)
    outcomes = load(tier, layout, keys, length)
    assert outcomes[:10] == [Outcome.HIT] * 10
    assert set(outcomes[10:]) == {Outcome.CORRUPT}


def test_found_is_handed_out_once(opened, tmp_path):
    """What was found is told once: the caller keeps it, the tier does not."""
    tier = opened(tmp_path / "tier")
    save(tier, A, KEYS)
    tier.close()
    again = opened(tmp_path / "tier")
    assert sum(len(part.keys) for part in again.found()) == 12
    assert again.found() == []


def test_a_large_scattered_load(opened, tmp_path):
    """A load of many places that lie apart, in any order and into many pieces, is exact."""
    tier = opened(tmp_path / "tier")
    keys = [key for seed in range(30) for key in chain(seed, 10)]
    for start in range(0, len(keys), 10):
        save(tier, A, keys[start : start + 10], cuts=3)
    order = np.random.default_rng(5).permutation(len(keys))
    for cuts in (1, 16):
        assert hits(load(tier, A, [keys[at] for at in order], cuts=cuts)) == 300
    assert cut(np.arange(4, dtype=np.uint8), 2)[1].tolist() == [2, 3]
