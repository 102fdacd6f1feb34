"""What a router must know of a request's body, and no more: read once, bounded, never changed, never logged.

`prompt_of` finds the prompt as bytes of JSON; the rest is read out of them only where it is needed.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from thermocline.tokens.chunks import PROMPT_CHUNK_BYTES, chunk_keys, chunk_seed

NAME_CHARACTERS_MAX = 1024
SESSION_CHARACTERS_MAX = 256
TOKENS_MAX = 1 << 22

_NOTHING = frozenset({b"", b"null", b"false", b"[]", b"{}", b'""'})
_SHORT = 6
"""All of these have fewer bytes."""

_Ids = Annotated[list[Annotated[int, Meta(ge=0, lt=1 << 32)]], Meta(min_length=1, max_length=TOKENS_MAX)]


class Kind(enum.Enum):
    """What a prompt is made of."""

    CHAT = enum.auto()
    TEXT = enum.auto()
    TOKENS = enum.auto()
    OTHER = enum.auto()
    """Responses and embeddings: their bytes can be compared, but how they become tokens is the engine's affair."""


_FLAGS = frozenset({bool, type(None)})
_NONE = Raw()
_NO_FOREIGN = (_NONE,) * 5


class Front(Struct, frozen=True, gc=False):
    """All that is looked at of a body. Wrong types are the instance's to complain about."""

    model: Any = None
    stream: Any = None
    cache_salt: Any = UNSET
    kv_transfer_params: Raw | UnsetType = UNSET
    prompt_cache_key: Any = None
    user: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    messages: Raw = _NONE
    prompt: Raw = _NONE
    input: Raw = _NONE
    instructions: Raw = _NONE
    tools: Raw = _NONE
    add_special_tokens: Any = None
    add_generation_prompt: Any = None
    reasoning_effort: Any = None
    chat_template_kwargs: Raw = _NONE
    # what follows changes the prompt in ways that only the engine knows
    chat_template: Raw = _NONE
    continue_final_message: Raw = _NONE
    documents: Raw = _NONE
    prompt_embeds: Raw = _NONE
    truncate_prompt_tokens: Raw = _NONE

    def __repr__(self) -> str:
        """Nothing of what the client wrote."""
        return "Front(...)"

    @property
    def session(self) -> str | None:
        """What the client calls its conversation, if it does."""
        for told in (self.prompt_cache_key, self.user):
            if isinstance(told, str) and told:
                return told[:SESSION_CHARACTERS_MAX]
        return None

    @property
    def output_tokens(self) -> int | None:
        """The most that will be generated, if the client says."""
        for told in (self.max_completion_tokens, self.max_tokens, self.max_output_tokens):
            if isinstance(told, int) and told > 0:
                return told
        return None


front_of = msgspec.json.Decoder(Front).decode
"""Look into a JSON object without taking it apart. Raises MsgspecError, UnicodeDecodeError and RecursionError."""
_IDS = msgspec.json.Decoder(_Ids)
_ID_LISTS = msgspec.json.Decoder(Annotated[list[_Ids], Meta(min_length=1)])
_TEXTS = msgspec.json.Decoder(str | Annotated[list[str], Meta(min_length=1)])
_PATHS = {
    "/v1/chat/completions": ("messages", Kind.CHAT),
    "/v1/completions": ("prompt", Kind.TEXT),
    "/v1/responses": ("input", Kind.OTHER),
    "/v1/embeddings": ("input", Kind.OTHER),
}


class Prompt(Struct, frozen=True, gc=False):
    """One request's prompt. `raw` is its JSON, `frame` that of the tools and instructions which stand before it.

    `exact` is False where a field of the body changes the prompt in a way that only the engine knows. `salt` is the
    client's `cache_salt`.
    """

    kind: Kind
    raw: bytes
    frame: tuple[bytes, ...]
    model: str | None
    salt: str | None
    exact: bool
    special: bool
    add_generation_prompt: bool
    variables: Mapping[str, Any]

    def __repr__(self) -> str:
        """Nothing of what it says."""
        return f"Prompt({self.kind.name}, {self.cost_bytes} bytes)"

    @property
    def cost_bytes(self) -> int:
        """What tokenising grows with: some 0.4 ms per 1,000."""
        return len(self.raw) + sum(map(len, self.frame))

    def chunks(self, *apart: bytes) -> list[int]:
        """Keys without a tokenizer (see `chunks`). A conversation's next turn begins with those of this one.

        Those of another model or `apart` (a salt) have none in common. Reads the JSON as it was sent: a client that
        writes an earlier message in another way the next time, such as with other spaces, starts anew.
        """
        raw = self.raw
        if len(raw) < PROMPT_CHUNK_BYTES:
            return []
        if raw[-1:] in {b"]", b'"'} and (raw[-2:-1].isspace() or not len(raw) % PROMPT_CHUNK_BYTES):
            raw = raw[:-1].rstrip()  # else the closing bracket is in no whole chunk, and a copy is saved
        seed = chunk_seed((self.model or "").encode(), *self.frame, *apart)
        return chunk_keys(raw, seed, PROMPT_CHUNK_BYTES)

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
    if path not in _PATHS:
        return None
    try:
        return prompt_in(path, front_of(body))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def prompt_in(path: str, front: Front) -> Prompt | None:
    """The same of a body that was looked into."""
    where = _PATHS.get(path)
    if where is None or not _is_sound(front):
        return None
    name, kind = where
    raw = bytes(getattr(front, name)).strip()
    kind = _kind_of_text(raw) if kind is Kind.TEXT else kind
    chat = kind is Kind.CHAT
    if (len(raw) < _SHORT and raw in _NOTHING) or (chat and raw[:1] != b"["):
        return None
    foreign = (
        front.chat_template,
        front.continue_final_message,
        front.documents,
        front.prompt_embeds,
        front.truncate_prompt_tokens,
    )
    try:
        variables = _variables(front) if chat else {}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    exact = kind is not Kind.OTHER and (foreign == _NO_FOREIGN or not any(map(_present, foreign)))
    special = front.add_special_tokens
    return Prompt(
        kind,
        raw,
        (_present(front.tools), _present(front.instructions), _present(front.chat_template_kwargs)),
        front.model,
        front.cache_salt or None,
        exact,
        not chat if special is None else special,
        front.add_generation_prompt is not False,
        variables,
    )


def _kind_of_text(raw: bytes) -> Kind:
    """A text or several, or token ids or several lists of them."""
    first = raw[:64].lstrip(b"[ \t\r\n")[:1]
    return Kind.TEXT if first == b'"' else Kind.TOKENS if raw[:1] == b"[" else Kind.OTHER


def _is_sound(front: Front) -> bool:
    """Whether the fields that name the prompt's neighbours have the types that an engine takes."""
    for name in (front.model, front.cache_salt, front.reasoning_effort):
        if name and not (type(name) is str and len(name) <= NAME_CHARACTERS_MAX):
            return False
    return type(front.add_special_tokens) in _FLAGS and type(front.add_generation_prompt) in _FLAGS


def _present(raw: Raw) -> bytes:
    if raw is _NONE:
        return b""
    found = bytes(raw)
    return b"" if len(found) < _SHORT and found in _NOTHING else found


def _variables(body: Front) -> dict[str, Any]:
    """What the template is told besides messages and tools, as vLLM tells it."""
    if body.chat_template_kwargs is _NONE and body.reasoning_effort is None:
        return {}
    asked = msgspec.json.decode(body.chat_template_kwargs) if _present(body.chat_template_kwargs) else {}
    asked = asked if isinstance(asked, dict) else {}
    if body.reasoning_effort is None:
        return asked
    return {"enable_thinking": body.reasoning_effort != "none"} | asked | {"reasoning_effort": body.reasoning_effort}
