"""What a router must know of a request's body, and no more: read once, bounded, never changed, never logged.

`prompt_of` finds the prompt as bytes of JSON; the rest is read out of them only where it is needed.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Raw, Struct

from thermocline.tokens.chunks import chunk_keys, chunk_seed

NAME_CHARACTERS_MAX = 1024
TOKENS_MAX = 1 << 22

_NOTHING = frozenset({b"", b"null", b"false", b"[]", b"{}", b'""'})

_Name = Annotated[str, Meta(max_length=NAME_CHARACTERS_MAX)]
_Ids = Annotated[list[Annotated[int, Meta(ge=0, lt=1 << 32)]], Meta(min_length=1, max_length=TOKENS_MAX)]


class Kind(enum.Enum):
    """What a prompt is made of."""

    CHAT = enum.auto()
    TEXT = enum.auto()
    TOKENS = enum.auto()
    OTHER = enum.auto()
    """Responses and embeddings: their bytes can be compared, but how they become tokens is the engine's affair."""


class _Body(Struct, frozen=True):
    model: _Name | None = None
    cache_salt: _Name | None = None
    messages: Raw = Raw()
    prompt: Raw = Raw()
    input: Raw = Raw()
    instructions: Raw = Raw()
    tools: Raw = Raw()
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    reasoning_effort: _Name | None = None
    chat_template_kwargs: Raw = Raw()
    # what follows changes the prompt in ways that only the engine knows
    chat_template: Raw = Raw()
    continue_final_message: Raw = Raw()
    documents: Raw = Raw()
    prompt_embeds: Raw = Raw()
    truncate_prompt_tokens: Raw = Raw()


_FOREIGN = ("chat_template", "continue_final_message", "documents", "prompt_embeds", "truncate_prompt_tokens")
_DECODER = msgspec.json.Decoder(_Body)
_IDS = msgspec.json.Decoder(_Ids)
_ID_LISTS = msgspec.json.Decoder(Annotated[list[_Ids], Meta(min_length=1)])
_TEXTS = msgspec.json.Decoder(str | Annotated[list[str], Meta(min_length=1)])
_PATHS = {
    "/v1/chat/completions": ("messages", Kind.CHAT),
    "/v1/completions": ("prompt", Kind.TEXT),
    "/v1/responses": ("input", Kind.OTHER),
    "/v1/embeddings": ("input", Kind.OTHER),
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request's prompt. `raw` is its JSON, `frame` that of the tools and instructions which stand before it.

    `exact` is False where a field of the body changes the prompt in a way that only the engine knows. `salt` is the
    client's `cache_salt`.
    """

    kind: Kind
    raw: bytes = field(repr=False)
    frame: tuple[bytes, ...] = field(repr=False)
    model: str | None
    salt: str | None = field(repr=False)
    exact: bool
    special: bool
    add_generation_prompt: bool
    variables: Mapping[str, Any] = field(repr=False)

    @property
    def cost_bytes(self) -> int:
        """What tokenising grows with: some 0.4 ms per 1,000."""
        return len(self.raw) + sum(map(len, self.frame))

    def chunks(self, *apart: bytes) -> list[int]:
        """Keys without a tokenizer (see `chunks`). A conversation's next turn begins with those of this one.

        Those of another model or `apart` (a salt) have none in common. Reads the JSON as it was sent: a client that
        writes an earlier message in another way the next time, such as with other spaces, starts anew.
        """
        inner = self.raw[:-1].rstrip() if self.raw[-1:] in {b"]", b'"'} else self.raw
        return chunk_keys(inner, chunk_seed((self.model or "").encode(), *self.frame, *apart))

    def text(self) -> str:
        """The first text of /v1/completions; several go to one instance, and share what they share anyway.

        Raises msgspec.MsgspecError for a prompt that is no text.
        """
        found = _TEXTS.decode(self.raw)
        return found if isinstance(found, str) else found[0]

    def ids(self) -> array[int]:
        """Token ids that came as such, of the first prompt. Raises msgspec.MsgspecError for anything else."""
        nested = self.raw[1:].lstrip()[:1] == b"["
        return array("I", _ID_LISTS.decode(self.raw)[0] if nested else _IDS.decode(self.raw))


def prompt_of(path: str, body: bytes) -> Prompt | None:
    """The prompt of an OpenAI request, or None where there is none, or where it is not what it should be.

    None is no error: the request goes on as it is, and the engine says what it thinks of it. 32 kB take some 15 us.
    """
    where = _PATHS.get(path)
    if where is None:
        return None
    try:
        found = _DECODER.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    name, kind = where
    raw = bytes(getattr(found, name)).strip()
    kind = _kind_of_text(raw) if kind is Kind.TEXT else kind
    if raw in _NOTHING or (kind is Kind.CHAT and raw[:1] != b"["):
        return None
    chat = kind is Kind.CHAT
    return Prompt(
        kind=kind,
        raw=raw,
        frame=tuple(_present(part) for part in (found.tools, found.instructions, found.chat_template_kwargs)),
        model=found.model,
        salt=found.cache_salt or None,
        exact=kind is not Kind.OTHER and not any(_present(getattr(found, name)) for name in _FOREIGN),
        special=not chat if found.add_special_tokens is None else found.add_special_tokens,
        add_generation_prompt=found.add_generation_prompt is not False,
        variables=_variables(found) if chat else {},
    )


def _kind_of_text(raw: bytes) -> Kind:
    """A text or several, or token ids or several lists of them."""
    first = raw[:64].lstrip(b"[ \t\r\n")[:1]
    return Kind.TEXT if first == b'"' else Kind.TOKENS if raw[:1] == b"[" else Kind.OTHER


def _present(raw: Raw) -> bytes:
    found = bytes(raw)
    return b"" if found in _NOTHING else found


def _variables(body: _Body) -> dict[str, Any]:
    """What the template is told besides messages and tools, as vLLM tells it."""
    asked = msgspec.json.decode(body.chat_template_kwargs) if _present(body.chat_template_kwargs) else {}
    asked = asked if isinstance(asked, dict) else {}
    if body.reasoning_effort is None:
        return asked
    return {"enable_thinking": body.reasoning_effort != "none"} | asked | {"reasoning_effort": body.reasoning_effort}
