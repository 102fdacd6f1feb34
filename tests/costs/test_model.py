"""Learned costs: lines and planes found from measurements, without ever being absurd where nothing was measured."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.costs.model import PREFILL_PRIOR, LearnedCosts

MIB = 1024 * 1024
SIZES = [64 * 1024, MIB, 16 * MIB, 256 * MIB]
PROMPTS = [(64, 0), (512, 0), (2048, 0), (4096, 4096), (256, 8192), (8192, 0), (16, 16384)]


def learn_transfer(costs: LearnedCosts, line: Callable[[int], float], rng, count: int = 100) -> None:
    """Report transfers of random sizes, as exactly as clocks and machines are."""
    for nbytes in 2 ** rng.uniform(14, 28, count):
        costs.transferred("disk", int(nbytes), line(int(nbytes)) * (1 + 0.05 * rng.standard_normal()))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("latency", [2e-6, 1e-3, 0.05])
@pytest.mark.parametrize("bandwidth", [1e7, 1e9, 2e10])
def test_a_line_is_learned(seed, latency, bandwidth):
    """From a hundred noisy transfers latency and bandwidth are known well enough to predict any size within 10 %."""
    costs = LearnedCosts()
    learn_transfer(costs, lambda nbytes: latency + nbytes / bandwidth, np.random.default_rng(seed))
    for nbytes in SIZES:
        assert costs.transfer(nbytes, "disk") == pytest.approx(latency + nbytes / bandwidth, rel=0.10)


def plane(weights: tuple[float, float, float], tokens: int, cached: int) -> float:
    """The true cost of a prefill."""
    return weights[0] + weights[1] * tokens + weights[2] * tokens * (cached + tokens / 2)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weights", [(5e-3, 2e-4, 1e-8), (1e-3, 2e-6, 1e-10), (0.1, 0.1, 1e-5), (0.0, 1e-3, 0.0)])
def test_a_plane_is_learned(seed, weights):
    """From two hundred noisy prefills on any machine, fast or slow, any prefill is predicted within 10 %."""
    costs, rng = LearnedCosts(), np.random.default_rng(seed)
    for _ in range(200):
        tokens, cached = int(2 ** rng.uniform(4, 13)), int(rng.choice([0, 2 ** rng.uniform(6, 14)]))
        costs.recomputed(tokens, cached, plane(weights, tokens, cached) * (1 + 0.03 * rng.standard_normal()))
    for tokens, cached in PROMPTS:
        assert costs.recompute(tokens, cached) == pytest.approx(plane(weights, tokens, cached), rel=0.10)


@pytest.mark.parametrize("factor", [0.001, 0.1, 1.0, 10.0, 1000.0])
def test_one_size_is_enough_for_that_size(factor):
    """With measurements of one size only, that size is predicted, and others in the proportions of the prior."""
    costs, first = LearnedCosts(), LearnedCosts().recompute(1024, 0)
    for _ in range(20):
        costs.recomputed(1024, 0, first * factor)
    assert costs.recompute(1024, 0) == pytest.approx(first * factor, rel=0.02)
    for tokens, cached in PROMPTS:
        expected = LearnedCosts().recompute(tokens, cached) * factor
        assert costs.recompute(tokens, cached) == pytest.approx(expected, rel=0.02)


def test_the_prior_counts_only_where_nothing_was_observed():
    """Before any measurement costs are the priors; what was measured for one tier says nothing about another."""
    costs, fresh = LearnedCosts(), LearnedCosts()
    assert costs.recompute(1000, 0) == pytest.approx(plane(PREFILL_PRIOR, 1000, 0))
    assert costs.transfer(MIB, "memory") < costs.transfer(MIB, "disk") < costs.transfer(MIB, "elsewhere")
    costs.transferred("disk", MIB, 1.0)
    assert costs.transfer(MIB, "disk") == pytest.approx(1.0, rel=0.02)
    assert costs.transfer(MIB, "memory") == fresh.transfer(MIB, "memory")
    assert costs.recompute(1000, 0) == fresh.recompute(1000, 0)


def test_nothing_costs_nothing():
    """No tokens and no bytes take no time."""
    assert LearnedCosts().recompute(0, 500) == LearnedCosts().transfer(0, "disk") == 0.0


measurements = st.lists(st.tuples(st.integers(1, 10**7), st.integers(0, 10**7), st.floats(0, 1e10)), max_size=30)


@given(measured=measurements, asked=st.tuples(st.integers(1, 10**7), st.integers(0, 10**7)))
def test_costs_are_never_negative(measured, asked):
    """Whatever is reported, contradictions and clocks that stand still included, costs are finite and not negative."""
    costs = LearnedCosts()
    for tokens, cached, seconds in measured:
        costs.recomputed(tokens, cached, seconds)
        costs.transferred("disk", tokens, seconds)
    assert 0 <= costs.recompute(*asked) < float("inf")
    assert 0 <= costs.transfer(asked[0], "disk") < float("inf")


@given(measured=measurements)
def test_more_never_costs_less(measured):
    """Costs grow with tokens, with their context and with bytes, whatever was measured."""
    costs = LearnedCosts()
    for tokens, cached, seconds in measured:
        costs.recomputed(tokens, cached, seconds)
        costs.transferred("disk", tokens, seconds)
    assert costs.recompute(200, 100) >= costs.recompute(100, 100)
    assert costs.recompute(100, 200) >= costs.recompute(100, 100)
    assert costs.transfer(2 * MIB, "disk") >= costs.transfer(MIB, "disk")


@pytest.mark.parametrize("factor", [0.1, 0.5, 2.0, 10.0, 100.0])
def test_a_change_of_speed_is_followed(factor):
    """When a machine becomes faster or slower, predictions follow within eighty measurements."""
    costs, rng = LearnedCosts(), np.random.default_rng(1)
    learn_transfer(costs, lambda nbytes: 1e-3 + nbytes / 1e9, rng, 200)
    learn_transfer(costs, lambda nbytes: factor * (1e-3 + nbytes / 1e9), rng, 80)
    for nbytes in SIZES:
        assert costs.transfer(nbytes, "disk") == pytest.approx(factor * (1e-3 + nbytes / 1e9), rel=0.15)


@pytest.mark.parametrize("slow", [3.0, 1000.0])
def test_a_few_hiccups_change_little(slow):
    """One transfer in ten that takes far too long does not make the tier look slow."""
    costs, rng = LearnedCosts(), np.random.default_rng(1)
    for _ in range(20):
        learn_transfer(costs, lambda nbytes: 1e-3 + nbytes / 1e9, rng, 9)
        learn_transfer(costs, lambda nbytes: slow * (1e-3 + nbytes / 1e9), rng, 1)
    for nbytes in SIZES:
        assert costs.transfer(nbytes, "disk") == pytest.approx(1e-3 + nbytes / 1e9, rel=0.35)


def test_the_same_question_has_the_same_answer():
    """Between two observations costs are pure."""
    costs = LearnedCosts()
    learn_transfer(costs, lambda nbytes: 1e-3 + nbytes / 1e9, np.random.default_rng(1))
    assert {costs.transfer(MIB, "disk") for _ in range(10)} == {costs.transfer(MIB, "disk")}


def test_threads_may_report_and_ask_at_once():
    """Reports from several threads all count, and questions meanwhile have sensible answers."""
    costs, answers = LearnedCosts(), []
    start = threading.Barrier(4)

    def work(tier: str) -> None:
        start.wait()
        for _ in range(300):
            costs.transferred(tier, MIB, 0.01)
            costs.recomputed(1000, 0, 0.5)
            answers.append(costs.transfer(MIB, tier) + costs.recompute(1000, 0))

    threads = [threading.Thread(target=work, args=(tier,)) for tier in ("a", "a", "a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == 1200
    assert all(0 < answer < 1 for answer in answers)
    assert costs.transfer(MIB, "a") == pytest.approx(0.01, rel=0.02)
    assert costs.recompute(1000, 0) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_short_tails_do_not_make_long_prompts_look_cheap(seed):
    """A hundred short tails leave what one long prompt has taught: its prediction stays within a third."""
    random = np.random.default_rng(seed)
    costs = LearnedCosts()
    costs.recomputed(2048, 0, 1.0)
    for turn in range(100):
        costs.recomputed(int(random.integers(9, 60)), 2048 + 30 * turn, 0.027 * float(random.normal(1, 0.08)))
    assert costs.recompute(2064, 0) == pytest.approx(1.0, rel=1 / 3)
    assert costs.recompute(16, 2048) == pytest.approx(0.027, rel=1 / 3)
