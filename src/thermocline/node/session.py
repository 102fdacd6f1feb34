"""One client of a node: reads its messages, has the store do what they say, and cleans up behind it."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import msgspec
import numpy as np

from thermocline.blocks.frame import padded
from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import Layout
from thermocline.blocks.slots import Slot
from thermocline.clock import Clock
from thermocline.store.plan import Plan
from thermocline.store.receipt import Receipt
from thermocline.store.staging import stage
from thermocline.store.store import Store
from thermocline.tiers.tier import Job, leading_hits
from thermocline.wire import messages as say
from thermocline.wire.messages import KEY_BYTES, SUM_BYTES, MessageError, split

LOG = logging.getLogger("thermocline.node")
RECEIVE_BYTES = 1 << 18
LEASES_MAX = 1 << 16
MODEL_NAME_MAX = 64
LENT_SHARE = 16
"""No client is lent more than one in so many of the slots that memory could have of a size."""


class Reports(Protocol):
    """What a client may ask of the node as a whole."""

    def status(self) -> bytes:
        """JSON: what is held, and for whom."""

    def metrics(self) -> bytes:
        """The Prometheus text."""


class Session:
    """Serves one connection in a thread of its own. What the client held is given back when the connection ends.

    A slot that was lent belongs to the client until it commits it, gives it back, or its socket is closed, which the
    kernel does after the last of its threads: so nobody can write into a slot that has gone to another. A client that
    is stopped keeps its few slots, and its leases run out by themselves.
    """

    def __init__(
        self,
        sock: socket.socket,
        store: Store,
        reports: Reports,
        *,
        clock: Clock,
        role: str,
        pid: int,
        lease_seconds: float,
    ) -> None:
        self.role, self.pid = role, pid
        self._sock, self._store, self._reports, self._clock = sock, store, reports, clock
        self._lease_seconds = lease_seconds
        self._layouts: dict[int, Layout] = {}
        self._leases: set[int] = set()
        self._slots: dict[int, tuple[Slot, Layout]] = {}
        self._slot_last = 0
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._ended = False
        self._verbs: dict[type[object], Callable[..., object]] = {
            say.Declare: self._declare,
            say.Stage: self._stage,
            say.Release: self._release,
            say.Damaged: self._damaged,
            say.Lend: self._lend,
            say.GiveBack: self._give_back,
            say.Commit: self._commit,
            say.Unsaved: self._unsaved,
            say.Prefetch: self._prefetch,
            say.Computed: self._computed,
            say.Record: self._record,
            say.Ping: lambda ping: self._send(say.Count(ping.id, 0)),
            say.Status: lambda asked: self._send(say.Report(asked.id, self._reports.status())),
            say.Metrics: lambda asked: self._send(say.Report(asked.id, self._reports.metrics())),
            say.Receipts: self._receipts,
        }

    @property
    def leases(self) -> int:
        """Plans this client holds."""
        return len(self._leases)

    @property
    def lent(self) -> int:
        """Slots this client may write into."""
        return len(self._slots)

    @property
    def layouts(self) -> list[Layout]:
        """What the client declared."""
        return list(self._layouts.values())

    def serve(self, inbox: say.Inbox) -> None:
        """Until the client leaves, or says what is no message."""
        try:
            while received := self._sock.recv(RECEIVE_BYTES):
                for body in inbox.feed(received):
                    self._obey(say.client_says(body))
        except (MessageError, OSError) as error:
            LOG.info("client %s (%d) is gone: %s", self.role, self.pid, error)
        finally:
            self._end()

    def drain(self) -> None:
        """Read no more; what was received is still answered. The client sees the end of the connection."""
        try:
            self._sock.shutdown(socket.SHUT_RD)
        except OSError:
            LOG.debug("client %s (%d) has gone already", self.role, self.pid)

    # -- the verbs -----------------------------------------------------------------------------------------------------

    def _obey(self, message: say.FromClient) -> None:
        verb = self._verbs.get(type(message))
        if verb is None:
            raise MessageError(f"{type(message).__name__} comes once, at the beginning")
        try:
            verb(message)
        except (MessageError, OSError):
            raise
        except Exception:  # one thing that fails must not take the others of this client, or of all, with it
            LOG.exception("the node failed at %s", type(message).__name__)
            if isinstance(message, say.Question):
                self._send(say.Failed(message.id, "the node failed at this; its log says more"))

    def _declare(self, said: say.Declare) -> None:
        if len(self._layouts) >= say.LAYOUTS_MAX:
            raise MessageError(f"more than {say.LAYOUTS_MAX} layouts")
        try:
            layout = msgspec.msgpack.decode(said.layout, type=Layout)
        except msgspec.DecodeError as error:
            raise MessageError(f"a layout that is none: {error}") from None
        if layout.block_bytes <= 0 or layout.tokens_per_block <= 0:
            raise MessageError("a layout of nothing")
        self._layouts[said.number] = layout

    def _stage(self, asked: say.Stage) -> None:
        layouts = self._known(asked.layouts)
        stage(
            self._store,
            layouts,
            _keys(asked.keys),
            prompt_tokens=asked.prompt_tokens,
            now=self._clock.now(),
            promoting=lambda deadline: self._send(say.Promoting(asked.id, deadline)),
            then=lambda plan: self._staged(asked.id, plan),
        )

    def _staged(self, number: int, plan: Plan) -> None:
        with self._lock:
            over = self._ended or len(self._leases) >= LEASES_MAX
            if plan.lease and not over:
                self._leases.add(plan.lease)
        if over:
            self._store.release(plan.lease)
            return
        self._store.metrics.count("asked_blocks_total", len(plan.keys))
        for run in plan.runs:
            self._store.metrics.count("staged_blocks_total", run.stop - run.start, (("tier", run.tier),))
        keys = plan.keys[: plan.blocks]
        places = [self._store.places(layout, keys) for layout in plan.layouts]
        self._send(
            say.Staged(
                number,
                plan.lease,
                self._clock.now() + self._lease_seconds,
                tuple(say.RunStaged(run.start, run.stop, run.tier, run.seconds) for run in plan.runs),
                tuple(say.Gap(gap.start, gap.stop, gap.reason, gap.detail) for gap in plan.missing),
                plan.load_seconds,
                plan.recompute_seconds,
                plan.cold_seconds,
                plan.load_seconds_max,
                plan.match_seconds,
                tuple(tuple(offset for offset, _ in each) for each in places),
                tuple(b"".join(its_sum for _, its_sum in each) for each in places),
            )
        )

    def _release(self, said: say.Release) -> None:
        for lease in said.leases:
            with self._lock:
                ours = lease in self._leases
                self._leases.discard(lease)
            if ours:
                self._store.release(lease)

    def _damaged(self, said: say.Damaged) -> None:
        (layout,) = self._known((said.layout,))
        self._store.found_damaged(layout, _keys(said.keys))

    def _lend(self, asked: say.Lend) -> None:
        (layout,) = self._known((asked.layout,))
        most = self._store.memory_bytes // padded(layout.block_bytes) // LENT_SHARE
        with self._lock:
            count = max(0, min(asked.count, max(1, most) - len(self._slots)))
        slots = self._store.lend(layout, count)
        numbers: list[int] = []
        with self._lock:
            for slot in slots:
                self._slot_last += 1
                self._slots[self._slot_last] = (slot, layout)
                numbers.append(self._slot_last)
        offsets = tuple(self._store.lent(layout, slot)[0] for slot in slots)
        self._send(say.Lent(asked.id, tuple(numbers), offsets))

    def _give_back(self, said: say.GiveBack) -> None:
        with self._lock:
            slots = [self._slots.pop(number)[0] for number in set(said.slots) if number in self._slots]
        self._store.take_back(slots)

    def _commit(self, asked: say.Commit) -> None:
        (layout,) = self._known((asked.layout,))
        keys, sums = _keys(asked.keys), split(asked.sums, SUM_BYTES)
        numbers = asked.slots
        if len(sums) != len(numbers) or asked.start < 0 or len(keys) != asked.start + len(numbers):
            raise MessageError("a commit whose parts do not fit together")
        with self._lock:
            if len(set(numbers)) != len(numbers) or any(
                self._slots.get(number, (None, None))[1] != layout for number in numbers
            ):
                raise MessageError("a commit of slots that were not lent for this layout")
            slots = [self._slots[number][0] for number in numbers]
        job, unused = self._store.adopt(layout, keys, list(zip(slots, sums, strict=True)), start=asked.start)
        left = set(unused)
        with self._lock:
            for number, slot in zip(numbers, slots, strict=True):
                if slot not in left:
                    del self._slots[number]
        free = tuple(number for number, slot in zip(numbers, slots, strict=True) if slot in left)
        self._send(say.Committed(asked.id, tuple(map(str, job.outcomes)), free))

    def _unsaved(self, asked: say.Unsaved) -> None:
        (layout,) = self._known((asked.layout,))
        self._send(say.Count(asked.id, self._store.unsaved(layout, _keys(asked.keys))))

    def _prefetch(self, asked: say.Prefetch) -> None:
        def arrived(job: Job) -> None:
            self._send(say.Count(asked.id, leading_hits(job.outcomes)))

        deadline = self._clock.now() + max(0.0, asked.seconds)
        self._store.prefetch(self._known(asked.layouts), _keys(asked.keys), deadline).watch(done=arrived)

    def _computed(self, said: say.Computed) -> None:
        if said.tokens > 0 and said.cached >= 0 and said.seconds > 0 and len(said.model) <= MODEL_NAME_MAX:
            self._store.costs.recomputed(said.tokens, said.cached, said.seconds, said.model)

    def _record(self, said: say.Record) -> None:
        try:
            receipt = msgspec.msgpack.decode(said.receipt, type=Receipt)
        except msgspec.DecodeError as error:
            raise MessageError(f"a receipt that is none: {error}") from None
        (root,) = split(said.root, KEY_BYTES)
        if len(said.tokens) % 4:
            raise MessageError("tokens are four bytes each")
        self._store.receipts.keep(receipt, np.frombuffer(said.tokens, np.uint32), root=BlockKey(root))

    def _receipts(self, asked: say.Receipts) -> None:
        kept = self._store.receipts
        one = kept.get(asked.request) if asked.request else None
        found = ([one] if one else []) if asked.request else kept.latest(asked.count)
        self._send(say.Report(asked.id, msgspec.json.encode(found)))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _known(self, numbers: Iterable[int]) -> list[Layout]:
        try:
            found = [self._layouts[number] for number in numbers]
        except KeyError:
            raise MessageError("a layout that was not declared") from None
        if not found:
            raise MessageError("a question about no layout")
        return found

    def _send(self, message: say.Answer) -> None:
        """Never raises: a client that is gone, or does not read, is found out by the thread that reads from it."""
        try:
            with self._sending:
                self._sock.sendall(say.encode(message))
        except (OSError, MessageError) as error:
            LOG.info("client %s (%d) took no answer: %s", self.role, self.pid, error)
            self.drain()

    def _end(self) -> None:
        with self._lock:
            self._ended = True
            leases, self._leases = self._leases, set()
            slots = [slot for slot, _ in self._slots.values()]
            self._slots.clear()
        self._sock.close()
        for lease in leases:
            self._store.release(lease)
        self._store.take_back(slots)


def _keys(joined: bytes) -> Sequence[BlockKey]:
    return [BlockKey(key) for key in split(joined, KEY_BYTES)]
