import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from tests.fleet.simulated import seeded
from thermocline.fleet.books import SESSIONS_MAX, Fleet
from thermocline.fleet.costs import InstanceCosts, Steps, terms_of
from thermocline.fleet.instance import Ask, Choice, Instance, Overlaps, Tier, Why
from thermocline.fleet.router import choose, route

BEST = "predicted_ttft"
TRUTH = (0.03, 1e-3, 5e-8)


def seconds_of(tokens: int, cached: int = 0) -> float:
    fixed, linear, pair = TRUTH
    new = tokens - cached
    return fixed + linear * new + pair * new * (cached + new / 2)


def served(fleet: Fleet, tokens: int, now: float, *, cached: int = 0, seconds: float | None = None) -> float:
    """One request from arrival to end, alone; when it ended."""
    held = [cached] * len(fleet.instances)
    booking = choose(Ask(tokens, Overlaps(held)), fleet, BEST, now)
    first = now + (seconds_of(tokens, cached) if seconds is None else seconds)
    fleet.first_token(booking, first)
    fleet.finished(booking, first + 0.05, cached)
    return first + 0.1


def error(fleet: Fleet, tokens: int, cached: int = 0) -> float:
    predicted = route(Ask(tokens, Overlaps([cached])), fleet, BEST, 1e6)[0].seconds
    return abs(predicted / seconds_of(tokens, cached) - 1)


# -- learned costs


def alone() -> Fleet:
    fleet = Fleet()
    fleet.join(Instance("a", "http://a"))
    return fleet


@pytest.mark.parametrize("seed", range(3))
def test_costs_are_learned_from_first_tokens(seed):
    """From a prior five times too low, thirty requests teach what any prompt takes, to within 10 %."""
    fleet, random, now = alone(), seeded(seed), 0.0
    assert error(fleet, 4_000) > 0.5
    for _ in range(30):
        tokens = random.randint(200, 8_000)
        now = served(fleet, tokens, now, cached=random.choice([0, tokens // 2, tokens - 100]))
    for tokens, cached in ((500, 0), (4_000, 0), (8_000, 7_000), (2_000, 1_900)):
        assert error(fleet, tokens, cached) < 0.1


def test_outliers_do_not_unteach():
    """One request in ten that takes twenty times as long, or no time at all, leaves predictions within 25 %."""
    fleet, random, now = alone(), seeded(1), 0.0
    for at in range(150):
        tokens = random.randint(500, 4_000)
        odd = {3: 20.0, 7: 0.01}.get(at % 20) if at > 20 else None
        now = served(fleet, tokens, now, seconds=odd and odd * seconds_of(tokens))
    assert error(fleet, 1_000) < 0.25
    assert error(fleet, 4_000) < 0.25


def test_a_machine_that_becomes_slower_is_followed():
    """Twenty requests after an instance has become four times as slow, predictions are near what it takes now."""
    fleet, now = alone(), 0.0
    for at in range(50):
        tokens = 500 + 97 * at % 3_000
        now = served(fleet, tokens, now, seconds=seconds_of(tokens) * (1 if at < 30 else 4))
    assert error(fleet, 2_000) == pytest.approx(3.0, rel=0.3)


def test_prompts_of_one_step_are_learned_together():
    """Where an engine computes eight prompts in one step, the eight are not each taken for as slow as all."""
    fleet, random, now = alone(), seeded(2), 0.0
    for _ in range(12):
        sizes = [random.randint(200, 2_000) for _ in range(8)]
        bookings = [choose(Ask(tokens), fleet, BEST, now) for tokens in sizes]
        now += 0.03 + sum(seconds_of(tokens) - 0.03 for tokens in sizes)
        for at, booking in enumerate(bookings):
            fleet.first_token(booking, now + 0.001 * at)
        for booking in bookings:
            fleet.finished(booking, now + 0.2, 0)
        now += 0.5
    assert error(fleet, 1_500) < 0.2


def test_waiting_is_never_taken_for_nothing():
    """However little the queue seemed to matter, a longer one is a longer wait; nothing becomes negative."""
    steps = Steps()
    for at in range(200):
        booked = at % 10 / 10 + 0.01
        steps.observe(0.1, booked, 0.7 - 0.4 * booked)
        assert steps.behind >= 1
        assert steps.wait > 0


def test_queues_are_not_taken_for_work():
    """Requests that wait for each other teach what each takes, not how long it waited."""
    fleet, now = alone(), 0.0
    for _ in range(8):
        bookings = [choose(Ask(1_000), fleet, BEST, now) for _ in range(5)]
        for booking in bookings:
            now += seconds_of(1_000)
            fleet.first_token(booking, now)
        for booking in bookings:
            fleet.finished(booking, now + 0.1, 0)
        now += 1.0
    assert error(fleet, 1_000) < 0.1


def test_the_reported_hit_counts_and_not_the_predicted_one():
    """A prompt that was expected to be computed, and was cached, does not make computing look cheap."""
    fleet, now = alone(), 0.0
    for at in range(40):
        cached = 1_900 if at % 2 else 0
        booking = choose(Ask(2_000), fleet, BEST, now)
        fleet.first_token(booking, now + seconds_of(2_000, cached))
        fleet.finished(booking, now + 10, cached)
        now += 20
    assert error(fleet, 2_000) < 0.1


def test_a_new_instance_starts_from_what_others_have_shown():
    """What joins later is predicted like the instance that is known best, not from the prior."""
    fleet, now = alone(), 0.0
    for tokens in (500, 1_000, 2_000, 4_000) * 4:
        now = served(fleet, tokens, now)
    slot = fleet.join(Instance("b", "http://b"))
    assert fleet.per_token[slot] == pytest.approx(fleet.per_token[0], rel=0.05)
    assert fleet.fixed[slot] == pytest.approx(fleet.fixed[0], rel=0.05)


def test_loads_are_learned_by_tier():
    """Tokens that came from a tier are charged to it, so its price follows what it takes."""
    costs = InstanceCosts()
    random, now = seeded(4), 0.0
    for _ in range(60):
        tokens = random.randint(2_000, 8_000)
        loaded = random.choice([0, tokens // 2, tokens - 100])
        tier = Tier.DISK if loaded else Tier.NONE
        choice = Choice(0, 0.0, cached_tokens=loaded, loaded_tokens=loaded, tier=tier)
        seconds = seconds_of(tokens, loaded) + 4e-4 * loaded
        stretch = costs.first_token(now, now + seconds)
        costs.finished(stretch, terms_of(Ask(tokens), choice, 0, loaded), idle=True)
        now += seconds + 1
    assert costs.weights[5] == pytest.approx(4e-4, rel=0.15)


# -- the books


def test_a_request_that_nobody_tells_of_ends_by_itself():
    """Without streaming there is no first token: its work is taken as done when it was predicted to be."""
    fleet = alone()
    choose(Ask(4_000, streamed=False), fleet, BEST, 0.0)
    assert fleet.queue_seconds(0, 0.0) > 0
    assert fleet.queue_seconds(0, 1e3) == 0
    choose(Ask(100, streamed=False), fleet, BEST, 1e3)
    state = fleet.snapshot(1e3)[0]
    assert (state.waiting, state.decoding) == (1, 1)


def test_seats_that_are_taken_make_a_queue():
    """More requests than an instance runs at once wait for answers to end."""
    fleet = Fleet()
    fleet.join(Instance("a", seats=2))
    bookings = [choose(Ask(100), fleet, BEST, 0.0) for _ in range(2)]
    for booking in bookings:
        fleet.first_token(booking, 0.1)
    full = route(Ask(100), fleet, BEST, 0.2)[0].interference_seconds
    fleet.finished(bookings[0], 0.3)
    fleet.finished(bookings[1], 0.3)
    assert full > route(Ask(100), fleet, BEST, 0.4)[0].interference_seconds


def test_an_instance_that_comes_back_knows_nothing_of_before():
    """What was in flight on an earlier incarnation is closed, and what is told of it later changes nothing."""
    fleet = alone()
    old = [choose(Ask(1_000, session="s"), fleet, BEST, 0.0) for _ in range(3)]
    fleet.first_token(old[0], 0.5)
    fleet.leave(0, 1.0)
    assert route(Ask(10), fleet, BEST, 1.0) == []
    assert fleet.join(Instance("a", "http://a"), 0) == 0
    new = choose(Ask(1_000), fleet, BEST, 1.0)
    fleet.first_token(new, 1.5)
    for booking in old:
        fleet.finished(booking, 2.0, 0)
    fleet.check_integrity()
    assert fleet.in_flight(0) == 1
    assert not fleet.sessions


def test_regret_is_data():
    """A finished decision says how far off it was, and how much sooner another instance was predicted to answer."""
    fleet = alone()
    fleet.join(Instance("b", "http://b"))
    booking = choose(Ask(1_000), fleet, BEST, 0.0)
    other = booking.choices[1].seconds
    fleet.first_token(booking, other + 2.0)
    outcome = fleet.finished(booking, 9.0, 16)
    assert outcome.regret_seconds == pytest.approx(2.0)
    assert outcome.actual_cached_tokens == 16
    assert outcome.error == pytest.approx(1 - outcome.predicted_seconds / (other + 2.0))
    quick = choose(Ask(1_000), fleet, BEST, 20.0)
    fleet.first_token(quick, 20.0 + 1e-6)
    assert fleet.finished(quick, 21.0).regret_seconds == 0.0


def test_a_failed_request_gives_its_place_back():
    """After a failure the queue is as if the request had never been."""
    fleet = alone()
    fleet.failed(choose(Ask(5_000), fleet, BEST, 0.0), 0.1)
    assert fleet.queue_seconds(0, 0.1) == 0
    assert fleet.in_flight(0) == 0


def test_trust_falls_with_wrong_predictions_and_comes_back():
    """Held tokens that the engine never finds cached are believed less and less, and again when it does."""
    fleet = alone()
    ask = Ask(2_000, Overlaps([1_900]))
    now = 0.0
    for cached in (0,) * 30:
        booking = choose(ask, fleet, BEST, now)
        fleet.finished(booking, now + 1, cached)
        now += 2
    low = route(ask, fleet, BEST, now)[0]
    assert low.cached_tokens < 500
    assert Why.LOAD_REGIME in low.reasons
    for _ in range(300):
        fleet.finished(choose(ask, fleet, BEST, now), now + 1, 1_900)
        now += 2
    assert route(ask, fleet, BEST, now)[0].cached_tokens == 1_900


def test_a_working_set_beyond_the_caches_is_noticed():
    """What is computed between two visits of a session, against what caches hold, tells whether affinity can pay."""
    fleet = Fleet()
    fleet.join(Instance("a", capacity_tokens=100_000))
    for at in range(400):
        booking = choose(Ask(2_000, session=f"s{at % 100}"), fleet, BEST, float(at))
        fleet.first_token(booking, at + 0.4)
        fleet.finished(booking, at + 0.5, 0)
    regime = fleet.regime()
    assert regime.working_set_tokens == pytest.approx(200_000, rel=0.2)
    assert not regime.affinity


def test_sessions_are_bounded():
    """However many sessions there are, so many are remembered: the latest."""
    fleet = alone()
    for at in range(SESSIONS_MAX + 10):
        fleet._visit(f"s{at}", 0, 1, 0.0)
    assert len(fleet.sessions) == SESSIONS_MAX
    assert "s0" not in fleet.sessions


class Books(RuleBasedStateMachine):
    """Any order of words about any requests, some of them twice, with instances that go and come."""

    bookings = Bundle("bookings")

    def __init__(self):
        super().__init__()
        self.fleet, self.now = Fleet(), 0.0
        for at in range(3):
            self.fleet.join(Instance(f"i{at}", seats=4))

    @rule(target=bookings, tokens=st.integers(1, 9_000), held=st.integers(0, 9_000), streamed=st.booleans())
    def book(self, tokens, held, streamed):
        held = min(held, tokens - 1)
        ask = Ask(tokens, Overlaps([held, 0, 0], name=held or None), str(held), streamed=streamed)
        return choose(ask, self.fleet, BEST, self.now)

    @rule(booking=bookings)
    def first_token(self, booking):
        if booking is not None:
            self.fleet.first_token(booking, self.now)

    @rule(booking=bookings, cached=st.none() | st.integers(0, 9_000))
    def finish(self, booking, cached):
        if booking is not None:
            self.fleet.finished(booking, self.now, cached)

    @rule(booking=consumes(bookings))
    def fail(self, booking):
        if booking is not None:
            self.fleet.failed(booking, self.now)

    @rule(seconds=st.floats(0, 100))
    def wait(self, seconds):
        self.now += seconds

    @rule(slot=st.integers(0, 2))
    def leave(self, slot):
        self.fleet.leave(slot, self.now)

    @rule(slot=st.integers(0, 2))
    @precondition(lambda self: not all(self.fleet.available))
    def join(self, slot):
        self.fleet.join(Instance(f"new{slot}", seats=4), slot, self.now)

    @invariant()
    def the_books_add_up(self):
        self.fleet.check_integrity()
        for slot in range(3):
            assert self.fleet.queue_seconds(slot, self.now) >= 0


class TestBooks(Books.TestCase):
    """Whatever is told in whatever order, the books add up: what is booked is what is in flight."""

    settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
