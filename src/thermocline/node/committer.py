"""The committer: makes the sums of blocks that were copied into lent slots, and tells the node, in a thread."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from thermocline.blocks.frame import payload_sum
from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import Layout, LayoutId
from thermocline.node.link import Link
from thermocline.tiers.tier import Job, Outcome, Piece
from thermocline.wire import messages as say

LOG = logging.getLogger("thermocline.node")
OUTCOMES = {str(outcome): outcome for outcome in Outcome}


@dataclass(frozen=True, slots=True, eq=False)
class Lent:
    """A slot that the node lent over `link`: write a block into `view`, then commit it, or give it back."""

    link: Link
    layout: LayoutId
    slot: int
    view: Piece


@dataclass(frozen=True, slots=True)
class Part:
    """Blocks of one save that lie in slots: those from position `at` of the save on."""

    save: Save
    at: int
    lent: Sequence[Lent]


@dataclass(slots=True)
class Save:
    """One save, whose parts the node answers one by one. Its job ends with the last of them."""

    layout: Layout
    keys: Sequence[BlockKey]
    start: int
    job: Job
    _left: int = 1
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def part(self, at: int, lent: Sequence[Lent]) -> Part:
        """The next blocks are in slots."""
        with self._lock:
            self._left += 1
        return Part(self, at, lent)

    def refuse(self, at: int, outcome: Outcome) -> None:
        """The blocks from position `at` on were not taken."""
        self.job.outcomes[at:] = [outcome] * (len(self.job.outcomes) - at)

    def ended(self, at: int, outcomes: Sequence[Outcome]) -> None:
        """A part has these outcomes."""
        self.job.outcomes[at : at + len(outcomes)] = outcomes
        self.sealed()

    def sealed(self) -> None:
        """One thing less to wait for: a part, or that more parts may come."""
        with self._lock:
            self._left -= 1
            last = self._left == 0
        if last:
            self.job.set_done()


class Committer:
    """One thread. What waits for it is bounded by the slots that were lent."""

    def __init__(self, ended: Callable[[Layout, Sequence[Lent], Sequence[Outcome]], object]) -> None:
        """`ended` is told of every part: the slots that are still lent, and what became of its blocks."""
        self._ended = ended
        self._queue: queue.SimpleQueue[Part | None] = queue.SimpleQueue()
        self._under_way = 0
        self._idle = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="node commit", daemon=True)
        self._thread.start()

    def put(self, part: Part) -> None:
        """Commit this, after what came before. Once closed, it has failed."""
        with self._idle:
            self._under_way += 1
            if not self._closed:
                self._queue.put(part)
                return
        self._finish(part, (), [Outcome.FAILED] * len(part.lent))

    @property
    def idle(self) -> bool:
        """True while nothing waits for an answer."""
        return not self._under_way

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until everything is answered; False if `seconds` passed first."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._under_way, seconds)

    def close(self) -> None:
        """End the thread."""
        with self._idle:
            self._closed = True
            self._queue.put(None)
        self._thread.join(2.0)

    def _serve(self) -> None:
        while (part := self._queue.get()) is not None:
            try:
                self._commit(part)
            except Exception:  # the next save wants this thread
                LOG.exception("a save could not be committed")
                self._finish(part, (), [Outcome.FAILED] * len(part.lent))

    def _commit(self, part: Part) -> None:
        save, lent = part.save, part.lent
        link = lent[0].link
        first = save.start + part.at
        sums = b"".join(payload_sum([slot.view]) for slot in lent)
        layout, joined = link.number(save.layout), b"".join(save.keys[: first + len(lent)])
        numbers = tuple(slot.slot for slot in lent)
        link.ask(
            lambda number: say.Commit(number, layout, joined, first, numbers, sums),
            lambda answer: self._answered(part, answer),
        )

    def _answered(self, part: Part, answer: say.Answer | None) -> None:
        outcomes = [Outcome.FAILED] * len(part.lent)
        unused: Sequence[Lent] = ()
        if isinstance(answer, say.Committed) and len(answer.outcomes) == len(part.lent):
            outcomes = [OUTCOMES.get(outcome, Outcome.FAILED) for outcome in answer.outcomes]
            free = set(answer.unused)
            unused = tuple(slot for slot in part.lent if slot.slot in free)
        self._finish(part, unused, outcomes)

    def _finish(self, part: Part, unused: Sequence[Lent], outcomes: Sequence[Outcome]) -> None:
        part.save.ended(part.at, outcomes)
        self._ended(part.save.layout, unused, outcomes)
        with self._idle:
            self._under_way -= 1
            self._idle.notify_all()
