"""Admission: what is computed sooner than it would be loaded again is not worth a write. A pure function of values."""

from __future__ import annotations

from typing import NamedTuple

from thermocline.blocks.layout import Layout
from thermocline.costs.model import Costs

TRIED_ONE_IN = 64
"""Of the saves that would be refused, one in so many is taken, so that a tier that has become faster is noticed."""


class Refusal(NamedTuple):
    """Why a tier is not given a path."""

    tier: str
    load_seconds: float
    recompute_seconds: float

    @property
    def words(self) -> str:
        """Both figures, as a reason's detail has them."""
        return f"loading it would take {self.load_seconds:.4f} s, computing it {self.recompute_seconds:.4f} s"


def refusal(
    costs: Costs, layout: Layout, tier: str, blocks: int, *, refused: int = 0, gain_min: float = 1.0
) -> Refusal | None:
    """None where a path of `blocks` blocks, from its first one on, is worth saving to a tier, or may be.

    It is where loading all of it takes `gain_min` times less than computing it. A tier that was never measured, or a
    model, is given the benefit of the doubt. `refused` counts what was refused to this tier before.
    """
    if not costs.sure(tier, layout.computed_by) or refused % TRIED_ONE_IN == TRIED_ONE_IN - 1:
        return None
    loading = costs.transfer(blocks * layout.block_bytes, tier)
    computing = costs.recompute(blocks * layout.tokens_per_block, 0, layout.computed_by)
    return None if computing >= gain_min * loading else Refusal(tier, loading, computing)
