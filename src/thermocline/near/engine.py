"""An embedded server's meaning: what each command does, for sessions of clients. No bytes of a protocol, no I/O.

    Engine     the keys, who watches and follows them, and the sessions; `execute` runs one command
    Session    one client: what it chose (protocol, tracking), its transaction, and pushes that wait for it

One thread uses an engine. Nothing is kept when the process ends: durable state belongs in Redis or Valkey.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

from thermocline.clock import Clock, SystemClock
from thermocline.errors import CommandError
from thermocline.near import engine_containers, engine_sessions, engine_strings  # noqa: F401  # they fill the table
from thermocline.near.engine_keys import Keyspace
from thermocline.near.engine_table import TABLE, Command, Reply, wrong_number
from thermocline.near.engine_tracking import Followers, Following

REFUSED = (
    "EVAL EVALSHA EVAL_RO EVALSHA_RO SCRIPT FUNCTION FCALL FCALL_RO SAVE BGSAVE BGREWRITEAOF LASTSAVE SHUTDOWN DUMP "
    "RESTORE MIGRATE REPLICAOF SLAVEOF PSYNC SYNC WAIT CLUSTER MODULE MONITOR DEBUG"
)
"""Commands of Redis that an embedded cache does not have on purpose, unlike those that it merely lacks."""
NO_DURABILITY = "this is a cache in memory: scripts, replicas and durable state belong in Redis or Valkey"
NOT_QUEUED = frozenset({"multi", "exec", "discard", "watch", "unwatch", "quit"})
NOT_IN_MULTI = frozenset({"subscribe", "unsubscribe", "hello", "auth"})
WITHOUT_PASSWORD = frozenset({"auth", "hello", "quit"})
WHILE_SUBSCRIBED = frozenset({"subscribe", "unsubscribe", "ping", "quit"})
PARENTS = {b"CLIENT", b"CONFIG"}
"""Nothing without a subcommand."""
QUEUED_BYTES_MAX = 64 << 20
NAME_SHOWN_MAX = 128


@dataclass(slots=True, eq=False)
class Session:
    """One client. `wake` is called when something was pushed, or `closing` was set, from another client's command."""

    id: int
    wake: Callable[[], None]
    authenticated: bool
    protocol: int = 2
    queue: list[tuple[Command, list[bytes]]] | None = None
    queue_spoilt: bool = False
    queued_bytes: int = 0
    watched: dict[bytes, None] | None = None
    stale: bool = False
    """A watched key has changed."""
    following: Following | None = None
    channels: dict[bytes, None] = field(default_factory=dict)
    pushes: list[Reply] | None = None
    closing: bool = False

    def push(self, message: tuple[Reply, ...]) -> None:
        """Have it sent, behind the reply to what this client is waiting for."""
        if self.pushes is None:
            self.pushes = []
        self.pushes.append(message)
        self.wake()

    @property
    def listens(self) -> bool:
        """Only to channels, as in RESP2, where a push cannot be told from a reply."""
        return self.protocol < 3 and bool(self.channels)  # noqa: PLR2004  # as said


class Engine:
    """Commands on keys in memory of at most `bytes_max`. A `password` must be said before any other command."""

    def __init__(self, bytes_max: int, *, password: bytes | None = None, clock: Clock | None = None) -> None:
        self.clock: Clock = clock or SystemClock()
        self.password = password
        self.keys = Keyspace(bytes_max)
        self.followers = Followers()
        self.watchers: dict[bytes, set[Session]] = {}
        self.subscribers: dict[bytes, set[Session]] = {}
        self.sessions: dict[int, Session] = {}
        self.started = self.clock.wall()
        self.commands = 0
        self.bytes_max = bytes_max
        self._ids = count(1)

    # -- sessions ------------------------------------------------------------------------------------------------------

    def connect(self, wake: Callable[[], None]) -> Session:
        """A client came."""
        session = Session(next(self._ids), wake, self.password is None)
        self.sessions[session.id] = session
        return session

    def disconnect(self, session: Session) -> None:
        """It went."""
        self.sessions.pop(session.id, None)
        engine_sessions.forget(self, session)

    # -- commands ------------------------------------------------------------------------------------------------------

    def execute(self, session: Session, words: list[bytes]) -> Reply:
        """Run a command and return its reply; an error is returned, too, as the CommandError that says it."""
        keys = self.keys
        keys.begin(self.clock.wall())
        keys.protocol = session.protocol
        self.commands += 1
        try:
            command = TABLE.get(words[0]) or self._find(words)
            command.check(words)
            reply = self._gated(session, command, words)
        except CommandError as error:
            if session.queue is not None:
                session.queue_spoilt = True
            reply = error
        if keys.changed or keys.cleared:
            self.tell(session)
        return reply

    def tick(self) -> None:
        """Let what has ended go. To be called now and then, so that it is announced also while nobody asks."""
        self.keys.begin(self.clock.wall())
        if self.keys.changed:
            self.tell(None)

    def run(self, session: Session, command: Command, words: list[bytes]) -> Reply:
        """Run a command whose turn it is."""
        if command.of_session:
            return command.run(self, session, words)
        reply: Reply = command.run(self.keys, words)
        if session.following is not None and command.reads:
            self.followers.remember(session, command.keys_in(words))
        return reply

    def tell(self, author: Session | None) -> None:
        """Say to those who watch or follow keys that these have changed."""
        keys = self.keys
        changed, keys.changed = dict.fromkeys(keys.changed), []
        if keys.cleared:
            keys.cleared = False
            self.followers.all_changed(author)
            changed |= dict.fromkeys(self.watchers)
        for key in changed if self.watchers else ():
            for session in self.watchers.get(key, ()):
                session.stale = True
        if changed and self.followers:
            self.followers.changed(list(changed), author)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _gated(self, session: Session, command: Command, words: list[bytes]) -> Reply:
        """A session that has something to be looked at first."""
        if not session.authenticated and command.name not in WITHOUT_PASSWORD:
            raise CommandError("NOAUTH Authentication required.")
        if session.listens and command.name not in WHILE_SUBSCRIBED:
            raise CommandError(f"ERR Can't execute '{command.name}' while subscribed")
        if session.queue is None or command.name in NOT_QUEUED:
            return self.run(session, command, words)
        if command.name in NOT_IN_MULTI:
            raise CommandError("ERR Command not allowed inside a transaction")
        session.queued_bytes += sum(map(len, words)) + len(words)
        if session.queued_bytes > QUEUED_BYTES_MAX:
            raise CommandError("ERR this transaction is too large", hint=f"it may have {QUEUED_BYTES_MAX} bytes")
        session.queue.append((command, words))
        return "QUEUED"

    def _find(self, words: list[bytes]) -> Command:
        name = words[0].upper()
        if name in PARENTS and len(words) == 1:
            raise wrong_number(name.decode().lower())
        command = TABLE.get(name + b"|" + words[1].upper() if name in PARENTS else name)
        if command is not None:
            return command
        if name in PARENTS:
            shown = words[1][:NAME_SHOWN_MAX].decode(errors="replace")
            raise CommandError(f"ERR unknown subcommand '{shown}'. Try {name.decode()} HELP.")
        shown = words[0][:NAME_SHOWN_MAX].decode(errors="replace")
        if name.decode("latin-1") in REFUSED.split():
            raise CommandError(f"ERR '{shown}' is not offered here", hint=NO_DURABILITY)
        begins = "".join(f"'{word[:NAME_SHOWN_MAX].decode(errors='replace')}' " for word in words[1:21])
        raise CommandError(f"ERR unknown command '{shown}', with args beginning with: {begins}")
