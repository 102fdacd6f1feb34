"""The main path: what is saved comes back, from every tier, in every order of events that is no failure."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from tests.store.making import BLOCK_BYTES, GUARD_SECONDS, LAYOUT, ScriptedTier, ask, chain, contents, make_layout, save
from thermocline.clock import ManualClock
from thermocline.store import mover
from thermocline.store.store import Store
from thermocline.tiers.memory import MemoryTier
from thermocline.tiers.tier import Outcome

MIB = 1024 * 1024


def test_memory_gives_back_what_was_saved(make_store):
    """A prompt saved to memory is matched and loaded whole, byte for byte."""
    store, keys = make_store(), chain("prompt", 8)
    save(store, keys)
    answer = ask(store, keys)
    assert (answer.blocks, answer.by_tier, answer.reasons) == (8, {"memory": 8}, [])
    store.check_integrity()


def test_the_longest_prefix_is_matched(make_store):
    """Of a prompt that goes on differently the common beginning is loaded, and the rest has one reason."""
    store, keys = make_store(), chain("prompt", 8)
    save(store, keys)
    answer = ask(store, chain("another end", 4, behind=keys[:5]))
    assert (answer.blocks, answer.reasons) == (5, [(5, 9, "never_seen")])


def test_nothing_is_asked_and_nothing_is_saved(make_store, make_disk, clock):
    """A prompt without a whole block matches nothing, loads nothing, saves nothing, and takes no lease."""
    store = make_store(make_disk())
    plan = store.match([LAYOUT], [], prompt_tokens=3)
    assert (plan.blocks, plan.lease, plan.missing) == (0, 0, ())
    assert store.load(plan, 0, []).blocks == 0
    assert save(store, []).outcomes == []
    assert store.prefetch([LAYOUT], [], clock.now() + 1).wait(GUARD_SECONDS)
    store.check_integrity()


def test_disk_gives_back_what_memory_lost(make_store, make_disk):
    """What memory evicted comes from disk; what memory still has comes from memory, in one plan of two runs."""
    store = make_store(make_disk(), blocks=16)
    first, second = chain("first", 12), chain("second", 12)
    save(store, first)
    save(store, second)
    answer = ask(store, first)
    assert answer.blocks == 12
    assert answer.by_tier == {"memory": 4, "disk": 8}
    store.check_integrity()


def test_a_reopened_disk_gives_back_what_was_saved(make_store, make_disk):
    """After close and reopen everything that was saved is loaded from disk."""
    store, keys = make_store(make_disk()), chain("prompt", 40)
    save(store, keys)
    store.close()
    again = make_store(make_disk())
    answer = ask(again, keys)
    assert (answer.blocks, answer.by_tier) == (40, {"disk": 40})
    again.check_integrity()


def test_a_saved_block_is_matched_before_it_is_durable(make_store):
    """A save is visible when it returns, while the colder tier still writes; its job is done when that is through."""
    cold = ScriptedTier(holding=True)
    store, keys = make_store(cold), chain("prompt", 3)
    job = store.save(LAYOUT, keys, contents(LAYOUT, keys))
    assert (job.visible, job.done) == (True, False)
    assert ask(store, keys).blocks == 3
    assert not store.flush(0.0)
    cold.finish()
    assert job.done
    assert store.flush(0.0)
    assert cold.written == keys
    store.check_integrity()


def test_pieces_that_cannot_be_read_pin_nothing(make_store):
    """A save whose pieces are no memory raises, and what it would have hung on can be evicted as before."""
    store = make_store(blocks=8)
    keys = chain("prompt", 5)
    save(store, keys[:4])
    with pytest.raises(AttributeError):
        store.save(LAYOUT, keys, [["no piece"]], start=4)
    save(store, chain("other", 8))
    assert store.unsaved(LAYOUT, chain("other", 8)) == 8
    store.check_integrity()


def test_the_callers_bytes_are_free_after_a_save(make_store, make_disk):
    """A save copies before it returns: the caller may overwrite its pieces at once, whatever is still being written."""
    store, keys = make_store(make_disk()), chain("prompt", 32)
    pieces = [[piece.copy() for piece in block] for block in contents(LAYOUT, keys)]
    job = store.save(LAYOUT, keys, pieces)
    for block in pieces:
        for piece in block:
            piece[:] = 0
    assert job.wait(GUARD_SECONDS)
    assert ask(store, keys).blocks == 32


def test_only_what_is_not_held_is_taken_in(make_store):
    """A longer prompt saved from its first block stores only its new end, and `unsaved` says where that begins."""
    cold = ScriptedTier()
    store, keys = make_store(cold), chain("prompt", 9)
    save(store, keys[:4])
    assert store.unsaved(LAYOUT, keys) == 4
    save(store, keys)
    assert cold.written == keys
    assert store.metrics.value("save_bytes_total", (("tier", "memory"),)) == 9 * BLOCK_BYTES


def test_a_save_may_begin_where_the_held_path_ends(make_store):
    """Pieces for blocks that are held need not be given: `start` names the first block that is."""
    store, keys = make_store(), chain("prompt", 9)
    save(store, keys[:4])
    assert save(store, keys, start=4).outcomes == [Outcome.HIT] * 5
    assert ask(store, keys).blocks == 9


def test_a_save_behind_a_gap_says_that_it_kept_nothing(make_store):
    """Blocks whose beginning is not held can never match: none is stored, and the job's outcomes say MISS."""
    store, keys = make_store(), chain("prompt", 6)
    save(store, keys[:2])
    assert save(store, keys, start=4).outcomes == [Outcome.MISS] * 2
    assert store.usage()["memory"].blocks == 2
    store.check_integrity()


class SlowMemory(MemoryTier):
    """Memory in which a save waits, in the middle of the copy, until the test lets it go on."""

    def __init__(self, blocks: int, clock: ManualClock) -> None:
        super().__init__(blocks * BLOCK_BYTES, clock=clock)
        self.began, self.go_on, self.saves = threading.Event(), threading.Event(), 0

    def save(self, layout, keys, blocks):
        self.saves += 1
        self.began.set()
        assert self.go_on.wait(GUARD_SECONDS)
        return super().save(layout, keys, blocks)


def test_two_threads_that_save_one_prompt_store_it_once(clock, opened):
    """While one thread copies a prompt in, another that brings the same one stores nothing, and is told PENDING."""
    warm = SlowMemory(64, clock)
    store, keys = Store(warm, clock=clock), chain("prompt", 4)
    opened.append(store)
    first = threading.Thread(target=save, args=(store, keys))
    first.start()
    assert warm.began.wait(GUARD_SECONDS)
    longer = chain("longer", 2, behind=keys)
    job = store.save(LAYOUT, longer, contents(LAYOUT, longer))
    assert job.outcomes == [Outcome.PENDING] * 4 + [Outcome.MISS] * 2
    reasons = ask(store, longer).reasons
    assert reasons == [(0, 4, "pending"), (4, 6, "never_seen")]
    warm.go_on.set()
    first.join(GUARD_SECONDS)
    assert warm.saves == 1
    assert store.usage()["memory"].blocks == 4
    assert ask(store, longer).blocks == 4
    store.check_integrity()


def test_many_threads_at_once_keep_everything_in_order(make_store, make_disk):
    """Threads that save and load overlapping prompts in tiers too small for them never see wrong bytes."""
    store = make_store(make_disk(capacity_bytes=4 * MIB), blocks=48)
    trunk = chain("trunk", 6)
    paths = [chain(f"branch {number}", 10, behind=trunk) for number in range(12)]
    failures: list[Exception] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            for _ in range(40):
                keys = paths[rng.integers(len(paths))]
                store.save(LAYOUT, keys, contents(LAYOUT, keys))
                ask(store, paths[rng.integers(len(paths))])
        except Exception as failure:  # noqa: BLE001  # whatever it is, it is raised again below
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD_SECONDS)
    assert not failures
    assert store.flush(GUARD_SECONDS)
    store.check_integrity()


# -- promotion ---------------------------------------------------------------------------------------------------------


def _only_on_disk(make_store, make_disk, keys):
    """A store that was started anew: what was saved lies on disk."""
    store = make_store(make_disk())
    save(store, keys)
    store.close()
    return make_store(make_disk())


def test_a_prefetch_brings_a_path_into_memory(make_store, make_disk, clock, monkeypatch):
    """Prefetch copies what only disk holds into memory, in several windows, and the next load is from memory alone."""
    monkeypatch.setattr(mover, "WINDOW_BYTES", 16 * BLOCK_BYTES)
    keys = chain("prompt", 40)
    store = _only_on_disk(make_store, make_disk, keys)
    job = store.prefetch([LAYOUT], keys, clock.now() + 10)
    assert job.wait(GUARD_SECONDS)
    assert job.outcomes == [Outcome.HIT] * 40
    assert ask(store, keys).by_tier == {"memory": 40}
    assert store.metrics.value("promoted_blocks_total", (("tier", "memory"),)) == 40
    store.check_integrity()


def test_a_prefetch_is_not_held_up_by_what_is_lent(make_store, make_disk, clock):
    """With all lent that ever is, promotion goes on; and what arrives is summed where no client can write."""
    keys = chain("prompt", 8)
    store = _only_on_disk(make_store, make_disk, keys)
    lent = store.lend(LAYOUT, 1 << 20)
    assert store._warm.lendable(BLOCK_BYTES) == 0
    shared, load, private = store._warm._slab._bytes, store._mover._load, []

    def seen(name, layout, keys, into, deadline):
        private.extend(not np.shares_memory(piece, shared) for block in into for piece in block)
        return load(name, layout, keys, into, deadline)

    store._mover._load = seen
    job = store.prefetch([LAYOUT], keys, clock.now() + 10)
    assert job.wait(GUARD_SECONDS)
    assert job.outcomes == [Outcome.HIT] * 8
    assert private
    assert all(private)
    store.take_back(lent)
    store.check_integrity()


def test_a_prefetch_says_what_it_could_not_bring(make_store, clock):
    """Blocks that no tier holds are MISS in the outcomes of a prefetch; those before them are HIT."""
    store, keys = make_store(ScriptedTier()), chain("prompt", 5)
    save(store, keys[:3])
    job = store.prefetch([LAYOUT], keys, clock.now() + 10)
    assert job.wait(GUARD_SECONDS)
    assert job.outcomes == [Outcome.HIT] * 3 + [Outcome.MISS] * 2


def test_a_prefetch_whose_time_is_up_does_nothing(make_store, make_disk, clock):
    """Behind its deadline a prefetch reads nothing and says so."""
    keys = chain("prompt", 4)
    store = _only_on_disk(make_store, make_disk, keys)
    job = store.prefetch([LAYOUT], keys, clock.now() - 1)
    assert job.wait(GUARD_SECONDS)
    assert job.outcomes == [Outcome.MISS] * 4
    assert store.usage()["memory"].blocks == 0


def test_saving_what_came_from_disk_promotes_it(make_store, make_disk):
    """A prompt loaded from disk is in memory after the engine saved it, and is not written to disk again."""
    keys = chain("prompt", 6)
    store = _only_on_disk(make_store, make_disk, keys)
    assert ask(store, keys).by_tier == {"disk": 6}
    assert store.unsaved(LAYOUT, keys) == 0
    save(store, keys)
    assert ask(store, keys).by_tier == {"memory": 6}
    assert store.metrics.value("demoted_blocks_total", (("tier", "disk"),)) == 0
    store.check_integrity()


# -- several layouts ---------------------------------------------------------------------------------------------------


def test_ranks_match_what_all_of_them_have(make_store, make_disk):
    """With several ranks only blocks that every one of them holds are planned, and each loads its own bytes."""
    ranks = [make_layout(rank=rank) for rank in range(3)]
    store, keys = make_store(make_disk()), chain("prompt", 8)
    for rank, count in zip(ranks, (8, 5, 7), strict=True):
        save(store, keys[:count], rank)
    answer = ask(store, keys, *ranks)
    assert answer.blocks == 5
    assert answer.reasons == [(5, 8, "never_seen")]
    store.check_integrity()


def test_layouts_of_different_size_share_the_tiers(make_store, make_disk):
    """Blocks of different sizes under the same keys live side by side in memory and on disk."""
    store = make_store(make_disk(), blocks=256)
    layouts = [make_layout("small"), make_layout("large", block_bytes=3 * BLOCK_BYTES)]
    keys = chain("prompt", 10)
    for layout in layouts:
        save(store, keys, layout)
    for layout in layouts:
        assert ask(store, keys, layout).blocks == 10
    store.check_integrity()


def test_a_disk_in_use_is_found_again(make_store, tmp_path: Path, make_disk):
    """Save, close, reopen, extend, close, reopen: every turn of a conversation survives each restart."""
    keys = chain("conversation", 30)
    for turn in range(1, 4):
        store = make_store(make_disk())
        answer = ask(store, keys[: 10 * turn])
        assert answer.blocks == 10 * (turn - 1)
        save(store, keys[: 10 * turn])
        store.close()
    assert sorted(path.suffix for path in (tmp_path / "disk").iterdir() if path.suffix == ".segment")
