"""Layout: everything that must be equal for stored bytes to be loadable."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import NewType

import msgspec

LayoutId = NewType("LayoutId", bytes)
"""32 bytes: the fingerprint of a `Layout`. Part of every stored block's identity, beside its key."""

FORMAT_VERSION = 1


class Layout(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """Describes the bytes of one block, completely.

    Two engines may share bytes only if every field is equal: same shapes are not enough, because an engine can change
    the order of the same bytes between versions. `order` names the physical order of the pieces; `isa` the instruction
    set, as results of different vector units differ in their last bits; `weights_digest` the weights themselves,
    because a model's name says nothing about an update.
    """

    model: str
    weights_digest: bytes
    dtype: str
    kv_dtype: str
    layers: int
    kv_heads: int
    head_dim: int
    tokens_per_block: int
    block_bytes: int
    engine: str
    engine_version: str
    isa: str
    order: str
    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    kv_group: int = 0

    @cached_property
    def id(self) -> LayoutId:
        """SHA-256 over every field by name, and the format version."""
        fields = msgspec.to_builtins(self, builtin_types=(bytes,))
        encoded = msgspec.msgpack.encode((FORMAT_VERSION, sorted(fields.items())))
        return LayoutId(hashlib.sha256(encoded).digest())

    @cached_property
    def computed_by(self) -> str:
        """What computes such blocks, for costs: all ranks and groups of one engine have the same name."""
        first = {"tp_rank": 0, "pp_rank": 0, "kv_group": 0}
        return msgspec.structs.replace(self, **first).id.hex()
