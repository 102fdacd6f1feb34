"""From a model, an accelerator and a workload to bytes, sessions, seconds, tiers and money."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from tests.costs.test_reuse import made
from thermocline.costs import sizing
from thermocline.costs.hardware import accelerator
from thermocline.costs.measured import VERSION, Conditions, Measured, Row
from thermocline.costs.memory import sequence_bytes, token_bytes
from thermocline.costs.models import find, table
from thermocline.costs.reuse import analyse
from thermocline.costs.roofline import prefill_seconds
from thermocline.costs.sizing import FITS, NO_CACHE, NO_ROOM, TOO_SLOW, UNTOLD, Asked, Sizing, size
from thermocline.costs.study import Offer
from thermocline.costs.trace import read
from thermocline.costs.transfer import Link
from thermocline.errors import ModelError
from thermocline.lens.size import render, so

TRACES = Path(__file__).resolve().parents[3] / "shared" / "traces"
published = pytest.mark.skipif(not TRACES.is_dir(), reason="the public traces are not beside this checkout")
QWEN = "Qwen/Qwen2.5-32B-Instruct"


def asked(model=QWEN, gpu="A100-80-SXM", **more):
    return Asked(geometry=find(model), accelerator=accelerator(gpu), **more)


@pytest.fixture(scope="module")
def qwen():
    return size(asked(contexts=(2048, 8192, 32768)))


def test_sessions_of_a_model_that_is_often_miscounted(qwen):
    """Qwen2.5-32B: 262,144 B a token; 0.54, 2.15 and 8.59 GB at 2k, 8k and 32k are 0.8, 3.3 and 13 % of the weights."""
    assert qwen.token.nbytes == 262_144
    assert qwen.token.formula == "2 x 64 layers x 8 heads x 128 x 2 B = 262,144 B per token"
    assert [each.nbytes / 1e9 for each in qwen.contexts] == pytest.approx([0.537, 2.147, 8.59], abs=1e-3)
    assert [each.share_of_weights for each in qwen.contexts] == pytest.approx([0.008, 0.033, 0.131], abs=1e-3)
    assert qwen.ridge_flops_per_byte == pytest.approx(153, abs=0.1)


def test_the_parts_add_up(qwen):
    """Reserve, weights, overhead and KV are all of the accelerator, and sessions are what KV has room for."""
    room = qwen.room
    parts = room.reserved_bytes + room.weights_bytes + room.overhead_bytes + room.kv_bytes
    assert parts == room.device_bytes == 80 << 30
    for each in qwen.contexts:
        assert each.steady == room.kv_bytes // each.nbytes
        assert each.beyond_model is False


def test_with_more_of_the_memory():
    """At 0.95, and with what else takes memory, a quarter less than the 29 sessions that weights alone would leave."""
    found = size(asked(utilisation=0.95, contexts=(2048, 8192, 32768)))
    assert [each.steady for each in found.contexts] == [22, 5, 1]


def test_longer_than_the_model():
    """131,072 tokens are four times what Qwen2.5-32B was made for, and the answer says so."""
    (found,) = size(asked("Qwen/Qwen2.5-32B-Instruct", contexts=(131_072,), tp=2)).contexts
    assert found.beyond_model


@pytest.mark.parametrize("name", table())
def test_formulas_with_numbers_filled_in(name):
    """For every model of the table the formula that is shown gives the bytes that are shown."""
    try:
        found = size(asked(name))
    except ModelError:
        pytest.skip("the table has no closed form for it")
    told, _, rest = found.token.formula.partition(" = ")
    numbers = re.sub(r"[^0-9x+() ]|layers|heads", "", told).replace("x", "*") or "0"
    assert eval(numbers) == found.token.nbytes == token_bytes(find(name))  # noqa: S307  # digits and signs
    assert rest.startswith(f"{found.token.nbytes:,} B per token")


def test_what_does_not_fit():
    """A model that does not fit says by how much, and on how many it does."""
    found = size(asked("meta-llama/Meta-Llama-3.1-70B", contexts=(8192,)))
    assert found.verdict == NO_ROOM
    assert found.room.kv_bytes < 0
    assert found.ranks_that_fit == 2
    assert not found.tiers
    assert found.contexts[0].prefill_seconds is None
    assert size(asked("meta-llama/Meta-Llama-3.1-70B", contexts=(8192,), tp=2)).verdict == FITS


def unknown():
    geometry = find("google/gemma-3-27b-it")
    return replace(geometry, parameters_total=None, parameters_active=None, weights_bytes=None)


def test_what_is_not_known():
    """Without the number of parameters bytes of KV are told, and why nothing else is."""
    found = size(Asked(geometry=unknown(), accelerator=accelerator("H100")))
    assert found.verdict == UNTOLD
    assert found.token.nbytes == 81_920
    assert found.room is None
    assert "parameters" in found.why[0]


def test_known_weights_of_unknown_parameters():
    """A checkpoint whose files tell bytes and no parameters has sessions, and no seconds: also beside a profile."""
    for told in (None, profile()):
        geometry = replace(unknown(), weights_bytes=30 * 10**9)
        found = size(Asked(geometry=geometry, accelerator=accelerator("H100"), profile=told))
        assert found.verdict == FITS
        assert found.contexts[0].steady > 0
        assert found.contexts[0].prefill_seconds is None
        assert "parameters" in found.why[0]


def test_seconds(qwen):
    """Computing is the roofline's time; from a tier it is the load and the last 128 tokens; decoding reads memory."""
    for each in qwen.contexts:
        expected = prefill_seconds(find(QWEN), accelerator("A100-80-SXM"), each.tokens).seconds
        assert each.prefill_seconds == pytest.approx(expected)
        disk = each.warm_seconds["nvme-gen4"] - each.warm_seconds["device"]
        assert disk == pytest.approx(each.nbytes / 7e9, rel=0.01)
        assert each.decode_bound_seconds < each.decode_seconds <= each.batch_seconds
    assert qwen.contexts[0].decode_bound_seconds == pytest.approx(65.5e9 / 2.039e12, rel=0.02)
    assert "read" in qwen.contexts[0].decode_by


@pytest.mark.parametrize("model", ["deepseek-ai/DeepSeek-V3", "openai/gpt-oss-120b", QWEN])
def test_the_bound_is_one(model):
    """No time per token is below what the bandwidth allows: of a mixture of experts only those chosen are read."""
    found = size(asked(model, "H200-SXM", tp=8))
    assert all(0 < each.decode_bound_seconds <= each.decode_seconds for each in found.contexts)


@pytest.mark.parametrize("given", [None, 12.0])
def test_the_rate_is_told(given):
    """At which rate a trace was replayed is said, and what stays at its own where that is another one."""
    trace = made([(30, turn % 40, [turn % 40, *range(20)], 0) for turn in range(80)])
    (note,) = [each for each in size(asked(trace=trace, arrivals_per_second=given)).assumptions if "replayed" in each]
    assert f"at {given or trace.arrivals_per_second:,.3g} per second" in note
    assert ("own rate" in note) == (given is not None)


def test_answers_of_which_some_have_a_length():
    """The mean answer is that of those whose length is known: 0 stands for an answer that was not told."""
    trace = made([(30, turn % 40, [turn % 40, *range(20)], 0) for turn in range(80)])
    told = replace(trace, output_tokens=np.arange(80) % 2 * 300)
    assert size(asked(trace=told)).workload.output_tokens == 300


def test_prompts_of_nothing(tmp_path):
    """A trace whose prompts have no tokens hits nothing; no share of nothing is taken."""
    path = tmp_path / "some.jsonl"
    row = {"timestamp": 0, "input_length": 0, "output_length": 0, "hash_ids": []}
    path.write_text("".join(f"{msgspec.json.encode(row).decode()}\n" for _ in range(3)))
    found = size(asked(trace=read(path)))
    assert found.workload is not None
    assert (found.workload.ideal, found.workload.device_hit, found.workload.chosen) == (0, 0, ())


def test_copies_of_latent_vectors():
    """Every rank keeps a copy of a latent vector, and each is stored and loaded: that is said."""
    found = size(asked("deepseek-ai/DeepSeek-V3", "H200-SXM", tp=8, contexts=(1024,)))
    assert found.contexts[0].nbytes == 8 * 1024 * 70_272
    assert any("each of 8 ranks" in note for note in found.assumptions)


def test_break_even(qwen):
    """A tier pays from some length on if its bandwidth is above break-even there: Redis at 1 GB/s for long ones."""
    pays = {tier.name: tier.from_tokens for tier in qwen.tiers}
    assert pays["host"] == 128
    assert pays["redis"] > 4096
    redis = next(tier for tier in qwen.tiers if tier.name == "redis")
    assert redis.breakeven_deep < redis.bytes_per_second < redis.breakeven_first


def test_many_ranks():
    """70B on 8 H100: break-even is 8 GB/s for the first tokens, so one NVMe drive loses there and the host wins."""
    found = size(asked("meta-llama/Meta-Llama-3.1-70B", "H100", tp=8, contexts=(131_072,)))
    pays = {tier.name: tier.from_tokens for tier in found.tiers}
    assert found.tiers[0].breakeven_first == pytest.approx(8e9, rel=0.1)
    assert pays["host"] == 128
    assert pays["nvme-gen4"] > 8192
    assert pays["redis"] is None


def test_a_target():
    """Fits, but the first token is late: that is another verdict than no room."""
    assert size(asked(contexts=(8192,), target_seconds=0.01, arrivals_per_second=1.0)).verdict == TOO_SLOW
    assert size(asked(contexts=(8192,), target_seconds=0.01)).verdict == TOO_SLOW
    assert size(asked(contexts=(8192,), target_seconds=9.0, arrivals_per_second=1.0)).verdict == FITS


def test_states_are_no_blocks():
    """A model with recurrent states has sessions and seconds, and no tier is advised."""
    geometry = replace(find("Qwen/Qwen3-Next-80B-A3B"), parameters_total=80 * 10**9, parameters_active=3 * 10**9)
    found = size(Asked(geometry=geometry, accelerator=accelerator("H200"), tp=2, contexts=(8192,)))
    assert (found.verdict, found.tiers, len(found.bills)) == (NO_CACHE, (), 1)
    assert found.token.state_bytes > 0
    assert found.contexts[0].steady > 100


def test_a_hit_rate_as_given():
    """Where no trace tells it, reuse is what was said; else the most that can be, and both are bills of their own."""
    given = size(asked(contexts=(8192,), hit=0.5))
    most = size(asked(contexts=(8192,)))
    assert [bill.hit for bill in given.bills] == pytest.approx([0, 0.5])
    assert most.bills[1].hit > 0.98
    assert 0 < given.wasted < most.wasted < 1


def profile():
    rows = tuple(
        Row(
            prompt_tokens=tokens,
            shared_tokens=0,
            cached_tokens=0,
            source="",
            concurrency=1,
            requests=3,
            first_token_seconds=0.01 + tokens * 1e-3,
            low_seconds=0.01,
            high_seconds=9.0,
        )
        for tokens in (512, 1024, 2048, 4096, 8192)
    )
    conditions = Conditions(date="2026-01-01", url="u", model="m", engine="e", machine="a slow one")
    return Measured(version=VERSION, conditions=conditions, rows=rows)


def test_measured_times():
    """What a profile measured replaces the roofline, and is named as where seconds come from."""
    found = size(asked(contexts=(8192,), profile=profile()))
    assert found.contexts[0].prefill_seconds == pytest.approx(8.2, rel=0.05)
    assert any("a slow one" in each for each in found.assumptions)


def test_a_trace(monkeypatch):
    """With a trace hit rates, bills and tiers follow from it; what a session comes back to is worth a tier."""
    turns = [(30, turn % 40, [turn % 40, *range(200)], 0) for turn in range(400)]
    trace = replace(made(turns), tokens_per_block=512, input_tokens=made(turns).input_tokens * 128)
    found = size(asked(trace=trace, target_seconds=1000.0))
    work = found.workload
    reuse = analyse(trace)
    assert (work.ideal, work.within) == pytest.approx((reuse.ideal, reuse.within))
    assert work.device_hit < work.chosen[-1].hit <= work.ideal + 1e-9
    assert found.verdict == FITS
    cold, warm = found.bills
    assert warm.seconds < cold.seconds
    assert warm.instances <= cold.instances
    assert found.wasted == pytest.approx(1 - warm.seconds / cold.seconds)
    assert [share for _, _, share in work.steps] == sorted(share for _, _, share in work.steps)


def test_room_in_tiers_is_on_the_bill():
    """Offered tiers are those that are weighed; what their room costs a month is on the bill with reuse, and said."""
    trace, link = _returning(), Link("host", "host", 32e9, 20e-6, "given", "the test")
    free, priced = (size(asked(trace=trace, offers=(Offer("host", link, 4 << 40, usd),))) for usd in (0.0, 1e-5))
    assert [each.name for each in priced.tiers] == ["host"]
    (chosen,), bill = priced.workload.chosen, priced.bills[1]
    assert bill.tiers_usd_per_month == pytest.approx(1e-5 * chosen.nbytes / 1e9 * 730 * bill.instances)
    alone = bill.accelerators * priced.price.usd_per_hour * 730
    assert bill.usd_per_month == pytest.approx(alone + bill.tiers_usd_per_month)
    assert priced.bills[0].tiers_usd_per_month is None
    assert free.bills[1].tiers_usd_per_month == 0
    notes = [any("room in tiers counts as free" in note for note in each.assumptions) for each in (free, priced)]
    assert notes == [True, False]
    assert ["if room costs nothing" in so(each)[2] for each in (free, priced)] == [True, False]


def _returning(gap=30):
    """Sessions that come back when the engine's memory has others."""
    turns = [(gap, turn % 40, [turn % 40, *range(200)], 0) for turn in range(400)]
    return replace(made(turns), tokens_per_block=512, input_tokens=made(turns).input_tokens * 128)


@pytest.mark.parametrize(
    ("gap", "price", "usd", "priced"),
    [(30, None, (0, 9.0), True), (0, None, (1e-5, 0), True), (30, None, (0, 0), False), (30, 0.0, (0, 0), False)],
)
def test_what_room_was_taken_to_cost_is_said(gap, price, usd, priced):
    """As tiers were chosen: where any has a price, also where a free one is chosen, or no bill of a month is known."""
    links = Link("host", "host", 32e9, 20e-6, "given", "the test"), Link("disk", "disk", 7e9, 1e-4, "given", "the test")
    offers = tuple(Offer(link.name, link, 4 << 40, each) for link, each in zip(links, usd, strict=True))
    found = size(asked(trace=_returning(gap), offers=offers, usd_per_hour=price))
    assert [each.tier for each in found.workload.chosen] == ["host"]
    (said,) = [line for line in so(found) if "What gains most" in line]
    assert ("less what its room costs" in said, "if room costs nothing" in said) == (priced, not priced)
    assert any("counts as free" in note for note in found.assumptions) != priced


def test_room_that_all_share():
    """What all instances share is said to be for all, and counted once."""
    link = Link("redis", "network", 32e9, 20e-6, "given", "the test")
    found = size(asked(trace=_returning(1), offers=(Offer("redis", link, 4 << 40, 1e-5, shared=True),)))
    (chosen,), bill = found.workload.chosen, found.bills[1]
    assert found.workload.instances > 1
    assert chosen.shared
    assert bill.tiers_usd_per_month == pytest.approx(1e-5 * chosen.nbytes / 1e9 * 730)
    assert any("of redis for all (" in line for line in so(found))
    text = render([found])
    assert "advised: redis, for all" in text
    assert "redis, each instance" not in text


def test_load_of_what_does_not_fit():
    """A length of which memory holds none has no row under load: nobody is served."""
    found = size(asked("meta-llama/Meta-Llama-3.1-8B", "a10", contexts=(2048, 131_072), users=(1, 8)))
    assert found.contexts[1].steady == 0
    assert [(each.prompt_tokens, each.users) for each in found.loads] == [(2048, 1), (2048, 8)]
    assert any("no room for a prompt of 131,072 tokens" in note for note in found.assumptions)


def test_own_links_are_said_of_offered_tiers_too():
    """That each accelerator loads over a link of its own is an assumption, whether tiers are named or not."""
    link = Link("host", "host", 32e9, 20e-6, "given", "the test")
    for offers in ((), (Offer("host", link),)):
        assert any("over its own link" in note for note in size(asked(tp=2, offers=offers)).assumptions)


def test_a_trace_without_reuse():
    """Where no prompt repeats another no cache is advised, and the bills are the same."""
    trace = replace(made([(30, turn, [turn, 0, 0], 0) for turn in range(50)]), tokens_per_block=512)
    found = size(asked(trace=replace(trace, input_tokens=trace.input_tokens * 128)))
    assert found.verdict == NO_CACHE
    assert found.workload.ideal == 0
    assert found.bills[0].seconds == pytest.approx(found.bills[1].seconds)


def test_a_trace_of_lengths(tmp_path):
    """A trace that tells lengths only gives arrivals and lengths; of reuse nothing is claimed."""
    path = tmp_path / "some.csv"
    rows = [f"2023-11-16 18:15:{at:02}.0,2000,100" for at in range(50)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    found = size(asked(trace=read(path)))
    assert found.workload is None
    assert found.bills[0].instances >= 1
    assert any("lengths and arrivals only" in each for each in found.assumptions)


@published
@pytest.mark.parametrize(("name", "ideal"), [("mooncake_conversation", 37.4), ("mooncake_synthetic", 65.1)])
def test_published_traces(name, ideal):
    """On the public traces the host's memory gains what is possible at the published share."""
    found = size(asked("meta-llama/Meta-Llama-3.1-8B", "H100", trace=read(TRACES / f"{name}.jsonl.xz")))
    assert 100 * found.workload.ideal == pytest.approx(ideal, abs=0.1)
    assert found.workload.chosen
    assert found.bills[1].accelerators <= found.bills[0].accelerators


def test_the_answer_as_json(qwen):
    """The JSON of an answer has all of it."""
    assert msgspec.json.decode(msgspec.json.encode(qwen), type=Sizing) == qwen


def test_bytes_of_all_ranks():
    """With more ranks than heads, heads are kept twice, and a session takes that much more in a tier."""
    geometry = find("Qwen/Qwen3-235B-A22B")
    found = size(Asked(geometry=geometry, accelerator=accelerator("H200"), tp=8, contexts=(8192,)))
    assert found.token.rank_bytes == 48_128
    assert found.contexts[0].nbytes == 2 * sequence_bytes(geometry, 8192)


def test_every_link_is_on_the_list():
    """The links that are shown are those of the table."""
    assert set(sizing.SHOWN_LINKS) <= set(sizing.LINKS)
