"""What requests cost, how many accelerators they need, and conversions that people get wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from thermocline.costs.money import (
    Arrivals,
    Demand,
    Price,
    bill,
    hours_per_node_month,
    share_of_gain,
    token_dollars,
    wasted_share,
)
from thermocline.costs.queueing import waiting_seconds
from thermocline.errors import SettingsError


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
    found = billed(0.5, arrivals=Arrivals(4.0, 1.0, "given"))
    assert found.usd_per_thousand_requests is found.usd_per_month is None
    assert found.accelerators == 2 * found.instances


@given(st.floats(0.01, 50), st.floats(0.01, 5), st.floats(0.1, 4), st.floats(0.05, 20))
def test_the_fewest_instances(rate, prefill, cv, target):
    """As many as are told keep up within the target, one fewer does not."""
    arrivals = Arrivals(rate, cv, "given")
    found = billed(prefill, arrivals=arrivals, target_seconds=target)
    if found.instances is None:
        assert prefill > target * (1 - 1e-6)
        return
    assert found.utilisation < 1
    assert found.first_token_late_seconds <= target
    fewer = found.instances - 1
    busy = rate * found.seconds / fewer if fewer else 1.0
    assume(abs(busy - 1) > 1e-6)
    if busy < 1:
        wait = waiting_seconds(rate, found.seconds, 0.0, cv, servers=fewer)
        assert wait.seconds > found.waiting_seconds


def test_one_in_ten():
    """On an idle fleet the first token that one in ten exceeds is that of the long prompts."""
    firsts = np.array([0.1] * 85 + [2.0] * 15)
    slow = bill("some", demand(arrivals=Arrivals(1e-6, 1.0, "given")), firsts, np.zeros(100), 0.0)
    assert slow.first_token_late_seconds == pytest.approx(2.0, rel=1e-3)
    quick = bill("some", demand(arrivals=Arrivals(1e-6, 1.0, "given")), np.sort(firsts)[:90], np.zeros(90), 0.0)
    assert quick.first_token_late_seconds == pytest.approx(0.1, rel=1e-3)


def test_queues_are_in_the_answer():
    """Bursts need more instances than the same requests one after the other."""
    even = billed(0.4, arrivals=Arrivals(10, 0.1, "given"), target_seconds=0.6)
    burst = billed(0.4, arrivals=Arrivals(10, 3.0, "given"), target_seconds=0.6)
    assert even.instances < burst.instances


def test_output_is_never_cached():
    """A hit on all of the prompt saves the prefill's share of the bill, and no more."""
    without, all_hit = billed(0.5), billed(0.0)
    assert wasted_share(without, all_hit) == pytest.approx(0.5)
    assert wasted_share(without, billed(0.6)) < 0


def test_what_a_gain_in_throughput_is_worth():
    """+22.3 % throughput is 18.2 % of waste: 1,065 hours of a node and month, $4,260 at $4, not $1,200 to 1,800."""
    share = share_of_gain(0.223)
    hours = hours_per_node_month(share)
    assert share == pytest.approx(0.182, abs=5e-4)
    assert hours == pytest.approx(1065, abs=1)
    assert 4 * hours == pytest.approx(4260, abs=5)
    assert (1200 / hours, 1800 / hours) == pytest.approx((1.13, 1.69), abs=5e-3)
    with pytest.raises(SettingsError):
        share_of_gain(-1)


def test_a_share_of_a_share():
    """80 % of the time for 60 % of the requests is 48 % of waste: at most 1.9 times the throughput, not 3 times."""
    waste = 0.8 * 0.6
    assert 1 / (1 - waste) == pytest.approx(1.9, abs=0.03)
    assert share_of_gain(1 / (1 - waste) - 1) == pytest.approx(waste)


def test_bills_by_the_token():
    """$0.0003 a token is $300 a million, and $0.18 is 600 tokens; 1.1 M tokens cost $330, and $90 at 80 % hits."""
    assert token_dollars(600, 0, 300, 300, 0) == pytest.approx(0.18)
    assert token_dollars(1e6, 1e5, 300, 300, 0) == pytest.approx(330)
    assert token_dollars(1e6, 1e5, 300, 300, 0.8) == pytest.approx(90)
