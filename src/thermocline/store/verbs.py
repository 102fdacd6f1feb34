"""What an engine asks of a store, be it in its own process or a node's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import Layout
from thermocline.metrics import Metrics
from thermocline.store.plan import Plan
from thermocline.store.receipts import Loaded, Receipts
from thermocline.tiers.tier import Job, Piece, Usage


class PrefillCosts(Protocol):
    """Where an engine reports what computing takes."""

    def computes(self, model: str) -> bool:
        """Prefills that name no model are of this one from now on. True if what they take is known from before."""

    def recomputed(self, tokens: int, cached: int, seconds: float, model: str = "") -> None:
        """The engine took `seconds` to compute `tokens` behind `cached` ones."""


class StoreVerbs(Protocol):
    """`Store` and `NodeClient` have these, with the same meaning: see there. Any thread may call any verb."""

    metrics: Metrics
    receipts: Receipts

    @property
    def costs(self) -> PrefillCosts:
        """Where to report what computing takes."""

    def match(self, layouts: Sequence[Layout], keys: Sequence[BlockKey], *, prompt_tokens: int) -> Plan:
        """The plan for a prompt whose full blocks have these keys; takes a lease if it loads."""

    def load(self, plan: Plan, rank: int, into: Sequence[Sequence[Piece]]) -> Loaded:
        """Copy a plan's blocks into the caller's pieces, and verify them there."""

    def release(self, lease: int) -> None:
        """The blocks of a plan may go."""

    def unsaved(self, layout: Layout, keys: Sequence[BlockKey]) -> int:
        """How many leading blocks a save could leave out."""

    def save(
        self, layout: Layout, keys: Sequence[BlockKey], blocks: Sequence[Sequence[Piece]], *, start: int = 0
    ) -> Job:
        """Keep blocks. The bytes are copied before this returns."""

    def prefetch(self, layouts: Sequence[Layout], keys: Sequence[BlockKey], deadline: float) -> Job:
        """Have a path in memory by then."""

    def usage(self) -> dict[str, Usage]:
        """What every tier of this process holds."""

    def measure(self) -> None:
        """Bring the gauges up to date."""

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until saves are over; False if `seconds` passed first."""

    def close(self) -> None:
        """Finish, and let go."""
