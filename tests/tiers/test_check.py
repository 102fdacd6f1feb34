"""`check`: reads everything, changes nothing, and tells damage from what a crash leaves."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests.conformance.faulty import flip, overwrite, where
from tests.conformance.samples import LENGTH, chain, layout_of, save
from thermocline.errors import DiskFormatError, DiskInUseError, TierError
from thermocline.tiers import journal
from thermocline.tiers.check import check_path
from thermocline.tiers.directory import FORMAT_FILE, LOCK_FILE, LOG_FILE
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.tier import Outcome

MIB = 1 << 20
A, B = layout_of("a"), layout_of("b", 700_000)
KEYS = chain(1, 20)


@pytest.fixture
def saved(tmp_path):
    """A disk tier with 20 blocks of one layout and five of another, closed; and where each block lies."""
    tier = DiskTier(tmp_path / "tier", 48 * MIB)
    places = {}
    for layout, keys, length in ((A, KEYS, LENGTH), (B, KEYS[:5], 700_000)):
        assert set(save(tier, layout, keys, length).outcomes) == {Outcome.HIT}
        places |= {(layout, key): where(tier, layout, key) for key in keys}
    tier.close()
    return tmp_path / "tier", places


@pytest.fixture
def path(saved):
    """The directory."""
    return saved[0]


@pytest.fixture
def places(saved):
    """Layout and key to segment file, offset and length."""
    return saved[1]


def _contents(path):
    return {file.name: (file.stat().st_mtime_ns, file.stat().st_size) for file in path.iterdir()}


def test_clean(path):
    """A tier that was closed in order is ok, and every block is counted."""
    told = []
    found = check_path(path, progress=lambda done, of: told.append((done, of)))
    assert found.ok
    assert (found.path, found.blocks, found.bytes) == (str(path), 25, 20 * LENGTH + 5 * 700_000)
    assert (found.corrupt, found.torn_pages, found.orphans, found.unknown_pages) == (0, 0, 0, 0)
    assert found.segments == len(list(path.glob("*.segment"))) > 0
    assert told[0] == (0, 25)
    assert told[-1] == (25, 25)
    assert told == sorted(told)


def test_empty(tmp_path):
    """A tier that never held a block is ok."""
    DiskTier(tmp_path / "tier", 16 * MIB).close()
    found = check_path(tmp_path / "tier")
    assert found.ok
    assert (found.blocks, found.bytes) == (0, 0)


def test_nothing_is_written(path):
    """A check leaves every file as it was, also where it finds damage, and needs no write permission."""
    flip(path / LOG_FILE, 100)
    before = _contents(path)
    check_path(path)
    assert _contents(path) == before


@pytest.mark.parametrize("offset", [0, 40, 3000, 4095, 4096, 4096 + LENGTH - 1])
def test_a_flipped_bit(path, places, offset):
    """One flipped bit of a header page or a payload is one corrupt block."""
    segment, start, _ = places[A, KEYS[3]]
    flip(segment, start + offset, 5)
    found = check_path(path)
    assert not found.ok
    assert (found.blocks, found.corrupt, found.torn_pages) == (25, 1, 0)


def test_padding_is_not_the_block(path, places):
    """What lies behind a payload on its last page belongs to nobody, and is not checked."""
    segment, start, _ = places[A, KEYS[3]]
    flip(segment, start + 4096 + LENGTH, 5)
    assert check_path(path).ok


def test_a_block_in_the_wrong_place(path, places):
    """A whole frame of another key, or of the same key in another layout, does not verify."""
    one, two = places[A, KEYS[0]], places[A, KEYS[1]]
    frame = one[0].read_bytes()[one[1] : one[1] + 4096 * 4]
    overwrite(two[0], two[1], frame)
    assert check_path(path).corrupt == 1


def test_a_segment_is_gone(path, places):
    """The blocks of a segment that was deleted or cut are corrupt."""
    segment, start, _ = places[B, KEYS[0]]
    here = sum(place[0] == segment for place in places.values())
    with segment.open("r+b") as file:
        file.truncate(start)
    assert 0 < check_path(path).corrupt <= here
    segment.unlink()
    found = check_path(path)
    assert (found.corrupt, found.ok) == (here, False)


def test_a_torn_end_is_no_damage(path):
    """A torn page at the end of the log is what a crash leaves; before a good page it is damage, and costs blocks."""
    with (path / LOG_FILE).open("ab") as log:
        log.write(bytes(1000))
    found = check_path(path)
    assert (found.ok, found.torn_pages, found.blocks) == (True, 1, 25)
    flip(path / LOG_FILE, 200)
    found = check_path(path)
    assert (found.ok, found.torn_pages) == (False, 2)
    assert found.blocks == 5


def test_orphans(path):
    """Blocks behind one whose record is gone cannot be matched, and are counted."""
    tier = DiskTier(path, 48 * MIB)
    tier.remove(A, KEYS[10:11])
    tier.close()
    found = check_path(path)
    assert (found.ok, found.blocks, found.orphans) == (True, 24, 9)


def test_pages_of_another_release(path):
    """Pages of another version are counted and make the answer no: what they say is not known."""
    log = path / LOG_FILE
    raw = bytearray(log.read_bytes()[:4096])
    head = np.frombuffer(raw, journal._HEAD, 1)
    head["version"] = 9
    raw[:16] = journal.xxh3_128_digest(bytes(raw[16:]))
    log.write_bytes(bytes(raw))
    found = check_path(path)
    assert (found.ok, found.unknown_pages, found.torn_pages) == (False, 1, 0)


def test_in_use(path):
    """A path that a server holds is refused with a hint, and can be checked when the server is gone."""
    tier = DiskTier(path, 48 * MIB)
    with pytest.raises(DiskInUseError) as caught:
        check_path(path)
    assert caught.value.hint
    tier.close()
    assert check_path(path).ok


def test_a_server_waits_for_a_check(path):
    """While a check runs no server opens the path, and afterwards one does."""
    refused = []

    def meanwhile(done, of):
        with pytest.raises(DiskInUseError):
            DiskTier(path, 48 * MIB)
        refused.append(done)

    assert check_path(path, progress=meanwhile).ok
    assert refused
    DiskTier(path, 48 * MIB).close()


def test_a_copy_without_a_lock(path, tmp_path):
    """A copy of a directory is checked like the directory, also without its lock file, and gets none."""
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    (copy / LOCK_FILE).unlink()
    assert check_path(copy).ok
    assert not (copy / LOCK_FILE).exists()


@pytest.mark.parametrize("kind", ["absent", "empty", "foreign", "file"])
def test_none_of_ours(tmp_path, kind):
    """A path that holds no disk tier is an error with a hint, and stays as it is."""
    path = tmp_path / "path"
    if kind == "file":
        path.write_text("text")
    elif kind != "absent":
        path.mkdir()
    if kind == "foreign":
        (path / "notes.txt").write_text("text")
    with pytest.raises(TierError) as caught:
        check_path(path)
    assert caught.value.hint
    assert path.exists() == (kind != "absent")
    assert kind in {"absent", "file"} or not (path / LOCK_FILE).exists()


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"thermocline_disk":2,"segment_bytes":1048576}', '{"thermocline_disk":1,"segment_bytes":7}'],
)
def test_an_unknown_format(path, text):
    """A format file that is damaged or from another release is an error with a hint."""
    (path / FORMAT_FILE).write_text(text)
    with pytest.raises(DiskFormatError) as caught:
        check_path(path)
    assert caught.value.hint
