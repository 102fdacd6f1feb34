"""Every file call of a small life fails once, or from then on: no durable block is lost, nothing leaks, it goes on."""

from __future__ import annotations

import contextlib
import errno
import random
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.conformance.samples import PATIENCE_SECONDS, chain, layout_of, save
from tests.faults.devices import HALF, TroubledDevice
from tests.faults.shelter import Shelter
from thermocline.errors import TierError
from thermocline.tiers import disk, journal, segments
from thermocline.tiers.tier import Outcome

CAPACITY = 1 << 20
SMALL, LARGE = layout_of("a", 3000), layout_of("b", 9000)
LENGTHS = {SMALL: 3000, LARGE: 9000}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """A log that is compacted in a short life, small buffers, and a tier that soon asks for room again."""
    monkeypatch.setattr(segments, "READ_BYTES_MAX", 1 << 16)
    monkeypatch.setattr(disk, "READ_BYTES_MAX", 1 << 16)
    monkeypatch.setattr(disk, "GROW_RETRY_SECONDS", 0.01)
    monkeypatch.setattr(journal, "COMPACT_BYTES_MIN", 1 << 15)


class Life:
    """A tier from its first opening to its second closing; `durable` is what it owes its owner."""

    def __init__(self, path):
        self.shelter = Shelter(path, CAPACITY)
        self.durable = self.shelter.durable
        self.refused = 0
        self.seen = Counter()

    def __call__(self):
        for turn in range(2):
            try:
                tier = self.shelter.open()
            except TierError:
                self.refused += 1
                continue
            try:
                self._live(tier, turn)
            finally:
                tier.close()
        return self

    def _live(self, tier, turn):
        for name, outcome in self.shelter.outcomes(tier).items():
            assert outcome in {Outcome.HIT, Outcome.FAILED}, f"a durable block is lost: {outcome}"
            assert tier.holds(name[0], [name[1]])[0]
        for layout in LENGTHS:
            self._save(tier, layout, chain(1, 6))
        for round_ in range(6):
            self._save(tier, SMALL, chain((turn, round_), 3))
            self._remove(tier, SMALL, chain((turn, round_), 3)[1:])
        self._save(tier, LARGE, chain(1, 3))  # again: it is replaced
        self.shelter.outcomes(tier)
        assert tier.wait_idle(PATIENCE_SECONDS)
        tier.check_integrity()

    def _save(self, tier, layout, keys):
        job = save(tier, layout, keys, LENGTHS[layout])
        self.seen.update(job.outcomes)
        for key, outcome in zip(keys, job.outcomes, strict=True):
            assert outcome in {Outcome.HIT, Outcome.FAILED, Outcome.FULL, Outcome.LATE}
            if outcome is Outcome.HIT:
                self.durable[layout, key] = LENGTHS[layout]
            elif not tier.holds(layout, [key])[0]:  # a replacement that failed at its end took both
                self.durable.pop((layout, key), None)

    def _remove(self, tier, layout, keys):
        tier.remove(layout, keys)
        for key in keys:
            self.durable.pop((layout, key), None)


def _left(folder):
    """Threads of disk tiers, and descriptors of files in a folder: others' come and go as garbage is collected."""
    threads = sum(thread.name.startswith("disk-") for thread in threading.enumerate())
    return threads, sum(name.startswith(str(folder)) for name in map(_leads_to, Path("/proc/self/fd").iterdir()))


def _leads_to(descriptor):
    with contextlib.suppress(FileNotFoundError):  # that of this very listing
        return str(descriptor.readlink())
    return ""


def _calls(path, monkeypatch):
    with TroubledDevice().installed(monkeypatch) as device:
        life = Life(path)()
    assert set(life.seen) == {Outcome.HIT}
    return device.calls


@pytest.mark.parametrize("how", ["once", "from then on"])
@pytest.mark.parametrize(
    "error",
    [
        pytest.param(errno.EIO, id="EIO", marks=pytest.mark.matrix("I/O error", "disk")),
        pytest.param(errno.ENOSPC, id="ENOSPC", marks=pytest.mark.matrix("full", "disk")),
        pytest.param(HALF, id="half", marks=pytest.mark.matrix("I/O error", "disk")),
    ],
)
@pytest.mark.parametrize("share", [20, pytest.param(1, marks=pytest.mark.faults_long)], ids=["some", "every"])
def test_each_call_fails(tmp_path, monkeypatch, record_property, error, how, share, cases):
    """Whichever call fails, blocks that were durable are there at the next opening, exact, with nothing left over."""
    calls = _calls(tmp_path / "sound", monkeypatch)
    assert {"preadv", "pwritev", "pwrite", "write", "posix_fallocate", "fdatasync", "fsync", "rename"} <= set(calls)
    before = _left(tmp_path)
    failed = Counter()
    first = random.Random(f"{error} {how}").randrange(share)  # noqa: S311  # must replay
    for number in range(first, len(calls), share):
        path = tmp_path / f"{number}"
        with TroubledDevice().installed(monkeypatch) as device:
            device.plan = lambda at, number=number: error if at == number or (how != "once" and at > number) else 0
            life = Life(path)()
        failed[calls[number]] += bool(device.failed)
        tier = life.shelter.open()
        life.shelter.survives(tier, [])
        tier.close()
        assert _left(tmp_path) == before, "threads or files are left over"
    record_property("figures", str(dict(failed)))
    print(dict(failed))  # noqa: T201  # the long form's report
    assert failed.total() > 0
    cases(failed.total())
