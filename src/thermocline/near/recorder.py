"""What an application looks up, noted in a file: see profile.py.

with profile.request():              # from a request's arrival to its first token
    with profile.kind("routing"):    # else a lookup is of the kind of its key's prefix
        client.hgetall("r:7")
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar

import msgspec

from thermocline.clock import SystemClock
from thermocline.errors import NearError
from thermocline.near.coherence import Background, Steps
from thermocline.near.commands import Args

LOOKUPS_MAX = 200_000
"""Lookups that a process notes; those after them are not."""
KIND_CHARACTERS_MAX = 60
NO_PREFIX = "(no prefix)"
NOW = SystemClock.now
_KIND: ContextVar[str] = ContextVar("kind", default="")
_REQUEST: ContextVar[str] = ContextVar("request", default="")
_SERIAL = itertools.count(1)


class Lookup(msgspec.Struct, frozen=True, omit_defaults=True):
    """One lookup: commands that were asked together. `began_seconds` is on the clock of the process that asked."""

    kind: str
    commands: list[list[str]]
    request: str = ""
    began_seconds: float = 0.0
    seconds: float = 0.0
    nbytes: int = 0
    memory: bool = False


@contextlib.contextmanager
def request() -> Iterator[None]:
    """Lookups within are of one request, and come before its first token."""
    token = _REQUEST.set(f"{os.getpid()}-{next(_SERIAL)}")
    try:
        yield
    finally:
        _REQUEST.reset(token)


@contextlib.contextmanager
def kind(name: str) -> Iterator[None]:
    """Lookups within are of the kind of this name."""
    token = _KIND.set(name)
    try:
        yield
    finally:
        _KIND.reset(token)


class Recorder:
    """Appends lookups to a file that only this user can read. Any thread; several processes may share the file."""

    def __init__(self, path: str) -> None:
        """Raises NearError where the file cannot be opened."""
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            if stat.S_ISREG(os.fstat(self._file).st_mode):
                os.fchmod(self._file, 0o600)
        except OSError as error:
            raise NearError(f"cannot write lookups to {path}: {error.strerror}", hint="name another file") from None
        self._left = itertools.count(LOOKUPS_MAX, -1)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def noted(self, steps: Steps, commands: Sequence[Args]) -> Steps:
        """The same steps; what they were for is noted when they have come to their end."""
        began, memory = NOW(), True
        try:
            step = next(steps)
            while True:
                memory = memory and isinstance(step, Background)
                try:
                    came = yield step
                except Exception as error:  # noqa: BLE001  # the steps say what it means
                    step = steps.throw(error)
                else:
                    step = steps.send(came)
        except StopIteration as end:
            self._note(commands, began, NOW() - began, end.value, memory=memory)
            return end.value
        finally:
            steps.close()

    def _note(self, commands: Sequence[Args], began: float, seconds: float, reply: object, *, memory: bool) -> None:
        if next(self._left) <= 0:
            return
        words = [[_text(word) for word in command] for command in commands]
        name = _KIND.get() or "+".join(dict.fromkeys(map(kind_of, words)))
        lookup = Lookup(name, words, _REQUEST.get(), began, seconds, size_of(reply), memory)
        with contextlib.suppress(OSError):  # a full disk costs the note, not the lookup
            os.write(self._file, json.dumps(msgspec.to_builtins(lookup)).encode() + b"\n")


def _text(word: object) -> str:
    """A word as JSON may hold it; bytes that are no text come back as they were."""
    raw = bytes(word) if isinstance(word, bytes | bytearray | memoryview) else None
    return str(word) if raw is None else raw.decode(errors="surrogateescape")


def kind_of(words: Sequence[str]) -> str:
    """The part of the key before its first colon."""
    prefix, colon, _ = words[1].partition(":") if len(words) > 1 else ("", "", "")
    return f"{prefix[:KIND_CHARACTERS_MAX]}:" if colon else NO_PREFIX


def size_of(reply: object) -> int:
    """The bytes of a reply, of its parts where it has any."""
    if isinstance(reply, bytes | str):
        return len(reply)
    parts = itertools.chain.from_iterable(reply.items()) if isinstance(reply, dict) else reply
    return sum(map(size_of, parts)) if isinstance(parts, Iterable) else 0
