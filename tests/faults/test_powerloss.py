"""Power fails at every write and sync: 0 wrong bytes, 0 durable blocks lost, 0 leaks, the quota kept."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter, defaultdict

import pytest

from tests.conformance.faulty import flip
from tests.conformance.samples import CLOCK, PATIENCE_SECONDS, blocks_of, chain, layout_of, load
from tests.faults.powerloss import ALL, NONE, SOME, Device
from tests.faults.shelter import Shelter
from thermocline.tiers import disk, journal, segments
from thermocline.tiers.directory import LOG_FILE
from thermocline.tiers.repair import repair_path
from thermocline.tiers.tier import Outcome

KIB = 1024
CAPACITY = 1024 * KIB
LENGTHS = {layout_of("a", 3000): 3000, layout_of("b", 9000): 9000}
PATHS = [(layout, chain(seed, 6)) for seed in range(8) for layout in LENGTHS]
DURABLE, DOUBTFUL = "durable", "doubtful"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Buffers, groups and logs that suit a tier of one MiB, so that all that happens to a large one happens here."""
    monkeypatch.setattr(segments, "READ_BYTES_MAX", 64 * KIB)
    monkeypatch.setattr(disk, "READ_BYTES_MAX", 64 * KIB)
    monkeypatch.setattr(disk, "GROUP_BYTES_MAX", 48 * KIB)
    monkeypatch.setattr(journal, "COMPACT_BYTES_MIN", 64 * KIB)


class Run:
    """A seeded series of saves, removals, evictions, loads and restarts on a recorded device.

    `history[block]` says from which file call on a block is durable, and from which on nobody may rely on it.
    """

    def __init__(self, path, seed):
        self.shelter = Shelter(path, CAPACITY)
        path.mkdir()
        self.device = Device(path)
        self.history = defaultdict(list)
        self.did = Counter()
        self._rng = random.Random(seed)  # noqa: S311  # must replay
        self._pending = []

    def __call__(self, monkeypatch, operations):
        with self.device.recording(monkeypatch):
            self.tier = self.open()
            while self.did.total() < operations:
                with self.tier._lock:  # what one turn asks for is one batch of the writer, on every machine
                    for _ in range(self._rng.randint(1, 4)):
                        self._operate()
                assert self.tier.wait_idle(PATIENCE_SECONDS)
                if any(Outcome.FULL in job.outcomes for job in self._pending):
                    self._evict()
                self._pending.clear()
                if self._rng.random() < 0.03:
                    self._restart()
                self._load()
            self.tier.check_integrity()
            self.tier.close()
        return self

    def open(self):
        """The tier; its queue is short, so that it grows while it is used."""
        return disk.DiskTier(self.shelter.path, CAPACITY, queue_bytes_max=CAPACITY // 6)

    def _operate(self):
        layout, keys = self._rng.choice(PATHS)
        start = self._rng.randrange(6)
        some = keys[start : start + self._rng.randint(1, 4)]
        if self._rng.random() < 0.25:
            self._remove(layout, some)
        else:
            more = PATHS[len(self.device) % len(PATHS)]
            again = self._rng.random() < 0.3  # then the writer has a second round before it syncs
            self.save(layout, some, keys[:start], then=lambda: again and self.save(more[0], more[1][:2], []))

    def save(self, layout, keys, before, *, then=lambda: None):
        """Save; `then()` is called in the writer when it is visible and not yet durable."""
        self.did["save"] += 1
        self.did["replace"] += sum(self.tier.holds(layout, keys))
        job = self.tier.save(layout, keys, blocks_of(layout, keys, LENGTHS[layout], before=before))
        self._pending.append(job)

        def done(job):
            for key, outcome in zip(keys, job.outcomes, strict=True):
                if outcome is Outcome.HIT:
                    self.history[layout, key].append((len(self.device), DURABLE))

        job.watch(visible=lambda _job: then(), done=done)

    def _remove(self, layout, keys):
        self.did["remove"] += 1
        for key in keys:
            self.history[layout, key].append((len(self.device), DOUBTFUL))
        self.tier.remove(layout, keys)

    def _evict(self):
        """What a store does when a tier is full: some paths go."""
        self.did["evict"] += 1
        for layout, keys in self._rng.sample(PATHS, 3):
            self._remove(layout, keys)
        assert self.tier.wait_idle(PATIENCE_SECONDS)

    def _load(self):
        self.did["load"] += 1
        layout, keys = self._rng.choice(PATHS)
        assert set(load(self.tier, layout, keys, LENGTHS[layout])) <= {Outcome.HIT, Outcome.MISS}

    def _restart(self):
        self.did["restart"] += 1
        self.tier.close()
        self.tier = self.open()

    def durable(self, after):
        """The blocks that were said to be durable by then, and not given up since."""
        words = {name: [word for at, word in said if at <= after][-1:] for name, said in self.history.items()}
        return {name for name, word in words.items() if word == [DURABLE]}

    @staticmethod
    def _path_to(layout, key):
        [keys] = (keys for other, keys in PATHS if other == layout and key in keys)
        return {(layout, above) for above in keys[: keys.index(key)]}

    def survives(self, folder, after, *, repaired):
        """A folder as a power cut after that many calls left it is opened, has all it must have, and goes on."""
        shelter = Shelter(folder, CAPACITY)
        names = self.durable(after)
        if repaired:  # which drops what can never be matched
            names = {name for name in names if names >= self._path_to(*name)}
        shelter.durable = {(layout, key): LENGTHS[layout] for layout, key in names}
        tier = shelter.open()
        tier.check_integrity()
        assert set(shelter.outcomes(tier).values()) <= {Outcome.HIT}, "a durable block is lost"
        for layout, keys in PATHS:
            load(tier, layout, keys, LENGTHS[layout])  # whatever it finds: right bytes, or none
        shelter.goes_on(tier)
        for layout, keys in PATHS:
            tier.remove(layout, keys)
        assert tier._slots.used_bytes == tier._quarantined_bytes, "slots that no block is in"
        tier.close()
        return len(shelter.durable)


def _cut_everywhere(run, path, monkeypatch, *, boundaries, variants):
    """Cut the power at the boundaries; returns how many cuts, durable blocks and unsynced calls there were."""
    told = Counter()
    for after, state in enumerate(run.device.states()):
        if after not in boundaries:
            continue
        for variant in range(variants):
            keep = (NONE, ALL, SOME)[min(variant, 2)]
            rng = random.Random(f"{after} {variant}")  # noqa: S311  # must replay
            folder = path / f"{after}-{variant}"
            told["unsynced"] += state.write(folder, keep, rng)
            told["cuts"] += 1
            if variant == 3:  # and once more while the tier recovers
                folder = _cut_again(folder, monkeypatch, rng)
                told["cuts"] += 1
            elif variant == 4:
                _repair(folder)
            told["durable"] += run.survives(folder, after, repaired=variant == 4)
            shutil.rmtree(folder)
    return told


def _repair(folder):
    if (folder / disk.directory.FORMAT_FILE).exists():
        assert repair_path(folder).ok


def _cut_again(folder, monkeypatch, rng):
    device = Device(folder)
    with device.recording(monkeypatch):
        Shelter(folder, CAPACITY).open().close()
    after = rng.randint(0, len(device))
    again = folder.with_name(folder.name + "-again")
    for at, state in enumerate(device.states()):
        if at == after:
            state.write(again, SOME, rng)
    shutil.rmtree(folder)
    return again


@pytest.mark.matrix("power loss", "disk")
@pytest.mark.parametrize(
    ("seed", "boundaries", "variants"),
    [(200, 20, 5), *(pytest.param(seed, None, 12, marks=pytest.mark.faults_long) for seed in (200, 205))],
)
def test_power_cuts(tmp_path, monkeypatch, record_property, seed, boundaries, variants, cases):
    """Wherever power fails in a run of 200 operations, the next opening has every durable block and no wrong byte."""
    run = Run(tmp_path / "tier", seed)(monkeypatch, operations=200)
    assert min(run.did[kind] for kind in ("save", "remove", "evict", "load", "replace", "restart")) > 0, run.did
    kinds = Counter(event.kind for event in run.device.events)
    assert kinds["rename"] >= 3, "the log was never compacted"
    grown = [at for at, event in enumerate(run.device.events) if event.kind == "link" and "segment" in event.name]
    assert grown[-1] > 20, "the tier never grew while it was used"
    calls = range(len(run.device) + 1)
    some = calls if boundaries is None else random.Random(seed).sample(calls, boundaries)  # noqa: S311  # a seed must replay
    started = CLOCK.now()
    told = _cut_everywhere(run, tmp_path, monkeypatch, boundaries=set(some), variants=variants)
    assert told["durable"] > 10 * told["cuts"]
    figures = {**told, "calls": len(run.device), "seconds": round(CLOCK.now() - started, 1), **run.did}
    record_property("figures", str(figures))
    print(figures, dict(kinds))  # noqa: T201  # the long form's report
    cases(told["cuts"])


@pytest.mark.matrix("power loss", "disk")
def test_power_cuts_while_blocks_are_replaced(tmp_path, monkeypatch, cases):
    """A durable block that is saved again is there wherever power fails: the older frame or the newer one."""
    run = Run(tmp_path / "tier", seed=1)
    (layout, keys), (_, others), (_, more) = PATHS[0], PATHS[2], PATHS[4]
    with run.device.recording(monkeypatch):
        run.tier = run.open()
        run.save(layout, keys[:2], [])
        assert run.tier.wait_idle(PATIENCE_SECONDS)
        before = len(run.device)
        last = lambda: run.save(layout, more[:2], [])  # noqa: E731  # one line says it
        run.save(layout, keys[:2], [], then=lambda: run.save(layout, others[:2], [], then=last))
        assert run.tier.wait_idle(PATIENCE_SECONDS)
        run.tier.close()
    boundaries = range(before, len(run.device) + 1)
    told = _cut_everywhere(run, tmp_path, monkeypatch, boundaries=boundaries, variants=12)
    assert told["durable"] >= 2 * told["cuts"]
    cases(told["cuts"])


@pytest.mark.matrix("power loss", "disk")
@pytest.mark.parametrize("seeds", [4, pytest.param(100, marks=pytest.mark.faults_long)])
def test_power_cuts_in_a_repair(tmp_path, monkeypatch, seeds, cases):
    """Wherever power fails in a repair, the folder has the old log or the new one, and the next one ends the work."""
    layout, length = next(iter(LENGTHS.items()))
    shelter = Shelter(tmp_path / "tier", CAPACITY)
    shelter.fill(layout, [chain(seed, 3) for seed in range(12)], length)
    log = shelter.path / LOG_FILE
    for page in (0, 5, 6):
        flip(log, page * 4096 + 300)
    old = log.read_bytes()
    device = Device(shelter.path)
    with device.recording(monkeypatch):
        assert repair_path(shelter.path).repaired.restored == 9
    new = log.read_bytes()
    assert Counter(event.kind for event in device.events)["rename"] == 1
    for after, state in enumerate(device.states()):
        for seed, keep in enumerate([NONE, ALL, *[SOME] * seeds]):
            folder = tmp_path / f"{after}-{seed}"
            state.write(folder, keep, random.Random(seed))  # noqa: S311  # must replay
            left = (folder / LOG_FILE).read_bytes()
            assert left in {old, new}
            assert repair_path(folder).ok
            again = Shelter(folder, CAPACITY)
            again.durable = shelter.durable
            tier = again.open()
            again.survives(tier, [])
            tier.close()
            shutil.rmtree(folder)
    cases((len(device) + 1) * (seeds + 2))


def test_the_shim(tmp_path, monkeypatch):
    """The device forgets what was not synced, tears it by sectors, and keeps what was synced."""
    root = tmp_path / "root"
    root.mkdir()
    device = Device(root)
    folder = os.open(root, os.O_RDONLY)
    os.close(folder)
    with device.recording(monkeypatch):
        fd = os.open(root / "file", os.O_RDWR | os.O_CREAT)
        os.pwrite(fd, b"a" * 2048, 0)
        os.fdatasync(fd)
        folder = os.open(root, os.O_RDONLY)
        os.fsync(folder)
        os.pwritev(fd, [b"b" * 1024, b"c" * 1024], 0)
        os.ftruncate(fd, 1024)
        (root / "file").rename(root / "other")
        os.close(fd)
        os.close(folder)
    kinds = [event.kind for event in device.events]
    assert kinds == ["link", "write", "sync", "sync-names", "write", "length", "rename"]
    seen = defaultdict(set)
    for after, state in enumerate(device.states()):
        for keep, seeds in ((NONE, 1), (ALL, 1), (SOME, 60)):
            for seed in range(seeds):
                target = tmp_path / f"{after}-{keep}-{seed}"
                state.write(target, keep, random.Random(seed))  # noqa: S311  # must replay
                [*files] = target.iterdir()
                seen[after, keep].add((files[0].name, files[0].read_bytes()) if files else None)
    assert seen[3, NONE] == {None}
    assert seen[4, NONE] == seen[4, ALL] == seen[4, SOME] == {("file", b"a" * 2048)}
    assert seen[7, NONE] == {("file", b"a" * 2048)}
    assert seen[7, ALL] == {("other", b"b" * 1024)}
    assert {name for name, _ in seen[7, SOME]} == {"file", "other"}
    assert len(seen[7, SOME]) > 8
    assert {data[at : at + 512] for _, data in seen[7, SOME] for at in range(0, len(data), 512)} == {
        letter * 512 for letter in (b"a", b"b", b"c")
    }
