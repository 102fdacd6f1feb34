"""The values that go in and out of a routing decision. All of them are frozen, so a decision can be kept and read.

Those that every request makes are msgspec's: made in a quarter of a microsecond, where a frozen dataclass takes two.

A **slot** is an instance's small number in a fleet: its place in every flat list here and its bit in the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from msgspec import Struct

NO_INSTANCES: frozenset[int] = frozenset()


class Tier(StrEnum):
    """Where a request's known tokens would come from, warmest first."""

    NONE = "none"
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    PEER = "peer"


class Why(StrEnum):
    """Why an instance was placed where it stands in a ranking: a closed set, so that it can be counted."""

    POLICY = "POLICY"  # the policy asks for no costs
    NOTHING_HELD = "NOTHING_HELD"  # no instance holds any of it: the least loaded one
    LONGEST_MATCH = "LONGEST_MATCH"  # holds the most, and is the quickest
    SPILLED = "SPILLED"  # another one holds more, and its queue costs more than computing again
    SHARED_EQUALLY = "SHARED_EQUALLY"  # others hold as much: the least loaded of them
    SESSION = "SESSION"  # served this session a moment ago, and no event has told of it yet
    LOAD_REGIME = "LOAD_REGIME"  # what is held is gone before it is used again: load decides
    LOADED = "LOADED"  # a colder tier is quicker than computing
    FETCHED = "FETCHED"  # another node's copy is quicker than computing
    RUNNER_UP = "RUNNER_UP"  # the next best


@dataclass(frozen=True, slots=True)
class Instance:
    """What is known of an instance before it has served anything. `name` is unique in the fleet.

    `node` names the node whose host and disk tiers it shares; instances without one have none.
    """

    name: str
    url: str = ""
    node: str = ""
    capacity_tokens: int = 0  # of its own cache; 0 is unknown
    seats: int = 256  # requests that it runs at once; more wait


class Overlaps(Struct, frozen=True, gc=False):
    """Leading tokens of one prompt that each slot holds. A list is as long as the fleet has slots, or empty.

    `host` counts what device and host memory hold together, `disk` what all three do: a colder tier is never shorter.
    `name` stands for the longest match: the same for all prompts that share exactly so much, None where unknown. By it
    a prefix that everybody asks for is told from conversations.
    """

    device: Sequence[int] = ()
    host: Sequence[int] = ()
    disk: Sequence[int] = ()
    name: int | None = None


NOTHING = Overlaps()


class Ask(Struct, frozen=True, gc=False):
    """One request, as far as routing needs to know it.

    `session` is a digest of whatever names the conversation, or None. It is evidence of where a prefix lies, and what
    `session_hash` hashes. `exclude` are slots that were tried already. Without `streamed` nobody will tell when the
    first token is out.
    """

    prompt_tokens: int
    overlaps: Overlaps = NOTHING
    session: str | None = None
    output_tokens_expected: int = 0
    exclude: frozenset[int] = NO_INSTANCES
    streamed: bool = True


class Hint(Struct, frozen=True, gc=False):
    """Where a better copy lies than the chosen instance has: for its connector, which may fetch it."""

    instance: str
    node: str
    tier: str
    tokens: int

    def kv_transfer_params(self) -> dict[str, dict[str, str | int]]:
        """As the request's `kv_transfer_params` carry it. No token, key or salt is in it."""
        found: dict[str, str | int] = {"instance": self.instance, "tier": self.tier, "tokens": self.tokens}
        return {"thermocline": found | ({"node": self.node} if self.node else {})}


class Choice(Struct, frozen=True, gc=False):
    """One candidate of a decision. `seconds` is the predicted time to the first token, the sum of the parts below.

    `score_seconds` is what candidates are ranked by: the prediction, and what this request would cost those behind it.
    """

    instance: int
    seconds: float
    queue_seconds: float = 0.0
    transfer_seconds: float = 0.0
    recompute_seconds: float = 0.0
    interference_seconds: float = 0.0
    cached_tokens: int = 0
    loaded_tokens: int = 0
    tier: str = Tier.NONE
    reasons: tuple[str, ...] = ()
    score_seconds: float = 0.0
    hint: Hint | None = None


class Outcome(Struct, frozen=True, gc=False):
    """A finished decision beside what was predicted. None where nobody could tell.

    `regret_seconds`: how much sooner the best other candidate was predicted to answer than the chosen one did; 0 where
    the choice was right. It compares an actual time with a prediction, so it is as good as predictions are.
    """

    instance: int
    predicted_seconds: float
    actual_seconds: float | None
    predicted_cached_tokens: int
    actual_cached_tokens: int | None
    regret_seconds: float | None

    @property
    def error(self) -> float | None:
        """How far the prediction was off, as a share of what it took."""
        if not self.actual_seconds:
            return None
        return abs(self.predicted_seconds - self.actual_seconds) / self.actual_seconds


@dataclass(frozen=True, slots=True)
class Regime:
    """Whether affinity can pay now, and the figures that say so. Shares are between 0 and 1 and count recent requests.

    `working_set_tokens` is Denning's (1968): what is computed between two visits of the same session, over the fleet.
    0 where no session has come back yet.
    """

    affinity: bool
    trust: float  # tokens found cached, over tokens predicted to be
    reuse: float  # tokens found cached, over prompt tokens
    working_set_tokens: float
    capacity_tokens: float


@dataclass(frozen=True, slots=True)
class InstanceState:
    """The books of one instance at a moment, for `why`, `ps` and metrics."""

    instance: Instance
    available: bool
    queue_seconds: float
    waiting: int
    decoding: int
    requests: int
    recent_seconds: float
    token_seconds: float
    trust: float
