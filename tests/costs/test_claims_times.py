"""Figures that playbooks claim about time and money, and what the formulas say; rows about bytes are in test_claims.

The figures come from the table of docs/claims.md, so what is published is what is tested.
"""

from __future__ import annotations

import pytest

from bench import claims_planner as claims

EXPECTED = {
    3: (153, 6.5),
    4: (31, 32, 46, 52, 61),
    11: (7,),
    12: (2.40,),
    14: (5.33, 10.2),
    15: (4, 70 / 23),
    16: (48, 1.92),
    17: (67,),
    18: (0.80, 3.00),
    19: (1.14, 0.41, 0.17),
    20: (12.5, 80.4),
    21: (18.2, 1065, 1.13, 1.69, 4260),
    22: (85, 22.3, 21.3),
    24: (300, 0.18),
    25: (330, 90),
    26: (49_500, 175, 28.8),
}
"""The honest figures, by row; measured kernels for the prefills of row 19."""

CLOSE = {19: 0.12}
"""How far the formula may be off, where it is not arithmetic."""


@pytest.mark.parametrize("number", EXPECTED)
def test_rows_about_time_and_money(number):
    """Each corrected figure of the playbooks follows from the formulas."""
    (claim,) = (each for each in claims.CLAIMS if each.number == number)
    assert claim.figures is not None
    assert claim.figures() == pytest.approx(EXPECTED[number], rel=CLOSE.get(number, 0.02))


def test_8_a_speed_up_needs_its_conditions():
    """Row 8: the same model and machine give anything from 1 x to over 40 x, depending on length and cached share."""
    some, much, none = claims.speedups()
    assert 10 < some < 16
    assert 38 < much < 46
    assert none == 1


def test_23_what_a_cache_saves_of_a_hundred_steps():
    """Row 23: the sum is 55,050; what reuse between requests saves is one prefill, not the decoding."""
    claimed, exact, prefill, decoding = claims.recomputed()
    assert (claimed, exact) == (60_000, 55_050)
    assert decoding == pytest.approx(3.2, rel=0.01)
    assert prefill < decoding / 20


@pytest.mark.parametrize("number", [9, 10, 29, 30])
def test_statements_have_no_figure(number):
    """Rows 9, 10, 29 and 30 are statements: the table says that they are, and what is wrong with them."""
    (claim,) = (each for each in claims.CLAIMS if each.number == number)
    assert claim.figures is None
    assert claims.STATEMENT in claim.line()
    assert claim.correction


def test_all_thirty_are_listed_once():
    """The table has the thirty rows in order, each with the claim, a figure or the word for none, and a correction."""
    assert [claim.number for claim in claims.CLAIMS] == list(range(1, 31))
    for claim in claims.CLAIMS:
        line = claim.line()
        assert line.count(" | ") == 4
        assert claim.correction
        assert "nan" not in line
        assert "{" not in line


def test_rows_about_bytes_say_in_the_table_what_their_tests_say():
    """The rows whose figures test_claims.py derives show the same figures in the table."""
    assert claims.kv_of_qwen()[:4] == pytest.approx((0.537, 2.147, 8.59, 34.36), rel=1e-3)
    assert claims.sequences() == (20, 5, 1, 29, 7, 1)
    assert claims.sevens() == pytest.approx((4.29, 1.07, 1.07, 0.47, 267), rel=1e-2)
    assert claims.history() == pytest.approx((61, 262), rel=1e-2)
    assert claims.full_context()[0] == pytest.approx(1.14, rel=1e-2)
    assert claims.redis() == pytest.approx((93, 37, 0.537, 172), rel=1e-2)
