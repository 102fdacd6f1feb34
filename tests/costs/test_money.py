"""What requests cost, how many accelerators they need."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from thermocline.costs.money import (
    Arrivals,
    Demand,
    Price,
    _late,
    bill,
    hours_per_node_month,
    wasted_share,
)
from thermocline.costs.queueing import waiting_seconds


def demand(**more):
    return Demand(prompt_tokens=1000, output_tokens=100, decode_seconds=0.5, accelerators=2, **more)


def billed(prefill, load=0.0, **more):
    return bill("some", demand(**more), np.array([prefill]), np.array([load]), 0.0)


def test_a_bill():
    """Half a second of prefill, a quarter of loading and half a second of decoding on two accelerators at $3.60."""
    found = billed(0.5, 0.25, price=Price(3.6, "given"))
    assert found.seconds == 1.25
    assert found.usd_per_thousand_requests == pytest.approx(2.5)
    assert found.usd_per_million_prompt_tokens == pytest.approx(1.5)
    assert found.usd_per_million_output_tokens == pytest.approx(10.0)
    assert found.instances is None


def test_without_a_price():
    """Where no price is known, no dollars are told; how many accelerators are needed still is."""
    found = billed(0.5, arrivals=Arrivals(4.0))
    assert found.usd_per_thousand_requests is found.usd_per_month is None
    assert found.accelerators == 2 * found.instances


@given(st.floats(0.01, 50), st.floats(0.01, 5), st.floats(0.05, 20))
def test_the_fewest_instances(rate, prefill, target):
    """As many as are told keep up within the target, one fewer does not."""
    found = billed(prefill, arrivals=Arrivals(rate), target_seconds=target)
    if found.instances is None:
        assert prefill > target * (1 - 1e-6)
        return
    assert found.utilisation < 1
    assert found.first_token_late_seconds <= target
    fewer = found.instances - 1
    busy = rate * found.seconds / fewer if fewer else 1.0
    assume(abs(busy - 1) > 1e-6)
    if busy < 1:
        assert waiting_seconds(rate, found.seconds, servers=fewer).seconds > found.waiting_seconds


@pytest.mark.parametrize("servers", [1, 4, 16])
@pytest.mark.parametrize("busy", [0.5, 0.8])
def test_the_formula_is_the_replay(servers, busy):
    """For Poisson arrivals the formula's nine in ten are those of a replay, to a tenth."""
    random = np.random.default_rng(7)
    firsts = random.lognormal(-1, 1, 100_000)
    rate = busy * servers / float(firsts.mean() + 0.5)
    at = np.cumsum(random.exponential(1 / rate, len(firsts)))
    (_, told), (_, replayed) = (_late(each, demand(), firsts, servers) for each in (Arrivals(rate), Arrivals(rate, at)))
    assert told == pytest.approx(replayed, rel=0.1)


def test_one_in_ten():
    """On an idle fleet the first token that one in ten exceeds is that of the long prompts."""
    firsts = np.array([0.1] * 85 + [2.0] * 15)
    slow = bill("some", demand(arrivals=Arrivals(1e-6)), firsts, np.zeros(100), 0.0)
    assert slow.first_token_late_seconds == pytest.approx(2.0, rel=1e-3)
    quick = bill("some", demand(arrivals=Arrivals(1e-6)), np.sort(firsts)[:90], np.zeros(90), 0.0)
    assert quick.first_token_late_seconds == pytest.approx(0.1, rel=1e-3)


def test_bursts_are_in_the_answer():
    """Requests that come ten at a time need more instances than the same ones spread out."""
    even, bursts = np.arange(1000.0), np.arange(1000.0) // 10 * 10
    firsts = np.full(1000, 0.4)

    def needed(at):
        wanted = demand(arrivals=Arrivals(1.0, at), target_seconds=0.6)
        return bill("some", wanted, firsts, np.zeros(1000), 0.0).instances

    assert needed(even) == 1
    assert needed(bursts) == 9


def test_output_is_never_cached():
    """A hit on all of the prompt saves the prefill's share of the bill, and no more."""
    without, all_hit = billed(0.5), billed(0.0)
    assert wasted_share(without, all_hit) == pytest.approx(0.5)
    assert wasted_share(without, billed(0.6)) < 0


def test_hours_of_a_node():
    """18.23 % of a node of eight is 1,065 accelerator-hours a month."""
    assert hours_per_node_month(0.223 / 1.223) == pytest.approx(1065, abs=1)
