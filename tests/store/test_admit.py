"""Admission: nothing is written that would be computed sooner than loaded, and no tier is given up for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.making import BLOCK_BYTES, LAYOUT, TOKENS_PER_BLOCK, ScriptedTier, ask, chain, save
from tests.store.test_reasons import details
from thermocline.costs.model import SURE_OBSERVATIONS, LearnedCosts
from thermocline.store.admit import TRIED_ONE_IN, refusal
from thermocline.store.mover import PROBE_SECONDS


def costs_of(load_seconds: float, recompute_seconds: float, blocks: int = 8) -> LearnedCosts:
    """Costs under which `blocks` blocks take so long to load from "cold", and so long to compute."""
    return teach(LearnedCosts(), load_seconds, recompute_seconds, blocks)


def teach(costs: LearnedCosts, load_seconds: float, recompute_seconds: float, blocks: int = 8) -> LearnedCosts:
    """The same of costs that are there already."""
    for _ in range(50):
        costs.transferred("cold", blocks * BLOCK_BYTES, load_seconds)
        costs.recomputed(blocks * TOKENS_PER_BLOCK, 0, recompute_seconds)
    return costs


@given(load=st.floats(1e-5, 1e3), recompute=st.floats(1e-5, 1e3), gain_min=st.floats(0, 10))
def test_a_path_is_refused_where_computing_it_is_quicker(load, recompute, gain_min):
    """A path is saved if loading it takes `gain_min` times less than computing it; a refusal has both seconds."""
    costs = costs_of(load, recompute)
    found = refusal(costs, LAYOUT, "cold", 8, gain_min=gain_min)
    loading, computing = costs.transfer(8 * BLOCK_BYTES, "cold"), costs.recompute(8 * TOKENS_PER_BLOCK, 0)
    assert (found is None) == (computing >= gain_min * loading)
    if found is not None:
        assert (found.load_seconds, found.recompute_seconds) == (loading, computing)
        assert found == refusal(costs, LAYOUT, "cold", 8, gain_min=gain_min), "the same question, the same answer"


def test_what_was_hardly_measured_is_admitted():
    """Without enough measurements of tier and model a save is admitted: else nothing would ever be measured."""
    assert refusal(costs_of(1.0, 0.1), LAYOUT, "cold", 8) is not None
    assert refusal(costs_of(1.0, 0.1), LAYOUT, "other", 8) is None
    tier, model = LearnedCosts(), LearnedCosts()
    tier.transferred("cold", BLOCK_BYTES, 100.0)
    model.recomputed(TOKENS_PER_BLOCK, 0, 1e-6)
    assert refusal(tier, LAYOUT, "cold", 8) is refusal(model, LAYOUT, "cold", 8) is None
    few = LearnedCosts()
    for number in range(1, SURE_OBSERVATIONS + 1):
        few.transferred("cold", 8 * BLOCK_BYTES, 1.0)
        few.recomputed(8 * TOKENS_PER_BLOCK, 0, 0.1)
        assert (refusal(few, LAYOUT, "cold", 8) is None) == (number < SURE_OBSERVATIONS)


def test_one_in_so_many_is_tried():
    """Of saves that are refused, one in a fixed number is taken, so that a tier that became faster is noticed."""
    costs = costs_of(1.0, 0.1)
    taken = [refusal(costs, LAYOUT, "cold", 8, refused=refused) is None for refused in range(2 * TRIED_ONE_IN)]
    assert [at for at, admitted in enumerate(taken) if admitted] == [TRIED_ONE_IN - 1, 2 * TRIED_ONE_IN - 1]


@pytest.fixture
def slow(make_store):
    """A store of 16 blocks of memory, over a tier from which loading takes ten times as long as computing."""
    cold = ScriptedTier()
    store = make_store(cold, blocks=16)
    teach(store.costs, 1.0, 0.1)
    return store, cold


def test_not_admitted_is_a_reason_once_memory_has_dropped_it(slow, clock):
    """What a tier did not admit is no miss while memory has it; then it is NOT_ADMITTED, with both seconds."""
    store, cold = slow
    keys = chain("prompt", 8)
    save(store, keys)
    assert not cold.blocks
    assert (ask(store, keys).blocks, ask(store, keys).reasons) == (8, [])
    clock.sleep(1)
    save(store, chain("pressure", 16))
    assert ask(store, keys).reasons == [(0, 8, "not_admitted")]
    loading, computing = store.costs.transfer(8 * BLOCK_BYTES, "cold"), store.costs.recompute(8 * TOKENS_PER_BLOCK, 0)
    words = f"(loading it would take {loading:.4f} s, computing it {computing:.4f} s)"
    assert details(store, keys) == [f"not written to cold less than a minute ago {words}"]


def test_what_is_admitted_later_is_held(slow, clock):
    """Once loading pays, the whole path is written with the next save on it, and no reason is left over."""
    store, cold = slow
    keys = chain("prompt", 12)
    save(store, keys[:8])
    teach(store.costs, 0.001, 10.0)
    save(store, keys, start=8)
    assert len(cold.blocks) == 12
    clock.sleep(1)
    save(store, chain("pressure", 16))
    assert ask(store, keys).by_tier == {"cold": 12}


def test_what_expires_is_expired_whatever_was_not_admitted(make_store, clock):
    """A block that memory dropped for its age is EXPIRED, also where another tier had refused it."""
    store, keys = make_store(ScriptedTier(), blocks=16, ttl_seconds=60.0), chain("prompt", 8)
    teach(store.costs, 1.0, 0.1)
    save(store, keys)
    clock.sleep(61)
    assert ask(store, keys).reasons == [(0, 8, "expired")]


def test_a_refused_tier_is_tried_again(slow):
    """After enough refusals a save is written all the same."""
    store, cold = slow
    for number in range(TRIED_ONE_IN):
        save(store, chain(f"prompt {number}", 1))
    assert len(cold.blocks) == 1


def test_a_declined_tier_is_probed(make_store, clock):
    """What plans decline to load is loaded in the background now and then, so that a tier that recovered is used."""
    cold = ScriptedTier()
    store, keys = make_store(cold, blocks=16), chain("prompt", 8)
    save(store, keys)
    clock.sleep(1)
    save(store, chain("other", 16))
    teach(store.costs, 1.0, 0.1)
    cold.on_load = lambda keys: clock.sleep(1e-5 * len(keys))  # it has recovered
    asked, answer = 0, ask(store, keys)
    assert answer.reasons == [(0, 8, "declined")]
    while answer.reasons and asked < 1000:
        store.prefetch([LAYOUT], chain("nothing", 1), clock.now()).wait(10)  # the probe before it is over
        clock.sleep(PROBE_SECONDS)
        answer, asked = ask(store, keys), asked + 1
    assert answer.by_tier == {"cold": 8}
