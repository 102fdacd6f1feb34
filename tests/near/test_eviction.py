"""What goes when room is needed: each rule against its paper's own form, and the choice between them."""

from __future__ import annotations

from random import Random

import pytest

from bench import hit_ratio
from thermocline.clock import ManualClock
from thermocline.near import Cache
from thermocline.near.adaptive import SAMPLED_MAX, Adaptive, Mark
from thermocline.near.cache import ENTRY_BYTES
from thermocline.near.eviction import FIXED, Sketch

PAPERS = {
    "lru": hit_ratio.lru,
    "s3-fifo": hit_ratio.s3_fifo,
    "sieve": hit_ratio.sieve,
    "w-tinylfu": hit_ratio.w_tiny_lfu,
}
REQUESTS = 20_000


def _skewed(seed: int) -> list[int]:
    random = Random(seed)  # noqa: S311  # a seed, no secret
    return [int(2_000 * random.random() ** 3) for _ in range(REQUESTS)]


def _recent(seed: int) -> list[int]:
    """Each key is used a few times soon after it appears, and never again."""
    random = Random(seed)  # noqa: S311  # a seed, no secret
    return [max(0, at // 5 - int(random.expovariate(1 / 100))) for at in range(REQUESTS)]


@pytest.mark.parametrize("trace", [_skewed(1), _recent(1)], ids=["skewed", "recent"])
@pytest.mark.parametrize("policy", ["lru", "sieve"])
def test_marks_read_late_decide_as_moves_made_at_once(policy, trace):
    """LRU over late marks hits exactly what LRU hits, and SIEVE but for where its hand wraps."""
    late, at_once = hit_ratio.ours(trace, 200, policy), PAPERS[policy](trace, 200)
    assert abs(late - at_once) <= (0 if policy == "lru" else 0.05 * REQUESTS)


@pytest.mark.parametrize("policy", ["s3-fifo", "w-tinylfu"])
def test_frequency_is_kept_as_in_the_paper(policy):
    """On skewed requests the rules with counts hit within two points of their papers' form."""
    trace = _skewed(2)
    assert abs(hit_ratio.ours(trace, 200, policy) - PAPERS[policy](trace, 200)) <= 0.02 * REQUESTS


@pytest.mark.parametrize("trace", [_skewed(3), _recent(3)], ids=["skewed", "recent"])
def test_the_choice_is_near_the_best(trace):
    """Whether recency or frequency is right, the adaptive rule hits within two points of the best fixed one."""
    best = max(rule(trace, 200) for rule in PAPERS.values())
    assert hit_ratio.ours(trace, 200) >= best - 0.02 * REQUESTS


@pytest.mark.parametrize("policy", [*FIXED, "adaptive"])
def test_a_rule_holds_what_the_cache_holds(policy):
    """After any mix of writes, rewrites, drops and evictions a rule holds the cache's keys, and their bytes add up."""
    random = Random(5)  # noqa: S311  # a seed, no secret
    cache = Cache(60 * ENTRY_BYTES, clock=(clock := ManualClock()), policy=policy, entry_bytes_max=20 * ENTRY_BYTES)
    for _ in range(5_000):
        clock.sleep(0.5)
        key = int(150 * random.random() ** 2)
        choice = random.random()
        if choice < 0.1:
            cache.drop([key])
        elif choice < 0.5:
            cache.get(key)
        else:
            cache.put(
                key, key, weight_bytes=int(ENTRY_BYTES * random.random() * 4), ttl_seconds=random.choice([None, 9.0])
            )
        assert cache.nbytes == sum(entry.weight_bytes for entry in cache.entries.values()) <= cache.bytes_max
        assert len(cache._rule) == len(cache.entries)
    assert all(key in cache._rule for key in cache.entries)
    while cache._rule:
        key, entry = cache._rule.evict()
        assert cache.entries.pop(key) is entry
    assert not cache.entries


def test_a_change_of_rule_loses_no_entry():
    """While entries move from the old rule to the new one, each is held by one of them."""
    rule = Adaptive(1_000)
    marks = {key: Mark(1, float(key), 0) for key in range(1_000)}
    for key, mark in marks.items():
        rule.add(key, mark)
    rule._old, rule._rule = rule._rule, FIXED["s3-fifo"](1_000)
    gone = [rule.evict()[0] for _ in range(50)]
    assert gone == sorted(gone)
    assert len(rule) == 950
    rule.replace(999, marks[999])
    rule.remove(999)
    rest = {rule.evict()[0] for _ in range(len(rule))}
    assert rest | set(gone) | {999} == set(range(1_000))


def test_the_sample_stays_small():
    """However many keys come, no more than SAMPLED_MAX of them are shadowed, and the shadows shrink with the sample."""
    rule = Adaptive(1_000_000)
    for key in range(20 * SAMPLED_MAX):
        rule.add(key, Mark(1, float(key), 0))
    assert SAMPLED_MAX // 4 < len(rule._sampled) <= SAMPLED_MAX
    assert all(shadow._bytes_max <= 1_000_000 // 16 for shadow in rule._shadows.values())


def test_the_sketch_counts_and_ages():
    """A key's count is never too low until counts are halved, and what is used no more is forgotten."""
    sketch = Sketch()
    sketch.count("key", 7, 100)
    assert sketch.estimate("key") >= 7
    for other in range(8_000):
        sketch.count(other % 50, 1, 100)
    assert sketch.estimate("key") <= 2
    for held in (1_000, 10_000):
        sketch.count("large", 3, held)
    assert sketch.estimate("large") >= 3
