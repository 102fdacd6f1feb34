"""Costs in the store: measured at its start, learned from what was late, and the same wherever they are asked."""

from __future__ import annotations

import pytest

from tests.store.making import BLOCK_BYTES, LAYOUT, TOKENS_PER_BLOCK, ScriptedTier, ask, chain, save
from thermocline.build import store_from
from thermocline.clock import ManualClock, SystemClock
from thermocline.costs.model import LearnedCosts
from thermocline.settings import Settings
from thermocline.store.calibrate import calibrate
from thermocline.store.store import Store
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.tier import Outcome

MIB = 1024 * 1024


def test_every_tier_is_measured_at_its_start(tmp_path, monkeypatch):
    """A fresh store knows what loads from memory and disk take, and nothing of the measuring is left in them."""
    monkeypatch.setattr("thermocline.store.calibrate.SECONDS_MAX", 30.0)  # a busy machine is no failure
    sizes = {"memory_bytes": 64 * MIB, "disk_path": tmp_path / "disk", "disk_bytes": 64 * MIB}
    store = store_from(Settings(**sizes, costs_path=tmp_path / "costs.json"))
    assert store.costs.knows("memory")
    assert store.costs.knows("disk")
    assert {name: used.blocks for name, used in store.usage().items()} == {"memory": 0, "disk": 0}
    store.check_integrity()
    known = store.costs.transfer(MIB, "disk")
    store.close()
    again = store_from(Settings(**sizes, costs_path=tmp_path / "costs.json"))
    assert again.costs.transfer(MIB, "disk") == known, "what is saved is not measured again"
    assert again.usage()["disk"].blocks == 0
    again.close()


def test_a_tier_in_trouble_is_not_measured(tmp_path):
    """A tier that refuses, raises, is small or is known already costs the start nothing, and teaches nothing."""

    def broken(*_: object) -> None:
        raise OSError("broken")

    clock, costs = SystemClock(), LearnedCosts()
    small, raising = MemoryTier(MIB, name="small"), ScriptedTier("raising", on_save=broken)
    missing = ScriptedTier("missing", answer=lambda outcomes: [Outcome.LATE] * len(outcomes))
    known = ScriptedTier("known", on_save=broken)
    costs.transferred("known", MIB, 1.0)
    calibrate([small, raising, missing, known], costs, clock)
    assert [costs.knows(tier) for tier in ("small", "raising", "missing", "known")] == [False, False, False, True]
    assert not missing.blocks
    small.close()


def test_a_save_that_hangs_does_not_hold_up_the_start():
    """A tier that never says that it has saved is left alone after a moment, and cleaned up if it says so later."""
    hanging, costs = ScriptedTier("hanging", holding=True), LearnedCosts()
    calibrate([hanging], costs, SystemClock())
    assert not costs.knows("hanging")
    hanging.finish()
    assert not hanging.blocks


@pytest.fixture
def late(clock: ManualClock) -> ScriptedTier:
    """A tier that takes a second for each load, and is late."""
    tier = ScriptedTier()

    def slow(_: object) -> None:
        clock.sleep(1.0)

    tier.on_load, tier.answer = slow, lambda outcomes: [Outcome.LATE] * len(outcomes)
    return tier


def test_a_late_load_is_learned(make_store, late):
    """A tier that was late is predicted to take at least as long as it was given."""
    store, keys = make_store(late, blocks=16), chain("prompt", 8)
    save(store, keys)
    save(store, chain("other", 16))
    before = store.costs.transfer(8 * BLOCK_BYTES, "cold")
    assert ask(store, keys).reasons == [(0, 8, "late")]
    assert store.costs.transfer(8 * BLOCK_BYTES, "cold") > 2 * before


def test_the_same_seconds_wherever_they_are_asked(tmp_path):
    """Plan, receipt and costs give the same seconds for the same question, and asking changes nothing."""
    clock = SystemClock()
    warm, disk = MemoryTier(16 * BLOCK_BYTES, clock=clock), DiskTier(tmp_path / "disk", 1 << 24, clock=clock)
    costs = LearnedCosts()
    store, keys = Store(warm, [disk], clock=clock, costs=costs), chain("prompt", 24)
    assert store.costs is costs
    save(store, keys)
    for _ in range(20):
        costs.recomputed(16 * TOKENS_PER_BLOCK, 0, 30.0)
    tokens = len(keys) * TOKENS_PER_BLOCK + 1
    for _ in range(3):
        plan = store.match([LAYOUT], keys, prompt_tokens=tokens)
        store.release(plan.lease)
        expected = [costs.transfer((run.stop - run.start) * BLOCK_BYTES, run.tier) for run in plan.runs]
        assert [run.seconds for run in plan.runs] == expected
        assert plan.runs
        assert plan.load_seconds == pytest.approx(sum(expected), rel=1e-12)
        assert plan.cold_seconds == costs.recompute(tokens, 0)
        assert plan.recompute_seconds == costs.recompute(tokens - plan.tokens, plan.tokens)
        assert plan.load_seconds_max == min(10.0, max(0.05, plan.cold_seconds - plan.recompute_seconds))
    store.close()
