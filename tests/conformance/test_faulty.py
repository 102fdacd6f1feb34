"""The faulty twin does what it says: every fault happens, a seed replays, and the seam's promises hold."""

from __future__ import annotations

import pytest

from tests.conformance import openings
from tests.conformance.faulty import Fault, FaultyTier, Schedule
from tests.conformance.samples import CLOCK, chain, hits, layout_of, load, save
from tests.conformance.test_tiers import KINDS
from thermocline.tiers.tier import Outcome

LAYOUT = layout_of()
KEYS = chain(3, 8)


@pytest.fixture(params=["memory", "disk", "redis"])
def opening(request):
    """A tier without faults of its own."""
    opening = KINDS[request.param](request)
    yield opening
    opening.close()


def _history(tier, rounds=60):
    """What a fixed series of operations answers."""
    answers = []
    for _ in range(rounds):
        answers.append(tuple(save(tier, LAYOUT, KEYS).outcomes))
        answers.append(tuple(load(tier, LAYOUT, KEYS)))
    return answers


def test_a_seed_replays(opening):
    """The same seed gives the same history on a fresh tier of the same kind, another seed another one."""
    plain = opening.open()
    histories = []
    for seed in (1, 1, 2):
        tier = FaultyTier(plain, Schedule(seed))
        histories.append(_history(tier))
        plain.remove(LAYOUT, KEYS)
    assert histories[0] == histories[1] != histories[2]


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault is not Fault.SILENT])
def test_each_fault_happens(opening, fault):
    """A fault that is always on shows in the outcomes that it stands for, and never as wrong bytes."""
    plain = opening.open()
    save(plain, LAYOUT, KEYS)
    tier = FaultyTier(plain, Schedule(chances={fault: 1.0}))
    loaded, saved = load(tier, LAYOUT, KEYS), save(tier, LAYOUT, KEYS).outcomes
    assert tier.schedule.happened == {fault: 1}
    expected = {
        Fault.CORRUPT: lambda: loaded.count(Outcome.CORRUPT) == 1 and hits(loaded) == 7,
        Fault.LOSE: lambda: loaded.count(Outcome.MISS) == 1 and hits(loaded) == 7,
        Fault.LATE: lambda: set(loaded) == {Outcome.LATE},
        Fault.FAIL: lambda: set(loaded) == {Outcome.FAILED},
        Fault.DROP: lambda: set(saved) <= {Outcome.LATE, Outcome.FAILED},
        Fault.FULL: lambda: set(saved) == {Outcome.FULL},
    }
    assert expected[fault]()
    plain.check_integrity()


def test_silence(redis_server):
    """A shared tier that is silent says of no block that it is there, nor that it is not."""
    opening = openings.redis(redis_server)
    plain = opening.open()
    save(plain, LAYOUT, KEYS)
    tier = FaultyTier(plain, Schedule(chances={Fault.SILENT: 1.0}))
    assert set(tier.find(LAYOUT, KEYS, CLOCK.now() + 10)) <= {Outcome.LATE, Outcome.FAILED}
    assert tier.schedule.happened == {Fault.SILENT: 1}
    assert hits(load(tier, LAYOUT, KEYS)) == len(KEYS)
    opening.close()


def test_no_chance_no_fault(opening):
    """With all chances at zero the twin is the tier."""
    tier = FaultyTier(opening.open(), Schedule(chances={}))
    assert {outcome for answer in _history(tier, 10) for outcome in answer} == {Outcome.HIT}
    assert not tier.schedule.happened
