"""A request's prompt to token ids, with one model's tokenizer and template."""

from __future__ import annotations

from pathlib import Path
from typing import Generic

import msgspec

from thermocline.clock import Clock
from thermocline.errors import RequestError
from thermocline.tokens.chat import messages_of, tools_of
from thermocline.tokens.memo import C, Grow, Memo, Read
from thermocline.tokens.prompt import Kind, Prompt
from thermocline.tokens.template import load_template
from thermocline.tokens.tokenizer import load_tokenizer


class Reader(Generic[C]):
    """Reads prompts as the model's engine will. Safe to use from several threads.

    `path` is a model's folder: tokenizer.json, tokenizer_config.json, and the chat template in either form. Raises
    ModelError where there is no tokenizer, RequestError where the template is none.
    """

    def __init__(self, path: Path, *, clock: Clock, memo_bytes: int) -> None:
        self.tokenizer, config = load_tokenizer(path)
        self.template = load_template(path if path.is_dir() else path.parent, config, clock=clock)
        self.memo: Memo[C] = Memo(self.tokenizer, memo_bytes)

    def read(self, prompt: Prompt, grow: Grow[C], *, apart: tuple[bytes, ...] = ()) -> Read[C] | None:
        """The ids as the engine will have them, and the chain that `grow` makes of them (see `Memo.read`).

        None where only the engine knows: other kinds of requests, images, a template of the request's own, and what
        the template refuses. Such a prompt still has chunk keys. A conversation's first turn takes some 0.4 ms per
        1,000 of `cost_bytes`: in a thread, where that is long.
        """
        try:
            if prompt.exact and prompt.kind is Kind.TOKENS:
                tokens = prompt.ids()
                return Read(tokens, grow(None, tokens, 0))
            text = self._text(prompt) if prompt.exact else None
        except (msgspec.MsgspecError, UnicodeDecodeError, RequestError, RecursionError):
            return None
        return None if text is None else self.memo.read(text, grow, special=prompt.special, apart=apart)

    def _text(self, prompt: Prompt) -> str | None:
        if prompt.kind is Kind.TEXT:
            return prompt.text()
        template = self.template
        if template is None:
            return None
        messages = messages_of(prompt.raw, in_parts=template.in_parts, knows_developer=template.knows_developer)
        if messages is None:
            return None
        tools, add = tools_of(prompt.frame[0]), prompt.add_generation_prompt
        return template.render(messages, tools=tools, add_generation_prompt=add, variables=prompt.variables)
