"""Tiers that are damaged, late, full of errors or break their promises: never a wrong byte, never a raised error."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from tests.store.making import (
    BLOCK_BYTES,
    GUARD_SECONDS,
    LAYOUT,
    ScriptedTier,
    ask,
    chain,
    contents,
    flip_in_memory,
    flip_on_disk,
    save,
)
from thermocline.clock import SystemClock
from thermocline.store.store import Store
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.tier import Outcome


def raise_error(_: object) -> None:
    """What no tier should do."""
    raise RuntimeError("planted")


# -- damage ------------------------------------------------------------------------------------------------------------


def test_damage_in_memory_falls_back_to_disk(make_store, make_disk):
    """A flipped bit in memory is found on the caller's copy, and the block comes from disk in the same load."""
    store, keys = make_store(make_disk()), chain("prompt", 8)
    save(store, keys)
    flip_in_memory(store, keys[3])
    answer = ask(store, keys)
    assert (answer.blocks, answer.by_tier) == (8, {"memory": 3, "disk": 5})
    assert store.metrics.value("corrupt_blocks_total", (("tier", "memory"),)) == 1
    store.check_integrity()


def test_damage_without_a_second_copy_is_a_reason(make_store):
    """A flipped bit with no other copy ends the load before it with CORRUPT, and so does the next match."""
    store, keys = make_store(), chain("prompt", 8)
    save(store, keys)
    flip_in_memory(store, keys[3])
    answer = ask(store, keys)
    assert (answer.blocks, answer.reasons) == (3, [(3, 8, "corrupt")])
    again = ask(store, keys)
    assert (again.planned, again.reasons) == (3, [(3, 8, "corrupt")])
    store.check_integrity()


def test_a_save_mends_damage_in_memory(make_store):
    """Only the damaged block is stored again; what lay hidden behind it is matched again."""
    store, keys = make_store(), chain("prompt", 8)
    save(store, keys)
    flip_in_memory(store, keys[3])
    ask(store, keys)
    before = store.metrics.value("save_bytes_total", (("tier", "memory"),))
    assert store.unsaved(LAYOUT, keys) == 3
    save(store, keys, start=3)
    assert store.metrics.value("save_bytes_total", (("tier", "memory"),)) == before + BLOCK_BYTES
    assert ask(store, keys).blocks == 8
    store.check_integrity()


def test_damage_on_disk_is_recomputed_and_mended(make_store, make_disk, tmp_path):
    """A flipped bit on disk ends the load with CORRUPT; saving what was recomputed also mends the disk."""
    keys = chain("prompt", 8)
    store = make_store(make_disk())
    save(store, keys)
    store.close()
    assert flip_on_disk(tmp_path / "disk", keys[4])
    store = make_store(make_disk())
    assert (ask(store, keys).blocks, ask(store, keys).reasons) == (4, [(4, 8, "corrupt")])
    save(store, keys)
    assert ask(store, keys).by_tier == {"memory": 8}
    store.check_integrity()
    store.close()
    again = make_store(make_disk())
    assert ask(again, keys).by_tier == {"disk": 8}
    again.check_integrity()


def test_the_end_of_a_path_that_vanished_leaves_at_once(make_store):
    """Where a tier lost the end of a path, the index forgets it with the end of the lease, and nothing stays broken."""
    cold = ScriptedTier()
    store, keys = make_store(cold, blocks=16), chain("prompt", 12)
    save(store, keys)
    save(store, chain("other", 16))
    for key in keys[4:]:
        del cold.blocks[LAYOUT.id, key]
    assert ask(store, keys).blocks == 4
    assert store._books.index.broken("cold") == 0
    assert ask(store, keys).reasons == [(4, 12, "evicted")]
    store.check_integrity()


def test_a_block_saved_again_while_it_was_found_damaged_is_kept(make_store):
    """Damage reported late does not take out the good copy that another request has stored meanwhile."""
    store, keys = make_store(), chain("prompt", 3)
    save(store, keys)
    warm, load = store._warm, store._warm.load

    def load_then_mend(*args: object) -> list[Outcome]:
        outcomes = load(*args)
        store._books.lost(LAYOUT.id, keys, outcomes, "memory")
        save(store, keys)
        return outcomes

    flip_in_memory(store, keys[2])
    warm.load = load_then_mend
    assert ask(store, keys).blocks == 2
    del warm.load
    assert ask(store, keys).blocks == 3
    store.check_integrity()


# -- lateness ----------------------------------------------------------------------------------------------------------


class HeldRead:
    """Stands in for `os.preadv`: reads only when it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go_on, self.preadv = threading.Event(), __import__("os").preadv
        monkeypatch.setattr("thermocline.tiers.segments.os.preadv", self.read)

    def read(self, *args: object) -> int:
        """Read, later."""
        self.go_on.wait(GUARD_SECONDS)
        return self.preadv(*args)


def test_a_late_disk_is_left_alone(tmp_path, monkeypatch):
    """With a disk that hangs a load returns with LATE, and nothing writes into the caller's pieces afterwards."""
    keys = chain("prompt", 6)
    clock = SystemClock()
    store = Store(MemoryTier(1 << 20), [DiskTier(tmp_path, 1 << 24)], clock=clock)
    save(store, keys)
    store.close()
    held = HeldRead(monkeypatch)
    store = Store(MemoryTier(1 << 20), [DiskTier(tmp_path, 1 << 24)], clock=clock, load_seconds_max=0.05)
    plan = store.match([LAYOUT], keys, prompt_tokens=999)
    assert plan.blocks == 6
    into = [[np.full(BLOCK_BYTES, 7, np.uint8)] for _ in keys]
    loaded = store.load(plan, 0, into)
    assert (loaded.blocks, [part.reason for part in loaded.missing]) == (0, ["late"])
    held.go_on.set()
    store.release(plan.lease)
    store.close()
    assert all((pieces[0] == 7).all() for pieces in into)


@pytest.fixture
def two_tiers(make_store):
    """A store whose `cold` tier has a prompt that memory has lost, and that prompt."""
    cold = ScriptedTier()
    store, keys = make_store(cold, blocks=16), chain("prompt", 12)
    save(store, keys)
    save(store, chain("other", 16))
    assert store.unsaved(LAYOUT, keys) == 0
    return store, cold, keys


def test_a_tier_that_is_not_asked_in_time_is_not_blamed(two_tiers, clock):
    """Where the planned tier used up all the time, the others are not asked, and nothing counts against them."""
    store, cold, keys = two_tiers
    save(store, keys)  # in memory again
    for _ in range(9):
        plan = store.match([LAYOUT], keys, prompt_tokens=999)
        flip_in_memory(store, keys[0])
        cold.on_load = lambda _: pytest.fail("asked behind the deadline")
        load = store._warm.load

        def slow(*args: object, load=load) -> list[Outcome]:
            outcomes = load(*args)
            clock.sleep(100)
            return outcomes

        store._warm.load = slow
        assert store.load(plan, 0, [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in keys]).blocks == 0
        del store._warm.load
        store.release(plan.lease)
        save(store, keys)
    assert store.metrics.value("tier_failures_total", (("tier", "cold"),)) == 0


@pytest.mark.parametrize("seconds", [0.0, 0.001])
def test_a_load_that_is_given_no_time_counts_against_nobody(make_store, seconds):
    """A load whose time is up before it begins is LATE at once, and no tier is blamed for that."""
    store, keys = make_store(), chain("prompt", 4)
    save(store, keys)
    load = store._warm.load
    store._warm.load = lambda *args: load(*args) if seconds == 0.0 else [Outcome.LATE] * 4
    for _ in range(5):
        plan = replace(store.match([LAYOUT], keys, prompt_tokens=999), load_seconds_max=seconds)
        loaded = store.load(plan, 0, [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in keys])
        assert (loaded.blocks, [part.reason for part in loaded.missing]) == (0, ["late"])
        store.release(plan.lease)
    del store._warm.load
    assert ask(store, keys).blocks == 4
    assert store.metrics.value("tier_failures_total", (("tier", "memory"),)) == 0


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [lambda _: [Outcome.FAILED] * 12, lambda _: [], lambda _: [Outcome.HIT] * 13])
def test_a_failing_load_is_a_value(two_tiers, answer):
    """Blocks that a tier fails to read, or answers nonsense about, are not loaded, with TIER_DOWN as the reason."""
    store, cold, keys = two_tiers
    cold.answer = answer
    result = ask(store, keys)
    assert (result.blocks, result.reasons) == (0, [(0, 12, "tier_down")])


def test_a_tier_that_raises_in_a_load_does_no_harm(two_tiers):
    """An exception inside a tier is a failed load, logged and counted, never the caller's exception."""
    store, cold, keys = two_tiers
    cold.on_load = raise_error
    assert ask(store, keys).reasons == [(0, 12, "tier_down")]
    assert store.metrics.value("tier_failures_total", (("tier", "cold"),)) == 1
    cold.on_load = lambda _: None
    assert ask(store, keys).blocks == 12


def test_the_breaker_spares_requests_a_failing_tier(two_tiers, clock):
    """After failures in a row a tier is not planned for; it is tried in the background, and success brings it back."""
    store, cold, keys = two_tiers
    cold.on_load = raise_error
    for _ in range(3):
        assert ask(store, keys).planned == 12
    assert ask(store, keys).planned == 0
    assert ask(store, keys).reasons == [(0, 12, "tier_down")]
    store.measure()
    assert store.metrics.value("breaker_open", (("tier", "cold"),)) == 1
    tried, answered = threading.Event(), threading.Event()

    def slow(_: object) -> None:
        tried.set()
        assert answered.wait(GUARD_SECONDS)

    cold.on_load = slow
    assert ask(store, keys).planned == 0
    assert not tried.is_set(), "tried before its time"
    clock.sleep(1.5)
    assert ask(store, keys).planned == 0, "a request waits for a trial"
    assert tried.wait(GUARD_SECONDS)
    assert ask(store, keys).planned == 0  # while that one has not come back
    answered.set()
    deadline = SystemClock().now() + GUARD_SECONDS
    while ask(store, keys).blocks < 12:
        assert SystemClock().now() < deadline, "it is left alone for ever"


def test_writes_that_succeed_do_not_hide_reads_that_hang(two_tiers):
    """A tier that takes every save but fails every load is set aside all the same."""
    store, cold, keys = two_tiers
    cold.on_load = raise_error
    for number in range(3):
        ask(store, keys)
        save(store, chain(f"new {number}", 2))
    assert ask(store, keys).reasons == [(0, 12, "tier_down")]
    assert len(cold.blocks) == 34


def test_a_tier_that_is_set_aside_is_no_fallback(two_tiers):
    """A load that misses a block in memory does not turn to a tier whose breaker is open."""
    store, cold, keys = two_tiers
    cold.on_load = raise_error
    for _ in range(3):
        ask(store, keys)
    save(store, keys)
    cold.on_load = lambda _: pytest.fail("asked while set aside")
    flip_in_memory(store, keys[5])
    answer = ask(store, keys)
    assert (answer.blocks, answer.reasons) == (5, [(5, 12, "corrupt")])


def test_a_tier_that_raises_in_a_save_does_no_harm(make_store):
    """An exception in a save leaves the block in memory, ends the job, and leaves no pin and nothing in flight."""
    cold = ScriptedTier(on_save=raise_error)
    store, keys = make_store(cold), chain("prompt", 4)
    save(store, keys)
    assert store.flush(0.0)
    assert ask(store, keys).blocks == 4
    assert store.metrics.value("save_blocks_total", (("tier", "cold"), ("outcome", "failed"))) == 4
    store.check_integrity()


def test_a_tier_that_raises_after_it_made_room_does_no_harm(make_store, clock):
    """An exception in the second part of a save leaves what the first part stored, and nothing in flight."""
    cold = ScriptedTier(capacity_blocks=6)
    store = make_store(cold)
    save(store, chain("old", 4))
    clock.sleep(1)
    cold.on_save = lambda keys: raise_error(keys) if len(keys) < 5 else None
    keys = chain("prompt", 5)
    save(store, keys)
    assert cold.holds(LAYOUT.id, keys) == [True, True, False, False, False]
    assert store.flush(0.0)
    store.check_integrity()


def test_a_write_that_fails_is_taken_back(make_store):
    """A colder tier that fails a write holds none of it, neither in the books nor in its room."""
    cold = ScriptedTier(holding=True)
    store, keys = make_store(cold), chain("prompt", 4)
    job = store.save(LAYOUT, keys, contents(LAYOUT, keys))
    cold.finish(Outcome.FAILED)
    assert job.wait(GUARD_SECONDS)
    assert store._books.index.blocks("cold") == 0
    store.check_integrity()
    cold.holding = False


def test_a_write_that_fails_after_it_was_visible_is_taken_back(make_store):
    """Blocks that were visible on a colder tier and could not be made durable are not promised any more."""
    cold = ScriptedTier(holding=True)
    store, keys = make_store(cold), chain("prompt", 4)
    job = store.save(LAYOUT, keys, contents(LAYOUT, keys))
    cold.finish(after_visible=Outcome.FAILED)
    assert job.wait(GUARD_SECONDS)
    assert (store._books.index.blocks("cold"), store._books.index.broken("cold")) == (0, 0)
    assert ask(store, keys).by_tier == {"memory": 4}
    store.check_integrity()
    cold.holding = False
    save(store, chain("longer", 1, behind=keys))
    assert len(cold.blocks) == 5


def test_what_is_lost_before_it_is_entered_is_not_entered(make_store):
    """A block that a tier lost between storing it and saying so is not held for held: books and tier agree."""
    cold = ScriptedTier(holding=True)
    store, keys = make_store(cold), chain("prompt", 4)
    store.save(LAYOUT, keys, contents(LAYOUT, keys))
    layout, names, blocks, job = cold.waiting.pop()
    cold.reserved = 0
    kept = [(at, block) for at, block in enumerate(blocks) if at != 2]  # another request found this one damaged
    cold.blocks = {(layout, names[at]): (b"".join(map(bytes, block.pieces)), block.sum) for at, block in kept}
    job.outcomes[:] = [Outcome.HIT] * 4
    job.set_visible()
    job.set_done()
    assert store.flush(0.0)
    store.check_integrity()
    assert store._books.index.covered(LAYOUT.id, keys, "cold") == 2
    cold.holding = False


def test_a_write_whose_beginning_failed_is_taken_back(make_store):
    """Where the beginning of a path could not be written, its end, written meanwhile, does not stay in the way."""
    cold = ScriptedTier(holding=True)
    store, keys = make_store(cold), chain("prompt", 5)
    jobs = [store.save(LAYOUT, keys[:2], contents(LAYOUT, keys[:2]))]
    jobs.append(store.save(LAYOUT, keys, contents(LAYOUT, keys)))
    (*waiting,) = cold.waiting
    assert [len(write[1]) for write in waiting] == [2, 3]  # what is being written is not written twice
    for write, outcome in zip(waiting, (Outcome.FAILED, Outcome.HIT), strict=True):
        cold.waiting[:] = [write]
        cold.finish(outcome)
    assert all(job.wait(GUARD_SECONDS) for job in jobs)
    assert cold.usage().blocks == 0
    store.check_integrity()
    cold.holding = False


def test_writes_to_a_failing_tier_are_spared_too(make_store, clock):
    """After failed writes in a row a tier is not written to for a while; what memory has it gets later."""
    cold = ScriptedTier(on_save=raise_error)
    store, keys = make_store(cold), chain("prompt", 6)
    for count in range(1, 4):
        save(store, keys[:count])
    cold.on_save = lambda _: pytest.fail("written to while set aside")
    save(store, keys[:4])
    clock.sleep(1.5)
    cold.on_save = lambda _: None
    save(store, keys)
    assert cold.written == keys


def test_a_prefetch_survives_a_tier_that_raises(two_tiers):
    """A prefetch from a tier that raises ends with MISS, and the next one still works."""
    store, cold, keys = two_tiers
    cold.on_load = raise_error
    job = store.prefetch([LAYOUT], keys, store._clock.now() + 10)
    assert job.wait(GUARD_SECONDS)
    assert job.outcomes == [Outcome.MISS] * 12
    cold.on_load = lambda _: None
    job = store.prefetch([LAYOUT], keys, store._clock.now() + 10)
    assert job.wait(GUARD_SECONDS)
    assert job.outcomes == [Outcome.HIT] * 12
    store.check_integrity()


def test_a_prefetch_leaves_a_tier_that_is_set_aside_alone(two_tiers):
    """Prefetch keeps to the breaker, and what it meets counts for it."""
    store, cold, keys = two_tiers
    cold.on_load = raise_error
    for _ in range(3):
        assert store.prefetch([LAYOUT], keys, store._clock.now() + 10).wait(GUARD_SECONDS)
    cold.on_load = lambda _: pytest.fail("asked while set aside")
    assert store.prefetch([LAYOUT], keys, store._clock.now() + 10).wait(GUARD_SECONDS)
    assert ask(store, keys).reasons == [(0, 12, "tier_down")]


def test_close_goes_on_where_a_tier_cannot_be_closed(make_store, make_disk, tmp_path):
    """A tier that raises in close does not keep the others open."""
    cold, disk = ScriptedTier(), make_disk()
    cold.close = lambda: raise_error(None)
    store, keys = make_store(cold, disk), chain("prompt", 3)
    save(store, keys)
    store.close()
    assert ask(make_store(make_disk()), keys).blocks == 3


def test_too_little_room_to_load_into_is_the_callers_mistake(two_tiers):
    """Fewer blocks to load into than planned raise ValueError at once, and count against no tier."""
    store, _, keys = two_tiers
    plan = store.match([LAYOUT], keys, prompt_tokens=999)
    with pytest.raises(ValueError, match="12 blocks"):
        store.load(plan, 0, [])
    extra = [[np.full(BLOCK_BYTES, 7, np.uint8)] for _ in range(14)]
    assert store.load(plan, 0, extra).blocks == 12
    assert all((pieces[0] == 7).all() for pieces in extra[12:])
    assert store.metrics.value("tier_failures_total", (("tier", "cold"),)) == 0


@pytest.mark.parametrize("failing", ["first", "second"])
def test_two_colder_tiers_fail_apart(make_store, failing):
    """With two colder tiers the failure of one does not keep the other from being written and read."""
    first, second = ScriptedTier("first"), ScriptedTier("second")
    bad, good = (first, second) if failing == "first" else (second, first)
    bad.on_save = bad.on_load = raise_error
    store, keys = make_store(first, second, blocks=16), chain("prompt", 12)
    save(store, keys)
    save(store, chain("other", 16))
    assert good.written[:12] == keys
    assert ask(store, keys).by_tier == {good.name: 12}
    store.check_integrity()
