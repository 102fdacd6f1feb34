"""The plan: which runs of blocks to load from which tier, and where computing starts. A pure function of values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import Layout
from thermocline.costs.model import Costs
from thermocline.store.receipt import Missing, Reason

LOAD_SECONDS_MIN = 0.05
"""No load is given less time than this, however little it saves: timers and threads are not finer."""


@dataclass(frozen=True, slots=True)
class Covered:
    """A tier holds the first `blocks` blocks."""

    tier: str
    blocks: int


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks [start, stop) come from `tier` and should take `seconds`."""

    start: int
    stop: int
    tier: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What to load and what it should cost. A plain value: any thread or process may carry it out.

    The first `blocks` blocks are loaded, in `runs`; `recompute_seconds` is for the tokens behind them, `cold_seconds`
    for the whole prompt. Loading takes at most `load_seconds_max`, counted from its start. `lease` keeps the blocks in
    their tiers until it is released or runs out; 0 means that there is nothing to keep.
    """

    layouts: tuple[Layout, ...]
    keys: Sequence[BlockKey]
    prompt_tokens: int
    runs: tuple[Run, ...]
    load_seconds: float
    recompute_seconds: float
    cold_seconds: float
    load_seconds_max: float
    missing: tuple[Missing, ...] = ()
    lease: int = 0
    match_seconds: float = 0.0

    @property
    def blocks(self) -> int:
        """How many leading blocks are loaded."""
        return self.runs[-1].stop if self.runs else 0

    @property
    def tokens(self) -> int:
        """How many leading tokens are loaded."""
        return self.blocks * self.layouts[0].tokens_per_block


def make_plan(
    layouts: Sequence[Layout], keys: Sequence[BlockKey], prompt_tokens: int, covered: Sequence[Covered], costs: Costs
) -> Plan:
    """Choose the number of leading blocks whose load and remaining computation take least.

    `covered` names the tiers from fastest to slowest; each serves what the faster ones do not hold. Only the ends of
    runs can be best: within a run the cost of loading is linear in the cut and that of computing the rest is concave
    (attention over a longer prefix), so their sum has its minimum at an end.
    """
    tokens_per_block = layouts[0].tokens_per_block
    block_bytes = sum(layout.block_bytes for layout in layouts)
    runs = _runs(covered, block_bytes, costs)
    model = layouts[0].computed_by
    cold = costs.recompute(prompt_tokens, 0, model)
    best, best_total, loading = 0, cold, 0.0
    rest, load_seconds = cold, 0.0
    for count, run in enumerate(runs, 1):
        loading += run.seconds
        cached = run.stop * tokens_per_block
        remaining = costs.recompute(prompt_tokens - cached, cached, model)
        if loading + remaining < best_total:
            best, best_total, rest, load_seconds = count, loading + remaining, remaining, loading
    return Plan(
        tuple(layouts),
        keys,
        prompt_tokens,
        tuple(runs[:best]),
        load_seconds,
        rest,
        cold,
        max(LOAD_SECONDS_MIN, cold - rest),
        _declined(runs[best:], rest),
    )


def _runs(covered: Sequence[Covered], block_bytes: int, costs: Costs) -> list[Run]:
    runs: list[Run] = []
    start = 0
    for tier in covered:
        if tier.blocks > start:
            seconds = costs.transfer((tier.blocks - start) * block_bytes, tier.tier)
            runs.append(Run(start, tier.blocks, tier.tier, seconds))
            start = tier.blocks
    return runs


def _declined(runs: Sequence[Run], recompute_seconds: float) -> tuple[Missing, ...]:
    return tuple(
        Missing(
            run.start,
            run.stop,
            Reason.DECLINED,
            f"loading from {run.tier} would take {run.seconds:.4f} s, computing what is left {recompute_seconds:.4f} s",
        )
        for run in runs
    )
