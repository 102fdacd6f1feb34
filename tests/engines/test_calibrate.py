"""The engine measures itself when it starts, and only where nothing is known from before."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from tests.engines.eager import eager_store
from thermocline.build import store_from
from thermocline.costs.model import LearnedCosts
from thermocline.engines.models import Model
from thermocline.engines.transformers import Engine
from thermocline.settings import Settings

MIB = 1 << 20
ASKED = [(64, 0), (2048, 0), (16, 4096)]


def test_the_first_plan_need_not_guess(model: Model) -> None:
    """Before the first request, what prompts take on this machine is measured."""
    with closing(store_from(Settings(memory_bytes=64 * MIB))) as store, closing(Engine(model, store)):
        assert store.costs.computes(model.layout.computed_by)
        assert store.costs.recompute(64, 0) != LearnedCosts().recompute(64, 0)


def test_what_is_known_is_not_measured_again(model: Model, tmp_path: Path) -> None:
    """With saved costs a second engine begins with exactly what the first one had learned."""
    settings = Settings(memory_bytes=64 * MIB, costs_path=tmp_path / "costs.json")
    with closing(store_from(settings)) as store, closing(Engine(model, store)) as engine:
        engine.generate(range(100, 300), 1)
        learned = [store.costs.recompute(*asked) for asked in ASKED]
    with closing(store_from(settings)) as store, closing(Engine(model, store)):
        assert [store.costs.recompute(*asked) for asked in ASKED] == learned


def test_costs_that_are_given_are_asked_everywhere(model: Model) -> None:
    """A store that is built with costs has those and no others: plan and receipt say what they say."""
    with closing(eager_store(Settings(memory_bytes=64 * MIB))) as store, closing(Engine(model, store)) as engine:
        receipt = engine.generate(range(100, 200), 1).receipt
        assert receipt is not None
        assert receipt.planned_cold_seconds == store.costs.recompute(100, 0) == 100.0
