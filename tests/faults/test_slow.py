"""Devices that hang, are slow or fail: nobody waits beyond a deadline, saves wait for nothing, nothing is left over."""

from __future__ import annotations

import gc
import logging
import random
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.conformance.faulty import damage
from tests.conformance.samples import (
    CLOCK,
    FREED,
    PATIENCE_SECONDS,
    blocks_of,
    chain,
    content,
    hits,
    layout_of,
    load,
    save,
)
from tests.faults.devices import READ, SYNC, WRITE, Trouble, TroubledDevice, Witness
from thermocline.tiers import disk
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.tier import Outcome

MIB = 1 << 20
LENGTH = 3000
LAYOUT = layout_of("a", LENGTH)
PATHS = [chain(seed, 8) for seed in range(12)]
BYTES = {key: content(LAYOUT, key, LENGTH) for path in PATHS for key in path}
OVERRUN_SECONDS_MAX = 0.050
CONTROL_EVERY = 64


@pytest.fixture
def only_our_garbage():
    """A full collection stops all threads for as long as it takes to look at all objects, and a test run has many.

    So has a log of failures that is kept with all frames they went through.
    """
    logging.disable(logging.CRITICAL)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    logging.disable(logging.NOTSET)


@pytest.fixture
def device(monkeypatch):
    """A device without trouble as yet."""
    with TroubledDevice(seed=1).installed(monkeypatch) as device:
        yield device


@pytest.fixture
def nothing_left():
    """No thread and no open file more than before."""
    before = _threads(), _descriptors()
    yield
    deadline = CLOCK.now() + PATIENCE_SECONDS
    while _threads() > before[0] or _descriptors() > before[1]:
        assert CLOCK.now() < deadline, f"left over: {_threads()} threads, {_descriptors()} files, once {before}"
        CLOCK.sleep(0.01)


@pytest.fixture
def tier(nothing_left, device, tmp_path, monkeypatch):
    """A disk tier on that device, which is not waited for long at its end."""
    monkeypatch.setattr(disk, "CLOSE_SECONDS_MAX", 0.2)
    monkeypatch.setattr(disk, "READERS_CLOSE_SECONDS_MAX", 0.1)
    monkeypatch.setattr(disk, "GROW_RETRY_SECONDS", 0.01)
    tier = DiskTier(tmp_path / "tier", 4 * MIB, queue_bytes_max=MIB)
    yield tier
    device.resume()
    tier.close()


def _threads():
    return sum(thread.name.startswith("disk-") for thread in threading.enumerate())


def _descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


class Caller:
    """Asks a tier for this and that, by seed, and keeps the times of what came back too late."""

    def __init__(self, tier, seed):
        self.tier = tier
        self.told = Counter()
        self.late = []  # verb, begin, deadline and end of what exceeded a deadline by more than the bound
        self.overrun_seconds = 0.0
        self.control_seconds = 0.0
        self.wrong = 0
        self._never = threading.Event()
        self._random = random.Random(seed)  # noqa: S311  # must replay
        self._room = [[np.full(LENGTH, FREED, np.uint8)] for _ in range(8)]
        self._blocks = {
            key: block for path in PATHS for key, block in zip(path, blocks_of(LAYOUT, path, LENGTH), strict=True)
        }

    def __call__(self, operations):
        for number in range(operations):
            draw = self._random.random()
            if draw < 0.75:
                self._load()
            elif draw < 0.95:
                self._save()
            elif draw < 0.98:
                self._timed("remove", 0.0, lambda: self.tier.remove(LAYOUT, self._keys()[:2]))
            else:
                self._timed("holds", 0.0, lambda: self.tier.holds(LAYOUT, self._keys()))
            if number % CONTROL_EVERY == 0:
                self._control()
        return self

    def _keys(self):
        path = self._random.choice(PATHS)
        start = self._random.randrange(8)
        return path[start : start + self._random.randint(1, 8)]

    def _load(self):
        keys = self._keys()
        allowed = self._random.choice((0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, self._random.uniform(0, 0.005)))
        room = self._room[: len(keys)]
        outcomes = self._timed(
            "load", allowed, lambda deadline: self.tier.load(LAYOUT, keys, room, deadline), takes_deadline=True
        )
        self.told.update(f"load {outcome}" for outcome in outcomes)
        for key, (piece,), outcome in zip(keys, room, outcomes, strict=True):
            if outcome is Outcome.HIT and not np.array_equal(piece, BYTES[key]):
                self.wrong += 1

    def _save(self):
        keys = self._keys()[:4]
        job = self._timed("save", 0.0, lambda: self.tier.save(LAYOUT, keys, [self._blocks[key] for key in keys]))
        self.told.update(f"save {outcome}" for outcome in job.outcomes if outcome is not Outcome.PENDING)

    def _timed(self, verb, seconds, call, *, takes_deadline=False):
        begin = CLOCK.now()
        answer = call(begin + seconds) if takes_deadline else call()
        end = CLOCK.now()
        overrun = end - begin - seconds
        self.overrun_seconds = max(self.overrun_seconds, overrun)
        if overrun > OVERRUN_SECONDS_MAX:
            self.late.append((verb, begin, begin + seconds, end))
        self.told[verb] += 1
        return answer

    def _control(self):
        """A wait of this thread that no tier has a part in."""
        begin = CLOCK.now()
        self._never.wait(0.001)
        self.control_seconds = max(self.control_seconds, CLOCK.now() - begin - 0.001)


def _report(callers, witness, seconds, **more):
    told = sum((caller.told for caller in callers), Counter())
    late = [late for caller in callers for late in caller.late]
    unexplained = [
        (verb, round(1000 * (end - deadline), 1))
        for verb, begin, deadline, end in late
        if end - deadline - witness.stalled_seconds(begin, end) > OVERRUN_SECONDS_MAX
    ]
    return {
        "operations": sum(told[verb] for verb in ("load", "save", "remove", "holds")),
        "overrun_ms": round(1000 * max(caller.overrun_seconds for caller in callers), 1),
        "control_overrun_ms": round(1000 * max(caller.control_seconds for caller in callers), 1),
        "machine_stall_ms": round(1000 * witness.worst_seconds, 1),
        "beyond_bound": len(late),
        "beyond_bound_and_not_the_machine": unexplained,
        "wrong_bytes": sum(caller.wrong for caller in callers),
        "seconds": round(seconds, 1),
        **more,
        "outcomes": dict(told),
    }


def _in_threads(callers, operations, meanwhile):
    """Run callers side by side, and `meanwhile()` again and again in this thread until they end."""
    threads = [threading.Thread(target=caller, args=(operations,), daemon=True) for caller in callers]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        meanwhile()
    for thread in threads:
        thread.join()


# -- many operations ---------------------------------------------------------------------------------------------------


@pytest.mark.matrix("hung", "disk")
@pytest.mark.parametrize("operations", [12_000, pytest.param(600_000, marks=pytest.mark.faults_long)])
def test_a_troubled_disk(tier, device, only_our_garbage, record_property, operations, cases):
    """Whatever the device does, no call is late by more than 50 ms, no HIT is wrong, and afterwards all is well."""
    rng = random.Random(operations)  # noqa: S311  # must replay
    troubles = Counter()
    hung = {"hung reads": (READ,), "hung writes": (WRITE,), "hung syncs": (SYNC,), "hung": (READ, WRITE, SYNC)}

    def meanwhile():
        device.resume()
        mode = rng.choice((*("well",) * 6, "slow", "failing", *hung, "all at once"))
        troubles[mode] += 1
        if mode in {"slow", "all at once"}:
            device.trouble = {READ: Trouble(0.02), WRITE: Trouble(0.02), SYNC: Trouble(0.05)}
        if mode in {"failing", "all at once"}:
            device.trouble = {kind: Trouble(0.005, errors=0.3, halves=0.3) for kind in (READ, WRITE, SYNC)}
        if mode.startswith("hung"):
            device.hang(*hung[mode])
        CLOCK.sleep(rng.uniform(0.01, 0.1))

    callers = [Caller(tier, seed) for seed in range(2)]
    started = CLOCK.now()
    with Witness() as witness:
        _in_threads(callers, operations // 2, meanwhile)
    told = _report(callers, witness, CLOCK.now() - started, failed_calls=device.failed, troubles=dict(troubles))
    record_property("figures", str(told))
    print(told)  # noqa: T201  # the long form's report
    assert (told["operations"], told["wrong_bytes"]) == (operations, 0)
    assert told["beyond_bound_and_not_the_machine"] == []
    assert min(told["outcomes"][f"load {outcome}"] for outcome in ("hit", "miss", "late", "failed")) > 0
    device.resume()
    assert tier.wait_idle(PATIENCE_SECONDS)
    tier.check_integrity()
    for path in PATHS:
        assert hits(save(tier, LAYOUT, path, LENGTH).outcomes) == 8
        assert hits(load(tier, LAYOUT, path, LENGTH)) == 8
    tier.check_integrity()
    cases(operations)


@pytest.mark.matrix("hung", "memory")
@pytest.mark.parametrize("operations", [12_000, pytest.param(400_000, marks=pytest.mark.faults_long)])
def test_troubled_memory(only_our_garbage, record_property, operations, cases):
    """With bits flipped, room short and others saving and removing, no call is late, and no HIT is wrong."""
    tier = MemoryTier(MIB // 4)  # half of what is asked for fits
    rng = random.Random(operations)  # noqa: S311  # must replay
    flips = Counter()

    def meanwhile():
        key = rng.choice(rng.choice(PATHS))
        if tier.block(LAYOUT, key) is not None:
            try:
                damage(tier, LAYOUT, key, rng.randrange)
            except TypeError:  # removed meanwhile
                return
            flips["flips"] += 1
        CLOCK.sleep(0.001)

    callers = [Caller(tier, seed) for seed in range(2)]
    started = CLOCK.now()
    with Witness() as witness:
        _in_threads(callers, operations // 2, meanwhile)
    told = _report(callers, witness, CLOCK.now() - started, **flips)
    record_property("figures", str(told))
    print(told)  # noqa: T201  # the long form's report
    assert (told["operations"], told["wrong_bytes"]) == (operations, 0)
    assert told["beyond_bound_and_not_the_machine"] == []
    assert min(told["outcomes"][f"load {outcome}"] for outcome in ("hit", "miss", "late")) > 0
    assert told["outcomes"]["save full"] > 0
    tier.check_integrity()
    tier.close()
    cases(operations)


# -- one trouble at a time ---------------------------------------------------------------------------------------------


@pytest.mark.matrix("frozen", "disk")
def test_reads_that_hang(tier, device, cases):
    """A device that hangs makes loads LATE by their deadline and writes nothing into their buffers when it is back."""
    keys = PATHS[0]
    save(tier, LAYOUT, keys, LENGTH)
    device.hang(READ)
    room = [[np.full(LENGTH, FREED, np.uint8)] for _ in keys]
    for milliseconds in (0, 1, 5, 20, 1, 0):
        begin = CLOCK.now()
        assert tier.load(LAYOUT, keys, room, begin + milliseconds / 1000) == [Outcome.LATE] * 8
    device.until_hanging()
    for (piece,) in room:
        piece[:] = 7
    device.resume()
    assert hits(load(tier, LAYOUT, keys, LENGTH)) == 8
    assert all((piece == 7).all() for (piece,) in room)
    tier.check_integrity()
    cases(6)


@pytest.mark.matrix("slow", "disk")
def test_reads_and_writes_that_take_long(tier, device, cases):
    """A slow device makes loads LATE and keeps saves waiting in the queue; what arrives in time is exact."""
    save(tier, LAYOUT, PATHS[0], LENGTH)
    device.trouble = {READ: Trouble(0.02), WRITE: Trouble(0.02), SYNC: Trouble(0.02)}
    seen = Counter()
    for turn in range(100):
        seen.update(load(tier, LAYOUT, PATHS[0], LENGTH, seconds=turn % 5 / 200))
        tier.save(LAYOUT, PATHS[1], blocks_of(LAYOUT, PATHS[1], LENGTH))
    assert set(seen) == {Outcome.HIT, Outcome.LATE}
    assert hits(load(tier, LAYOUT, PATHS[0], LENGTH)) == 8
    device.resume()
    assert tier.wait_idle(PATIENCE_SECONDS)
    tier.check_integrity()
    cases(100)


@pytest.mark.matrix("frozen", "disk")
@pytest.mark.parametrize("kind", [WRITE, SYNC])
def test_writes_that_hang(tier, device, kind, cases):
    """Saves return while the device hangs, wait up to the queue's bound, and are LATE beyond it; loads go on."""
    save(tier, LAYOUT, PATHS[0], LENGTH)
    device.hang(kind)
    jobs = [tier.save(LAYOUT, path, blocks_of(LAYOUT, path, LENGTH)) for path in PATHS[1:] for _ in range(20)]
    assert not any(job.done for job in jobs if Outcome.PENDING in job.outcomes)
    assert {outcome for job in jobs for outcome in job.outcomes} >= {Outcome.LATE}
    assert hits(load(tier, LAYOUT, PATHS[0], LENGTH)) == 8
    assert tier._queued_bytes <= MIB
    device.resume()
    assert all(job.wait(PATIENCE_SECONDS) for job in jobs)
    tier.check_integrity()
    cases(len(jobs))


@pytest.mark.matrix("frozen", "disk")
@pytest.mark.parametrize("kinds", [(READ,), (WRITE,), (SYNC,), (READ, WRITE, SYNC)], ids="-".join)
def test_closing_while_the_device_hangs(tier, device, kinds, tmp_path, cases):
    """Closing is bounded, every job is done, the folder stays locked until the device answers, and is right then."""
    durable = PATHS[0]
    save(tier, LAYOUT, durable, LENGTH)
    device.hang(*kinds)
    jobs = [tier.save(LAYOUT, path, blocks_of(LAYOUT, path, LENGTH)) for path in PATHS[1:5]]
    tier.load(LAYOUT, durable, [[np.empty(LENGTH, np.uint8)] for _ in durable], CLOCK.now())
    begin = CLOCK.now()
    tier.close()
    assert CLOCK.now() - begin < 0.2 + 2 * 0.1 + 5.0, "the bounds of the tier, and a busy machine"
    hanging_writer = tier._thread.is_alive()
    assert hanging_writer == bool({WRITE, SYNC} & set(kinds))
    if hanging_writer:
        with pytest.raises(disk.TierError, match="in use"):
            DiskTier(tmp_path / "tier", 4 * MIB)
    device.resume()
    assert all(job.wait(PATIENCE_SECONDS) for job in jobs)
    tier._thread.join(PATIENCE_SECONDS)
    for thread in tier._readers._threads:
        thread.join(PATIENCE_SECONDS)
    again = DiskTier(tmp_path / "tier", 4 * MIB)
    assert hits(load(again, LAYOUT, durable, LENGTH)) == 8
    for path, job in zip(PATHS[1:5], jobs, strict=True):
        for outcome, said in zip(load(again, LAYOUT, path, LENGTH), job.outcomes, strict=True):
            assert outcome is Outcome.HIT or said is not Outcome.HIT
    again.check_integrity()
    again.close()
    cases(1)


@pytest.mark.matrix("I/O error", "disk")
@pytest.mark.parametrize("seed", range(6))
def test_errors_at_random(tier, device, seed, cases):
    """EIO and ENOSPC at any call are outcomes: a HIT is exact, what was durable stays, and the tier gets well again."""
    device._random.seed(seed)
    save(tier, LAYOUT, PATHS[0], LENGTH)
    device.trouble = {kind: Trouble(errors=0.25, halves=0.25) for kind in (READ, WRITE, SYNC)}
    for turn in range(60):
        keys = PATHS[1 + turn % 11]
        job = save(tier, LAYOUT, keys, LENGTH)
        assert set(job.outcomes) <= {Outcome.HIT, Outcome.FAILED, Outcome.FULL, Outcome.LATE}
        outcomes = load(tier, LAYOUT, keys, LENGTH)
        # CORRUPT, as a place that fails twice while others can be read is given up
        assert set(outcomes) <= {Outcome.HIT, Outcome.MISS, Outcome.FAILED, Outcome.CORRUPT}
        if turn % 5 == 0:
            tier.remove(LAYOUT, keys[4:])
    assert device.failed > 50
    device.resume()
    assert tier.wait_idle(PATIENCE_SECONDS)
    tier.check_integrity()
    assert hits(load(tier, LAYOUT, PATHS[0], LENGTH)) == 8
    for path in PATHS:
        assert hits(save(tier, LAYOUT, path, LENGTH).outcomes) == 8
    assert all(hits(load(tier, LAYOUT, path, LENGTH)) == 8 for path in PATHS)
    cases(60)
