"""The OpenAI API as typed values: what may be asked, what is answered, how errors look.

Types are strict and values bounded. Fields nobody knows are ignored, as clients send new ones at any time; but a known
field that would change the answer and is not supported is refused, never ignored.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from thermocline.errors import RequestError, ThermoclineError

STOPS_MAX = 16
STOP_CHARACTERS_MAX = 1024
PROMPTS_MAX = 64
MESSAGES_MAX = 1 << 16
SALT_CHARACTERS_MAX = 1024
LOGPROBS_MAX = 20

TokenId = Annotated[int, Meta(ge=0, lt=1 << 32)]
Count = Annotated[int, Meta(ge=1, le=1 << 30)]
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
StopString = Annotated[str, Meta(min_length=1, max_length=STOP_CHARACTERS_MAX)]
Likeliest = Annotated[int, Meta(ge=0, le=LOGPROBS_MAX)]

_NEVER = (
    *("allowed_token_ids", "audio", "chat_template", "guided_choice", "guided_grammar", "guided_json", "guided_regex"),
    *("prediction", "prompt_embeds", "prompt_logprobs", "reasoning_effort", "structured_outputs"),
    *("truncate_prompt_tokens", "web_search_options"),
)
NEUTRAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(_NEVER, ()),
    **dict.fromkeys(("bad_words", "documents", "functions", "stop_token_ids", "tools"), ([],)),
    **dict.fromkeys(("chat_template_kwargs", "logit_bias"), ({},)),
    **dict.fromkeys(("frequency_penalty", "min_p", "min_tokens", "presence_penalty"), (0,)),
    **dict.fromkeys(("best_of", "length_penalty", "n", "repetition_penalty"), (1,)),
    **dict.fromkeys(("continue_final_message", "echo", "use_beam_search"), (False,)),
    **dict.fromkeys(("function_call", "tool_choice"), ("none", "auto")),
    "add_generation_prompt": (True,),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "top_k": (0, -1),
}
"""Fields that are not supported, with the values that ask for nothing special. null never does."""


# -- requests ----------------------------------------------------------------------------------------------------------


class StreamOptions(Struct):
    """How a stream ends."""

    include_usage: bool = False


class _Common(Struct, kw_only=True):
    """What both kinds of request may say. No `model` means the one that is served."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Seed | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=STOPS_MAX)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    cache_salt: Annotated[str, Meta(max_length=SALT_CHARACTERS_MAX)] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """True if a stream is to end with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(_Common, kw_only=True):
    """The body of POST /v1/completions. `prompt` is a text or token ids, or a list of either."""

    prompt: str | list[Any]
    logprobs: Likeliest | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """One or several prompts, all texts or all token ids. Raises RequestError for anything else."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        first = self.prompt[0] if self.prompt else None
        kind: Any = list[str] if isinstance(first, str) else list[list[TokenId]]
        whole = [self.prompt] if isinstance(first, int) else self.prompt
        if not 0 < len(whole) <= PROMPTS_MAX:
            msg = f"prompt has {len(whole)} entries"
            raise RequestError(msg, hint=f"send between 1 and {PROMPTS_MAX}", param="prompt")
        try:
            prompts: list[str] | list[list[int]] = msgspec.convert(whole, kind)
        except msgspec.ValidationError as error:
            msg = f"prompt is not a text, token ids, or a list of either: {error}"
            raise RequestError(msg, hint="send one kind only", param="prompt") from None
        return prompts


class ContentPart(Struct):
    """A part of a message. Only text is understood."""

    type: str
    text: str = ""


class Message(Struct):
    """One turn of a conversation."""

    role: Annotated[str, Meta(min_length=1, max_length=64)]
    content: str | list[ContentPart] | None = None
    tool_calls: list[Any] | None = None

    def text(self) -> str:
        """The text of all parts, a line each, as vLLM joins them. Raises RequestError for more than text or nothing."""
        parts = [ContentPart("text", self.content)] if isinstance(self.content, str) else self.content
        if parts is None or self.tool_calls or any(part.type != "text" for part in parts):
            msg = f"a message of role {self.role} has no text, or more than text"
            raise RequestError(
                msg, hint="send text only: images, audio and tool calls are not supported", param="messages"
            )
        return "\n".join(part.text for part in parts)


class ChatRequest(_Common, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=MESSAGES_MAX)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Likeliest | None = None


R = TypeVar("R", CompletionRequest, ChatRequest)


def read(body: bytes, kind: type[R]) -> R:
    """Decode and check a request. Raises RequestError that names the field."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        _refuse_unsupported(fields)
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        found = re.search(r"\$\.(\w+)", str(error)) or re.search(r"field `(\w+)", str(error))
        raise RequestError(str(error), hint="compare it with the API reference", param=found and found[1]) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        msg = f"the body is not JSON: {error}"
        raise RequestError(msg, hint="send one JSON object, encoded in UTF-8", code="invalid_json") from None


def _refuse_unsupported(fields: dict[str, msgspec.Raw]) -> None:
    for name in NEUTRAL.keys() & fields.keys():
        value = msgspec.json.decode(fields[name])
        if value is not None and value not in NEUTRAL[name]:
            msg = f"{name} is not supported, and ignoring it would change the answer"
            raise RequestError(msg, hint=f"leave {name} out", param=name, code="unsupported")


# -- answers -----------------------------------------------------------------------------------------------------------


class PromptDetails(Struct, frozen=True):
    """How much of the prompt was loaded instead of computed."""

    cached_tokens: int


class Usage(Struct, frozen=True):
    """What a request used."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class TopLogprob(Struct, frozen=True):
    """A token that could have come, and the logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct, frozen=True):
    """The token that came, and the likeliest ones."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """Log probabilities in the form of chat completions."""

    content: list[TokenLogprob]


class CompletionLogprobs(Struct, frozen=True):
    """Log probabilities in the form of completions."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True, kw_only=True):
    """One answer, or a piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class ChatMessage(Struct, frozen=True):
    """What the model says."""

    content: str
    role: str = "assistant"


class ChatChoice(Struct, frozen=True, kw_only=True):
    """The answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class Delta(Struct, frozen=True, omit_defaults=True):
    """What is new in a message."""

    role: str | None = None
    content: str | None = None


class ChatChunkChoice(Struct, frozen=True, kw_only=True):
    """A piece of the answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class Answer(Struct, frozen=True, kw_only=True):
    """A response to either kind of request, or one event of its stream."""

    id: str
    object: str
    created: int
    model: str
    choices: Sequence[CompletionChoice | ChatChoice | ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(Struct, frozen=True, kw_only=True):
    """A served model."""

    id: str
    created: int
    description: str
    max_model_len: int
    object: str = "model"
    owned_by: str = "thermocline"


class ModelList(Struct, frozen=True):
    """Every served model."""

    data: list[ModelCard]
    object: str = "list"


class Failure(Struct, frozen=True):
    """What went wrong. `message` ends with a hint."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct, frozen=True):
    """The body of every response that is an error."""

    error: Failure


_ERROR_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    """The usage block."""
    total = prompt_tokens + completion_tokens
    return Usage(prompt_tokens, completion_tokens, total, PromptDetails(cached_tokens))


def error_body(error: ThermoclineError) -> bytes:
    """An error in OpenAI's shape."""
    message = f"{error.message}. hint: {error.hint}" if error.hint else error.message
    if not isinstance(error, RequestError):
        return msgspec.json.encode(ErrorBody(Failure(message, "server_error", None, None)))
    kind = "server_error" if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
    kind = _ERROR_TYPES.get(error.status, kind)
    return msgspec.json.encode(ErrorBody(Failure(message, kind, error.param, error.code)))


def event(answer: Answer) -> bytes:
    """One server-sent event."""
    return b"data: " + msgspec.json.encode(answer) + b"\n\n"


DONE = b"data: [DONE]\n\n"
