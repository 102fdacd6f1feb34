"""CLIENT TRACKING: who keeps copies of keys, and is told when they change.

By default a client is told once of each key that it has read since; with BCAST of every change under its prefixes.
Messages go to clients of RESP3. A key that was evicted for room is not announced: its copies are right until it is set.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from thermocline.near.engine import Session

KEYS_MAX = 1_000_000
"""Keys that are remembered for clients without BCAST. Beyond, the oldest is told as though it had changed."""
INVALIDATE = b"invalidate"


@dataclass(frozen=True, slots=True)
class Following:
    """How a client wants to be told."""

    broadcast: bool = False
    prefixes: tuple[bytes, ...] = ()
    own_too: bool = True


class Followers:
    """All clients with tracking."""

    def __init__(self) -> None:
        self._readers: dict[bytes, set[Session]] = {}
        self._by_prefix: dict[bytes, set[Session]] = {}
        self._all: set[Session] = set()

    def __bool__(self) -> bool:
        return bool(self._all)

    def follow(self, session: Session, how: Following) -> None:
        """Begin, or go on in another way."""
        self.leave(session)
        session.following = how
        self._all.add(session)
        for prefix in how.prefixes or ((b"",) if how.broadcast else ()):
            self._by_prefix.setdefault(prefix, set()).add(session)

    def leave(self, session: Session) -> None:
        """End. What is remembered of its reads goes when the keys change."""
        how, session.following = session.following, None
        self._all.discard(session)
        if how is not None and how.broadcast:
            for prefix in how.prefixes or (b"",):
                self._by_prefix[prefix].discard(session)
                if not self._by_prefix[prefix]:
                    del self._by_prefix[prefix]
        if not self._all:
            self._readers.clear()

    def remember(self, session: Session, keys: Iterable[bytes]) -> None:
        """It has read these keys."""
        how = session.following
        if how is None or how.broadcast or session.protocol < 3:  # noqa: PLR2004  # only RESP3 has pushes
            return
        for key in keys:
            self._readers.setdefault(key, set()).add(session)
        while len(self._readers) > KEYS_MAX:
            self._tell_readers(next(iter(self._readers)), None)

    def changed(self, keys: list[bytes], author: Session | None) -> None:
        """Say so to those whom it concerns."""
        for key in keys if self._readers else ():
            self._tell_readers(key, author)
        for prefix, sessions in tuple(self._by_prefix.items()):
            under = [key for key in keys if key.startswith(prefix)]
            for session in tuple(sessions) if under else ():
                _tell(session, author, list(under))

    def all_changed(self, author: Session | None) -> None:
        """Every key may have."""
        self._readers.clear()
        for session in tuple(self._all):
            _tell(session, author, None)

    def _tell_readers(self, key: bytes, author: Session | None) -> None:
        for session in self._readers.pop(key, ()):
            how = session.following
            if how is not None and not how.broadcast:
                _tell(session, author, [key])


def _tell(session: Session, author: Session | None, keys: list[bytes] | None) -> None:
    how = session.following
    own = session is author and keys is not None and how is not None and not how.own_too
    if session.protocol >= 3 and not own:  # noqa: PLR2004  # only RESP3 has pushes
        session.push((INVALIDATE, keys))
