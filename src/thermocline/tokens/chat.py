"""Messages and tools of /v1/chat/completions, in the form in which vLLM gives them to a template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

MESSAGES_MAX = 1 << 16
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


class _Function(Struct):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _Tool(Struct):
    type: str
    function: _Function


class _Message(Struct):
    role: str
    content: str | list[str | dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


_MESSAGES = msgspec.json.Decoder(Annotated[list[_Message], Meta(min_length=1, max_length=MESSAGES_MAX)])
_TOOLS = msgspec.json.Decoder(list[_Tool] | None)


def messages_of(raw: bytes, *, in_parts: bool, knows_developer: bool = True) -> list[dict[str, Any]] | None:
    """The messages of a request, for a template that walks through parts or one that takes plain text.

    None where they hold more than text, such as an image: what becomes of it is not for a template alone to say.
    Raises msgspec.MsgspecError for what are no messages.
    """
    messages = []
    for message in _MESSAGES.decode(raw):
        texts = _texts(message.content)
        if texts is None:
            return None
        role = message.role if knows_developer or message.role != "developer" else "system"
        parts = in_parts and role != "tool"
        content = [{"type": "text", "text": text} for text in texts] if parts else "\n".join(texts)
        messages.append({"role": role, "content": content} | _rest(message))
    return messages


def tools_of(raw: bytes) -> list[dict[str, Any]] | None:
    """The tools, with the fields and in the order that vLLM writes them; the order is part of the text."""
    tools = msgspec.to_builtins(_TOOLS.decode(raw)) if raw else None
    for tool in tools or ():
        if tool["function"]["strict"] is None:
            del tool["function"]["strict"]
    return tools


def _texts(content: str | list[str | dict[str, Any]] | None) -> list[str] | None:
    """The texts of a message's parts; None where a part is something else."""
    if not isinstance(content, list):
        return [] if content is None else [content]
    found = [part if isinstance(part, str) else part.get(_TEXT_PARTS.get(part.get("type", ""), "")) for part in content]
    return None if None in found else [str(text) for text in found]


def _rest(message: _Message) -> dict[str, Any]:
    """The fields beside role and content that a template may look at."""
    rest: dict[str, Any] = {}
    if message.role == "assistant":
        if message.tool_calls:
            rest["tool_calls"] = [_with_arguments(call) for call in message.tool_calls]
        reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
        if reasoning is not None:
            rest |= {"reasoning": reasoning, "reasoning_content": reasoning}
    elif message.role == "tool" and message.tool_call_id is not None:
        rest["tool_call_id"] = message.tool_call_id
    return rest if message.name is None else rest | {"name": message.name}


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are an object: templates want one, and the API has it as text."""
    function = call.get("function")
    if not isinstance(function, dict):
        return dict(call)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except msgspec.DecodeError:
            arguments = {}
    return {**call, "function": {**function, "arguments": arguments if isinstance(arguments, dict) else {}}}
