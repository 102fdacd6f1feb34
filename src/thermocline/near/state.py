"""The state around a request, typed, asked through the near cache, all of it in one round trip where it can be.

    State        asks a Redis server through `thermocline.near.Redis`, in threads
    AsyncState   the same through `AsyncRedis`
    LocalState   keeps all of it in this process, with no server

What there is to ask stands in sessions.py, embeddings.py and routes.py: it makes questions (question.py), these ask.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from thermocline.errors import CommandError, NearError, SettingsError
from thermocline.near.engine import Engine
from thermocline.near.question import Change, Failing, Question, Replies, Words

if TYPE_CHECKING:
    from thermocline.near.redis import Redis
    from thermocline.near.redis_async import AsyncRedis

T = TypeVar("T")
LOOK_SECONDS = 0.05
"""How often `watch` looks into memory. It asks the server only for what was invalidated."""
AWAY_SECONDS = 1.0
"""How often it does while memory is not served, and each look asks the server."""
Reads = Callable[[str], Sequence[Question[Any]]]
"""What the next request of a session will ask for."""
Blocks = Callable[[str], object]
"""Has a session's KV blocks brought nearer: given its name, begins that, and returns without waiting for it."""


@dataclass(frozen=True, slots=True)
class StateStats:
    """Counts since the start. `failed`: no answer from the server or from `reads`. `damaged`: unreadable bytes.

    Both count what `ask` answered with `otherwise` and what `prefetch` and `watch` passed over, not what they raised.
    """

    prefetched: int = 0
    failed: int = 0
    damaged: int = 0
    blocks_failed: int = 0


@dataclass(frozen=True, slots=True)
class Prefetched:
    """What a prefetch did. `blocks` is what the callable for KV blocks returned, such as the node's job."""

    commands: int
    failed: int
    blocks: object = None


class _Counts:
    """What the colours share: what a session reads, what counts as the server's failure, and the counts."""

    def __init__(self, reads: Reads | None, blocks: Blocks | None, failures: tuple[type[Exception], ...]) -> None:
        self._reads, self._blocks = reads, blocks
        self._failures = failures
        self._lock = threading.Lock()
        self._stats = StateStats()

    def stats(self) -> StateStats:
        """Counts so far."""
        return self._stats

    def _count(self, what: str, more: int = 1) -> None:
        with self._lock:
            self._stats = replace(self._stats, **{what: getattr(self._stats, what) + more})

    def _passed_over(self, error: Exception) -> None:
        self._count("damaged" if isinstance(error, NearError) else "failed")

    def _otherwise(self, question: Question[T], error: Exception) -> T:
        if isinstance(question.otherwise, Failing):
            raise error
        self._passed_over(error)
        return question.otherwise

    def _wanted(self, session: str, more: Sequence[Question[Any]]) -> tuple[list[Words], object]:
        """The commands of a prefetch; the node begins with its part before they are sent."""
        blocks: object = None
        try:
            blocks = self._blocks(session) if self._blocks else None
        except Exception:  # noqa: BLE001  # counted; what is not prefetched is loaded when it is needed
            self._count("blocks_failed")
        questions = list(more)
        try:
            questions[:0] = self._reads(session) if self._reads else ()
        except Exception:  # noqa: BLE001  # as above
            self._count("failed")
        return [words for question in questions if not question.writes for words in question.commands], blocks

    def _done(self, replies: Replies, blocks: object) -> Prefetched:
        failed = sum(isinstance(reply, Exception) for reply in replies)
        self._count("prefetched", len(replies) - failed)
        self._count("failed", failed)
        return Prefetched(len(replies), failed, blocks)


class State(_Counts):
    """Asks through `client`. Any thread.

    `reads(session)` are the questions that a request of this session will ask, for `prefetch`; `blocks(session)` has
    the session's KV blocks brought nearer. Raises SettingsError for a client that decodes: embeddings are bytes.
    """

    def __init__(self, client: Redis, *, reads: Reads | None = None, blocks: Blocks | None = None) -> None:
        from redis.exceptions import RedisError, WatchError

        super().__init__(reads, blocks, (NearError, RedisError))
        self._client, self._lost = binary(client), WatchError

    def ask(self, question: Question[T] | Change[T]) -> T:
        """The answer. Raises what the server's client does where the question says so, and NearError for damage."""
        if isinstance(question, Change):
            return self._changed(question)
        try:
            found = question.read(self._replies(question))
        except self._failures as error:
            return self._otherwise(question, error)
        return self.ask(found) if isinstance(found, Question) else found

    def prefetch(self, session: str, *more: Question[Any]) -> Prefetched:
        """Bring what the next request of a session asks for into memory, in one round trip. Raises nothing."""
        commands, blocks = self._wanted(session, more)
        return self._done(self._read(commands), blocks)

    def watch(
        self, question: Question[T], *, look_seconds: float = LOOK_SECONDS, stop: threading.Event | None = None
    ) -> Iterator[T]:
        """The answer now, and each that differs from the one before, until `stop` is set. Waits in between.

        It looks into memory, which the server keeps right: a change is seen within `look_seconds` of its message.
        Without a tracking link it asks the server once a second. An answer that cannot be had is counted, and passed
        over. Answers between two looks are not seen.
        """
        stop, last = stop or threading.Event(), [object()]
        while not stop.is_set():
            try:
                answer = self.ask(replace(question, otherwise=Failing.RAISES))
            except self._failures as error:
                self._passed_over(error)
            else:
                if answer != last[0]:
                    last[0] = answer
                    yield answer
            stop.wait(self._pause(look_seconds))

    def _pause(self, look_seconds: float) -> float:
        return look_seconds if self._client.near.view.serving() else max(look_seconds, AWAY_SECONDS)

    def _read(self, commands: Sequence[Words]) -> Replies:
        return self._client.near_read(commands)

    def _replies(self, question: Question[Any]) -> Replies:
        commands, client = question.commands, self._client
        if question.writes and len(commands) > 1:
            with client.pipeline() as pipe:
                for words in commands:
                    pipe.execute_command(*words)  # type: ignore[no-untyped-call]  # redis-py has half of its types
                return pipe.execute()
        if len(commands) != 1:
            return known(self._read(commands))
        words = commands[0]
        return [client.get(words[1]) if words[0] == "GET" else client.execute_command(*words)]

    def _changed(self, change: Change[T]) -> T:
        with self._client.pipeline() as pipe:
            pipe.watch(change.key)  # type: ignore[no-untyped-call]  # as above
            commands, answer = change.decide(pipe.get(change.key))  # type: ignore[arg-type]  # it does not decode
            if commands:
                pipe.multi()
                for words in commands:
                    pipe.execute_command(*words)  # type: ignore[no-untyped-call]  # as above
                try:
                    pipe.execute()
                except self._lost:
                    return change.lost
            return answer


class AsyncState(_Counts):
    """See `State`; in asyncio, of one loop. What reading calls that is not ours, a verifier, runs in a thread."""

    def __init__(self, client: AsyncRedis, *, reads: Reads | None = None, blocks: Blocks | None = None) -> None:
        from redis.exceptions import RedisError, WatchError

        super().__init__(reads, blocks, (NearError, RedisError))
        self._client, self._lost = binary(client), WatchError

    async def ask(self, question: Question[T] | Change[T]) -> T:
        """See `State.ask`."""
        if isinstance(question, Change):
            return await self._changed(question)
        try:
            replies = await self._replies(question)
            found = await asyncio.to_thread(question.read, replies) if question.slow else question.read(replies)
        except self._failures as error:
            return self._otherwise(question, error)
        return await self.ask(found) if isinstance(found, Question) else found

    async def prefetch(self, session: str, *more: Question[Any]) -> Prefetched:
        """See `State.prefetch`."""
        commands, blocks = self._wanted(session, more)
        return self._done(await self._client.near_read(commands), blocks)

    async def watch(self, question: Question[T], *, look_seconds: float = LOOK_SECONDS) -> AsyncIterator[T]:
        """See `State.watch`; ends with its task."""
        last = [object()]
        while True:
            try:
                answer = await self.ask(replace(question, otherwise=Failing.RAISES))
            except self._failures as error:
                self._passed_over(error)
            else:
                if answer != last[0]:
                    last[0] = answer
                    yield answer
            serving = self._client.near.view.serving()
            await asyncio.sleep(look_seconds if serving else max(look_seconds, AWAY_SECONDS))

    async def _replies(self, question: Question[Any]) -> Replies:
        commands, client = question.commands, self._client
        if question.writes and len(commands) > 1:
            async with client.pipeline() as pipe:
                for words in commands:
                    pipe.execute_command(*words)
                return await pipe.execute()
        if len(commands) != 1:
            return known(await client.near_read(commands))
        words = commands[0]
        return [await (client.get(words[1]) if words[0] == "GET" else client.execute_command(*words))]

    async def _changed(self, change: Change[T]) -> T:
        async with self._client.pipeline() as pipe:
            await pipe.watch(change.key)
            commands, answer = change.decide(await pipe.get(change.key))  # type: ignore[arg-type]  # it does not decode
            if commands:
                pipe.multi()  # type: ignore[no-untyped-call]  # as above
                for words in commands:
                    pipe.execute_command(*words)
                try:
                    await pipe.execute()
                except self._lost:
                    return change.lost
            return answer


class LocalState(State):
    """The same with no server: all of it lies in this process, within `bytes_max`, and goes with it. Any thread."""

    def __init__(self, bytes_max: int, *, reads: Reads | None = None, blocks: Blocks | None = None) -> None:
        _Counts.__init__(self, reads, blocks, (NearError, CommandError))
        self._engine, self._one = Engine(bytes_max), threading.RLock()
        self._session = self._engine.connect(lambda: None)

    def _pause(self, look_seconds: float) -> float:
        return look_seconds

    def _read(self, commands: Sequence[Words]) -> Replies:
        with self._one:
            return [
                self._engine.execute(self._session, [w if isinstance(w, bytes) else str(w).encode() for w in words])
                for words in commands
            ]

    def _replies(self, question: Question[Any]) -> Replies:
        return known(self._read(question.commands))

    def _changed(self, change: Change[T]) -> T:
        with self._one:
            commands, answer = change.decide(known(self._read([("GET", change.key)]))[0])
            known(self._read(commands))
            return answer


def known(replies: Replies) -> Replies:
    """Replies none of which is an error. Raises the first that is one."""
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


C = TypeVar("C", bound="Redis | AsyncRedis")


def binary(client: C) -> C:
    """A client of ours whose replies are bytes. Raises SettingsError."""
    if not hasattr(client, "near_read") or client.connection_pool.connection_kwargs.get("decode_responses"):
        raise SettingsError(
            "this client cannot serve state",
            hint="give one of thermocline.near's, without decode_responses: embeddings are bytes",
        )
    return client
