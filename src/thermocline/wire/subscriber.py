"""Hearing KV events: a thread that takes them from sockets, asks for what was missed, and hands them on in order.

It binds and engines connect to it, so one port is enough for a fleet, and engines listen nowhere. It reads no batch:
what is in one is its taker's to judge.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import zmq

from thermocline.clock import Clock, SystemClock
from thermocline.wire.events import PAYLOAD_BYTES_MAX, TOPIC_BYTES_MAX, read_topic
from thermocline.wire.publisher import END, Endpoint

LOG = logging.getLogger("thermocline.events")
WAITING_MAX = 1000
"""Messages that wait in one connection; what comes then is dropped by the sender, and is a gap."""
SOURCES_MAX = 1024
HELD_MAX, HELD_BYTES_MAX = 10_000, 32 << 20
REPLAYS_MAX = 16
REPLAY_SECONDS, REPLAY_SECONDS_MAX, REPLAY_PAUSE_SECONDS = 1.0, 10.0, 2.0
"""How long a replay may be silent, how long it may take, and how long no source is asked again that had nothing."""
AT_ONCE = 256
MESSAGE_FRAMES, ANSWER_FRAMES = 3, 4

Take = Callable[[str, int, bytes], object]


@dataclass(slots=True)
class _Stream:
    """What has been heard of one source. While a replay runs, what comes live is held back behind it."""

    last: int = -1  # handed on
    live: int = -1  # heard, but for replays: a number that goes back is a new life
    replay: zmq.Socket[bytes] | None = None
    asked_behind: int = -1
    started: float = 0.0
    heard: float = 0.0
    ask_again: float = 0.0
    held: deque[tuple[int, bytes]] = field(default_factory=deque)
    held_bytes: int = 0


class Subscriber:
    """Calls take(source, sequence, batch) from a thread of its own, for each source in the order of its numbers.

    `listen` are endpoints, each of which it binds (`>tcp://...`: connects to). The source is a message's topic where
    that names an instance (kv@NAME@MODEL), else the endpoint over which it came, as it was given. A number that goes
    back is the source's new life, which begins at 0. Where numbers are missing they are asked for, if `replays` or
    `replay_from` told where; what is not to be had is left out, and `gaps` counts it. Raises SettingsError where an
    endpoint cannot be had.
    """

    def __init__(
        self,
        listen: Sequence[str],
        take: Take,
        *,
        replays: Mapping[str, str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._take = take
        self._clock = clock or SystemClock()
        self._replays = {source: Endpoint.parse(text, binds=False) for source, text in (replays or {}).items()}
        self._streams: dict[str, _Stream] = {}
        self._asking: dict[zmq.Socket[bytes], tuple[str, _Stream]] = {}
        self._sockets: dict[zmq.Socket[bytes], str] = {}
        self._closing = False
        self.counts: Counter[str] = Counter()
        self._context = zmq.Context()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            for text in listen:
                self._sockets[self._listening(Endpoint.parse(text, binds=True))] = text
        except BaseException:
            self._context.destroy(linger=0)
            os.close(self._wake)
            raise
        self._poller = zmq.Poller()
        self._thread = threading.Thread(target=self._run, name="kv events", daemon=True)
        self._thread.start()

    def replay_from(self, source: str, endpoint: str) -> None:
        """What is missed of this source, or of all topics of this name, is asked for there from now on.

        Raises SettingsError for no endpoint.
        """
        self._replays = {**self._replays, source: Endpoint.parse(endpoint, binds=False)}

    @property
    def alive(self) -> bool:
        """True while it listens."""
        return self._thread.is_alive()

    def close(self, seconds: float = 2.0) -> None:
        """Listen no more. A second call does nothing."""
        if self._closing:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(seconds)
        if not self._thread.is_alive():
            os.close(self._wake)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _listening(self, endpoint: Endpoint) -> zmq.Socket[bytes]:
        sock = self._context.socket(zmq.SUB)
        sock.set(zmq.RCVHWM, WAITING_MAX)
        sock.set(zmq.MAXMSGSIZE, PAYLOAD_BYTES_MAX)
        sock.set(zmq.SUBSCRIBE, b"")
        endpoint.open(sock)
        return sock

    def _run(self) -> None:
        try:
            for each in (self._wake, *self._sockets):
                self._poller.register(each, zmq.POLLIN)
            while not self._closing:
                for sock, _ in self._poller.poll(100 if self._asking else None):
                    if sock in self._sockets:
                        self._hear(sock)
                    elif sock in self._asking:
                        self._hear_replay(sock)
                self._end_late_replays()
        except Exception:  # routing goes on without events, and says so
            LOG.exception("KV events are heard no more")
        finally:
            self._context.destroy(linger=0)

    def _hear(self, sock: zmq.Socket[bytes]) -> None:
        for frames in _received(sock):
            if len(frames) != MESSAGE_FRAMES or len(frames[1]) != len(END) or len(frames[0]) > TOPIC_BYTES_MAX:
                self.counts["malformed"] += 1
                continue
            topic = frames[0].decode(errors="replace")
            source = topic if read_topic(topic) else self._sockets[sock]
            stream = self._streams.get(source)
            if stream is None:
                self._forget_one()
                stream = self._streams[source] = _Stream()
            self._heard(source, stream, int.from_bytes(frames[1], "big"), frames[2])

    def _forget_one(self) -> None:
        """Make room for a source: the first that is not being replayed. If it is still there, it is heard as new."""
        if len(self._streams) >= SOURCES_MAX:
            del self._streams[next(name for name, stream in self._streams.items() if stream.replay is None)]
            self.counts["forgotten"] += 1

    def _heard(self, source: str, stream: _Stream, sequence: int, payload: bytes) -> None:
        again, stream.live = sequence <= stream.live, sequence
        if stream.replay is not None:
            stream.held.append((sequence, payload))
            stream.held_bytes += len(payload)
            if len(stream.held) > HELD_MAX or stream.held_bytes > HELD_BYTES_MAX:
                self._end_replay(source, stream, "late")
            return
        if again:
            stream.last = -1
        elif sequence <= stream.last:
            self.counts["overtaken"] += 1  # a replay was quicker
            return
        if sequence > stream.last + 1 and self._ask(source, stream):
            stream.held.append((sequence, payload))
            stream.held_bytes += len(payload)
        else:
            self._hand_on(source, stream, sequence, payload)

    def _hand_on(self, source: str, stream: _Stream, sequence: int, payload: bytes) -> None:
        self.counts["gaps"] += sequence > stream.last + 1
        self.counts["batches"] += 1
        stream.last = sequence
        try:
            self._take(source, sequence, payload)
        except Exception as error:  # noqa: BLE001  # whatever a taker does: the next one may be better
            if not self.counts["failed"]:
                at = traceback.extract_tb(error.__traceback__)[-1]
                place = f"{at.name}, line {at.lineno}"
                LOG.error(  # noqa: TRY400  # its words may quote a block's name or tokens
                    "a batch of KV events could not be taken in: %s in %s", type(error).__name__, place
                )
            self.counts["failed"] += 1

    # -- what was missed -----------------------------------------------------------------------------------------------

    def _ask(self, source: str, stream: _Stream) -> bool:
        """Ask for what is missing. False where nobody is there to ask, or was asked a moment ago."""
        topic = read_topic(source)
        endpoint = self._replays.get(source) or (self._replays.get(topic.name) if topic else None)
        now = self._clock.now()
        if endpoint is None or now < stream.ask_again or len(self._asking) >= REPLAYS_MAX:
            return False
        sock = self._context.socket(zmq.DEALER)
        sock.set(zmq.LINGER, 0)
        sock.set(zmq.RCVHWM, HELD_MAX)
        sock.set(zmq.MAXMSGSIZE, PAYLOAD_BYTES_MAX)
        try:
            sock.connect(endpoint.address)
            sock.send_multipart((b"", (stream.last + 1).to_bytes(8, "big")), zmq.NOBLOCK)
        except zmq.ZMQError:
            sock.close()
            return False
        self._poller.register(sock, zmq.POLLIN)
        self._asking[sock] = source, stream
        stream.replay, stream.started, stream.heard, stream.asked_behind = sock, now, now, stream.last
        self.counts["replays"] += 1
        return True

    def _hear_replay(self, sock: zmq.Socket[bytes]) -> None:
        source, stream = self._asking[sock]
        stream.heard = self._clock.now()
        for frames in _received(sock):
            if len(frames) != ANSWER_FRAMES or len(frames[2]) != len(END):
                self.counts["malformed"] += 1
                continue
            if frames[2] == END:
                self._end_replay(source, stream, "replayed")
                return
            topic, sequence = frames[1].decode(errors="replace"), int.from_bytes(frames[2], "big")
            if sequence > stream.last and (read_topic(topic) is None or topic == source):
                self._hand_on(source, stream, sequence, frames[3])

    def _end_late_replays(self) -> None:
        now = self._clock.now()
        for source, stream in list(self._asking.values()):
            if now > min(stream.heard + REPLAY_SECONDS, stream.started + REPLAY_SECONDS_MAX):
                self._end_replay(source, stream, "late")

    def _end_replay(self, source: str, stream: _Stream, how: str) -> None:
        """Go on with what came meanwhile, but for what the replay brought already; ask for what was lost of that."""
        sock, held = stream.replay, stream.held
        assert sock is not None
        self._poller.unregister(sock)
        del self._asking[sock]
        sock.close()
        self.counts[how] += 1
        stream.replay, stream.held, stream.held_bytes = None, deque(), 0
        if stream.last <= stream.asked_behind:
            stream.ask_again = self._clock.now() + REPLAY_PAUSE_SECONDS
        before = -1
        while held:
            sequence, payload = held[0]
            if sequence <= before:  # it began again meanwhile
                stream.last = -1
            if sequence > stream.last + 1 and self._ask(source, stream):
                stream.held, stream.held_bytes = held, sum(len(each) for _, each in held)
                return
            before = sequence
            held.popleft()
            if sequence > stream.last:
                self._hand_on(source, stream, sequence, payload)


def _received(sock: zmq.Socket[bytes]) -> Iterator[list[bytes]]:
    """What is there, but not all at once: others have their turn."""
    with contextlib.suppress(zmq.Again):
        for _ in range(AT_ONCE):
            yield sock.recv_multipart(zmq.NOBLOCK)
