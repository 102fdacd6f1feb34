"""What the gateway asks of whoever knows the fleet: where a request goes, and word of how it went.

The gateway reads HTTP, keeps instances apart that are down, and moves bytes. Everything that needs tokens, an index or
costs is behind `Chooser`. All calls come from the event loop's thread, one process has one chooser.
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable
from typing import Protocol

from msgspec import Struct

from thermocline.fleet.instance import Choice, Instance, Outcome
from thermocline.tokens.prompt import Front


class Arrived(Struct, frozen=True, gc=False):
    """A request whose body is whole. `exclude` has the slots that may not be chosen: down, draining or tried."""

    path: str
    model: str | None
    body: bytes
    salt: bytes
    """Of the tenant that asks: the root of its keys. Empty for none."""
    session: str | None
    """What the client says of its conversation: evidence, never a requirement, and never to be logged."""
    output_tokens: int | None
    """The most that the client wants."""
    streamed: bool
    exclude: frozenset[int]
    now: float
    front: Front
    """What was read of the body."""


class Decision(Struct, frozen=True, kw_only=True):
    """One instance for one try. What `choices` holds is kept for `why`: every candidate, best first."""

    instance: int
    """Its slot."""
    predicted_seconds: float
    """To the first token."""
    cached_tokens: int
    """Predicted."""
    booking: int = -1
    """The chooser's own."""
    kv_transfer_params: bytes = b""
    """JSON for the instance's connector: where a better copy lies. A body that has its own keeps it."""
    choices: tuple[Choice, ...] = ()


class Usage(Struct, frozen=True, gc=False):
    """What the instance said it used; None where it did not say."""

    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None


class Trouble(enum.StrEnum):
    """How a try failed. Only the first says nothing against the instance."""

    CLIENT_LEFT = "client_left"
    UNREACHABLE = "unreachable"
    LOST = "lost"
    LATE = "late"
    MALFORMED = "malformed"
    BUSY = "busy"
    """It answered 429, 502, 503 or 504."""


class Chooser(Protocol):
    """Where requests go. Every decision ends with exactly one `finished` or `failed`."""

    def joined(self, slot: int, instance: Instance) -> None:
        """An instance may be chosen from now on. Slots are small numbers, and used again after `left`."""

    def left(self, slot: int) -> None:
        """The instance is gone for good: forget what it held."""

    def lost(self, slot: int) -> None:
        """Nobody listens at the instance's address any more: whoever comes back there holds nothing."""

    def choose(self, request: Arrived) -> Decision | Awaitable[Decision]:
        """The best instance, booked at once. Awaitable where finding out would hold up the loop.

        Never one of `request.exclude`, which always leaves at least one. Raises RequestError for a request that no
        instance can answer. Whatever else it raises costs the decision: the least busy instance gets the request.
        """

    def first_byte(self, decision: Decision, now: float) -> None:
        """The first byte of the answer's body came."""

    def finished(self, decision: Decision, now: float, usage: Usage | None) -> Outcome | None:
        """The answer is complete. `usage` is None where it was no success; its fields, where the instance did not tell.

        Returns how right the decision was, where that is known.
        """

    def failed(self, decision: Decision, now: float, trouble: Trouble) -> None:
        """The try came to nothing; the request may be tried elsewhere, as another decision."""
