"""Shared tiers in a store: what is asked of them, what is offered to them, and what their silence means."""

from __future__ import annotations

import numpy as np
import pytest

from tests.faults.redis_server import RedisServer
from tests.store.making import BLOCK_BYTES, GUARD_SECONDS, LAYOUT, ask, chain, contents, make_layout, save
from thermocline.clock import SystemClock
from thermocline.costs.model import LearnedCosts
from thermocline.store.calibrate import calibrate
from thermocline.store.receipt import Missing, Reason
from thermocline.store.shared import Answer
from thermocline.tiers.redis import RedisTier
from thermocline.tiers.redis_scripts import Space
from thermocline.tiers.tier import Outcome
from thermocline.wire.resp import Address

MIB = 1024 * 1024
CLOCK = SystemClock()


@pytest.fixture
def server(tmp_path):
    """A server of the test's own."""
    with RedisServer(tmp_path) as server:
        yield server


@pytest.fixture
def make_redis(server):
    """Tiers on that server, which takes everything unless a test says otherwise. Stores close them."""

    def make(wait_seconds=GUARD_SECONDS, kind=RedisTier, **limits):
        space = Space(b"test", 64 * MIB, 3600.0, **limits)
        tier = kind(Address.parse(server.url), space, wait_seconds=wait_seconds)
        assert tier.wait_up(GUARD_SECONDS)
        return tier

    return make


def _seconds(store, *, redis, recompute):
    """Teach a store what a byte from Redis and a computed token cost."""
    for _ in range(20):
        for nbytes in (1 << 12, 1 << 16, 1 << 20):
            store.costs.transferred("redis", nbytes, redis * nbytes)
        for tokens in (64, 512, 4096):
            store.costs.recomputed(tokens, 0, recompute * tokens)


def test_two_stores_share(make_store, make_redis):
    """What one store saved another one loads from Redis, exact, and from memory once it was saved there."""
    first, second = make_store(make_redis()), make_store(make_redis())
    keys = chain("prompt", 8)
    save(first, keys)
    assert ask(second, keys).by_tier == {"redis": 8}
    save(second, keys)
    assert ask(second, keys).by_tier == {"memory": 8}


def test_only_what_is_lacking_is_asked_for(make_store, make_redis):
    """Redis serves what lies behind the store's own blocks; where those are enough nobody is asked."""
    asked = []

    class Watched(RedisTier):
        def find(self, layout, keys, deadline):
            asked.append(len(keys))
            return super().find(layout, keys, deadline)

    first, second = make_store(make_redis()), make_store(make_redis(kind=Watched))
    keys = chain("prompt", 8)
    save(first, keys)
    save(second, keys[:3])
    assert ask(second, keys).by_tier == {"memory": 3, "redis": 5}
    save(second, keys)
    asked.clear()
    assert ask(second, keys).by_tier == {"memory": 8}
    assert asked == []


def test_ranks_share_what_all_have(make_store, make_redis):
    """With several layouts only blocks that Redis has of each of them count."""
    ranks = [make_layout(rank=rank) for rank in (0, 1)]
    first, second = make_store(make_redis()), make_store(make_redis())
    keys = chain("prompt", 6)
    save(first, keys, ranks[0])
    save(first, keys[:4], ranks[1])
    assert ask(second, keys, *ranks).blocks == 4


def test_beginnings_only(make_store, make_redis):
    """Of a long path Redis is offered, and asked for, only as much as it keeps."""
    first, second = make_store(make_redis(depth_max=5)), make_store(make_redis(depth_max=5))
    keys = chain("prompt", 9)
    save(first, keys)
    assert first.usage()["redis"].blocks == 5
    answer = ask(second, keys)
    assert answer.by_tier == {"redis": 5}
    assert answer.reasons == [(5, 9, "never_seen")]


def test_a_hole_ends_what_is_there(make_store, make_redis, server):
    """Redis evicts as it likes; blocks behind one that is gone are of no use, and are no hits."""
    first, second = make_store(make_redis()), make_store(make_redis())
    keys = chain("prompt", 8)
    save(first, keys)
    server.call("DEL", b"test:" + LAYOUT.id + keys[3])
    assert ask(second, keys).by_tier == {"redis": 3}


def test_gone_between_match_and_load(make_store, make_redis, server):
    """What vanishes after the match is computed, and called evicted."""
    first, second = make_store(make_redis()), make_store(make_redis())
    keys = chain("prompt", 4)
    save(first, keys)
    plan = second.match([LAYOUT], keys, prompt_tokens=65)
    assert plan.blocks == 4
    server.call("DEL", b"test:" + LAYOUT.id + keys[1])
    loaded = second.load(plan, 0, [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in keys])
    assert loaded.blocks == 1
    assert [part.reason for part in loaded.missing] == [Reason.EVICTED]
    second.release(plan.lease)


def test_frozen(make_store, make_redis, server):
    """A frozen Redis is waited for once: LATE; from then on it is down, and what the store has itself is served."""
    first = make_store(make_redis())
    second = make_store(make_redis(wait_seconds=0.05), blocks=16)
    keys = chain("prompt", 8)
    save(first, keys)
    save(second, keys[:2])
    with server.frozen():
        seen = [ask(second, keys) for _ in range(6)]
        assert all(answer.by_tier == {"memory": 2} for answer in seen)
        assert seen[0].reasons == [(2, 8, "late")]
        assert {answer.reasons[0][2] for answer in seen[1:]} <= {"late", "tier_down"}
        assert seen[-1].reasons == [(2, 8, "tier_down")]
    second.check_integrity()


def test_killed(make_store, make_redis, server):
    """Without Redis every block it may have had says that the tier is down, and saving goes on without it."""
    first, second = make_store(make_redis()), make_store(make_redis())
    keys = chain("prompt", 4)
    save(first, keys)
    server.kill()
    for _ in range(4):
        assert ask(second, keys).reasons == [(0, 4, "tier_down")]
    save(second, keys)
    assert ask(second, keys).by_tier == {"memory": 4}


def test_what_was_surely_there_is_not_called_evicted(make_store, make_redis, server):
    """A block that memory evicted and Redis still had is missing because Redis is down, not because it was evicted."""
    store = make_store(make_redis(), blocks=8)
    keys = chain("prompt", 4)
    save(store, keys)
    save(store, chain("other", 8))
    server.kill()
    ask(store, keys)
    assert ask(store, keys).reasons == [(0, 4, "tier_down")]


def test_damage_in_redis(make_store, make_redis, server):
    """A damaged value is CORRUPT once and again later, never wrong bytes, and a save brings it back."""
    first, second = make_store(make_redis()), make_store(make_redis())
    keys = chain("prompt", 4)
    save(first, keys)
    server.call("SETRANGE", b"test:" + LAYOUT.id + keys[1], 5000, b"\x00\x01\x02")
    answer = ask(second, keys)
    assert (answer.blocks, answer.reasons) == (1, [(1, 4, "corrupt")])
    assert second._books.shared["redis"].wait_idle(GUARD_SECONDS)
    assert ask(second, keys).reasons[0] == (1, 2, "corrupt")
    save(second, keys)
    assert ask(make_store(make_redis()), keys).by_tier == {"redis": 4}


def test_not_worth_it(make_store, make_redis):
    """Where computing is faster, nothing is offered, nothing asked, and the reason is DECLINED."""
    sharing, store = make_store(make_redis()), make_store(make_redis(gain_min=2.0))
    keys = chain("prompt", 8)
    save(sharing, keys)
    _seconds(store, redis=1e-4, recompute=1e-6)
    answer = ask(store, keys)
    assert answer.reasons == [(0, 8, "declined")]
    other = chain("other", 8)
    save(store, other)
    assert not any(store._books.shared["redis"].known(LAYOUT.id, other))


@pytest.mark.parametrize(("gain", "offered"), [(1.5, True), (2.5, False)])
def test_the_gain_decides_what_is_offered(make_store, make_redis, gain, offered):
    """A beginning is written to Redis only if it is loaded so many times faster than it is computed."""
    store, keys = make_store(make_redis(gain_min=gain)), chain("prompt", 16)
    per_token = BLOCK_BYTES / 16
    _seconds(store, redis=1e-9, recompute=2e-9 * per_token)
    save(store, keys)
    assert all(store._books.shared["redis"].known(LAYOUT.id, keys)) is offered


def test_prefetch(make_store, make_redis):
    """What only Redis has comes up to memory when somebody says that it will be needed."""
    first, second = make_store(make_redis()), make_store(make_redis())
    keys = chain("prompt", 8)
    save(first, keys)
    assert second.prefetch([LAYOUT], keys, float("inf")).wait(GUARD_SECONDS)
    assert ask(second, keys).by_tier == {"memory": 8}


def test_a_tier_that_raises(make_store, make_redis):
    """One that breaks its promise when asked or offered is counted, and no request notices."""

    class Broken(RedisTier):
        def find(self, layout, keys, deadline):
            raise RuntimeError("no answer at all")

        def save(self, layout, keys, blocks):
            raise RuntimeError("nor this")

    store, keys = make_store(make_redis(kind=Broken)), chain("prompt", 4)
    save(store, keys)
    assert ask(store, chain("prompt", 4, behind=keys)).by_tier == {"memory": 4}
    assert store.metrics.value("tier_failures_total", (("tier", "redis"),)) >= 2
    store.check_integrity()


def test_answers_without_values(make_store, make_redis):
    """A server that answers questions and never delivers is set aside all the same: loads are judged by loads."""

    class Stalling(RedisTier):
        def load(self, layout, keys, into, deadline):
            return [Outcome.LATE] * len(keys)

    sharing, store = make_store(make_redis()), make_store(make_redis(kind=Stalling))
    keys = chain("prompt", 4)
    save(sharing, keys)
    reasons = [ask(store, keys).reasons[0][2] for _ in range(6)]
    assert reasons == ["late", "late", "late", "tier_down", "tier_down", "tier_down"]


def test_busy_is_not_broken(make_store, make_redis):
    """A tier with more callers than it serves at a time is not set aside for it, and the reason says so."""

    class Busy(RedisTier):
        busy = True

        def find(self, layout, keys, deadline):
            return [Outcome.PENDING] * len(keys) if self.busy else super().find(layout, keys, deadline)

        def load(self, layout, keys, into, deadline):
            return [Outcome.PENDING] * len(keys) if self.busy else super().load(layout, keys, into, deadline)

    sharing, redis = make_store(make_redis()), make_redis(kind=Busy)
    store, keys = make_store(redis), chain("prompt", 4)
    save(sharing, keys)
    for _ in range(6):
        assert ask(store, keys).reasons == [(0, 4, "late")]
    assert store.metrics.value("tier_failures_total", (("tier", "redis"),)) == 0
    redis.busy = False
    plan = store.match([LAYOUT], keys, prompt_tokens=65)
    redis.busy = True
    loaded = store.load(plan, 0, [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in keys])
    assert [part.reason for part in loaded.missing] == [Reason.LATE]
    assert "busy" in loaded.missing[0].detail
    redis.busy = False
    assert ask(store, keys).by_tier == {"redis": 4}


def test_full_is_not_sent_again_and_again(make_store, make_redis, server):
    """A server that has no memory is left alone for a while, instead of being sent all of it with every request."""
    store = make_store(make_redis())
    server.config("maxmemory", "1mb")
    for at in range(8):
        save(store, chain(f"prompt {at}", 4))
    full = store.metrics.value("save_blocks_total", (("tier", "redis"), ("outcome", "full")))
    assert full == 12


def test_flush_and_close_wait_for_what_was_offered(make_store, make_redis, server):
    """After `flush` Redis has what was offered; nothing stays pinned for it."""
    store = make_store(make_redis())
    keys = chain("prompt", 8)
    store.save(LAYOUT, keys, contents(LAYOUT, keys))
    assert store.flush(GUARD_SECONDS)
    assert server.call("EXISTS", *(b"test:" + LAYOUT.id + key for key in keys)) == 8
    store.check_integrity()


def test_silence_takes_the_blame_only_where_nothing_is_known():
    """A silent tier is the reason for what was never seen within its part, and for all that it surely had."""
    why = (Reason.LATE, "why")
    missing = (Missing(2, 6, Reason.NEVER_SEEN), Missing(6, 9, Reason.EVICTED, "x"), Missing(9, 12, Reason.UNKNOWN))
    blamed = Answer("redis", 3, 11, 3, sure=7, why=why).blamed(missing)
    blocks = {at: part.reason for part in blamed for at in range(part.start, part.stop)}
    expected = ["never_seen", "late", "late", "late", "late", "evicted", "evicted", "late", "late", "unknown"]
    assert [str(blocks[at]) for at in range(2, 12)] == expected
    assert Answer("redis", 3, 11, 5).blamed(missing) == missing


def test_redis_is_measured_at_the_start(make_redis, server, monkeypatch):
    """What a load from Redis takes is known before the first request, and nothing of the measuring stays there."""
    monkeypatch.setattr("thermocline.store.calibrate.SECONDS_MAX", GUARD_SECONDS)  # a busy machine is no failure
    tier, costs = make_redis(), LearnedCosts()
    calibrate([tier], costs, CLOCK)
    assert costs.knows("redis")
    assert tier.wait_idle(GUARD_SECONDS)
    assert [key for key in server.keys("test:*") if len(key) > 32] == []
    tier.close()


def test_metrics_and_usage(make_store, make_redis):
    """Redis appears in usage and metrics like any other tier."""
    store, keys = make_store(make_redis()), chain("prompt", 4)
    save(store, keys)
    store.measure()
    label = (("tier", "redis"),)
    assert store.usage()["redis"].blocks == 4 == store.metrics.value("tier_blocks", label)
    assert store.metrics.value("save_blocks_total", (*label, ("outcome", "hit"))) == 4
    assert store.metrics.value("breaker_open", label) == 0
