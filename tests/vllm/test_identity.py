"""24 prompts, 24 greedy tokens each, on real vLLM: every arm answers what no cache answers."""

from __future__ import annotations

import pytest

from tests.vllm.arms import at_once, cold, distance, loaded, same, saved
from tests.vllm.node import MIB
from tests.vllm.prompts import all_prompts, loadable, prompt
from tests.vllm.server import CLOCK, EXACT

pytestmark = pytest.mark.vllm_long
PROMPTS = all_prompts()
LOADABLE = sum(map(loadable, PROMPTS))
ROUNDING = 1e-5
"""What a float32 log-probability differs by where the same sums are made in another order. In bf16, vLLM's own hits are
0.03 off."""


def _own(server):
    """What vLLM answers from its own prefix cache: every prompt asked twice in a row, then with what others left."""
    alone = []
    for each in PROMPTS:
        server.forget()
        server.ask(each, 1)
        alone.append(server.ask(each))
    server.forget()
    for each in PROMPTS:
        server.ask(each, 1)
    return alone, [server.ask(each) for each in PROMPTS]


def _check(server, expected, warm, arm, report, tier="memory"):
    """Same tokens as `expected`, all loaded, some from that tier, and no further off than vLLM's own hit."""
    found = loaded(server, PROMPTS, expected, arm)
    bits = sum(ours.logprobs == theirs.logprobs for ours, theirs in zip(found.answers, warm[0], strict=True))
    away, own = distance(found.answers, expected), max(distance(each, expected) for each in warm)
    report(
        f"{arm}: tokens equal {len(PROMPTS)}/{len(PROMPTS)}, {found}, all of {LOADABLE}; log-probabilities at most "
        f"{away:.6f} from cold (vLLM's own hit: {own:.6f}), {bits}/{len(PROMPTS)} bit-equal to vLLM's own hit"
    )
    assert away <= own + ROUNDING
    assert found.by_tier[tier] > 0


def _from_memory(start_node, start_vllm, arguments, arm, report):
    """With these arguments vLLM saves to a node's memory and loads from it what it answers without a connector."""
    plain = start_vllm(*arguments)
    expected = cold(plain, PROMPTS)
    warm = _own(plain)
    plain.close()
    server = start_vllm(*arguments, node=start_node().socket)
    same(cold(server, PROMPTS), expected, "nothing kept")
    saved(server, PROMPTS, expected)
    _check(server, expected, warm, arm, report)


@pytest.fixture
def report(record_property, capsys):
    """Prints a figure and keeps it in the report."""

    def say(text):
        record_property("figure", text)
        with capsys.disabled():
            print(f"\n    {text}", end="")  # noqa: T201  # figures of long runs are for people

    return say


def test_arms(start_node, start_vllm, folder, redis_server, report):
    """No connector, vLLM's own hit, memory, disk, a new engine, a second engine, Redis: all answers are equal."""
    redis_server.call("FLUSHALL")
    plain = start_vllm(*EXACT)
    expected = cold(plain, PROMPTS)
    same(cold(plain, PROMPTS), expected, "no connector, again")
    warm = _own(plain)
    same(warm[0], expected, "vLLM's own hit")
    plain.close()
    redis = {"redis_url": redis_server.url, "redis_gain_min": 0}
    node = start_node(disk_path=folder / "disk", disk_bytes=512 * MIB, **redis)
    server = start_vllm(*EXACT, node=node.socket)
    same(cold(server, PROMPTS), expected, "connector, nothing kept")
    saved(server, PROMPTS, expected)
    _check(server, expected, warm, "memory", report)
    node.restart()
    _check(server, expected, warm, "disk, node restarted", report, "disk")
    second = start_vllm(*EXACT, node=node.socket)
    _check(second, expected, warm, "second engine on the same node", report)
    server.close()
    second.close()
    third = start_vllm(*EXACT, node=node.socket)
    node.restart()
    _check(third, expected, warm, "new engine process, node restarted", report, "disk")
    node.restart(disk_path=folder / "other")
    _check(third, expected, warm, "Redis, node with nothing else", report, "redis")


CHUNKED = (*EXACT, "--enable-chunked-prefill", "--max-num-batched-tokens", "256")


def test_chunked_prefill(start_node, start_vllm, report):
    """Prompts that are computed 256 tokens at a time are saved and loaded as any other."""
    _from_memory(start_node, start_vllm, CHUNKED, "chunked prefill", report)


def test_eight_at_once(start_node, start_vllm, report):
    """Eight requests at a time are answered as one at a time."""
    node = start_node()
    server = start_vllm(*EXACT, node=node.socket)
    expected = cold(server, PROMPTS)
    same(cold(server, PROMPTS, at_once=8), expected, "eight at once, nothing kept")
    same(at_once(server, PROMPTS), expected, "eight at once, saving")
    saved(server, PROMPTS, expected)
    answers = at_once(server, PROMPTS)
    same(answers, expected, "eight at once, loading")
    count = sum(each.loaded for each in answers)
    report(f"eight at once: tokens equal {len(PROMPTS)}/{len(PROMPTS)}, loaded {count} of {LOADABLE}")
    assert count >= LOADABLE // 2, "the engine's own cache finds what a neighbour just loaded; the rest is ours"


PORTIONS = ((1500, (1408, 640, 128)), (2049, (1920, 1024)), (3000, (2976, 1024, 32)))


def test_same_portions_same_tokens(start_node, start_vllm, report):
    """After the same history of partial hits a loaded prefix gives the tokens of vLLM's own hit, where those flip too.

    In bf16 a prompt that is computed in other portions has other bits, and near ties flip: in plain vLLM as well. So
    what is loaded is held to what plain vLLM has after the very same portions, not to a cold answer.
    """
    node = start_node()
    plain, server = start_vllm(), start_vllm(node=node.socket)
    flipped = count = 0
    for tokens, portions in PORTIONS:
        for portion in portions:
            text, salt = prompt(tokens + portion, tokens), f"{tokens} {portion}"
            cold_tokens = plain.ask(text, cache_salt=salt + " cold").tokens
            plain.ask(text[: portion + 1], 1, cache_salt=salt)
            own = [plain.ask(text, cache_salt=salt).tokens for _ in range(2)]
            _held(server, text[: portion + 1], 1, salt)
            assert _held(server, text, 24, salt, least=portion) == own[0], f"{portion} of {tokens} tokens loaded"
            assert _held(server, text, 24, salt) == own[1], f"all of {tokens} tokens loaded"
            flipped, count = flipped + (own[1] != cold_tokens), count + 1
    report(f"same portions: {2 * count} answers as of vLLM's own hits, {flipped} of {count} of which differ from cold")


def _held(server, text, count, salt, *, least=None):
    """The answer once so many tokens (all that can be, by default) were loaded for it."""
    least = loadable(text) if least is None else least
    deadline = CLOCK.now() + 60
    while True:
        server.forget()
        answer = server.ask(text, count, cache_salt=salt)
        if answer.loaded >= least:
            return answer.tokens
        assert CLOCK.now() < deadline, f"never loaded: {answer.receipt}"


TINY_SPACE = ("--num-gpu-blocks-override", "132", "--max-num-seqs", "8", *EXACT)


def test_preemption(start_node, start_vllm, report):
    """Requests that vLLM preempts, because its KV space is tiny, are answered as with room to spare."""
    prompts = [prompt(400 + at, 480 + 7 * at) for at in range(8)]
    node = start_node()
    server = start_vllm(*TINY_SPACE, node=node.socket)
    expected = cold(server, prompts, 96)
    saved(server, prompts, expected, 96)
    before = server.metric("vllm:num_preemptions_total")
    answers = at_once(server, prompts, 96)
    preempted = server.metric("vllm:num_preemptions_total") - before
    report(f"preemption: {preempted:.0f} preemptions, loaded {sum(each.loaded for each in answers)} tokens")
    assert preempted > 0, "nothing was preempted"
    same(answers, expected, "preempted")


TWO_RANKS = (*EXACT, "--tensor-parallel-size", "2")


def test_two_ranks(start_node, start_vllm, report):
    """Two ranks, each with half of the heads in a process of its own, load what they saved, and only together."""
    _from_memory(start_node, start_vllm, TWO_RANKS, "two ranks, memory", report)
