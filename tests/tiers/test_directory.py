"""The directory of a disk tier: one process, one format, one quota, and nobody else's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conformance.samples import chain, hits, layout_of, load, save
from thermocline.errors import DiskFormatError, DiskInUseError, TierError
from thermocline.tiers.directory import FORMAT_FILE, FRESH_FORMAT_FILE, LOG_FILE
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.tier import Outcome

MIB = 1 << 20
LAYOUT = layout_of()
KEYS = chain(1, 20)

HOLD = """
import sys
from pathlib import Path
from thermocline.errors import DiskInUseError
from thermocline.tiers.disk import DiskTier
try:
    tier = DiskTier(Path(sys.argv[1]), 16 << 20)
except DiskInUseError as error:
    print("in use", error.hint, flush=True)
else:
    print("open", flush=True)
    sys.stdin.readline()
    tier.close()
"""


def _hold(path):
    """Another process that opens the path and holds it until its input ends."""
    command = [sys.executable, "-c", HOLD, str(path)]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _disk_bytes(path):
    return sum(file.lstat().st_blocks * 512 for file in [path, *path.rglob("*")])


def test_two_processes(tmp_path):
    """The second process on a path gets an error with a hint, and gets the path when the first one is gone."""
    path = tmp_path / "tier"
    with _hold(path) as first:
        assert first.stdout.readline() == "open\n"
        with _hold(path) as second:
            assert second.stdout.readline().startswith("in use stop the other server")
        with pytest.raises(DiskInUseError) as caught:
            DiskTier(path, 16 * MIB)
        assert "--disk-path" in caught.value.hint
        first.communicate("\n")
    tier = DiskTier(path, 16 * MIB)
    assert hits(save(tier, LAYOUT, KEYS).outcomes) == 20
    tier.close()


def test_a_killed_process_holds_nothing(tmp_path):
    """A lock goes with its process, however that ends."""
    path = tmp_path / "tier"
    with _hold(path) as first:
        assert first.stdout.readline() == "open\n"
        first.kill()
    DiskTier(path, 16 * MIB).close()


def test_two_tiers_in_one_process(tmp_path):
    """Within a process, too, a path is open once; a failed opening leaves no lock behind."""
    tier = DiskTier(tmp_path, 16 * MIB)
    for _ in range(3):
        with pytest.raises(DiskInUseError):
            DiskTier(tmp_path, 16 * MIB)
    tier.close()
    for _ in range(3):
        with pytest.raises(TierError, match="quota"):
            DiskTier(tmp_path, MIB)
    DiskTier(tmp_path, 16 * MIB).close()


def test_a_foreign_directory(tmp_path):
    """A directory with somebody else's files is refused with a hint that names one, and not a file is added."""
    (tmp_path / "thesis.tex").write_text("text")
    with pytest.raises(DiskFormatError, match=r"thesis\.tex") as caught:
        DiskTier(tmp_path, 16 * MIB)
    assert caught.value.hint
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_empty_directory(tmp_path):
    """An empty directory is taken, also one that a file system made its own folder in."""
    (tmp_path / "lost+found").mkdir()
    DiskTier(tmp_path, 16 * MIB).close()
    assert len([*tmp_path.iterdir()]) > 1


def test_a_crash_at_the_making(tmp_path):
    """A crash between the first files leaves a directory that the next start takes."""
    (tmp_path / FRESH_FORMAT_FILE).write_bytes(b'{"thermo')
    DiskTier(tmp_path, 16 * MIB).close()
    assert not (tmp_path / FRESH_FORMAT_FILE).exists()


@pytest.mark.parametrize("kind", ["a file", "below a file", "read-only"])
def test_a_path_that_cannot_be_used(tmp_path, kind):
    """A path that cannot be made or written is an error with a hint that names the setting."""
    (tmp_path / "file").write_text("text")
    path = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "tier", "read-only": tmp_path / "closed"}[
        kind
    ]
    if kind == "read-only":
        path.mkdir(mode=0o555)
        if os.access(path, os.W_OK):  # root may write everywhere, but not here
            path = type(path)("/proc/thermocline")
    with pytest.raises(TierError) as caught:
        DiskTier(path, 16 * MIB)
    assert "--disk-path" in caught.value.hint


@pytest.mark.parametrize("capacity", [0, 1, 4096, 100_000])
def test_a_quota_for_nothing(tmp_path, capacity):
    """A quota that could not hold anything is an error with a hint."""
    with pytest.raises(TierError, match="too small") as caught:
        DiskTier(tmp_path / "tier", capacity)
    assert "--disk-bytes" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[1]",
        '{"thermocline_disk": 2, "segment_bytes": 1048576}',
        '{"thermocline_disk": 1, "segment_bytes": 1000}',
        '{"thermocline_disk": 1, "segment_bytes": -4096}',
        '{"thermocline_disk": 1, "segment_bytes": 1099511627776}',
        '{"thermocline_disk": 1, "segment_bytes": 1048576, "more": 1}',
    ],
)
def test_an_unknown_format(tmp_path, text):
    """A format that this release does not know is refused with a hint, and everything stays as it is."""
    DiskTier(tmp_path, 16 * MIB).close()
    before = (tmp_path / FORMAT_FILE).read_text()
    (tmp_path / FORMAT_FILE).write_text(text)
    names = sorted(file.name for file in tmp_path.iterdir())
    with pytest.raises(DiskFormatError) as caught:
        DiskTier(tmp_path, 16 * MIB)
    assert caught.value.hint
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    (tmp_path / FORMAT_FILE).write_text(before)
    DiskTier(tmp_path, 16 * MIB).close()


def test_the_quota_shrinks(tmp_path):
    """A smaller quota is kept from the opening on: whole segments go, what remains is exact, and it goes on serving."""
    layout, length = layout_of("large", 300_000), 300_000
    tier = DiskTier(tmp_path, 64 * MIB)
    keys = chain(2, 150)
    for start in range(0, 150, 10):
        assert hits(save(tier, layout, keys[start : start + 10], length, before=keys[:start]).outcomes) == 10
    tier.close()
    tier = DiskTier(tmp_path, 40 * MIB)
    assert 0 < tier.usage().blocks < 150
    assert tier.usage().used_bytes <= 40 * MIB
    assert _disk_bytes(tmp_path) <= 40 * MIB
    kept = tier.usage().blocks
    assert hits(load(tier, layout, keys, length)) == kept
    tier.remove(layout, keys)
    assert hits(save(tier, layout, keys[:20], length).outcomes) == 20
    tier.check_integrity()
    tier.close()


def test_the_quota_grows_again(tmp_path):
    """What a smaller quota dropped does not come back as a ghost when the quota grows again."""
    layout, length = layout_of("large", 300_000), 300_000
    tier = DiskTier(tmp_path, 64 * MIB)
    keys = chain(2, 150)
    for start in range(0, 150, 10):
        save(tier, layout, keys[start : start + 10], length, before=keys[:start])
    tier.close()
    for capacity in (40 * MIB, 64 * MIB, 64 * MIB):
        tier = DiskTier(tmp_path, capacity)
        held = tier.holds(layout, keys)
        assert load(tier, layout, keys, length) == [Outcome.HIT if here else Outcome.MISS for here in held]
        tier.check_integrity()
        tier.close()


def test_a_quota_below_a_segment(tmp_path):
    """A quota below one segment of what is there is an error with a hint, and drops nothing."""
    tier = DiskTier(tmp_path, 64 * MIB)
    save(tier, LAYOUT, KEYS)
    tier.close()
    with pytest.raises(TierError, match="segment") as caught:
        DiskTier(tmp_path, 2 * MIB)
    assert "--disk-bytes" in caught.value.hint
    tier = DiskTier(tmp_path, 64 * MIB)
    assert hits(load(tier, LAYOUT, KEYS)) == 20
    tier.close()


def test_a_folder_only_for_its_owner(tmp_path):
    """Files are readable by their owner only: blocks say what prompts said."""
    tier = DiskTier(tmp_path / "tier", 16 * MIB)
    save(tier, LAYOUT, KEYS)
    tier.close()
    private = {
        file.name: file.stat().st_mode & 0o077 for file in (tmp_path / "tier").iterdir() if file.suffix != ".json"
    }
    assert private
    assert not any(private.values()), private


@pytest.mark.parametrize("capacity", [8 * MIB, 16 * MIB, 50 * MIB, 64 * MIB + 12_345])
def test_du_is_within_the_quota(tmp_path, capacity):
    """What the file system says a folder takes is never above the quota, whatever the quota."""
    path = tmp_path / "tier"
    tier = DiskTier(path, capacity)
    for turn in range(20):
        save(tier, LAYOUT, chain(turn, 64))
        assert _disk_bytes(path) <= capacity
        assert tier.usage().used_bytes <= capacity
    tier.close()
    assert _disk_bytes(path) <= capacity


def test_files_that_are_not_ours_stay(tmp_path):
    """Names that are almost those of segments are left alone."""
    tier = DiskTier(tmp_path, 16 * MIB)
    save(tier, LAYOUT, KEYS)
    tier.close()
    for name in ("x.segment", "1.segment", "0000001.segment", "²²²²²².segment", "000000.segment.old"):
        (tmp_path / name).write_text("text")
    tier = DiskTier(tmp_path, 16 * MIB)
    assert hits(load(tier, LAYOUT, KEYS)) == 20
    tier.close()
    assert (tmp_path / "²²²²²².segment").read_text() == "text"


def test_format_file(tmp_path):
    """The format file says the version and the size of a segment, and nothing else."""
    DiskTier(tmp_path, 64 * MIB).close()
    assert set(json.loads((tmp_path / FORMAT_FILE).read_text())) == {"thermocline_disk", "segment_bytes"}
    assert (tmp_path / LOG_FILE).exists()
