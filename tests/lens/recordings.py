"""Reads what `record.py` recorded of real vLLMs."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from thermocline.clock import ManualClock
from thermocline.lens.observe import Ear, Kind, Watched, parse

FOLDER = Path(__file__).with_name("recorded")


@functools.cache
def recorded(name: str, *, at: str = "vllm", late_seconds: float = 0.0) -> tuple[Watched, ...]:
    """A server, and its events where they were heard: so many seconds later than they were."""
    texts = [path.read_text() for path in sorted((FOLDER / name).glob("*.txt"), key=lambda path: int(path.stem))]
    scrapes = tuple(parse(text, float(text.split()[2])) for text in texts)
    server = Watched(kind=Kind.SERVER, name=at, scrapes=scrapes)
    events = FOLDER / name / "events.jsonl"
    if not events.exists():
        return (server,)
    clock = ManualClock(scrapes[0].at_seconds)
    ear = Ear(clock)
    for line in events.read_text().splitlines():
        heard = json.loads(line)
        ear.hear(heard["source"], heard["sequence"], bytes.fromhex(heard["batch"]), heard["heard"] + late_seconds)
    clock.sleep(scrapes[-1].at_seconds - scrapes[0].at_seconds)
    return server, ear.watched(f"events of {at}")
