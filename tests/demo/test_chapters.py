from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from thermocline.clock import ManualClock, SystemClock
from thermocline.demo import advised, crash, damage, local_redis, near, sizing, story, vllm
from thermocline.demo.screen import Screen
from thermocline.errors import ModelError

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(autouse=True)
def _children_find_the_source(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SOURCE), prepend=os.pathsep)


def _screen():
    return Screen(json_output=True)


def test_damage(tmp_path, capsys):
    """Every flipped bit is refused, nothing wrong is handed out, and the screen shows the receipt that says CORRUPT."""
    told = damage.play(_screen(), tmp_path)
    assert told.ok
    assert told.details == {"flips": 200, "refused": 200, "wrong": 0, "intact_loaded": 56, "explained": True}
    assert "CORRUPT" in capsys.readouterr().err


def test_crash(tmp_path):
    """No kill in the middle of writing loses a durable block or yields a wrong one."""
    told = crash.play(_screen(), tmp_path)
    assert told.ok
    assert told.details == {"kills": crash.KILLS, "wrong": 0, "lost": 0}


def test_crash_counts_what_is_lost(tmp_path):
    """The chapter would notice: blocks called durable that are not there are counted as lost."""
    assert crash._reopened(tmp_path, 0, 5) == (0, 0, 5)


def test_sizing(tmp_path, capsys):
    """The KV of the 32B model is told in bytes beside the quoted figure, which is two and a half times too much."""
    told = sizing.play(_screen(), tmp_path)
    assert told.ok
    assert told.details["bytes_per_token"] == 262_144
    assert capsys.readouterr().err.count("2.50x") == 4


def test_advised(tmp_path, capsys):
    """A store of the advised size hits what was promised of it, within two points, and one of a quarter hits less."""
    told = advised.play(_screen(), tmp_path)
    assert told.ok
    sizes = told.details["sizes"]
    for each in sizes.values():
        assert each["hit"] == pytest.approx(each["promised"], abs=0.02)
    assert sizes["a quarter"]["hit"] < sizes["advised"]["hit"]
    assert "memory_bytes" in capsys.readouterr().err


def test_near(tmp_path, capsys):
    """A hit takes less time than a GET at every size, and every change elsewhere is seen within the stated bound."""
    if near._missing():
        pytest.skip(near._missing())
    told = near.play(_screen(), tmp_path)
    assert told.ok, told.verdict
    assert list(told.details["memory_seconds"]) == [100, 4_096, 8_000_000]
    assert told.details["changes_seen_seconds"]["most"] <= 1.0
    assert "GET from memory" in capsys.readouterr().err


def test_near_without_a_server(tmp_path, monkeypatch):
    """Where no Redis is installed, its chapter says so: neither failed nor shown."""
    monkeypatch.setattr(local_redis, "NAMES", ("no-such-server",))
    told = near.play(_screen(), tmp_path)
    assert told.ok
    assert not told.shown
    assert "not shown: " in told.claim.figure


def test_failed_installation_is_told(tmp_path):
    """Where the engine could not be installed, the demo says so and names the log."""
    ready = tmp_path / ".engine-ready"
    ready.with_name(ready.name + ".failed").write_text("engine.log\n")
    with pytest.raises(ModelError) as raised:
        story._wait_for_engine(_screen(), SystemClock(), ready)
    assert "engine.log" in raised.value.hint


def test_installed_engine_ends_the_wait(tmp_path):
    """The demo goes on as soon as the stamp is there."""
    ready = tmp_path / ".engine-ready"
    ready.touch()
    clock = ManualClock()
    story._wait_for_engine(_screen(), clock, ready)
    assert clock.now() == 0, "it waited"


def test_vllm_missing(tmp_path, capsys):
    """Where vLLM is not installed, its chapter says so and how to install it: neither failed nor shown."""
    told = vllm.play(_screen(), tmp_path, None)
    assert told.ok
    assert "make vllm" in told.verdict
    assert not told.shown
    _screen().verdict(told.verdict, ok=told.ok, shown=told.shown)
    story._end(_screen(), [told], 1.0)
    said = capsys.readouterr().err
    assert "ok    " not in said
    assert "0 of 1 chapters were shown" in said


@pytest.mark.slow
def test_whole_demo_as_json():
    """`thermocline demo --json` prints one object on stdout: all chapters, their claims, and the same answers."""
    pytest.importorskip("torch", reason="most chapters run a model, and torch is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "thermocline", "demo", "--json"], capture_output=True, text=True, check=False
    )
    told = json.loads(done.stdout)
    chapters = {chapter["name"]: chapter for chapter in told["chapters"]}
    assert list(chapters) == list(story.TITLES)
    assert done.returncode == (0 if told["ok"] else 1)
    assert all(chapter["claim"]["figure"] and chapter["verdict"] for chapter in chapters.values())
    assert chapters["conversations"]["details"]["same_answers"] == chapters["conversations"]["details"]["turns"]
    assert chapters["agent"]["details"]["same_answers"] == 3
    assert "diverged" in chapters["planted"]["details"]["reasons"]
    assert chapters["summary"]["details"]["reason"] == "diverged"
    assert chapters["summary"]["details"]["adds_up"]
    assert chapters["vllm"]["details"].get("same_answers", 5) == 5
    assert "playbook claim" in done.stderr
