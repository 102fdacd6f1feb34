"""The demo: what thermocline promises, shown on this machine, in chapters of at most 20 seconds."""

from __future__ import annotations

from thermocline.demo.story import run

__all__ = ["run"]
