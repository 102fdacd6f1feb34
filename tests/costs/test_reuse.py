"""The exact hit rate of every cache size."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.costs.reuse import analyse
from thermocline.costs.trace import Trace, read

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
published = pytest.mark.skipif(not TRACES.is_dir(), reason="the public traces are not beside this checkout")
SIZE = 4


def made(requests):
    """A trace of (seconds since the one before, session, path of names, tokens that the last block lacks)."""
    numbers: dict[tuple[int, ...], int] = {}
    paths = [
        [numbers.setdefault(tuple(path[: at + 1]), len(numbers)) for at in range(len(path))]
        for _, _, path, _ in requests
    ]
    return Trace(
        name="made",
        tokens_per_block=SIZE,
        arrival_seconds=np.cumsum([float(gap) for gap, *_ in requests]),
        input_tokens=np.array([max(0, len(path) * SIZE - lacks) for _, _, path, lacks in requests]),
        output_tokens=np.zeros(len(requests), np.int64),
        sessions=np.array([session for _, session, _, _ in requests]),
        blocks=np.array([block for path in paths for block in path], np.int32),
        starts=np.cumsum([0, *map(len, paths)]),
        distinct_blocks=len(numbers),
    )


class Lru:
    """The plain cache: look at the leading run, then use all blocks, last one first."""

    def __init__(self, capacity):
        self.capacity, self.held = capacity, OrderedDict()

    def use(self, path):
        hit = next((at for at, block in enumerate(path) if block not in self.held), len(path))
        for block in reversed(path):
            self.held[block] = None
            self.held.move_to_end(block)
            if len(self.held) > self.capacity:
                self.held.popitem(last=False)
        return hit


def hit_tokens(trace, capacity):
    cache = Lru(capacity)
    return sum(min(cache.use(trace.path(at).tolist()) * SIZE, int(trace.input_tokens[at])) for at in range(len(trace)))


paths = st.lists(st.integers(0, 2), max_size=6)
requests = st.lists(
    st.tuples(st.integers(0, 9), st.integers(-1, 2), paths, st.integers(0, SIZE - 1)), min_size=1, max_size=30
)


@given(requests)
def test_every_size_is_what_a_cache_of_that_size_hits(rows):
    """For every capacity the curve is what a plain cache hits, replayed."""
    trace = made(rows)
    found = analyse(trace)
    for capacity in range(trace.distinct_blocks + 2):
        expected = hit_tokens(trace, capacity) if capacity else 0
        assert round(found.hit(capacity) * found.input_tokens) == expected


@given(requests)
def test_shares_and_waits(rows):
    """What an endless cache has is what sessions had before and what others had; each hit has one wait."""
    trace = made(rows)
    found = analyse(trace, [3.0])
    seen: set[int] = set()
    own: dict[int, set[int]] = {}
    ideal = within = 0
    for at in range(len(trace)):
        path, tokens = trace.path(at).tolist(), int(trace.input_tokens[at])
        session = int(trace.sessions[at])
        mine = own.setdefault(session if session >= 0 else -1 - at, set())
        ideal += min(sum(block in seen for block in path) * SIZE, tokens)
        within += min(sum(block in mine for block in path) * SIZE, tokens)
        seen.update(path)
        mine.update(path)
    assert round(found.ideal * found.input_tokens) == ideal
    assert round(found.within * found.input_tokens) == within
    assert found.waits_tokens.sum() == ideal
    assert found.hit_within(np.inf) == pytest.approx(found.ideal)
    assert found.hit(found.blocks_for(1.0)) == pytest.approx(found.ideal)
    assert found.live_blocks <= found.blocks_for(1.0)


@given(requests)
def test_working_sets(rows):
    """The working set of a window is the number of distinct blocks used in it."""
    trace = made(rows)
    expected = []
    for at, now in enumerate(trace.arrival_seconds):
        recent = [each for each in range(at + 1) if each == at or trace.arrival_seconds[each] > now - 3.0]
        expected.append(len({int(block) for each in recent for block in trace.path(each)}))
    (found,) = analyse(trace, [3.0]).working_sets
    assert found.max_blocks == max(expected)
    assert found.mean_blocks == pytest.approx(np.mean(expected))


def test_waits():
    """Half of the hits wait ten seconds; a cache that forgets after five has the others."""
    found = analyse(made([(0, 0, [1], 0), (5, 0, [1], 0), (10, 0, [1], 0)]))
    assert (found.wait(0.5), found.wait(1.0)) == (5.0, 10.0)
    assert found.hit_within(5.0) == pytest.approx(1 / 3)
    assert found.ideal == found.within == pytest.approx(2 / 3)


def test_nothing_is_shared():
    """Where no prompt repeats another, every size hits nothing."""
    found = analyse(made([(1, 0, [at], 0) for at in range(5)]))
    assert (found.ideal, found.hit(5), found.blocks_for(1.0), found.wait(0.5), found.live_blocks) == (0, 0, 0, 0, 0)


PUBLISHED = {
    "mooncake_conversation.jsonl.xz": (
        37.4,
        8_138,
        {913: 4.5, 1_827: 5.3, 3_655: 8.1, 5_859: 13.9, 9_139: 20.0, 10_000: 21.6, 18_279: 28.4, 30_000: 33.2}
        | {36_558: 35.2, 50_000: 36.1, 91_395: 37.0, 97_656: 37.1, 182_790: 37.4},
    ),
    "mooncake_synthetic.jsonl.xz": (
        65.1,
        12_637,
        {219: 2.0, 439: 3.9, 878: 7.9, 1_000: 8.6, 2_196: 16.0, 4_392: 26.7, 5_859: 31.5, 8_784: 40.0, 21_962: 60.0},
    ),
    "kvct_001_369.jsonl.xz": (
        95.7,
        20_097,
        {406: 7.2, 813: 15.3, 1_627: 28.7, 4_069: 56.9, 8_138: 82.5, 16_277: 93.2, 40_693: 95.7},
    ),
}


@published
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_hit_rates(name):
    """On the public traces the curve is the published one to 0.1 points, and so is what suffices for the ideal."""
    ideal, live, hits = PUBLISHED[name]
    found = analyse(read(TRACES / name))
    assert 100 * found.ideal == pytest.approx(ideal, abs=0.1)
    assert found.live_blocks == live
    for blocks, hit in hits.items():
        assert 100 * found.hit(blocks) == pytest.approx(hit, abs=0.1)


@published
@pytest.mark.parametrize(("name", "ideal"), [("miniswe", 93.6), ("taubench", 82.5)])
def test_published_texts(name, ideal):
    """On the public agent traces the ideal hit in characters is the published one, up to what is taken for a token."""
    found = analyse(read(TRACES / f"lmcache_{name}.jsonl.xz"))
    assert 100 * found.ideal == pytest.approx(ideal, abs=0.2)
