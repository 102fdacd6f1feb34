"""A request's prompt to token ids and keys, with one model's tokenizer and template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from thermocline.clock import Clock
from thermocline.errors import RequestError
from thermocline.tokens.chat import messages_of, tools_of
from thermocline.tokens.memo import Hash, Keyed, Memo
from thermocline.tokens.prompt import Kind, Prompt
from thermocline.tokens.template import Template, load_template
from thermocline.tokens.tokenizer import Tokenizer, load_tokenizer, special_names

MEMO_BYTES = 64 << 20


class Reader:
    """Reads prompts as the model's engine will. Safe to use from several threads."""

    def __init__(
        self, tokenizer: Tokenizer, template: Template | None, hash_tokens: Hash, *, memo_bytes: int = MEMO_BYTES
    ) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.memo = Memo(tokenizer, hash_tokens, memo_bytes)
        self._hash = hash_tokens

    @classmethod
    def load(cls, path: Path, hash_tokens: Hash, *, clock: Clock, memo_bytes: int = MEMO_BYTES) -> Reader:
        """From a model's folder: tokenizer.json, tokenizer_config.json, and the chat template in either place.

        Raises ModelError where there is no tokenizer, RequestError where the template is none.
        """
        tokenizer, config = load_tokenizer(path)
        folder = path if path.is_dir() else path.parent
        template = load_template(folder, config, special_names(config), clock=clock)
        return cls(tokenizer, template, hash_tokens, memo_bytes=memo_bytes)

    def read(self, prompt: Prompt, *, root: bytes, extras: Sequence[bytes] = ()) -> Keyed | None:
        """The ids and keys under that root (see `root_key`), as the engine will have them.

        None where only the engine knows: other kinds of requests, images, a template of the request's own, and what
        the template refuses. Such a prompt still has chunk keys. Takes milliseconds where `cost_bytes` is in the tens
        of thousands and the conversation is new: call it in a thread then.
        """
        if not prompt.exact:
            return None
        try:
            if prompt.kind is Kind.TOKENS:
                tokens = prompt.ids()
                return Keyed(tokens, list(self._hash(tokens, root, extras)))
            text = prompt.text() if prompt.kind is Kind.TEXT else self._chat_text(prompt)
        except (msgspec.MsgspecError, RequestError, RecursionError):
            return None
        return None if text is None else self.memo.read(text, root=root, special=prompt.special, extras=extras)

    def _chat_text(self, prompt: Prompt) -> str | None:
        template = self.template
        if template is None:
            return None
        messages = messages_of(prompt.raw, in_parts=template.in_parts, knows_developer=template.knows_developer)
        if messages is None:
            return None
        tools, add = tools_of(prompt.frame[0]), prompt.add_generation_prompt
        return template.render(messages, tools=tools, add_generation_prompt=add, variables=prompt.variables)
