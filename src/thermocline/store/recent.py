"""The last requests as a trace: when they came, how long they were, and which begin alike. No token, and no key.

It is what `thermocline advise` reads of a running server. A prompt is cut into blocks of TOKENS_PER_BLOCK; each is
known by a hash of all before its end, which starts from a secret of this process and never leaves it: told are numbers,
in the order in which blocks were first seen. So the trace says that two prompts share a prefix, and nothing of what.
"""

from __future__ import annotations

import secrets
import threading
from array import array
from collections import defaultdict, deque
from collections.abc import Iterable

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

TOKENS_PER_BLOCK = 64
BYTES_KEPT = 8 << 20
REQUEST_BYTES, BLOCK_BYTES = 256, 8
"""What a request takes in memory: about so much, and this for each of its blocks."""
TEXT_BYTES_MAX = 15 << 20
"""Of the trace as it is told: below what readers take."""


class Hashed(Struct, frozen=True, gc=False):
    """One request, as a line of a trace in Mooncake's format. `timestamp` is in milliseconds since 1970.

    The length of the answer is not known when a request is noted, so `output_length` is 0.
    """

    timestamp: int
    input_length: int
    output_length: int
    hash_ids: list[int]


class Recent:
    """The last requests, as many as fit in `bytes_kept`. Safe to use from several threads."""

    def __init__(self, bytes_kept: int = BYTES_KEPT) -> None:
        self._bytes_kept, self._bytes = bytes_kept, 0
        self._secret = secrets.randbits(64)
        self._requests: deque[tuple[float, int, array[int]]] = deque()
        self._lock = threading.Lock()

    def note(self, wall_seconds: float, tokens: NDArray[np.uint32], *, group: int = 0) -> None:
        """Remember a request. Prompts of another `group` (a secret number per cache salt) begin differently."""
        blocks = self._blocks(tokens, group)
        with self._lock:
            self._requests.append((wall_seconds, len(tokens), blocks))
            self._bytes += _taken(blocks)
            while self._bytes > self._bytes_kept:
                self._bytes -= _taken(self._requests.popleft()[2])

    def lines(self, bytes_max: int = TEXT_BYTES_MAX) -> bytes:
        """A line of JSON for each request, in the order they came: the newest, as many as fit. Empty without any."""
        with self._lock:
            requests = list(self._requests)
        numbers: dict[int, int] = defaultdict(lambda: len(numbers))
        told: list[bytes] = []
        for wall_seconds, tokens, blocks in reversed(requests):
            line = msgspec.json.encode(Hashed(int(wall_seconds * 1000), tokens, 0, [numbers[each] for each in blocks]))
            bytes_max -= len(line) + 1
            if bytes_max < 0:
                break
            told.append(line)
        return _joined(reversed(told))

    def _blocks(self, tokens: NDArray[np.uint32], group: int) -> array[int]:
        """The hash of each prefix that ends with a block; the last block may be a part of one."""
        ids, step = np.ascontiguousarray(tokens).data.cast("B"), 4 * TOKENS_PER_BLOCK
        before = self._secret ^ group
        blocks = array("Q")
        for start in range(0, len(ids), step):
            before = xxh3_64_intdigest(ids[start : start + step], before)
            blocks.append(before)
        return blocks


def _taken(blocks: array[int]) -> int:
    return REQUEST_BYTES + BLOCK_BYTES * len(blocks)


def _joined(lines: Iterable[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)
