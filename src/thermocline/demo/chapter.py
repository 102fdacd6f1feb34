"""What a chapter hands back."""

from __future__ import annotations

from typing import Any

import msgspec


class Claim(msgspec.Struct, frozen=True):
    """A line of the last table: what playbooks say, what came out here, and the command that tests it in full."""

    claim: str
    figure: str
    command: str


class Chapter(msgspec.Struct, frozen=True):
    """The outcome of one chapter. `details` are its figures, in base units; what follows comes from the story."""

    ok: bool
    verdict: str
    claim: Claim
    details: dict[str, Any]
    name: str = ""
    title: str = ""
    seconds: float = 0.0

    @property
    def shown(self) -> bool:
        """False where what the chapter needs is not installed."""
        return bool(self.details.get("shown", True))
