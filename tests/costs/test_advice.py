"""Advice: workloads whose answer can be derived by hand, and the value of each deciding number at which it flips.

The machine of most tests computes a token in 1 ms, whatever is before it, and keeps it in 1 MB. So a prefix of k tokens
is worth k ms, a link of 1 GB/s breaks even but for what asking costs: 1 % of the prefill of each request.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.costs.test_reuse import made
from thermocline import cli
from thermocline.costs.advice import POLICIES, advise
from thermocline.costs.observed import Observed, judge
from thermocline.costs.study import Machine, Offer, Study, by_prefix, oracle_hit
from thermocline.costs.transfer import Link
from thermocline.costs.workload import Description, synthesise
from thermocline.fleet import router
from thermocline.lens.advise import Asked, machine_of, toml
from thermocline.lens.spread import spread
from thermocline.settings import Settings

MEGABYTE = 1_000_000
BLOCK = 64


def offer(tier="host", speed=25e9, capacity=None, price=0.0, **more):
    return Offer(tier, Link(tier, tier, speed, 0.0, "given", "the test"), capacity, price, **more)


def machine(device_tokens, *offers, token_seconds=1e-3, **more):
    return Machine(lambda tokens, _: tokens * token_seconds, MEGABYTE, device_tokens, offers, **more)


def answer(told, where):
    found = synthesise(told)
    return advise(found.trace, where, spread, hours=found.hours, reorderable=told.reorderable)


def leaf(advice, question):
    (found,) = [each for each in advice.leaves if each.question.startswith(question)]
    return found


def number(advice, question, name):
    (found,) = [each for each in leaf(advice, question).numbers if each.name.startswith(name)]
    return found


def blocks_of(advice, setting):
    (mebibytes,) = [line.value.removesuffix("MiB") for line in advice.lines if line.setting == setting]
    return int(mebibytes) * 1024 * 1024 // (BLOCK * MEGABYTE)


# -- workloads with known answers --------------------------------------------------------------------------------------

ONE_OFF = Description(sessions=200, prompt_tokens=6400)


def test_independent_prompts_need_no_cache():
    """Prompts that share nothing: nothing can be saved, so there is no KV cache to advise."""
    advice = answer(ONE_OFF, machine(100_000, offer()))
    assert (advice.verdict, advice.tiers) == ("no cache", ())
    assert [each.question for each in advice.leaves] == ["Is there reuse?"]


@pytest.mark.parametrize(("system", "verdict"), [(64, "no cache"), (128, "engine")])
def test_reuse_below_its_price_needs_no_cache(system, verdict):
    """Asking costs 1 % of the prefill: 1 block shared of 100 saves 0.995 % (the first one does not), 2 save 1.99 %."""
    told = Description(sessions=200, system_tokens=system, prompt_tokens=6400 - system)
    advice = answer(told, machine(100_000, offer()))
    found = number(advice, "Is there", "prefill")
    assert advice.verdict == verdict
    assert found.value == pytest.approx(100 * system / 6400 * 199 / 200)
    assert found.flips_at == pytest.approx(1.0)


@pytest.mark.parametrize(("device_tokens", "verdict"), [(2048, "engine"), (2047, "tiers")])
def test_a_shared_system_prompt_that_fits_is_the_engines(device_tokens, verdict):
    """2,048 tokens before every prompt are always the most recent: the engine keeps them if it has room for just them.

    One token less is one block less, 64 of 2,560 ms and more than the 25.6 that asking costs: then host memory pays.
    """
    told = Description(sessions=200, system_tokens=2048, prompt_tokens=512)
    advice = answer(told, machine(device_tokens, offer()))
    assert advice.verdict == verdict
    assert number(advice, "Does the engine", "KV memory").flips_at == 2048


CHAT = Description(
    sessions=100, sessions_per_hour=3600, turns=5, think_seconds=600, prompt_tokens=640, growth_tokens=640
)
"""All 100 sessions have begun before the first comes back, and keep their order in every round."""


def test_chat_with_minutes_of_thinking_needs_host_memory():
    """Between two turns of a session all 99 others have theirs. The last session's last turn needs most: 99 paths of
    50 blocks, and its own of 40. The engine's 16,000 tokens keep nothing that long.
    """  # noqa: D205  # the promise is one sentence with its derivation
    advice = answer(CHAT, machine(16_000, offer()))
    assert (advice.verdict, advice.tiers) == ("tiers", ("host",))
    assert blocks_of(advice, "memory_bytes") == 99 * 50 + 40
    assert number(advice, "Does the engine", "KV memory").flips_at == pytest.approx((99 * 50 + 40) * 64, rel=0.03)


@pytest.mark.parametrize(("side", "verdict"), [(0.99, "engine"), (1.01, "tiers")])
def test_a_tiers_bandwidth_flips_its_answer(side, verdict):
    """Of 9,600 prompt tokens per session 6,400 come back. They are worth 6,400 ms, less 96 for asking; at b bytes per
    second loading takes 6,400 MB / b: equal at 1.0152 GB/s.
    """  # noqa: D205  # as above
    advice = answer(CHAT, machine(16_000, offer()))
    flips = number(advice, "Does host", "bandwidth").flips_at
    assert flips == pytest.approx(6400 * MEGABYTE / 6.304, rel=1e-6)
    assert answer(CHAT, machine(16_000, offer(speed=flips * side))).verdict == verdict


def test_numbers_that_people_can_use():
    """A small tier has a size, no share flips above all of it, and what saves nothing does not flip where it stands."""
    small = replace(machine(16_000, offer(), offer("disk", 7e9)), token_bytes=100)
    advice = answer(CHAT, small)
    assert leaf(advice, "Does host").answer == "yes: 0.0319 GB"
    nothing = number(advice, "Does disk", "seconds saved")
    assert (nothing.value, nothing.flips_at, nothing.flips_to) == (0, None, "")
    reuse = number(answer(CHAT, replace(small, prefill=lambda tokens, _: tokens * 1e-9)), "Is there", "prefill")
    assert (reuse.flips_at, reuse.flips_to) == (None, "yes")


@pytest.mark.parametrize(("side", "verdict"), [(0.99, "tiers"), (1.01, "engine")])
def test_the_price_of_room_flips_the_answer(side, verdict):
    """Room is bought while the seconds that it saves are worth more than it costs; a little above that, it is not."""
    where = machine(16_000, offer(), usd_per_hour=3600.0)
    flips = number(answer(CHAT, where), "Does host", "price").flips_at
    assert answer(CHAT, replace(where, offers=(offer(price=flips * side),))).verdict == verdict


def test_returns_after_hours_need_a_disk():
    """In host memory of 60 GB (937 blocks) nothing lives until its session is back, 1,000 blocks later: a disk pays."""
    told = msgspec_replace(CHAT, think_seconds=4 * 3600.0)
    advice = answer(told, machine(16_000, offer(capacity=60_000 * MEGABYTE), offer("disk", 7e9)))
    assert advice.tiers == ("disk",)
    assert blocks_of(advice, "disk_bytes") == 99 * 50 + 40
    assert leaf(advice, "Does host").answer == "no"


def msgspec_replace(told, **changes):
    return type(told)(**{field: getattr(told, field) for field in told.__struct_fields__} | changes)


def test_agents_with_short_pauses_need_the_engine_only():
    """Twenty steps within four seconds, and the next run ten seconds later: what is reused is one path old.

    A path is at most 13,200 tokens. Runs overlap now and then, so a few of them are enough, and one is not.
    """
    told = Description(
        sessions=50, sessions_per_hour=360, turns=20, think_seconds=0.2, prompt_tokens=1000, growth_tokens=640
    )
    advice = answer(told, machine(64_000, offer()))
    flips = number(advice, "Does the engine", "KV memory").flips_at
    assert advice.verdict == "engine"
    assert 10_000 < flips < 4 * 13_200
    for tokens, answered in ((int(flips), "yes"), (int(flips) - BLOCK, "no")):
        assert leaf(answer(told, machine(tokens, offer())), "Does the engine").answer == answered


RAG = Description(sessions=200, documents=20, document_tokens=6400, prompt_tokens=320)


def test_the_same_documents_on_two_machines_have_opposite_answers():
    """A link of 2 GB/s: where a token takes 1 ms break-even is at 1 GB/s, and it pays; where it takes 0.1 ms, at 10."""
    slow = answer(RAG, machine(20_000, offer(speed=2e9)))
    quick = answer(RAG, machine(20_000, offer(speed=2e9), token_seconds=1e-4))
    assert (slow.verdict, quick.verdict) == ("tiers", "engine")
    assert 1e9 < number(slow, "Does host", "bandwidth").flips_at < 1.2e9
    assert 1e10 < number(quick, "Does host", "bandwidth").flips_at < 1.2e10


def test_hot_documents_before_eight_instances_are_routed_by_overlap():
    """Eight documents, and each instance has room for one: by overlap each lives on one of them, by turns nowhere.

    A session is one request, so a hash of sessions is chance: one request in eight finds its document.
    """
    told = Description(sessions=400, sessions_per_hour=360, documents=8, document_tokens=6400, prompt_tokens=320)
    advice = answer(told, machine(7_000, instances=8))
    found = leaf(advice, "Which routing")
    hits = dict(zip(POLICIES, [int(part.split("hits ")[1].split()[0]) for part in found.why.split(";")], strict=True))
    assert found.answer == "predicted_ttft"
    assert hits["predicted_ttft"] > 80
    assert max(hits["session_hash"], hits["round_robin"]) < 25
    assert [line.value for line in advice.lines if line.setting == "policy"] == ["predicted_ttft"]


def test_hot_sessions_before_eight_instances_are_routed_by_overlap():
    """Eight conversations that keep an instance busy each: a hash puts two on one, and the router does not.

    A prompt is known but for 64 tokens, which take 64 ms, and comes again 80 ms later: two of them cannot keep up.
    """
    told = Description(
        sessions=8, sessions_per_hour=36_000, turns=50, think_seconds=0.08, prompt_tokens=640, growth_tokens=64
    )
    advice = answer(told, machine(100_000, instances=8))
    found = leaf(advice, "Which routing")
    seconds = {each.name: each.value for each in found.numbers}
    assert found.answer == "predicted_ttft"
    assert seconds["mean first token, session_hash"] > 1.5 * seconds["mean first token, predicted_ttft"]


def test_without_reuse_routing_does_not_matter():
    """Where chance cannot tell policies apart, the advice is the default."""
    told = Description(sessions=200, sessions_per_hour=3600, prompt_tokens=64)
    assert leaf(answer(told, machine(7_000, instances=2)), "Which routing").answer == POLICIES[0]


BATCH = Description(
    sessions=400, sessions_per_hour=1e6, documents=20, document_tokens=2048, prompt_tokens=256, reorderable=True
)


@pytest.mark.parametrize(("device_tokens", "verdict"), [(2048, "sort"), (2047, "tiers")])
def test_a_batch_is_sorted_by_prefix(device_tokens, verdict):
    """Sorted, a document is asked about before another one is: room for its 2,048 tokens is enough; no tier pays."""
    advice = answer(BATCH, machine(device_tokens, offer()))
    assert advice.verdict == verdict
    assert number(advice, "Does the engine", "KV memory").flips_at == 2048
    assert answer(msgspec_replace(BATCH, reorderable=False), machine(2048, offer())).verdict == "tiers"


DOCUMENTS = Description(sessions=300, documents=30, document_tokens=8192, prompt_tokens=256)


def published(model, gpu, tp, *tiers):
    asked = Asked(model=model, gpu=gpu, tp=tp, tiers=tiers, kv_tokens=20_000)
    return answer(DOCUMENTS, machine_of(asked, 8448))


def test_llama_70b_on_eight_h100_computes_sooner_than_one_drive_reads():
    """320 KiB a token over 7 GB/s are 47 us; eight H100 compute it in 30 to 40 (break-even: 8 to 9 GB/s).

    A drive of twice the speed is on the other side.
    """
    model = "meta-llama/Meta-Llama-3.1-70B"
    slow, quick = (published(model, "h100", 8, f"disk@{link}") for link in ("nvme-gen4", "nvme-gen5"))
    assert (slow.verdict, quick.verdict) == ("engine", "tiers")
    assert 7e9 < number(slow, "Does disk", "bandwidth").flips_at < 14e9


def test_a_32b_on_one_a100_reads_sooner_than_it_computes():
    """256 KiB a token over 7 GB/s are 37 us; one A100 takes 200 to 400 (break-even: 0.6 GB/s)."""
    advice = published("Qwen/Qwen2.5-32B-Instruct", "a100", 1, "disk")
    assert advice.tiers == ("disk",)
    assert 0.5e9 < number(advice, "Does disk", "bandwidth").flips_at < 1.5e9


# -- what every answer has ---------------------------------------------------------------------------------------------


HOUR = msgspec_replace(CHAT, think_seconds=3600.0)
REDIS = offer("redis", 12e9, price=0.001, shared=True)
TWO = machine(16_000, offer(), REDIS, instances=2, usd_per_hour=100.0)
CASES = {
    "no cache": (ONE_OFF, machine(100_000, offer())),
    "engine": (CHAT, machine(1_000_000, offer())),
    "sort": (BATCH, machine(4000, offer())),
    "host": (CHAT, machine(16_000, offer())),
    "disk": (HOUR, machine(16_000, offer(capacity=60_000 * MEGABYTE), offer("disk", 7e9))),
    "slow disk": (HOUR, machine(16_000, offer("disk", 0.4e9), token_seconds=1e-2)),
    "redis": (RAG, replace(TWO, offers=(REDIS,))),
    "both": (RAG, TWO),
}


@functools.cache
def case(name):
    return answer(*CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_is_ready(name, tmp_path):
    """What is advised loads as settings, each line behind its reason, with the tiers that the verdict names."""
    advice, path = case(name), tmp_path / "thermocline.toml"
    path.write_text(toml(advice))
    found = Settings.load(path, environ={})
    assert ("disk" in advice.tiers) == (found.disk_path is not None)
    assert ("redis" in advice.tiers) == (found.redis_url is not None)
    assert (found.memory_bytes > 1 << 20) == (advice.verdict != "no cache")
    text = path.read_text().splitlines()
    settings = [at for at, line in enumerate(text) if line and not line.startswith("#")]
    assert all(text[at - 1].startswith("# ") for at in settings)
    assert all(line.reason for line in advice.lines)


@pytest.mark.parametrize("name", CASES)
def test_every_leaf_has_numbers_and_a_command(name):
    """Each leaf has the numbers that decide, and names a command that exists, with options that it has."""
    for each in case(name).leaves:
        assert each.numbers
        program, verb, *words = each.test.split()
        assert program == "thermocline"
        options = {option for param in cli.app.commands[verb].params for option in param.opts}
        assert {word for word in words if word.startswith("--")} <= options | {"--policy"}


def test_policies_are_those_of_the_router():
    """The policies that are compared are the router's own, the default first."""
    assert POLICIES[0] == router.POLICIES[0]
    assert set(POLICIES) == set(router.POLICIES)


def test_our_own_engine_keeps_what_is_reused():
    """Where the engine's memory suffices, our own engine, which has no other, is given room for just what it takes."""
    told = Description(sessions=200, system_tokens=2048, prompt_tokens=512)
    assert blocks_of(answer(told, machine(100_000, offer())), "memory_bytes") == 2048 // BLOCK


def test_a_long_load_raises_its_deadline():
    """Where a load that pays takes longer than `load_seconds_max` allows, that is raised with it."""
    lines = {line.setting: line.value for line in case("slow disk").lines}
    assert lines["load_seconds_max"] >= 2560 * MEGABYTE / 0.4e9


# -- laws --------------------------------------------------------------------------------------------------------------

PATHS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(-1, 3), st.lists(st.integers(0, 2), max_size=5), st.just(0)),
    min_size=1,
    max_size=20,
).filter(lambda requests: any(path for _, _, path, _ in requests))


def least_recently_used(trace, requests, blocks):
    held, hits = OrderedDict(), {}
    for request in requests:
        path = trace.path(request).tolist()
        leading = 0
        while leading < len(path) and path[leading] in held:
            leading += 1
        hits[request] = leading * trace.tokens_per_block
        for block in reversed(path):
            held[block] = None
            held.move_to_end(block)
        while len(held) > blocks:
            held.popitem(last=False)
    return hits


@given(PATHS, st.integers(0, 12), st.integers(1, 3))
def test_what_is_held_is_what_a_cache_would_hold(requests, blocks, instances):
    """For every size, each request finds in the study what it finds in a cache that is played through, per instance."""
    trace = made(requests)
    study = Study(trace, machine(0, instances=instances))
    homes = [
        [at for at, session in enumerate(trace.sessions) if (session if session >= 0 else at) % instances == home]
        for home in range(instances)
    ]
    played = {at: tokens for home in homes for at, tokens in least_recently_used(trace, home, blocks).items()}
    assert study.held(blocks).tolist() == [played[at] for at in range(len(trace))]


def test_prompts_shorter_than_a_block_share_nothing():
    """A workload whose prompts fill no block has nothing to keep, and no division by nothing."""
    advice = answer(Description(prompt_tokens=10, reorderable=True), machine(1000, offer(), instances=2))
    assert advice.verdict == "no cache"


@given(PATHS, st.integers(0, 12), st.integers(1, 3))
def test_an_oracle_is_never_worse(requests, blocks, instances):
    """A cache that knows what comes hits at least as much as one that does not, and no more than an endless one."""
    trace = made(requests)
    study = Study(trace, machine(0, instances=instances))
    oracle = oracle_hit(study, blocks) * int(trace.input_tokens.sum())
    assert study.held(blocks).sum() <= oracle + 1e-6
    assert oracle <= study.held(1000).sum() + 1e-6


@given(PATHS, st.integers(0, 4), st.integers(0, 8), st.integers(0, 12), st.floats(1e8, 1e11), st.floats(1e8, 1e11))
def test_all_or_nothing_of_a_run_is_best(requests, device, host, disk, quick, slow):
    """Where late tokens take longer, no cut inside a run saves more than one of its ends: what is used is the best."""
    where = replace(
        machine(device * 4), prefill=lambda tokens, cached: 1e-3 * tokens * (1 + 0.01 * (2 * cached + tokens))
    )
    study = Study(made(requests), where)
    tiers = sorted(((host, quick), (disk, slow)), key=lambda each: -each[1])
    saved = 0.0
    for request, first in enumerate(study.held(device).tolist()):
        held, cuts, load = first, {first: 0.0}, 0.0
        for blocks, speed in tiers:
            more = max(held, int(study.held(blocks)[request]))
            cuts |= {cut: load + (cut - held) * MEGABYTE / speed for cut in range(held, more + 1)}
            load, held = cuts[more], more
        values = study.worth_seconds(np.array(list(cuts))) - np.array(list(cuts.values()))
        saved += float(values.max())
    sized = [(offer(f"t{at}", speed), blocks) for at, (blocks, speed) in enumerate(tiers)]
    assert study.use(sized).saved_seconds * study.hours == pytest.approx(saved)


@given(PATHS, st.integers(0, 6), st.floats(1e6, 1e11), st.floats(1.1, 10))
def test_a_quicker_tier_is_never_worse(requests, device, speed, times):
    """The best set of tiers gains no less when a tier is quicker, when one more is offered, or against none at all."""
    study = Study(made(requests), machine(device * 4))
    slow, quick = offer(speed=speed), offer(speed=speed * times)
    nets = [study.net(study.best(offers)) for offers in ((), (slow,), (quick,), (quick, offer("disk", 1e9)))]
    assert nets == sorted(nets)


@given(PATHS, st.integers(1, 3))
def test_sorting_changes_the_order_only(requests, instances):
    """Sorted by prefix there are the same prompts at the same times, those with like beginnings side by side."""
    trace = made(requests)
    found = by_prefix(trace, instances)
    paths = [tuple(found.path(at)) for at in range(len(found))]
    assert sorted(paths) == sorted(tuple(trace.path(at)) for at in range(len(trace)))
    assert paths == sorted(paths)
    assert np.array_equal(found.arrival_seconds, trace.arrival_seconds)


# -- counters ----------------------------------------------------------------------------------------------------------


def observed(engine=0.0, lost=None, *, never_full=False, unsure=0.0, fresh=50_000.0, **tiers):
    return Observed("the test", 100, 100_000, engine, tiers, lost, never_full, fresh, unsure)


@pytest.mark.parametrize(
    ("seen", "verdict"),
    [
        (observed(never_full=True), "no cache"),
        (observed(lost={}), "no cache"),
        (observed(), "unknown"),
        (observed(engine=50_000.0, never_full=True), "engine"),
        (observed(engine=50_000.0), "unknown"),
        (observed(lost={"EVICTED": 30_000.0}), "tiers"),
        (observed(host=20_000.0, lost={}), "tiers"),
        (observed(lost={}, unsure=20_000.0), "unknown"),
        (observed(lost={}, unsure=500.0), "no cache"),
        (observed(engine=50_000.0, lost={}, unsure=20_000.0), "unknown"),
        (observed(lost={"EVICTED": 30_000.0}, unsure=20_000.0), "tiers"),
    ],
)
def test_counters_answer_what_they_can(seen, verdict):
    """What was hit is a lower bound of reuse; the rest is known only if nothing was dropped, or reasons are told.

    What may have been known once, too long ago to say, makes no "no" certain, unless it is too little to matter.
    """
    assert judge(seen, machine(16_000, offer())).verdict == verdict


@pytest.mark.parametrize(("side", "tiers"), [(0.99, ()), (1.01, ("host",))])
def test_a_link_pays_per_use_above_its_break_even(side, tiers):
    """30 % of 1,000 tokens come back: worth 300 ms, 300 MB to load, so break-even is at 1 GB/s."""
    seen = observed(lost={"EVICTED": 30_000.0})
    advice = judge(seen, machine(16_000, offer()))
    flips = number(advice, "Does host", "bandwidth").flips_at
    assert flips == pytest.approx(1e9)
    assert judge(seen, machine(16_000, offer(speed=flips * side))).tiers == tiers


def test_what_is_told_to_be_run_can_be_run():
    """Receipts are added up only where a server has some: of one that counts alone the doctor is asked."""
    for lost, test in ((None, "thermocline doctor"), ({}, "thermocline why --summary")):
        assert judge(observed(lost=lost), machine(16_000, offer())).leaves[0].test == test


LOST = {"EVICTED": 30_000.0}


@pytest.mark.parametrize(
    ("seen", "capacity", "value", "words"),
    [
        (observed(lost=LOST, fresh=50_000.0), None, "1GiB", "--tier host=SIZE"),
        (observed(lost=LOST, fresh=50_000.0), 8 << 30, "8192MiB", "as large as was offered"),
        (observed(lost=LOST, fresh=50_000.0), 100_000_000_000, "47684MiB", "more was of no use"),
        (observed(lost=LOST, fresh=500.0), None, "477MiB", "more was of no use"),
        (observed(lost=LOST, fresh=None), None, "1GiB", "how much would be of use is not told"),
        (observed(engine=50_000.0, never_full=True), None, "15259MiB", "for our own engine"),
        (observed(engine=50_000.0, never_full=True, fresh=500.0), None, "477MiB", "for our own engine"),
        (observed(lost={}), None, "1MiB", "no tier pays"),
    ],
)
def test_counters_give_a_configuration(seen, capacity, value, words):
    """A tier is as large as was offered, or as the default; and no larger than all that came to be, a MB a token.

    Where none pays, our own engine is given what the engine's memory is, as it has no other.
    """
    advice = judge(seen, machine(16_000, offer(capacity=capacity)))
    (line,) = [each for each in advice.lines if each.setting == "memory_bytes"]
    assert line.value == value
    assert words in line.reason
    assert ("ttl_seconds" in {each.setting for each in advice.lines}) == bool(advice.tiers)


def test_one_of_many_does_not_bound_what_all_share():
    """What one instance computed bounds its own memory; a tier that several share is of use to the others, too."""
    room = {each: replace(offer(capacity=8 << 30), tier=each, shared=each == "redis") for each in ("host", "redis")}
    seen = observed(lost=LOST, fresh=500.0)
    several = replace(machine(16_000, *room.values()), instances=3)
    lines = {each.setting: each.value for each in judge(seen, several).lines}
    assert (lines["memory_bytes"], lines["redis_bytes"]) == ("477MiB", "8192MiB")
    lines = {each.setting: each.value for each in judge(seen, replace(several, instances=1)).lines}
    assert lines["redis_bytes"] == "477MiB"


def test_what_is_unknown_has_no_configuration():
    """Where counters do not tell whether tiers pay there is no line; the answer names what would tell."""
    advice = judge(observed(engine=50_000.0), machine(16_000, offer()))
    assert advice.lines == ()
    assert "--node" in advice.so


def test_counters_choose_no_policy():
    """With several instances the default is named as what it is."""
    several = replace(machine(16_000, offer()), instances=3)
    advice = judge(observed(lost=LOST), several)
    (line,) = [each for each in advice.lines if each.setting == "policy"]
    assert "default" in line.reason
