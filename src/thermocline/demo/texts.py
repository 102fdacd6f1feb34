"""Real documents that come with Python, and questions about them."""

from __future__ import annotations

import inspect
import textwrap

CHARACTERS_MAX = 4_800


def documents() -> list[tuple[str, str]]:
    """(name, text): two chapters of Python's own documentation, cut to a length that computes in about a second."""
    from pydoc_data.topics import topics

    return [("format strings", _cut(topics["formatstrings"])), ("assignment", _cut(topics["assignment"]))]


def source() -> str:
    """The source of Python's own textwrap module."""
    return _cut(inspect.getsource(textwrap))


def _cut(text: str) -> str:
    """The beginning, up to the end of a line."""
    return text if len(text) <= CHARACTERS_MAX else text[: text.rindex("\n", 0, CHARACTERS_MAX)]


QUESTIONS = (
    "Say in one sentence what this is about.",
    "Which part of it do people get wrong most often?",
    "Give one example that is not in the text.",
)
