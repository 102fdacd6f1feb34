import math

from hypothesis import given
from hypothesis import strategies as st

from thermocline.fleet.placement import COPIES_MAX, GAIN_MIN, Place, Prefix, place


def hot(name: str = "hot", *, tokens: int = 4_096, rate: float = 2.0, seconds: float = 1.0, holders=(0,)) -> Prefix:
    return Prefix(name, tokens, rate, seconds, frozenset(holders))


def there(
    slot: int, *, share: float = 0.25, room: int = 100_000, per_token: float = 1e-5, budget: float = 1.0
) -> Place:
    return Place(slot, share, room, per_token, budget)


def test_a_hot_prefix_is_copied_to_those_who_lack_it():
    """Every instance that will be asked for a prefix, and lacks it, gets a copy; holders do not."""
    copies = place([hot()], [there(slot) for slot in range(4)], 60.0)
    assert {copy.target for copy in copies} == {1, 2, 3}
    assert {copy.source for copy in copies} == {0}
    assert all(copy.saved_seconds > GAIN_MIN * copy.transfer_seconds for copy in copies)


def test_a_copy_saves_one_recompute_at_most():
    """Whoever asks first without a copy makes one by computing: that is all that can be saved, however many ask."""
    (copy,) = place([hot(rate=1_000.0)], [there(1)], 60.0)
    assert copy.saved_seconds == 1.0
    (rare,) = place([hot(rate=0.01)], [there(1)], 60.0)
    assert math.isclose(rare.saved_seconds, 1 - math.exp(-0.15))


def test_what_does_not_pay_is_not_copied():
    """No copy over a slow link, of a prefix that is quickly computed, or that nobody asks for, or that nobody has."""
    assert not place([hot()], [there(1, per_token=1e-3)], 60.0)
    assert not place([hot(seconds=0.01)], [there(1)], 60.0)
    assert not place([hot(rate=1e-6)], [there(1)], 60.0)
    assert not place([hot(holders=())], [there(1)], 60.0)


def test_a_cold_instance_is_made_warm_with_the_best_first():
    """One that has just joined gets what saves most per second of transfer, as far as its budget goes."""
    prefixes = [
        hot("small", tokens=1_000, seconds=0.1),
        hot("dear", tokens=1_000, seconds=0.9),
        hot("big", tokens=90_000),
    ]
    copies = place(prefixes, [there(5, budget=0.02)], 60.0)
    assert [copy.name for copy in copies] == ["dear", "small"]


prefixes_of = st.lists(
    st.builds(
        Prefix,
        st.text("ab", max_size=3),
        st.integers(1, 100_000),
        st.floats(0, 100),
        st.floats(0, 100),
        st.frozensets(st.integers(0, 4)),
    ),
    max_size=30,
)
places_of = st.lists(
    st.builds(
        Place, st.integers(0, 4), st.floats(0, 1), st.integers(0, 200_000), st.floats(1e-7, 1e-2), st.floats(0, 5)
    ),
    max_size=5,
    unique_by=lambda each: each.slot,
)


@given(prefixes_of, places_of, st.floats(1, 1_000))
def test_room_and_budget_hold(prefixes, places, horizon):
    """No place is given more tokens or seconds than it has, every copy pays, and the same question has one answer."""
    copies = place(prefixes, places, horizon)
    assert copies == place(prefixes, places, horizon)
    assert len(copies) <= COPIES_MAX
    for each in places:
        mine = [copy for copy in copies if copy.target == each.slot]
        assert sum(copy.tokens for copy in mine) <= each.room_tokens
        assert sum(copy.transfer_seconds for copy in mine) <= each.budget_seconds + 1e-9
    assert all(copy.saved_seconds >= GAIN_MIN * copy.transfer_seconds for copy in copies)
    assert all(copy.target != copy.source for copy in copies)
