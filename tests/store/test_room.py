"""Room and its end: eviction, leases, back-pressure, and what close still brings down."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from tests.store.making import BLOCK_BYTES, GUARD_SECONDS, LAYOUT, ScriptedTier, ask, chain, contents, save
from thermocline.tiers.tier import Outcome

MIB = 1024 * 1024


# -- room --------------------------------------------------------------------------------------------------------------


def test_eviction_under_pressure_keeps_the_laws(make_store, make_disk):
    """Ten times as much as both tiers hold: usage stays bounded, integrity holds, the last prompt is there."""
    store = make_store(make_disk(capacity_bytes=2 * MIB, queue_bytes=MIB // 2), blocks=40)
    for number in range(200):
        keys = chain(f"prompt {number}", 20, behind=chain("system", 4))
        save(store, keys)
        for usage in store.usage().values():
            assert usage.used_bytes <= usage.capacity_bytes
    assert ask(store, keys).blocks == 24
    store.check_integrity()


def test_room_on_a_full_disk_is_made_before_a_save(make_store, make_disk, monkeypatch):
    """A path that goes down to a full disk is one save there: what has to go goes first."""
    disk = make_disk(capacity_bytes=2 * MIB)
    store = make_store(disk, blocks=600)
    for number in range(20):
        save(store, chain(f"prompt {number}", 24))
    assert disk.shortfall(BLOCK_BYTES, 24) > 0, "it is full"
    taken, whole = [], disk.save
    monkeypatch.setattr(disk, "save", lambda *how: taken.append(len(how[1])) or whole(*how))
    job = save(store, chain("last", 24))
    assert job.wait(GUARD_SECONDS)
    assert taken == [24]
    assert disk.usage().blocks > 24
    store.check_integrity()


def test_a_prompt_larger_than_memory_keeps_its_beginning(make_store):
    """Of a prompt that memory cannot hold the beginning is kept and written down; the rest is FULL and NOT_ADMITTED."""
    cold = ScriptedTier()
    store, keys = make_store(cold, blocks=16), chain("prompt", 40)
    save(store, chain("other", 10))
    job = save(store, keys)
    assert job.outcomes == [Outcome.HIT] * 16 + [Outcome.FULL] * 24
    assert store.usage()["memory"].blocks == 16
    assert cold.written[10:] == keys[:16]
    answer = ask(store, keys)
    assert (answer.blocks, answer.reasons) == (16, [(16, 40, "not_admitted")])
    store.check_integrity()


def test_making_room_for_its_end_spares_a_prompts_beginning(make_store, clock):
    """A save that extends the least recently used path evicts other paths, not the one it extends."""
    store, keys = make_store(blocks=16), chain("prompt", 12)
    save(store, keys[:6])
    clock.sleep(1)
    save(store, chain("younger", 10))
    job = save(store, keys, start=6)
    assert job.outcomes == [Outcome.HIT] * 6
    assert ask(store, keys).blocks == 12
    store.check_integrity()


def test_a_small_save_evicts_few_blocks(make_store):
    """One more block in a full memory costs a small batch of old ones, not a large part of a small memory."""
    store = make_store(blocks=64)
    save(store, chain("old", 64))
    save(store, chain("new", 1))
    assert store.usage()["memory"].blocks >= 60


def test_a_lease_protects_its_blocks_until_it_is_released(make_store, clock):
    """A planned path stays in memory under any pressure while its lease lasts, and may go once it is released."""
    store, keys = make_store(blocks=16), chain("leased", 8)
    save(store, keys)
    plan = store.match([LAYOUT], keys, prompt_tokens=999)
    for number in range(8):
        save(store, chain(f"pressure {number}", 8))
    into = [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in keys]
    assert store.load(plan, 0, into).by_tier == {"memory": 8}
    store.release(plan.lease)
    store.release(plan.lease)
    clock.sleep(1)
    for number in range(8):
        save(store, chain(f"more pressure {number}", 8))
    assert ask(store, keys).blocks == 0
    store.check_integrity()


def test_a_forgotten_lease_runs_out(make_store, clock):
    """A lease that nobody releases stops protecting its blocks when its time is up, even if nothing is matched."""
    store, keys = make_store(blocks=16, lease_seconds=5.0), chain("leased", 16)
    save(store, keys)
    plan = store.match([LAYOUT], keys, prompt_tokens=999)
    assert save(store, chain("too early", 4)).outcomes == [Outcome.FULL] * 4
    clock.sleep(6)
    assert save(store, chain("later", 4)).outcomes == [Outcome.HIT] * 4
    store.release(plan.lease)
    store.check_integrity()


def test_recency_decides_what_goes_first(make_store, clock):
    """Under pressure the prompt that was matched last survives, whichever was saved last."""
    store = make_store(blocks=16)
    first, second = chain("first", 6), chain("second", 6)
    for keys in (first, second):
        clock.sleep(1)
        save(store, keys)
    clock.sleep(1)
    ask(store, first)
    clock.sleep(1)
    save(store, chain("third", 8))
    assert ask(store, first).blocks == 6
    assert ask(store, second).blocks < 6


def test_being_written_down_is_no_use(make_store, clock):
    """Copying a path to a colder tier does not make it look recently used: it is still the first to go from memory."""
    cold = ScriptedTier(holding=True)
    store = make_store(cold, blocks=16)
    old, young = chain("old", 6), chain("young", 6)
    for keys in (old, young):
        store.save(LAYOUT, keys, contents(LAYOUT, keys))
        clock.sleep(1)
    (*waiting,) = cold.waiting
    for write in reversed(waiting):
        cold.waiting[:] = [write]
        cold.finish()
        clock.sleep(1)
    cold.holding = False
    save(store, chain("new", 8))
    index = store._books.index
    assert index.covered(LAYOUT.id, young, "memory") == 6
    assert index.covered(LAYOUT.id, old, "memory") < 6


def test_a_disk_that_is_full_makes_room(make_store, clock):
    """A full colder tier loses its oldest paths to what is written down now."""
    cold = ScriptedTier(capacity_blocks=20)
    store = make_store(cold)
    for number in range(5):
        clock.sleep(1)
        save(store, chain(f"prompt {number}", 10))
    assert set(chain("prompt 4", 10)) <= {key for _, key in cold.blocks}
    assert store.usage()["cold"].blocks <= 20
    store.check_integrity()


def test_making_room_on_disk_spares_the_path_that_is_written(make_store, clock):
    """Where the path's own beginning is the oldest on a full disk, its end still finds it there."""
    cold = ScriptedTier(capacity_blocks=12)
    store = make_store(cold)
    keys = chain("prompt", 10)
    save(store, keys[:4])
    clock.sleep(1)
    save(store, chain("younger", 8))
    save(store, keys, start=4)
    assert store._books.index.covered(LAYOUT.id, keys, "cold") == 10
    store.check_integrity()


# -- back-pressure -----------------------------------------------------------------------------------------------------


def late_after(count: int) -> Callable[..., tuple[int, Outcome]]:
    """Back-pressure: so many blocks of each save are taken, the others are LATE."""
    return lambda keys: (min(count, len(keys)), Outcome.LATE)


def test_back_pressure_drops_and_counts(make_store):
    """What the colder tier cannot take now is dropped at once and counted; memory has it, and the job ends."""
    cold = ScriptedTier(refuse=late_after(2))
    store, keys = make_store(cold), chain("prompt", 5)
    save(store, keys)
    assert cold.written == keys[:2]
    assert store.metrics.value("save_blocks_total", (("tier", "cold"), ("outcome", "late"))) == 3
    assert ask(store, keys).blocks == 5
    store.check_integrity()


def test_what_was_dropped_is_written_with_what_follows_it(make_store):
    """The next save of a path also writes what back-pressure dropped of its beginning."""
    cold = ScriptedTier(refuse=late_after(2))
    store, keys = make_store(cold), chain("prompt", 7)
    save(store, keys[:5])
    cold.refuse = None
    save(store, keys)
    assert cold.written == keys


def test_what_was_dropped_is_handed_down_before_it_is_evicted(make_store, clock):
    """Leaves that only memory has are written down ahead of their eviction, so little is lost once pressure ends."""
    cold = ScriptedTier(refuse=late_after(0))
    store = make_store(cold, blocks=64)
    for number in range(8):
        save(store, chain(f"dropped {number}", 8))
        clock.sleep(1)
    cold.refuse = None
    for number in range(8):
        save(store, chain(f"later {number}", 8))
        clock.sleep(1)
    handed = [number for number in range(8) if chain(f"dropped {number}", 8)[-1] in cold.written]
    assert len(handed) >= 6
    store.check_integrity()


def test_close_hands_down_what_was_dropped(make_store, make_disk):
    """What back-pressure dropped is brought to disk by close, also if only a little at a time is taken."""
    disk = make_disk(queue_bytes=4 * 2 * BLOCK_BYTES)
    store = make_store(disk)
    paths = [chain(f"prompt {number}", 30) for number in range(5)]
    for keys in paths:
        save(store, keys)
    assert store.usage()["disk"].blocks < 150
    store.close()
    again = make_store(make_disk())
    assert [ask(again, keys).blocks for keys in paths] == [30] * 5
    again.check_integrity()


def test_close_keeps_what_was_used_last(make_store, clock):
    """Where the colder tier cannot hold all that only memory has, close leaves it with what was used last."""
    cold = ScriptedTier(capacity_blocks=20, refuse=late_after(0))
    store = make_store(cold)
    paths = [chain(f"prompt {number}", 10) for number in range(6)]
    for keys in paths:
        save(store, keys)
        clock.sleep(1)
    for keys in (paths[1], paths[0]):
        ask(store, keys)
        clock.sleep(1)
    cold.refuse = None
    store.close()
    assert {key for _, key in cold.blocks} == {*paths[1], *paths[0]}


def test_close_gives_up_on_a_tier_that_takes_nothing(make_store, monkeypatch):
    """A colder tier that is always busy does not keep close from ending."""
    monkeypatch.setattr("thermocline.store.mover.DRAIN_WAITS_MAX", 2)
    cold = ScriptedTier(refuse=late_after(0))
    store = make_store(cold)
    save(store, chain("prompt", 3))
    store.close()
    assert cold.closed == 1


def test_everything_is_harmless_after_close(make_store, make_disk, clock):
    """After close nothing is matched, loaded, saved or promoted, nothing raises, and every job is done."""
    store, keys = make_store(make_disk()), chain("prompt", 4)
    save(store, keys)
    plan = store.match([LAYOUT], keys, prompt_tokens=999)
    assert store.prefetch([LAYOUT], keys, clock.now() + 9).wait(GUARD_SECONDS)
    store.close()
    store.close()
    loaded = store.load(plan, 0, [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in keys])
    assert (loaded.blocks, [part.reason for part in loaded.missing]) == (0, ["tier_down"])
    store.release(plan.lease)
    assert store.match([LAYOUT], keys, prompt_tokens=999).blocks == 0
    assert save(store, chain("late", 3)).outcomes == [Outcome.FAILED] * 3
    assert store.prefetch([LAYOUT], keys, clock.now() + 9).wait(GUARD_SECONDS)
    assert store.unsaved(LAYOUT, keys) == 4
    assert store.flush(0.0)
    store.measure()
    assert store.usage()["memory"].blocks == 4


def test_a_prefetch_under_way_ends_with_close(make_store, clock):
    """Close ends prefetches that wait or run: each of their jobs is done."""
    reading, go_on = threading.Event(), threading.Event()
    cold = ScriptedTier(refuse=late_after(100))
    store = make_store(cold, blocks=16)
    keys = chain("prompt", 10)
    save(store, keys)
    save(store, chain("other", 16))

    def wait(_: object) -> None:
        reading.set()
        go_on.wait(GUARD_SECONDS)

    cold.on_load = wait
    jobs = [store.prefetch([LAYOUT], keys, clock.now() + 10) for _ in range(3)]
    assert reading.wait(GUARD_SECONDS)
    closing = threading.Thread(target=store.close)
    closing.start()
    go_on.set()
    assert all(job.wait(GUARD_SECONDS) for job in jobs)
    closing.join(GUARD_SECONDS)
    assert not closing.is_alive()


def test_too_many_prefetches_are_refused(make_store, clock):
    """Prefetches are bounded: beyond that a job ends at once with LATE."""
    go_on = threading.Event()
    cold = ScriptedTier()
    store = make_store(cold, blocks=16)
    keys = chain("prompt", 10)
    save(store, keys)
    save(store, chain("other", 16))
    cold.on_load = lambda _: go_on.wait(GUARD_SECONDS)
    jobs = [store.prefetch([LAYOUT], keys, clock.now() + 10) for _ in range(80)]
    assert jobs[-1].done
    assert jobs[-1].outcomes == [Outcome.LATE] * 10
    go_on.set()
    assert all(job.wait(GUARD_SECONDS) for job in jobs)
