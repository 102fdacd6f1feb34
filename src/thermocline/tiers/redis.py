"""The Redis tier: frames in a Redis or Valkey server that several engines share.

One value per block, header page and all, checked like a frame on disk. A load is one pipelined round trip, received
straight into the caller's pieces. The server may lose a value at any time (its own eviction, a flush, a restart), so
nothing is taken for granted: `find` asks, and a load that finds nothing is a miss.

Requests never connect, and never wait for longer than `wait_seconds` without a byte: a thread of the tier keeps a few
links ready, and where there is none the answer is FAILED at once. The same thread writes.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from thermocline.blocks.frame import PAGE_BYTES, Header, frame_bytes, padded, payload_sum, read_header, write_header
from thermocline.blocks.key import BlockKey
from thermocline.blocks.layout import LayoutId
from thermocline.clock import Clock, SystemClock
from thermocline.errors import TierError
from thermocline.tiers import redis_scripts as scripts
from thermocline.tiers.links import Links
from thermocline.tiers.redis_scripts import Name, Space
from thermocline.tiers.tier import Bitmap, Block, Found, Job, Medium, Outcome, Piece, Usage, block_length
from thermocline.wire import resp
from thermocline.wire.resp import Address, Link, Refusal, Reply, encode

LOG = logging.getLogger("thermocline.tiers")
MIB = 1024 * 1024
WAIT_SECONDS = 0.05
LINKS = 8
"""So many requests are served at a time; another one waits for its turn."""
AHEAD_BYTES = 32 * MIB
"""Values asked for and not received yet: the server keeps them in memory, so it must not be all of a long prompt."""

PART_BYTES = 8 * MIB
"""Values written in one transaction; another client's request waits at most as long as the server takes for these."""

KNOWN_MAX, KNOWN_SECONDS = 65_536, 60.0
"""What was met or written is not offered again so soon. Then it is: the server may have lost it, or let it expire."""
DAMAGED_MAX = 4096
TOUCHES_MAX = 8192
WRITE_GAP_SECONDS = 1.0
WRITE_SECONDS_MAX = 10.0
CONNECT_SECONDS_MAX = 1.0
RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.05, 5.0
PING_SECONDS = 10.0
NEVER = float("-inf")
DENIED = "give the password with redis_password_file and the user as redis://user@host; a socket must be writable by us"
CLOSE_SECONDS_MAX = 2.0
TELL_SECONDS, KINDS_TOLD_MAX = 60.0, 64


@dataclass(frozen=True, slots=True)
class _Write:
    layout: LayoutId
    keys: Sequence[BlockKey]
    blocks: Sequence[Block]
    wanted: Sequence[int]
    length_bytes: int
    job: Job

    @property
    def nbytes(self) -> int:
        return len(self.wanted) * frame_bytes(self.length_bytes)


class RedisTier:
    """Holds the beginnings of prompts under one namespace of a server, in no more than `capacity_bytes` of values.

    It evicts by itself, what was used longest ago first and the ends of paths before their beginnings, so it is never
    FULL unless the server refuses for lack of memory. Blocks deeper than `depth_max` are a MISS.
    """

    medium = Medium.REMOTE

    def __init__(
        self,
        address: Address,
        space: Space,
        *,
        name: str = "redis",
        clock: Clock | None = None,
        wait_seconds: float = WAIT_SECONDS,
        queue_bytes_max: int = 64 * MIB,
    ) -> None:
        """Connect, for a second at most. A server that does not answer is tried again in the background: no error.

        Raises TierError where the server refuses user or password, or the CA file cannot be read.
        """
        self.name = name
        self.depth_max, self.gain_min = space.depth_max, space.gain_min
        self._address, self._space = address, space
        self._clock = clock or SystemClock()
        self._wait_seconds = wait_seconds
        self._queue_bytes_max = queue_bytes_max
        self._lock = threading.Condition()
        self._writes: deque[_Write] = deque()
        self._queued_bytes = 0
        self._flying: set[Name] = set()
        self._known: OrderedDict[Name, float] = OrderedDict()  # to when we last wrote or touched it
        self._touches: dict[Name, None] = {}  # to be given their time to live again, in this order
        self._damaged: set[Name] = set()  # refused until they are deleted, or written anew
        self._deletions: list[Name] = []  # those of them that were not tried yet
        self._held = (0, 0)
        self._closing = False
        self._denied: PermissionError | None = None
        self._tried = False
        self._told: dict[str, float] = {}
        self._line: Link | None = None
        self._retry_at, self._pause = float("-inf"), RETRY_SECONDS_MIN
        self._ping_at = self._clock.now() + PING_SECONDS
        try:
            self._tls = resp.tls_of(address)
        except OSError as error:
            hint = "name a readable file of PEM certificates in redis_ca_file"
            raise TierError(f"cannot use {address.ca_file} as certificate authority: {error}", hint=hint) from error
        self._links = Links(self._connect, LINKS, clock=self._clock, lost=self._wake)
        self._thread = threading.Thread(target=self._serve, name="redis-keeper", daemon=True)
        self._thread.start()
        denied = self._wait_tried(CONNECT_SECONDS_MAX)
        if denied is not None:
            self.close()
            raise TierError(f"the Redis server refuses us: {denied.strerror}", hint=DENIED) from denied

    # -- the seam ------------------------------------------------------------------------------------------------------

    def find(self, layout: LayoutId, keys: Sequence[BlockKey], deadline: float) -> list[Outcome]:
        """See `SharedTier.find`."""
        deadline = min(deadline, self._clock.now() + self._wait_seconds)
        if not keys:
            return []
        damaged = [(layout, key) in self._damaged for key in keys]  # now: it may be deleted by the time of the answer
        try:
            with self._links.lent(deadline) as link:
                if link is None:
                    return [self._no_link()] * len(keys)
                held = self._exist(link, layout, keys, deadline)
        except OSError as error:
            return [self._gone(error)] * len(keys)
        if held is None:
            return [Outcome.FAILED] * len(keys)
        outcomes = [
            Outcome.HIT if there and not bad and (layout, key) not in self._damaged else Outcome.MISS
            for key, there, bad in zip(keys, held, damaged, strict=True)
        ]
        with self._lock:
            for key, outcome in zip(keys, outcomes, strict=True):
                if outcome is Outcome.MISS:
                    self._known.pop((layout, key), None)
        return outcomes

    def holds(self, layout: LayoutId, keys: Sequence[BlockKey]) -> Bitmap:
        """See `Tier.holds`; here it is one round trip, and False for all where there is no answer."""
        found = self.find(layout, keys, self._clock.now() + self._wait_seconds)
        return [outcome is Outcome.HIT for outcome in found]

    def known(self, layout: LayoutId, keys: Sequence[BlockKey]) -> Bitmap:
        """See `SharedTier.known`."""
        since = self._clock.now() - min(KNOWN_SECONDS, self._space.ttl_seconds / 4)
        known, flying = self._known, self._flying
        return [known.get((layout, key), NEVER) > since or (layout, key) in flying for key in keys]

    def load(
        self, layout: LayoutId, keys: Sequence[BlockKey], into: Sequence[Sequence[Piece]], deadline: float
    ) -> list[Outcome]:
        """See `Tier.load`. One pipelined round trip; a value is checked while the next one arrives."""
        outcomes: list[Outcome] = []
        try:
            with self._links.lent(min(deadline, self._clock.now() + self._wait_seconds)) as link:
                if link is None:
                    return [self._no_link()] * len(keys)
                self._receive(link, layout, keys, into, deadline, outcomes)
        except OSError as error:
            outcomes += [self._gone(error)] * (len(keys) - len(outcomes))
        self._learn(layout, keys, outcomes)
        return outcomes

    def save(self, layout: LayoutId, keys: Sequence[BlockKey], blocks: Sequence[Block]) -> Job:
        """See `Tier.save`. A value that the server has already is kept: blocks do not change."""
        length = block_length(blocks)
        size = frame_bytes(length)
        job = Job([self._refusal(block, size) for block in blocks])
        with self._lock:
            up = self._line is not None and not self._closing
            room = max((self._queue_bytes_max - self._queued_bytes) // size, not self._queued_bytes) if up else 0
            wanted = [at for at, outcome in enumerate(job.outcomes) if outcome is Outcome.PENDING]
            for at in wanted[room:]:
                job.outcomes[at] = Outcome.LATE if up else Outcome.FAILED
            write = _Write(layout, keys, blocks, wanted[:room], length, job)
            if write.wanted:
                self._writes.append(write)
                self._queued_bytes += write.nbytes
                self._flying.update((layout, keys[at]) for at in write.wanted)
                self._lock.notify_all()
        if not write.wanted:
            job.set_done()
        return job

    def remove(self, layout: LayoutId, keys: Sequence[BlockKey]) -> int:
        """See `Tier.remove`; a round trip. Where the server does not answer, nothing is removed, and 0 the answer."""
        deadline = self._clock.now() + self._wait_seconds
        names = [(layout, key) for key in dict.fromkeys(keys)]
        try:
            with self._links.lent(deadline) as link:
                return self._delete(link, names, deadline) if link is not None and names else 0
        except OSError as error:
            self._gone(error)
            return 0

    def usage(self) -> Usage:
        """See `Tier.usage`: values of this namespace, of all who share it, as of our last write. Asks nobody."""
        return Usage(*self._held, self._space.capacity_bytes)

    def found(self) -> Sequence[Found]:
        """See `Tier.found`: others may have it changed at any time, so nothing is taken over."""
        return ()

    def wait_idle(self, seconds: float | None = None) -> bool:
        """Wait until nothing is queued or being written; False if `seconds` passed first."""
        with self._lock:
            return self._lock.wait_for(lambda: not (self._queued_bytes or self._deletions or self._touches), seconds)

    def wait_up(self, seconds: float | None = None) -> bool:
        """Wait until the server answers; False if `seconds` passed first."""
        with self._lock:
            return self._lock.wait_for(lambda: self._line is not None and self._links.whole, seconds)

    def check_integrity(self) -> None:
        """What is queued and what is in flight add up. Raises AssertionError."""
        with self._lock:
            assert self._queued_bytes >= 0, "more was written than was queued"
            assert self._queued_bytes or not (self._flying or self._writes), "blocks in flight that nobody writes"
            assert len(self._known) <= KNOWN_MAX, "too many are remembered"

    def close(self) -> None:
        """See `Tier.close`. A server that does not answer is given up on after a moment: what waits is FAILED then."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        self._thread.join(CLOSE_SECONDS_MAX)
        self._fail_queued()
        line = self._line
        if line is not None:
            line.end()
        self._links.close()

    def _wait_tried(self, seconds: float) -> PermissionError | None:
        """Wait for the first attempt to connect. It is made by the keeper, as looking up a name may take any time."""
        with self._lock:
            self._lock.wait_for(lambda: self._tried, seconds)
        return self._denied

    # -- loading -------------------------------------------------------------------------------------------------------

    def _receive(
        self,
        link: Link,
        layout: LayoutId,
        keys: Sequence[BlockKey],
        into: Sequence[Sequence[Piece]],
        deadline: float,
        outcomes: list[Outcome],
    ) -> None:
        """Ask for values a bounded number ahead of what was received, and append an outcome for each."""
        page = np.empty(PAGE_BYTES, np.uint8)
        size = max((sum(piece.nbytes for piece in pieces) for pieces in into), default=0)
        ahead = max(2, AHEAD_BYTES // frame_bytes(size))
        asked = 0
        for at, (key, pieces) in enumerate(zip(keys, into, strict=True)):
            if asked - at <= ahead // 2 and asked < len(keys):
                step = keys[asked : at + ahead]
                link.send([b"".join(encode(b"GET", self._space.value(layout, each)) for each in step)], deadline)
                asked += len(step)
            outcomes.append(self._receive_one(link, layout, key, pieces, page, deadline))
            if not link.usable:
                outcomes += [Outcome.MISS] * (len(keys) - len(outcomes))
                return

    def _receive_one(
        self, link: Link, layout: LayoutId, key: BlockKey, pieces: Sequence[Piece], page: Piece, deadline: float
    ) -> Outcome:
        """Receive one frame and check it: header sum, key, layout, length, payload sum."""
        length = sum(piece.nbytes for piece in pieces)
        rest = memoryview(bytearray(padded(length) - length))
        got = link.value_into([page.data, *(piece.data for piece in pieces), rest], deadline)
        if got is None:
            return Outcome.MISS
        if isinstance(got, Refusal):
            self._tell(got)
            return Outcome.CORRUPT if got.code == "WRONGTYPE" else Outcome.FAILED
        if (layout, key) in self._damaged:
            return Outcome.MISS
        header = read_header(page) if got == frame_bytes(length) else None
        if header is None or (header.key, header.layout, header.length_bytes) != (key, layout, length):
            return Outcome.CORRUPT
        return Outcome.HIT if payload_sum(pieces) == header.payload_sum else Outcome.CORRUPT

    def _learn(self, layout: LayoutId, keys: Sequence[BlockKey], outcomes: Sequence[Outcome]) -> None:
        """Have what was used live on, and what is damaged deleted."""
        now = self._clock.now()
        stale = now - self._space.ttl_seconds / 4
        with self._lock:
            for key, outcome in zip(keys, outcomes, strict=True):
                name = (layout, key)
                if outcome is Outcome.HIT and self._known.get(name, stale) <= stale:
                    if len(self._touches) < TOUCHES_MAX:
                        self._touches[name] = None
                    self._remember(name, now)
                elif outcome in {Outcome.MISS, Outcome.CORRUPT}:
                    self._known.pop(name, None)
                if outcome is Outcome.CORRUPT and len(self._damaged) < DAMAGED_MAX:
                    self._damaged.add(name)
                    self._deletions.append(name)
            if self._touches or self._deletions:
                self._lock.notify_all()

    def _exist(self, link: Link, layout: LayoutId, keys: Sequence[BlockKey], deadline: float) -> Bitmap | None:
        """Which values there are: one pipelined round trip. None where the server refuses. Raises OSError."""
        link.send([b"".join(encode(b"EXISTS", self._space.value(layout, key)) for key in keys)], deadline)
        replies = [link.reply(deadline) for _ in keys]
        for reply in replies:
            if isinstance(reply, Refusal):
                self._tell(reply)
                return None
        return [reply == 1 for reply in replies]

    def _no_link(self) -> Outcome:
        return Outcome.PENDING if self._links.up else Outcome.FAILED

    def _gone(self, error: OSError) -> Outcome:
        self._tell(Refusal(type(error).__name__, str(error)))
        return Outcome.LATE if isinstance(error, TimeoutError) else Outcome.FAILED

    # -- writing: the keeper's own -------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while self._wait_for_work():
                try:
                    self._work()
                    self._mend()
                except PermissionError as error:
                    self._denied = error
                    self._gone(error)
                except OSError as error:  # of the writer's line: whether the links are well is another question
                    self._gone(error)
                    self._cut()
                    self._ping_at = NEVER
                except Exception:  # a defect must not end this thread: nobody would connect or write any more
                    LOG.exception("redis tier: a round of writing failed")
                    self._disconnect()
                with self._lock:
                    self._tried = True
                    self._lock.notify_all()
        finally:
            self._fail_queued()
            self._cut()

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; False when the tier is closed and nothing waits."""
        with self._lock:
            while not self._has_work() and (seconds := self._next_due() - self._clock.now()) > 0:
                self._lock.wait(seconds)
            return not self._closing or (self._line is not None and bool(self._writes))

    def _next_due(self) -> float:
        """When to connect again, or to see that all is well."""
        return self._ping_at if self._line is not None and self._links.whole else self._retry_at

    def _has_work(self) -> bool:
        waiting = self._writes or self._deletions or self._touches
        return self._closing or bool(waiting and self._line is not None)

    def _mend(self) -> None:
        """Connect where that is due, and see that idle links still answer. Raises PermissionError."""
        now = self._clock.now()
        if self._closing or now < self._next_due():
            return
        if self._line is None or not self._links.whole:
            self._reconnect()
        else:
            self._ping_at = now + PING_SECONDS
            self._links.ping(self._wait_seconds)
            self._see_that_it_answers()

    def _reconnect(self) -> None:
        """Connect what is not connected. Where links were lost, the line of the writer is likely to be lost as well."""
        try:
            self._see_that_it_answers()
            if self._line is None:
                self._line = self._connect(WRITE_GAP_SECONDS)
                with self._lock:
                    self._known.clear()  # the server may have been another one, or lost all it had
            self._links.mend()
            self._pause = RETRY_SECONDS_MIN
        except PermissionError:
            self._disconnect()
            raise
        except OSError as error:
            self._gone(error)
            self._disconnect()
        with self._lock:
            self._lock.notify_all()

    def _see_that_it_answers(self) -> None:
        line = self._line
        if line is not None:
            try:
                self._run(line, encode(b"PING"), self._clock.now() + self._wait_seconds)
            except OSError:
                self._cut()

    def _connect(self, gap_seconds: float | None = None) -> Link:
        deadline = self._clock.now() + CONNECT_SECONDS_MAX
        link = resp.connect(self._address, now=self._clock.now, deadline=deadline, tls=self._tls)
        link.gap_seconds = gap_seconds or self._wait_seconds
        return link

    def _disconnect(self) -> None:
        self._retry_at = self._clock.now() + self._pause
        self._pause = min(2 * self._pause, RETRY_SECONDS_MAX)
        self._cut()
        self._links.drop()
        self._fail_queued()

    def _cut(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def _fail_queued(self) -> None:
        with self._lock:
            waiting, self._writes = list(self._writes), deque()
        for write in waiting:
            self._end(write, {})

    def _work(self) -> None:
        line = self._line
        if line is None:
            self._fail_queued()
            return
        with self._lock:
            deletions, touches = self._deletions, list(self._touches)
            self._deletions, self._touches = [], {}
        if deletions:
            self._delete(line, deletions, self._clock.now() + WRITE_SECONDS_MAX)
        if touches:
            self._run(line, self._space.touch(touches), self._clock.now() + WRITE_SECONDS_MAX)
        with self._lock:
            write = self._writes.popleft() if self._writes else None
            self._lock.notify_all()
        if write is not None:
            self._write(line, write)

    def _write(self, line: Link, write: _Write) -> None:
        """Write what the server lacks of it, part by part. Raises OSError, having ended the job."""
        outcomes: dict[int, Outcome] = {}
        size = frame_bytes(write.length_bytes)
        step = max(1, min(PART_BYTES, self._space.capacity_bytes // 4) // size)
        deadline = self._clock.now() + WRITE_SECONDS_MAX
        try:
            keys = [write.keys[at] for at in write.wanted]
            there = self._exist(line, write.layout, keys, deadline)
            if there is None:
                return
            damaged = [(write.layout, key) in self._damaged for key in keys]  # those are written over
            kept = [held and not bad for held, bad in zip(there, damaged, strict=True)]
            outcomes.update((at, Outcome.HIT) for at, keep in zip(write.wanted, kept, strict=True) if keep)
            self._have_live_on(write, list(outcomes))
            lacking = [at for at, keep in zip(write.wanted, kept, strict=True) if not keep]
            for start in range(0, len(lacking), step):
                part = lacking[start : start + step]
                outcomes.update(zip(part, self._write_part(line, write, part, deadline), strict=True))
        finally:
            self._end(write, outcomes)

    def _have_live_on(self, write: _Write, positions: Sequence[int]) -> None:
        """What the server has already is used by us as well."""
        with self._lock:
            room = TOUCHES_MAX - len(self._touches)
            self._touches |= {(write.layout, write.keys[at]): None for at in positions[:room]}

    def _write_part(self, line: Link, write: _Write, part: Sequence[int], deadline: float) -> list[Outcome]:
        """One transaction: account for the blocks, making room, and set their values. Raises OSError."""
        names = [(write.layout, write.keys[at]) for at in part]
        booked = [(write.keys[at], write.blocks[at].depth) for at in part]
        reserve = self._space.reserve(write.layout, frame_bytes(write.length_bytes), booked)
        buffers: list[bytes | memoryview] = [encode(b"MULTI"), reserve]
        for at, name in zip(part, names, strict=True):
            buffers += self._set(name, write.blocks[at], write.length_bytes)
        line.send([*buffers, encode(b"EXEC")], deadline)
        queued = [line.reply(deadline) for _ in range(2 + len(part))]
        done = line.reply(deadline)
        if not isinstance(done, list) or len(done) != 1 + len(part):
            refusals = [reply for reply in (*queued, done) if isinstance(reply, Refusal)]
            return [self._refused_as(refusals)] * len(part)
        if not self._count(done[0]):  # values that nobody accounts for must not stay
            self._run(line, encode(b"UNLINK", *(self._space.value(*name) for name in names)), deadline)
            return [self._refused_as([done[0]])] * len(part)
        return [Outcome.HIT if reply == b"OK" else self._refused_as([reply]) for reply in done[1:]]

    def _set(self, name: Name, block: Block, length: int) -> list[bytes | memoryview]:
        page = np.empty(PAGE_BYTES, np.uint8)
        write_header(Header(name[1], block.parent, name[0], block.depth, length, block.sum), page)
        value, ttl = self._space.value(*name), self._space.ttl_text
        head = b"*5\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(value), value, frame_bytes(length))
        tail = bytes(padded(length) - length) + b"\r\n$2\r\nPX\r\n$%d\r\n%b\r\n" % (len(ttl), ttl)
        return [head, page.data, *(piece.data for piece in block.pieces), tail]

    def _end(self, write: _Write, outcomes: dict[int, Outcome]) -> None:
        """What was written of it is visible; of the rest nothing."""
        now = self._clock.now()
        with self._lock:
            for at in write.wanted:
                outcome = write.job.outcomes[at] = outcomes.get(at, Outcome.FAILED)
                name = (write.layout, write.keys[at])
                self._flying.discard(name)
                if outcome is Outcome.HIT:
                    self._remember(name, now)
                    self._damaged.discard(name)
            self._queued_bytes -= write.nbytes
            self._lock.notify_all()
        write.job.set_done()

    def _delete(self, link: Link, names: Sequence[Name], deadline: float) -> int:
        """Delete values. Returns how many there were. Raises OSError."""
        reply = self._run(link, self._space.forget(names), deadline)
        done = self._count(reply)
        with self._lock:
            for name in names:
                self._known.pop(name, None)
            if done:
                self._damaged.difference_update(names)
        return done[2] if done else 0

    def _run(self, link: Link, command: bytes, deadline: float) -> Reply:
        link.send([command], deadline)
        reply = link.reply(deadline)
        if isinstance(reply, Refusal):
            self._tell(reply)
        return reply

    def _count(self, reply: Reply) -> list[int]:
        """What a script says: values held now, their bytes, and how many it deleted. Empty if it says anything else."""
        numbers = [part for part in reply if isinstance(part, int)] if isinstance(reply, list) else []
        if len(numbers) != scripts.NUMBERS:
            return []
        self._held = (numbers[0], numbers[1])
        return numbers

    # -- both ----------------------------------------------------------------------------------------------------------

    def _refusal(self, block: Block, size: int) -> Outcome:
        """MISS for what can never be held here, PENDING for anything else."""
        deep = self.depth_max is not None and block.depth > self.depth_max
        return Outcome.MISS if deep or size > self._space.capacity_bytes // 4 else Outcome.PENDING

    def _refused_as(self, replies: Sequence[Reply]) -> Outcome:
        refusals = [reply for reply in replies if isinstance(reply, Refusal)]
        for refusal in refusals:
            self._tell(refusal)
        return Outcome.FULL if any(refusal.code == "OOM" for refusal in refusals) else Outcome.FAILED

    def _remember(self, name: Name, now: float) -> None:
        self._known[name] = now
        self._known.move_to_end(name)
        if len(self._known) > KNOWN_MAX:
            self._known.popitem(last=False)

    def _tell(self, refusal: Refusal) -> None:
        """Log what went wrong, each kind once a minute: a server that is down for long must not fill the log."""
        now = self._clock.now()
        if now >= self._told.get(refusal.code, now):
            if len(self._told) >= KINDS_TOLD_MAX:
                self._told.clear()
            self._told[refusal.code] = now + TELL_SECONDS
            LOG.warning("redis tier: %s", refusal.text)

    def _wake(self) -> None:
        with self._lock:
            self._retry_at = max(self._retry_at, self._clock.now())
            self._lock.notify_all()
