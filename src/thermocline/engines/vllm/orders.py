"""What the scheduler's half says to the workers with every step, and what they report: plain small values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from thermocline.node.places import Places

NULL_PAGE = 0
"""vLLM's page of no block: what has left a sliding window, or was never needed there."""


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Bring blocks into pages of the engine: those of `places[rank][group]` into `pages[group]`, one each.

    `at_once`: before this step computes, which is going to compute on them.
    """

    request: str
    places: tuple[tuple[Places, ...], ...]
    pages: tuple[tuple[int, ...], ...]
    at_once: bool = False


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """Save the blocks in `pages[group]`, the first of which is block `start` of the chain of a request.

    `keys` are those of the chain from block `known` on: workers remember the rest, so a chain is sent once.
    """

    number: int
    chain: str
    known: int
    keys: bytes
    start: int
    pages: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Orders:
    """All orders of one step. `over` names chains that nobody needs any more.

    With another `epoch` than before, what was saved until now is not to be mixed with what is saved from now on. In an
    `idle` step nothing is computed, so a worker may wait a little for its loads. `early`: until this step computes vLLM
    writes nothing into pages itself, so loads may begin while it still prepares the step.
    """

    loads: tuple[LoadOrder, ...] = ()
    saves: tuple[SaveOrder, ...] = ()
    over: tuple[str, ...] = ()
    epoch: bytes = b""
    idle: bool = False
    early: bool = False


@dataclass(frozen=True, slots=True)
class Saved:
    """What became of a save order on so many ranks: its first `good` blocks are kept, and why the next one is not."""

    number: int
    ranks: int
    good: int
    why: str = ""


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A load of one rank that brought less than was ordered. Block `at` of the order was the first to be refused."""

    request: str
    rank: int
    group: int
    at: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Report:
    """What workers did since their last report. `at_once`: requests whose load was over before the step computed."""

    saved: tuple[Saved, ...] = ()
    failed: tuple[LoadFailed, ...] = ()
    at_once: tuple[str, ...] = ()

    def joined(self, other: Report) -> Report:
        """Both reports as one: where several ranks speak of one order, the least of them counts."""
        at_once = tuple(dict.fromkeys((*self.at_once, *other.at_once)))
        return Report(_least((*self.saved, *other.saved)), (*self.failed, *other.failed), at_once)


def _least(parts: Iterable[Saved]) -> tuple[Saved, ...]:
    found: dict[int, Saved] = {}
    for part in parts:
        one = found.get(part.number)
        if one is None:
            found[part.number] = part
        else:
            worse = part if part.good < one.good else one
            found[part.number] = replace(worse, ranks=one.ranks + part.ranks)
    return tuple(found.values())
