"""Keys without a tokenizer: a hash chain over every few hundred bytes of a prompt as it was sent.

Such a key says "all the bytes before here", as a block's key says "all the tokens before here": what an instance was
sent once, it has probably kept. It is known only from where requests went, so it is a guess that an answer's count of
cached tokens confirms or not; keys made of token ids are exact, and replace it where a tokenizer is given.
"""

from __future__ import annotations

from array import array

import xxhash

CHUNK_BYTES = 256
PROMPT_CHUNK_BYTES = 512
"""Of prompts that are known by such keys alone: each chunk costs a call, and a guess need not be finer."""
BYTES_PER_TOKEN = 4.0
"""English text and code, until answers have told what this model makes of its prompts."""

_LEARN_SHARE = 0.05


def chunk_keys(prompt: bytes, seed: int, chunk_bytes: int = CHUNK_BYTES) -> list[int]:
    """64-bit keys at the end of every whole chunk, in order; a partial last chunk has none.

    A longer prompt that begins with this one begins with these keys. Some 0.1 us per chunk. Advisory: a collision
    sends a request to an instance that holds less than was thought.
    """
    digest, key = xxhash.xxh3_64_intdigest, seed
    starts = range(0, len(prompt) - chunk_bytes + 1, chunk_bytes)
    return [key := digest(prompt[at : at + chunk_bytes], key) for at in starts]


def chunk_seed(*parts: bytes) -> int:
    """Where a chain begins. Texts with other parts, such as a salt or a model, share nothing."""
    lengths = array("Q", map(len, parts)).tobytes()
    return xxhash.xxh3_64_intdigest(b"".join((lengths, *parts)), len(parts))


class BytesPerToken:
    """How many bytes of a request make a token, learned from answers. One per model."""

    __slots__ = ("value",)

    def __init__(self, value: float = BYTES_PER_TOKEN) -> None:
        self.value = value

    def tokens(self, prompt_bytes: int) -> int:
        """The tokens that so many bytes probably are."""
        return round(prompt_bytes / self.value)

    def learn(self, prompt_bytes: int, prompt_tokens: int) -> None:
        """An answer's usage says how many tokens a prompt had. Single odd prompts move the value by a little only."""
        if prompt_bytes >= CHUNK_BYTES and prompt_tokens > 0:
            found = min(max(prompt_bytes / prompt_tokens, self.value / 2), self.value * 2)
            self.value += _LEARN_SHARE * (found - self.value)
