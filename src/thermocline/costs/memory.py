"""What a model's geometry takes in bytes: of a token, of a sequence, on one rank, and what an accelerator has room for.

full        2 * layers * kv_heads * head_dim * bytes each * tokens
latent      layers * (rank + rope) * bytes each * tokens           whole on every tensor-parallel rank
window      layers * ... * min(tokens, window)
state       layers * (state * 4 + convolution * 2)                 per sequence, however long
"""

from __future__ import annotations

from thermocline.costs.geometry import Attention, Geometry
from thermocline.errors import SettingsError

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
STATE_BYTES_EACH, CONV_BYTES_EACH = 4, 2


def token_bytes(geometry: Geometry, kv_dtype: str = "") -> int:
    """Bytes that one more token takes when the sequence is longer than every window; not sharded.

    `kv_dtype` is one of `DTYPE_BYTES`; "" is the checkpoint's own.
    """
    return sum(
        each.layers * layer_token_bytes(each, kv_dtype or geometry.kv_dtype)
        for each in geometry.attention
        if each.window_tokens is None
    )


def sequence_bytes(geometry: Geometry, tokens: int, kv_dtype: str = "", *, tp: int = 1, pp: int = 1) -> int:
    """Bytes of one sequence of so many tokens, its states included, on the fullest rank of `tp` times `pp`."""
    kv_dtype = kv_dtype or geometry.kv_dtype
    kept = 0
    for each in geometry.attention:
        count = tokens if each.window_tokens is None else min(tokens, each.window_tokens)
        kept += -(-each.layers // pp) * layer_token_bytes(each, kv_dtype, tp) * count
    return kept + -(-state_bytes(geometry, tp) // pp)


def state_bytes(geometry: Geometry, tp: int = 1) -> int:
    """Bytes of the constant states of one sequence, on each of `tp` ranks; 0 for a model without."""
    state = geometry.state
    if state is None:
        return 0
    return state.layers * -(-(state.state_elements * STATE_BYTES_EACH + state.conv_elements * CONV_BYTES_EACH) // tp)


def layer_token_bytes(attention: Attention, kv_dtype: str, tp: int = 1) -> int:
    """Bytes of one token in one layer, on one of `tp` ranks.

    Heads are split over the ranks, and repeated where there are fewer heads than ranks; a latent vector is whole on
    every rank.
    """
    if kv_dtype not in DTYPE_BYTES:
        raise SettingsError(
            f"{kv_dtype} is no data type of a KV cache that is known here", hint=f"one of {', '.join(DTYPE_BYTES)}"
        )
    if attention.latent_elements:
        return attention.latent_elements * DTYPE_BYTES[kv_dtype] + attention.index_bytes
    heads = max(1, -(-attention.kv_heads // tp))
    return heads * (attention.head_dim_k + attention.head_dim_v) * DTYPE_BYTES[kv_dtype] + attention.index_bytes
