"""Steady attention: right, and equal to the last bit however the work is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from thermocline.engines.attention import STRETCH, TILE_TOKENS, steady_attention

HEADS, KV_HEADS, DIM = 8, 2, 64
LONGEST = 1600
MODULE = nn.Module()


def states(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a long text. Behind it lies garbage, as in a tensor that was used before."""
    random = torch.Generator().manual_seed(seed)
    room = 2 * LONGEST
    query, key, value = (torch.randn(1, heads, room, DIM, generator=random) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return (3 * query).to(dtype), key.to(dtype), value.to(dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, start: int, stop: int) -> Tensor:
    """Tokens [start, stop) of a text, [tokens, heads, dim]."""
    return steady_attention(MODULE, query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], None)[0][0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@given(cuts=st.sets(st.integers(0, LONGEST // TILE_TOKENS - 1), max_size=6), seed=st.integers(0, 3))
@settings(max_examples=15)
def test_bits_do_not_depend_on_the_cuts(dtype: torch.dtype, cuts: set[int], seed: int) -> None:
    """A text computed in any pieces of whole tiles has the bits of the text computed at once."""
    query, key, value = states(dtype, seed)
    ends = [*(cut * TILE_TOKENS for cut in sorted(cuts) if cut), LONGEST]
    pieces = [attend(query, key, value, start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
    assert torch.equal(torch.cat(pieces), attend(query, key, value, 0, LONGEST))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_do_not_depend_on_what_follows(dtype: torch.dtype) -> None:
    """A token has the same bits in a short text and in a longer one, one tile at a time and in one go."""
    query, key, value = states(dtype)
    whole = attend(query, key, value, 0, LONGEST)
    for stop in (TILE_TOKENS, 60, STRETCH - 4, STRETCH, STRETCH + 4, 1024, 1500):
        assert torch.equal(attend(query, key, value, 0, stop), whole[:stop])
        assert torch.equal(attend(query, key, value, stop - TILE_TOKENS, stop), whole[stop - TILE_TOKENS : stop])


def test_it_is_causal_attention() -> None:
    """The result is what torch computes, up to rounding."""
    query, key, value = (part[:, :, :700] for part in states(torch.float32))
    reference = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)[0]
    torch.testing.assert_close(attend(query, key, value, 0, 700), reference, rtol=1e-4, atol=1e-4)


def test_tensors_without_room_are_copied() -> None:
    """Keys and values whose memory ends with the text give the same bits."""
    query, key, value = states(torch.bfloat16)
    for stop in (4, 100, 1600):
        tight = [part[:, :, :stop].clone() for part in (query, key, value)]
        assert torch.equal(attend(*tight, 0, stop), attend(query, key, value, 0, stop))


@pytest.mark.parametrize("option", ["softcap", "s_aux", "position_bias", "sliding_window"])
def test_other_kinds_of_attention_are_refused(option: str) -> None:
    """A variant that it does not compute is an error, never a wrong result."""
    query, key, value = (part[:, :, :8] for part in states(torch.float32))
    with pytest.raises(ValueError, match="plain causal"):
        steady_attention(MODULE, query, key, value, None, **{option: 1})
    with pytest.raises(ValueError, match="plain causal"):
        steady_attention(MODULE, query, key, value, torch.zeros(8, 8))
