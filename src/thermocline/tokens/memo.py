"""What was tokenised and hashed before: of a conversation's next turn, only what it adds is.

Texts are found again by a chain of hashes over their bytes, so nobody has to say which conversation a request belongs
to; a beginning that several conversations share is read once.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from thermocline.tokens.chunks import CHUNK_BYTES, chunk_keys, chunk_seed
from thermocline.tokens.tokenizer import Cuts, Tokenizer

TOKENS_PER_KEY = 16
Hash = Callable[[array[int], bytes, Sequence[bytes]], Sequence[bytes]]
"""Keys after every 16 of some tokens which begin at a key (or the root), under some extras: `blocks.key.block_keys`."""

_KEY_BYTES, _CHUNK_BYTES = 80, 140
"""What a key and an entry of the index take in memory."""


@dataclass(frozen=True, slots=True)
class Keyed:
    """A prompt's token ids, and its keys after every 16 of them. The first `known_tokens` were known before."""

    tokens: array[int] = field(repr=False)
    keys: list[bytes] = field(repr=False)
    known_tokens: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Text:
    """A text that was read. `tokens` are its own, with nothing around them; `keys` are those of all."""

    written: bytes
    chunks: list[int]
    tokens: array[int]
    cuts: Cuts
    keys: list[bytes]

    @property
    def nbytes(self) -> int:
        tokens = (len(self.tokens) + 2 * len(self.cuts.tokens)) * 4
        return len(self.written) + tokens + _KEY_BYTES * len(self.keys) + _CHUNK_BYTES * len(self.chunks)


class Memo:
    """The texts read last, within `bytes_max`. Thread-safe; tokenising happens outside the lock."""

    def __init__(self, tokenizer: Tokenizer, hash_tokens: Hash, bytes_max: int) -> None:
        self._tokenizer = tokenizer
        self._hash = hash_tokens
        self._bytes_max = bytes_max
        self._texts: OrderedDict[_Text, None] = OrderedDict()
        self._holders: dict[int, _Text] = {}
        self._lock = threading.Lock()
        self.nbytes = 0

    def read(self, text: str, *, root: bytes, special: bool, extras: Sequence[bytes] = ()) -> Keyed:
        """The ids and keys of a text, equal to those of reading all of it.

        Only texts of the same root (that is, salt) and extras are compared: how long this takes tells one tenant
        nothing of another. A text's bytes are compared as well, so that no hash has to be trusted.
        """
        written = text.encode()
        chunks = chunk_keys(written, chunk_seed(root, bytes([special]), *extras))
        known, shared = self._find(written, chunks)
        ascii_only = len(text) == len(written)
        characters = shared if ascii_only else len(written[:shared].decode(errors="ignore"))
        at, token = known.cuts.before(characters - self._tokenizer.margin) if known else (0, 0)
        tokens, cuts = self._tokenizer.encode_with_cuts(text[at:] if at else text)
        begin, end = (self._tokenizer.begin, self._tokenizer.end) if special else (array("I"), array("I"))
        keys: list[bytes] = []
        if known and at:
            tokens, cuts = known.tokens[:token] + tokens, cuts.behind(known.cuts, at, token)
            keys = known.keys[: (len(begin) + token) // TOKENS_PER_KEY]
        whole = begin + tokens + end if special else tokens
        rest = whole[len(keys) * TOKENS_PER_KEY :]
        keys = [*keys, *self._hash(rest, keys[-1] if keys else root, extras)]
        self._keep(_Text(written, chunks, tokens, cuts, keys), known, shared)
        return Keyed(whole, keys, token + len(begin) if at else 0)

    def _find(self, written: bytes, chunks: list[int]) -> tuple[_Text | None, int]:
        """The text with the longest beginning in common, in whole chunks, and how many bytes that is."""
        with self._lock:
            for count in range(len(chunks), 0, -1):
                found = self._holders.get(chunks[count - 1])
                if found is not None:
                    shared = count * CHUNK_BYTES
                    if found.written[:shared] != written[:shared]:
                        return None, 0
                    self._texts.move_to_end(found)
                    return found, shared
        return None, 0

    def _keep(self, text: _Text, known: _Text | None, shared: int) -> None:
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

    def _forget(self, text: _Text) -> None:
        if text not in self._texts:
            return  # another thread was quicker
        del self._texts[text]
        self.nbytes -= text.nbytes
        for chunk in text.chunks:
            if self._holders.get(chunk) is text:
                del self._holders[chunk]
