"""Waiting: exact where theory is exact, near a simulated queue elsewhere, refused where there is no answer."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.costs.queueing import waiting_seconds


def simulated(rate, service, cv, customers=60_000, seed=7):
    """Mean wait of one server, by Lindley's recursion. Times between arrivals are gamma, service is constant."""
    chance, wait, total = random.Random(seed), 0.0, 0.0  # noqa: S311  # a simulation, no secret
    shape = 1 / cv**2
    for _ in range(customers):
        wait = max(0.0, wait + service - chance.gammavariate(shape, 1 / rate / shape))
        total += wait
    return total / customers


def test_poisson_arrivals_are_exact():
    """M/D/1 and M/M/1 have the waits of the textbook."""
    assert waiting_seconds(0.5, 1.0).seconds == pytest.approx(0.5)
    assert waiting_seconds(0.8, 1.0, 1.0).seconds == pytest.approx(4.0)


@pytest.mark.parametrize("rho", [0.6, 0.8, 0.9])
@pytest.mark.parametrize("cv", [0.5, 1.0, 2.0])
def test_near_a_simulated_queue(rho, cv):
    """Within 30 % of a simulated server, or a tenth of a service, for loads that matter and arrivals even to bursty."""
    found = waiting_seconds(rho, 1.0, 0.0, cv).seconds
    assert found == pytest.approx(simulated(rho, 1.0, cv), rel=0.3, abs=0.12)


def test_overload_has_no_time():
    """At a utilisation of 1 or more the answer is a refusal that says why, not a large number."""
    found = waiting_seconds(2.0, 0.5)
    assert found.refused
    assert found.seconds is None
    assert "never catches up" in found.how


def test_bursts_and_steps_cost_and_servers_help():
    """Bursty arrivals wait longer, a step under way is waited for, two servers are better than one of half the load."""
    calm = waiting_seconds(0.6, 1.0).seconds
    assert waiting_seconds(0.6, 1.0, 0.0, 3.0).seconds == pytest.approx(9 * calm)
    assert waiting_seconds(0.6, 1.0, step_seconds=0.1).seconds == pytest.approx(calm + 0.05)
    assert waiting_seconds(1.2, 1.0, servers=2).seconds < calm


def test_batching_carries_what_one_at_a_time_cannot():
    """What a pass takes anyway is shared by those computed together: more is served, and the wait is shorter."""
    assert waiting_seconds(1.2, 1.0).refused
    shared = waiting_seconds(1.2, 1.0, shared_seconds=0.5)
    assert shared.seconds is not None
    assert shared.utilisation < 1
    assert waiting_seconds(0.9, 1.0, shared_seconds=0.5).seconds < waiting_seconds(0.9, 1.0).seconds


@given(st.floats(0.01, 10), st.floats(0.001, 1), st.floats(0, 4), st.floats(0, 1), st.integers(1, 8))
def test_waiting_is_told_below_one_and_grows_with_the_rate(rate, service, cv, shared, servers):
    """There is a time exactly where what cannot be shared fits; it grows with the rate, and sharing shortens it."""
    shared *= service * 0.9
    found = waiting_seconds(rate, service, 0.0, cv, servers=servers, shared_seconds=shared)
    assert found.refused == (rate * (service - shared) / servers >= 1)
    if not found.refused:
        assert found.seconds >= 0
        alone = waiting_seconds(rate, service, 0.0, cv, servers=servers)
        more = waiting_seconds(rate * 1.05, service, 0.0, cv, servers=servers)
        assert alone.refused or more.refused or more.seconds >= alone.seconds
        assert alone.refused or found.seconds <= alone.seconds


def test_waiting_that_is_shared_is_solved_for():
    """Where passes are shared, the wait is the one at which as many come as are computed together, however bursty."""
    rate, service, shared, servers = 2.9, 1.0, 0.45, 3
    for cv in (0.75, 4.0):
        found = waiting_seconds(rate, service, 0.0, cv, servers=servers, shared_seconds=shared)
        each = service - shared * (1 - 1 / (1 + rate * found.seconds / servers))
        alone = waiting_seconds(rate, each, 0.0, cv, servers=servers)
        assert found.seconds == pytest.approx(alone.seconds, rel=1e-6)


def test_the_mean_of_a_simulation_is_stable():
    """The simulated server that the formula is held against does not depend much on its seed."""
    found = [simulated(0.6, 1.0, 1.0, seed=seed) for seed in range(3)]
    assert statistics.stdev(found) < 0.1 * statistics.fmean(found)
