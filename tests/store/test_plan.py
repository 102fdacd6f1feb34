"""The plan: a pure choice of what to load from where, with both costs."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.making import LAYOUT, TOKENS_PER_BLOCK, chain, make_layout
from thermocline.store.plan import LOAD_SECONDS_MIN, Covered, Plan, Run, make_plan
from thermocline.store.receipt import Reason

KEYS = chain("prompt", 64)


@dataclass(frozen=True)
class GivenCosts:
    """Costs of the shapes that are learned, with weights that a test chooses."""

    latency: dict[str, float] = field(default_factory=dict)
    per_byte: dict[str, float] = field(default_factory=dict)
    prefill: tuple[float, float, float] = (0.0, 1e-3, 0.0)

    def recompute(self, tokens: int, cached: int, model: str = "") -> float:
        """A plane in tokens and in their mean context."""
        a, b, c = self.prefill
        return a + b * tokens + c * tokens * (cached + tokens / 2) if tokens > 0 else 0.0

    def transfer(self, nbytes: int, tier: str) -> float:
        """A line in bytes."""
        return self.latency.get(tier, 0.0) + self.per_byte.get(tier, 0.0) * nbytes if nbytes > 0 else 0.0


def plan_for(covered: list[Covered], costs: GivenCosts, prompt_tokens: int = 64 * TOKENS_PER_BLOCK + 5) -> Plan:
    """The plan for the prompt of this file."""
    return make_plan([LAYOUT], KEYS, prompt_tokens, covered, costs)


def total_seconds(plan: Plan) -> float:
    """What the plan expects in all."""
    return plan.load_seconds + plan.recompute_seconds


def every_cut(covered: list[Covered], costs: GivenCosts, prompt_tokens: int) -> float:
    """The least total over every number of leading blocks, each from the fastest tier that holds it."""
    totals = []
    for cut in range(max((tier.blocks for tier in covered), default=0) + 1):
        start, loading = 0, 0.0
        for tier in covered:
            stop = min(cut, tier.blocks)
            if stop > start:
                loading += costs.transfer((stop - start) * LAYOUT.block_bytes, tier.tier)
                start = stop
        cached = cut * TOKENS_PER_BLOCK
        totals.append(loading + costs.recompute(prompt_tokens - cached, cached))
    return min(totals)


seconds = st.floats(0, 1, allow_subnormal=False)


@given(
    held=st.lists(st.integers(0, 64), min_size=1, max_size=4),
    latency=st.lists(seconds, min_size=4, max_size=4),
    per_block=st.lists(st.floats(0, 0.1), min_size=4, max_size=4),
    prefill=st.tuples(seconds, st.floats(0, 0.01), st.floats(0, 1e-5)),
    tail=st.integers(1, 40),
)
def test_no_cut_is_better_than_the_plan(held, latency, per_block, prefill, tail):
    """Cutting only at the ends of runs is optimal: no other number of blocks has a smaller predicted total."""
    names = [f"tier {number}" for number in range(len(held))]
    covered = [Covered(name, blocks) for name, blocks in zip(names, held, strict=True)]
    per_byte = {f"tier {number}": cost / LAYOUT.block_bytes for number, cost in enumerate(per_block)}
    costs = GivenCosts({f"tier {number}": cost for number, cost in enumerate(latency)}, per_byte, prefill)
    prompt_tokens = 64 * TOKENS_PER_BLOCK + tail
    plan = plan_for(covered, costs, prompt_tokens)
    assert total_seconds(plan) == pytest.approx(every_cut(covered, costs, prompt_tokens), rel=1e-9, abs=1e-12)
    assert total_seconds(plan) <= plan.cold_seconds


@given(held=st.lists(st.integers(0, 64), min_size=1, max_size=3))
def test_a_plan_is_pure(held):
    """The same question has the same plan, and its inputs stay as they are."""
    covered = [Covered(f"tier {number}", blocks) for number, blocks in enumerate(held)]
    before = list(covered)
    assert plan_for(covered, GivenCosts()) == plan_for(covered, GivenCosts())
    assert covered == before


def test_each_tier_serves_what_faster_ones_do_not_hold():
    """The runs of a plan follow each other without gap or overlap, one per tier that adds something."""
    covered = [Covered("memory", 10), Covered("disk", 6), Covered("remote", 30)]
    plan = plan_for(covered, GivenCosts(per_byte={"memory": 1e-9, "remote": 1e-8}))
    assert [run[:3] if isinstance(run, tuple) else (run.start, run.stop, run.tier) for run in plan.runs] == [
        (0, 10, "memory"),
        (10, 30, "remote"),
    ]
    assert (plan.blocks, plan.tokens) == (30, 30 * TOKENS_PER_BLOCK)
    assert plan.load_seconds == sum(run.seconds for run in plan.runs)


def test_what_does_not_pay_is_declined_with_both_figures():
    """A tier that is slower than computing is not planned for, and the reason states both costs."""
    covered = [Covered("memory", 10), Covered("remote", 30)]
    plan = plan_for(covered, GivenCosts(latency={"remote": 9.25}, prefill=(0.0, 1e-3, 0.0)))
    assert plan.blocks == 10
    (missing,) = plan.missing
    assert (missing.start, missing.stop, missing.reason) == (10, 30, Reason.DECLINED)
    assert "remote would take 9.2500 s" in missing.detail
    assert f"computing what is left {plan.recompute_seconds:.4f} s" in missing.detail


def test_a_slow_tier_in_the_middle_may_pay_with_what_follows():
    """A run that does not pay alone is loaded where a cheap one behind it makes up for it."""
    covered = [Covered("slow", 10), Covered("fast", 60)]
    costs = GivenCosts(latency={"slow": 0.2}, prefill=(0.0, 1e-3, 0.0))
    assert plan_for(covered[:1], costs).blocks == 0
    assert plan_for(covered, costs).blocks == 60


def test_nothing_held_is_a_plan_to_compute():
    """Without any block the plan computes all of the prompt."""
    plan = plan_for([Covered("memory", 0)], GivenCosts())
    assert (plan.blocks, plan.runs, plan.missing, plan.load_seconds) == (0, (), (), 0.0)
    assert plan.recompute_seconds == plan.cold_seconds > 0


def test_a_load_gets_as_much_time_as_it_saves():
    """A load may take as long as computing its blocks would, and never less than timers can tell."""
    costs = GivenCosts(prefill=(0.0, 1e-2, 0.0))
    assert plan_for([Covered("memory", 60)], costs).load_seconds_max == pytest.approx(60 * TOKENS_PER_BLOCK * 1e-2)
    assert plan_for([Covered("memory", 60)], GivenCosts(prefill=(0.0, 1e-9, 0.0))).load_seconds_max == LOAD_SECONDS_MIN


def test_all_ranks_are_paid_for():
    """The cost of a plan over several layouts counts the bytes of all of them."""
    ranks = [make_layout(rank=rank) for rank in range(4)]
    costs = GivenCosts(per_byte={"memory": 1e-9})
    plan = make_plan(ranks, KEYS, 64 * TOKENS_PER_BLOCK + 1, [Covered("memory", 10)], costs)
    assert plan.runs == (Run(0, 10, "memory", pytest.approx(10 * 4 * LAYOUT.block_bytes * 1e-9)),)
