"""What a chapter hands back."""

from __future__ import annotations

from typing import Any

import msgspec


class Claim(msgspec.Struct, frozen=True):
    """A line of the last table: what playbooks say, what came out here, and the command that measures it in full."""

    claim: str
    figure: str
    command: str


class Chapter(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of one chapter. `details` are its figures, in base units."""

    name: str
    ok: bool
    claims: tuple[Claim, ...]
    details: dict[str, Any]
    seconds: float = 0.0
