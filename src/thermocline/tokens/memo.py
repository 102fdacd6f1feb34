"""What was tokenised before: of a conversation's next turn, only what it adds is tokenised and hashed.

Texts are found again by a chain of hashes over their bytes, so nobody has to say which conversation a request belongs
to; a beginning that several conversations share is read once.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from thermocline.tokens.chunks import CHUNK_BYTES, chunk_keys, chunk_seed
from thermocline.tokens.tokenizer import Cuts, Tokenizer

C = TypeVar("C")
Grow = Callable[[C | None, "array[int]", int], C]
"""Makes what token ids are looked up by, such as their keys: of a known chain, all ids, and how many of them it has."""

_BYTES_PER_TOKEN, _BYTES_PER_CHUNK = 10, 140
"""What an id with its share of a chain takes in memory, and an entry of the index."""


@dataclass(frozen=True, slots=True)
class Read(Generic[C]):
    """A prompt's token ids and their chain. The first `known_tokens` were known before."""

    tokens: array[int] = field(repr=False)
    chain: C = field(repr=False)
    known_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Text(Generic[C]):
    """A text that was read: its bytes, the keys of its chunks, where tokenising may begin, and what became of it."""

    written: bytes
    chunks: list[int]
    cuts: Cuts
    read: Read[C]

    @property
    def nbytes(self) -> int:
        return len(self.written) + _BYTES_PER_TOKEN * len(self.read.tokens) + _BYTES_PER_CHUNK * len(self.chunks)


class Memo(Generic[C]):
    """The texts read last, within some `bytes_max`. Thread-safe; tokenising happens outside the lock."""

    def __init__(self, tokenizer: Tokenizer, bytes_max: int) -> None:
        self._tokenizer = tokenizer
        self._bytes_max = bytes_max
        self._texts: OrderedDict[_Text[C], None] = OrderedDict()
        self._holders: dict[int, _Text[C]] = {}
        self._lock = threading.Lock()
        self.nbytes = 0

    def read(self, text: str, grow: Grow[C], *, special: bool, apart: tuple[bytes, ...] = ()) -> Read[C]:
        """The ids of a text, equal to those of tokenising all of it.

        Only texts with the same `apart` (salt, adapter: what chains begin with) are compared, so how long this takes
        tells one tenant nothing of another. Bytes are compared too: no hash has to be trusted.
        """
        written = text.encode()
        chunks = chunk_keys(written, chunk_seed(bytes([special]), *apart))
        known, shared = self._find(written, chunks)
        characters = shared if len(text) == len(written) else len(written[:shared].decode(errors="ignore"))
        begin = self._tokenizer.begin if special else array("I")
        character, token = known.cuts.before(characters - self._tokenizer.margin) if known else (0, 0)
        tokens, cuts = self._tokenizer.encode_with_cuts(text[character:])
        if known and character:
            cuts = cuts.behind(known.cuts, character, token)
            token += len(begin)
            begin = known.read.tokens[:token]
        tokens = begin + tokens + self._tokenizer.end if special else begin + tokens
        read = Read(tokens, grow(known.read.chain if known and token else None, tokens, token), token)
        self._keep(_Text(written, chunks, cuts, read), known, shared)
        return read

    def _find(self, written: bytes, chunks: list[int]) -> tuple[_Text[C] | None, int]:
        """The text with the longest beginning in common, in whole chunks, and how many bytes that is."""
        with self._lock:
            for count in range(len(chunks), 0, -1):
                found = self._holders.get(chunks[count - 1])
                if found is not None:
                    shared = count * CHUNK_BYTES
                    self._texts.move_to_end(found)
                    return (found, shared) if found.written[:shared] == written[:shared] else (None, 0)
        return None, 0

    def _keep(self, text: _Text[C], known: _Text[C] | None, shared: int) -> None:
        """Remember a text, in place of the one that it continues."""
        if not text.chunks or text.nbytes > self._bytes_max:
            return
        with self._lock:
            if known is not None and len(known.written) - shared < 2 * CHUNK_BYTES:
                self._forget(known)
            self._texts[text] = None
            self._holders.update(dict.fromkeys(text.chunks, text))
            self.nbytes += text.nbytes
            while self.nbytes > self._bytes_max:
                self._forget(next(iter(self._texts)))

    def _forget(self, text: _Text[C]) -> None:
        if text not in self._texts:
            return  # another thread was quicker
        del self._texts[text]
        self.nbytes -= text.nbytes
        for chunk in text.chunks:
            if self._holders.get(chunk) is text:
                del self._holders[chunk]
