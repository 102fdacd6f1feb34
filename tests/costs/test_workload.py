"""Workloads that are described: what comes of a description, and the use cases that are shipped."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.costs import workload
from thermocline.costs.reuse import analyse
from thermocline.costs.workload import Description, synthesise
from thermocline.errors import SettingsError, TraceError

SMALL = st.builds(
    Description,
    sessions=st.integers(1, 12),
    sessions_per_hour=st.floats(1, 1e5),
    turns=st.integers(1, 4),
    think_seconds=st.floats(0, 1e4),
    think_seconds_p90=st.none() | st.floats(0, 1e5),
    system_tokens=st.integers(0, 300),
    documents=st.integers(0, 5),
    document_tokens=st.integers(0, 300),
    popularity=st.floats(0, 3),
    prompt_tokens=st.integers(1, 200),
    growth_tokens=st.integers(0, 100),
    tokens_per_block=st.sampled_from([16, 32]),
    seed=st.integers(0, 9),
)


@given(SMALL)
def test_the_same_description_is_the_same_trace(told):
    """A description and its seed decide every number of the trace, whose requests are in order of arrival."""
    one, other = synthesise(told).trace, synthesise(told).trace
    assert np.array_equal(one.blocks, other.blocks)
    assert np.array_equal(one.arrival_seconds, other.arrival_seconds)
    assert (np.diff(one.arrival_seconds) >= 0).all()
    assert len(one) == told.sessions * told.turns
    assert one.starts[-1] == len(one.blocks)
    assert set(one.blocks.tolist()) == set(range(one.distinct_blocks))


@given(SMALL)
def test_a_block_is_a_prefix(told):
    """A block's number stands for the whole prefix before it: it has one parent and one depth in all prompts."""
    found, parents = synthesise(told).trace, {}
    for request in range(len(found)):
        path = found.path(request).tolist()
        assert len(path) == found.input_tokens[request] // told.tokens_per_block
        for depth, block in enumerate(path):
            assert parents.setdefault(block, (depth, path[:depth][-1:])) == (depth, path[:depth][-1:])


def test_what_is_reused_is_what_was_described():
    """Of 10 sessions of 4 turns that grow by 2 blocks behind a common block, each turn reuses all but what is new."""
    told = Description(sessions=10, turns=4, system_tokens=32, prompt_tokens=32, growth_tokens=64, tokens_per_block=32)
    found = synthesise(told).trace
    lengths = [2, 4, 6, 8]  # blocks of the four turns
    within = 10 * sum(lengths[:3])
    across = 9  # the common block, of each session but the first
    assert analyse(found, ()).ideal == pytest.approx((within + across) / (10 * sum(lengths)))
    assert analyse(found, ()).within == pytest.approx(within / (10 * sum(lengths)))


def test_think_times_are_as_described():
    """Half of the pauses are shorter than `think_seconds`, and one in ten exceeds `think_seconds_p90`."""
    told = Description(sessions=1, turns=20_000, think_seconds=13, think_seconds_p90=199, growth_tokens=0)
    pauses = np.diff(synthesise(told).trace.arrival_seconds)
    assert np.quantile(pauses, 0.5) == pytest.approx(13, rel=0.05)
    assert np.quantile(pauses, 0.9) == pytest.approx(199, rel=0.08)


def test_there_are_enough_sessions():
    """Where no number of sessions is told, there are four times as many as are active at a time, by Little's law."""
    told = Description(sessions_per_hour=3600, turns=5, think_seconds=50)
    made = synthesise(told)
    assert told.active == pytest.approx(4 * 50)
    assert len(made.trace) == 5 * 800
    assert made.hours == pytest.approx(800 / 3600)
    few = synthesise(Description(sessions=2, turns=9, think_seconds=900))
    assert any("fewer sessions" in note for note in few.trace.notes)


def test_popularity_is_zipfs():
    """With an exponent of 1, the first of many documents is asked for twice as often as the second."""
    told = Description(sessions=20_000, documents=100, document_tokens=64, popularity=1.0, prompt_tokens=0)
    counts = np.sort(np.bincount(synthesise(told).trace.blocks))[::-1]
    assert counts[0] / counts[1] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    "told",
    [Description(sessions=100_000, turns=1000), Description(sessions=10_000, prompt_tokens=100_000)],
    ids=["requests", "blocks"],
)
def test_what_is_too_large_is_refused(told):
    """A description of more than is synthesised is refused before memory is taken, with what would do."""
    with pytest.raises(TraceError) as refused:
        synthesise(told)
    assert "fewer sessions" in refused.value.hint


def test_empty_prompts_are_refused():
    """A workload without tokens is none."""
    with pytest.raises(TraceError):
        synthesise(Description(prompt_tokens=0))


def test_a_description_is_read_from_toml(tmp_path):
    """Every field of a description can be written in a file; what is not written has its default."""
    path = tmp_path / "chat.toml"
    path.write_text('name = "chat"\nturns = 8\nthink_seconds = 60\nreorderable = false\n')
    assert workload.read(path) == Description(name="chat", turns=8, think_seconds=60.0)


@pytest.mark.parametrize("text", ["turn = 8", "turns = 0", "turns = ", 'turns = "8"', "\xff", "turns = " + "[" * 9000])
def test_a_description_that_is_wrong_says_why(tmp_path, text):
    """A field that does not exist, or cannot be so, is named; the hint lists what there is."""
    path = tmp_path / "wrong.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(SettingsError) as refused:
        workload.read(path)
    assert "turns" in refused.value.hint
    with pytest.raises(SettingsError):
        workload.read(tmp_path / "none.toml")


def test_every_use_case_can_be_synthesised():
    """The seven use cases are read from their table, and each has a workload of its own."""
    assert set(workload.use_cases()) == {"chat", "documents", "rag", "code", "structured", "agents", "batch"}
    for case in workload.use_cases().values():
        assert len(synthesise(case.like).trace) > 100
