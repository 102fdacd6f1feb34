"""The last requests as a trace: when they came, how long they were, and which begin alike. No token, and no key.

It is what `thermocline advise` reads of what runs: a server or a node notes each prompt that has a receipt, a gateway
each that it knows by its tokens. A prompt is cut into blocks of TOKENS_PER_BLOCK; each is known by a hash of all before
its end, which starts from a secret of this process and never leaves it: told are numbers, in the order of first sight
from the newest request. So the trace says that two prompts share a prefix, and nothing of what.
"""

from __future__ import annotations

import secrets
import struct
import threading
from array import array
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
from msgspec import Struct
from xxhash import xxh3_64_intdigest

TOKENS_PER_BLOCK = 64
BYTES_KEPT = 8 << 20
REQUEST_BYTES, BLOCK_BYTES = 256, 8
"""What a request takes in memory: about so much, and this for each of its blocks."""
TEXT_BYTES_MAX = 15 << 20
"""Of the trace as it is told: below what readers take."""
_BLOCKS = struct.Struct(f"{4 * TOKENS_PER_BLOCK}s")
"""Cuts tokens into blocks, in two thirds of the time of slices."""


class Hashed(Struct, frozen=True, gc=False):
    """One request, as a line of a trace in Mooncake's format. `timestamp` is in milliseconds since 1970.

    `output_length` is 0 where the length of the answer is not known when a request is noted.
    """

    timestamp: int
    input_length: int
    output_length: int
    hash_ids: list[int]


class _Noted(NamedTuple):
    wall_seconds: float
    tokens: int
    output_tokens: int
    blocks: array[int]

    @property
    def nbytes(self) -> int:
        return REQUEST_BYTES + BLOCK_BYTES * len(self.blocks)


class Recent:
    """The last requests, as many as fit in `bytes_kept`. Safe to use from several threads."""

    def __init__(self, bytes_kept: int = BYTES_KEPT) -> None:
        self._bytes_kept, self._bytes = bytes_kept, 0
        self._secret = secrets.randbits(64)
        self._requests: deque[_Noted] = deque()
        self._lock, self._telling = threading.Lock(), threading.Lock()

    def note(self, wall_seconds: float, ids: bytes, *, group: int = 0, output_tokens: int = 0) -> None:
        """Remember a request by its token ids (u32). Prompts of another `group`, 64 bits for a salt, share nothing."""
        noted = _Noted(wall_seconds, len(ids) // 4, output_tokens, self._blocks(ids, group))
        with self._lock:
            self._requests.append(noted)
            self._bytes += noted.nbytes
            while self._bytes > self._bytes_kept:
                self._bytes -= self._requests.popleft().nbytes

    def lines(self, bytes_max: int = TEXT_BYTES_MAX) -> bytes:
        """A line of JSON for each request, in the order they were noted: the newest, as many as fit. Empty without.

        Of a full trace it takes half a second and 120 MB, so callers take turns.
        """
        with self._telling:
            with self._lock:
                requests = list(self._requests)
            return _told(requests, bytes_max)

    def _blocks(self, ids: bytes, group: int) -> array[int]:
        """The hash of each prefix that ends with a block; the last block may be a part of one."""
        digest, before, whole = xxh3_64_intdigest, self._secret ^ group, len(ids) - len(ids) % _BLOCKS.size
        blocks = array("Q", [before := digest(block, before) for (block,) in _BLOCKS.iter_unpack(ids[:whole])])
        if whole < len(ids):
            blocks.append(digest(ids[whole:], before))
        return blocks


def _told(requests: Sequence[_Noted], bytes_max: int) -> bytes:
    numbers: dict[int, int] = {}  # a default dict that counts itself would refer to itself, and stay
    told: list[bytes] = []
    for at, tokens, output_tokens, blocks in reversed(requests):
        path = [numbers.setdefault(each, len(numbers)) for each in blocks]
        line = msgspec.json.encode(Hashed(int(at * 1000), tokens, output_tokens, path))
        bytes_max -= len(line) + 1
        if bytes_max < 0:
            break
        told.append(line + b"\n")
    return b"".join(reversed(told))
