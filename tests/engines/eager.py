"""Costs under which everything that is held is loaded: what tests find does not depend on how busy the machine is."""

from __future__ import annotations

from thermocline.costs.model import LearnedCosts
from thermocline.settings import Settings
from thermocline.store.store import Store


class EagerCosts(LearnedCosts):
    """Computing a token takes a second, so that no load is declined, and none is late."""

    def recompute(self, tokens: int, cached: int, model: str = "") -> float:  # the seam's signature
        """A second each."""
        return float(tokens)


def eager_store(settings: Settings) -> Store:
    """The settings' store, with such costs."""
    from thermocline.build import store_from

    return store_from(settings, costs=EagerCosts())
