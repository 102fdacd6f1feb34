"""The order of the chapters, the wait for the engine between them, and the table at the end."""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec

from thermocline.clock import Clock, SystemClock
from thermocline.demo import advised, crash, damage, doctor, fleet, locality, near, sizing, vllm, vllm_running
from thermocline.demo.chapter import Chapter
from thermocline.demo.machine import machine
from thermocline.demo.screen import Screen
from thermocline.errors import ModelError

POLL_SECONDS = 0.25
Chapters = Mapping[str, Callable[[Screen, Path], Chapter]]
TITLES = {
    "damage": ("A flipped bit on disk is refused", "A hit is exact, or it is a miss with a reason."),
    "crash": ("A kill in the middle of writing is recovered", "What was durable is there, and nothing is wrong."),
    "sizing": ("The KV of a 32B model, in bytes", "Every figure has its formula, with the numbers filled in."),
    "advised": ("Memory sized by what came", "What is promised of a size is what a store of that size hits."),
    "locality": ("The same prefixes, sent where they are", "Round robin finds one in eight; we find nearly all."),
    "fleet": ("Two instances, and one is killed", "No request is lost, and conversations find their context again."),
    "doctor": ("The doctor names a planted fault", "Evidence, one action, and nothing found after it."),
    "near": ("State read in nanoseconds", "From memory, beside a GET from Redis; changes elsewhere are seen."),
    "conversations": ("Conversations answer sooner, and the same", "One answer: no cache, memory, new process."),
    "agent": ("An agent takes 100 steps on one context", "Each step sends all of it; only what is new is computed."),
    "frozen": ("A frozen Redis that nobody notices", "A cache failure is never a request failure, nor a slow one."),
    "planted": ("A timestamp at the top costs everything", "Every request has a receipt, and the receipt says why."),
    "summary": ("Why is my hit rate 30 %?", "Receipts add up: each token was loaded, or has one reason."),
    "vllm": ("vLLM, and a node that dies under it", "One flag: what vLLM computed outlives its cache, and the node."),
}


def play(*, json_output: bool, engine_ready: Path | None) -> int:
    """Play every chapter; chapters with a model once `engine_ready` exists (None: at once). 0 if all went as promised.

    Raises ModelError where the engine was not, or could not be, installed; what was shown until then stays shown.
    """
    logging.getLogger("thermocline").addHandler(logging.NullHandler())  # damage is planted here: the screen tells of it
    clock = SystemClock()
    screen = Screen(json_output=json_output)
    started = clock.now()
    with vllm_running.started() as vllm_up:
        chapters: Chapters = {
            "damage": damage.play,
            "crash": crash.play,
            "sizing": sizing.play,
            "advised": advised.play,
            "locality": locality.play,
            "fleet": fleet.play,
            "doctor": doctor.play,
        }
        told = list(_played(screen, clock, chapters))
        _wait_for_engine(screen, clock, engine_ready)
        told += _played(screen, clock, {"near": near.play})  # redis-py comes with the engine
        told += _with_model(screen, clock)
        told += _played(screen, clock, {"vllm": partial(vllm.play, vllm=vllm_up)})
    seconds = clock.now() - started
    _end(screen, told, seconds)
    ok = all(chapter.ok for chapter in told)
    if json_output:
        today = datetime.now(UTC).date().isoformat()
        found = {"demo": "thermocline", "machine": machine(), "date": today, "ok": ok, "seconds": round(seconds, 1)}
        print(msgspec.json.encode(found | {"chapters": told}).decode())
    return 0 if ok else 1


def _with_model(screen: Screen, clock: Clock) -> list[Chapter]:
    from thermocline.demo import agent, conversations, frozen, planted, stage, summary

    with stage.opened(screen) as opened:
        chapters: Chapters = {
            "conversations": partial(conversations.play, stage=opened),
            "agent": partial(agent.play, stage=opened),
            "frozen": partial(frozen.play, stage=opened),
            "planted": partial(planted.play, stage=opened),
            "summary": partial(summary.play, stage=opened),
        }
        return list(_played(screen, clock, chapters))


def _played(screen: Screen, clock: Clock, chapters: Chapters) -> Iterator[Chapter]:
    """Play these chapters, each in a folder of its own, which is gone afterwards."""
    for name, chapter in chapters.items():
        title, promise = TITLES[name]
        screen.chapter(list(TITLES).index(name) + 1, title, promise)
        started = clock.now()
        with tempfile.TemporaryDirectory(prefix="thermocline-demo-", ignore_cleanup_errors=True) as folder:
            told = chapter(screen, Path(folder))
        screen.verdict(told.verdict, ok=told.ok, shown=told.shown)
        yield msgspec.structs.replace(told, name=name, title=title, seconds=round(clock.now() - started, 1))


def _wait_for_engine(screen: Screen, clock: Clock, ready: Path | None) -> None:
    """Wait for the file that says torch is installed. Raises ModelError where installing failed, or nobody installs."""
    if ready is None:
        if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
            raise ModelError("the other chapters run a model, and torch is not installed", hint="run `make demo`")
        return
    failed = ready.with_name(ready.name + ".failed")
    started = clock.now()
    while not ready.exists():
        if failed.exists():
            log = failed.read_text().strip()
            raise ModelError("installing the engine failed", hint=f"see {log}, then run `make demo` again")
        screen.waiting("installing CPU torch and transformers for the other chapters", clock.now() - started)
        clock.sleep(POLL_SECONDS)
    screen.worked()
    importlib.invalidate_caches()


def _end(screen: Screen, told: list[Chapter], seconds: float) -> None:
    screen.say("")
    rows = [[chapter.claim.claim, chapter.claim.figure, chapter.claim.command] for chapter in told]
    screen.table(["playbook claim", "our figure", "command"], rows)
    failed = [chapter.title for chapter in told if not chapter.ok]
    count = sum(chapter.shown for chapter in told)
    all_good = f"{count} of {len(told)} chapters were shown, and kept what they promise"
    told_of = f"not as promised: {'; '.join(failed)}" if failed else all_good
    screen.say(f"{told_of}, in {seconds:.0f} s. `thermocline bench list` measures each figure with limit and interval.")
