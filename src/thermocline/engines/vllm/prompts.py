"""A request's own keys: its salt is the root, its adapter and its images enter the chain where they matter."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thermocline.blocks.key import TOKENS_PER_KEY, BlockKey, block_keys, root_key


@dataclass(frozen=True, slots=True)
class Item:
    """An image, sound or video whose placeholders are tokens [start, stop). `name` is a digest of what it shows."""

    name: str
    start: int
    stop: int


class Prompt:
    """The keys of one text that grows. Every token is hashed once."""

    __slots__ = ("_adapter", "_items", "keys", "root", "tokens_per_block")

    def __init__(
        self, tokens_per_block: int, *, salt: str = "", adapter: Sequence[str] = (), items: Sequence[Item] = ()
    ) -> None:
        self.tokens_per_block = tokens_per_block
        self.root = root_key(salt.encode())
        self.keys: list[BlockKey] = []
        self._adapter = tuple(b"lora " + part.encode() for part in adapter)
        self._items = sorted(items, key=lambda item: item.start)

    @property
    def family(self) -> BlockKey:
        """What prompts have in common that may share blocks: the root of their salt, and their adapter."""
        return BlockKey(hashlib.sha256(b"".join((self.root, *self._adapter))).digest()) if self._adapter else self.root

    def grow(self, tokens: Sequence[int], blocks: int) -> Sequence[BlockKey]:
        """The keys of at least the first `blocks` blocks; `tokens` are all that the text has so far."""
        known, size = len(self.keys), self.tokens_per_block
        if blocks > known:
            ids = token_array(tokens[known * size : blocks * size])
            if self._items:
                self._hash_with_items(ids, known * size)
            else:
                root = self.keys[-1] if known else self.root
                self.keys += block_keys(ids.data, root=root, tokens_per_block=size, extras=self._adapter)
        return self.keys

    def _hash_with_items(self, ids: NDArray[np.uint32], first: int) -> None:
        """Step by step: a step's extras name the items it touches, and where each began."""
        key = self.keys[-1] if self.keys else self.root
        for start in range(0, len(ids), TOKENS_PER_KEY):
            extras = (*self._adapter, *self._touched(first + start, first + start + TOKENS_PER_KEY))
            step = ids[start : start + TOKENS_PER_KEY]
            (key,) = block_keys(step.data, root=key, tokens_per_block=TOKENS_PER_KEY, extras=extras)
            if (first + start + TOKENS_PER_KEY) % self.tokens_per_block == 0:
                self.keys.append(key)

    def _touched(self, start: int, stop: int) -> list[bytes]:
        return [
            b"item %d %d " % (item.start, item.stop) + item.name.encode()
            for item in self._items
            if item.start < stop and item.stop > start
        ]


def token_array(tokens: Sequence[int]) -> NDArray[np.uint32]:
    """Token ids as the keys are made of. By way of `array`: numpy takes eight times as long to read a list."""
    return np.frombuffer(array("I", tokens), np.uint32)


def prompt_of(request: Any, tokens_per_block: int) -> Prompt | None:  # noqa: ANN401  # vLLM's Request
    """The prompt of vLLM's request, or None where the tokens do not say all that is computed.

    That is so for embeddings in place of tokens, for items without a digest, and for sessions whose text may change.
    """
    if request.prompt_embeds is not None or request.prompt_is_token_ids is not None or request.resumable:
        return None
    if any(not feature.identifier for feature in request.mm_features):
        return None
    lora = request.lora_request
    return Prompt(
        tokens_per_block,
        salt=request.cache_salt or "",
        adapter=(lora.lora_name, lora.lora_path) if lora else (),
        items=[_item(feature) for feature in request.mm_features],
    )


def _item(feature: Any) -> Item:  # noqa: ANN401  # vLLM's MultiModalFeatureSpec
    place = feature.mm_position
    return Item(f"{feature.modality} {feature.identifier}", place.offset, place.offset + place.length)
