"""When loading beats computing: break-even bandwidths, and the prefix length from which a link pays."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermocline.costs.hardware import accelerator
from thermocline.costs.memory import sequence_bytes
from thermocline.costs.model import LearnedCosts
from thermocline.costs.models import find
from thermocline.costs.roofline import Setup, prefill_of
from thermocline.costs.transfer import (
    LINKS,
    TAIL_TOKENS,
    Link,
    breakeven_bytes_per_second,
    host_link,
    pays_from,
    transfer_seconds,
)
from thermocline.errors import SettingsError

LLAMA = find("Meta-Llama-3.1-70B")


def kept(tokens):
    """Bytes of a prefix, over all ranks."""
    return sequence_bytes(LLAMA, tokens)


@pytest.mark.parametrize(
    ("name", "first", "deep", "at"), [("A100-80", 3.4e9, 2.1e9, 32_000), ("H100", 8.0e9, 3.2e9, 128_000)]
)
def test_break_even_bandwidths_of_a_70b(name, first, deep, at):
    """On eight accelerators, and falling with depth: within 25 % of what fits to measured kernels give."""
    prefill = prefill_of(Setup(LLAMA, accelerator(name), tp=8))
    assert breakeven_bytes_per_second(kept, prefill, 0, 4096) == pytest.approx(first, rel=0.25)
    assert breakeven_bytes_per_second(kept, prefill, at, 4096) == pytest.approx(deep, rel=0.25)


def test_a_shared_redis_does_not_pay_for_a_70b_and_a_fast_link_does():
    """At 1 GB/s loading 31k tokens of a 70B takes longer than computing them on 8 x A100; at 10 GB/s it does not."""
    prefill = prefill_of(Setup(LLAMA, accelerator("A100-80"), tp=8))
    redis = pays_from(LINKS["redis"], kept, prefill, 32_768)
    assert redis.from_tokens is None
    assert redis.load_seconds == pytest.approx(10.7, rel=0.05)
    fast = pays_from(replace(LINKS["redis"], bytes_per_second=10e9), kept, prefill, 32_768)
    assert fast.from_tokens == 128
    assert fast.load_seconds < redis.compute_seconds


@given(
    st.floats(1e6, 1e11),
    st.floats(0, 1.0),
    st.floats(1e-6, 1e-3),
    st.floats(0, 1e-8),
    st.integers(1, 1 << 20),
)
def test_the_answer_is_the_border(bandwidth, latency, per_token, per_pair, token_bytes):
    """From the length that is named on loading pays, and one step before it does not."""

    def prefill(tokens, cached):
        return per_token * tokens + per_pair * tokens * (cached + tokens / 2)

    def size(tokens):
        return tokens * token_bytes

    link = Link("any", "remote", bandwidth, latency, "given", "given")

    def gains(tokens):
        computed = prefill(tokens + TAIL_TOKENS, 0) - prefill(TAIL_TOKENS, tokens)
        return transfer_seconds(link, size(tokens)).seconds < computed

    found = pays_from(link, size, prefill, 4096).from_tokens
    assert all(gains(tokens) for tokens in range(found or 4224, 4097, 128))
    before = 4096 if found is None else found - 128
    assert before == 0 or not gains(before)


def test_learned_costs_can_take_the_place_of_the_formula():
    """What an engine has shown decides, where it was measured: the same function, another prefill."""
    costs = LearnedCosts()
    for size in (512, 1024, 4096, 8192) * 3:
        costs.recomputed(size, 0, 1e-4 * size)
    assert breakeven_bytes_per_second(kept, costs.recompute, 0) == pytest.approx(327_680 / 1e-4, rel=0.1)


@pytest.mark.parametrize("name", LINKS)
def test_links_say_what_they_rest_on(name):
    """Each link has its evidence and source, and they come along with every estimate."""
    link = LINKS[name]
    assert link.evidence in {"measured", "unverified"}
    assert link.source in transfer_seconds(link, 1).assumptions[0]


def test_the_way_to_the_host():
    """The faster of its ways; unknown is an error, not a guess."""
    assert host_link(accelerator("H100")).bytes_per_second == 64e9
    assert host_link(accelerator("GB200")).bytes_per_second == 225e9
    with pytest.raises(SettingsError):
        host_link(replace(accelerator("L4"), pcie_bytes_per_second=None))
