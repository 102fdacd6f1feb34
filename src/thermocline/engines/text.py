"""Text to token ids and back, piece by piece as tokens come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from thermocline.clock import SystemClock
from thermocline.errors import RequestError
from thermocline.tokens.template import Template, template_source
from thermocline.tokens.tokenizer import Tokenizer

Tokens = NDArray[np.uint32]

BROKEN = "\ufffd"
PENDING_TOKENS_MAX = 8
"""A character has at most 4 bytes: what is still broken after more tokens than this never becomes whole."""


class Text:
    """A model's tokenizer and chat template, as the API needs them. Safe to use from several threads."""

    def __init__(self, tokenizer: Any) -> None:  # noqa: ANN401  # transformers' tokenizers have no common type
        self._tokenizer = tokenizer
        fast = getattr(tokenizer, "backend_tokenizer", None)
        self._fast = None if fast is None else Tokenizer(fast)
        source = template_source(getattr(tokenizer, "chat_template", None))
        self._template = Template(source, tokenizer.special_tokens_map, clock=SystemClock()) if source else None

    def encode(self, text: str, *, special: bool = True) -> Tokens:
        """Token ids; `special` adds what the model expects around a text, such as a token for its beginning."""
        if self._fast is not None:
            return np.frombuffer(self._fast.encode(text, special=special), np.uint32)
        return np.array(self._tokenizer.encode(text, add_special_tokens=special), np.uint32)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> Tokens:
        """Token ids of a conversation, in the form the model's own template gives it, up to where the answer begins.

        Raises RequestError where there is no template, or where it refuses.
        """
        if self._template is None:
            msg = "this model has no chat template"
            raise RequestError(msg, hint="use /v1/completions, or serve a chat model", param="messages")
        return self.encode(self._template.render(messages), special=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens; incomplete characters become replacement characters."""
        if self._fast is not None:
            return self._fast.decode(tokens)
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def token_text(self, token: int) -> str:
        """A token by itself, for listings of probabilities."""
        return str(self._tokenizer.convert_tokens_to_string([self._tokenizer.convert_ids_to_tokens(token)]))


class TextStream:
    """Turns one answer's tokens into text as they come, and finds stop strings.

    A piece never ends inside a character, nor inside what may become a stop string. `stopped` says that one came; it
    is not part of the text, and neither is anything behind it.
    """

    def __init__(self, text: Text, stop: Sequence[str] = ()) -> None:
        self._text = text
        self._stop = tuple(stop)
        self._tokens: list[int] = []
        self._told = 0
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain now, often one word, sometimes none."""
        self._tokens.append(token)
        return self._release(self._new_characters(last=False), last=False)

    def finish(self) -> str:
        """What was held back, when no token follows."""
        return "" if self.stopped else self._release(self._new_characters(last=True), last=True)

    def _new_characters(self, *, last: bool) -> str:
        """Decode the last few tokens with and without the new ones: a token's text depends on the one before it."""
        whole = self._text.decode(self._tokens)
        pending = len(self._tokens) - self._told
        if whole.endswith(BROKEN) and pending < PENDING_TOKENS_MAX and not last:
            return ""
        before = self._text.decode(self._tokens[: self._told])
        self._tokens = self._tokens[self._told :]
        self._told = len(self._tokens)
        return whole[len(before) :]

    def _release(self, characters: str, *, last: bool) -> str:
        held = self._held + characters
        found = [at for at in (held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        keep = 0 if last else max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def _overlap(text: str, stop: str) -> int:
    """The longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
