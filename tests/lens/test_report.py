"""Receipts in words: each reason explained, and a conclusion that says what to do."""

from __future__ import annotations

import msgspec
import pytest

from thermocline.errors import UnreachableError
from thermocline.lens import report
from thermocline.store.receipt import Excerpt, ExcerptedReceipt, Missing, Reason, Receipt
from thermocline.tiers.check import CheckReport


def _receipt(*missing, loaded=2048, prompt=2064):
    return Receipt(
        request="cmpl-1",
        prompt_tokens=prompt,
        tokens_per_block=32,
        loaded_tokens=loaded,
        computed_tokens=prompt - loaded,
        by_tier={"memory": loaded - 32, "disk": 32} if loaded else {},
        missing=missing,
        match_seconds=0.0004,
        load_seconds=0.0123,
        prefill_seconds=0.03,
        planned_load_seconds=0.01,
        planned_recompute_seconds=0.02,
        planned_cold_seconds=1.5,
    )


def test_a_hit():
    """A receipt in words gives tokens by tier, times, and the last stretch that is always computed."""
    text = report.render(_receipt(Missing(64, 65, Reason.TAIL, "anything")))
    assert text.splitlines() == [
        "request cmpl-1",
        "  prompt        2,064 tokens",
        "  loaded        2,048 tokens   99 %: 2,016 from memory, 32 from disk",
        "  computed         16 tokens    1 %",
        "  matching  0.4 ms, loading 12.3 ms, computing 30.0 ms",
        "  predicted 1.50 s to compute all of it",
        "why not more",
        ("  tokens 2,048 to 2,063: TAIL - is always computed: a partial block, or the token that starts the answer"),
        "so: All that can be loaded was loaded.",
    ]


@pytest.mark.parametrize("reason", Reason)
def test_every_reason(reason):
    """Every reason of the closed set has words, its detail is shown, and it leads to its own conclusion."""
    receipt = _receipt(Missing(1, 64, reason, "a detail"), Missing(64, 65, Reason.TAIL), loaded=32)
    line = report.render(receipt).splitlines()[7]
    assert line.startswith(f"  tokens 32 to 2,047: {reason.name} - ")
    assert line.endswith(" (a detail)") == (reason is not Reason.TAIL)
    others = [report.conclude(_receipt(Missing(1, 64, other))) for other in Reason if other is not reason]
    assert report.conclude(receipt) not in others


def test_an_excerpt_is_harmless():
    """Text of prompts is shown without what a terminal would obey, and only where the server sent it."""
    plain = _receipt(Missing(0, 64, Reason.DIVERGED, "token 3 differs"), loaded=0)
    excerpt = Excerpt(1003, "cmpl-0", "It is\n", "\x1b[2J7 o'clock\u202e", "6 o'clock")
    shown = ExcerptedReceipt(**msgspec.structs.asdict(plain), excerpt=excerpt)
    text = report.render(report.read(msgspec.json.encode(shown)))
    assert text.splitlines()[8:12] == [
        "where it parts from request cmpl-0, at token 1,003",
        "  both     ...It is ",
        "  this one  [2J7 o'clock ...",
        "  that one 6 o'clock...",
    ]
    assert "both" not in report.render(report.read(msgspec.json.encode(plain)))


def test_conclusion_follows_the_tokens():
    """The conclusion is about the reason behind most of the computed tokens, whatever comes first."""
    few, most = Missing(0, 2, Reason.CORRUPT), Missing(2, 64, Reason.EVICTED)
    assert report.conclude(_receipt(few, most, loaded=0)) == report.conclude(_receipt(most, loaded=0))


def test_empty_prompt():
    """A receipt without any token is still readable."""
    assert "0 tokens" in report.render(_receipt(loaded=0, prompt=0))


def test_check():
    """What a check found is told with its counts, and whether it is damage."""
    clean = CheckReport(
        path="cache",
        blocks=1200,
        bytes=5000,
        corrupt=0,
        torn_pages=0,
        orphans=2,
        unknown_pages=0,
        segments=3,
        ok=True,
    )
    assert report.render_check(clean).splitlines() == [
        "cache: 1,200 blocks, 5,000 bytes, in 3 segments",
        "  2 blocks lack an ancestor, and cannot be matched",
        "so: every block that can be matched is right",
    ]
    text = report.render_check(msgspec.structs.replace(clean, corrupt=1, ok=False))
    assert "  1 blocks do not verify" in text
    assert "so: damaged. " in text


def test_read():
    """A receipt read from JSON is the one that was written; anything else is an error with a hint."""
    receipt = _receipt(Missing(64, 65, Reason.TAIL))
    assert report.read(msgspec.json.encode(receipt)) == ExcerptedReceipt(**msgspec.structs.asdict(receipt))
    for body in (b"", b"{}", b"[1]", b"\xff", b"<html>", b'{"x":' + b"[" * 9000):
        with pytest.raises(UnreachableError, match="not a receipt") as caught:
            report.read(body)
        assert caught.value.hint
