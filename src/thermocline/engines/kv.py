"""Where a request's keys and values lie while it runs: one tensor from a pool, written in place and used again.

Fresh memory is dearer than any copy on this path, because every page of it must be faulted in. So tensors are kept,
and a token's keys and values are written where they will stay.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from thermocline.blocks.layout import Layout
from thermocline.engines.attention import STRETCH, TILE_TOKENS
from thermocline.engines.pages import fresh_memory

ORDER = "layer,kv,head,token,dim"
PREFAULT_BYTES = 64 << 20
PREFAULT_TOKENS = 4096


class Kv:
    """The keys and values of one text: `length` tokens of at most `capacity`.

    `cache` is what a transformers model takes as `past_key_values`. A forward pass writes behind `length` and leaves
    `length` alone: whoever ran it says with `grow` how many of its tokens count.
    """

    def __init__(self, layout: Layout, dtype: torch.dtype, tokens: int, *, faulted: bool = False) -> None:
        self.length = 0
        self.capacity = _capacity(tokens)
        per_block = layout.tokens_per_block
        slots = -(-self.capacity // per_block) * per_block
        shape = (layout.layers, 2, layout.kv_heads, slots, layout.head_dim)
        memory = fresh_memory(slots // per_block * layout.block_bytes, faulted=faulted)
        self.nbytes = memory.nbytes
        self.tensor = torch.from_numpy(memory).view(dtype).view(shape)
        words = _words(memory).reshape(*shape[:3], slots // per_block, -1)
        self._blocks = words.transpose(3, 0, 1, 2, 4)
        self.cache = DynamicCache()
        self.cache.layers = [GrowingLayer(self, self.tensor[layer]) for layer in range(layout.layers)]

    def grow(self, tokens: int) -> None:
        """The last forward pass computed this many tokens that count."""
        self.length += tokens

    def write(self, at: int, rows: NDArray[np.uint8]) -> None:
        """Copy blocks, one per row in layout order, in from block `at` on."""
        into = self._blocks[at : at + len(rows)]
        np.copyto(into, _words(rows).reshape(into.shape))

    def read(self, at: int, rows: NDArray[np.uint8]) -> None:
        """Copy blocks out from block `at` on, one into each row, in layout order."""
        source = self._blocks[at : at + len(rows)]
        np.copyto(_words(rows).reshape(source.shape), source)


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]  # transformers types some of its classes only
    """A plain growing layer whose tensors have room: a token is written in place instead of copying all before it."""

    def __init__(self, kv: Kv, states: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self._kv = kv
        self._keys, self._values = states[0][None], states[1][None]
        self.dtype, self.device = states.dtype, states.device
        self.keys, self.values = self._keys, self._values
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the new tokens behind the text; views of everything up to them."""
        start = self._kv.length
        stop = start + key_states.shape[2]
        self._keys[:, :, start:stop] = key_states
        self._values[:, :, start:stop] = value_states
        return self._keys[:, :, :stop], self._values[:, :, :stop]

    def get_seq_length(self) -> int:
        """Tokens before the next forward pass."""
        return self._kv.length


class KvPool:
    """Hands out `Kv`s and takes them back. All of them together never exceed `bytes_max`, or one longest text."""

    def __init__(self, layout: Layout, dtype: torch.dtype, *, bytes_max: int, tokens_max: int) -> None:
        self._layout, self._dtype = layout, dtype
        self._token_bytes = layout.block_bytes // layout.tokens_per_block
        self.bytes_max = max(bytes_max, self._token_bytes * (_capacity(tokens_max) + layout.tokens_per_block))
        self.used_bytes = 0
        self._free: list[Kv] = []
        first = min(PREFAULT_TOKENS, tokens_max, max(1, PREFAULT_BYTES // self._token_bytes))
        self.give(self._make(first, faulted=True))

    def take(self, tokens: int) -> Kv | None:
        """Room for this many tokens; None while others hold too much."""
        fitting = [kv for kv in self._free if kv.capacity >= _capacity(tokens)]
        if fitting:
            kv = min(fitting, key=lambda kv: kv.capacity)
            self._free.remove(kv)
            return kv
        wanted = self._token_bytes * (_capacity(tokens) + self._layout.tokens_per_block)
        while self._free and self.used_bytes + wanted > self.bytes_max:
            self.drop(self._free.pop(0))
        return None if self.used_bytes + wanted > self.bytes_max else self._make(tokens)

    def give(self, kv: Kv) -> None:
        """The text is done. Its memory is kept for another one."""
        kv.length = 0
        self._free.append(kv)

    def drop(self, kv: Kv) -> None:
        """Let go of the memory instead: it holds what no other text may meet (a NaN outlives its mask)."""
        self.used_bytes -= kv.nbytes

    def _make(self, tokens: int, *, faulted: bool = False) -> Kv:
        kv = Kv(self._layout, self._dtype, tokens, faulted=faulted)
        self.used_bytes += kv.nbytes
        return kv


def refused_layers(cache: DynamicCache) -> Sequence[str]:
    """Names of the layer classes of a fresh cache that keep more, or less, than plain keys and values per token."""
    return sorted({type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer})


def _capacity(tokens: int) -> int:
    """Room for `tokens`, the padding of a tile included, as a power of two of stretches."""
    return STRETCH << (-(-(tokens + TILE_TOKENS) // STRETCH) - 1).bit_length()


def _words(array: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return array.view(np.uint64)
