"""One client of a node: reads its messages, has the store do what they say, and cleans up behind it."""

from __future__ import annotations

import contextlib
import hashlib
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
LAYOUT_BYTES_MAX = RECEIPT_BYTES_MAX = 1 << 16
PREFETCH_SECONDS_MAX = 60.0
COMPUTED_MAX, TOKENS_MAX = 1 << 40, 1 << 32
"""More tokens, or seconds, than that nobody has computed."""
LENT_SHARE = 16
"""No client is lent more than one in so many of the bytes of memory, but one slot of each layout."""


class Reports(Protocol):
    """What a client may ask of the node as a whole."""

    def status(self) -> bytes:
        """JSON: what is held, and for whom."""

    def metrics(self) -> bytes:
        """The Prometheus text."""

    def declared(self, layout: Layout) -> None:
        """A client computes blocks of this layout."""


class Session:
    """Serves one connection in a thread of its own. What the client held is given back when the connection ends.

    A slot that was lent belongs to the client until it commits it, gives it back, or its end of the socket is closed.
    The kernel closes it after the last of the client's threads, and a living client not before its last copy into a
    slot: so nobody can write into a slot that has gone to another. A client that is stopped keeps its few slots, and
    its leases run out by themselves. One that sends what is no message, or does not read, is heard no more, but keeps
    its slots likewise until it closes.
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
        self._leases: dict[int, float] = {}  # when each is over, oldest first
        self._slots: dict[int, tuple[Slot, Layout]] = {}
        self._slot_last = 0
        self._lent_bytes = 0
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._mute = False
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
            say.Trace: lambda asked: self._send(say.Report(asked.id, self._store.receipts.recent.lines())),
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
                self._hear(received, inbox)
        except OSError as error:
            LOG.info("client %s (%d) is gone: %s", self.role, self.pid, error)
        finally:
            self._end()

    def _hear(self, received: bytes, inbox: say.Inbox) -> None:
        try:
            for body in () if self._mute else inbox.feed(received):
                if not self._mute:
                    self._obey(say.client_says(body))
        except MessageError as error:
            self._part(error)

    def _part(self, why: Exception) -> None:
        """Say no more to this client, and hear it no more. Its slots are its own until it closes its end."""
        LOG.warning("client %s (%d) is let go: %s", self.role, self.pid, why)
        with self._lock:
            self._mute = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
        self._release(say.Release(tuple(self._leases)))

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
        except MessageError:
            raise
        except Exception:  # one thing that fails must not take the others of this client, or of all, with it
            LOG.exception("the node failed at %s", type(message).__name__)
            if isinstance(message, say.Question):
                self._send(say.Failed(message.id, "the node failed at this; its log says more"))

    def _declare(self, said: say.Declare) -> None:
        if len(self._layouts) >= say.LAYOUTS_MAX:
            raise MessageError(f"more than {say.LAYOUTS_MAX} layouts")
        if len(said.layout) > LAYOUT_BYTES_MAX:
            raise MessageError("a layout that is far too long")
        try:
            layout = msgspec.msgpack.decode(said.layout, type=Layout)
        except msgspec.DecodeError as error:
            raise MessageError(f"a layout that is none: {error}") from None
        if layout.block_bytes <= 0 or layout.tokens_per_block <= 0:
            raise MessageError("a layout of nothing")
        self._layouts[said.number] = layout
        self._reports.declared(layout)

    def _stage(self, asked: say.Stage) -> None:
        layouts, now = self._known(asked.layouts), self._clock.now()
        over = now + self._lease_seconds  # the lease is taken after this, and lasts longer
        stage(
            self._store,
            layouts,
            _keys(asked.keys),
            prompt_tokens=asked.prompt_tokens,
            now=now,
            promoting=lambda deadline: self._send(say.Promoting(asked.id, deadline)),
            then=lambda plan: self._staged(asked.id, plan, over),
        )

    def _staged(self, number: int, plan: Plan, over: float) -> None:
        if not self._takes(plan.lease, over):
            self._store.release(plan.lease)
            self._send(say.Failed(number, f"{LEASES_MAX} plans were not released"))
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
                over,
                tuple(say.RunStaged(run.start, run.stop, run.tier, run.seconds) for run in plan.runs),
                tuple(say.Gap(gap.start, gap.stop, gap.reason, gap.detail) for gap in plan.missing),
                plan.load_seconds,
                plan.recompute_seconds,
                plan.cold_seconds,
                plan.load_seconds_max,
                plan.match_seconds,
                tuple(tuple(offsets) for offsets, _ in places),
                tuple(sums for _, sums in places),
            )
        )

    def _takes(self, lease: int, over: float) -> bool:
        """Enter a lease, and strike out those that ran out unreleased. False where the client may have no more."""
        with self._lock:
            while self._leases and next(iter(self._leases.values())) < self._clock.now():
                del self._leases[next(iter(self._leases))]
            if self._mute or len(self._leases) >= LEASES_MAX:
                return False
            if lease:
                self._leases[lease] = over
        return True

    def _release(self, said: say.Release) -> None:
        for lease in said.leases:
            with self._lock:
                ours = self._leases.pop(lease, None) is not None
            if ours:
                self._store.release(lease)

    def _damaged(self, said: say.Damaged) -> None:
        (layout,) = self._known((said.layout,))
        self._store.found_damaged(layout, _keys(said.keys))

    def _lend(self, asked: say.Lend) -> None:
        (layout,) = self._known((asked.layout,))
        slots = self._store.lend(layout, min(asked.count, self._may_have(layout)))
        numbers: list[int] = []
        with self._lock:
            for slot in slots:
                self._slot_last += 1
                self._slots[self._slot_last] = (slot, layout)
                self._lent_bytes += padded(layout.block_bytes)
                numbers.append(self._slot_last)
        offsets = tuple(self._store.lent(layout, slot)[0] for slot in slots)
        self._send(say.Lent(asked.id, tuple(numbers), offsets))

    def _may_have(self, layout: Layout) -> int:
        """How many slots more the client may be lent."""
        room = self._store.memory_bytes // LENT_SHARE - self._lent_bytes
        has = any(of == layout for _, of in self._slots.values()) if room < padded(layout.block_bytes) else True
        return max(room // padded(layout.block_bytes), 0 if has else 1)

    def _give_back(self, said: say.GiveBack) -> None:
        self._store.take_back(self._struck(number for number in said.slots if number in self._slots))

    def _struck(self, numbers: Iterable[int]) -> list[Slot]:
        """These slots are lent to this client no more."""
        with self._lock:
            struck = [self._slots.pop(number) for number in set(numbers)]
            self._lent_bytes -= sum(padded(layout.block_bytes) for _, layout in struck)
        return [slot for slot, _ in struck]

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
        self._struck(number for number, slot in zip(numbers, slots, strict=True) if slot not in left)
        free = tuple(number for number, slot in zip(numbers, slots, strict=True) if slot in left)
        self._send(say.Committed(asked.id, tuple(map(str, job.outcomes)), free))

    def _unsaved(self, asked: say.Unsaved) -> None:
        (layout,) = self._known((asked.layout,))
        self._send(say.Count(asked.id, self._store.unsaved(layout, _keys(asked.keys))))

    def _prefetch(self, asked: say.Prefetch) -> None:
        def arrived(job: Job) -> None:
            self._send(say.Count(asked.id, leading_hits(job.outcomes)))

        deadline = self._clock.now() + min(max(0.0, asked.seconds), PREFETCH_SECONDS_MAX)
        self._store.prefetch(self._known(asked.layouts), _keys(asked.keys), deadline).watch(done=arrived)

    def _computed(self, said: say.Computed) -> None:
        known = 0 < said.tokens < COMPUTED_MAX and 0 <= said.cached < COMPUTED_MAX
        if known and 0 < said.seconds < COMPUTED_MAX and len(said.model) <= MODEL_NAME_MAX:
            self._store.costs.recomputed(said.tokens, said.cached, said.seconds, said.model)

    def _record(self, said: say.Record) -> None:
        if len(said.receipt) > RECEIPT_BYTES_MAX:
            raise MessageError("a receipt that is far too long")
        try:
            receipt = msgspec.msgpack.decode(said.receipt, type=Receipt)
        except msgspec.DecodeError as error:
            raise MessageError(f"a receipt that is none: {error}") from None
        (root,) = split(said.root, KEY_BYTES)
        if len(said.tokens) % 4:
            raise MessageError("tokens are four bytes each")
        tokens, root = np.frombuffer(said.tokens, np.uint32), self._family(root)
        known = 0 <= said.age_seconds < COMPUTED_MAX and 0 <= said.output_tokens < TOKENS_MAX
        since = (said.age_seconds, said.output_tokens) if known else (0.0, 0)
        self._store.receipts.keep(receipt, tokens, root=root, age_seconds=since[0], output_tokens=since[1])

    def _family(self, root: bytes) -> BlockKey:
        """What prompts have in common that may share blocks: the root of their salt, and the model they are for."""
        models = sorted({layout.model for layout in self._layouts.values()})
        return BlockKey(hashlib.sha256("\0".join((root.hex(), *models)).encode()).digest())

    def _receipts(self, asked: say.Receipts) -> None:
        kept = self._store.receipts
        one = kept.get(asked.request) if asked.request else None
        found = ([one] if one else []) if asked.request else kept.latest(asked.count)
        self._send(say.Report(asked.id, msgspec.json.encode(found)))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _known(self, numbers: Sequence[int]) -> list[Layout]:
        if len(numbers) > say.LAYOUTS_MAX:
            raise MessageError(f"a question about more than {say.LAYOUTS_MAX} layouts")
        try:
            found = [self._layouts[number] for number in numbers]
        except KeyError:
            raise MessageError("a layout that was not declared") from None
        if not found:
            raise MessageError("a question about no layout")
        return found

    def _send(self, message: say.Answer) -> None:
        """Never raises. A client that does not read is waited for once, and never again."""
        try:
            encoded = say.encode(message)
        except MessageError as error:
            encoded = say.encode(say.Failed(message.id, str(error)))
        with self._sending:
            if self._mute:
                return
            try:
                self._sock.sendall(encoded)
            except OSError as error:  # half of it may be sent: nothing may be sent behind that
                self._mute, why = True, error
            else:
                return
        self._part(why)

    def _end(self) -> None:
        with self._lock:
            self._mute = True
        with contextlib.suppress(OSError):  # for an answer that another thread is sending
            self._sock.shutdown(socket.SHUT_RDWR)
        with self._sending:
            self._sock.close()
        self._release(say.Release(tuple(self._leases)))
        self._store.take_back(self._struck(tuple(self._slots)))


def _keys(joined: bytes) -> Sequence[BlockKey]:
    return [BlockKey(key) for key in split(joined, KEY_BYTES)]
