"""The small parts: breaker, leases, eviction policy. Each is a function of the times that it is given."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.making import (
    BLOCK_BYTES,
    GUARD_SECONDS,
    LAYOUT,
    ScriptedTier,
    ask,
    chain,
    contents,
    make_layout,
    save,
)
from thermocline.blocks.key import NO_PARENT
from thermocline.store.breaker import FAILURES_MAX, OPEN_SECONDS_MAX, OPEN_SECONDS_MIN, Breaker
from thermocline.store.evict import Candidate, LeastRecent
from thermocline.store.index import NO_NODE, Index
from thermocline.store.leases import Leases
from thermocline.tiers.tier import Outcome


def test_a_breaker_opens_after_failures_in_a_row():
    """Two failures are let pass, the third in a row opens the breaker; a success in between starts the count anew."""
    breaker = Breaker()
    assert [breaker.failed(0.0) for _ in range(FAILURES_MAX - 1)] == [False] * (FAILURES_MAX - 1)
    breaker.succeeded()
    assert [breaker.failed(0.0) for _ in range(FAILURES_MAX)] == [False] * (FAILURES_MAX - 1) + [True]
    assert not breaker.allows(0.0)
    assert breaker.allows(OPEN_SECONDS_MIN)


def test_a_breaker_stays_open_longer_each_time():
    """Each failed trial doubles the time until the next one, up to a bound; a success forgets it all."""
    breaker, now, waited = Breaker(), 0.0, []
    for _ in range(FAILURES_MAX - 1):
        breaker.failed(now)
    for _ in range(9):
        assert breaker.failed(now)
        waited.append(breaker.open_until - now)
        now = breaker.open_until
    assert waited == [1, 2, 4, 8, 16, 32, OPEN_SECONDS_MAX, OPEN_SECONDS_MAX, OPEN_SECONDS_MAX]
    breaker.succeeded()
    assert breaker.allows(0.0)
    assert not breaker.failed(now)


def test_one_request_tries_at_a_time():
    """When an open breaker's time is up one request is let through; if nothing is heard of it, another one later."""
    breaker = Breaker()
    breaker.trying(0.0)
    assert breaker.allows(0.0)  # a healthy tier is open to all
    for _ in range(FAILURES_MAX):
        breaker.failed(0.0)
    assert breaker.allows(1.0)
    breaker.trying(1.0)
    assert not breaker.allows(1.5)
    assert breaker.allows(3.5)


def test_failures_of_one_moment_count_once():
    """Many requests that fail of one hiccup do not each double the time that a tier is left alone."""
    breaker = Breaker()
    opened = [breaker.failed(10.0, started=9.0) for _ in range(20)]
    assert opened.count(True) == 1
    assert breaker.allows(10.0 + OPEN_SECONDS_MIN)
    assert breaker.failed(12.0, started=11.5), "the next attempt that fails opens it again"
    assert not breaker.allows(12.0 + OPEN_SECONDS_MIN)


@given(events=st.lists(st.tuples(st.sampled_from(["failed", "succeeded", "trying"]), st.floats(0, 100)), max_size=40))
def test_a_breaker_never_stays_open_for_ever(events):
    """Whatever happened, a tier is tried again after the longest time that a breaker stays open."""
    breaker, now = Breaker(), 0.0
    for event, seconds in events:
        now += seconds
        if event == "succeeded":
            breaker.succeeded()
        else:
            getattr(breaker, event)(now)
        assert breaker.open_until <= now + OPEN_SECONDS_MAX


@pytest.fixture
def index() -> Index:
    """An index with one path of three blocks."""
    index = Index(("warm",), LeastRecent())
    keys = chain("path", 3)
    for at, key in enumerate(keys):
        index.add(LAYOUT.id, key, keys[at - 1] if at else NO_PARENT, at + 1, "warm", 0.0)
    return index


def test_leases_end_once(index):
    """A lease pins until it is released or runs out; ending it again, or a lease that never was, changes nothing."""
    leases = Leases(index, 10.0)
    node = index.node(LAYOUT.id, chain("path", 3)[-1])
    first, second = leases.take([(node, "warm")], 0.0), leases.take([(node, "warm")], 5.0)
    assert leases.take([], 0.0) == 0
    assert (len(leases), index.pins("warm")) == (2, 2)
    assert leases.expire(9.9) == 0
    assert leases.expire(10.0) == 1
    leases.release(first)
    leases.release(0)
    leases.release(99)
    assert (len(leases), index.pins("warm")) == (1, 1)
    leases.release(second)
    leases.release(second)
    assert (len(leases), index.pins("warm")) == (0, 0)
    assert index.victim("warm") != NO_NODE


def test_least_recent_asks_for_the_time_of_use_alone():
    """The policy's priority is the time of last use, whatever the depth."""
    assert LeastRecent().priority(Candidate(5.0, 1)) == LeastRecent().priority(Candidate(5.0, 900)) == 5.0


# -- the store's promises to careless callers --------------------------------------------------------------------------


def test_blocks_of_unequal_size_are_the_callers_mistake(make_store):
    """Blocks of one save that differ in size raise ValueError, and nothing stays pinned, in flight or half stored."""
    store, keys = make_store(), chain("prompt", 3)
    save(store, keys[:1])
    pieces = [[np.zeros(BLOCK_BYTES, np.uint8)], [np.zeros(BLOCK_BYTES + 1, np.uint8)]]
    with pytest.raises(ValueError, match="one size"):
        store.save(LAYOUT, keys, pieces, start=1)
    assert ask(store, keys).reasons == [(1, 3, "never_seen")]
    store.check_integrity()
    assert save(store, keys).outcomes == [Outcome.HIT] * 3


def test_a_match_that_fails_takes_no_lease(make_store):
    """If planning itself goes wrong nothing stays leased, and the next match works."""
    store, keys = make_store(), chain("prompt", 3)
    save(store, keys)
    recompute = store.costs.recompute
    store.costs.recompute = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        store.match([LAYOUT], keys, prompt_tokens=999)
    store.costs.recompute = recompute
    assert len(store._books.leases) == 0
    assert ask(store, keys).blocks == 3
    store.check_integrity()


def test_no_copy_is_made_under_the_lock(make_store):
    """While memory copies blocks, in or out, and while a tier writes, another request can be matched."""
    store = make_store(ScriptedTier())
    keys, other = chain("prompt", 2), chain("other", 2)
    save(store, other)
    answered = []

    def match_beside(call):
        def called(*args: object) -> object:
            beside = threading.Thread(target=lambda: answered.append(ask(store, other, probing).blocks))
            beside.start()
            beside.join(GUARD_SECONDS)
            return call(*args)

        return called

    probing = make_layout("probing")  # held by nobody, so that a probe does not load
    cold = store._books.tiers["cold"]
    store._warm.save, store._warm.load = match_beside(store._warm.save), match_beside(store._warm.load)
    cold.on_save = match_beside(lambda _: None)
    save(store, keys)
    assert ask(store, keys).blocks == 2
    del store._warm.save, store._warm.load
    assert answered == [0, 0, 0]


class Trouble:
    """Raises, refuses or damages now and then, by a seed."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._lock = threading.Lock()

    def _chance(self) -> float:
        with self._lock:
            return float(self._rng.random())

    def maybe_raise(self, _: object) -> None:
        if self._chance() < 0.1:
            raise OSError("planted")

    def maybe_refuse(self, keys) -> tuple[int, Outcome]:
        refusal = [Outcome.LATE, Outcome.FULL, Outcome.FAILED][int(self._chance() * 3)]
        return (int(self._chance() * len(keys)), refusal) if self._chance() < 0.3 else (len(keys), Outcome.LATE)

    def maybe_fail(self, outcomes: list[Outcome]) -> list[Outcome]:
        if self._chance() < 0.1:
            return [Outcome.LATE if self._chance() < 0.5 else outcome for outcome in outcomes]
        return outcomes


@pytest.mark.parametrize("seed", range(4))
def test_many_threads_and_a_tier_in_trouble(make_store, seed):
    """Threads beside a tier that raises, refuses and is late: right bytes, all jobs done, no pin left, books add up."""
    trouble = Trouble(seed)
    cold = ScriptedTier(capacity_blocks=60, on_save=trouble.maybe_raise, on_load=trouble.maybe_raise)
    cold.answer = trouble.maybe_fail
    cold.refuse = trouble.maybe_refuse
    store = make_store(cold, blocks=40, lease_seconds=1e9)
    paths = [chain(f"branch {number}", 10, behind=chain("trunk", 5)) for number in range(10)]
    failures: list[Exception] = []

    def work(number: int) -> None:
        rng = np.random.default_rng((seed, number))
        try:
            for _ in range(60):
                keys = paths[rng.integers(10)][: rng.integers(16)]
                assert store.save(LAYOUT, keys, contents(LAYOUT, keys)).wait(GUARD_SECONDS)
                ask(store, paths[rng.integers(10)])
                if rng.random() < 0.2:
                    assert store.prefetch([LAYOUT], keys, store._clock.now() + 1).wait(GUARD_SECONDS)
                if rng.random() < 0.3:
                    store._clock.sleep(1.0)
        except Exception as failure:  # noqa: BLE001  # whatever it is, the test fails below
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * GUARD_SECONDS)
    assert not failures
    assert store.flush(GUARD_SECONDS)
    store.check_integrity()
