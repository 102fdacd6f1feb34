"""Routing and A/B tables: for each segment its variants and their weights, by version, swapped at once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import msgspec

from thermocline.errors import NearError, SettingsError
from thermocline.near.question import SHARED, Change, Question, Replies, Space, Words, damaged, digest, encoded

TABLE_BYTES_MAX = 1 << 20
READ_MAX = 256
"""Tables whose reading is remembered."""
Weights = Mapping[str, float]


class _Kept(msgspec.Struct, frozen=True):
    version: int
    segments: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True)
class Table:
    """Variants and weights by segment; "" is that of all that have none. Raises SettingsError for bad weights."""

    name: str
    version: int
    segments: Mapping[str, Weights]

    def __post_init__(self) -> None:
        for weights in self.segments.values():
            good = all(math.isfinite(weight) and weight >= 0 for weight in weights.values())
            if not good or sum(weights.values()) <= 0:
                raise SettingsError("weights that are no shares", hint="give numbers from 0 on, and one above 0")
        frozen = {segment: MappingProxyType(dict(weights)) for segment, weights in self.segments.items()}
        object.__setattr__(self, "segments", MappingProxyType(frozen))

    def variant(self, subject: str, segment: str = "") -> str | None:
        """Which variant a subject (a user, a session) has: the same always and everywhere; None where none is meant.

        Weighted rendezvous hashing (Thaler, Ravishankar 1998; Schindelhauer, Schomaker 2005): when a weight changes,
        subjects only move to or from that variant.
        """
        found = segment if segment in self.segments else ""
        scores = {
            variant: weight / -math.log(_point(self.name, found, variant, subject))
            for variant, weight in self.segments.get(found, {}).items()
            if weight > 0
        }
        return max(scores, key=lambda variant: (scores[variant], variant), default=None)


def _point(*parts: str) -> float:
    """A number between 0 and 1, and neither of them."""
    return (int(digest(*parts)[:13], 16) + 0.5) / (1 << 52)


@dataclass(frozen=True, slots=True)
class Routes:
    """Tables by name. They do not end by themselves, and an eviction at the server is for whoever sets its policy."""

    space: Space = SHARED
    _tables: dict[str, tuple[bytes, Table]] = field(default_factory=dict, repr=False, compare=False)

    def table(self, name: str) -> Question[Table | None]:
        """The current table, or None. While it does not change, reading it again costs one comparison."""
        return Question((("GET", self._key(name)),), lambda replies: self._read(name, replies))

    def swap(self, name: str, segments: Mapping[str, Weights], *, version: int) -> Change[Table | None]:
        """Put a table in the place of version `version` (0: where there is none); None where another one is there.

        All readers see the old table or the new one, never a mixture. Raises SettingsError for bad weights and
        NearError for a table beyond 1 MiB.
        """
        table = Table(name, version + 1, segments)
        kept = _Kept(table.version, {segment: dict(weights) for segment, weights in table.segments.items()})
        said = encoded(kept)
        if len(said) > TABLE_BYTES_MAX:
            raise NearError("a routing table of this size", hint=f"it may have {TABLE_BYTES_MAX} bytes")

        def decide(held: bytes | None) -> tuple[tuple[Words, ...], Table | None]:
            current = self._read(name, [held])
            if (current.version if current else 0) != version:
                return (), None
            return (("SET", self._key(name), said),), table

        return Change(self._key(name), decide, None)

    def _key(self, name: str) -> str:
        return self.space.named("routes", name)

    def _read(self, name: str, replies: Replies) -> Table | None:
        held = replies[0]
        if held is None:
            return None
        known = self._tables.get(name)
        if known is not None and known[0] == held:  # the near cache gives the same bytes: compared by their identity
            return known[1]
        try:
            kept = msgspec.json.decode(held, type=_Kept)
            table = Table(name, kept.version, kept.segments)
        except (msgspec.DecodeError, SettingsError) as error:
            raise damaged("a routing table") from error
        if len(self._tables) >= READ_MAX:
            self._tables.clear()
        self._tables[name] = held, table
        return table
