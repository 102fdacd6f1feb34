"""Steady attention: a token's result has the same bits however the work around it was cut.

A cache may only be compared with "no cache" if computing a prompt in one go, from a loaded prefix, or token by token
gives the same numbers; in bfloat16 one differing last bit flips a greedy token every few dozen steps. torch's kernel
takes queries in tiles and keys in stretches of up to 512, and its last bits depend on both. So here every stretch of
keys is 512 long, counted from the start of the text, and what lies beyond the text is masked: a masked key has weight
zero exactly. Tiles of fewer than 4 queries take another path through the matrix library, so the engine computes
TILE_TOKENS at a time. That costs nothing on CPU, where one row of a matrix product is as dear as four.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "thermocline_steady"
VERSION = 1
"""Part of every layout: raise it when a change below can change a bit of the result."""

TILE_TOKENS = 4
STRETCH = 512


class _Staircase:
    """Additive causal masks, cut as views from one tensor per numeric type that grows with the longest text."""

    def __init__(self) -> None:
        self._steps: dict[torch.dtype, Tensor] = {}

    def cut(self, start: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns] of which row r sees columns 0 to start + r. At most STRETCH rows."""
        width = start + 2 * STRETCH
        steps = self._steps.get(dtype)
        if steps is None or steps.shape[1] < width:
            width = 1 << (width - 1).bit_length()
            steps = torch.full((STRETCH, width), float("-inf"), dtype=dtype).triu_(width - 2 * STRETCH + 1)
            self._steps[dtype] = steps
        left = steps.shape[1] - 2 * STRETCH - start
        return steps[:rows, left : left + columns]


_STAIRCASE = _Staircase()


def steady_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,  # noqa: ARG001  # transformers passes it; a served model never drops
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Causal attention in the form transformers asks for: [1, heads, tokens, dim] to [1, tokens, heads, dim].

    The queries are the last tokens of the keys. Raises ValueError for variants of attention that it does not know.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias", "sliding_window") if kwargs.get(name) is not None]
    if attention_mask is not None or unknown or not getattr(module, "is_causal", True):
        raise ValueError(f"steady attention is plain causal attention, without {unknown or 'masks'}")
    rows, length = query.shape[2], key.shape[2]
    start = length - rows
    key, value = _widen(key), _widen(value)
    parts = []
    for row in range(0, rows, STRETCH):
        part = query[:, :, row : row + STRETCH]
        columns = _whole_stretches(start + row + part.shape[2])
        mask = _STAIRCASE.cut(start + row, part.shape[2], columns, query.dtype)
        parts.append(
            scaled_dot_product_attention(
                part, key[:, :, :columns], value[:, :, :columns], mask, scale=scaling, enable_gqa=True
            )
        )
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    return whole.transpose(1, 2).contiguous(), None


def _whole_stretches(tokens: int) -> int:
    return -(-tokens // STRETCH) * STRETCH


def _widen(states: Tensor) -> Tensor:
    """Up to a whole number of stretches. The engine's tensors have that room behind the text; others are copied."""
    batch, heads, length, dim = states.shape
    columns = _whole_stretches(length)
    end = states.storage_offset() + (heads - 1) * states.stride(1) + columns * states.stride(2)
    if end * states.element_size() <= states.untyped_storage().nbytes():
        return states.as_strided((batch, heads, columns, dim), states.stride())
    return pad(states, (0, 0, 0, columns - length))


def _no_mask(*_: object, **__: object) -> None:
    """No mask is built for a forward pass: steady attention makes its own."""


AttentionInterface.register(NAME, steady_attention)
AttentionMaskInterface.register(NAME, _no_mask)
