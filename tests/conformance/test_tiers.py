"""What every tier promises, whatever it is made of. A promise is one test, and runs on each tier and its faulty twin.

`test_lies.py` runs these very tests on tiers that break the promises, and wants each lie found.
"""

from __future__ import annotations

import random
import threading
from itertools import pairwise

import numpy as np
import pytest

from tests.conformance import openings
from tests.conformance.samples import (
    CLOCK,
    FREED,
    LENGTH,
    PATIENCE_SECONDS,
    blocks_of,
    chain,
    content,
    fill,
    hits,
    layout_of,
    load,
    room_for,
    save,
)
from thermocline.blocks.key import NO_PARENT
from thermocline.tiers.tier import FIRST, GONE, Medium, Outcome

KINDS = {
    "memory": lambda request: openings.memory(),
    "disk": lambda request: openings.disk(request.getfixturevalue("tmp_path")),
    "redis": lambda request: openings.redis(request.getfixturevalue("redis_server")),
}
KINDS |= {
    f"{kind}-faulty": lambda request, plain=plain: openings.faulty(plain(request)) for kind, plain in KINDS.items()
}
A, B = layout_of("a"), layout_of("b")
KEYS = chain(7, 12)


@pytest.fixture(params=KINDS)
def opening(request):
    """One kind of tier, closed at the end."""
    opening = KINDS[request.param](request)
    yield opening
    opening.close()


def _saved(opening, tier, layout, keys, length=LENGTH, **how):
    """Save, and return the keys that the tier took: all of them, unless faults are on."""
    job = save(tier, layout, keys, length, **how)
    taken = [key for key, outcome in zip(keys, job.outcomes, strict=True) if outcome is Outcome.HIT]
    assert len(taken) == len(keys) or not opening.exact, job.outcomes
    return taken


def _expect(opening, outcomes, expected):
    """Outcomes are the expected one; a faulty tier may say anything else than HIT instead."""
    for outcome in outcomes:
        assert outcome is expected or (not opening.exact and outcome is not Outcome.HIT), outcomes


def test_a_hit_is_exact(opening):
    """What was saved is loaded again, byte for byte, however the pieces are cut on either side."""
    tier = opening.open()
    for layout, cuts in ((A, 1), (B, 7)):
        taken = _saved(opening, tier, layout, KEYS, cuts=cuts)
        assert all(tier.holds(layout, taken)) or not opening.exact
        for into_cuts in (1, 2, 64):
            _expect(opening, load(tier, layout, taken, cuts=into_cuts), Outcome.HIT)
        _expect(opening, load(tier, layout, taken[::-1]), Outcome.HIT)
    tier.check_integrity()


@pytest.mark.parametrize("length", [1, 15, 4095, 4096, 4097, 65536, 1_048_577])
def test_lengths(opening, length):
    """Blocks of any length come back whole, whole pages or not."""
    tier = opening.open()
    layout = layout_of("sized", length)
    taken = _saved(opening, tier, layout, KEYS[:3], length)
    _expect(opening, load(tier, layout, taken, length), Outcome.HIT)


def test_what_is_not_there_is_a_miss(opening):
    """Unknown keys and unknown layouts are misses and not held; asking for nothing answers nothing."""
    tier = opening.open()
    taken = _saved(opening, tier, A, KEYS)
    strangers = chain(8, 5)
    for layout, keys in ((A, strangers), (B, taken), (B, strangers)):
        assert not any(tier.holds(layout, keys))
        _expect(opening, load(tier, layout, keys), Outcome.MISS)
        assert tier.remove(layout, keys) == 0
    mixed = [key for pair in zip(taken, strangers, strict=False) for key in pair]
    _expect(opening, load(tier, A, mixed)[1::2], Outcome.MISS)
    assert tier.holds(A, []) == load(tier, A, []) == []
    assert tier.remove(A, []) == 0
    assert save(tier, A, []).outcomes == []


def test_layouts_never_mix(opening):
    """The same keys under another layout are other blocks, also where both have the same length."""
    tier = opening.open()
    taken = {layout: _saved(opening, tier, layout, KEYS) for layout in (A, B)}
    for layout, keys in taken.items():
        _expect(opening, load(tier, layout, keys), Outcome.HIT)
    tier.remove(A, KEYS)
    assert not any(tier.holds(A, KEYS))
    _expect(opening, load(tier, A, KEYS), Outcome.MISS)
    _expect(opening, load(tier, B, taken[B]), Outcome.HIT)


def test_remove(opening):
    """What was removed is gone at once, is counted once, and leaves the rest."""
    tier = opening.open()
    taken = _saved(opening, tier, A, KEYS)
    gone, kept = taken[:5], taken[5:]
    assert tier.remove(A, gone) == len(gone)
    assert tier.remove(A, gone) == 0
    assert not any(tier.holds(A, gone))
    assert all(tier.holds(A, kept))
    _expect(opening, load(tier, A, gone), Outcome.MISS)
    _expect(opening, load(tier, A, kept), Outcome.HIT)
    tier.check_integrity()


def test_remove_frees(opening):
    """A full tier takes as much again after everything was removed, over and over: nothing leaks."""
    tier = opening.open()
    layout, length = layout_of("large", 500_000), 500_000
    counts = []
    for turn in range(4):
        keys = fill(tier, layout, length, seed=turn, evicts=opening.evicts)
        counts.append(len(keys))
        assert not opening.exact or tier.usage().blocks == len(keys)
        assert tier.remove(layout, keys) == len(keys)
        assert tier.usage().blocks == 0
    assert not opening.exact or len(set(counts[1:])) == 1, counts
    tier.check_integrity()


def test_replace(opening):
    """Saving a key again replaces its bytes, or changes nothing: one version is held and given, whole."""
    tier = opening.open()
    first = _saved(opening, tier, A, KEYS)
    second = _saved(opening, tier, A, first, version=1)
    _expect(opening, load(tier, A, second, versions=(0,) if opening.keeps_the_first else (1,)), Outcome.HIT)
    assert tier.usage().blocks <= len(first)
    assert tier.remove(A, KEYS) <= len(first)
    assert tier.usage().blocks == 0
    tier.check_integrity()


def test_one_key_twice(opening):
    """A key that a call names twice is answered twice, and saved twice it is held once."""
    tier = opening.open()
    twice = [KEYS[0], KEYS[0]]
    save(tier, A, twice)
    outcomes = load(tier, A, twice)
    _expect(opening, outcomes, Outcome.HIT)
    assert tier.holds(A, twice) in ([True, True], [False, False])
    assert tier.usage().blocks <= 1
    assert tier.remove(A, twice) <= 1
    tier.check_integrity()


def test_full_at_the_cap(opening):
    """A tier never uses more than its capacity; at the cap it says FULL, or evicts by itself, and goes on serving."""
    tier = opening.open()
    layout, length = layout_of("large", 700_000), 700_000

    def within():
        usage = tier.usage()
        assert usage.used_bytes <= usage.capacity_bytes
        assert usage.capacity_bytes <= openings.CAPACITY_BYTES_MAX

    held = fill(tier, layout, length, evicts=opening.evicts, observe=within)
    assert len(held) * length > tier.usage().capacity_bytes / 2, "full, but of what?"
    for start in range(0, len(held), 8):
        _expect(opening, load(tier, layout, held[start : start + 8], length), Outcome.HIT)
    expected = Outcome.HIT if opening.evicts else Outcome.FULL
    assert expected in save(tier, layout, chain(99, 1), length).outcomes or not opening.exact
    tier.remove(layout, held[:4])
    again = chain(98, 4)
    _expect(opening, load(tier, layout, _saved(opening, tier, layout, again, length), length), Outcome.HIT)
    within()
    tier.check_integrity()


def test_sizes_share_the_room(opening):
    """Room that blocks of one size gave back serves blocks of any other size."""
    tier = opening.open()
    for length in (300_000, 9_000, 1_100_000, 40_000):
        layout = layout_of("turn", length)
        held = fill(tier, layout, length, batch=64 if length < 100_000 else 8, evicts=opening.evicts)
        assert len(held) * length > tier.usage().capacity_bytes / 3
        assert tier.remove(layout, held) == len(held)
    tier.check_integrity()


def test_deadline(opening):
    """A load returns, whatever its deadline; what did not arrive is LATE, and what is a HIT is exact."""
    tier = opening.open()
    taken = _saved(opening, tier, A, KEYS)
    for seconds in (-1.0, 0.0, 1e-6, 1e-4, 1e-3, 1e-2):
        outcomes = load(tier, A, taken, seconds=seconds)
        assert set(outcomes) <= {Outcome.HIT, Outcome.LATE} or not opening.exact
        opening.settle(tier)
    assert set(load(tier, B, KEYS, seconds=-1.0)) <= {Outcome.MISS, Outcome.LATE, Outcome.FAILED}
    opening.settle(tier)
    assert hits(load(tier, A, taken)) == len(taken) or not opening.exact


def test_nothing_is_written_later(opening):
    """Once a load has returned, nobody writes into the caller's pieces any more, also where it was late."""
    tier = opening.open()
    layout, length = layout_of("large", 500_000), 500_000
    taken = _saved(opening, tier, layout, KEYS, length)
    rooms = []
    for seconds in (0.0, 1e-4, 1e-3, PATIENCE_SECONDS):
        into = room_for(len(taken), length)
        tier.load(layout, taken, into, CLOCK.now() + seconds)
        for pieces in into:
            pieces[0][:] = 0x11
        rooms.append(into)
    CLOCK.sleep(0.05)
    load(tier, layout, taken, length)
    assert all(np.all(piece == 0x11) for into in rooms for pieces in into for piece in pieces)


def test_pieces_are_free_afterwards(opening):
    """When the job of a save is done, the caller may overwrite its pieces: the tier keeps what they held."""
    tier = opening.open()
    blocks = blocks_of(A, KEYS, cuts=3)
    job = tier.save(A, KEYS, blocks)
    assert job.wait(PATIENCE_SECONDS)
    for block in blocks:
        for piece in block.pieces:
            piece[:] = FREED
    _expect(opening, load(tier, A, KEYS), Outcome.HIT)


def test_damage_on_the_way_is_found(opening):
    """A block whose bytes are not those of its sum is never a HIT, and is not held any more once that was seen."""
    tier = opening.open()
    blocks = blocks_of(A, KEYS)
    for block in blocks[::2]:
        block.pieces[0][LENGTH // 2] ^= 1
    assert tier.save(A, KEYS, blocks).wait(PATIENCE_SECONDS)
    outcomes = load(tier, A, KEYS)
    _expect(opening, outcomes[::2], Outcome.CORRUPT)
    _expect(opening, outcomes[1::2], Outcome.HIT)
    assert not any(tier.holds(A, KEYS)[::2]) or not opening.exact
    _expect(opening, load(tier, A, KEYS)[::2], Outcome.MISS)
    _expect(opening, load(tier, A, _saved(opening, tier, A, KEYS)), Outcome.HIT)
    tier.check_integrity()


def test_jobs(opening):
    """A save is visible before it is done, what is visible is held, and each watcher is called once, in that order."""
    tier = opening.open()
    told, held = [], []
    job = tier.save(A, KEYS, blocks_of(A, KEYS))

    def visible(seen):
        told.append("visible")
        held.append(all(tier.holds(A, [k for k, out in zip(KEYS, seen.outcomes, strict=True) if out is Outcome.HIT])))

    ended = threading.Event()
    job.watch(visible=visible, done=lambda _: (told.append("done"), ended.set()))
    assert ended.wait(PATIENCE_SECONDS)
    assert job.visible
    assert job.done
    assert told == ["visible", "done"]
    assert held == [True]
    job.watch(done=lambda _: told.append("late"))
    assert told[-1] == "late"


def test_found(opening):
    """What was held at closing is found at opening, with its parents and exact, by a tier that outlives its process."""
    tier = opening.open()
    paths = {A: [KEYS, chain(9, 3)], B: [KEYS]}
    for layout, chains in paths.items():
        for keys in chains:
            _saved(opening, tier, layout, keys)
    tier.remove(A, paths[A][1][:1])
    before = {
        layout: {key for keys in chains for key in keys if tier.holds(layout, [key])[0]}
        for layout, chains in paths.items()
    }
    tier.close()
    again = opening.open()
    found = {part.layout: part for part in again.found()}
    assert set(found) == {layout for layout, held in before.items() if held and opening.persistent}
    above = {
        key: (parent, at + 1) for keys in paths[A] for at, (parent, key) in enumerate(pairwise([NO_PARENT, *keys]))
    }
    for layout, part in found.items():
        assert len(part.keys) == len(set(part.keys))
        assert set(part.keys) == before[layout]
        assert all(again.holds(layout, part.keys))
        assert list(part.positions.values()) == list(range(len(part.keys)))
        names = {FIRST: NO_PARENT, **dict(enumerate(part.keys))}
        for key, at, depth in zip(part.keys, part.parents.tolist(), part.depths.tolist(), strict=True):
            assert depth == above[key][1]
            assert names.get(at) == (above[key][0] if at != GONE else None)
            assert (at == GONE) == (above[key][0] not in {NO_PARENT, *part.keys})
        assert len(part.stored_wall_seconds) == len(part.keys)
        assert all(0 <= CLOCK.wall() - stored < 86_400 for stored in part.stored_wall_seconds.tolist())
        _expect(opening, load(again, layout, part.keys), Outcome.HIT)
    again.check_integrity()


def test_close_twice(opening):
    """Closing a second time does nothing, and a closed tier answers instead of raising."""
    tier = opening.open()
    taken = _saved(opening, tier, A, KEYS)
    tier.close()
    tier.close()
    assert set(load(tier, A, taken, seconds=0.2)) <= {Outcome.HIT, Outcome.MISS, Outcome.LATE, Outcome.FAILED}
    assert set(save(tier, A, chain(5, 2)).outcomes) <= {Outcome.HIT, Outcome.FULL, Outcome.FAILED, Outcome.LATE}
    assert len(tier.holds(A, taken)) == len(taken)
    assert tier.remove(A, taken) <= len(taken)
    usage = tier.usage()
    assert usage.used_bytes <= usage.capacity_bytes
    tier.close()


def test_closing_finishes_what_was_saved(opening):
    """A save that was taken before the close is done after it, and durable where the tier outlives its process."""
    tier = opening.open()
    jobs = [tier.save(A, keys, blocks_of(A, keys)) for keys in (chain(seed, 20) for seed in range(10))]
    tier.close()
    assert all(job.done for job in jobs)
    if opening.persistent:
        again = opening.open()
        for seed, job in enumerate(jobs):
            taken = [key for key, out in zip(chain(seed, 20), job.outcomes, strict=True) if out is Outcome.HIT]
            _expect(opening, load(again, A, taken), Outcome.HIT)


def test_threads(opening, monkeypatch):
    """Loads, saves and removals of the same keys from many threads never give wrong bytes, nor claim damage."""
    openings.poison_freed_memory(monkeypatch)
    tier = opening.open()
    paths = [chain(seed, 6) for seed in range(6)]
    wrong: list[BaseException] = []
    seen: list[Outcome] = []
    stop = CLOCK.now() + 1.5

    def work(seed):
        rng = random.Random(seed)  # noqa: S311  # which key comes next
        while CLOCK.now() < stop and not wrong:
            keys, layout = rng.choice(paths), rng.choice((A, B))
            try:
                act = rng.random()
                if act < 0.3:
                    blocks = blocks_of(layout, keys, cuts=rng.choice((1, 5)))
                    assert tier.save(layout, keys, blocks).wait(PATIENCE_SECONDS)
                    for block in blocks:
                        for piece in block.pieces:
                            piece[:] = FREED
                elif act < 0.5:
                    tier.remove(layout, rng.sample(keys, 3))
                else:
                    seen.extend(load(tier, layout, keys))
            except BaseException as error:  # noqa: BLE001  # shown below, in the test's own thread
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
    assert Outcome.HIT in seen
    assert not opening.exact or set(seen) <= {Outcome.HIT, Outcome.MISS}, set(seen)
    tier.check_integrity()


def test_medium(opening):
    """A tier has a name and says what it is made of."""
    tier = opening.open()
    assert tier.name
    assert tier.medium in Medium


def test_content_tells_blocks_apart():
    """The suite's own blocks differ wherever layout, key or version differ."""
    seen = {content(layout, key, 64, version).tobytes() for layout in (A, B) for key in KEYS for version in (0, 1)}
    assert len(seen) == 2 * 12 * 2
