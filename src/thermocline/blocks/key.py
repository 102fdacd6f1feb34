"""Keys: the name of a block is the SHA-256 chain over every token before its end.

`key(p) = SHA-256(key(p - 16) + 16 token ids as little-endian u32 + extras)`, and `key(0)` is the root, which holds the
cache salt. Every multiple of 16 tokens has a key, so any key is a resume point and block sizes need not agree.
"""

from __future__ import annotations

import hashlib
import hmac
import sys
from collections.abc import Sequence
from typing import NewType, Protocol

BlockKey = NewType("BlockKey", bytes)
"""32 bytes. A distinct type, because plain bytes of the same length are digests, salts and layouts too."""

KEY_BYTES = 32
TOKENS_PER_KEY = 16
TOKEN_BYTES = 4
FORMAT_VERSION = b"thermocline key 1"
NO_PARENT = BlockKey(bytes(KEY_BYTES))
"""What a frame names as the parent of a first block: its true parent, the root, is a secret when a salt is used."""

if sys.byteorder != "little":  # token ids are hashed as they lie in memory
    raise ImportError("thermocline stores token ids as little-endian u32 and runs on little-endian machines only")


class Tokens(Protocol):
    """Token ids as C-contiguous u32: a numpy uint32 array, `array('I')`, or bytes."""

    def __buffer__(self, flags: int, /) -> memoryview:
        """The buffer protocol."""


def root_key(salt: bytes = b"") -> BlockKey:
    """The key before any token: HMAC-SHA-256 under the salt's SHA-256. Different salts never share a block."""
    # HMAC pads a short key with zeros, so b"a" and b"a\0" would be one salt; their digests differ
    return BlockKey(hmac.digest(hashlib.sha256(salt).digest(), FORMAT_VERSION, "sha256"))


def block_keys(
    tokens: Tokens, *, root: BlockKey, tokens_per_block: int, extras: Sequence[bytes] = ()
) -> list[BlockKey]:
    """Keys at the end of every full block of `tokens`, in order; a partial last block has none.

    `root` is `root_key(salt)`, or the key at which `tokens` begins: hashing the rest of a prompt from any key gives
    the same keys as hashing all of it. `extras` (a LoRA name, image digests) enter every step of the chain; where
    they change inside a prompt, call once per stretch and resume. Raises ValueError on a block size that is not a
    positive multiple of 16.
    """
    if tokens_per_block <= 0 or tokens_per_block % TOKENS_PER_KEY:
        raise ValueError(f"tokens_per_block must be a positive multiple of {TOKENS_PER_KEY}, not {tokens_per_block}")
    ids = memoryview(tokens).cast("B").tobytes()
    block_bytes = tokens_per_block * TOKEN_BYTES
    stop = len(ids) - len(ids) % block_bytes
    suffix = hashlib.sha256(b"".join(len(x).to_bytes(4, "little") + x for x in extras)).digest() if extras else b""
    step = TOKENS_PER_KEY * TOKEN_BYTES
    sha256 = hashlib.sha256
    chain: list[BlockKey] = []
    append = chain.append
    key: bytes = root
    if suffix:
        for start in range(0, stop, step):
            key = sha256(key + ids[start : start + step] + suffix).digest()
            append(key)  # type: ignore[arg-type]  # NewType's call would cost a tenth of the loop
    else:
        for start in range(0, stop, step):
            key = sha256(key + ids[start : start + step]).digest()
            append(key)  # type: ignore[arg-type]  # as above
    keys_per_block = tokens_per_block // TOKENS_PER_KEY
    return chain if keys_per_block == 1 else chain[keys_per_block - 1 :: keys_per_block]
