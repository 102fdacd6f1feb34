"""What a fleet believes of instances before it has seen them."""

from __future__ import annotations

import pytest

from tests.costs.test_measured import LENGTHS, sweep, truth
from thermocline.fleet.books import Fleet
from thermocline.fleet.costs import new_fit
from thermocline.fleet.instance import Instance


def test_a_profile_is_where_costs_begin():
    """With a profile, first tokens are predicted as it measured them, by what is computed and what is loaded."""
    fit = new_fit(sweep())
    for length in LENGTHS:
        assert fit.predict((1.0, length, length * length / 2, 0, 0, 0, 0)) == pytest.approx(truth(length, 0), rel=0.1)
    half = (1.0, 1024, 1024 * 1536, 0, 1024, 0, 0)
    assert fit.predict(half) == pytest.approx(truth(1024, 1024), rel=0.1)


def test_instances_that_join():
    """An instance that joins a fleet with a profile takes what was measured; without one, what is usual."""
    known, unknown = Fleet(known=sweep()), Fleet()
    for fleet in (known, unknown):
        fleet.join(Instance("a", "http://127.0.0.1:1"))
    assert known.per_token[0] == pytest.approx(4e-4, rel=0.2)
    assert unknown.per_token[0] == pytest.approx(2e-4, rel=0.01)
