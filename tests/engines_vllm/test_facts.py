"""What vLLM says of itself: engines that could not be served exactly are refused at the start, with what to do."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from thermocline.engines.vllm import facts
from thermocline.errors import LayoutError


def named(kind, **fields):
    """A spec of a class of this name."""
    return type(kind, (SimpleNamespace,), {})(**{"block_size": 16, "prefix_cacheable": True, **fields})


def configs(*specs, policy="recompute", **sizes):
    """A configuration of vLLM's with these KV groups."""
    vllm = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(kv_load_failure_policy=policy),
        parallel_config=SimpleNamespace(**sizes),
        cache_config=SimpleNamespace(enable_prefix_caching=True),
    )
    return vllm, SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


FULL = named("FullAttentionSpec")


@pytest.mark.parametrize(
    "specs",
    [
        [FULL],
        [FULL, named("SlidingWindowSpec", sliding_window=128)],
        [named("MLAAttentionSpec")],
        [named("UniformTypeKVCacheSpecs", kv_cache_specs={"a": FULL, "b": named("SlidingWindowSpec")})],
    ],
)
def test_attention_is_served(specs):
    """Full, sliding and latent attention, and groups that mix them."""
    vllm, pages = configs(*specs)
    facts.check(vllm, pages)
    assert facts.has_windows(pages) == ("Sliding" in repr(specs))


@pytest.mark.parametrize(
    ("specs", "options", "told"),
    [
        ([FULL, named("MambaSpec")], {}, "recurrent state"),
        ([named("UniformTypeKVCacheSpecs", kv_cache_specs={"a": FULL, "b": named("MambaSpec")})], {}, "recurrent"),
        ([named("CrossAttentionSpec")], {}, "CrossAttentionSpec"),
        ([named("FullAttentionSpec", prefix_cacheable=False)], {}, "FullAttentionSpec"),
        ([named("SlidingWindowSpec", prefix_replay_tokens=64)], {}, "SlidingWindowSpec"),
        ([FULL, named("FullAttentionSpec", block_size=32)], {}, r"\[16, 32\]"),
        ([named("FullAttentionSpec", block_size=8)], {}, "multiple of 16"),
        ([FULL], {"policy": "fail"}, "recompute"),
        ([FULL], {"decode_context_parallel_size": 2}, "context parallelism"),
    ],
)
def test_what_cannot_be_served_is_refused(specs, options, told):
    """Recurrent states, unknown kinds of state, unequal blocks, and settings that would fail requests: with a hint."""
    with pytest.raises(LayoutError, match=told) as caught:
        facts.check(*configs(*specs, **options))
    assert caught.value.hint


def test_without_prefix_caching_nothing_is_kept(caplog):
    """Where vLLM reuses no prefix (as for latent attention on a CPU), we do not either, and say so."""
    vllm, _ = configs(FULL)
    assert facts.is_of_use(vllm)
    vllm.cache_config.enable_prefix_caching = False
    assert not facts.is_of_use(vllm)
    assert "prefix caching is off" in caplog.text
