"""Sessions: turns that are only ever appended, bounded in number and bytes, gone some time after the last one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import msgspec

from thermocline.errors import NearError, SettingsError
from thermocline.near.question import SHARED, UNREADABLE, Question, Replies, Space, cooked, damaged, milliseconds, raw

ID_BYTES = 8


class Turn(msgspec.Struct, frozen=True):
    """What one side said. `text` may be JSON, where a turn is more than text."""

    role: str
    text: str


class _Kept(msgspec.Struct, frozen=True, array_like=True):
    """A turn as the server keeps it. By its id it counts once, also where a lost reply had it sent twice."""

    id: bytes
    role: bytes
    text: bytes


@dataclass(frozen=True, slots=True)
class Sessions:
    """The turns of each session, oldest first: at most `turns_max`, and `bytes_max` as they lie there.

    A turn has at most `turn_bytes_max`. Beyond a bound the oldest go. A session ends `ttl_seconds` after its last
    append, or as `class_ttl_seconds` says for the class of user that was given. Reading does not prolong it.
    """

    space: Space = SHARED
    turns_max: int = 200
    bytes_max: int = 1 << 20
    turn_bytes_max: int = 1 << 18
    ttl_seconds: float = 3600.0
    class_ttl_seconds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.turn_bytes_max <= self.bytes_max or self.turns_max < 1:
            raise SettingsError(
                "a session without room", hint="give turns_max above 0 and turn_bytes_max up to bytes_max"
            )
        for seconds in (self.ttl_seconds, *self.class_ttl_seconds.values()):
            milliseconds(seconds)
        object.__setattr__(self, "class_ttl_seconds", MappingProxyType(dict(self.class_ttl_seconds)))

    def append(self, session: str, *turns: Turn, user_class: str = "") -> Question[int]:
        """How many turns there are now. One round trip; where the session may be over its bytes, one more reads it.

        Asked again after an error, its turns are still there once. Raises NearError for a turn that is too large, and
        for none.
        """
        key = self._key(session)
        kept = (_Kept(os.urandom(ID_BYTES), raw(turn.role), raw(turn.text)) for turn in turns)
        items = [msgspec.msgpack.encode(turn) for turn in kept]
        if not items or max(map(len, items)) > self.turn_bytes_max:
            raise NearError("no turn, or one that is too large", hint=f"a turn has up to {self.turn_bytes_max} bytes")
        ttl = milliseconds(self.class_ttl_seconds.get(user_class, self.ttl_seconds))
        commands = (("RPUSH", key, *items), ("LTRIM", key, -self.turns_max, -1), ("PEXPIRE", key, ttl))
        return Question(commands, lambda replies: self._counted(key, min(replies[0], self.turns_max)), writes=True)

    def turns(self, session: str) -> Question[tuple[Turn, ...]]:
        """All that is kept, oldest first; none where there is no such session. Raises NearError for damaged ones."""
        return Question((("LRANGE", self._key(session), 0, -1),), self._read)

    def end(self, session: str) -> Question[bool]:
        """Forget it; whether there was one."""
        return Question((("DEL", self._key(session)),), lambda replies: bool(replies[0]), writes=True)

    def _key(self, session: str) -> str:
        return self.space.named("session", session)

    def _counted(self, key: str, count: int) -> int | Question[int]:
        if count * self.turn_bytes_max <= self.bytes_max:
            return count
        return Question((("LRANGE", key, 0, -1),), lambda replies: self._cut(key, replies[0]))

    def _cut(self, key: str, items: list[bytes]) -> int | Question[int]:
        """The last ones that fit are kept: said in this way, two who cut at once cut no more than one."""
        fitting = self._fitting(items)
        if fitting == len(items):
            return fitting
        return Question((("LTRIM", key, -fitting, -1),), lambda _: fitting, writes=True)

    def _fitting(self, items: list[bytes]) -> int:
        left = self.bytes_max
        for count, item in enumerate(reversed(items)):
            left -= len(item)
            if left < 0:
                return max(1, count)
        return len(items)

    def _read(self, replies: Replies) -> tuple[Turn, ...]:
        items: list[Any] = replies[0][-self._fitting(replies[0]) :]
        try:
            kept = {turn.id: Turn(cooked(turn.role), cooked(turn.text)) for turn in map(_decode, items)}
        except UNREADABLE as error:
            raise damaged("a turn") from error
        return tuple(kept.values())


_decode = msgspec.msgpack.Decoder(_Kept).decode
