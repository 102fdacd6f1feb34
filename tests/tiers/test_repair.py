"""`check --repair`: what verifies and hangs together is kept or found again, the rest is dropped, once."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from tests.conformance.faulty import flip, overwrite
from tests.conformance.samples import chain, hits, layout_of, load, save
from tests.faults.shelter import Shelter
from thermocline import cli
from thermocline.blocks.frame import frame_bytes
from thermocline.errors import DiskFormatError, DiskInUseError, TierError
from thermocline.tiers import journal, repair
from thermocline.tiers.check import Repairs, check_path
from thermocline.tiers.directory import FORMAT_FILE, FRESH_FORMAT_FILE, LOCK_FILE, LOG_FILE
from thermocline.tiers.repair import repair_path
from thermocline.tiers.tier import Outcome

MIB = 1 << 20
PAGE = 4096
LENGTH = 5000
A, B = layout_of("a", LENGTH), layout_of("b", LENGTH)
NOTHING = Repairs(corrupt=0, orphans=0, void=0, restored=0, log_pages=0, files=0)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """60 chains of three blocks, each with a log page of its own."""
    shelter = Shelter(tmp_path_factory.mktemp("small") / "tier", 4 * MIB)
    shelter.fill(A, [chain(seed, 3) for seed in range(40)], LENGTH)
    shelter.fill(B, [chain(seed, 3) for seed in range(20)], LENGTH)
    return shelter


@pytest.fixture
def shelter(small, tmp_path):
    """A copy of it."""
    return small.copy(tmp_path / "tier")


def _contents(path):
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in path.iterdir()}


def _is_right(shelter, gone=()):
    """The check says yes, a second repair writes nothing, and a tier has exactly the blocks that it should."""
    found = check_path(shelter.path)
    assert (found.ok, found.corrupt, found.orphans, found.torn_pages) == (True, 0, 0, 0)
    assert found.blocks == len(shelter.durable) - len(set(gone))
    before = _contents(shelter.path)
    again = repair_path(shelter.path)
    assert again.repaired == NOTHING
    assert (again.blocks, again.bytes, again.segments) == (found.blocks, found.bytes, found.segments)
    assert _contents(shelter.path) == before
    tier = shelter.open()
    shelter.survives(tier, gone, outcomes=[Outcome.MISS])
    tier.close()


def _behind(shelter, names):
    """These blocks and all that hang on them."""
    paths = [[(layout, key) for key in chain(seed, 3)] for layout in (A, B) for seed in range(40)]
    cuts = [min((path.index(name) for name in names if name in path), default=3) for path in paths]
    return {name for path, cut in zip(paths, cuts, strict=True) for name in path[cut:] if name in shelter.durable}


def _flip(shelter, name, within, bit=3):
    segment, offset = shelter.places[name]
    flip(shelter.path / segment, offset + within, bit)


def test_nothing_to_do(shelter):
    """A directory that is right is left as it is, to the byte."""
    before = _contents(shelter.path)
    told = []
    found = repair_path(shelter.path, progress=lambda done, of: told.append((done, of)))
    assert (found.ok, found.blocks, found.bytes) == (True, 180, 180 * LENGTH)
    assert found.repaired == NOTHING
    assert _contents(shelter.path) == before
    assert (told[0], told[-1]) == ((0, 180), (180, 180))
    _is_right(shelter)


def test_blocks_that_do_not_verify(shelter):
    """Records of damaged blocks go, and with them the blocks that can never be matched without them."""
    hurt = [(A, chain(1, 3)[0]), (A, chain(2, 3)[1]), (B, chain(3, 3)[2])]
    for name, within in zip(hurt, (0, PAGE - 1, PAGE + LENGTH - 1), strict=True):
        _flip(shelter, name, within)
    gone = _behind(shelter, hurt)
    found = repair_path(shelter.path)
    assert found.repaired == Repairs(corrupt=3, orphans=3, void=0, restored=0, log_pages=0, files=0)
    assert len(gone) == 6
    _is_right(shelter, gone)


def test_orphans(shelter):
    """Blocks behind one that was removed are dropped, and the frame of the removed one stays away."""
    tier = shelter.open()
    tier.remove(A, chain(5, 3)[:1])
    tier.close()
    assert repair_path(shelter.path).repaired.orphans == 2
    _is_right(shelter, [(A, key) for key in chain(5, 3)])


@pytest.mark.parametrize("pages", [[0], [7, 8], [59], list(range(60))])
def test_blocks_whose_log_page_is_damaged(shelter, pages):
    """Blocks that a damaged page of the log named are found again by their frames, however much of it is damaged."""
    for page in pages:
        flip(shelter.path / LOG_FILE, page * PAGE + 300, 2)
    found = repair_path(shelter.path)
    assert (found.repaired.restored, found.repaired.log_pages) == (3 * len(pages), len(pages))
    _is_right(shelter)


def test_damaged_pages_after_a_server_ran(shelter):
    """A server that met the damage first has dropped those records; their blocks are found again all the same."""
    flip(shelter.path / LOG_FILE, 9 * PAGE + 300)
    shelter.open().close()
    assert check_path(shelter.path).blocks == 177
    assert repair_path(shelter.path).repaired == Repairs(corrupt=0, orphans=0, void=0, restored=3, log_pages=0, files=0)
    _is_right(shelter)


@pytest.mark.parametrize("damage", ["gone", "empty", "zeroes", "random", "cut", "torn"])
def test_a_log_that_is_lost(shelter, damage):
    """All blocks come back from their frames when the log is gone, cut or nonsense."""
    log = shelter.path / LOG_FILE
    size = log.stat().st_size
    if damage == "gone":
        log.unlink()
    elif damage == "cut":
        os.truncate(log, 20 * PAGE)
    elif damage == "torn":
        os.truncate(log, size - 1000)
    else:
        log.write_bytes({"empty": b"", "zeroes": bytes(size), "random": random.Random(1).randbytes(size)}[damage])  # noqa: S311  # a seed must replay
    found = repair_path(shelter.path)
    assert found.repaired.restored == {"cut": 120, "torn": 3}.get(damage, 180)
    _is_right(shelter)


def test_restored_blocks_need_their_parents(shelter):
    """Of a chain that the log lost, only what stands before the first damaged frame comes back."""
    (shelter.path / LOG_FILE).unlink()
    hurt = [(A, chain(1, 3)[0]), (A, chain(2, 3)[1]), (B, chain(3, 3)[2])]
    for name in hurt:
        _flip(shelter, name, PAGE + 17)
    gone = _behind(shelter, hurt)
    assert repair_path(shelter.path).repaired.restored == 180 - len(gone) == 174
    _is_right(shelter, gone)


def test_damage_everywhere_in_a_segment(shelter):
    """A hole over many frames costs those and what hangs on them; frames behind it are found."""
    (shelter.path / LOG_FILE).unlink()
    segment, start = shelter.places[A, chain(10, 3)[0]]
    overwrite(shelter.path / segment, start + 100, np.random.default_rng(1).bytes(7 * frame_bytes(LENGTH)))
    hurt = [
        name
        for name, (where, offset) in shelter.places.items()
        if where == segment and start <= offset <= start + 7 * frame_bytes(LENGTH)
    ]
    gone = _behind(shelter, hurt)
    repair_path(shelter.path)
    _is_right(shelter, gone)


def test_a_frame_that_lies_where_no_slot_begins(shelter):
    """A whole frame that a device put where none can be is not taken in: the log would name a place beside it."""
    name = (B, chain(19, 3)[2])
    segment, offset = shelter.places[name]
    size = frame_bytes(LENGTH)
    frame = _frame(shelter, segment, offset)
    last = max(at for where, at in shelter.places.values() if where == segment)
    overwrite(shelter.path / segment, offset, bytes(len(frame)))
    overwrite(shelter.path / segment, last + size + PAGE, frame)
    assert repair_path(shelter.path).repaired == Repairs(corrupt=1, orphans=0, void=0, restored=0, log_pages=0, files=0)
    _is_right(shelter, [name])


@pytest.mark.parametrize("answer", ["EIO", "short"])
@pytest.mark.parametrize("log", ["whole", "gone"])
def test_a_sector_that_cannot_be_read(shelter, monkeypatch, answer, log):
    """A page that the device cannot read costs the block it is in, and what hangs on it, not the frames around it."""
    name = (A, chain(7, 3)[1])
    segment, offset = shelter.places[name]
    bad = offset + PAGE
    preadv = os.preadv
    number = (shelter.path / segment).stat().st_ino

    def damaged(fd, buffers, start):
        nbytes = sum(len(buffer) for buffer in buffers)
        if os.fstat(fd).st_ino != number or not start <= bad < start + nbytes:
            return preadv(fd, buffers, start)
        if answer == "EIO" or start == bad:
            raise OSError(errno.EIO, "planted")
        return preadv(fd, [memoryview(buffers[0])[: bad - start]], start)

    if log == "gone":
        (shelter.path / LOG_FILE).unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", damaged)
        found = repair_path(shelter.path)
        gone = _behind(shelter, [name])
        assert found.blocks == len(shelter.durable) - len(gone) == 178
        assert repair_path(shelter.path).repaired == NOTHING
    tier = shelter.open()
    shelter.survives(tier, gone, outcomes=[Outcome.MISS])
    tier.close()


def test_segments_that_are_cut_or_gone(shelter):
    """Blocks whose segment was cut or deleted are dropped, with what hangs on them."""
    segments = sorted({segment for segment, _ in shelter.places.values()})
    assert len(segments) >= 2
    (shelter.path / segments[0]).unlink()
    os.truncate(shelter.path / segments[1], 10 * PAGE + 5)
    hurt = [
        name
        for name, (where, offset) in shelter.places.items()
        if where == segments[0] or (where == segments[1] and offset + PAGE + LENGTH > 10 * PAGE + 5)
    ]
    found = repair_path(shelter.path)
    assert found.repaired.void > 0
    assert found.repaired.corrupt > 0
    _is_right(shelter, _behind(shelter, hurt))


def test_a_key_in_two_places(shelter):
    """Of two records of one key the later stands; where its frame is damaged, the earlier frame is found again."""
    log = shelter.path / LOG_FILE
    raw = log.read_bytes()
    twice = journal._intact(log)[0][:6].copy()
    twice["key"][3:], twice["parent"][3:], twice["depth"][3:] = (twice[name][:3] for name in ("key", "parent", "depth"))
    log.write_bytes(raw + journal.pack(twice[3:], 1))  # the places of the second chain, under the keys of the first
    found = repair_path(shelter.path)
    assert (found.repaired.void, found.repaired.corrupt, found.repaired.restored) == (3, 3, 6)
    _is_right(shelter)


def test_what_was_removed_stays_away(shelter):
    """Frames of removed blocks lie in the segments still; a repair that finds others does not bring them back."""
    removed = [(A, key) for seed in range(10, 20) for key in chain(seed, 3)]
    tier = shelter.open()
    assert tier.remove(A, [key for _, key in removed]) == 30
    tier.close()
    flip(shelter.path / LOG_FILE, 5)
    assert repair_path(shelter.path).repaired.restored == 3
    _is_right(shelter, removed)


def test_slots_that_changed_size(tmp_path):
    """Where a segment was cut into other slots, what the log lost is found among the new slots; old frames are not."""
    shelter = Shelter(tmp_path / "tier", 2 * MIB)
    shelter.fill(A, [chain(seed, 4) for seed in range(20)], LENGTH)
    tier = shelter.open()
    tier.remove(A, [key for seed in range(20) for key in chain(seed, 4)])
    tier.close()
    shelter.durable.clear()
    wide = layout_of("wide", 30_000)
    shelter.fill(wide, [chain(seed, 4) for seed in range(3)], 30_000)
    (shelter.path / LOG_FILE).unlink()
    repair_path(shelter.path)
    tier = shelter.open()
    assert all(hits(load(tier, wide, chain(seed, 4), 30_000)) == 4 for seed in range(3))
    tier.check_integrity()
    shelter.is_tidy(tier)
    tier.close()
    assert check_path(shelter.path).ok
    assert repair_path(shelter.path).repaired == NOTHING


def test_an_orphan_does_not_hide_what_lay_there_before(tmp_path):
    """A segment is cut as those blocks say that are kept; one that is given up has no say, at the first call either."""
    shelter = Shelter(tmp_path / "tier", 2 * MIB)
    wide = layout_of("wide", 30_000)
    path = chain(1, 5)
    shelter.fill(wide, [path, path[:1]], 30_000)  # the first block once more, behind the others
    (shelter.path / LOG_FILE).unlink()
    tier = shelter.open()
    save(tier, A, chain(2, 2)[1:], LENGTH, before=chain(2, 2)[:1])
    tier.close()
    repaired = repair_path(shelter.path).repaired
    assert (repaired.orphans, repaired.restored) == (1, 5)
    _is_right(shelter)


def test_files_that_a_crash_left(shelter):
    """Half-made files of a crash are removed and counted; nobody else's file is touched."""
    (shelter.path / "index.new").write_bytes(b"half")
    (shelter.path / FRESH_FORMAT_FILE).write_bytes(b"{")
    (shelter.path / "notes.txt").write_text("mine")
    assert repair_path(shelter.path).repaired.files == 2
    assert (shelter.path / "notes.txt").read_text() == "mine"
    (shelter.path / "notes.txt").unlink()
    _is_right(shelter)


def test_random_damage(small, tmp_path):
    """Whatever 300 random bits of log and segments say, a repaired directory is right, whole blocks are kept."""
    for seed in range(8):
        shelter = small.copy(tmp_path / "tier")
        rng = np.random.default_rng(seed)
        for file in [shelter.path / LOG_FILE, *sorted(shelter.path.glob("*.segment"))]:
            for at in rng.integers(0, file.stat().st_size, 75):
                flip(file, int(at), int(rng.integers(8)))
        hurt = [
            name
            for name, (segment, offset) in shelter.places.items()
            if _frame(shelter, segment, offset) != _frame(small, segment, offset)
        ]
        repair_path(shelter.path)
        _is_right(shelter, _behind(shelter, hurt))


def _frame(shelter, segment, offset):
    with (shelter.path / segment).open("rb") as file:
        return os.pread(file.fileno(), PAGE + LENGTH, offset)


def test_in_use(shelter):
    """A directory that a server holds is refused with a hint and not touched; nor can a server open one in repair."""
    flip(shelter.path / LOG_FILE, 100)
    tier = shelter.open()
    before = _contents(shelter.path)
    with pytest.raises(DiskInUseError) as caught:
        repair_path(shelter.path)
    assert caught.value.hint
    assert _contents(shelter.path) == before
    tier.close()

    def meanwhile(_done, _of):
        with pytest.raises(DiskInUseError):
            shelter.open()

    repair_path(shelter.path, progress=meanwhile)


@pytest.mark.parametrize("kind", ["absent", "empty", "foreign", "file", "format", "release"])
def test_none_of_ours(shelter, tmp_path, kind):
    """A path that holds no disk tier, or one of another format, is an error with a hint, and stays as it is."""
    path = tmp_path / "path"
    if kind == "file":
        path.write_text("text")
    elif kind in {"format", "release"}:
        shutil.copytree(shelter.path, path)
    elif kind != "absent":
        path.mkdir()
    if kind == "foreign":
        (path / "notes.txt").write_text("text")
    if kind == "format":
        (path / FORMAT_FILE).write_text('{"thermocline_disk":2,"segment_bytes":1048576}')
    if kind == "release":
        raw = bytearray((path / LOG_FILE).read_bytes())
        np.frombuffer(raw, journal._HEAD, 1)["version"][0] = 9
        raw[:16] = journal.xxh3_128_digest(bytes(raw[16:PAGE]))
        (path / LOG_FILE).write_bytes(bytes(raw))
    before = _contents(path) if path.is_dir() else None
    with pytest.raises(DiskFormatError if kind in {"format", "release"} else TierError) as caught:
        repair_path(path)
    assert caught.value.hint
    assert before == (_contents(path) if path.is_dir() else None)


def test_a_copy_without_a_lock(shelter):
    """A copy of a directory that lacks its lock file is repaired like any other."""
    (shelter.path / LOCK_FILE).unlink()
    flip(shelter.path / LOG_FILE, 100)
    assert repair_path(shelter.path).repaired.restored == 3
    _is_right(shelter)


def test_no_room_for_the_new_log(shelter, monkeypatch):
    """When the new log cannot be written, that is an error with a hint, and the old log is as it was."""
    flip(shelter.path / LOG_FILE, 100)
    before = (shelter.path / LOG_FILE).read_bytes()

    def full(_fd, _raw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(journal, "_write_all", full)
    with pytest.raises(TierError) as caught:
        repair_path(shelter.path)
    assert caught.value.hint
    assert (shelter.path / LOG_FILE).read_bytes() == before
    assert not (shelter.path / "index.new").exists()
    monkeypatch.undo()
    repair_path(shelter.path)
    _is_right(shelter)


def test_a_repaired_tier_goes_on(shelter):
    """Slots that a repair freed are used again, and blocks saved into them survive the next restart."""
    hurt = [(A, key) for seed in range(10) for key in chain(seed, 3)]
    for name in hurt:
        _flip(shelter, name, 50)
    repair_path(shelter.path)
    tier = shelter.open()
    for seed in range(10):
        assert set(save(tier, A, chain(seed, 3), LENGTH).outcomes) == {Outcome.HIT}
    tier.close()
    tier = shelter.open()
    shelter.survives(tier, [])
    tier.close()


def test_the_command(shelter, capsys):
    """`check` exits 1 on damage, `check --repair` mends it and exits 0, in words and as one JSON object."""
    flip(shelter.path / LOG_FILE, 300)
    _flip(shelter, (A, chain(7, 3)[0]), 100)

    def run(*flags):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["check", str(shelter.path), *flags])
        return stopped.value.code, capsys.readouterr().out

    assert run()[0] == 1
    copy = shelter.copy(shelter.path.with_name("copy"))
    code, out = run("--repair")
    assert code == 0
    assert "3 blocks were found again by their frames" in out
    assert out.endswith("so: every block that can be matched is right\n")
    assert "nothing had to be repaired" in run("--repair")[1]
    shelter.path = copy.path
    code, out = run("--repair", "--json")
    told = json.loads(out)
    assert (code, told["ok"], told["blocks"], told["corrupt"]) == (0, True, 177, 0)
    assert told["repaired"] == {"corrupt": 1, "orphans": 2, "void": 0, "restored": 3, "log_pages": 1, "files": 0}
    assert run()[0] == 0


REPAIR = """
import sys
from pathlib import Path
from thermocline.tiers.repair import repair_path
print("begun", flush=True)
repair_path(Path(sys.argv[1]))
"""


@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.faults_long)])
def test_killed_in_the_middle(small, tmp_path, kills):
    """A repair that is killed at any moment leaves the old log or the new one, and the next repair ends the work."""
    rng = random.Random(kills)  # noqa: S311  # when to kill
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    for _ in range(kills):
        shelter = small.copy(tmp_path / "tier")
        for page in range(0, 60, 2):
            flip(shelter.path / LOG_FILE, page * PAGE + 300)
        old = (shelter.path / LOG_FILE).read_bytes()
        command = [sys.executable, "-c", REPAIR, str(shelter.path)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            timer = threading.Timer(rng.uniform(0, 0.04), child.kill)
            timer.start()
            child.wait()
            timer.cancel()
        left = (shelter.path / LOG_FILE).read_bytes()
        assert left == old or journal.read(shelter.path / LOG_FILE).bad_pages == 0
        repair_path(shelter.path)
        _is_right(shelter)


def test_ended_at_each_step(small, tmp_path, monkeypatch):
    """A repair that ends before any of its file calls leaves the old log or the new one; a second one ends the work."""
    calls = ["write", "fdatasync", "rename", "sync_directory"]
    targets = {
        "write": (journal.os, "write"),
        "fdatasync": (journal.os, "fdatasync"),
        "rename": (journal.Path, "rename"),
        "sync_directory": (journal, "sync_directory"),
    }
    for call in calls:
        shelter = small.copy(tmp_path / "tier")
        flip(shelter.path / LOG_FILE, 300)
        with monkeypatch.context() as patch:

            def gone(*_arguments):
                raise KeyboardInterrupt

            patch.setattr(*targets[call], gone)
            with pytest.raises(KeyboardInterrupt):
                repair.repair_path(shelter.path)
        repair_path(shelter.path)
        _is_right(shelter)
