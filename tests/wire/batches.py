"""Batches of KV events as engines of different versions write them, for whoever reads such bytes in a test."""

from __future__ import annotations

from array import array

import msgspec

from thermocline.wire.events import AllBlocksCleared, BlockRemoved, BlockStored

TOKENS = list(range(32))
STORED = BlockStored((1, 2**64 - 1), None, array("I", TOKENS), 16)
MAP = {
    "type": "BlockStored",
    "block_hashes": [1, 2**64 - 1],
    "parent_block_hash": None,
    "token_ids": TOKENS,
    "block_size": 16,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": None,
}
"""`STORED` as 0.28 and later write it."""
ARRAYS = (
    ["BlockStored", [1, 2**64 - 1], None, TOKENS, 16, None],  # 0.9
    ["BlockStored", [1, 2**64 - 1], None, TOKENS, 16, None, "GPU"],  # 0.12
    ["BlockStored", [1, 2**64 - 1], None, TOKENS, 16, None, "GPU", None, [None, None]],  # 0.20
)
"""`STORED` as earlier versions write it."""
OTHERS = (["BlockRemoved", [5]], ["BlockRemoved", [6], "CPU"], ["AllBlocksCleared"])
FULL = BlockStored(
    (1, 2**63, b"k" * 32),
    b"p" * 32,
    array("I", [1, 200, 70_000] * 16),
    16,
    "CPU",
    "lora",
    (("salt", ["image", 7]), None),
)
EVENTS = (FULL, STORED, BlockRemoved((1, b"k")), AllBlocksCleared())


def packed(*told: object, seconds: object = 1.5, rest: tuple[object, ...] = (0,)) -> bytes:
    """Events in whatever form, as one batch."""
    return msgspec.msgpack.encode((seconds, list(told), *rest))
