"""The last requests as a trace: which begin alike is told exactly, what they say is not."""

from __future__ import annotations

import io
import json
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from thermocline.costs import trace
from thermocline.tokens import recent
from thermocline.tokens.recent import BLOCK_BYTES, REQUEST_BYTES, TOKENS_PER_BLOCK, Recent

prompts = st.lists(st.lists(st.integers(0, 1), max_size=6), min_size=1, max_size=12)


def tokens_of(path, rest=0):
    """A prompt of whole blocks, each of one token again and again, and a part of another."""
    return np.repeat(np.array([*path, 7], np.uint32), [TOKENS_PER_BLOCK] * len(path) + [rest])


def noted(kept, *prompts, group=0):
    for at, tokens in enumerate(prompts):
        kept.note(1000.0 + at, tokens.tobytes(), group=group)
    return [json.loads(line) for line in kept.lines().splitlines()]


@settings(max_examples=200)
@given(prompts, st.integers(0, TOKENS_PER_BLOCK - 1))
def test_two_prompts_share_what_they_share(paths, rest):
    """Any two of them have as many leading blocks in common as their tokens have, and none behind that."""
    rows = noted(Recent(), *(tokens_of(path, rest) for path in paths))
    for one, row in zip(paths, rows, strict=True):
        assert len(row["hash_ids"]) == len(one) + (rest > 0)
        for other, like in zip(paths, rows, strict=True):
            same = next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), None)
            same = min(len(one), len(other)) if same is None else same
            shared = [a == b for a, b in zip(row["hash_ids"], like["hash_ids"], strict=False)]
            assert all(shared[:same])
            if one != other:
                assert not set(row["hash_ids"][same:]) & set(like["hash_ids"][same:])


def test_it_is_a_trace_that_is_read():
    """What is told is read as any trace: lengths, arrivals and prefixes, and that answers' lengths are not known."""
    kept = Recent()
    noted(kept, tokens_of([1, 2, 3], 9), tokens_of([1, 2, 4]), tokens_of([1, 2, 3], 9))
    found = trace.parse(io.BytesIO(kept.lines()), "recent")
    assert found.tokens_per_block == TOKENS_PER_BLOCK
    assert found.input_tokens.tolist() == [201, 192, 201]
    assert found.arrival_seconds.tolist() == [0.0, 1.0, 2.0]
    assert found.distinct_blocks == 5
    assert any("how long the answers were" in note for note in found.notes)


def test_nothing_is_told_of_what_prompts_say():
    """Numbers count from 0 in the order of first sight, from the newest: no hash, and the same in each process."""
    rows = [noted(Recent(), tokens_of([5, 6]), tokens_of([5, 8])) for _ in range(2)]
    assert rows[0] == rows[1]
    assert rows[0][1]["hash_ids"] == [0, 1]
    assert rows[0][0]["hash_ids"] == [0, 2]


def test_other_salts_share_nothing():
    """Equal prompts of two salts begin differently, as their blocks do."""
    kept = Recent()
    noted(kept, tokens_of([1, 2]), group=1)
    first, second = noted(kept, tokens_of([1, 2]), group=2)
    assert not set(first["hash_ids"]) & set(second["hash_ids"])


@settings(max_examples=50)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(0, 20_000), st.integers(0, 4000))
def test_it_is_bounded(lengths, bytes_kept, bytes_max):
    """No more is kept, and no more told, than was said: the newest requests, in their order."""
    kept = Recent(bytes_kept)
    for at, length in enumerate(lengths):
        kept.note(float(at), tokens_of([at] * length).tobytes())
    taken, fit = 0, 0
    for length in reversed(lengths):
        taken += REQUEST_BYTES + BLOCK_BYTES * length
        fit += taken <= bytes_kept
    rows = [json.loads(line) for line in kept.lines().splitlines()]
    assert [row["input_length"] for row in rows] == [64 * length for length in lengths[len(lengths) - fit :]]
    few = kept.lines(bytes_max)
    assert len(few) <= bytes_max
    assert kept.lines().endswith(few) or few.count(b"\n") < len(rows)


def test_what_is_told_stays_readable():
    """Even where it is full, a trace is shorter than readers take."""
    kept = Recent()
    for at in range(30):
        kept.note(1e9 + at, np.arange(at, at + 64 * 40_000, dtype=np.uint32).tobytes())
    assert 1 << 20 < len(kept.lines()) <= recent.TEXT_BYTES_MAX


def test_many_who_ask_at_once_take_turns():
    """Telling it takes memory many times its size: for one who asks at a time, however many do."""
    kept = Recent(1 << 19)
    for at in range(60):
        kept.note(1e9 + at, np.arange(at, at + 64 * 1000, dtype=np.uint32).tobytes())

    def peak_bytes(times):
        tracemalloc.start()
        try:
            with ThreadPoolExecutor(times) as threads:
                told = {*threads.map(lambda _: kept.lines(), range(times))}
            return tracemalloc.get_traced_memory()[1], told
        finally:
            tracemalloc.stop()

    (alone, told), (together, same) = peak_bytes(1), peak_bytes(4)
    assert told == same
    assert together < 2 * alone
