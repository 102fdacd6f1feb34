"""Reasons: why each block was not loaded. Every one of the closed set that a single store can know."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.making import BLOCK_BYTES, GUARD_SECONDS, LAYOUT, ScriptedTier, ask, chain, contents, make_layout, save
from thermocline.clock import ManualClock
from thermocline.store.ghosts import Ghost, Ghosts
from thermocline.store.receipt import Missing, Reason, merged
from thermocline.store.store import Store
from thermocline.tiers.disk import DiskTier
from thermocline.tiers.memory import MemoryTier

OTHER = make_layout("other")


def details(store: Store, keys: list[bytes], *layouts) -> list[str]:
    """The words of a match's reasons."""
    plan = store.match(layouts or (LAYOUT,), keys, prompt_tokens=9999)
    store.release(plan.lease)
    return [part.detail for part in plan.missing]


def test_never_seen(make_store):
    """Blocks that this store never held are NEVER_SEEN."""
    assert ask(make_store(), chain("prompt", 3)).reasons == [(0, 3, "never_seen")]


def test_evicted(make_store, clock):
    """Blocks that made room for others are EVICTED, with the tier, the policy and a rough age."""
    store, keys = make_store(blocks=16), chain("prompt", 8)
    save(store, keys)
    clock.sleep(1)
    save(store, chain("other", 16))
    clock.sleep(600)
    assert ask(store, keys).reasons == [(0, 8, "evicted")]
    assert details(store, keys) == ["left memory 10 min ago (lru)"]


def test_evicted_from_one_tier_is_not_gone(make_store, make_disk):
    """A block that left memory while disk holds it has no reason to be missing: it is loaded."""
    store, keys = make_store(make_disk(), blocks=16), chain("prompt", 8)
    save(store, keys)
    save(store, chain("other", 16))
    assert ask(store, keys).reasons == []


def test_expired(make_store, clock):
    """Blocks that nobody used for the time to live are EXPIRED, the whole path at once."""
    store, keys = make_store(ttl_seconds=60.0), chain("prompt", 8)
    save(store, keys)
    clock.sleep(59)
    assert ask(store, keys).blocks == 8
    clock.sleep(61)
    answer = ask(store, keys)
    assert answer.reasons == [(0, 8, "expired")]
    assert store.usage()["memory"].blocks == 0
    assert details(store, keys) == ["left memory less than a minute ago (time to live)"]
    store.check_integrity()


def test_use_of_a_descendant_keeps_its_ancestors(make_store, clock):
    """The time to live counts from the last use of the whole path: its beginning does not expire under it."""
    store, short, long = make_store(ttl_seconds=60.0), chain("prompt", 3), chain("prompt", 6)
    save(store, long)
    for _ in range(4):
        clock.sleep(40)
        assert ask(store, long).blocks == 6
    assert ask(store, short).blocks == 3
    branch = chain("branch", 2, behind=short)
    save(store, branch)
    clock.sleep(40)
    ask(store, branch)
    clock.sleep(40)
    assert ask(store, long).reasons == [(3, 6, "expired")]
    assert ask(store, branch).blocks == 5


def test_a_lease_keeps_a_path_from_expiring(make_store, clock):
    """What a plan is about to load does not expire before its lease ends."""
    store, keys = make_store(ttl_seconds=60.0, lease_seconds=100.0), chain("prompt", 3)
    save(store, keys)
    plan = store.match([LAYOUT], keys, prompt_tokens=999)
    clock.sleep(90)
    store.match([LAYOUT], chain("other", 1), prompt_tokens=17)
    assert store.unsaved(LAYOUT, keys) == 3
    store.release(plan.lease)
    assert ask(store, keys).blocks == 0


class AnotherMachineClock(ManualClock):
    """A clock that began anew while the wall clock went on."""

    def __init__(self, seconds: float, wall_seconds: float) -> None:
        super().__init__(seconds)
        self.began_wall_seconds = wall_seconds - seconds

    def wall(self) -> float:
        return self.began_wall_seconds + self.seconds


def test_the_time_to_live_outlasts_a_restart(make_store, make_disk, clock, tmp_path):
    """On a reopened disk blocks expire by the time since they were stored, whenever this machine's clock began."""
    store = make_store(make_disk())
    old, young = chain("old", 4), chain("young", 4)
    save(store, old)
    clock.sleep(50)
    save(store, young)
    store.close()
    later = AnotherMachineClock(5.0, clock.wall() + 20)
    warm, disk = MemoryTier(16 * BLOCK_BYTES), DiskTier(tmp_path / "disk", 1 << 24, clock=later)
    again = Store(warm, [disk], clock=later, ttl_seconds=60.0)
    assert again.usage()["disk"].blocks == 4
    assert ask(again, old).blocks == 0
    later.sleep(39)
    assert ask(again, young).blocks == 4
    later.sleep(59)
    assert ask(again, young).blocks == 4
    later.sleep(61)
    assert ask(again, young).blocks == 0
    assert again.usage()["disk"].blocks == 0
    again.check_integrity()
    again.close()


def test_a_backlog_of_expired_blocks_is_worked_off(make_store, clock):
    """After a long silence each match drops a bounded number of expired blocks, until none is left."""
    store = make_store(blocks=2048, ttl_seconds=60.0)
    for number in range(4):
        save(store, chain(f"prompt {number}", 400))
    clock.sleep(100)
    left = []
    for _ in range(5):
        ask(store, chain("unrelated", 1))
        left.append(store.usage()["memory"].blocks)
    assert left[0] >= 1000
    assert left[-1] == 0


def test_other_layout(make_store):
    """Blocks held for another layout only are OTHER_LAYOUT, and stay so once they left."""
    store, keys = make_store(blocks=16), chain("prompt", 5)
    save(store, keys[:3], OTHER)
    assert ask(store, keys).reasons == [(0, 3, "other_layout"), (3, 5, "never_seen")]
    save(store, chain("pressure", 16), OTHER)
    assert ask(store, keys).reasons == [(0, 3, "other_layout"), (3, 5, "never_seen")]
    assert details(store, keys)[0] == "was held for another layout"


def test_evicted_here_outweighs_held_elsewhere(make_store, clock):
    """A block that left this layout is EVICTED, also while another layout holds the same key."""
    store, keys = make_store(blocks=32), chain("prompt", 5)
    save(store, keys)
    clock.sleep(1)
    for _ in range(5):
        clock.sleep(1)
        save(store, keys, OTHER)
        ask(store, keys, OTHER)
        save(store, chain(f"pressure {clock.now()}", 12), OTHER)
    assert ask(store, keys).reasons == [(0, 5, "evicted")]


def test_each_layout_has_its_own_ghost(make_store, clock):
    """Where a key left two layouts for different reasons, each is told its own."""
    ghosts, key = Ghosts(), chain("prompt", 1)
    ghosts.note(LAYOUT.id, key[0], Ghost(Reason.EVICTED, "left memory", "lru", 0.0))
    ghosts.note(OTHER.id, key[0], Ghost(Reason.CORRUPT, "left disk", "", 0.0))
    assert [part.reason for part in ghosts.explain(LAYOUT.id, key, 0, 0, 0.0)] == [Reason.EVICTED]
    assert [part.reason for part in ghosts.explain(OTHER.id, key, 0, 0, 0.0)] == [Reason.CORRUPT]
    ghosts.forget(LAYOUT.id, key)
    assert [part.reason for part in ghosts.explain(LAYOUT.id, key, 0, 0, 0.0)] == [Reason.OTHER_LAYOUT]
    ghosts.forget(OTHER.id, key)
    assert len(ghosts) == 0


def test_a_rank_that_lost_its_part_gives_the_reason(make_store, clock):
    """With several ranks the reason is that of the rank that holds least, not a guess from the first one."""
    ranks = [make_layout(rank=rank) for rank in range(2)]
    store, keys = make_store(blocks=32), chain("prompt", 5)
    save(store, keys, ranks[1])
    for _ in range(6):
        clock.sleep(1)
        save(store, keys, ranks[0])
        ask(store, keys, ranks[0])
        save(store, chain(f"pressure {clock.now()}", 12), OTHER)
    assert store.unsaved(ranks[0], keys) == 5
    assert ask(store, keys, *ranks).reasons == [(0, 5, "evicted")]


def test_ranks_in_different_tiers_are_pending(make_store):
    """Where every rank has the blocks, but not all in one tier, they are on their way: PENDING."""
    ranks = [make_layout(rank=rank) for rank in range(2)]
    cold = ScriptedTier()
    store, keys = make_store(cold, blocks=16), chain("prompt", 5)
    save(store, keys, ranks[0])
    save(store, chain("pressure", 16), OTHER)
    cold.holding = True
    store.save(ranks[1], keys, contents(ranks[1], keys))
    assert ask(store, keys, *ranks).reasons == [(0, 5, "pending")]
    cold.holding = False
    cold.finish()
    assert ask(store, keys, *ranks).blocks == 5


def test_pending(clock):
    """While one request saves a prompt, another that asks for it is told PENDING, and only for those blocks."""
    began, go_on = threading.Event(), threading.Event()

    class Slow(MemoryTier):
        def save(self, layout, keys, blocks):
            began.set()
            go_on.wait(GUARD_SECONDS)
            return super().save(layout, keys, blocks)

    store, keys = Store(Slow(16 * BLOCK_BYTES, clock=clock), clock=clock), chain("prompt", 4)
    saving = threading.Thread(target=save, args=(store, keys))
    saving.start()
    assert began.wait(GUARD_SECONDS)
    assert ask(store, chain("longer", 2, behind=keys)).reasons == [(0, 4, "pending"), (4, 6, "never_seen")]
    go_on.set()
    saving.join(GUARD_SECONDS)
    assert ask(store, keys).blocks == 4
    store.close()


def test_declined(make_store):
    """A tier that would take longer than computing is DECLINED with both figures, and its blocks are kept."""
    cold = ScriptedTier()
    store, keys = make_store(cold, blocks=16), chain("prompt", 8)
    save(store, keys)
    save(store, chain("other", 16))
    for _ in range(50):
        store.costs.transferred("cold", 8 * BLOCK_BYTES, 30.0)
        store.costs.recomputed(128, 0, 0.01)
    answer = ask(store, keys)
    assert (answer.blocks, answer.reasons) == (0, [(0, 8, "declined")])
    (words,) = details(store, keys)
    assert words.startswith("loading from cold would take ")
    assert "computing what is left 0." in words


def test_not_admitted(make_store):
    """Blocks that found no room because everything was leased are NOT_ADMITTED, and said so."""
    store, keys = make_store(blocks=16), chain("leased", 16)
    save(store, keys)
    plan = store.match([LAYOUT], keys, prompt_tokens=999)
    refused = chain("refused", 2)
    save(store, refused)
    assert ask(store, refused).reasons == [(0, 2, "not_admitted")]
    assert details(store, refused) == ["memory had no room less than a minute ago"]
    store.release(plan.lease)
    save(store, refused)
    assert ask(store, refused).blocks == 2


def test_unknown_behind_the_horizon(make_store, monkeypatch):
    """Once more blocks left than are remembered, an unknown key may have been held: UNKNOWN, not NEVER_SEEN."""
    monkeypatch.setattr("thermocline.store.ghosts.Ghosts.__init__.__defaults__", (10,))
    store = make_store(blocks=16)
    first = chain("first", 16)
    save(store, first)
    save(store, chain("second", 16))
    reasons = ask(store, first).reasons
    assert {reason for _, _, reason in reasons} == {"evicted", "unknown"}
    assert len(store._books.ghosts) == 10
    assert ask(store, chain("third", 2)).reasons == [(0, 2, "unknown")]


def test_a_reason_goes_when_the_block_is_back(make_store, clock):
    """A block that is held again has no ghost any more."""
    store, keys = make_store(blocks=16), chain("prompt", 8)
    save(store, keys)
    clock.sleep(1)
    save(store, chain("other", 16))
    assert len(store._books.ghosts) == 8
    clock.sleep(1)
    save(store, keys)
    assert ask(store, keys).blocks == 8
    assert not {key for key in keys if key in store._books.ghosts._ghosts}


@given(
    noted=st.lists(st.tuples(st.integers(0, 11), st.sampled_from(["mine", "other"]), st.sampled_from(list(Reason)))),
    start=st.integers(0, 12),
    others=st.integers(0, 12),
)
def test_ghosts_explain_every_block_once(noted, start, others):
    """Whatever is remembered, every block from the first asked to the last gets exactly one reason, in order."""
    ghosts, keys = Ghosts(kept=8), chain("prompt", 12)
    for at, layout, reason in noted:
        ghosts.note(LAYOUT.id if layout == "mine" else OTHER.id, keys[at], Ghost(reason, "left", "lru", 0.0))
    parts = ghosts.explain(LAYOUT.id, keys, start, others, 0.0)
    assert [at for part in parts for at in range(part.start, part.stop)] == list(range(start, 12))
    assert parts == merged(parts)


@pytest.mark.parametrize(
    ("seconds", "words"), [(5, "less than a minute"), (60, "1 min"), (7300, "2 h"), (259200, "3 d"), (-5, "less than")]
)
def test_ages_are_rough(seconds, words):
    """An age is given in the largest unit that fits, so that blocks that left together read as one run."""
    ghosts, keys = Ghosts(), chain("prompt", 1)
    ghosts.note(LAYOUT.id, keys[0], Ghost(Reason.EVICTED, "left memory", "lru", 0.0))
    assert f"left memory {words}" in ghosts.explain(LAYOUT.id, keys, 0, 0, float(seconds))[0].detail


def test_adjacent_stretches_with_one_reason_are_one():
    """Stretches with the same reason and words are merged, empty ones vanish, others stay."""
    late, corrupt = Reason.LATE, Reason.CORRUPT
    parts = [Missing(0, 2, late), Missing(2, 2, corrupt), Missing(2, 3, late), Missing(3, 4, late, "why")]
    assert merged(parts) == (Missing(0, 3, late), Missing(3, 4, late, "why"))
