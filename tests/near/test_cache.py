"""The near cache alone: what it returns, for how long, and what it keeps to."""

from __future__ import annotations

import math
import threading

import pytest

from thermocline.clock import ManualClock
from thermocline.errors import NearError, SettingsError
from thermocline.near import Cache
from thermocline.near.cache import ENTRY_BYTES

ROOM = 1 << 20
WAIT_SECONDS = 20.0


def _cache(**options):
    clock = ManualClock(100.0)
    return Cache(ROOM, clock=clock, **options), clock


def test_a_value_lives_to_its_second():
    """A value is returned until its age is reached, and not at it."""
    cache, clock = _cache()
    assert cache.put("key", b"value", ttl_seconds=5.0)
    clock.sleep(4.999)
    assert cache.get("key") == b"value"
    clock.seconds = 105.0
    assert cache.get("key", "nothing") == "nothing"


def test_the_caches_own_age_is_the_last_bound():
    """No entry outlives `max_age_seconds`, whatever age it was given."""
    cache, clock = _cache(max_age_seconds=2.0)
    cache.put("long", 1, ttl_seconds=60.0)
    cache.put("without", 2)
    clock.sleep(2.0)
    assert cache.get("long") is None
    assert cache.get("without") is None


def test_a_dropped_key_refuses_what_was_being_fetched():
    """What was fetched before a drop is not stored after it, and a later fetch is."""
    cache, _ = _cache()
    seen = cache.generation("key")
    assert cache.drop(["key"]) == 0
    assert not cache.put("key", b"old", generation=seen)
    assert cache.get("key") is None
    assert cache.put("key", b"new", generation=cache.generation("key"))
    assert cache.drop(["key"]) == 1
    assert len(cache) == cache.nbytes == 0


def test_clearing_refuses_what_was_being_fetched():
    """After a clear nothing is held, and nothing fetched before it is stored."""
    cache, _ = _cache()
    cache.put("held", b"1")
    seen = cache.generation("key")
    entries = cache.entries
    cache.clear()
    assert not cache.put("key", b"old", generation=seen)
    assert cache.entries is entries == {}


def test_a_write_overtakes_a_fetch():
    """A value put while another is being fetched is not replaced by the older one."""
    cache, _ = _cache()

    def load():
        cache.put("key", b"new")
        return b"old"

    cache.get_or_load("key", load)
    assert cache.get("key") == b"new"


def test_what_is_refused_leaves_nothing_behind():
    """A value that is too large or too old is not stored, and takes the older value of its key with it."""
    cache, _ = _cache(entry_bytes_max=1000 + ENTRY_BYTES)
    cache.put("key", b"small")
    assert not cache.put("key", bytes(1001))
    assert cache.get("key") is None
    cache.put("key", b"small")
    assert not cache.put("key", b"old", ttl_seconds=0.0)
    assert cache.get("key") is None
    assert cache.stats().refused == 2


def test_expired_entries_make_room_first():
    """What is past its age goes before anything that is still good."""
    cache = Cache(10 * ENTRY_BYTES, clock=(clock := ManualClock()), entry_bytes_max=10 * ENTRY_BYTES)
    cache.put("good", 1)
    for at in range(5):
        cache.put(at, at, ttl_seconds=1.0)
    clock.sleep(1.0)
    for at in range(10, 15):
        cache.put(at, at)
    assert cache.get("good") == 1
    assert cache.stats().expired == 5
    assert cache.stats().evicted == 0


def test_a_herd_loads_once():
    """Sixteen threads that miss one key at once cause one load, and all get what it returned."""
    cache = Cache(ROOM)
    go, loads, results = threading.Barrier(16), [], []

    def load():
        loads.append(1)
        threading.Event().wait(0.05)
        return b"loaded"

    def ask():
        go.wait(WAIT_SECONDS)
        results.append(cache.get_or_load("key", load))

    _together([ask] * 16)
    assert len(loads) == 1
    assert results == [b"loaded"] * 16


def test_a_failed_load_fails_for_all_who_waited():
    """The error of the one load is raised in each thread that waited for it, and the next call loads again."""
    cache = Cache(ROOM)
    loading, errors = threading.Event(), []

    def load():
        loading.set()
        while len(waiting) < 3:
            threading.Event().wait(0.001)
        threading.Event().wait(0.05)
        raise ConnectionError("no server")

    waiting: list[int] = []

    def ask():
        waiting.append(1)
        try:
            cache.get_or_load("key", load)
        except ConnectionError as error:
            errors.append(error)

    _together([ask] * 3)
    assert len(errors) == 3
    assert cache.get_or_load("key", lambda: 7) == 7


def test_waiting_has_an_end():
    """A thread waits no longer than it said for another's load."""
    cache = Cache(ROOM)
    loading, go_on = threading.Event(), threading.Event()

    def load():
        loading.set()
        go_on.wait(WAIT_SECONDS)
        return 1

    leader = threading.Thread(target=lambda: cache.get_or_load("key", load))
    leader.start()
    loading.wait(WAIT_SECONDS)
    with pytest.raises(NearError) as caught:
        cache.get_or_load("key", load, wait_seconds=0.01)
    assert caught.value.hint
    go_on.set()
    leader.join(WAIT_SECONDS)
    assert cache.get("key") == 1


def test_a_load_under_way_is_not_joined_after_a_drop():
    """Who asks after a drop gets a value loaded after it, not that of a load that began before."""
    cache = Cache(ROOM)
    loading, go_on = threading.Event(), threading.Event()

    def old():
        loading.set()
        go_on.wait(WAIT_SECONDS)
        return "old"

    leader = threading.Thread(target=lambda: cache.get_or_load("key", old))
    leader.start()
    loading.wait(WAIT_SECONDS)
    cache.drop(["key"])
    assert cache.get_or_load("key", lambda: "new") == "new"
    go_on.set()
    leader.join(WAIT_SECONDS)
    assert cache.get("key") == "new"


def test_absence_is_kept_for_as_long_as_was_said():
    """None from a loader is kept for its own, shorter time; without one it is not kept."""
    cache, clock = _cache()
    answers = iter([None, None, "there"])
    assert cache.get_or_load("key", lambda: next(answers)) is None
    for _ in range(3):
        assert cache.get_or_load("key", lambda: next(answers), negative_seconds=1.0) is None
    clock.sleep(1.0)
    assert cache.get_or_load("key", lambda: next(answers), negative_seconds=1.0) == "there"


def test_a_stale_value_serves_while_one_load_replaces_it():
    """Past its age and within the grace, the old value is returned at once and one background load replaces it."""
    cache, clock = _cache()
    go_on, loaded = threading.Event(), threading.Event()
    cache.get_or_load("key", lambda: "old", ttl_seconds=1.0, stale_seconds=5.0)
    clock.sleep(1.5)

    def load():
        go_on.wait(WAIT_SECONDS)
        loaded.set()
        return "new"

    assert [cache.get_or_load("key", load, ttl_seconds=1.0, stale_seconds=5.0) for _ in range(3)] == ["old"] * 3
    assert cache.get("key") is None
    go_on.set()
    loaded.wait(WAIT_SECONDS)
    _until(lambda: cache.get("key") == "new")
    clock.sleep(6.0)
    assert cache.get_or_load("key", lambda: "newest", stale_seconds=5.0) == "newest"


def test_a_refresh_that_fails_is_counted_and_the_old_value_serves_on():
    """A background load that fails raises nowhere: it is counted, and the value held serves until its end."""
    cache, clock = _cache()
    cache.get_or_load("key", lambda: "old", ttl_seconds=1.0, stale_seconds=5.0)
    clock.sleep(1.5)
    assert cache.get_or_load("key", lambda: 1 // 0, stale_seconds=5.0) == "old"
    _until(lambda: cache.stats().refreshes_failed == 1)
    assert cache.get_or_load("key", lambda: 1 // 0, stale_seconds=5.0) == "old"
    clock.sleep(5.0)
    with pytest.raises(ZeroDivisionError):
        cache.get_or_load("key", lambda: 1 // 0, stale_seconds=5.0)


def test_early_refresh_follows_its_formula():
    """A value is refreshed early where load_seconds * early * -log(chance) reaches past its end, and only there."""
    chance = [0.5]
    clock = ManualClock()
    cache = Cache(ROOM, clock=clock, chance=lambda: chance[0])

    def load():
        clock.sleep(2.0)
        return "value"

    cache.get_or_load("key", load, ttl_seconds=10.0)
    end, ahead = clock.now() + 10.0, -2.0 * math.log(0.5)
    loads = []
    clock.seconds = end - ahead - 0.001
    cache.get_or_load("key", lambda: loads.append(1), early=1.0)
    assert loads == []
    clock.seconds = end - ahead + 0.001
    assert cache.get_or_load("key", lambda: loads.append(1) or "new", early=1.0, ttl_seconds=10.0) == "value"
    _until(lambda: loads == [1] and cache.get("key") == "new")


@pytest.mark.parametrize("options", [{"bytes_max": 0}, {"bytes_max": 1, "max_age_seconds": 0.0}])
def test_senseless_bounds_are_refused(options):
    """A cache without room or time is a mistake that says what to do."""
    with pytest.raises(SettingsError) as caught:
        Cache(**options)
    assert caught.value.hint


def test_an_unknown_policy_is_refused():
    """A policy that does not exist is refused with the names of those that do."""
    with pytest.raises(SettingsError) as caught:
        Cache(1000, policy="mru")
    assert "lru" in caught.value.hint


def _together(calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
        assert not thread.is_alive()


def _until(true):
    pause = threading.Event()
    for _ in range(2000):
        if true():
            return
        pause.wait(0.01)
    pytest.fail("it never came true")
