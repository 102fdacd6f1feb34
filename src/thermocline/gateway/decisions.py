"""What was decided for the last requests, and what came of it: figures and reasons, no text and no salt."""

from __future__ import annotations

from collections import deque

from msgspec import Struct

from thermocline.fleet.instance import Choice
from thermocline.gateway.seam import Trouble, Usage


class Try(Struct, frozen=True, gc=False):
    """One instance that was asked. Without `trouble` it answered; `choices` are all candidates, best first."""

    instance: str
    predicted_seconds: float
    cached_tokens: int
    choices: tuple[Choice, ...]
    trouble: Trouble | None
    first_byte_seconds: float | None


class Record(Struct, frozen=True, gc=False):
    """One request. Status 499 is a client that left.

    `error` and `regret_seconds` are those of `fleet.instance.Outcome`: of streams alone, as only those tell of their
    first token.
    """

    request: str
    path: str
    model: str | None
    tenant: str | None
    status: int
    seconds: float
    usage: Usage | None
    tries: tuple[Try, ...]
    error: float | None = None
    regret_seconds: float | None = None


class Decisions:
    """The last records, bounded."""

    __slots__ = ("_records",)

    def __init__(self, kept: int) -> None:
        self._records: deque[Record] = deque(maxlen=kept)

    def keep(self, record: Record) -> None:
        """Remember; the oldest is forgotten."""
        self._records.append(record)

    def get(self, request: str) -> Record | None:
        """The newest record of that request id; `last` is the newest of all."""
        if request == "last":
            return self._records[-1] if self._records else None
        return next((record for record in reversed(self._records) if record.request == request), None)

    def latest(self, limit: int) -> list[Record]:
        """The newest records, newest first."""
        return [record for record, _ in zip(reversed(self._records), range(limit), strict=False)]
