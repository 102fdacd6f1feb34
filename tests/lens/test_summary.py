"""Summaries of receipts: every token counted once, and the one thing to do about it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.lens import report
from thermocline.lens.summary import summarise, token_range
from thermocline.store.receipt import Missing, Reason, Receipt

SIZE = 32


def receipt(request: str, prompt: int, loaded: int, *missing: Missing, wall: float = 0.0) -> Receipt:
    """A receipt of which only tokens and reasons matter."""
    return Receipt(
        request=request,
        prompt_tokens=prompt,
        tokens_per_block=SIZE,
        loaded_tokens=loaded,
        computed_tokens=prompt - loaded,
        by_tier={"memory": loaded} if loaded else {},
        missing=missing,
        match_seconds=0,
        load_seconds=0,
        prefill_seconds=0,
        planned_load_seconds=0,
        planned_recompute_seconds=0,
        planned_cold_seconds=0,
        wall_seconds=wall,
    )


def diverged(request: str, at: int) -> Receipt:
    """Ten blocks and a tail of 5 tokens, of which the token `at` in the first block differs."""
    detail = f"token {at} differs from request {request}-before, which holds 9{at % 10}% of what follows"
    return receipt(request, 325, 0, Missing(0, 10, Reason.DIVERGED, detail), Missing(10, 11, Reason.TAIL))


@st.composite
def receipts(draw: st.DrawFn) -> Receipt:
    """Any receipt that a store can make: stretches side by side from what was loaded to the end."""
    prompt = draw(st.integers(0, 2000))
    blocks = -(-prompt // SIZE)
    edges = sorted(draw(st.sets(st.integers(0, blocks), max_size=6)) | {blocks})
    loaded = min(edges[0], (prompt - 1) // SIZE) if prompt else 0
    edges[0] = loaded
    parts = [
        Missing(start, stop, draw(st.sampled_from(list(Reason))), draw(st.text(max_size=9)))
        for start, stop in zip(edges, [*edges[1:], blocks], strict=True)
        if start < stop
    ]
    return receipt(draw(st.text(max_size=3)), prompt, loaded * SIZE, *parts)


@given(st.lists(receipts(), max_size=20))
def test_every_token_is_counted_once(found):
    """Over any receipts, loaded tokens by tier and computed tokens by reason add up to all prompt tokens exactly."""
    summary = summarise(found)
    assert summary.skipped == 0
    assert summary.prompt_tokens == sum(one.prompt_tokens for one in found)
    assert sum(summary.by_tier.values()) == summary.loaded_tokens
    assert summary.loaded_tokens + sum(share.tokens for share in summary.by_reason) == summary.prompt_tokens
    assert len({share.reason for share in summary.by_reason}) == len(summary.by_reason)
    assert report.render_summary(summary)


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (Missing(0, 9, Reason.NEVER_SEEN), Missing(10, 11, Reason.TAIL)),
        (Missing(0, 10, Reason.NEVER_SEEN), Missing(9, 11, Reason.TAIL)),
        (Missing(0, 10, Reason.NEVER_SEEN),),
    ],
)
def test_what_does_not_add_up_is_left_out(parts):
    """A receipt with a gap or an overlap would falsify the sums: it is counted as skipped instead."""
    summary = summarise([receipt("a", 325, 0, *parts), diverged("b", 7)])
    assert (summary.requests, summary.skipped, summary.prompt_tokens) == (1, 1, 325)
    assert "left out             1" in report.render_summary(summary)


def test_the_partial_block_is_part_of_the_tail():
    """The last stretch ends where the prompt does, not where its last block would."""
    assert token_range(Missing(10, 11, Reason.TAIL), diverged("a", 3)) == (320, 325)


def test_details_of_one_kind_are_one():
    """Prompts that differ at the same token from different others are one kind, with the number of those alike."""
    summary = summarise([*(diverged(f"r{n}", 7) for n in range(5)), diverged("s", 12)])
    share = summary.by_reason[0]
    assert (share.reason, share.tokens, share.requests, share.alike) == (Reason.DIVERGED, 1920, 6, 5)
    assert share.detail.startswith("token 7 differs from request r4-before")


def test_words():
    """A summary says hit rate, shares by tier and reason, the top detail, and the one advice that matters most."""
    evicted = Missing(0, 2, Reason.EVICTED, "left memory 3 min ago (lru)")
    found = [
        *(diverged(f"r{n}", 7) for n in range(3)),
        receipt("hit", 325, 320, Missing(10, 11, Reason.TAIL), wall=1_000_000.0),
        receipt("gone", 65, 0, evicted, Missing(2, 3, Reason.TAIL), wall=1_000_060.0),
    ]
    assert report.render_summary(summarise(found)).splitlines() == [
        "5 requests, 1970-01-12 13:46:40 to 1970-01-12 13:47:40 UTC",
        "  prompts          1,365 tokens",
        "  loaded             320 tokens   23 %: the hit rate",
        "loaded from",
        "  memory             320 tokens   23 %",
        "computed, because it",
        "  DIVERGED           960 tokens   70 %",
        "    differs from what is stored",
        (
            "    in 3 requests, such as: token 7 differs from request r2-before, which holds 97% of what follows, "
            "and 2 more like it"
        ),
        "  EVICTED             64 tokens    5 %",
        "    was here, and was dropped to make room",
        "    in 1 request, such as: left memory 3 min ago (lru)",
        "  TAIL                21 tokens    2 %",
        "    is always computed: a partial block, or the token that starts the answer",
        (
            "so: The hit rate is 23 %. 70 % of all prompt tokens are DIVERGED. What changes with every request (a "
            "time, an id, a user's name) belongs at the end of a prompt: everything after the first difference is "
            "computed again."
        ),
    ]


def test_bars():
    """On a terminal every share has a bar in its proportion; elsewhere there is none."""
    summary = summarise([diverged("a", 1), receipt("hit", 325, 320, Missing(10, 11, Reason.TAIL))])
    bars = [line.count(report.BAR) for line in report.render_summary(summary, bars=True).splitlines()]
    assert sorted(bars)[-3:] == [1, 20, 20]
    assert report.BAR not in report.render_summary(summary)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ([], "No request has been answered yet."),
        (
            [receipt("a", 33, 32, Missing(1, 2, Reason.TAIL))],
            "The hit rate is 97 %. All that can be loaded was loaded.",
        ),
    ],
)
def test_conclusions(found, words):
    """Without requests, or with nothing left to gain, the conclusion says that."""
    assert report.conclude_summary(summarise(found)) == words


def test_a_list_is_read_as_it_was_sent():
    """A server's list is read whole; anything else is an error with a hint."""
    listed = {"object": "list", "data": [diverged("a", 1)], "has_more": True}
    found = report.read_list(msgspec.json.encode(listed))
    assert (found.data, found.has_more) == ((diverged("a", 1),), True)
    for body in (b"", b"{}", b"[]", b"\xff", b'{"data": [{}]}'):
        with pytest.raises(report.UnreachableError, match="not a list") as caught:
            report.read_list(body)
        assert caught.value.hint
