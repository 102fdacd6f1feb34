"""One connection to a node: questions go out as they come, a thread takes the answers in."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import logging
import mmap
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

import thermocline
from thermocline.blocks.frame import PAGE_BYTES
from thermocline.blocks.layout import Layout, LayoutId
from thermocline.errors import NodeError
from thermocline.tiers.tier import Piece
from thermocline.wire import messages as say

LOG = logging.getLogger("thermocline.node")
CONNECT_SECONDS = 1.0
RECEIVE_BYTES = 1 << 18
SEND_BUFFER_BYTES = 4 << 20
TOUCH_BYTES = 16 << 20

Taker = Callable[["say.Answer | None"], object]
"""Called in the link's thread with the answer, or with None when the link ends first. More than once if the first was
not the last."""


class Link:
    """Connected on return. `on_end` is called once, in the thread that finds the other side gone."""

    def __init__(self, path: Path, role: str, *, wait_seconds: float, on_end: Callable[[Link], object]) -> None:
        """Raises OSError where nobody listens or answers, NodeError where the node refuses us.

        No message waits longer than `wait_seconds` for the node to take it.
        """
        self._wait_seconds = wait_seconds
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._inbox = say.Inbox()
        self._fd = -1
        self._on_end = on_end
        self._takers: dict[int, Taker] = {}
        self._numbers = itertools.count(1)
        self._layouts: dict[LayoutId, int] = {}
        self._lock = threading.Lock()
        self._written = threading.Condition(self._lock)
        self._writing = 0
        self._dead = False
        self._sending = threading.Lock()
        self._declaring = threading.Lock()
        self._memory: Piece | None = None
        self.ended = False
        try:
            welcome = self._shake_hands(path, role)
        except BaseException:
            self._close()
            raise
        self.incarnation, self.memory_bytes = welcome.incarnation, welcome.memory_bytes
        self._thread = threading.Thread(target=self._listen, name="node link", daemon=True)
        self._thread.start()

    # -- out -----------------------------------------------------------------------------------------------------------

    def ask(self, make: Callable[[int], say.Question], taker: Taker) -> None:
        """Send the question that `make` gives for a number. The answer goes to `taker`."""
        number = next(self._numbers)
        with self._lock:
            ended = self.ended
            if not ended:
                self._takers[number] = taker
        if ended:
            taker(None)
            return
        self.tell(make(number))

    def tell(self, message: say.FromClient) -> None:
        """Send a message. A node that does not read for a while is as good as gone: then the link ends."""
        with self._sending:
            if self._dead:
                return
            try:
                self._sock.sendall(say.encode(message))
            except (OSError, say.MessageError) as error:  # half of it may be sent: nothing may be sent behind that
                LOG.info("the link to the node ends: %s", error)
                self.end()

    def number(self, layout: Layout) -> int:
        """The number of a layout on this link; the node is told of it at first."""
        number = self._layouts.get(layout.id)
        if number is not None:
            return number
        with self._declaring:  # nobody may use the number before the node was told of it
            number = len(self._layouts) + 1
            if layout.id not in self._layouts:
                self.tell(say.Declare(number, msgspec.msgpack.encode(layout)))
                self._layouts[layout.id] = number
            return self._layouts[layout.id]

    @property
    def memory(self) -> Piece:
        """The node's memory, mapped at first use. A view of it stays readable when the node is gone."""
        with self._lock:
            if self._memory is None:
                if self._fd < 0:
                    raise OSError("the link has ended")
                mapped = mmap.mmap(self._fd, self.memory_bytes)
                self._memory = np.frombuffer(mapped, np.uint8)
                threading.Thread(target=_touch, args=(self._memory, self), name="node memory", daemon=True).start()
            return self._memory

    def hold(self, count: int) -> None:
        """So many slots that the node lent over this link are being written: it stays open until `let_go`."""
        with self._lock:
            self._writing += count

    def let_go(self, count: int) -> None:
        """Nothing is written into so many slots any more."""
        with self._written:
            self._writing -= count
            self._written.notify_all()

    def end(self) -> None:
        """Have the thread find the connection closed. It calls every taker with None.

        The node learns of it when the last copy into a slot is over: until then it gives no slot to another.
        """
        self._dead = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RD)

    # -- in ------------------------------------------------------------------------------------------------------------

    def _shake_hands(self, path: Path, role: str) -> say.Welcome:
        self._sock.settimeout(CONNECT_SECONDS)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._sock.connect(str(path))
        self._sock.sendall(say.encode(say.Hello(say.PROTOCOL, thermocline.__version__, role)))
        received, fds, _, _ = socket.recv_fds(self._sock, 1 << 16, 1)
        self._fd = fds[0] if fds else -1
        if not received:
            raise ConnectionResetError("the node is leaving")
        try:
            first = next(map(say.node_says, self._inbox.feed(received)), None)
        except say.MessageError:
            first = None
        if isinstance(first, say.Refused):
            raise NodeError(f"the node at {path} refuses us: {first.reason}", hint=first.hint)
        if not isinstance(first, say.Welcome) or first.protocol != say.PROTOCOL or not fds:
            raise NodeError(f"what listens at {path} is no node of this version", hint="check the path of the socket")
        sealed = fcntl.fcntl(self._fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        if not sealed or os.fstat(self._fd).st_size < first.memory_bytes:  # to touch what was cut off ends a process
            raise NodeError(f"the memory of the node at {path} is not what it says", hint="restart the node")
        self._sock.settimeout(None)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(self._wait_seconds))
        return first

    def _listen(self) -> None:
        try:
            while received := self._sock.recv(RECEIVE_BYTES):
                for body in self._inbox.feed(received):
                    self._take(say.node_says(body))
        except (OSError, say.MessageError) as error:
            LOG.info("the link to the node is gone: %s", error)
        with self._lock:
            self.ended = True
            takers = list(self._takers.values())
            self._takers.clear()
        self._on_end(self)
        for taker in takers:
            _call(taker, None)
        with self._written:
            self._dead = True
            self._written.wait_for(lambda: not self._writing)
        self._close()

    def _take(self, answer: say.FromNode) -> None:
        if isinstance(answer, say.Welcome | say.Refused):
            raise say.MessageError(f"{type(answer).__name__} comes once, at the beginning")
        more_to_come = isinstance(answer, say.Promoting)
        with self._lock:
            taker = self._takers.get(answer.id) if more_to_come else self._takers.pop(answer.id, None)
        if taker is not None:
            _call(taker, answer)

    def _close(self) -> None:
        self._sock.close()
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            self._memory = None  # mapped for as long as somebody has a view of it


def _call(taker: Taker, answer: say.Answer | None) -> None:
    try:
        taker(answer)
    except Exception:  # the other answers of this link are to be taken all the same
        LOG.exception("an answer of the node could not be taken")


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return struct.pack("ll", whole, int(1e6 * (seconds - whole)))


def _touch(memory: Piece, link: Link) -> None:
    """Enter the memory's pages into this process' tables, which would cost every first copy a fault per page."""
    for start in range(0, memory.nbytes, TOUCH_BYTES):
        if link.ended:
            return
        memory[start : start + TOUCH_BYTES : PAGE_BYTES].max()
