"""What an instance says it used, read off the end of an answer that has already gone to the client."""

from __future__ import annotations

import re

from thermocline.gateway.seam import Usage

TAIL_BYTES = 4096
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,9})\b')
_CACHED = re.compile(rb'"cached_tokens"\s*:\s*(\d{1,9})\b')
_OUTPUT = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,9})\b')


def read_usage(before: bytes, last: bytes) -> Usage | None:
    """The last usage in the last two pieces of an answer; None where there is none.

    Text of the model cannot pass for it: in a JSON string its quotes would be escaped.
    """
    tail = last[-TAIL_BYTES:]
    if len(tail) < TAIL_BYTES:
        tail = before[len(tail) - TAIL_BYTES :] + tail
    at = tail.rfind(b'"usage"')
    if at < 0:
        return None
    usage = tail[at:]
    prompt = _number(_PROMPT, usage)
    return None if prompt is None else Usage(prompt, _number(_CACHED, usage), _number(_OUTPUT, usage))


def _number(field: re.Pattern[bytes], text: bytes) -> int | None:
    found = field.search(text)
    return int(found[1]) if found else None
