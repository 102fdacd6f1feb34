"""A staging: the plan that a node was asked for, and has not answered yet."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from thermocline.blocks.frame import SUM_BYTES
from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import Layout
from thermocline.clock import Clock
from thermocline.store.plan import Plan, Run
from thermocline.store.receipt import Missing, Reason
from thermocline.wire import messages as say

REASONS = {str(reason): reason for reason in Reason}


class Asker(Protocol):
    """Who asked the node."""

    def late(self, started: float) -> None:
        """The node did not answer in time what it was asked at `started`."""

    def release(self, lease: int) -> None:
        """A plan's lease is over."""


class Staging:
    """An answer to come. Any thread may look; the link's thread brings it. Settled once, by whoever is first.

    Where the node is late, the first look after the deadline settles it with an empty plan and the reason: nobody waits
    for a node longer than that, and no timer is needed.
    """

    __slots__ = (
        "_asker",
        "_came",
        "_cancelled",
        "_clock",
        "_deadline",
        "_extended",
        "_keys",
        "_layouts",
        "_lock",
        "_plan",
        "_prompt_tokens",
        "started",
    )

    def __init__(
        self,
        layouts: Sequence[Layout],
        keys: Sequence[BlockKey],
        prompt_tokens: int,
        clock: Clock,
        deadline: float,
        asker: Asker,
    ) -> None:
        self._layouts, self._keys, self._prompt_tokens = layouts, keys, prompt_tokens
        self._clock, self._deadline, self._asker = clock, deadline, asker
        self.started = clock.now()
        self._lock = threading.Lock()
        self._came = threading.Event()
        self._plan: Plan | None = None
        self._cancelled = False
        self._extended = False

    @property
    def done(self) -> bool:
        """True once there is a plan, if only an empty one."""
        return self.plan() is not None

    def plan(self) -> Plan | None:
        """The plan, its blocks in memory and leased. None until it is there, or its time is up."""
        if (
            self._plan is None
            and self._clock.now() > self._deadline
            and self.settle(self.nothing(Reason.LATE, "the node did not answer in time"))
            and not self._extended  # a node that has said what it is at is well, only its disk may be slow
        ):
            self._asker.late(self.started)
        return self._plan

    def wait(self, seconds: float) -> bool:
        """Wait for the plan; False if `seconds` passed first. Never longer than until the deadline."""
        until = self._clock.now() + seconds
        while self._plan is None:
            deadline = self._deadline
            if self._came.wait(max(0.0, min(until, deadline + 1e-4) - self._clock.now())):
                break
            if until <= self._clock.now() or deadline == self._deadline:
                break
        return self.done

    def cancel(self) -> None:
        """Forget it. A lease that it has, or that still comes, is released."""
        with self._lock:
            self._cancelled, plan = True, self._plan
        if plan is not None:
            self._asker.release(plan.lease)

    # -- for the client ------------------------------------------------------------------------------------------------

    def extend(self, deadline: float) -> None:
        """The node is at it, and will answer by then."""
        with self._lock:
            self._deadline, self._extended = max(self._deadline, deadline), True

    def is_overdue(self, seconds: float) -> bool:
        """Whether the node let so much time pass and said nothing."""
        return not self._extended and self._clock.now() - self.started > seconds

    def settle(self, plan: Plan) -> bool:
        """This is the plan. False where another was first, or nobody wants it any more: its lease is the caller's."""
        with self._lock:
            if self._plan is not None or self._cancelled:
                return False
            self._plan = plan
        self._came.set()
        return True

    def nothing(self, reason: Reason, detail: str) -> Plan:
        """The plan that loads nothing."""
        return nothing(self._layouts, self._keys, self._prompt_tokens, (reason, detail))

    def read(self, answer: say.Staged) -> Plan:
        """The plan that the node has made. What does not fit together is cut off, or is no plan at all."""
        count = len(self._keys)
        placed_all = len(answer.offsets) == len(answer.sums) == len(self._layouts)
        if not placed_all or not _in_order(answer.runs) or any(gap.start < 0 for gap in answer.gaps):
            return self.nothing(Reason.TIER_DOWN, "the node's answer does not fit the question")
        placed = min(
            min(len(offsets), len(sums) // SUM_BYTES, count)
            for offsets, sums in zip(answer.offsets, answer.sums, strict=True)
        )
        planned = answer.runs[-1].stop if answer.runs else 0
        runs = tuple(
            Run(run.start, min(run.stop, placed), run.tier, run.seconds) for run in answer.runs if run.start < placed
        )
        gaps = [
            Missing(gap.start, gap.stop, REASONS.get(gap.reason, Reason.UNKNOWN), gap.detail) for gap in answer.gaps
        ]
        if placed < planned:
            gaps.insert(0, Missing(placed, planned, Reason.EVICTED, "left memory while it was being planned"))
        return Plan(
            tuple(self._layouts),
            self._keys,
            self._prompt_tokens,
            runs,
            answer.load_seconds,
            answer.recompute_seconds,
            answer.cold_seconds,
            answer.load_seconds_max,
            tuple(gaps),
            0,
            answer.match_seconds,
        )


def _in_order(runs: Sequence[say.RunStaged]) -> bool:
    stop = 0
    for run in runs:
        if not stop <= run.start < run.stop:
            return False
        stop = run.stop
    return True


def nothing(
    layouts: Sequence[Layout], keys: Sequence[BlockKey], prompt_tokens: int, why: tuple[Reason, str] | None
) -> Plan:
    """A plan that loads nothing, for a reason."""
    missing = (Missing(0, len(keys), *why),) if why and keys else ()
    return Plan(tuple(layouts), keys, prompt_tokens, (), 0.0, 0.0, 0.0, 0.0, missing)
