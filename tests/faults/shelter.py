"""A disk tier that is damaged on purpose, and what must hold of it afterwards."""

from __future__ import annotations

import shutil

import numpy as np

from tests.conformance.faulty import where
from tests.conformance.samples import PATIENCE_SECONDS, chain, hits, layout_of, load, save
from thermocline.tiers.directory import FORMAT_FILE, LOCK_FILE, LOG_FILE
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.tier import Outcome

FRESH = layout_of("fresh", 3000)
OURS = {FORMAT_FILE, LOCK_FILE, LOG_FILE}


class Shelter:
    """A directory with a disk tier in it, and what was made durable there: layout and key to length."""

    def __init__(self, path, capacity):
        self.path = path
        self.capacity = capacity
        self.durable: dict[tuple[bytes, bytes], int] = {}
        self.places: dict[tuple[bytes, bytes], tuple[object, int]] = {}

    def open(self):
        """The tier."""
        return DiskTier(self.path, self.capacity, queue_bytes_max=self.capacity)

    def fill(self, layout, paths, length):
        """Save chains until they are durable, one log page each, and remember where they lie. The tier is closed."""
        tier = self.open()
        for keys in paths:
            assert set(save(tier, layout, keys, length).outcomes) == {Outcome.HIT}
            for key in keys:
                segment, offset, _ = where(tier, layout, key)
                self.durable[layout, key] = length
                self.places[layout, key] = (segment.name, offset)
        tier.close()

    def copy(self, path):
        """The same directory somewhere else, to be damaged."""
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.path, path)
        copied = Shelter(path, self.capacity)
        copied.durable, copied.places = dict(self.durable), dict(self.places)
        return copied

    def outcomes(self, tier):
        """Load everything that was durable, in one load per layout; a HIT with wrong bytes fails here."""
        answers = {}
        for layout, length in {(layout, length) for (layout, _), length in self.durable.items()}:
            keys = [key for other, key in self.durable if other == layout]
            answers.update(zip(((layout, key) for key in keys), load(tier, layout, keys, length), strict=True))
        return answers

    def survives(self, tier, hurt, *, outcomes=(Outcome.CORRUPT,)):
        """Exactly the blocks in `hurt` are refused, all others are exact, and the tier goes on in good order."""
        answers = self.outcomes(tier)
        lost = {name for name, outcome in answers.items() if outcome is not Outcome.HIT}
        assert lost == set(hurt), (
            f"{len(lost - set(hurt))} blocks lost that were whole, {len(set(hurt) - lost)} damaged ones taken"
        )
        assert {answers[name] for name in lost} <= set(outcomes)
        again = self.outcomes(tier)
        assert {again[name] for name in lost} <= {Outcome.MISS}, "what was refused once is not held any more"
        assert hits(again.values()) == len(answers) - len(lost)
        self.goes_on(tier)

    def goes_on(self, tier):
        """It takes new blocks and gives them back, in good order, within its quota, with no file too many."""
        keys = chain(424_242, 3)
        job = save(tier, FRESH, keys, 3000)
        assert set(job.outcomes) <= {Outcome.HIT, Outcome.FULL}
        assert load(tier, FRESH, keys, 3000) == [out if out is Outcome.HIT else Outcome.MISS for out in job.outcomes]
        tier.remove(FRESH, keys)
        assert tier.wait_idle(PATIENCE_SECONDS)
        tier.check_integrity()
        self.is_tidy(tier)

    def is_tidy(self, tier):
        """Within the quota, by its own account and by the file system's, and no file that is not ours."""
        usage = tier.usage()
        assert usage.used_bytes <= usage.capacity_bytes == self.capacity
        assert disk_bytes(self.path) <= self.capacity
        names = {file.name for file in self.path.iterdir() if file.suffix != ".segment"}
        assert names == OURS, f"left over: {names - OURS}"


def disk_bytes(path):
    """What the file system says that a folder takes."""
    return sum(file.lstat().st_blocks * 512 for file in [path, *path.rglob("*")])


def flip_all(folder, places, at, bit):
    """Flip one bit in each of many frames, in one pass over each segment; `at[i]` is the byte within frame i."""
    by_segment: dict[str, list[int]] = {}
    for (segment, offset), within in zip(places, at, strict=True):
        by_segment.setdefault(segment, []).append(offset + within)
    for segment, offsets in by_segment.items():
        file = folder / segment
        raw = np.fromfile(file, np.uint8)
        np.bitwise_xor.at(raw, np.array(offsets), np.uint8(1 << bit))
        with file.open("r+b") as out:
            out.write(raw.data)
