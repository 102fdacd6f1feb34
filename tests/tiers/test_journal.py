"""The index log: what was appended is read again, whatever happens to the pages around it."""

from __future__ import annotations

import os

import numpy as np
import pytest

from thermocline.tiers import journal
from thermocline.tiers.journal import ADD, PAGE_BYTES, RECORDS_PER_PAGE, REMOVE, Journal, Row, make, read

KIB = 1024
LAYOUT = b"l" * 32


def _row(number, *, kind=ADD, slot=None):
    key = number.to_bytes(32, "little")
    return Row(key, b"p" * 32, LAYOUT, kind, number + 1, 3, number if slot is None else slot, 2, 4000, 1.5 + number)


def _rows(*numbers, **how):
    return make([_row(number, **how) for number in numbers])


def _numbers(records):
    return [int.from_bytes(key, "little") for key in journal.split(records["key"])]


@pytest.fixture
def path(tmp_path):
    """Where the log lies."""
    return tmp_path / "index.log"


@pytest.fixture
def log(path):
    """An open log of at most 256 KiB."""
    log = Journal(path, bytes_max=256 * KIB, epoch=1)
    yield log
    log.close()


def test_golden_page():
    """A page of the log is these very bytes: later releases read them."""
    raw = journal.pack(_rows(7), 5)
    assert len(raw) == PAGE_BYTES
    assert raw[:16].hex() == "3625d18c6fceab088280d0d2f9655162"
    assert raw[16:24] == b"THRMLOG1"
    assert raw[24:40].hex() == "01000000" + "01000000" + "0500000000000000"
    assert raw[40:128] == bytes(88)
    assert raw[128:256] == (
        (7).to_bytes(32, "little")
        + b"p" * 32
        + LAYOUT
        + b"".join(value.to_bytes(4, "little") for value in (ADD, 8, 3, 7, 2, 4000))
        + np.float64(8.5).tobytes()
    )
    assert raw[256:] == bytes(PAGE_BYTES - 256)


@pytest.mark.parametrize("count", [0, 1, 30, 31, 32, 62, 1000])
def test_round_trip(log, path, count):
    """Records come back in order, field by field, whatever their number."""
    log.append(_rows(*range(count)), 0)
    found = read(path)
    assert found.live.tobytes() == _rows(*range(count)).tobytes()
    assert (found.bad_pages, found.unknown_version) == (0, 0)
    assert found.pages == -(-count // RECORDS_PER_PAGE)
    assert log.size_bytes == path.stat().st_size == found.pages * PAGE_BYTES


def test_zeroes_behind_the_log_are_no_pages(log, path):
    """What was written ahead is neither damage nor a record, is used up by appends, and stays within the bound."""
    for turn in range(30):
        log.write_ahead()
        assert path.stat().st_size == log.size_bytes <= 256 * KIB
        assert log.size_bytes > (turn + 1) * PAGE_BYTES
        log.append(_rows(turn), turn)
        found = read(path)
        assert _numbers(found.live) == list(range(turn + 1))
        assert (found.pages, found.bad_pages, found.bad_inside) == (turn + 1, 0, 0)
    again = Journal(path, bytes_max=256 * KIB, epoch=2)  # as after a crash, with zeroes at the end
    again.append(_rows(500), 31)
    again.close()
    assert path.stat().st_size == 31 * PAGE_BYTES, "zeroes go when the log is closed"
    assert _numbers(read(path).live) == [*range(30), 500]


def test_a_hole_in_the_log_is_damage(log, path):
    """Pages of zeroes with records behind them are lost pages, and are counted."""
    for start in (0, 31, 62):
        log.append(_rows(*range(start, start + 31)), 0)
    with path.open("r+b") as file:
        file.write(bytes(2 * PAGE_BYTES))
    found = read(path)
    assert _numbers(found.live) == list(range(62, 93))
    assert (found.pages, found.bad_pages, found.bad_inside) == (3, 2, 2)


def test_an_absent_log_is_empty(path):
    """Without a file there is nothing, and that is no damage."""
    found = read(path)
    assert len(found.live) == found.pages == found.bad_pages == found.epoch == 0


def test_the_last_word_about_a_slot(log, path):
    """A slot holds what was added last, and nothing once that was removed; other slots are not concerned."""
    log.append(_rows(1, slot=5), 1)
    log.append(_rows(2, 3), 3)
    log.append(_rows(1, slot=5, kind=REMOVE), 2)
    log.append(_rows(4, slot=5), 3)
    log.append(_rows(3, kind=REMOVE), 2)
    assert _numbers(read(path).live) == [2, 4]


def test_the_epoch_grows(path):
    """The epoch in the log is that of the last opening that wrote."""
    for epoch in (1, 2, 7):
        log = Journal(path, bytes_max=256 * KIB, epoch=epoch)
        log.append(_rows(epoch), epoch)
        log.close()
        assert read(path).epoch == epoch


def test_every_page_can_be_lost(log, path):
    """A damaged page, wherever it is, costs its own records, is counted once, and every other record is there."""
    for start in range(0, 310, 31):
        log.append(_rows(*range(start, start + 31)), 0)
    whole = path.read_bytes()
    for page in range(10):
        for at in (0, 20, 24, 100, 2000, 4095):
            raw = bytearray(whole)
            raw[page * PAGE_BYTES + at] ^= 4
            path.write_bytes(raw)
            found = read(path)
            assert _numbers(found.live) == [number for number in range(310) if number // 31 != page]
            assert (found.pages, found.bad_pages, found.bad_inside) == (10, 1, int(page < 9))


@pytest.mark.parametrize("length", [0, 1, 16, 127, 128, 4095, 4096, 4097, 8191, 8192, 12000])
def test_a_cut_log(log, path, length):
    """A log that was cut anywhere holds the records of its whole pages; the next record goes behind the torn page."""
    for start in (0, 31, 62):
        log.append(_rows(*range(start, start + 31)), 0)
    log.close()
    os.truncate(path, length)
    kept = list(range(length // PAGE_BYTES * 31))
    assert _numbers(read(path).live) == kept
    again = Journal(path, bytes_max=256 * KIB, epoch=2)
    again.append(_rows(500), 1)
    again.close()
    found = read(path)
    assert _numbers(found.live) == [*kept, 500]
    assert found.bad_pages == int(length % PAGE_BYTES > 0)


@pytest.mark.parametrize("live", [0, 1, 100, 1488])
def test_the_bound_holds(log, path, live):
    """However much history is written, log and successor stay within their bounds, and no live record is lost."""
    assert live <= log.records_max
    log.append(_rows(*range(live)), live)
    for turn in range(200):
        number = 2000 + turn
        log.append(_rows(number, slot=9000), live + 1)
        log.append(_rows(number, slot=9000, kind=REMOVE), live)
        assert log.size_bytes <= 256 * KIB
        assert path.stat().st_size == log.size_bytes
    assert _numbers(read(path).live) == list(range(live))


def test_many_records_at_once(log, path):
    """More records than are left in the log go in with compactions between them."""
    for _ in range(4):
        log.append(_rows(*range(1400)), 1400)
        assert log.size_bytes <= 256 * KIB
        log.append(_rows(*range(1400), kind=REMOVE), 0)
        assert log.size_bytes <= 256 * KIB
    log.append(_rows(1, 2, 3), 3)
    assert _numbers(read(path).live) == [1, 2, 3]


def test_a_log_that_is_really_full(log, path):
    """Live records beyond the bound are refused with an error, and what is in the log stays."""
    with pytest.raises(OSError, match="full"):
        log.append(_rows(*range(3000)), 3000)
    found = read(path)
    assert found.bad_pages == 0
    assert _numbers(found.live) == list(range(len(found.live)))


def test_a_large_log_of_history_is_compacted(path, monkeypatch):
    """Long before its bound, a log that is mostly history is written anew, so that opening stays quick."""
    monkeypatch.setattr(journal, "COMPACT_BYTES_MIN", 64 * KIB)
    log = Journal(path, bytes_max=1 << 40, epoch=1)
    for turn in range(400):
        log.append(_rows(turn, slot=1), 1)
        assert log.size_bytes <= 64 * KIB + 2 * PAGE_BYTES
    assert _numbers(read(path).live) == [399]
    log.close()


def test_a_compaction_that_fails(log, path, monkeypatch):
    """When the successor cannot be written the old log goes on, no file is left over, and the next attempt works."""
    log.append(_rows(*range(10)), 10)
    before = path.read_bytes()
    real = os.fdatasync

    def fails(fd):
        raise OSError(5, "the device is gone")

    monkeypatch.setattr(journal.os, "fdatasync", fails)
    with pytest.raises(OSError, match="gone"):
        log.compact()
    monkeypatch.setattr(journal.os, "fdatasync", real)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["index.log"]
    log.append(_rows(10), 11)
    log.compact()
    assert _numbers(read(path).live) == list(range(11))
    assert log.size_bytes == PAGE_BYTES


def test_the_rename_is_not_durable(log, path, monkeypatch):
    """If the directory cannot be synced after the rename, the new log is used, and a later sync mends the name."""
    log.append(_rows(*range(10)), 10)
    real, synced = journal.sync_directory, []

    def fails(directory):
        synced.append(directory)
        raise OSError(5, "the directory cannot be synced")

    monkeypatch.setattr(journal, "sync_directory", fails)
    with pytest.raises(OSError, match="directory"):
        log.compact()
    log.append(_rows(10), 11)
    assert _numbers(read(path).live) == list(range(11)), "the record is in the file that has the name"
    with pytest.raises(OSError, match="directory"):
        log.sync()
    monkeypatch.setattr(journal, "sync_directory", lambda directory: (synced.append(directory), real(directory)))
    log.sync()
    log.sync()
    assert len(synced) == 3


def test_a_crash_in_a_compaction(log, path):
    """A successor that a crash left behind is removed at opening, and the log is the old one."""
    log.append(_rows(1, 2), 2)
    log.close()
    path.with_suffix(".new").write_bytes(b"half of it")
    again = Journal(path, bytes_max=256 * KIB, epoch=2)
    assert not path.with_suffix(".new").exists()
    assert _numbers(read(path).live) == [1, 2]
    again.close()


def test_a_short_write(log, path, monkeypatch):
    """A record of which the device takes only a part is an error; the next one takes its place."""
    log.append(_rows(1), 1)
    real = os.pwrite
    monkeypatch.setattr(journal.os, "pwrite", lambda fd, raw, at: real(fd, raw[:1000], at))
    with pytest.raises(OSError, match="1000 of 4096"):
        log.append(_rows(2), 2)
    monkeypatch.setattr(journal.os, "pwrite", real)
    assert read(path).bad_pages == 0, "what a failed write left is cut off"
    log.append(_rows(3), 2)
    found = read(path)
    assert _numbers(found.live) == [1, 3]
    assert found.bad_pages == 0


def test_words_of_a_failed_append_are_never_heard(log, path, monkeypatch):
    """Whole pages that a cut append left behind the end do not outlive a shorter append that uses the slots again."""
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, raw, at: whole(fd, raw[: 2 * PAGE_BYTES], at))
    with pytest.raises(OSError, match="8192 of"):
        log.append(_rows(*range(71)), 0)
    monkeypatch.setattr(os, "pwrite", whole)
    log.append(make([_row(1000 + slot, slot=slot) for slot in range(40, 62)]), 0)
    log.sync()
    assert _numbers(read(path).live) == [1000 + slot for slot in range(40, 62)]
