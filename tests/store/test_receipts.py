"""Receipts: one account per request, and the token at which a prompt parts from a recent one."""

from __future__ import annotations

import json
import threading
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.store.making import BLOCK_BYTES, GUARD_SECONDS, LAYOUT, TOKENS_PER_BLOCK, chain, contents, save
from thermocline.blocks.key import BlockKey, block_keys, root_key
from thermocline.store import likeness
from thermocline.store.likeness import Likeness, sampled
from thermocline.store.plan import Plan
from thermocline.store.receipt import Missing, Reason, Receipt
from thermocline.store.receipts import Loaded, Receipts, account
from thermocline.store.store import Store

Tokens = NDArray[np.uint32]


def text(seed: int, count: int) -> Tokens:
    """Token ids of a text that no other seed gives."""
    return np.random.default_rng(seed).integers(1000, 50_000, count, dtype=np.uint32)


def joined(*parts: Tokens) -> Tokens:
    """One prompt of several texts."""
    return np.concatenate(parts)


def keys_of(tokens: Tokens) -> list[BlockKey]:
    """The keys an engine matches: those of full blocks, leaving at least one token to compute."""
    keys = block_keys(tokens.data, root=root_key(), tokens_per_block=TOKENS_PER_BLOCK)
    return keys[: (len(tokens) - 1) // TOKENS_PER_BLOCK]


def serve(store: Store, request: str, tokens: Tokens) -> Receipt:
    """Answer one prompt as an engine does: match, load, save the rest, keep the receipt."""
    keys = keys_of(tokens)
    plan = store.match([LAYOUT], keys, prompt_tokens=len(tokens))
    loaded = store.load(plan, 0, [[np.zeros(BLOCK_BYTES, np.uint8)] for _ in range(plan.blocks)])
    store.release(plan.lease)
    save(store, keys, start=store.unsaved(LAYOUT, keys))
    return store.receipts.record(request, tokens, plan, loaded, prefill_seconds=0.5)


def reasons(receipt: Receipt) -> list[tuple[int, int, str]]:
    """Start, stop and reason of each stretch."""
    return [(part.start, part.stop, str(part.reason)) for part in receipt.missing]


def test_a_receipt_accounts_for_every_token(make_store):
    """Loaded and computed tokens add up to the prompt, by tier, with the predicted and the measured seconds."""
    store, prompt = make_store(), text(1, 100)
    first = serve(store, "first", prompt)
    assert (first.loaded_tokens, first.computed_tokens, first.by_tier) == (0, 100, {})
    assert reasons(first) == [(0, 6, "never_seen"), (6, 7, "tail")]
    second = serve(store, "second", prompt)
    assert (second.loaded_tokens, second.computed_tokens, second.by_tier) == (96, 4, {"memory": 96})
    assert reasons(second) == [(6, 7, "tail")]
    assert (second.prompt_tokens, second.tokens_per_block, second.prefill_seconds) == (100, TOKENS_PER_BLOCK, 0.5)
    assert second.planned_load_seconds + second.planned_recompute_seconds < second.planned_cold_seconds


@pytest.mark.parametrize(
    ("tokens", "tail"), [(1, (0, 1)), (16, (0, 1)), (17, (1, 2)), (31, (1, 2)), (32, (1, 2)), (33, (2, 3))]
)
def test_the_tail_is_what_cannot_be_loaded(make_store, tokens, tail):
    """The partial last block, or the block of the one token that must be computed, is TAIL."""
    store, prompt = make_store(), text(2, tokens)
    serve(store, "first", prompt)
    assert reasons(serve(store, "second", prompt)) == [(*tail, "tail")]


# -- diverged ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stamp_tokens", [6, 7, 3])
def test_a_timestamp_at_the_top_is_found(make_store, stamp_tokens):
    """A prompt that differs from a recent one in a few tokens at its top is DIVERGED, and the token is named."""
    store, document = make_store(), text(3, 600)
    serve(store, "monday", joined(text(4, 10), text(5, 6), document))
    receipt = serve(store, "tuesday", joined(text(4, 10), text(6, stamp_tokens), document))
    assert receipt.missing[0].reason is Reason.DIVERGED
    assert (receipt.missing[0].start, receipt.missing[0].stop) == (0, (616 - 6 + stamp_tokens - 1) // TOKENS_PER_BLOCK)
    assert receipt.missing[0].detail.startswith("token 10 differs from request monday, which holds ")


def test_a_change_in_the_middle_is_found(make_store):
    """Where the change is in the middle, what is before it is loaded and the rest is DIVERGED at that token."""
    store, head, tail = make_store(), text(7, 320), text(8, 320)
    serve(store, "one", joined(head, text(9, 5), tail))
    receipt = serve(store, "two", joined(head, text(10, 5), tail))
    assert reasons(receipt) == [(20, 40, "diverged"), (40, 41, "tail")]
    assert receipt.missing[0].detail.startswith("token 320 differs from request one")
    assert receipt.loaded_tokens == 320


def test_a_conversation_that_goes_on_has_not_diverged(make_store):
    """The next turn of a conversation is the last one and more: its new blocks are NEVER_SEEN."""
    store, prompt = make_store(), text(11, 400)
    for turn in range(4):
        receipt = serve(store, f"turn {turn}", prompt)
        assert {part.reason for part in receipt.missing} <= {Reason.NEVER_SEEN, Reason.TAIL}
        prompt = joined(prompt, text(20 + turn, 150))


def test_a_conversation_whose_reply_was_rendered_anew_has_not_diverged(make_store):
    """Where the end of the last turn was tokenised otherwise, what follows is new all the same."""
    store, prompt = make_store(), text(12, 400)
    serve(store, "turn", joined(prompt, text(13, 5)))
    receipt = serve(store, "next turn", joined(prompt, text(14, 300)))
    assert [part.reason for part in receipt.missing] == [Reason.NEVER_SEEN, Reason.TAIL]


def test_another_question_about_a_document_has_not_diverged(make_store):
    """A different question behind the same document parts from it, but shares nothing from there on."""
    store, document = make_store(), text(15, 400)
    serve(store, "one", joined(document, text(16, 120)))
    receipt = serve(store, "two", joined(document, text(17, 90)))
    assert [part.reason for part in receipt.missing] == [Reason.NEVER_SEEN, Reason.TAIL]
    assert receipt.loaded_tokens == 400


def test_a_receipt_tells_nothing_of_another_salt(make_store):
    """A prompt that parts from one of another salt is NEVER_SEEN: a receipt is no oracle over a neighbour's prompts."""
    store, document = make_store(), text(31, 1000)
    plan = store.match([LAYOUT], [], prompt_tokens=1000)
    store.receipts.record("theirs", document, plan, None, 0.5, root=root_key(b"theirs"))
    changed = document.copy()
    changed[3] += 1
    keys = keys_of(changed)
    plan = store.match([LAYOUT], keys, prompt_tokens=len(changed))
    mine = store.receipts.record("mine", changed, plan, None, 0.5, root=root_key(b"mine"))
    assert mine.missing[0].reason is Reason.NEVER_SEEN
    again = store.receipts.record("again", changed, plan, None, 0.5, root=root_key(b"theirs"))
    assert again.missing[0].reason is Reason.DIVERGED


def test_an_unrelated_prompt_has_not_diverged(make_store):
    """A prompt that shares nothing with any other is NEVER_SEEN."""
    store = make_store()
    for number in range(5):
        receipt = serve(store, f"request {number}", text(30 + number, 300))
        assert [part.reason for part in receipt.missing] == [Reason.NEVER_SEEN, Reason.TAIL]


def test_what_was_evicted_is_not_called_diverged(make_store, clock):
    """Blocks that were held and left keep that reason, whatever other prompt is like this one."""
    store, document = make_store(blocks=32), text(18, 300)
    serve(store, "one", joined(text(19, 6), document))
    clock.sleep(1)
    serve(store, "two", joined(text(20, 6), document))
    clock.sleep(1)
    save(store, chain("pressure", 32))
    assert reasons(serve(store, "three", joined(text(19, 6), document)))[0] == (0, 19, "evicted")


def test_the_prompt_that_explains_most_is_named():
    """Of several prompts that part in the same block, the one that holds most of the rest is named."""
    like, document = Likeness(), text(21, 800)
    like.note("half", sampled(joined(text(22, 5), document[:500])))
    like.note("whole", sampled(joined(text(23, 5), document)))
    like.note("none", sampled(text(24, 800)))
    found = like.closest(sampled(joined(text(25, 5), document)), 0, 16)
    assert found is not None
    assert (found.request, found.at) == ("whole", 0)
    assert found.share > 0.9


def test_prompts_are_forgotten_within_bounds(monkeypatch):
    """Remembered prompts are bounded in number and tokens, also where one request id comes again and again."""
    monkeypatch.setattr(likeness, "TOKENS_KEPT_MAX", 10_000)
    like = Likeness()
    for number in range(100):
        like.note("same request", sampled(text(number, 900)))
    for number in range(100):
        like.note(f"request {number}", sampled(text(number, 10)))
    like.note("too long to be kept", sampled(text(1, 10_001)))
    assert len(like._prompts) <= likeness.PROMPTS_KEPT
    assert like._buckets.sum() == sum(len(prompt.sample) for prompt in like._prompts.values())
    assert like._tokens == sum(len(prompt.tokens) for prompt in like._prompts.values()) <= 10_000


def test_both_prompts_of_a_parting_are_known_while_remembered(make_store):
    """Of a DIVERGED prompt the store knows both token sequences and where they part, until either is forgotten."""
    store, document = make_store(), text(3, 600)
    one, two = joined(text(4, 10), text(5, 6), document), joined(text(4, 10), text(6, 6), document)
    serve(store, "one", one)
    serve(store, "two", two)
    parting = store.receipts.parting("two")
    assert (parting.other, parting.at) == ("one", 10)
    assert np.array_equal(parting.mine, two)
    assert np.array_equal(parting.others, one)
    assert store.receipts.parting("one") is None
    for number in range(likeness.PROMPTS_KEPT - 1):
        serve(store, f"other {number}", text(100 + number, 20))
    assert store.receipts.parting("two") is None


@pytest.mark.parametrize("tokens", [0, 1, 7, 8])
def test_short_prompts_are_no_trouble(tokens):
    """A prompt shorter than one window resembles nothing and is remembered like any other."""
    like = Likeness()
    like.note("long", sampled(text(1, 100)))
    like.note("short", sampled(text(2, tokens)))
    assert like.closest(sampled(text(3, tokens)), 0, 16) is None
    assert like.closest(sampled(text(4, 100)), 0, 16) is None


# -- the ring ----------------------------------------------------------------------------------------------------------


def test_receipts_are_bounded_and_found_again(make_store):
    """The last receipts are kept, by request and newest first; `last` is the newest; older ones are gone."""
    store = make_store(receipts_kept=3)
    made = [serve(store, f"request {number}", text(number, 20)) for number in range(5)]
    assert store.receipts.latest(10) == made[:1:-1]
    assert store.receipts.latest(2) == made[:2:-1]
    assert store.receipts.get("last") == made[4]
    assert store.receipts.get("request 2") == made[2]
    assert store.receipts.get("request 1") is None


def test_a_request_that_comes_again_is_the_latest(make_store):
    """A second receipt under the same request id takes the place of the first, as the newest."""
    store = make_store()
    for name in ("a", "b", "a"):
        receipt = serve(store, name, text(1, 20))
    assert store.receipts.get("last") == receipt
    assert [kept.request for kept in store.receipts.latest(10)] == ["a", "b"]


def test_no_receipt_is_no_trouble():
    """Before the first request there is nothing to get."""
    receipts = Receipts()
    assert (receipts.get("last"), receipts.get("x"), receipts.latest(3)) == (None, None, [])


def test_threads_may_record_at_once(make_store):
    """Receipts recorded by several threads are all kept."""
    store = make_store()
    threads = [
        threading.Thread(target=lambda seed=seed: [serve(store, f"{seed} {n}", text(seed, 40)) for n in range(20)])
        for seed in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD_SECONDS)
    assert len(store.receipts.latest(100)) == 60


# -- every block exactly once ------------------------------------------------------------------------------------------


def plan_of(keys: int, planned: int, cuts: list[int], prompt_tokens: int) -> Plan:
    """A plan that loads `planned` blocks and gives reasons for the others in stretches."""
    edges = sorted({planned, keys, *(cut for cut in cuts if planned < cut < keys)})
    missing = [Missing(a, b, Reason.EVICTED, f"{a}") for a, b in pairwise(edges)]
    runs = ()
    return Plan((LAYOUT,), chain("prompt", keys), prompt_tokens, runs, 0, 0, 0, 1, tuple(missing))


@given(
    keys=st.integers(0, 12),
    planned=st.integers(0, 12),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    loaded=st.one_of(st.none(), st.integers(0, 12)),
    tail=st.integers(1, TOKENS_PER_BLOCK),
)
def test_every_block_has_one_reason(keys, planned, cuts, loaded, tail):
    """From the first block that was computed to the last, each has exactly one reason, whatever the engine loaded."""
    planned = min(planned, keys)
    plan = plan_of(keys, planned, cuts, keys * TOKENS_PER_BLOCK + tail)
    blocks = min(loaded or 0, planned)
    why = (Missing(blocks, planned, Reason.LATE),) if loaded is not None else ()
    parts = account(plan, Loaded(blocks, {}, why, 0.0))
    assert [at for part in parts for at in range(part.start, part.stop)] == list(range(blocks, keys + 1))
    assert parts[-1].reason is Reason.TAIL


@pytest.mark.parametrize("loaded", [None, Loaded(2, {"memory": 2}, (), 0.1)])
def test_what_an_engine_did_not_load_is_declined(make_store, loaded):
    """Blocks that were planned, and that the engine did not load for reasons of its own, are DECLINED."""
    store, prompt = make_store(), text(1, 100)
    keys = keys_of(prompt)
    store.save(LAYOUT, keys, contents(LAYOUT, keys))
    plan = store.match([LAYOUT], keys, prompt_tokens=100)
    store.release(plan.lease)
    receipt = store.receipts.record("request", prompt, plan, loaded, 0.1)
    first = loaded.blocks if loaded else 0
    assert reasons(receipt) == [(first, 6, "declined"), (6, 7, "tail")]


def test_a_receipt_leaves_its_prompt(make_store):
    """Each request that has a receipt is in the trace, once; one whose receipt is made again is not in it twice."""
    store = make_store()
    for request, seed in (("a", 1), ("b", 1), ("b", 1), ("c", 2)):
        serve(store, request, text(seed, 200))
    rows = [json.loads(line) for line in store.receipts.recent.lines().splitlines()]
    assert [row["input_length"] for row in rows] == [200, 200, 200]
    assert rows[0]["hash_ids"] == rows[1]["hash_ids"]
    assert not set(rows[1]["hash_ids"]) & set(rows[2]["hash_ids"])
