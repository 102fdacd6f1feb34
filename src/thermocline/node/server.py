"""The node: listens on a Unix socket, hands out the memory, and serves each client in a thread of its own."""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
from pathlib import Path

import msgspec

import thermocline
from thermocline.blocks.layout import Layout
from thermocline.clock import Clock, SystemClock
from thermocline.errors import NodeError
from thermocline.node.announce import Announcer
from thermocline.node.paths import checked
from thermocline.node.session import Session
from thermocline.store.store import Store
from thermocline.wire import messages as say
from thermocline.wire.sockets import private_socket
from thermocline.wire.status import ClientStatus, NodeStatus, TierStatus

LOG = logging.getLogger("thermocline.node")
CLIENTS_MAX = 256
GREETED_MAX = 64
"""More clients do not say hello at a time: what comes then has to try again."""
HELLO_SECONDS = 0.5
HELLO_BYTES_MAX = 4096
SEND_SECONDS = 1.0
"""A client that does not read its answers for so long is let go."""
SEND_BUFFER_BYTES = 4 << 20
DRAIN_SECONDS = 5.0
_CREDENTIALS = struct.Struct("3i")


class NodeServer:
    """Serves one store. The socket is there when this returns; close the server before the store."""

    def __init__(
        self,
        store: Store,
        path: Path,
        *,
        lease_seconds: float,
        clock: Clock | None = None,
        announcer: Announcer | None = None,
    ) -> None:
        """Raises NodeError where another node listens at `path` already, or nobody can."""
        self._announcer = announcer
        self._store, self.path = store, checked(path)
        self._clock = clock or SystemClock()
        self._lease_seconds = lease_seconds
        self._started = self._clock.now()
        self._incarnation = int.from_bytes(os.urandom(7), "little") | 1
        self._sessions: dict[Session, threading.Thread] = {}
        self._lock = threading.Lock()
        self._greeting = threading.Semaphore(GREETED_MAX)
        self._closing = False
        self.last_seen = self._started
        hint = "use it, or give --socket another path, in a folder of yours; `thermocline ps` shows who listens"
        self._listener = private_socket(self.path, "node", hint=hint, error=NodeError)
        self._inode = self.path.lstat().st_ino
        self._thread = threading.Thread(target=self._accept, name="node", daemon=True)
        self._thread.start()

    @property
    def clients(self) -> int:
        """How many are connected."""
        return len(self._sessions)

    def idle_seconds(self) -> float:
        """How long nobody has been connected; 0 while somebody is."""
        with self._lock:
            return 0.0 if self._sessions else self._clock.now() - self.last_seen

    def close(self) -> None:
        """Answer what was asked, let all clients go, and take the socket away. A second call does nothing."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            sessions = list(self._sessions.items())
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(DRAIN_SECONDS)
        self._listener.close()
        for session, _ in sessions:
            session.drain()
        deadline = self._clock.now() + DRAIN_SECONDS
        for _, thread in sessions:
            thread.join(max(0.0, deadline - self._clock.now()))
        try:
            if self.path.lstat().st_ino == self._inode:  # another node may have the name by now
                self.path.unlink()
        except FileNotFoundError:
            LOG.info("the socket %s was removed meanwhile", self.path)

    # -- reports -------------------------------------------------------------------------------------------------------

    def status(self) -> bytes:
        """See `Reports.status`: a NodeStatus."""
        return msgspec.json.encode(self._status())

    def metrics(self) -> bytes:
        """See `Reports.metrics`."""
        self._store.measure()
        return self._store.metrics.text().encode()

    def declared(self, layout: Layout) -> None:
        """See `Reports.declared`: blocks of this layout are announced, where any are."""
        if self._announcer is not None:
            self._announcer.declare(layout)

    def _status(self) -> NodeStatus:
        store = self._store
        with self._lock:
            sessions = list(self._sessions)
        count = store.metrics.value
        return NodeStatus(
            thermocline.__version__,
            os.getpid(),
            str(self.path),
            self._clock.now() - self._started,
            [
                TierStatus(
                    name,
                    store.medium(name),
                    usage.blocks,
                    usage.used_bytes,
                    usage.capacity_bytes,
                    int(count("load_blocks_total", (("tier", name), ("outcome", "hit")))),
                    not store.is_well(name),
                )
                for name, usage in store.usage().items()
            ],
            [ClientStatus(each.role, each.pid, len(each.layouts), each.leases, each.lent) for each in sessions],
            int(count("asked_blocks_total")),
            {name: int(count("staged_blocks_total", (("tier", name),))) for name in store.usage()},
        )

    # -- connections ---------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                LOG.warning("a client could not connect: %s", error)
                self._clock.sleep(0.1)  # out of descriptors, most likely: not to be tried a million times a second
                continue
            if self._greeting.acquire(blocking=False):
                threading.Thread(target=self._greet, args=(sock,), name="client", daemon=True).start()
            else:
                sock.close()

    def _greet(self, sock: socket.socket) -> None:
        """Hear who it is, hand out the memory, serve."""
        inbox = say.Inbox()
        try:
            session = self._admit(sock, inbox)
        except (OSError, say.MessageError) as error:
            LOG.info("a client left before it was served: %s", error)
            session = None
        finally:
            self._greeting.release()
        if session is None:
            sock.close()
            return
        try:
            session.serve(inbox)
        finally:
            with self._lock:
                self._sessions.pop(session, None)
                self.last_seen = self._clock.now()

    def _admit(self, sock: socket.socket, inbox: say.Inbox) -> Session | None:
        pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        hello = self._first(sock, inbox)
        refused = self._refusal(uid, hello)
        if refused is not None:
            sock.sendall(say.encode(refused))
            return None
        welcome = say.Welcome(say.PROTOCOL, thermocline.__version__, self._incarnation, self._store.memory_bytes)
        socket.send_fds(sock, [say.encode(welcome)], [self._store.memory_fd])
        sock.settimeout(None)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        seconds = int(SEND_SECONDS)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", seconds, 0))
        session = Session(
            sock,
            self._store,
            self,
            clock=self._clock,
            role=hello.role[:80],
            pid=pid,
            lease_seconds=self._lease_seconds,
        )
        with self._lock:
            if self._closing:
                return None
            self._sessions[session] = threading.current_thread()
        return session

    def _first(self, sock: socket.socket, inbox: say.Inbox) -> say.Hello:
        """The first message. What follows it waits for the answer, so nothing of it can be here already."""
        deadline = self._clock.now() + HELLO_SECONDS
        received = 0
        while (left := deadline - self._clock.now()) > 0 and received < HELLO_BYTES_MAX:
            sock.settimeout(left)
            said = sock.recv(HELLO_BYTES_MAX)
            received += len(said)
            for body in inbox.feed(said):
                hello = say.client_says(body)
                if isinstance(hello, say.Hello):
                    return hello
                raise say.MessageError("the first message must be Hello")
            if not said:
                break
        raise say.MessageError("nobody said hello")

    def _refusal(self, uid: int, hello: say.Hello) -> say.Refused | None:
        if uid != os.getuid():
            return say.Refused(f"this node serves user {os.getuid()} only", "start a node of your own")
        if hello.protocol != say.PROTOCOL:
            return say.Refused(
                f"this node ({thermocline.__version__}) speaks protocol {say.PROTOCOL}, "
                f"the client ({hello.version[:40]}) {hello.protocol}",
                "run node and engines with the same version of thermocline",
            )
        if len(self._sessions) >= CLIENTS_MAX:
            return say.Refused(f"{CLIENTS_MAX} clients are connected already", "end some, or start a second node")
        return None
