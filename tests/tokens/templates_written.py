"""Chat templates in the manner of the models that people serve, and conversations to put through them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATES = {path.stem: path.read_text("utf-8") for path in sorted(Path(__file__).parent.glob("templates/*.jinja"))}
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a town, in °C",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
        },
    },
    {"type": "function", "function": {"name": "time", "description": "<now>", "parameters": {}}},
]


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"town": "Zürich & co"}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one": [said("user", "Hello")],
    "several": [
        said("system", "  Be brief. "),
        said("user", "Grüße, 世界! <b>&amp;</b> {{ 7 * 7 }}\n\n"),
        said("assistant", " <think>\nhm\n</think>\n\nYes?  "),
        said("user", "More\n  please"),
    ],
    "reasoned": [
        said("user", "Why?"),
        said("assistant", "Because.", reasoning_content="I wonder"),
        said("user", "Why?"),
        said("assistant", "Because.", reasoning="still"),
    ],
    "called": [
        said("system", "Use tools."),
        said("user", "What is the weather?"),
        said("assistant", None, tool_calls=[CALL]),
        said("tool", '{"celsius": 21}', tool_call_id="abcdefghi"),
        said("tool", "sunny", tool_call_id="abcdefghi"),
        said("assistant", "21 degrees"),
        said("user", "Thanks"),
    ],
    "in parts": [
        said("system", [{"type": "text", "text": "Be brief."}]),
        said("user", [{"type": "text", "text": "One "}, {"type": "text", "text": " two"}], name="Ann"),
    ],
    "in disorder": [said("user", "a"), said("user", "b"), said("stop", "c"), said("user", "d")],
    "empty": [said("user", ""), said("assistant", ""), said("user", " \n")],
}
