"""What a model keeps of a sequence: its geometry, as values, and how it is read off a `config.json`.

    geometry_of(config, name) -> Geometry     layers, heads, windows, states; an unknown architecture is refused by name

Bytes follow from it in `memory.py`; names and files are looked up in `models.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Attention:
    """Like layers that keep something of every token they may still attend to.

    With `latent_elements` (multi-head latent attention, DeepSeek-V2 2024) a token has one vector per layer, whole on
    every tensor-parallel rank, and `kv_heads` and the head dimensions are 0.
    """

    layers: int
    kv_heads: int
    head_dim_k: int
    head_dim_v: int
    window_tokens: int | None = None
    """Tokens that are kept; None: all."""
    chunked: bool = False
    """Attention inside chunks of `window_tokens` (Llama 4) instead of over the last `window_tokens`."""
    latent_elements: int = 0
    index_bytes: int = 0
    """Of a sparse indexer (DeepSeek-V3.2), per token and layer; its own format, whatever the cache's data type is."""

    @property
    def token_elements(self) -> int:
        """Elements of one token in one layer, on one rank that holds all heads."""
        return self.latent_elements or self.kv_heads * (self.head_dim_k + self.head_dim_v)


@dataclass(frozen=True, slots=True)
class State:
    """Layers that keep one state per sequence, however long it is. Counted as fp32 state and bf16 convolution state."""

    layers: int
    state_elements: int
    conv_elements: int


@dataclass(frozen=True, slots=True)
class Geometry:
    """A model as far as its memory and its arithmetic depend on it. None is "not known", never a guess."""

    name: str
    model_type: str
    hidden_size: int
    layers: int
    """All of them, also those that keep nothing (a feed-forward layer of Nemotron-H)."""
    query_heads: int
    query_head_dim: int
    """Elements of a query head, the mean of its key and value side: attention costs 4 * heads * this per pair."""
    attention: tuple[Attention, ...]
    state: State | None
    parameters_total: int | None
    parameters_active: int | None
    weights_bytes: int | None
    """Of the checkpoint, where its files say so."""
    context_tokens: int | None
    kv_dtype: str
    """What the checkpoint asks for; engines keep K and V so unless told otherwise."""
    source: str
    """Where these numbers are from, to be shown beside every figure that follows from them."""
    weights_dtype: str = "bf16"
