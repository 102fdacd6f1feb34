"""The demo: what thermocline promises, shown on this machine, in chapters of at most 20 seconds."""

from __future__ import annotations

from pathlib import Path


def run(*, json_output: bool, engine_ready: Path | None) -> int:
    """Play all chapters; 0 if each showed what it promises. See `story.play`."""
    from thermocline.demo.story import play

    return play(json_output=json_output, engine_ready=engine_ready)
