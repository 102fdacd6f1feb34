"""redis-py's client with hot reads from memory. Same constructor, same methods, same results.

    from thermocline.near import Redis        # was: from redis import Redis

Each command is asked of commands.py what it means; coherence.py says what to do; here it is done, in threads.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError, Future
from typing import Any, Self

import redis
import redis.client

from thermocline.clock import SystemClock
from thermocline.near.coherence import Background, Fetch, Flights, Lease, Steps, Wait
from thermocline.near.commands import EFFECTS, WRITING, Args, Kind, effect
from thermocline.near.held import Reply
from thermocline.near.options import Options
from thermocline.near.together import together
from thermocline.near.tracking import Near, near_of

NOW = SystemClock.now
UNSERVED = Lease()
PlainRedis = redis.Redis
"""redis-py's own client, for what compares the two."""


def nothing(_: object) -> None:
    """What memory holds for a client that may not be served from it."""


class Kept:
    """What both clients share: where their memory is, and when it may not be used."""

    connection_pool: Any
    near: Near

    def __init__(self, *args: Any, near: Options | None = None, **kwargs: Any) -> None:  # noqa: ANN401  # redis-py's
        super().__init__(*args, **kwargs)
        self.near_attach(near)

    @classmethod
    def from_url(cls, url: str, *, near: Options | None = None, **kwargs: Any) -> Self:  # noqa: ANN401  # redis-py's
        """As in redis-py."""
        client: Self = super().from_url(url, **kwargs)  # type: ignore[misc]  # of the class beside this one
        client.near_attach(near)
        return client

    def get(self, name: Any) -> Any:  # noqa: ANN401  # redis-py's signature
        """As in redis-py; from memory within 200 ns, where it is held."""
        try:
            entry = self._near_find(name)
        except (TypeError, ValueError):  # no key, or one that has no hash
            entry = None
        if entry is not None:
            now = NOW()
            if now < entry.deadline and now < self._near_lease.until:
                text = entry.value.text
                if text is not None:
                    entry.touched = now
                    entry.hits += 1
                    return text
        return super().get(name)  # type: ignore[misc]  # of the class beside this one

    def client(self) -> Self:
        """As in redis-py: one with a connection of its own."""
        pool = self.connection_pool
        return type(self)(connection_pool=pool, single_connection_client=True, near=self.near.options)

    def near_attach(self, options: Options | None) -> None:
        """Use the memory of all clients set up like this one."""
        if hasattr(self, "near"):  # `from_url` has made one without options first
            self.near.leave(self)
        self.near = near_of(self.connection_pool, options or Options())
        self._near_held = self._near_off = False
        self.near_bind()

    def near_bind(self) -> None:
        """Look into the memory that is ours now: none while replies are no values, another one after a fork."""
        self.near.join(self)
        unserved = self._near_held or self._near_off
        away = unserved or self.near.recorder is not None  # then each `get` goes where it is noted
        self._near_find = nothing if away else self.near.view.cache.entries.get
        self._near_lease = UNSERVED if unserved else self.near.view.lease

    def near_kind(self, args: Args, options: Mapping[str, Any]) -> Kind:
        """What kind of command this is, for this client, now."""
        kind = effect(args).kind
        if kind in {Kind.HOLD, Kind.RELEASE, Kind.ELSEWHERE}:
            self._near_held = kind is Kind.HOLD
            self._near_off = self._near_off or kind is Kind.ELSEWHERE
            self.near_bind()
        if self._near_off or self._near_held:
            return Kind.UNKNOWN if kind in WRITING else Kind.NOTHING
        if kind is Kind.LOCAL:
            if options.keys() - {"keys"}:  # it wants its reply in another form
                return Kind.NOTHING
            self.near.link.start(self.near.view)
            if self._near_lease is not self.near.view.lease:
                self.near_bind()
        return kind

    def near_steps(self, kind: Kind, args: Args, flights: Flights) -> Steps:
        """What this command takes, noted where that is asked for."""
        view, recorder = self.near.view, self.near.recorder
        if kind in WRITING:
            return view.write([(effect(args), args)])
        steps = view.read(args, flights)
        return steps if recorder is None else recorder.noted(steps, [args])

    def near_together(self, commands: Sequence[Args], flights: Flights) -> Steps:
        """What several reads take in one round trip, noted where that is asked for."""
        local, recorder = self.near_kind(("GET", ""), {}) is Kind.LOCAL, self.near.recorder
        steps = together(self.near.view, commands, flights, local=local)
        return steps if recorder is None else recorder.noted(steps, commands)

    def set_response_callback(self, command: str, callback: Any) -> None:  # noqa: ANN401  # redis-py's name and types
        """As in redis-py. With own callbacks, values are no longer what other clients keep: this one reads plainly."""
        if command.upper() in EFFECTS and EFFECTS[command.upper()].kind is Kind.LOCAL:
            self._near_off = True
            self.near_bind()
        super().set_response_callback(command, callback)  # type: ignore[misc]  # of the class beside this one


class Pipeline(redis.client.Pipeline):
    """redis-py's pipeline. Nothing in it is served from memory; what it changes is forgotten."""

    near: Near

    def execute(self, raise_on_error: bool = True) -> list[Any]:  # noqa: FBT001, FBT002  # redis-py's signature
        """As in redis-py."""
        commands = [args for args, _ in self.command_stack]
        view = self.near.view
        replies = drive(view.write([(effect(args), args) for args in commands]), self, super().execute, raise_on_error)
        view.saw(commands, replies)
        return replies  # type: ignore[no-any-return]  # redis-py's own

    def immediate_execute_command(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401  # redis-py's signature
        """As in redis-py: what is sent at once while keys are watched."""
        done = super().immediate_execute_command
        return drive(self.near.view.write([(effect(args), args)]), self, done, *args, **options)


class Redis(Kept, redis.Redis):
    """redis-py's `Redis`, and `near=Options(...)`: how values are kept. `client.near.stats()` counts."""

    def close(self) -> None:
        """As in redis-py."""
        super().close()
        if hasattr(self, "near"):  # or it failed as it was made
            self.near.leave(self)

    def execute_command(self, *args: Any, **options: Any) -> Any:  # noqa: ANN401  # redis-py's signature
        """As in redis-py; hot reads from memory."""
        kind, plain = self.near_kind(args, options), super().execute_command
        if kind is Kind.NOTHING:
            return plain(*args, **options)  # type: ignore[no-untyped-call]  # as above
        return drive(self.near_steps(kind, args, self.near.view.flights), self, plain, *args, **options)

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Pipeline:  # noqa: ANN401, FBT001, FBT002  # redis-py's signature
        """As in redis-py."""
        pipeline = Pipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        pipeline.near = self.near
        return pipeline

    def near_read(self, commands: Sequence[Args]) -> list[Reply]:
        """Several reads, such as ("GET", key): what memory lacks of all of them takes one round trip, and is kept.

        Each reads as by itself, `("LRANGE", key, 0, -1)` and MGET too. Errors are among the replies.
        """
        return drive(self.near_together(commands, self.near.view.flights), self, None)  # type: ignore[no-any-return]  # whatever the commands answer

    def near_fetch(self, commands: tuple[Args, ...]) -> list[Reply]:
        """Several commands in one round trip; errors are among the replies."""
        if self.connection is not None:  # a pipeline would take another connection
            return [self._near_tried(command) for command in commands]
        with redis.client.Pipeline(self.connection_pool, self.response_callbacks, False, None) as batch:  # noqa: FBT003  # redis-py's constructor
            for command in commands:
                batch.execute_command(*command)  # type: ignore[no-untyped-call]  # as above
            return batch.execute(raise_on_error=False)

    def _near_tried(self, command: Args) -> Reply:
        try:
            return super().execute_command(*command)  # type: ignore[no-untyped-call]  # as above
        except redis.ResponseError as error:
            return error


def drive(steps: Steps, client: Any, plain: Any, /, *args: Any, **options: Any) -> Any:  # noqa: ANN401  # any client, any command
    """Take the steps of one command."""
    try:
        step = next(steps)
        while True:
            try:
                if isinstance(step, Fetch):
                    reply = client.near_fetch(step.commands)
                elif isinstance(step, Wait):
                    reply = landed(step.future, step.seconds)
                elif isinstance(step, Background):
                    reply = begun(step.steps, client)
                else:
                    reply = plain(*args, **options)
            except BaseException as error:  # noqa: BLE001  # the steps say what it means
                step = steps.throw(error)
            else:
                step = steps.send(reply)
    except StopIteration as end:
        return end.value


def begun(steps: Steps, client: Any) -> bool:  # noqa: ANN401  # any client
    """Take steps in a thread of their own, where there is a connection for it; whether that was begun."""
    if client.connection is not None:
        return False
    try:
        threading.Thread(target=drive, args=(steps, client, None), name="near-refresh", daemon=True).start()
    except RuntimeError:  # no more threads to be had
        return False
    return True


def landed(future: Future[Any], seconds: float) -> bool:
    """Wait for a future, whatever becomes of it; whether it is done."""
    with contextlib.suppress(TimeoutError, CancelledError):
        future.exception(seconds)
    return future.done()
