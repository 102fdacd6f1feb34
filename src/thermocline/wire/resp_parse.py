"""Requests of the Redis protocol, from bytes as they come. Every length is checked before memory is taken for it.

A request is an array of bulk strings, or a line of words (`inline`, for people with telnet), without quotes.
"""

from __future__ import annotations

from dataclasses import dataclass

from thermocline.errors import CommandError

INLINE_BYTES_MAX = 64 << 10
LINE_BYTES_MAX = 32
"""Of a length. The longest that counts has 20 digits."""
STRANGER_WORDS_MAX, STRANGER_BULK_BYTES_MAX = 10, 16 << 10
"""Of those who have not said the password yet. Redis has the same bounds."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of one request: how many words it has at most, and how many bytes a word."""

    words_max: int = 1 << 20
    bulk_bytes_max: int = 512 << 20


STRANGER = Bounds(STRANGER_WORDS_MAX, STRANGER_BULK_BYTES_MAX)


class RequestParser:
    """One client's bytes, in any pieces. `bounds` may be changed between requests.

    After a CommandError nobody knows where the next request begins: answer it, and close the connection.
    """

    __slots__ = ("_at", "_held", "_left", "_size", "_taken_bytes", "_words", "bounds")

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._held = bytearray()
        self._at = 0
        self._words: list[bytes] = []
        self._left = 0  # words to come of the request that has begun
        self._size = -1  # bytes of the word that has begun
        self._taken_bytes = 0  # of the words so far

    @property
    def held_bytes(self) -> int:
        """What waits here for the rest of its request, or for its turn."""
        return len(self._held) - self._at + self._taken_bytes

    def feed(self, received: bytes) -> list[bytes] | None:
        """Take bytes. Where they are exactly one request, the usual case, it is returned at once; else see `next`."""
        if not self._held and not self._left and received[:1] == b"*":
            lines = received.split(b"\r\n")
            count = (len(lines) - 2) // 2
            if lines[0] == b"*%d" % count and not lines[-1] and 0 < count <= self.bounds.words_max:
                words = lines[2::2]
                if lines[1:-1:2] == [b"$%d" % len(word) for word in words] and self._bulk_fits(words):
                    return words
        self._held += received
        return None

    def next(self) -> list[bytes] | None:
        """The next whole request; None where there is none yet. Raises CommandError."""
        try:
            return self._next()
        finally:
            if self._at == len(self._held):
                self._held.clear()
                self._at = 0
            elif self._at > INLINE_BYTES_MAX:
                del self._held[: self._at]
                self._at = 0

    # -- inside --------------------------------------------------------------------------------------------------------

    def _too_large(self, what: bytes) -> CommandError:
        return _broken((b"unauthenticated " if self.bounds is STRANGER else b"invalid ") + what)

    def _bulk_fits(self, words: list[bytes]) -> bool:
        return max(map(len, words)) <= self.bounds.bulk_bytes_max

    def _next(self) -> list[bytes] | None:
        while not self._left:
            if self._at == len(self._held):
                return None
            if self._held[self._at] != ord("*"):
                words = self._inline()
                if words != []:  # an empty line is no request
                    return words
            elif not self._begin():
                return None
        while self._left:
            if not self._word():
                return None
        whole, self._words, self._taken_bytes = self._words, [], 0
        return whole

    def _begin(self) -> bool:
        """Read how many words the request has; False where that is not here yet."""
        line = self._line(b"too big mbulk count string")
        if line is None:
            return False
        count = _number(line, b"invalid multibulk length", least=-(1 << 63))
        if count > self.bounds.words_max:
            raise self._too_large(b"multibulk length")
        self._left = max(0, count)
        return True

    def _word(self) -> bool:
        if self._size < 0:
            if self._at == len(self._held):
                return False
            if self._held[self._at] != ord("$"):
                raise _broken(b"expected '$', got '%c'" % self._held[self._at])
            line = self._line(b"too big bulk count string")
            if line is None:
                return False
            size = _number(line, b"invalid bulk length")
            if size > self.bounds.bulk_bytes_max:
                raise self._too_large(b"bulk length")
            self._size = size
        end = self._at + self._size
        if len(self._held) < end + 2:
            return False
        word = bytes(memoryview(self._held)[self._at : end])
        if self._held[end : end + 2] != b"\r\n":  # Redis takes any two bytes; they are a client that lost count
            raise _broken(b"a bulk string without its end")
        self._words.append(word)
        self._taken_bytes += self._size
        self._at, self._size = end + 2, -1
        self._left -= 1
        return True

    def _line(self, too_long: bytes) -> bytes | None:
        """The digits of a length, without what kind it is of."""
        end = self._held.find(b"\r\n", self._at, self._at + LINE_BYTES_MAX)
        if end < 0:
            if len(self._held) - self._at >= LINE_BYTES_MAX:
                raise _broken(too_long)
            return None
        line = bytes(self._held[self._at + 1 : end])
        self._at = end + 2
        return line

    def _inline(self) -> list[bytes] | None:
        end = self._held.find(b"\n", self._at, self._at + INLINE_BYTES_MAX)
        if end < 0:
            if len(self._held) - self._at >= INLINE_BYTES_MAX:
                raise _broken(b"too big inline request")
            return None
        words = bytes(self._held[self._at : end]).split()
        self._at = end + 1
        if len(words) > self.bounds.words_max or any(len(word) > self.bounds.bulk_bytes_max for word in words):
            raise _broken(b"too big inline request")
        return words


def _number(digits: bytes, wrong: bytes, *, least: int = 0) -> int:
    if digits.removeprefix(b"-").isdigit():
        number = int(digits)
        if number >= least:
            return number
    raise _broken(wrong)


def _broken(what: bytes) -> CommandError:
    return CommandError(f"ERR Protocol error: {what.decode('latin-1')}")
