"""Receipts as lines of a file: owner-only, bounded, and never in a request's way."""

from __future__ import annotations

import os
import queue
import stat
import threading
from pathlib import Path

import msgspec
import pytest

from tests.store.making import GUARD_SECONDS
from thermocline.lens import fetch
from thermocline.metrics import Metrics
from thermocline.store import receipts_file
from thermocline.store.receipt import Missing, Reason, Receipt
from thermocline.store.receipts_file import ReceiptsFile, older

MIB = 1 << 20


def receipt(request: str, *, wall: float = 5.0) -> Receipt:
    """A receipt of 40 tokens of which 32 were loaded."""
    return Receipt(
        request=request,
        prompt_tokens=40,
        tokens_per_block=16,
        loaded_tokens=32,
        computed_tokens=8,
        by_tier={"memory": 32},
        missing=(Missing(2, 3, Reason.TAIL),),
        match_seconds=0,
        load_seconds=0,
        prefill_seconds=0,
        planned_load_seconds=0,
        planned_recompute_seconds=0,
        planned_cold_seconds=0,
        wall_seconds=wall,
    )


def names(path: Path, last: int = 1000) -> list[str]:
    """The requests that a reader finds, oldest first."""
    return [found.request for found in fetch.receipts_in(path, last).receipts]


def write(path: Path, count: int, bytes_max: int = MIB, *, start: int = 0) -> Metrics:
    """Append so many receipts and close."""
    metrics = Metrics()
    file = ReceiptsFile(path, bytes_max, metrics=metrics)
    for number in range(start, start + count):
        file.append(receipt(f"r{number}"))
    file.close()
    return metrics


def test_every_receipt_becomes_a_line(tmp_path):
    """What was appended is read again as it was, from a file that only its owner may read."""
    path = tmp_path / "receipts.jsonl"
    write(path, 3)
    write(path, 2, start=3)
    assert names(path) == ["r0", "r1", "r2", "r3", "r4"]
    assert fetch.receipts_in(path, 1).receipts == (receipt("r4"),)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert all(msgspec.json.decode(line)["wall_seconds"] == 5.0 for line in path.read_bytes().splitlines())


def test_two_generations_are_kept_and_no_more(tmp_path):
    """A full file becomes the older one; both stay within their size, and the last receipts are all there."""
    path, bytes_max = tmp_path / "receipts.jsonl", 1 << 16
    write(path, 1000, bytes_max)
    found = names(path, 10_000)
    assert found == [f"r{number}" for number in range(1000 - len(found), 1000)]
    assert path.stat().st_size <= bytes_max
    assert older(path).stat().st_size <= bytes_max
    assert sorted(name.name for name in tmp_path.iterdir()) == ["receipts.jsonl", "receipts.jsonl.1"]
    assert names(path, 7) == [f"r{number}" for number in range(993, 1000)]


@pytest.mark.parametrize("kept", [1, 20, 100])
def test_a_line_cut_by_a_crash_is_passed_over(tmp_path, kept):
    """A last line of which a crash left a part costs that line, and neither those before nor those after it."""
    path = tmp_path / "receipts.jsonl"
    write(path, 2)
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole[0] + whole[1][:kept])
    assert names(path) == ["r0"]
    assert fetch.receipts_in(path, 10).skipped == 1
    write(path, 1, start=7)
    assert names(path) == ["r0", "r7"]


def test_lines_that_are_something_else_are_passed_over(tmp_path):
    """Whatever else is in the file is counted and passed over, however long it is."""
    path = tmp_path / "receipts.jsonl"
    write(path, 2)
    whole = path.read_bytes().splitlines(keepends=True)
    long = b'{"a": "' + b"x" * (2 * MIB) + b'"}\n'
    path.write_bytes(b"\xff\x00\n{}\n[]\n" + whole[0] + long + whole[1])
    found = fetch.receipts_in(path, 10)
    assert ([kept.request for kept in found.receipts], found.skipped) == (["r0", "r1"], 4)


def broken_by_folder(path: Path) -> None:
    path.mkdir()


def broken_by_link(path: Path) -> None:
    (path.parent / "elsewhere").write_text("not ours\n")
    path.symlink_to(path.parent / "elsewhere")


def broken_by_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("breaking", [broken_by_folder, broken_by_link, broken_by_pipe])
def test_what_cannot_be_written_is_counted_and_told_once(tmp_path, caplog, breaking):
    """Where there is no file to write, receipts are dropped and counted, one warning says so, and nothing waits."""
    path = tmp_path / "receipts.jsonl"
    breaking(path)
    metrics = write(path, 20)
    assert metrics.value("receipts_dropped_total") == 20
    assert len(caplog.records) == 1
    assert "receipts are not written to" in caplog.text


def test_a_full_disk_is_counted_and_passes(tmp_path, caplog, monkeypatch):
    """While the disk is full receipts are dropped; once it has room, whole lines follow."""
    path, full = tmp_path / "receipts.jsonl", [True] * 3
    real = os.write

    def write_some(file, data):
        if full and full.pop():
            real(file, data[:10])
            raise OSError(28, "No space left on device")
        return real(file, data)

    monkeypatch.setattr(receipts_file.os, "write", write_some)
    metrics = write(path, 5)
    assert metrics.value("receipts_dropped_total") == 3
    assert names(path) == ["r3", "r4"]
    assert len(caplog.records) == 1


def test_a_device_that_hangs_holds_up_nobody(tmp_path, monkeypatch):
    """While the device hangs, receipts beyond the queue are dropped at once and counted."""
    go_on, began = threading.Event(), threading.Event()
    real = os.write

    def hang(file, data):
        began.set()
        go_on.wait(GUARD_SECONDS)
        return real(file, data)

    monkeypatch.setattr(receipts_file, "WAITING_MAX", 4)
    monkeypatch.setattr(receipts_file.os, "write", hang)
    metrics, path = Metrics(), tmp_path / "receipts.jsonl"
    file = ReceiptsFile(path, MIB, metrics=metrics)
    file.append(receipt("r0"))
    assert began.wait(GUARD_SECONDS)
    for number in range(1, 11):
        file.append(receipt(f"r{number}"))
    assert metrics.value("receipts_dropped_total") == 6
    go_on.set()
    file.close()
    assert names(path) == ["r0", "r1", "r2", "r3", "r4"]


def test_the_queue_is_bounded(tmp_path):
    """No more than a fixed number of receipts ever waits."""
    file = ReceiptsFile(tmp_path / "receipts.jsonl", MIB, metrics=Metrics())
    assert isinstance(file._waiting, queue.Queue)
    assert file._waiting.maxsize == receipts_file.WAITING_MAX
    file.close()
