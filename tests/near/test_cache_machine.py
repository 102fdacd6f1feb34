"""The cache against a model of it: a dict of values, ends and generations."""

from __future__ import annotations

import math
import threading
from random import Random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from thermocline.clock import ManualClock
from thermocline.near import Cache
from thermocline.near.cache import ENTRY_BYTES

KEYS = st.integers(0, 11)
MAX_AGE_SECONDS = 50.0
ROOM = 8 * ENTRY_BYTES
WAIT_SECONDS = 30.0


class Machine(RuleBasedStateMachine):
    """Every operation in any order, time moving between them."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.cache = Cache(ROOM, clock=self.clock, max_age_seconds=MAX_AGE_SECONDS, entry_bytes_max=4 * ENTRY_BYTES)
        self.model: dict[int, tuple[int, float]] = {}
        self.fetched: dict[int, tuple[int, int]] = {}  # key: generation and the number of drops when it was read
        self.drops = dict.fromkeys(range(12), 0)
        self.value = 0

    @rule(key=KEYS, ttl=st.one_of(st.none(), st.floats(0.0, 80.0)), size=st.integers(0, 5 * ENTRY_BYTES))
    def put(self, key, ttl, size):
        self.value += 1
        kept = self.cache.put(key, self.value, ttl_seconds=ttl, weight_bytes=size)
        age = min(MAX_AGE_SECONDS, math.inf if ttl is None else ttl)
        assert kept == (age > 0 and size <= 3 * ENTRY_BYTES)
        self.drops[key] += 1
        self._model(key, age, kept=kept)

    @rule(key=KEYS)
    def begin_to_fetch(self, key):
        self.fetched[key] = self.cache.generation(key), self.drops[key]

    @rule(key=KEYS)
    def store_what_was_fetched(self, key):
        if key not in self.fetched:
            return
        generation, drops = self.fetched[key]
        self.value += 1
        kept = self.cache.put(key, self.value, generation=generation)
        assert kept == (drops == self.drops[key])
        if kept:
            self._model(key, MAX_AGE_SECONDS, kept=True)

    @rule(keys=st.lists(KEYS, max_size=4))
    def drop(self, keys):
        self.cache.drop(keys)
        for key in keys:
            self.drops[key] += 1
            self.model.pop(key, None)

    @rule()
    def clear(self):
        self.cache.clear()
        self.drops = {key: count + 1 for key, count in self.drops.items()}
        self.model.clear()

    @rule(seconds=st.floats(0.0, 30.0))
    def time_passes(self, seconds):
        self.clock.sleep(seconds)

    @rule(key=KEYS)
    def get(self, key):
        value, end = self.model.get(key, (None, 0.0))
        found = self.cache.get(key)
        assert found is None or found == value, "an older value than the last one"
        assert found is None or self.clock.now() < end, "a value past its age"
        entry = self.cache.entries.get(key)
        assert (found is not None) == (entry is not None and self.clock.now() < end), "a value that is held is found"

    @invariant()
    def bytes_add_up(self):
        entries = self.cache.entries
        assert self.cache.nbytes == sum(entry.weight_bytes for entry in entries.values()) <= ROOM
        assert set(entries) <= set(self.model)
        assert len(self.cache._rule) == len(entries)
        stats = self.cache.stats()
        assert stats.entries == len(self.cache) == len(entries)

    def _model(self, key, age, *, kept):
        if kept:
            self.model[key] = self.value, self.clock.now() + age
        else:
            self.model.pop(key, None)


TestMachine = Machine.TestCase
TestMachine.__doc__ = "Bytes stay bounded and add up, ages are exact, nothing overtaken is stored, whatever the order."
TestMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_threads_keep_the_books():
    """Eight threads that read, write, drop and load at once leave bytes that add up and never see a wrong value."""
    cache = Cache(50 * ENTRY_BYTES, entry_bytes_max=10 * ENTRY_BYTES)
    wrong: list[object] = []

    def work(seed):
        random = Random(seed)  # noqa: S311  # a seed, no secret
        try:
            for _ in range(1_500):
                key = int(120 * random.random() ** 2)
                choice = random.random()
                if choice < 0.6:
                    found = cache.get(key)
                elif choice < 0.75:
                    found = cache.get_or_load(key, lambda key=key: ("of", key))
                elif choice < 0.95:
                    cache.put(key, ("of", key), weight_bytes=random.randrange(4 * ENTRY_BYTES))
                    continue
                else:
                    cache.drop([key, key + 1])
                    continue
                if found not in {None, ("of", key)}:
                    wrong.append(found)
        except BaseException as error:
            wrong.append(error)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_SECONDS)
    assert wrong == []
    assert cache.nbytes == sum(entry.weight_bytes for entry in cache.entries.values()) <= cache.bytes_max
    assert len(cache._rule) == len(cache.entries)
    assert not cache._flights
