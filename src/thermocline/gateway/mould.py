"""A head that was read before: on a kept connection the same one comes again and again, but for its length.

A message whose head has the same bytes, but for the digits of its one Content-Length, is the same message with another
body. So it need not be parsed, and nothing can be read in it that a parser has not seen. Whatever differs by a byte, or
does not come whole and alone, goes to the parser.
"""

from __future__ import annotations

import re

from msgspec import Struct

ENDING = b"\r\n\r\n"
DIGITS_MAX = 9
_LENGTH = re.compile(rb"\r\ncontent-length: ?(\d+)\r\n", re.IGNORECASE)


class Mould(Struct, frozen=True, gc=False):
    """The bytes of a head before the digits of its length, and those behind them with the empty line."""

    before: bytes
    after: bytes

    def body_at(self, message: bytes, body_bytes_max: int = 10**DIGITS_MAX) -> int:
        """Where the body begins, if the message has this head and is whole and alone; else 0."""
        before, after = self.before, self.after
        if not message.startswith(before):
            return 0
        first = len(before)
        stop = message.find(b"\r", first, first + DIGITS_MAX + 1)
        if stop < 0:
            return 0
        digits = message[first:stop]
        if not message.startswith(after, stop) or not digits.isdigit():
            return 0
        begin, length = stop + len(after), int(digits)
        return begin if len(message) == begin + length and length <= body_bytes_max else 0


def mould_of(message: bytes, body: int) -> Mould | None:
    """The mould of a message that a parser found whole, with so many bytes of body and one Content-Length."""
    end = len(message) - body
    found = _LENGTH.search(message, 0, end)
    if (
        found is None
        or int(found[1]) != body
        or not message.endswith(ENDING, 0, end)
        or message.find(ENDING) != end - len(ENDING)
    ):
        return None
    return Mould(message[: found.start(1)], message[found.end(1) : end])
