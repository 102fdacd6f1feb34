"""Which leaf a tier loses first. A policy is a function of values; the index asks it about leaves only."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Candidate(NamedTuple):
    """What a policy knows about a leaf: when its path was last used (seconds on the store's clock) and its depth."""

    used_seconds: float
    depth: int


class Eviction(Protocol):
    """The seam. The same object runs in the store and in the simulator."""

    name: str

    def priority(self, leaf: Candidate) -> float:
        """Smallest goes first. May only grow as `used_seconds` grows, as the index asks again before it evicts."""


class LeastRecent:
    """Leaf-first LRU. With recency handed to the parent it equals LRU over whole paths, accessed tail first."""

    name = "lru"

    def priority(self, leaf: Candidate) -> float:
        """The time of last use."""
        return leaf.used_seconds
