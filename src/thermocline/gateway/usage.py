"""What an instance says it used, read off the end of an answer that has already gone to the client."""

from __future__ import annotations

import re

from thermocline.gateway.seam import Usage

TAIL_BYTES = 4096
_COUNTS = re.compile(rb'"(prompt|input|cached|completion|output)_tokens"\s*:\s*(\d{1,9})\b')


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
    found = dict(reversed(_COUNTS.findall(tail, at)))  # the first of a name counts
    prompt, output = found.get(b"prompt", found.get(b"input")), found.get(b"completion", found.get(b"output"))
    cached = found.get(b"cached")
    if prompt is None:
        return None
    return Usage(int(prompt), None if cached is None else int(cached), None if output is None else int(output))
